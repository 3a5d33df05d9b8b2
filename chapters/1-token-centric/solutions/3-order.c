/* Exercise 1.3, solution: a token's experts in rising order, by insertion. */
#include "plugin.h"

#include "1-token-centric/cpu.c" // NOLINT(bugprone-suspicious-include): the chapter's rungs: only what changes stands here

// [order]
/* By expert, equal ones as they came; K is small. */
static void reorder(int64_t K, int32_t *indices, float *weights) {
    for (int64_t k = 1; k < K; k++) {
        int32_t index = indices[k];
        float weight = weights[k];
        int64_t at = k;
        for (; at > 0 && indices[at - 1] > index; at--) {
            indices[at] = indices[at - 1];
            weights[at] = weights[at - 1];
        }
        indices[at] = index;
        weights[at] = weight;
    }
}
// [/order]

static size_t needed(const void *args) {
    const fmoe_expert_args *a = args;
    return all_threads(a) + 2 * padded(a->T * a->K) * sizeof(float);
}

static fmoe_status run(const void *args, void *workspace, size_t bytes, void *stream) {
    const fmoe_expert_args *a = args;
    int32_t *indices = (int32_t *)((char *)workspace + all_threads(a)); /* [T, K] */
    float *weights = (float *)indices + padded(a->T * a->K);            /* [T, K] */
    fmoe_expert_args reordered = *a;
    (void)bytes, (void)stream;
    reordered.indices = indices;
    reordered.weights = weights;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < a->T; t++) {
        memcpy(indices + t * a->K, a->indices + t * a->K, (size_t)a->K * sizeof *indices);
        memcpy(weights + t * a->K, a->weights + t * a->K, (size_t)a->K * sizeof *weights);
        reorder(a->K, indices + t * a->K, weights + t * a->K);
    }
    return each_token(&reordered, token_prefetch, a->dtype, workspace);
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "expert", .name = "my order", .run = run, .workspace = needed};
