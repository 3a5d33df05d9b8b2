/* Exercise 8.2, solution: the MLP's last product adds the routed branch to a tile while it is in registers, and rounds
 * it. */
#include "8-layer/exercises/layer.h"

static size_t needed(const void *args) {
    const fmoe_layer_args *a = args;
    size_t bytes = 0;
    carve(NULL, &bytes, 2 * (size_t)a->d * sizeof(float));
    run_new(a, 0, a->T, NULL, NULL, &bytes);
    return bytes;
}

/* Epilogue of the last product. A tile is its only chance to be rounded, and it comes once. */
static void add_routed(void *context, int64_t row, int64_t column, int64_t rows, int64_t columns,
                       const float (*values)[GEMM_NR]) {
    const run_of_tokens *r = context;
    int64_t size = (int64_t)fmoe_dtype_size(r->a->dtype);
    for (int64_t t = row; t < row + rows; t++) {
        float *sum = r->routed + t * r->a->d + column;
        for (int64_t c = 0; c < columns; c++)
            sum[c] += values[t - row][c];
        fmoe_from_f32(r->a->dtype, columns, sum, (char *)r->a->y + ((r->first + t) * r->a->d + column) * size);
    }
}

static fmoe_status run_layer(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_layer_args *a = args;
    size_t used = 0;
    float *statistics = carve(workspace, &used, 2 * (size_t)a->d * sizeof(float));
    (void)workspace_bytes, (void)stream;
    fmoe_status status = find_statistics(a, statistics);
    if (status != FMOE_OK)
        return status;
    run_of_tokens r = run_new(a, 0, a->T, statistics, workspace, &used);
    status = route(&r);
    if (status != FMOE_OK)
        return status;
    experts(&r);
    return shared_branch(&r, add_routed, &r);
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "layer", .name = "one pass", .run = run_layer, .workspace = needed};
