/* How results are compared: one error measure for tensors, one rule for routing decisions. */
#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// [error]
double fmoe_relative_error(int64_t count, const float *out, const float *ref, double natural_scale) {
    if (count > 0 && (!out || !ref))
        return INFINITY;
    double difference = 0, out_norm = 0, ref_norm = 0;
    for (int64_t i = 0; i < count; i++) {
        if (isnan(out[i]) && isnan(ref[i]))
            continue;
        if (out[i] == ref[i] && isinf(ref[i]))
            continue;
        if (!isfinite(out[i]) || !isfinite(ref[i]))
            return INFINITY;
        double error = (double)out[i] - ref[i];
        difference += error * error;
        out_norm += (double)out[i] * out[i];
        ref_norm += (double)ref[i] * ref[i];
    }
    if (difference == 0)
        return 0;
    if (sqrt(ref_norm) < 1e-6 * natural_scale)
        return sqrt(out_norm) / natural_scale;
    return sqrt(difference / ref_norm);
}
// [/error]

double fmoe_error_limit(fmoe_dtype dtype) {
    if (dtype == FMOE_F16)
        return 6e-4;
    if (dtype == FMOE_BF16)
        return 4e-3;
    return 1e-5;
}

static int ascending(const void *a, const void *b) {
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* Sorted, distinct, all in [0, limit). */
static bool sort_choice(int64_t K, int64_t limit, const int32_t *choice, int32_t *sorted) {
    memcpy(sorted, choice, (size_t)K * sizeof *sorted);
    qsort(sorted, (size_t)K, sizeof *sorted, ascending);
    for (int64_t k = 1; k < K; k++)
        if (sorted[k] == sorted[k - 1])
            return false;
    return sorted[0] >= 0 && sorted[K - 1] < limit;
}

/* Every pair that only one of the two sorted choices holds lies within the tolerance of the K-th sum. */
static bool differ_within(int64_t n, int64_t K, const float *x, const float *y, const int32_t *a, const int32_t *b,
                          float kth, double tolerance) {
    int64_t i = 0, j = 0;
    while (i < K || j < K) {
        if (i < K && j < K && a[i] == b[j]) {
            i++;
            j++;
            continue;
        }
        int32_t only = j == K || (i < K && a[i] < b[j]) ? a[i++] : b[j++];
        float sum = x[only / n] + y[only % n];
        if (!(sum == kth || fabs((double)sum - kth) <= tolerance))
            return false;
    }
    return true;
}

int64_t fmoe_compare_indices(int64_t T, int64_t n, int64_t K, const float *logits, const int32_t *indices,
                             const int32_t *expected) {
    if (T < 1 || n < 1 || K < 1)
        return -1;
    int32_t *a = fmoe_allocate(2 * K, sizeof *a);
    if (!a)
        return 0;
    int32_t *b = a + K;
    int64_t rejected = -1;
    for (int64_t t = 0; t < T && rejected < 0; t++) {
        const float *x = logits + t * n, *y = logits + (T + t) * n;
        float largest = 1;
        for (int64_t i = 0; i < n; i++) {
            largest = isfinite(x[i]) && fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
            largest = isfinite(y[i]) && fabsf(y[i]) > largest ? fabsf(y[i]) : largest;
        }
        if (!sort_choice(K, n * n, indices + t * K, a) || !sort_choice(K, n * n, expected + t * K, b)) {
            rejected = t;
            break;
        }
        /* The K-th best sum is the smallest of the expected choice. */
        float kth = INFINITY;
        for (int64_t k = 0; k < K; k++) {
            float sum = x[b[k] / n] + y[b[k] % n];
            kth = sum < kth ? sum : kth;
        }
        if (!differ_within(n, K, x, y, a, b, kth, 1e-5 * largest))
            rejected = t;
    }
    free(a);
    return rejected;
}
