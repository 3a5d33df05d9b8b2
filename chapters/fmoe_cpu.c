/* The checks and the memory that the ladders' last rungs leave to their caller. */
#include "fmoe_cpu.h"

#include "../ref_cpu/check.h"
#include "steps.h"

#include <stdlib.h>

static fmoe_status run(fmoe_rung_fn *rung, fmoe_workspace_fn *ask, const void *args) {
    size_t bytes = (ask(args) + 255) / 256 * 256;
    void *workspace = aligned_alloc(256, bytes > 0 ? bytes : 256);
    if (!workspace)
        return fmoe_no_memory((int64_t)bytes, 1);
    fmoe_status status = rung(args, workspace, bytes, NULL);
    free(workspace);
    return status;
}

static fmoe_status check_dtype(fmoe_dtype dtype) {
    if (dtype != FMOE_F32 && dtype != FMOE_F16 && dtype != FMOE_BF16)
        return fmoe_fail(FMOE_UNSUPPORTED, "dtype = %d is neither f32, f16 nor bf16", (int)dtype);
    return FMOE_OK;
}

fmoe_status fmoe_cpu_router(bool training, int64_t T, int64_t d, int64_t n, fmoe_dtype dtype, const void *x,
                            const void *gate, float *running_mean, float *running_var, float *logits,
                            float *log_probs) {
    TRY(fmoe_check_tokens(T));
    TRY(fmoe_check_size("hidden_size", d));
    TRY(fmoe_check_size("num_keys", n));
    TRY(check_dtype(dtype));
    TRY(fmoe_check_shape("tokens", T, "hidden_size", d));
    TRY(fmoe_check_shape("num_keys", n, "hidden_size", d));
    TRY(fmoe_check_shape("tokens", T, "num_keys", n));
    if (training && T == 1)
        return fmoe_fail(FMOE_BATCH_OF_ONE, "tokens = 1 is below 2, which the unbiased variance needs in training");
    TRY(fmoe_check_pointer("x", x, T * d));
    TRY(fmoe_check_pointer("router_gate.weight", gate, 2 * n * d));
    TRY(fmoe_check_pointer("router_norm.running_mean", running_mean, d));
    TRY(fmoe_check_pointer("router_norm.running_var", running_var, d));
    TRY(fmoe_check_pointer("router_logits", logits, 2 * T * n));
    TRY(fmoe_check_pointer("log_probs", log_probs, 2 * T * n));
    fmoe_router_args args = {.T = T,
                             .d = d,
                             .n = n,
                             .training = training,
                             .dtype = dtype,
                             .x = x,
                             .gate = gate,
                             .running_mean = running_mean,
                             .running_var = running_var,
                             .logits = logits,
                             .log_probs = log_probs};
    return T == 0 ? FMOE_OK : run(cpu_router_best, cpu_router_best_workspace, &args);
}

fmoe_status fmoe_cpu_topk(int64_t T, int64_t n, int64_t K, bool norm_topk_prob, fmoe_dtype dtype, const void *logits,
                          int32_t *indices, float *scores, float *weights) {
    TRY(fmoe_check_tokens(T));
    TRY(fmoe_check_size("num_keys", n));
    if (n > INT32_MAX / n)
        return fmoe_fail(FMOE_OVERFLOW, "num_keys = %lld exceeds 46340, whose square is the largest 32-bit index",
                         (long long)n);
    TRY(fmoe_check_topk(K, "n²", n * n));
    TRY(check_dtype(dtype));
    TRY(fmoe_check_shape("tokens", T, "num_keys", n));
    TRY(fmoe_check_shape("tokens", T, "num_experts_per_tok", K));
    TRY(fmoe_check_pointer("router_logits", logits, 2 * T * n));
    TRY(fmoe_check_pointer("indices", indices, T * K));
    TRY(fmoe_check_pointer("scores", scores, T * K));
    TRY(fmoe_check_pointer("weights", weights, T * K));
    fmoe_topk_args args = {.T = T,
                           .n = n,
                           .K = K,
                           .norm_topk_prob = norm_topk_prob,
                           .dtype = dtype,
                           .logits = logits,
                           .indices = indices,
                           .scores = scores,
                           .weights = weights};
    return T == 0 ? FMOE_OK : run(cpu_topk_best, cpu_topk_best_workspace, &args);
}

