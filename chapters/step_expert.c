/* The step of chapters 1, 5 and 7: from tokens, routing and the two tables of experts to the routed output. */
#include "steps.h"

#include "../ref_cpu/check.h"

#include <math.h>
#include <stdlib.h>

enum { STREAM_X, STREAM_DOWN, STREAM_UP };

/* Normal values, rounded to the case's storage type. */
static fmoe_status draw_tensor(fmoe_problem *p, const char *name, size_t slot, uint64_t stream, float scale,
                               int64_t rows) {
    fmoe_argument *a = fmoe_problem_add(p, name, slot, p->c.dtype, ROLE_INPUT, 2, (int64_t[]){rows, p->c.d});
    float *values = a ? malloc((size_t)a->count * sizeof *values + 1) : NULL;
    if (!values)
        return FMOE_OUT_OF_MEMORY;
    fmoe_fill_normal(p->seed, stream, scale, a->count, values);
    fmoe_from_f32(a->dtype, a->count, values, a->data);
    free(values);
    return FMOE_OK;
}

static fmoe_status draw(fmoe_problem *p) {
    fmoe_expert_args *a = p->args;
    if (!p->c.N)
        p->c.N = p->c.n * p->c.n;
    TRY(fmoe_check_size("d", p->c.d));
    TRY(fmoe_check_experts(p->c.N));
    TRY(fmoe_check_topk(p->c.K, "N", p->c.N));
    *a = (fmoe_expert_args){.T = p->c.T, .d = p->c.d, .N = p->c.N, .K = p->c.K, .dtype = p->c.dtype};
    a->from_router = p->c.routing == ROUTING_NORMAL || p->c.routing == ROUTING_TRAINED;

    /* Pre-activations of variance 1, where silu is neither zero nor a straight line. */
    TRY(draw_tensor(p, "x", offsetof(fmoe_expert_args, x), STREAM_X, 1, a->T));
    TRY(draw_tensor(p, "down", offsetof(fmoe_expert_args, down), STREAM_DOWN, 1 / sqrtf((float)a->d), a->N));
    TRY(draw_tensor(p, "up", offsetof(fmoe_expert_args, up), STREAM_UP, 1, a->N));
    int64_t chosen[] = {a->T, a->K};
    fmoe_argument *indices =
        fmoe_problem_add(p, "indices", offsetof(fmoe_expert_args, indices), FMOE_I32, ROLE_INPUT, 2, chosen);
    fmoe_argument *weights =
        fmoe_problem_add(p, "weights", offsetof(fmoe_expert_args, weights), FMOE_F32, ROLE_INPUT, 2, chosen);
    fmoe_argument *y =
        fmoe_problem_add(p, "y", offsetof(fmoe_expert_args, y), a->dtype, ROLE_OUTPUT, 2, (int64_t[]){a->T, a->d});
    if (!indices || !weights || !y)
        return FMOE_OUT_OF_MEMORY;
    return fmoe_case_route(&p->c, p->seed, indices->data, weights->data);
}

/* The norm of all terms that y sums: what ‖y‖ would be if they were orthogonal. */
static double norm_of_terms(const fmoe_expert_args *a, const float *up, const float *pre_activations) {
    double sum = 0;
    for (int64_t i = 0; i < a->T * a->K; i++) {
        const float *row = up + a->indices[i] * a->d;
        double activation = fmoe_silu(pre_activations[i]) * a->weights[i];
        sum += activation * activation * fmoe_dot(a->d, row, row);
    }
    return sqrt(sum);
}

static fmoe_status reference(fmoe_problem *p) {
    const fmoe_expert_args *a = p->args;
    fmoe_argument *y = fmoe_problem_find(p, "y");
    float *x = fmoe_problem_f32(p, "x"), *down = fmoe_problem_f32(p, "down"), *up = fmoe_problem_f32(p, "up");
    float *pre_activations = malloc((size_t)(a->T * a->K) * sizeof *pre_activations + 1);
    fmoe_status status = FMOE_OUT_OF_MEMORY;
    if (x && down && up && pre_activations)
        status = fmoe_expert(a->T, a->d, a->N, a->K, x, down, up, a->indices, a->weights, y->expected, pre_activations);
    if (status == FMOE_OK)
        y->natural_scale = norm_of_terms(a, up, pre_activations);
    free(x);
    free(down);
    free(up);
    free(pre_activations);
    return status;
}

static double experts_used(const fmoe_expert_args *a) {
    unsigned char *used = calloc((size_t)a->N, 1);
    if (!used)
        return (double)a->N;
    double count = 0;
    for (int64_t i = 0; i < a->T * a->K; i++) {
        count += !used[a->indices[i]];
        used[a->indices[i]] = 1;
    }
    free(used);
    return count;
}

// [floor]
/* Three ways, and the cheapest of them is the floor:
 *   by token: either phase reads a row a pair out of the table of experts that are used;
 *   by expert: either phase reads the used table once from front to back, and a row of tokens a pair;
 *   dense: all T·N products at the multiply-add rate. */
static fmoe_work work(const fmoe_problem *p, const fmoe_ceilings *c) {
    const fmoe_expert_args *a = p->args;
    double size = (double)fmoe_dtype_size(a->dtype), T = (double)a->T, N = (double)a->N, d = (double)a->d;
    double pairs = T * (double)a->K, table = experts_used(a) * d * size, tokens = T * d * size;
    fmoe_work w = {.bytes = 2 * table + 2 * tokens + 8 * pairs, .flops = 4 * pairs * d};

    double multiply = 2 * pairs * d / c->fma_gflops, stream = table / c->copy_gbs;
    double gather = pairs * d * size / fmoe_gather_gbs(c, table);
    double by_token = 2 * fmax(gather, fmax(stream, multiply));
    double by_expert = 2 * fmax(pairs * d * size / fmoe_gather_gbs(c, tokens), fmax(stream, multiply));
    double dense = 2 * fmax(2 * T * N * d / fmoe_product_gflops(c, p->c.dtype), N * d * size / c->copy_gbs);

    w.floor_ms = by_token * 1e-6;
    w.floor_why = gather > stream ? "by token: a row a pair, gathered from either table"
                                  : "by token: either table read once, which takes longer than its gathers from cache";
    if (by_expert < by_token) {
        w.floor_ms = by_expert * 1e-6;
        w.floor_why = "by expert: either table read once, a row of tokens a pair and phase";
    }
    if (dense * 1e-6 < w.floor_ms) {
        w.floor_ms = dense * 1e-6;
        w.floor_why = "dense: two products of all tokens with all experts";
    }
    return w;
}
// [/floor]

const fmoe_step fmoe_step_expert = {"expert", sizeof(fmoe_expert_args), draw, reference, NULL, work};
