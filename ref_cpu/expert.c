/* Expert step: K of N neurons a token, and its gradients. */
#include "check.h"

#include <math.h>
#include <stdlib.h>

// [silu]
double fmoe_silu(double s) {
    return s / (1 + exp(-s));
}

double fmoe_silu_derivative(double s) {
    double sigmoid = 1 / (1 + exp(-s));
    return sigmoid * (1 + s * (1 - sigmoid));
}
// [/silu]

static fmoe_status check_expert(int64_t T, int64_t d, int64_t N, int64_t K, const float *x, const float *down,
                                const float *up, const int32_t *indices, const float *weights) {
    TRY(fmoe_check_tokens(T));
    TRY(fmoe_check_size("hidden_size", d));
    TRY(fmoe_check_experts(N));
    TRY(fmoe_check_topk(K, "num_experts", N));
    TRY(fmoe_check_shape("tokens", T, "hidden_size", d));
    TRY(fmoe_check_shape("num_experts", N, "hidden_size", d));
    TRY(fmoe_check_shape("tokens", T, "num_experts_per_tok", K));
    TRY(fmoe_check_pointer("x", x, T * d));
    TRY(fmoe_check_pointer("down_embed.weight", down, N * d));
    TRY(fmoe_check_pointer("up_embed.weight", up, N * d));
    TRY(fmoe_check_pointer("indices", indices, T * K));
    TRY(fmoe_check_pointer("weights", weights, T * K));
    return fmoe_check_indices(T, K, indices, "num_experts", N);
}

// [gather-up]
/* The second phase of either order: y_t = Σ_k a_k · up[e_k], token by token, k rising. */
static void gather_up(int64_t T, int64_t d, int64_t K, const float *up, const int32_t *indices,
                      const double *activations, float *y) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++)
        for (int64_t first = 0; first < d; first += FMOE_BLOCK) {
            double sum[FMOE_BLOCK] = {0};
            int64_t width = fmoe_block_width(first, d);
            for (int64_t p = t * K; p < (t + 1) * K; p++)
                fmoe_add_row(width, activations[p], up + indices[p] * d + first, sum);
            fmoe_store_row(width, sum, FMOE_OVERWRITE, y + t * d + first);
        }
}
// [/gather-up]

// [expert]
/* Token by token: every chosen pair p = t·K + k fetches its expert's row. */
fmoe_status fmoe_expert(int64_t T, int64_t d, int64_t N, int64_t K, const float *x, const float *down, const float *up,
                        const int32_t *indices, const float *weights, float *y, float *pre_activations) {
    TRY(check_expert(T, d, N, K, x, down, up, indices, weights));
    TRY(fmoe_check_pointer("y", y, T * d));
    double *activations = fmoe_allocate(T * K, sizeof *activations);
    if (!activations)
        return fmoe_no_memory(T * K, sizeof *activations);

#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++)
        for (int64_t p = t * K; p < (t + 1) * K; p++) {
            double s = fmoe_dot(d, x + t * d, down + indices[p] * d);
            activations[p] = fmoe_silu(s) * weights[p];
            if (pre_activations)
                pre_activations[p] = (float)s;
        }
    gather_up(T, d, K, up, indices, activations, y);
    free(activations);
    return FMOE_OK;
}
// [/expert]

/* A schedule that does not belong to the indices would leave pairs out or read beyond the arrays. Rising pairs of the
 * right expert, T·K in all: each pair is there exactly once. */
static fmoe_status check_schedule(int64_t T, int64_t K, int64_t N, const int32_t *indices, const int32_t *offsets,
                                  const int32_t *pairs) {
    TRY(fmoe_check_pointer("offsets", offsets, N + 1));
    TRY(fmoe_check_pointer("pairs", pairs, T * K));
    if (offsets[0] != 0 || offsets[N] != T * K)
        return fmoe_fail(FMOE_BAD_INDEX, "offsets run from %d to %d, not from 0 to tokens × num_experts_per_tok = %lld",
                         offsets[0], offsets[N], (long long)(T * K));
    for (int64_t e = 0; e < N; e++)
        if (offsets[e] > offsets[e + 1])
            return fmoe_fail(FMOE_BAD_INDEX, "offsets[%lld] = %d exceeds offsets[%lld] = %d", (long long)e, offsets[e],
                             (long long)(e + 1), offsets[e + 1]);
    for (int64_t e = 0; e < N; e++)
        for (int64_t i = offsets[e]; i < offsets[e + 1]; i++)
            if (pairs[i] < 0 || pairs[i] >= T * K || indices[pairs[i]] != e ||
                (i > offsets[e] && pairs[i] <= pairs[i - 1]))
                return fmoe_fail(FMOE_BAD_INDEX, "pairs[%lld] = %d is not the next pair of expert %lld", (long long)i,
                                 pairs[i], (long long)e);
    return FMOE_OK;
}

