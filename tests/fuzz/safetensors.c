/* libFuzzer target: whatever the bytes, fmoe_file_parse either refuses them with a message or returns tensors that can
 * be read from end to end. `make fuzz` runs it. */
#include "../../ref_cpu/fmoe.h"

#include <stdlib.h>
#include <string.h>

static void require(bool ok) {
    if (!ok)
        abort();
}

/* Reads everything there is to read; the sanitizers see to the rest. */
static void use(const fmoe_file *file, size_t size) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < fmoe_file_count(file); i++) {
        const fmoe_tensor *tensor = fmoe_file_tensor(file, i);
        bytes += tensor->count * (int64_t)fmoe_dtype_size(tensor->dtype);
        require(fmoe_file_find(file, tensor->name) == tensor);
        float *values;
        fmoe_status status = fmoe_file_read_f32(file, tensor->name, tensor->rank, tensor->shape, &values);
        require((status == FMOE_OK) == (tensor->dtype != FMOE_I32 && tensor->dtype != FMOE_I64));
        free(values);
    }
    require(bytes <= (int64_t)size);
    fmoe_config config = {.num_experts_per_tok = 1};
    fmoe_weights weights;
    if (fmoe_weights_load(file, "", &config, &weights) == FMOE_OK)
        require(config.num_experts_per_tok >= 1 && weights.router_gate && weights.running_var);
    fmoe_weights_free(&weights);
}

static void parse(const uint8_t *bytes, size_t size) {
    fmoe_file *file;
    fmoe_status status = fmoe_file_parse(bytes, size, "fuzz", &file);
    require((status == FMOE_OK) == (file != NULL));
    require(status == FMOE_OK || strncmp(fmoe_error_message(), "fuzz: ", 6) == 0);
    if (file)
        use(file, size);
    fmoe_file_close(file);
}

/* Once as it is, and once with the header's length put right: otherwise few mutations would get past it. */
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    parse(bytes, size);
    const uint8_t *brace = size > 8 ? memrchr(bytes + 8, '}', size - 8) : NULL;
    uint64_t length = brace ? (uint64_t)(brace - bytes) - 7 : 0;
    if (length > 0 && memcmp(&length, bytes, 8) != 0) {
        uint8_t *copy = malloc(size);
        require(copy != NULL);
        memcpy(copy, bytes, size);
        memcpy(copy, &length, 8);
        parse(copy, size);
        free(copy);
    }
    return 0;
}
