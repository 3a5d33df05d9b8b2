/* Exercise 2.3, starter, right: the rung "vector-dot", a dot product a logit. */
#include "plugin.h"

/* The chapter's rungs and the product that they use, so that only what changes stands here. */
#include "2-router/cpu.c" // NOLINT(bugprone-suspicious-include)
#define smaller smaller_of_gemm
#include "gemm.c" // NOLINT(bugprone-suspicious-include)
#undef smaller
#include "rows.h"

// [logits]
/* logits = x̂ · gateᵀ; gate is float32 here. */
static void logits_of(const fmoe_router_args *args, const float *x_hat, const float *gate) {
    int64_t T = args->T, d = args->d, n = args->n;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++)
        for (int64_t key = 0; key < 2 * n; key++)
            logits_row(args, key / n, t)[key % n] = dot_row(d, x_hat + t * d, gate + key * d);
}
// [/logits]

static fmoe_status run(const void *arguments, void *workspace, size_t bytes, void *stream) {
    const fmoe_router_args *args = arguments;
    size_t used = 0;
    scratch s = carve_scratch(args, workspace, &used);
    fmoe_status status = check(args, used, bytes);
    (void)stream;
    if (status != FMOE_OK || args->T == 0)
        return status;
    norm_by_rows(args, s);
    fmoe_to_f32(args->dtype, 2 * args->n * args->d, args->gate, s.gate);
    logits_of(args, s.x_hat, s.gate);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < args->T; t++)
        log_softmax_rows(args, t, 1);
    return FMOE_OK;
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "router", .name = "my tile", .run = run, .workspace = scratch_bytes};