fmoe_status fmoe_cpu_schedule(int64_t T, int64_t K, int64_t N, const int32_t *indices, int32_t *offsets,
                              int32_t *pairs) {
    if (T <= 0 || K <= 0) /* nothing to sort, or nothing allowed: the reference does and says the same */
        return fmoe_schedule(T, K, N, indices, offsets, pairs);
    TRY(fmoe_check_experts(N));
    TRY(fmoe_check_pairs(T, K));
    TRY(fmoe_check_pointer("indices", indices, T * K));
    TRY(fmoe_check_pointer("offsets", offsets, N + 1));
    TRY(fmoe_check_pointer("pairs", pairs, T * K));
    TRY(fmoe_check_indices(T, K, indices, "num_experts", N));
    fmoe_schedule_args args = {.T = T, .K = K, .N = N, .indices = indices, .offsets = offsets, .pairs = pairs};
    return run(cpu_schedule_best, cpu_schedule_best_workspace, &args);
}

fmoe_status fmoe_cpu_expert(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype, const void *x,
                            const void *down, const void *up, const int32_t *indices, const float *weights, void *y) {
    TRY(fmoe_check_tokens(T));
    TRY(fmoe_check_size("hidden_size", d));
    TRY(fmoe_check_experts(N));
    TRY(fmoe_check_topk(K, "num_experts", N));
    TRY(check_dtype(dtype));
    TRY(fmoe_check_shape("tokens", T, "hidden_size", d));
    TRY(fmoe_check_shape("num_experts", N, "hidden_size", d));
    TRY(fmoe_check_shape("tokens", T, "num_experts_per_tok", K));
    TRY(fmoe_check_pointer("x", x, T * d));
    TRY(fmoe_check_pointer("down_embed.weight", down, N * d));
    TRY(fmoe_check_pointer("up_embed.weight", up, N * d));
    TRY(fmoe_check_pointer("indices", indices, T * K));
    TRY(fmoe_check_pointer("weights", weights, T * K));
    TRY(fmoe_check_pointer("y", y, T * d));
    TRY(fmoe_check_indices(T, K, indices, "num_experts", N));
    fmoe_expert_args args = {.T = T,
                             .d = d,
                             .N = N,
                             .K = K,
                             .dtype = dtype,
                             .x = x,
                             .down = down,
                             .up = up,
                             .indices = indices,
                             .weights = weights,
                             .y = y};
    return T == 0 ? FMOE_OK : run(cpu_expert_token_best, cpu_expert_token_best_workspace, &args);
}

fmoe_status fmoe_cpu_mlp(int64_t T, int64_t d, int64_t I, fmoe_dtype dtype, const void *x, const void *gate,
                         const void *up, const void *down, void *y) {
    TRY(fmoe_check_tokens(T));
    TRY(fmoe_check_size("hidden_size", d));
    TRY(fmoe_check_size("intermediate_size", I));
    TRY(check_dtype(dtype));
    TRY(fmoe_check_shape("tokens", T, "hidden_size", d));
    TRY(fmoe_check_shape("intermediate_size", I, "hidden_size", d));
    TRY(fmoe_check_shape("tokens", T, "intermediate_size", I));
    TRY(fmoe_check_pointer("x", x, T * d));
    TRY(fmoe_check_pointer("gate_proj.weight", gate, I * d));
    TRY(fmoe_check_pointer("up_proj.weight", up, I * d));
    TRY(fmoe_check_pointer("down_proj.weight", down, d * I));
    TRY(fmoe_check_pointer("y", y, T * d));
    fmoe_mlp_args args = {.T = T, .d = d, .I = I, .dtype = dtype, .x = x, .gate = gate, .up = up, .down = down, .y = y};
    return T == 0 ? FMOE_OK : run(cpu_mlp_best, cpu_mlp_best_workspace, &args);
}
