/* The step expert_backward (chapter 9): dy and what the forward pass kept in, the gradients of x, of both tables and of
 * the routing weights out. */
#include "steps.h"

#include "../ref_cpu/check.h"

#include <math.h>
#include <stdlib.h>

enum { STREAM_X = 910, STREAM_DOWN, STREAM_UP, STREAM_DY };

typedef fmoe_expert_backward_args arguments;

/* Normal values, rounded to the case's storage type. */
static fmoe_status draw_tensor(fmoe_problem *p, const char *name, size_t slot, uint64_t stream, float scale,
                               int64_t rows) {
    fmoe_argument *a = fmoe_problem_add(p, name, slot, p->c.dtype, ROLE_INPUT, 2, (int64_t[]){rows, p->c.d});
    float *values = a ? fmoe_allocate(a->count, sizeof *values) : NULL;
    if (!values)
        return FMOE_OUT_OF_MEMORY;
    fmoe_fill_normal(p->seed, stream, scale, a->count, values);
    fmoe_from_f32(a->dtype, a->count, values, a->data);
    free(values);
    return FMOE_OK;
}

/* What the forward pass leaves behind: the pre-activations and the schedule. */
static fmoe_status draw_kept(fmoe_problem *p, const arguments *a, int32_t *indices, float *weights,
                             float *pre_activations, int32_t *offsets, int32_t *pairs) {
    TRY(fmoe_case_route(&p->c, p->seed, indices, weights));
    TRY(fmoe_schedule(a->T, a->K, a->N, indices, offsets, pairs));
    float *x = fmoe_problem_f32(p, "x"), *down = fmoe_problem_f32(p, "down"), *up = fmoe_problem_f32(p, "up");
    float *y = fmoe_allocate(a->T * a->d, sizeof *y);
    fmoe_status status = FMOE_OUT_OF_MEMORY;
    if (x && down && up && y)
        status = fmoe_expert(a->T, a->d, a->N, a->K, x, down, up, indices, weights, y, pre_activations);
    free(x);
    free(down);
    free(up);
    free(y);
    return status;
}

static fmoe_status draw(fmoe_problem *p) {
    arguments *a = p->args;
    if (!p->c.N)
        p->c.N = p->c.n * p->c.n;
    TRY(fmoe_check_size("d", p->c.d));
    TRY(fmoe_check_experts(p->c.N));
    TRY(fmoe_check_topk(p->c.K, "N", p->c.N));
    *a = (arguments){.T = p->c.T, .d = p->c.d, .N = p->c.N, .K = p->c.K, .dtype = p->c.dtype};
    TRY(draw_tensor(p, "x", offsetof(arguments, x), STREAM_X, 1, a->T));
    TRY(draw_tensor(p, "down", offsetof(arguments, down), STREAM_DOWN, 1 / sqrtf((float)a->d), a->N));
    TRY(draw_tensor(p, "up", offsetof(arguments, up), STREAM_UP, 1 / sqrtf((float)a->d), a->N));
    TRY(draw_tensor(p, "dy", offsetof(arguments, dy), STREAM_DY, 1, a->T));

    int64_t pairs_shape[] = {a->T, a->K}, tokens[] = {a->T, a->d}, table[] = {a->N, a->d};
    fmoe_argument *indices =
        fmoe_problem_add(p, "indices", offsetof(arguments, indices), FMOE_I32, ROLE_INPUT, 2, pairs_shape);
    fmoe_argument *weights =
        fmoe_problem_add(p, "weights", offsetof(arguments, weights), FMOE_F32, ROLE_INPUT, 2, pairs_shape);
    fmoe_argument *pre_activations = fmoe_problem_add(p, "pre_activations", offsetof(arguments, pre_activations),
                                                      FMOE_F32, ROLE_INPUT, 2, pairs_shape);
    fmoe_argument *offsets =
        fmoe_problem_add(p, "offsets", offsetof(arguments, offsets), FMOE_I32, ROLE_INPUT, 1, (int64_t[]){a->N + 1});
    fmoe_argument *pairs =
        fmoe_problem_add(p, "pairs", offsetof(arguments, pairs), FMOE_I32, ROLE_INPUT, 1, (int64_t[]){a->T * a->K});
    if (!indices || !weights || !pre_activations || !offsets || !pairs ||
        !fmoe_problem_add(p, "dx", offsetof(arguments, dx), a->dtype, ROLE_OUTPUT, 2, tokens) ||
        !fmoe_problem_add(p, "ddown", offsetof(arguments, ddown), a->dtype, ROLE_OUTPUT, 2, table) ||
        !fmoe_problem_add(p, "dup", offsetof(arguments, dup), a->dtype, ROLE_OUTPUT, 2, table) ||
        !fmoe_problem_add(p, "dweights", offsetof(arguments, dweights), FMOE_F32, ROLE_OUTPUT, 2, pairs_shape))
        return FMOE_OUT_OF_MEMORY;
    return draw_kept(p, a, indices->data, weights->data, pre_activations->data, offsets->data, pairs->data);
}

