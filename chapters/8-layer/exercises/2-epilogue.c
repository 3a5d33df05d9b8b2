/* Exercise 8.2, starter, right: both branches are stored as float32 and added in a pass of their own. */
#include "8-layer/exercises/layer.h"

static size_t needed(const void *args) {
    const fmoe_layer_args *a = args;
    size_t bytes = 0;
    carve(NULL, &bytes, 2 * (size_t)a->d * sizeof(float));
    run_new(a, 0, a->T, NULL, NULL, &bytes);
    return bytes;
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
    gemm_target shared = {FMOE_F32, r.shared, a->d};
    status = shared_branch(&r, gemm_store, &shared);
    add_branches(&r);
    return status;
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "layer", .name = "two passes", .run = run_layer, .workspace = needed};
