/* Shared SwiGLU MLP: y = down · (silu(gate · x) ⊙ (up · x)), and its gradients. Plain triple loops. */
#include "check.h"

#include <stdlib.h>

static fmoe_status check_mlp(int64_t T, int64_t d, int64_t I, const float *x, const float *gate, const float *up,
                             const float *down) {
    TRY(fmoe_check_tokens(T));
    TRY(fmoe_check_size("hidden_size", d));
    TRY(fmoe_check_size("intermediate_size", I));
    TRY(fmoe_check_shape("tokens", T, "hidden_size", d));
    TRY(fmoe_check_shape("intermediate_size", I, "hidden_size", d));
    TRY(fmoe_check_shape("tokens", T, "intermediate_size", I));
    TRY(fmoe_check_pointer("x", x, T * d));
    TRY(fmoe_check_pointer("gate_proj.weight", gate, I * d));
    TRY(fmoe_check_pointer("up_proj.weight", up, I * d));
    return fmoe_check_pointer("down_proj.weight", down, d * I);
}

static double dot(int64_t count, const double *a, const float *b) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++)
        sum += a[i] * b[i];
    return sum;
}

// [mlp]
fmoe_status fmoe_mlp(int64_t T, int64_t d, int64_t I, const float *x, const float *gate, const float *up,
                     const float *down, float *y) {
    TRY(check_mlp(T, d, I, x, gate, up, down));
    TRY(fmoe_check_pointer("y", y, T * d));
    double *hidden = fmoe_allocate(T * I, sizeof *hidden);
    if (!hidden)
        return fmoe_no_memory(T * I, sizeof *hidden);

#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++) {
        for (int64_t i = 0; i < I; i++)
            hidden[t * I + i] = fmoe_silu(fmoe_dot(d, x + t * d, gate + i * d)) * fmoe_dot(d, x + t * d, up + i * d);
        for (int64_t c = 0; c < d; c++)
            y[t * d + c] = (float)dot(I, hidden + t * I, down + c * I);
    }
    free(hidden);
    return FMOE_OK;
}
// [/mlp]

// [mlp-backward-hidden]
/* The hidden units of one token, h = silu(p) · q with p = gate · x and q = up · x, and the gradients of p and q. On
 * entry dp holds dh = downᵀ · dy. */
static void backward_hidden(int64_t d, int64_t I, const float *x, const float *gate, const float *up, double *h,
                            double *dp, double *dq) {
    for (int64_t i = 0; i < I; i++) {
        double p = fmoe_dot(d, x, gate + i * d), q = fmoe_dot(d, x, up + i * d), dh = dp[i];
        h[i] = fmoe_silu(p) * q;
        dp[i] = dh * q * fmoe_silu_derivative(p);
        dq[i] = dh * fmoe_silu(p);
    }
}
// [/mlp-backward-hidden]

// [mlp-backward-weights]
/* gradient[i] = Σ_t dp[t, i] · x[t]: a [I, d] weight's gradient, each row owned by one thread. */
static void weight_gradient(int64_t T, int64_t d, int64_t I, const double *dp, const float *x, fmoe_write write,
                            float *gradient) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < I; i++)
        for (int64_t first = 0; first < d; first += FMOE_BLOCK) {
            double sum[FMOE_BLOCK] = {0};
            int64_t width = fmoe_block_width(first, d);
            for (int64_t t = 0; t < T; t++)
                fmoe_add_row(width, dp[t * I + i], x + t * d + first, sum);
            fmoe_store_row(width, sum, write, gradient + i * d + first);
        }
}

/* ddown[c] = Σ_t dy[t, c] · h[t]: the same with the hidden units as the rows. */
static void down_gradient(int64_t T, int64_t d, int64_t I, const float *dy, const double *h, fmoe_write write,
                          float *gradient) {
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < d; c++)
        for (int64_t first = 0; first < I; first += FMOE_BLOCK) {
            double sum[FMOE_BLOCK] = {0};
            int64_t width = fmoe_block_width(first, I);
            for (int64_t t = 0; t < T; t++)
                for (int64_t i = 0; i < width; i++)
                    sum[i] += dy[t * d + c] * h[t * I + first + i];
            fmoe_store_row(width, sum, write, gradient + c * I + first);
        }
}
// [/mlp-backward-weights]

// [mlp-backward]
fmoe_status fmoe_mlp_backward(int64_t T, int64_t d, int64_t I, const float *x, const float *gate, const float *up,
                              const float *down, const float *dy, fmoe_write write, float *dx, float *dgate, float *dup,
                              float *ddown) {
    TRY(check_mlp(T, d, I, x, gate, up, down));
    TRY(fmoe_check_pointer("dy", dy, T * d));
    double *h = fmoe_allocate(3 * T * I, sizeof *h);
    if (!h)
        return fmoe_no_memory(3 * T * I, sizeof *h);
    double *dp = h + T * I, *dq = dp + T * I;

#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++) {
        for (int64_t i = 0; i < I; i++)
            dp[t * I + i] = 0;
        for (int64_t c = 0; c < d; c++)
            fmoe_add_row(I, dy[t * d + c], down + c * I, dp + t * I);
        backward_hidden(d, I, x + t * d, gate, up, h + t * I, dp + t * I, dq + t * I);
        for (int64_t first = 0; dx && first < d; first += FMOE_BLOCK) {
            double sum[FMOE_BLOCK] = {0};
            int64_t width = fmoe_block_width(first, d);
            for (int64_t i = 0; i < I; i++) {
                fmoe_add_row(width, dp[t * I + i], gate + i * d + first, sum);
                fmoe_add_row(width, dq[t * I + i], up + i * d + first, sum);
            }
            fmoe_store_row(width, sum, FMOE_OVERWRITE, dx + t * d + first);
        }
    }
    if (dgate)
        weight_gradient(T, d, I, dp, x, write, dgate);
    if (dup)
        weight_gradient(T, d, I, dq, x, write, dup);
    if (ddown)
        down_gradient(T, d, I, dy, h, write, ddown);
    free(h);
    return FMOE_OK;
}
// [/mlp-backward]
