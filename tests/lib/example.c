// A layer from a file, run on the input that lies in the same file, and compared with the output that lies there too.
// Where the library is installed one command compiles this:
//
//     cc example.c $(pkg-config --cflags --libs flashmoe) -o example

// [example]
#include <fmoe.h>
#include <stdio.h>
#include <stdlib.h>

static void must(fmoe_status status) {
    if (status != FMOE_OK) {
        fprintf(stderr, "%s: %s\n", fmoe_status_name(status), fmoe_error_message());
        exit(1);
    }
}

int main(int argc, char **argv) {
    fmoe_file *file;
    fmoe_config config = {0}; // the file's tensors have the sizes, its metadata K
    fmoe_weights weights;
    must(fmoe_file_open(argc > 1 ? argv[1] : "layer.safetensors", &file));
    must(fmoe_weights_load(file, "", &config, &weights));

    const fmoe_tensor *input = fmoe_file_find(file, "x"); // [batch, seq_len, hidden_size]
    if (!input || input->rank != 3)
        return 1;
    int64_t T = input->shape[0] * input->shape[1], K = config.num_experts_per_tok;
    float *x, *expected, *y = malloc(sizeof *y * input->count);
    int32_t *indices = malloc(sizeof *indices * T * K);
    must(fmoe_file_read_f32(file, "x", 3, input->shape, &x));
    must(fmoe_file_read_f32(file, "y", 3, input->shape, &expected));

    must(fmoe_layer_forward(&config, &weights, false, T, x, NULL, &(fmoe_outputs){.y = y, .indices = indices}));
    printf("%d tokens, each to %d of %d experts, the first one's favourite is expert %d\n", (int)T, (int)K,
           (int)config.num_experts, indices[0]);
    printf("error of y: %.1e\n", fmoe_relative_error(input->count, y, expected, 0));
    fmoe_file_close(file);
    fmoe_weights_free(&weights);
    free(x), free(expected), free(y), free(indices);
}
// [/example]
