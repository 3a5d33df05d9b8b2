/* topk_backward: from the gradients of the routing weights to those of the logits. Every token stands alone. */
#include "backward.h"

#include <math.h>
#include <string.h>

typedef fmoe_topk_backward_args topk_args;

/* Both sides of a token as float32, what has arrived at their log-probabilities, and the routing weights. Whole cache
 * lines a thread. */
static size_t scratch_floats(const topk_args *a) {
    return padded(6 * a->n + a->K);
}

static float log_sum_exp(int64_t n, const float *z) {
    float max = largest(n, z), sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += expf(z[i] - max);
    return max + logf(sum);
}

/* From routing weights to the gradients of the scores, and on to the keys of both sides. */
static void collect(const topk_args *a, int64_t t, const float *g, float *dx, float *dy) {
    const float *dweights = a->dweights + t * a->K;
    const int32_t *chosen = a->indices + t * a->K;
    float mean = a->norm_topk_prob ? serial_dot(a->K, g, dweights) : 0;
    memset(dx, 0, (size_t)a->n * sizeof *dx);
    memset(dy, 0, (size_t)a->n * sizeof *dy);
    for (int64_t k = 0; k < a->K; k++) {
        float gradient = g[k] * (dweights[k] - mean);
        dx[chosen[k] / a->n] += gradient;
        dy[chosen[k] % a->n] += gradient;
    }
}

static void token(const topk_args *a, int64_t t, float *scratch) {
    int64_t n = a->n, K = a->K;
    const float *x = load_row(a->dtype, a->logits, t, n, scratch);
    const float *y = load_row(a->dtype, a->logits, a->T + t, n, scratch + n);
    float *dx = scratch + 2 * n, *dy = dx + n, *g = scratch + 6 * n;
    float log_sum_x = log_sum_exp(n, x), log_sum_y = log_sum_exp(n, y);
    const int32_t *chosen = a->indices + t * K;

    float best = -INFINITY, sum = 0;
    for (int64_t k = 0; k < K; k++) {
        g[k] = (x[chosen[k] / n] - log_sum_x) + (y[chosen[k] % n] - log_sum_y);
        best = g[k] > best ? g[k] : best;
    }
    for (int64_t k = 0; k < K; k++) {
        g[k] = expf(a->norm_topk_prob ? g[k] - best : g[k]);
        sum += g[k];
    }
    for (int64_t k = 0; a->norm_topk_prob && k < K; k++)
        g[k] /= sum;
    collect(a, t, g, dx, dy);

    float total_x = 0, total_y = 0;
    for (int64_t i = 0; i < n; i++) {
        total_x += dx[i];
        total_y += dy[i];
    }
    for (int64_t i = 0; i < n; i++) {
        a->dlogits[t * n + i] = dx[i] - expf(x[i] - log_sum_x) * total_x;
        a->dlogits[(a->T + t) * n + i] = dy[i] - expf(y[i] - log_sum_y) * total_y;
    }
}

/* p = exp(z − largest); returns their sum. */
static float exponentials(int64_t n, const float *z, float *p) {
    float max = largest(n, z), sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        p[i] = exp_f32(z[i] - max);
        sum += p[i];
    }
    return sum;
}

static void side_gradient(int64_t n, const float *p, float sum, const float *dlog_probs, float *dlogits) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++)
        total += dlog_probs[i];
    float scale = total / sum;
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        dlogits[i] = dlog_probs[i] - scale * p[i];
}

// [topk-shared]
/* A chosen pair's weight is the product of two of the 2n exponentials that the softmax needs anyway. */
static void token_shared(const topk_args *a, int64_t t, float *scratch) {
    int64_t n = a->n, K = a->K;
    const float *x = load_row(a->dtype, a->logits, t, n, scratch);
    const float *y = load_row(a->dtype, a->logits, a->T + t, n, scratch + n);
    float *dx = scratch + 2 * n, *dy = dx + n, *px = dy + n, *py = px + n, *g = scratch + 6 * n;
    float sum_x = exponentials(n, x, px), sum_y = exponentials(n, y, py), sum = 0;
    const int32_t *chosen = a->indices + t * K;
    for (int64_t k = 0; k < K; k++) {
        g[k] = px[chosen[k] / n] * py[chosen[k] % n];
        sum += g[k];
    }
    float scale = 1 / (a->norm_topk_prob ? sum : sum_x * sum_y);
    for (int64_t k = 0; k < K; k++)
        g[k] *= scale;
    collect(a, t, g, dx, dy);
    side_gradient(n, px, sum_x, dx, a->dlogits + t * n);
    side_gradient(n, py, sum_y, dy, a->dlogits + (a->T + t) * n);
}
// [/topk-shared]

static size_t serial_workspace(const void *args) {
    return scratch_floats(args) * sizeof(float);
}

size_t cpu_topk_backward_best_workspace(const void *args) {
    return serial_workspace(args) * (size_t)omp_get_max_threads();
}

typedef void token_fn(const topk_args *a, int64_t t, float *scratch);

static fmoe_status every_token(const topk_args *a, float *scratch, bool parallel, token_fn *one_token) {
#pragma omp parallel for schedule(static) if (parallel)
    for (int64_t t = 0; t < a->T; t++)
        one_token(a, t, scratch + (size_t)omp_get_thread_num() * scratch_floats(a));
    return FMOE_OK;
}

static fmoe_status definition(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    return every_token(args, workspace, false, token);
}

static fmoe_status openmp(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    return every_token(args, workspace, true, token);
}

fmoe_status cpu_topk_backward_best(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    return every_token(args, workspace, true, token_shared);
}

const fmoe_rung chapter9_topk_rungs[] = {
    {"definition", LEVEL_CORE, BACKEND_CPU, "Token by token: every exponential where the formula asks for it.",
     definition, .workspace = serial_workspace},
    {"openmp", LEVEL_CORE, BACKEND_CPU, "Tokens share nothing: with twice the cores, half the time.", openmp,
     .workspace = cpu_topk_backward_best_workspace},
    {"shared", LEVEL_CORE, BACKEND_CPU,
     "2n exponentials a token in place of 4n + K, in vector registers: a weight is a product of two of them.",
     cpu_topk_backward_best, .workspace = cpu_topk_backward_best_workspace},
    {.run = NULL},
};
