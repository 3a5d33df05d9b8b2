/* Exercise 8.1, solution: blocks of 96 tokens, eight whole tiles of twelve. */
#include "8-layer/exercises/layer.h"

enum { TOKENS = 96 }; /* a thread takes through all steps at a time */

static size_t layout(const fmoe_layer_args *a, size_t *statistics) {
    size_t bytes = 0;
    run_new(a, 0, smaller(TOKENS, a->T), NULL, NULL, &bytes);
    *statistics = bytes * (size_t)omp_get_max_threads();
    return bytes;
}

static size_t needed(const void *args) {
    const fmoe_layer_args *a = args;
    size_t bytes;
    layout(a, &bytes);
    return bytes + 2 * (size_t)a->d * sizeof(float);
}

static fmoe_status run_layer(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_layer_args *a = args;
    size_t at, each = layout(a, &at);
    float *statistics = (float *)((char *)workspace + at);
    (void)workspace_bytes, (void)stream;
    fmoe_status status = find_statistics(a, statistics);
    if (status != FMOE_OK)
        return status;
    bool failed = false;
#pragma omp parallel for schedule(dynamic) reduction(|| : failed)
    for (int64_t first = 0; first < a->T; first += TOKENS) {
        size_t used = each * (size_t)omp_get_thread_num();
        run_of_tokens r = run_new(a, first, smaller(TOKENS, a->T - first), statistics, workspace, &used);
        gemm_target shared = {FMOE_F32, r.shared, a->d};
        failed |= route(&r) != FMOE_OK;
        experts(&r);
        failed |= shared_branch(&r, gemm_store, &shared) != FMOE_OK;
        add_branches(&r);
    }
    return failed ? FMOE_BAD_WORKSPACE : FMOE_OK;
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "layer", .name = "my blocks", .run = run_layer, .workspace = needed};
