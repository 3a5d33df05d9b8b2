// The mlp step (chapter 6): tokens and three weight matrices in, the shared MLP's output out.
#include "steps.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { STREAM_X = 600, STREAM_GATE, STREAM_UP, STREAM_DOWN };

// A [rows, columns] input of normal values with the given standard deviation.
static fmoe_status add_normal(fmoe_problem *p, const char *name, size_t slot, uint64_t stream, int64_t rows,
                              int64_t columns, double deviation) {
    fmoe_argument *a = fmoe_problem_add(p, name, slot, p->c.dtype, ROLE_INPUT, 2, (int64_t[]){rows, columns});
    if (!a)
        return FMOE_OUT_OF_MEMORY;
    float *values = malloc((size_t)a->count * sizeof(float) + 1);
    if (!values)
        return FMOE_OUT_OF_MEMORY;
    fmoe_fill_normal(p->seed, stream, (float)deviation, a->count, values);
    fmoe_from_f32(p->c.dtype, a->count, values, a->data);
    free(values);
    return FMOE_OK;
}

// Weights are scaled so that both pre-activations and the output are of order 1, as in a trained network: silu is then
// used where it bends.
static fmoe_status draw(fmoe_problem *p) {
    fmoe_mlp_args *args = p->args;
    int64_t T = p->c.T, d = p->c.d, I = p->c.I;
    args->T = T, args->d = d, args->I = I;
    args->dtype = p->c.dtype;

    double per_d = 1 / sqrt((double)d), per_I = 1 / sqrt((double)I);
    fmoe_status status = add_normal(p, "x", offsetof(fmoe_mlp_args, x), STREAM_X, T, d, 1);
    if (status == FMOE_OK)
        status = add_normal(p, "gate", offsetof(fmoe_mlp_args, gate), STREAM_GATE, I, d, per_d);
    if (status == FMOE_OK)
        status = add_normal(p, "up", offsetof(fmoe_mlp_args, up), STREAM_UP, I, d, per_d);
    if (status == FMOE_OK)
        status = add_normal(p, "down", offsetof(fmoe_mlp_args, down), STREAM_DOWN, d, I, per_I);
    if (status != FMOE_OK)
        return status;
    fmoe_argument *y =
        fmoe_problem_add(p, "y", offsetof(fmoe_mlp_args, y), p->c.dtype, ROLE_OUTPUT, 2, (int64_t[]){T, d});
    if (!y)
        return FMOE_OUT_OF_MEMORY;
    y->natural_scale = 0.6 * sqrt((double)y->count); // silu(p)·q of two standard normals has deviation 0.6
    return FMOE_OK;
}

// [sample]
// A token's output depends on no other token. Where all tokens would keep the reference busy for minutes it computes
// one in so many; the others must merely be written.
double fmoe_mlp_reference_operations = 2e11;

static int64_t tokens_apart(const fmoe_mlp_args *args) {
    double operations = 6.0 * (double)args->T * (double)args->d * (double)args->I, most = fmoe_mlp_reference_operations;
    return operations > most ? 1 + (int64_t)(4 * operations / most) : 1;
}
// [/sample]

static fmoe_status every(int64_t apart, const fmoe_mlp_args *args, const float *x, const float *gate, const float *up,
                         const float *down, float *expected) {
    int64_t d = args->d, count = (args->T + apart - 1) / apart;
    float *rows = malloc((size_t)(2 * count * d) * sizeof *rows + 1);
    if (!rows)
        return FMOE_OUT_OF_MEMORY;
    float *y = rows + count * d;
    for (int64_t i = 0; i < count; i++)
        memcpy(rows + i * d, x + i * apart * d, (size_t)d * sizeof *rows);
    fmoe_status status = fmoe_mlp(count, d, args->I, rows, gate, up, down, y);
    for (int64_t i = 0; i < count; i++)
        memcpy(expected + i * apart * d, y + i * d, (size_t)d * sizeof *rows);
    free(rows);
    return status;
}

static fmoe_status reference(fmoe_problem *p) {
    const fmoe_mlp_args *args = p->args;
    fmoe_argument *output = fmoe_problem_find(p, "y");
    float *x = fmoe_problem_f32(p, "x"), *gate = fmoe_problem_f32(p, "gate");
    float *up = fmoe_problem_f32(p, "up"), *down = fmoe_problem_f32(p, "down");
    fmoe_status status = FMOE_OUT_OF_MEMORY;
    output->rows_apart = tokens_apart(args);
    if (x && gate && up && down)
        status = output->rows_apart > 1 ? every(output->rows_apart, args, x, gate, up, down, output->expected)
                                        : fmoe_mlp(args->T, args->d, args->I, x, gate, up, down, output->expected);
    free(x);
    free(gate);
    free(up);
    free(down);
    return status;
}

// Three products of 2·T·d·I operations each, against every weight, token and output through memory once. The machine's
// two reading rates are both measured with traffic of their own kind; the faster one is the safer floor.
static fmoe_work work(const fmoe_problem *p, const fmoe_ceilings *ceilings) {
    const fmoe_mlp_args *args = p->args;
    double T = (double)args->T, d = (double)args->d, I = (double)args->I;
    fmoe_work w;
    w.bytes = (3 * d * I + 2 * T * d) * (double)fmoe_dtype_size(args->dtype);
    w.flops = 6 * T * d * I;
    double rate = fmax(ceilings->copy_gbs, fmoe_gather_gbs(ceilings, w.bytes));
    double memory_ms = w.bytes / rate / 1e6, product_ms = w.flops / fmoe_product_gflops(ceilings, p->c.dtype) / 1e6;
    w.floor_ms = fmax(memory_ms, product_ms);
    w.floor_why = memory_ms > product_ms ? "every weight read once" : "three products at the multiply-add rate";
    return w;
}

const fmoe_step fmoe_step_mlp = {"mlp", sizeof(fmoe_mlp_args), draw, reference, NULL, work};
