/* How much memory an expert step takes: ./memory T1024-d256-N16384-K64-normal-f32
 *
 * Prints a CSV row a rung: bytes of the inputs and outputs, of the workspace that the rung asks for, and the growth of
 * the process's peak resident memory from before the inputs were allocated to after the rung ran. */
#include "../chapters/steps.h"

#include <stdlib.h>
#include <string.h>

/* A field of /proc/self/status in bytes; 0 where there is no such file. */
static double process_bytes(const char *field) {
    FILE *file = fopen("/proc/self/status", "r");
    char line[256];
    double kilobytes = 0;
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, field, strlen(field)))
            kilobytes = strtod(line + strlen(field) + 1, NULL);
    if (file)
        fclose(file);
    return kilobytes * 1024;
}

/* From here on VmHWM counts again from what is resident now. */
static void forget_peak(void) {
    FILE *file = fopen("/proc/self/clear_refs", "w");
    if (!file)
        return;
    fputs("5", file);
    fclose(file);
}

/* A [rows, columns] tensor as stored, of normal values; drawn row by row, so that nothing else is ever resident. */
static void *drawn(uint64_t stream, fmoe_dtype dtype, int64_t rows, int64_t columns) {
    char *tensor = malloc((size_t)(rows * columns) * fmoe_dtype_size(dtype) + 1);
    float *row = malloc((size_t)columns * sizeof *row + 1);
    for (int64_t r = 0; tensor && row && r < rows; r++) {
        fmoe_fill_normal((uint64_t)r, stream, 0.1f, columns, row);
        fmoe_from_f32(dtype, columns, row, tensor + r * columns * (int64_t)fmoe_dtype_size(dtype));
    }
    free(row);
    return tensor;
}

static int measure(const fmoe_case *c, const char *name, fmoe_rung_fn *rung, fmoe_workspace_fn *workspace_of) {
    size_t size = fmoe_dtype_size(c->dtype), pairs = (size_t)(c->T * c->K);
    double before = process_bytes("VmRSS");
    int32_t *indices = malloc(pairs * sizeof *indices + 1);
    float *weights = malloc(pairs * sizeof *weights + 1);
    fmoe_expert_args args = {.T = c->T, .d = c->d, .N = c->N, .K = c->K, .dtype = c->dtype};
    args.from_router = c->routing == ROUTING_NORMAL || c->routing == ROUTING_TRAINED;
    args.x = drawn(1, c->dtype, c->T, c->d);
    args.down = drawn(2, c->dtype, c->N, c->d), args.up = drawn(3, c->dtype, c->N, c->d);
    args.y = malloc((size_t)(c->T * c->d) * size + 1);
    args.indices = indices, args.weights = weights;
    size_t workspace_bytes = workspace_of ? workspace_of(&args) : 0;
    void *workspace = NULL;
    bool ready = indices && weights && args.x && args.down && args.up && args.y &&
                 posix_memalign(&workspace, 256, workspace_bytes + 1) == 0 &&
                 fmoe_case_route(c, 1, indices, weights) == FMOE_OK;
    forget_peak();
    if (!ready || rung(&args, workspace, workspace_bytes, NULL) != FMOE_OK) {
        fprintf(stderr, "memory: %s does not run at %s: %s\n", name, c->name, fmoe_error_message());
        return 1;
    }
    double tensors = (double)size * (double)(2 * c->T * c->d + 2 * c->N * c->d) +
                     (double)pairs * (sizeof *indices + sizeof *weights);
    printf("%s,%.0f,%zu,%.0f\n", name, tensors, workspace_bytes, process_bytes("VmHWM") - before);
    free(indices);
    free(weights);
    free(workspace);
    free((void *)args.x);
    free((void *)args.down);
    free((void *)args.up);
    free(args.y);
    return 0;
}

int main(int argc, char **argv) {
    fmoe_case c;
    if (argc != 2 || fmoe_case_parse(argv[1], &c) != FMOE_OK) {
        fprintf(stderr, "usage: memory CASE, e.g. T1024-d256-N16384-K64-normal-f32\n");
        return 2;
    }
    printf("rung,tensor_bytes,workspace_bytes,peak_bytes\n");
    return measure(&c, "chapter 1", cpu_expert_token_best, cpu_expert_token_best_workspace) ||
           measure(&c, "chapter 5", cpu_expert_scheduled_best, cpu_expert_scheduled_best_workspace);
}
