/* The step topk_backward (chapter 9): the gradients of the routing weights in, those of the router logits out. */
#include "steps.h"

#include "../ref_cpu/check.h"

#include <math.h>
#include <stdlib.h>

enum { STREAM_DWEIGHTS = 900 };

static fmoe_status draw(fmoe_problem *p) {
    fmoe_topk_backward_args *a = p->args;
    fmoe_case c = p->c;
    TRY(fmoe_check_size("n", c.n));
    TRY(fmoe_check_topk(c.K, "n²", c.n * c.n));
    *a = (fmoe_topk_backward_args){c.T, c.n, c.K, c.norm_topk_prob, c.dtype, NULL, NULL, NULL, NULL};
    int64_t sides[] = {2, c.T, c.n}, chosen[] = {c.T, c.K};
    fmoe_argument *logits =
        fmoe_problem_add(p, "logits", offsetof(fmoe_topk_backward_args, logits), c.dtype, ROLE_INPUT, 3, sides);
    fmoe_argument *indices =
        fmoe_problem_add(p, "indices", offsetof(fmoe_topk_backward_args, indices), FMOE_I32, ROLE_INPUT, 2, chosen);
    fmoe_argument *dweights =
        fmoe_problem_add(p, "dweights", offsetof(fmoe_topk_backward_args, dweights), FMOE_F32, ROLE_INPUT, 2, chosen);
    if (!logits || !indices || !dweights ||
        !fmoe_problem_add(p, "dlogits", offsetof(fmoe_topk_backward_args, dlogits), FMOE_F32, ROLE_OUTPUT, 3, sides))
        return FMOE_OUT_OF_MEMORY;

    fmoe_fill_normal(p->seed, STREAM_DWEIGHTS, 1, dweights->count, dweights->data);
    float *values = fmoe_allocate(logits->count, sizeof *values);
    if (!values)
        return fmoe_no_memory(logits->count, sizeof *values);
    if (c.routing != ROUTING_TRAINED)
        c.routing = ROUTING_NORMAL;
    fmoe_status status = fmoe_case_logits(&c, p->seed, values);
    if (status == FMOE_OK) {
        /* The choice is made from the logits as stored. */
        fmoe_from_f32(c.dtype, logits->count, values, logits->data);
        fmoe_to_f32(c.dtype, logits->count, logits->data, values);
        status = fmoe_topk(c.T, c.n, c.K, c.norm_topk_prob, values, indices->data, NULL, NULL);
    }
    free(values);
    return status;
}

static fmoe_status reference(fmoe_problem *p) {
    const fmoe_topk_backward_args *a = p->args;
    fmoe_argument *dlogits = fmoe_problem_find(p, "dlogits");
    float *logits = fmoe_problem_f32(p, "logits"), *weights = fmoe_allocate(a->T * a->K, sizeof *weights);
    fmoe_status status = logits && weights ? FMOE_OK : fmoe_no_memory(2 * a->T * a->n, sizeof *logits);
    if (status == FMOE_OK)
        status = fmoe_topk_backward(a->T, a->n, a->K, a->norm_topk_prob, logits, a->indices, a->dweights, NULL,
                                    dlogits->expected);
    if (status == FMOE_OK)
        status = fmoe_topk_at(a->T, a->n, a->K, a->norm_topk_prob, logits, a->indices, NULL, weights);
    /* What reaches a side before the softmax takes its share off; all of it, where a token has only one choice. */
    double sum = 0;
    for (int64_t i = 0; status == FMOE_OK && i < a->T * a->K; i++)
        sum += (double)weights[i] * weights[i] * a->dweights[i] * a->dweights[i];
    dlogits->natural_scale = sqrt(2 * sum);
    free(logits);
    free(weights);
    return status;
}

static fmoe_work work(const fmoe_problem *p, const fmoe_ceilings *ceilings) {
    const fmoe_topk_backward_args *a = p->args;
    double T = (double)a->T, n = (double)a->n, K = (double)a->K;
    fmoe_work w = {.bytes = 2 * T * n * (double)fmoe_dtype_size(a->dtype) + 8 * T * K + 8 * T * n,
                   .flops = T * (10 * n + 8 * K)};
    w.floor_ms = 1e-6 * fmax(w.bytes / ceilings->copy_gbs, w.flops / ceilings->fma_gflops);
    w.floor_why = "logits, choices and gradients through memory once";
    return w;
}

const fmoe_step fmoe_step_topk_backward = {
    "topk_backward", sizeof(fmoe_topk_backward_args), draw, reference, NULL, work};
