/* A right plugin for the topk step, by insertion into the K best of all pairs, and a wrong one for every
 * mistake that the tests make. */
#include "plugin.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The environment says which; the tests compile this once. */
static const char *mistake = "";
#define MISTAKE(name) (!strcmp(mistake, #name))

/* Larger sums first, equal ones by index: pairs come in the order of their indices. */
static void choose(int64_t n, int64_t K, const float *x, const float *y, float *sums, int32_t *row) {
    int64_t held = 0;
    for (int64_t pair = 0; pair < n * n; pair++) {
        float sum = x[pair / n] + y[pair % n];
        if (MISTAKE(PASSED_OVER) && pair % n == n / 2)
            continue;
        if (held == K && !(MISTAKE(TIES) ? sum >= sums[K - 1] : sum > sums[K - 1]))
            continue;
        int64_t at = held < K ? held++ : K - 1;
        for (; at > 0 && (MISTAKE(TIES) ? sum >= sums[at - 1] : sum > sums[at - 1]); at--) {
            sums[at] = sums[at - 1];
            row[at] = row[at - 1];
        }
        sums[at] = sum;
        row[at] = (int32_t)pair;
    }
    while (held < K)
        row[held++] = 0;
}

static void spoil(int64_t n, int64_t K, int32_t *row) {
    if (MISTAKE(UNSORTED) && K > 2) {
        int32_t first = row[0];
        row[0] = row[K - 1];
        row[K - 1] = first;
    }
    if (MISTAKE(TWICE) && K > 2)
        row[1] = row[0];
    if (MISTAKE(OUTSIDE))
        row[0] = (int32_t)(n * n);
    for (int64_t k = 0; MISTAKE(SIDES) && k < K; k++)
        row[k] = (int32_t)(row[k] % n * n + row[k] / n);
}

static double log_sum_exp(int64_t n, const float *z) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += exp((double)z[i]);
    return log(sum);
}

static void finish(const fmoe_topk_args *a, int64_t t, double shift, const float *sums) {
    double total = 0;
    for (int64_t k = 0; k < a->K; k++) {
        int64_t at = t * a->K + k;
        a->scores[at] = (float)(sums[k] - shift);
        a->weights[at] = (float)exp(sums[k] - shift);
        total += a->weights[at];
    }
    for (int64_t k = 0; a->norm_topk_prob && !MISTAKE(UNSCALED) && k < a->K; k++)
        a->weights[t * a->K + k] = (float)(a->weights[t * a->K + k] / total);
}

static size_t needed(const void *args) {
    const fmoe_topk_args *a = args;
    return (size_t)(2 * a->n + a->K) * sizeof(float);
}

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_topk_args *a = args;
    float *x = workspace, *y = x + a->n, *sums = y + a->n;
    size_t side = (size_t)a->n * fmoe_dtype_size(a->dtype);
    (void)workspace_bytes, (void)stream;
    for (int64_t t = 0; t < a->T; t++) {
        int32_t *row = a->indices + t * a->K;
        fmoe_to_f32(a->dtype, a->n, (const char *)a->logits + (size_t)t * side, x);
        fmoe_to_f32(a->dtype, a->n, (const char *)a->logits + (size_t)(a->T + t) * side, y);
        choose(a->n, a->K, x, y, sums, row);
        finish(a, t, log_sum_exp(a->n, x) + log_sum_exp(a->n, y), sums);
        spoil(a->n, a->K, row);
    }
    return FMOE_OK;
}

__attribute__((constructor)) static void loaded(void) {
    const char *said = getenv("MISTAKE");
    mistake = said ? said : "";
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "topk", .name = "mine", .run = run, .workspace = needed};
