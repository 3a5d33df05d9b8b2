/* The step router_backward (chapter 9): the gradients of the logits in, those of x and of the gate out. */
#include "steps.h"

#include "../ref_cpu/check.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { STREAM_DLOGITS = 290 };

typedef fmoe_router_backward_args arguments;

static fmoe_status draw(fmoe_problem *p) {
    arguments *a = p->args;
    const fmoe_case *c = &p->c;
    *a = (arguments){.T = c->T, .d = c->d, .n = c->n, .training = c->training, .dtype = c->dtype};
    int64_t tokens[] = {c->T, c->d}, keys[] = {2 * c->n, c->d}, units[] = {c->d}, sides[] = {2, c->T, c->n};
    fmoe_argument *x = fmoe_problem_add(p, "x", offsetof(arguments, x), c->dtype, ROLE_INPUT, 2, tokens);
    fmoe_argument *gate = fmoe_problem_add(p, "gate", offsetof(arguments, gate), c->dtype, ROLE_INPUT, 2, keys);
    fmoe_argument *mean =
        fmoe_problem_add(p, "running_mean", offsetof(arguments, running_mean), FMOE_F32, ROLE_INPUT, 1, units);
    fmoe_argument *var =
        fmoe_problem_add(p, "running_var", offsetof(arguments, running_var), FMOE_F32, ROLE_INPUT, 1, units);
    fmoe_argument *dlogits =
        fmoe_problem_add(p, "dlogits", offsetof(arguments, dlogits), FMOE_F32, ROLE_INPUT, 3, sides);
    if (!x || !gate || !mean || !var || !dlogits ||
        !fmoe_problem_add(p, "dx", offsetof(arguments, dx), c->dtype, ROLE_OUTPUT, 2, tokens) ||
        !fmoe_problem_add(p, "dgate", offsetof(arguments, dgate), c->dtype, ROLE_OUTPUT, 2, keys))
        return FMOE_OUT_OF_MEMORY;
    fmoe_fill_normal(p->seed, STREAM_DLOGITS, 1, dlogits->count, dlogits->data);
    return fmoe_router_draw(c, p->seed, x->data, gate->data, mean->data, var->data);
}

/* On copies of the running buffers, which the norm's forward pass moves. */
static fmoe_status gradients(fmoe_problem *p, const float *x, const float *gate, float *moving, float *x_hat,
                             float *dx_hat) {
    const arguments *a = p->args;
    fmoe_argument *dx = fmoe_problem_find(p, "dx"), *dgate = fmoe_problem_find(p, "dgate");
    memcpy(moving, a->running_mean, (size_t)a->d * sizeof *moving);
    memcpy(moving + a->d, a->running_var, (size_t)a->d * sizeof *moving);
    TRY(fmoe_router_norm(a->training, a->T, a->d, x, moving, moving + a->d, x_hat));
    TRY(fmoe_router_logits_backward(a->T, a->d, a->n, x_hat, gate, a->dlogits, FMOE_OVERWRITE, dx_hat,
                                    dgate->expected));
    dgate->natural_scale = sqrt((double)dgate->count * (double)a->T);
    dx->natural_scale = sqrt((double)dx->count);
    return fmoe_router_norm_backward(a->training, a->T, a->d, x, a->running_mean, a->running_var, dx_hat, dx->expected);
}

static fmoe_status reference(fmoe_problem *p) {
    const arguments *a = p->args;
    float *x = fmoe_problem_f32(p, "x"), *gate = fmoe_problem_f32(p, "gate");
    float *moving = fmoe_allocate(2 * a->d, sizeof *moving), *x_hat = fmoe_allocate(a->T * a->d, sizeof *x_hat);
    float *dx_hat = fmoe_allocate(a->T * a->d, sizeof *dx_hat);
    fmoe_status status = FMOE_OUT_OF_MEMORY;
    if (x && gate && moving && x_hat && dx_hat)
        status = gradients(p, x, gate, moving, x_hat, dx_hat);
    free(x);
    free(gate);
    free(moving);
    free(x_hat);
    free(dx_hat);
    return status;
}

/* Two products as large as the forward pass's one. In training x is read for its statistics before anything else. */
static fmoe_work work(const fmoe_problem *p, const fmoe_ceilings *c) {
    const arguments *a = p->args;
    double T = (double)a->T, d = (double)a->d, n = (double)a->n, size = (double)fmoe_dtype_size(a->dtype);
    fmoe_work w = {.bytes = 2 * (T * d + 2 * n * d) * size + 2 * T * n * 4, .flops = 8 * T * n * d + 6 * T * d};
    double statistics_ms = a->training ? T * d * size / c->copy_gbs / 1e6 : 0, copy_ms = w.bytes / c->copy_gbs / 1e6;
    double product_ms = w.flops / fmoe_product_gflops(c, a->dtype) / 1e6;
    w.floor_ms = statistics_ms + fmax(copy_ms, product_ms);
    w.floor_why =
        product_ms > copy_ms ? "two products at the rate of the type" : "x and the gradients at the copy rate";
    return w;
}

const fmoe_step fmoe_step_router_backward = {"router_backward", sizeof(arguments), draw, reference, NULL, work};
