// The topk step (chapter 3): router logits in, the K chosen pairs of every token out, with scores and weights.
#include "steps.h"

#include <math.h>
#include <stdlib.h>

static fmoe_status draw(fmoe_problem *p) {
    fmoe_topk_args *args = p->args;
    fmoe_case c = p->c;
    args->T = c.T, args->n = c.n, args->K = c.K;
    args->norm_topk_prob = c.norm_topk_prob;
    args->dtype = c.dtype;

    fmoe_argument *logits = fmoe_problem_add(p, "logits", offsetof(fmoe_topk_args, logits), c.dtype, ROLE_INPUT, 3,
                                             (int64_t[]){2, c.T, c.n});
    int64_t chosen[] = {c.T, c.K};
    if (!logits ||
        !fmoe_problem_add(p, "indices", offsetof(fmoe_topk_args, indices), FMOE_I32, ROLE_OUTPUT, 2, chosen) ||
        !fmoe_problem_add(p, "scores", offsetof(fmoe_topk_args, scores), FMOE_F32, ROLE_OUTPUT, 2, chosen) ||
        !fmoe_problem_add(p, "weights", offsetof(fmoe_topk_args, weights), FMOE_F32, ROLE_OUTPUT, 2, chosen))
        return FMOE_OUT_OF_MEMORY;

    float *values = malloc((size_t)logits->count * sizeof(float) + 1);
    if (!values)
        return FMOE_OUT_OF_MEMORY;
    if (c.routing != ROUTING_TRAINED)
        c.routing = ROUTING_NORMAL;
    fmoe_status status = fmoe_case_logits(&c, p->seed, values);
    if (status == FMOE_OK)
        fmoe_from_f32(c.dtype, logits->count, values, logits->data);
    free(values);
    return status;
}

static fmoe_status reference(fmoe_problem *p) {
    const fmoe_topk_args *args = p->args;
    float *logits = fmoe_problem_f32(p, "logits");
    if (!logits)
        return FMOE_OUT_OF_MEMORY;
    fmoe_status status =
        fmoe_topk(args->T, args->n, args->K, args->norm_topk_prob, logits, fmoe_problem_find(p, "indices")->expected,
                  fmoe_problem_find(p, "scores")->expected, fmoe_problem_find(p, "weights")->expected);
    free(logits);
    return status;
}

// Best first: is (sum, index) allowed to stand before (next_sum, next_index)? A NaN sum comes last.
static bool in_order(float sum, int32_t index, float next_sum, int32_t next_index) {
    if (isnan(sum) || isnan(next_sum))
        return isnan(next_sum) && (!isnan(sum) || index < next_index);
    return sum > next_sum || (sum == next_sum && index < next_index);
}

// The first token whose K pairs are not legal, distinct and best first; -1 if there is none.
static int64_t first_disorder(const fmoe_topk_args *args, const float *logits) {
    int64_t n = args->n, K = args->K;
    for (int64_t t = 0; t < args->T; t++) {
        const float *x = logits + t * n, *y = logits + (args->T + t) * n;
        float sum = 0;
        for (int64_t k = 0; k < K; k++) {
            int32_t index = args->indices[t * K + k];
            if (index < 0 || index >= n * n)
                return t;
            float next = x[index / n] + y[index % n];
            if (k > 0 && !in_order(sum, args->indices[t * K + k - 1], next, index))
                return t;
            sum = next;
        }
    }
    return -1;
}

// A choice is compared as a set, so that a rung which scans more pairs than the staircase may differ where sums are
// rounded. What follows from a choice is compared with the reference at the rung's own choice.
static double error(const fmoe_problem *p, char *why) {
    const fmoe_topk_args *args = p->args;
    int64_t count = args->T * args->K;
    const int32_t *expected = fmoe_problem_find(p, "indices")->expected;
    float *logits = fmoe_problem_f32(p, "logits");
    float *at = malloc((size_t)count * 2 * sizeof(float) + 1); // scores and weights at the rung's indices
    double worst = INFINITY;
    int64_t token;

    if (!logits || !at) {
        snprintf(why, 200, "no memory to compare with");
    } else if ((token = first_disorder(args, logits)) >= 0) {
        snprintf(why, 200, "indices: token %lld's pairs are not legal, distinct and best first", (long long)token);
    } else if ((token = fmoe_compare_indices(args->T, args->n, args->K, logits, args->indices, expected)) >= 0) {
        snprintf(why, 200, "indices: token %lld's set is not the K best", (long long)token);
    } else if (fmoe_topk_at(args->T, args->n, args->K, args->norm_topk_prob, logits, args->indices, at, at + count)) {
        snprintf(why, 200, "%.199s", fmoe_error_message());
    } else {
        double scores = fmoe_relative_error(count, args->scores, at, 0);
        double weights = fmoe_relative_error(count, args->weights, at + count, 0);
        worst = scores > weights ? scores : weights;
        if (worst > fmoe_error_limit(FMOE_F32)) { // float32 outputs, whatever type the logits are stored in
            snprintf(why, 200, "%s: error %.2e at the rung's own indices", scores > weights ? "scores" : "weights",
                     worst);
            worst = INFINITY;
        }
    }
    free(logits);
    free(at);
    return worst;
}

// Logits in, choices out, and a handful of operations a candidate: memory is the floor.
static fmoe_work work(const fmoe_problem *p, const fmoe_ceilings *ceilings) {
    const fmoe_topk_args *args = p->args;
    double T = (double)args->T, n = (double)args->n, K = (double)args->K;
    double candidates = 0;
    for (int64_t a = 0; a < args->n && a < args->K; a++) {
        int64_t row = args->K / (a + 1);
        candidates += (double)(row < args->n ? row : args->n);
    }
    fmoe_work w;
    w.bytes = 2 * T * n * (double)fmoe_dtype_size(args->dtype) + 3 * T * K * 4;
    w.flops = T * (candidates + 4 * n + 3 * K); // the sums; log-softmax of both sides; scores and weights
    double copy_ms = w.bytes / ceilings->copy_gbs / 1e6;
    double add_ms = w.flops / ceilings->fma_gflops / 1e6;
    w.floor_ms = copy_ms > add_ms ? copy_ms : add_ms;
    w.floor_why = "logits read and choices written once, at the copy rate";
    return w;
}

const fmoe_step fmoe_step_topk = {"topk", sizeof(fmoe_topk_args), draw, reference, error, work};
