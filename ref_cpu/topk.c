/* Cartesian-product top-k. Two sides of n logits make n² pairs; the K best of them are found without looking at all.
 *
 * Rank each side, best first. The pair of ranks (a, b) is beaten by every pair of ranks (a' ≤ a, b' ≤ b) other than
 * itself: (a+1)(b+1) − 1 of them. So a pair outside (a+1)(b+1) ≤ K has at least K better ones. The pairs inside form a
 * staircase under a hyperbola:
 *
 *         b = 0 1 2 3 4 5 6 7
 *     a = 0   # # # # # # # #        K = 8: 20 candidates whatever n is
 *         1   # # # #
 *         2   # #
 *         3   # #
 *         4   #
 *         ... #
 */
#include "check.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>

typedef struct {
    float value;   /* a logit, or a sum of two */
    int32_t index; /* a key, or a pair i·n + j */
} entry;

// [order]
/* Best first: the larger value, then the smaller index; NaN after everything. */
static int best_first(const void *left, const void *right) {
    const entry *a = left, *b = right;
    if (isnan(a->value) != isnan(b->value))
        return isnan(a->value) ? 1 : -1;
    if (a->value != b->value && !isnan(a->value))
        return a->value > b->value ? -1 : 1;
    return (a->index > b->index) - (a->index < b->index);
}

static void rank_side(int64_t n, const float *logits, entry *ranked) {
    for (int64_t i = 0; i < n; i++)
        ranked[i] = (entry){logits[i], (int32_t)i};
    qsort(ranked, (size_t)n, sizeof *ranked, best_first);
}
// [/order]

// [staircase]
/* Pairs of ranks (a, b) with a, b < n and (a+1)(b+1) ≤ K. */
static int64_t count_candidates(int64_t n, int64_t K) {
    int64_t count = 0;
    for (int64_t a = 0; a < n && a < K; a++)
        count += K / (a + 1) < n ? K / (a + 1) : n;
    return count;
}

static int64_t list_candidates(int64_t n, int64_t K, const entry *x, const entry *y, entry *candidates) {
    int64_t count = 0;
    for (int64_t a = 0; a < n && a < K; a++)
        for (int64_t b = 0; b < n && (a + 1) * (b + 1) <= K; b++)
            candidates[count++] = (entry){x[a].value + y[b].value, (int32_t)(x[a].index * n + y[b].index)};
    return count;
}
// [/staircase]

// [weights]
/* Log-probabilities of a token's chosen pairs, and their routing weights, in double. */
static void scores_and_weights(int64_t n, int64_t K, bool norm_topk_prob, const float *x, const float *y,
                               const int32_t *indices, double *scores, double *weights) {
    double best_x, best_y, log_sum = fmoe_log_sum_exp(n, x, &best_x) + fmoe_log_sum_exp(n, y, &best_y);
    double largest = -INFINITY, sum = 0;
    for (int64_t k = 0; k < K; k++) {
        scores[k] = (x[indices[k] / n] - best_x) + (y[indices[k] % n] - best_y) - log_sum;
        largest = scores[k] > largest ? scores[k] : largest;
    }
    /* A common factor cancels when the weights are normalised, and without it they could all underflow. */
    for (int64_t k = 0; k < K; k++) {
        weights[k] = exp(norm_topk_prob ? scores[k] - largest : scores[k]);
        sum += weights[k];
    }
    for (int64_t k = 0; norm_topk_prob && k < K; k++)
        weights[k] /= sum;
}
// [/weights]

static fmoe_status check_sizes(int64_t T, int64_t n, int64_t K) {
    TRY(fmoe_check_tokens(T));
    TRY(fmoe_check_size("num_keys", n));
    if (n > INT32_MAX / n)
        return fmoe_fail(FMOE_OVERFLOW, "num_keys = %lld exceeds 46340, whose square is the largest 32-bit index",
                         (long long)n);
    TRY(fmoe_check_topk(K, "n²", n * n));
    TRY(fmoe_check_shape("tokens", T, "num_keys", n));
    return fmoe_check_shape("tokens", T, "num_experts_per_tok", K);
}

static void store(int64_t count, const double *values, float *target) {
    for (int64_t i = 0; target && i < count; i++)
        target[i] = (float)values[i];
}

// [topk]
fmoe_status fmoe_topk(int64_t T, int64_t n, int64_t K, bool norm_topk_prob, const float *logits, int32_t *indices,
                      float *scores, float *weights) {
    TRY(check_sizes(T, n, K));
    TRY(fmoe_check_pointer("router_logits", logits, 2 * T * n));
    TRY(fmoe_check_pointer("indices", indices, T * K));
    int64_t per_thread = 2 * n + count_candidates(n, K);
    entry *scratch = fmoe_allocate(omp_get_max_threads() * per_thread, sizeof *scratch);
    if (!scratch)
        return fmoe_no_memory(omp_get_max_threads() * per_thread, sizeof *scratch);

#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++) {
        entry *x = scratch + omp_get_thread_num() * per_thread, *y = x + n, *candidates = y + n;
        rank_side(n, logits + t * n, x);
        rank_side(n, logits + (T + t) * n, y);
        int64_t count = list_candidates(n, K, x, y, candidates);
        qsort(candidates, (size_t)count, sizeof *candidates, best_first);
        for (int64_t k = 0; k < K; k++)
            indices[t * K + k] = candidates[k].index;
    }
    free(scratch);
    return fmoe_topk_at(T, n, K, norm_topk_prob, logits, indices, scores, weights);
}
// [/topk]