// [expert_scheduled]
/* Expert by expert: a row of down is fetched once for all its tokens. */
fmoe_status fmoe_expert_scheduled(int64_t T, int64_t d, int64_t N, int64_t K, const float *x, const float *down,
                                  const float *up, const int32_t *indices, const float *weights, const int32_t *offsets,
                                  const int32_t *pairs, float *y, float *pre_activations) {
    TRY(fmoe_check_pairs(T, K));
    TRY(check_expert(T, d, N, K, x, down, up, indices, weights));
    TRY(check_schedule(T, K, N, indices, offsets, pairs));
    TRY(fmoe_check_pointer("y", y, T * d));
    double *activations = fmoe_allocate(T * K, sizeof *activations);
    if (!activations)
        return fmoe_no_memory(T * K, sizeof *activations);

#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t e = 0; e < N; e++)
        for (int64_t i = offsets[e]; i < offsets[e + 1]; i++) {
            int64_t p = pairs[i];
            double s = fmoe_dot(d, x + p / K * d, down + e * d);
            activations[p] = fmoe_silu(s) * weights[p];
            if (pre_activations)
                pre_activations[p] = (float)s;
        }
    gather_up(T, d, K, up, indices, activations, y);
    free(activations);
    return FMOE_OK;
}
// [/expert_scheduled]

// [expert-backward-pairs]
/* A number for each pair p = (t, k): its activation a = silu(s) · g, the gradient ds of its pre-activation, and the
 * gradient of its routing weight. Both need dA = dy · upᵀ at the routed pairs only, as s needs x · downᵀ. */
static void backward_pairs(int64_t T, int64_t d, int64_t K, const float *x, const float *down, const float *up,
                           const int32_t *indices, const float *weights, const float *dy, double *activations,
                           double *ds, float *dweights) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++)
        for (int64_t p = t * K; p < (t + 1) * K; p++) {
            double s = fmoe_dot(d, x + t * d, down + indices[p] * d);
            double da = fmoe_dot(d, dy + t * d, up + indices[p] * d);
            activations[p] = fmoe_silu(s) * weights[p];
            ds[p] = da * weights[p] * fmoe_silu_derivative(s);
            if (dweights)
                dweights[p] = (float)(da * fmoe_silu(s));
        }
}
// [/expert-backward-pairs]

// [expert-backward-tables]
/* A row of a table's gradient for each expert: Σ scale_p · rows[token of p] over the expert's pairs in schedule order.
 * One thread owns the row and adds in rising order, so nothing depends on who comes first. */
static void gather_pairs(int64_t d, int64_t N, int64_t K, const int32_t *offsets, const int32_t *pairs,
                         const double *scale, const float *rows, fmoe_write write, float *table) {
#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t e = 0; e < N; e++)
        for (int64_t first = 0; first < d; first += FMOE_BLOCK) {
            double sum[FMOE_BLOCK] = {0};
            int64_t width = fmoe_block_width(first, d);
            for (int64_t i = offsets[e]; i < offsets[e + 1]; i++)
                fmoe_add_row(width, scale[pairs[i]], rows + pairs[i] / K * d + first, sum);
            fmoe_store_row(width, sum, write, table + e * d + first);
        }
}
// [/expert-backward-tables]

// [expert-backward]
fmoe_status fmoe_expert_backward(int64_t T, int64_t d, int64_t N, int64_t K, const float *x, const float *down,
                                 const float *up, const int32_t *indices, const float *weights, const float *dy,
                                 fmoe_write write, float *dx, float *ddown, float *dup, float *dweights) {
    TRY(fmoe_check_pairs(T, K));
    TRY(check_expert(T, d, N, K, x, down, up, indices, weights));
    TRY(fmoe_check_pointer("dy", dy, T * d));
    int32_t *offsets = fmoe_allocate(N + 1, sizeof *offsets), *pairs = fmoe_allocate(T * K, sizeof *pairs);
    double *activations = fmoe_allocate(T * K, sizeof *activations), *ds = fmoe_allocate(T * K, sizeof *ds);
    fmoe_status status = FMOE_OUT_OF_MEMORY;
    if (!offsets || !pairs || !activations || !ds) {
        fmoe_no_memory(T * K, sizeof *ds);
    } else if ((status = fmoe_schedule(T, K, N, indices, offsets, pairs)) == FMOE_OK) {
        backward_pairs(T, d, K, x, down, up, indices, weights, dy, activations, ds, dweights);
        if (dx) /* dX = dS · W_down: like the forward pass's second phase */
            gather_up(T, d, K, down, indices, ds, dx);
        if (ddown) /* dW_down = dSᵀ · X */
            gather_pairs(d, N, K, offsets, pairs, ds, x, write, ddown);
        if (dup) /* dW_up = Aᵀ · dY */
            gather_pairs(d, N, K, offsets, pairs, activations, dy, write, dup);
    }
    free(offsets);
    free(pairs);
    free(activations);
    free(ds);
    return status;
}
// [/expert-backward]