/* What the gradients' norms would be without cancellation: ds and da of a pair are about ‖dy‖ · ‖up[e]‖, times g for
 * ds, and each gradient is a sum of such multiples of rows. */
static void set_natural_scales(fmoe_problem *p, const float *x, const float *down, const float *up, const float *dy) {
    const arguments *a = p->args;
    double dx = 0, ddown = 0, dup = 0, dweights = 0;
    for (int64_t i = 0; i < a->T * a->K; i++) {
        const float *x_row = x + i / a->K * a->d, *dy_row = dy + i / a->K * a->d;
        const float *down_row = down + a->indices[i] * a->d, *up_row = up + a->indices[i] * a->d;
        double s = a->pre_activations[i], g2 = (double)a->weights[i] * a->weights[i];
        double dy2 = fmoe_dot(a->d, dy_row, dy_row), da2 = dy2 * fmoe_dot(a->d, up_row, up_row) / (double)a->d;
        double ds2 = da2 * g2 * fmoe_silu_derivative(s) * fmoe_silu_derivative(s);
        dx += ds2 * fmoe_dot(a->d, down_row, down_row);
        ddown += ds2 * fmoe_dot(a->d, x_row, x_row);
        dup += g2 * fmoe_silu(s) * fmoe_silu(s) * dy2;
        dweights += da2 * fmoe_silu(s) * fmoe_silu(s);
    }
    fmoe_problem_find(p, "dx")->natural_scale = sqrt(dx);
    fmoe_problem_find(p, "ddown")->natural_scale = sqrt(ddown);
    fmoe_problem_find(p, "dup")->natural_scale = sqrt(dup);
    fmoe_problem_find(p, "dweights")->natural_scale = sqrt(dweights);
}

static fmoe_status reference(fmoe_problem *p) {
    const arguments *a = p->args;
    float *x = fmoe_problem_f32(p, "x"), *down = fmoe_problem_f32(p, "down");
    float *up = fmoe_problem_f32(p, "up"), *dy = fmoe_problem_f32(p, "dy");
    fmoe_status status = FMOE_OUT_OF_MEMORY;
    if (x && down && up && dy) {
        status =
            fmoe_expert_backward(a->T, a->d, a->N, a->K, x, down, up, a->indices, a->weights, dy, FMOE_OVERWRITE,
                                 fmoe_problem_find(p, "dx")->expected, fmoe_problem_find(p, "ddown")->expected,
                                 fmoe_problem_find(p, "dup")->expected, fmoe_problem_find(p, "dweights")->expected);
        set_natural_scales(p, x, down, up, dy);
    }
    free(x);
    free(down);
    free(up);
    free(dy);
    return status;
}

static double experts_used(const arguments *a) {
    double count = 0;
    for (int64_t e = 0; e < a->N; e++)
        count += a->offsets[e + 1] > a->offsets[e];
    return count;
}

// [floor]
/* Two phases. By expert: both used tables are read once and both gradients written once, and every pair gathers its
 * token's rows of x and dy. Then dx: a row of `down` gathered for every pair, or a row of dx read and written,
 * whichever table is quicker to reach. */
static fmoe_work work(const fmoe_problem *p, const fmoe_ceilings *c) {
    const arguments *a = p->args;
    double size = (double)fmoe_dtype_size(a->dtype), T = (double)a->T, N = (double)a->N, d = (double)a->d;
    double pairs = T * (double)a->K, used = experts_used(a) * d * size, tokens = T * d * size, row = d * size;
    fmoe_work w = {.bytes = 2 * used + 2 * N * d * size + 3 * tokens + 24 * pairs, .flops = 8 * pairs * d};

    double tables = fmax(2 * pairs * row / fmoe_gather_gbs(c, 2 * tokens), (2 * used + 2 * N * row) / c->copy_gbs);
    double dx = pairs * row * fmin(1 / fmoe_gather_gbs(c, used), 2 / fmoe_gather_gbs(c, tokens));
    w.floor_ms = 1e-6 * (fmax(tables, 6 * pairs * d / c->fma_gflops) + fmax(dx, 2 * pairs * d / c->fma_gflops));
    w.floor_why = "by expert: tables once, two rows of tokens a pair; then a row a pair for dx";
    return w;
}
// [/floor]

const fmoe_step fmoe_step_expert_backward = {"expert_backward", sizeof(arguments), draw, reference, NULL, work};
