/* The step mlp_backward (chapter 9): tokens, weights, dy and what the forward pass kept in, four gradients out. */
#include "steps.h"

#include "../ref_cpu/check.h"

#include <math.h>
#include <stdlib.h>

enum { STREAM_X = 920, STREAM_GATE, STREAM_UP, STREAM_DOWN, STREAM_DY };

typedef fmoe_mlp_backward_args arguments;

/* What the forward pass leaves behind: the hidden units and their derivatives by either pre-activation, as stored. */
static fmoe_status keep_hidden(fmoe_problem *p, const float *x, const float *gate, const float *up) {
    const char *names[] = {"h", "h_by_p", "h_by_q"};
    const size_t slots[] = {offsetof(arguments, h), offsetof(arguments, h_by_p), offsetof(arguments, h_by_q)};
    int64_t T = p->c.T, d = p->c.d, I = p->c.I, shape[] = {T, I};
    float *values = fmoe_allocate(3 * T * I, sizeof *values);
    if (!values)
        return fmoe_no_memory(3 * T * I, sizeof *values);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < I; i++) {
            double of_gate = fmoe_dot(d, x + t * d, gate + i * d), of_up = fmoe_dot(d, x + t * d, up + i * d);
            values[t * I + i] = (float)(fmoe_silu(of_gate) * of_up);
            values[(T + t) * I + i] = (float)(fmoe_silu_derivative(of_gate) * of_up);
            values[(2 * T + t) * I + i] = (float)fmoe_silu(of_gate);
        }
    fmoe_status status = FMOE_OK;
    for (int k = 0; k < 3 && status == FMOE_OK; k++) {
        fmoe_argument *argument = fmoe_problem_add(p, names[k], slots[k], p->c.dtype, ROLE_INPUT, 2, shape);
        status = argument ? FMOE_OK : FMOE_OUT_OF_MEMORY;
        if (argument)
            fmoe_from_f32(argument->dtype, argument->count, values + k * T * I, argument->data);
    }
    free(values);
    return status;
}

static fmoe_status draw_kept(fmoe_problem *p) {
    float *x = fmoe_problem_f32(p, "x"), *gate = fmoe_problem_f32(p, "gate"), *up = fmoe_problem_f32(p, "up");
    fmoe_status status = x && gate && up ? keep_hidden(p, x, gate, up) : FMOE_OUT_OF_MEMORY;
    free(x);
    free(gate);
    free(up);
    return status;
}

static fmoe_status draw(fmoe_problem *p) {
    arguments *a = p->args;
    int64_t T = p->c.T, d = p->c.d, I = p->c.I;
    TRY(fmoe_check_size("d", d));
    TRY(fmoe_check_size("I", I));
    *a = (arguments){.T = T, .d = d, .I = I, .dtype = p->c.dtype};
    /* Scales that keep both pre-activations and every gradient of dx's terms of order 1. */
    const struct {
        const char *name;
        size_t slot;
        int64_t rows, columns;
        fmoe_role role;
        uint64_t stream;
        double scale;
    } tensors[] = {
        {"x", offsetof(arguments, x), T, d, ROLE_INPUT, STREAM_X, 1},
        {"gate", offsetof(arguments, gate), I, d, ROLE_INPUT, STREAM_GATE, 1 / sqrt((double)d)},
        {"up", offsetof(arguments, up), I, d, ROLE_INPUT, STREAM_UP, 1 / sqrt((double)d)},
        {"down", offsetof(arguments, down), d, I, ROLE_INPUT, STREAM_DOWN, 1 / sqrt((double)I)},
        {"dy", offsetof(arguments, dy), T, d, ROLE_INPUT, STREAM_DY, 1},
        {"dx", offsetof(arguments, dx), T, d, ROLE_OUTPUT, 0, 0},
        {"dgate", offsetof(arguments, dgate), I, d, ROLE_OUTPUT, 0, 0},
        {"dup", offsetof(arguments, dup), I, d, ROLE_OUTPUT, 0, 0},
        {"ddown", offsetof(arguments, ddown), d, I, ROLE_OUTPUT, 0, 0},
    };
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        fmoe_argument *argument = fmoe_problem_add(p, tensors[i].name, tensors[i].slot, a->dtype, tensors[i].role, 2,
                                                   (int64_t[]){tensors[i].rows, tensors[i].columns});
        if (!argument)
            return FMOE_OUT_OF_MEMORY;
        if (tensors[i].role == ROLE_OUTPUT) {
            argument->natural_scale = sqrt((double)argument->count);
            continue;
        }
        float *values = fmoe_allocate(argument->count, sizeof *values);
        if (!values)
            return fmoe_no_memory(argument->count, sizeof *values);
        fmoe_fill_normal(p->seed, tensors[i].stream, (float)tensors[i].scale, argument->count, values);
        fmoe_from_f32(a->dtype, argument->count, values, argument->data);
        free(values);
    }
    return draw_kept(p);
}

static fmoe_status reference(fmoe_problem *p) {
    const arguments *a = p->args;
    float *x = fmoe_problem_f32(p, "x"), *gate = fmoe_problem_f32(p, "gate"), *up = fmoe_problem_f32(p, "up");
    float *down = fmoe_problem_f32(p, "down"), *dy = fmoe_problem_f32(p, "dy");
    fmoe_status status = FMOE_OUT_OF_MEMORY;
    if (x && gate && up && down && dy)
        status = fmoe_mlp_backward(a->T, a->d, a->I, x, gate, up, down, dy, FMOE_OVERWRITE,
                                   fmoe_problem_find(p, "dx")->expected, fmoe_problem_find(p, "dgate")->expected,
                                   fmoe_problem_find(p, "dup")->expected, fmoe_problem_find(p, "ddown")->expected);
    free(x);
    free(gate);
    free(up);
    free(down);
    free(dy);
    return status;
}

/* Six products of 2·T·d·I operations: one for dh, two for dx, one for each weight. The hidden units were kept. */
static fmoe_work work(const fmoe_problem *p, const fmoe_ceilings *c) {
    const arguments *a = p->args;
    double T = (double)a->T, d = (double)a->d, I = (double)a->I;
    fmoe_work w = {.bytes = (6 * d * I + 3 * T * d + 3 * T * I) * (double)fmoe_dtype_size(a->dtype),
                   .flops = 12 * T * d * I};
    double memory = w.bytes / c->copy_gbs, products = w.flops / fmoe_product_gflops(c, p->c.dtype);
    w.floor_ms = 1e-6 * fmax(memory, products);
    w.floor_why = memory > products ? "weights read and gradients written once" : "six products";
    return w;
}

const fmoe_step fmoe_step_mlp_backward = {"mlp_backward", sizeof(arguments), draw, reference, NULL, work};