// [topk-at]
fmoe_status fmoe_topk_at(int64_t T, int64_t n, int64_t K, bool norm_topk_prob, const float *logits,
                         const int32_t *indices, float *scores, float *weights) {
    TRY(check_sizes(T, n, K));
    TRY(fmoe_check_pointer("router_logits", logits, 2 * T * n));
    TRY(fmoe_check_pointer("indices", indices, T * K));
    TRY(fmoe_check_indices(T, K, indices, "n²", n * n));
    double *scratch = fmoe_allocate(2 * K * omp_get_max_threads(), sizeof *scratch);
    if (!scratch)
        return fmoe_no_memory(2 * K * omp_get_max_threads(), sizeof *scratch);

#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++) {
        double *score = scratch + 2 * K * omp_get_thread_num(), *weight = score + K;
        scores_and_weights(n, K, norm_topk_prob, logits + t * n, logits + (T + t) * n, indices + t * K, score, weight);
        store(K, score, scores ? scores + t * K : NULL);
        store(K, weight, weights ? weights + t * K : NULL);
    }
    free(scratch);
    return FMOE_OK;
}
// [/topk-at]

// [score-gradients]
/* From a token's gradients of weights and scores to the gradients of its scores alone. A weight g = exp(score) passes
 * g · dg on; a normalised one is a softmax over the chosen pairs and passes g · (dg − Σ g · dg) on. */
static void score_gradients(int64_t K, bool norm_topk_prob, const double *weights, const float *dweights,
                            const float *dscores, double *gradients) {
    double mean = 0;
    for (int64_t k = 0; norm_topk_prob && dweights && k < K; k++)
        mean += weights[k] * dweights[k];
    for (int64_t k = 0; k < K; k++)
        gradients[k] = (dscores ? dscores[k] : 0) + (dweights ? weights[k] * (dweights[k] - mean) : 0);
}
// [/score-gradients]

// [side-backward]
/* log-softmax backwards: the keys' gradients, less each key's probability times their total. */
static void side_backward(int64_t n, const float *z, const double *dlog_probs, float *dlogits) {
    double best, log_sum = fmoe_log_sum_exp(n, z, &best), total = 0;
    for (int64_t i = 0; i < n; i++)
        total += dlog_probs[i];
    for (int64_t i = 0; i < n; i++)
        dlogits[i] = (float)(dlog_probs[i] - exp(z[i] - best - log_sum) * total);
}
// [/side-backward]

// [topk-backward]
fmoe_status fmoe_topk_backward(int64_t T, int64_t n, int64_t K, bool norm_topk_prob, const float *logits,
                               const int32_t *indices, const float *dweights, const float *dscores, float *dlogits) {
    TRY(check_sizes(T, n, K));
    TRY(fmoe_check_pointer("router_logits", logits, 2 * T * n));
    TRY(fmoe_check_pointer("indices", indices, T * K));
    TRY(fmoe_check_pointer("dlogits", dlogits, 2 * T * n));
    TRY(fmoe_check_indices(T, K, indices, "n²", n * n));
    int64_t per_thread = 3 * K + 2 * n;
    double *scratch = fmoe_allocate(omp_get_max_threads() * per_thread, sizeof *scratch);
    if (!scratch)
        return fmoe_no_memory(omp_get_max_threads() * per_thread, sizeof *scratch);

#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++) {
        double *score = scratch + omp_get_thread_num() * per_thread, *weight = score + K, *gradient = weight + K;
        double *dx = gradient + K, *dy = dx + n;
        const float *x = logits + t * n, *y = logits + (T + t) * n;
        const int32_t *chosen = indices + t * K;
        scores_and_weights(n, K, norm_topk_prob, x, y, chosen, score, weight);
        score_gradients(K, norm_topk_prob, weight, dweights ? dweights + t * K : NULL, dscores ? dscores + t * K : NULL,
                        gradient);
        for (int64_t i = 0; i < n; i++)
            dx[i] = dy[i] = 0;
        for (int64_t k = 0; k < K; k++) {
            dx[chosen[k] / n] += gradient[k];
            dy[chosen[k] % n] += gradient[k];
        }
        side_backward(n, x, dx, dlogits + t * n);
        side_backward(n, y, dy, dlogits + (T + t) * n);
    }
    free(scratch);
    return FMOE_OK;
}
// [/topk-backward]

// [num-keys]
int64_t fmoe_num_keys(int64_t N) {
    if (N < 1)
        return 0;
    int64_t n = (int64_t)sqrt((double)N); /* off by one at most: a double has 53 bits, N up to 63 */
    while (n > N / n)
        n--;
    while (n + 1 <= N / (n + 1))
        n++;
    return n;
}
// [/num-keys]
