/* The step layer_forward_backward (chapter 9): one training step's worth of the layer. The forward half is the layer
 * step's: its arguments come first in the struct, so its functions draw, compute and compare them here as well. */
#include "steps.h"

#include "../ref_cpu/check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { STREAM_DY = 930 };

typedef fmoe_layer_backward_args arguments;
_Static_assert(offsetof(arguments, forward) == 0, "the layer step writes to its own arguments");

#define NUM_GRADIENTS 7
static const char *const gradient_names[NUM_GRADIENTS] = {"dx",         "drouter_gate", "ddown_embed", "dup_embed",
                                                          "dgate_proj", "dup_proj",     "ddown_proj"};

static fmoe_status draw(fmoe_problem *p) {
    TRY(fmoe_step_layer.draw(p));
    const fmoe_layer_args *a = p->args;
    fmoe_argument *dy =
        fmoe_problem_add(p, "dy", offsetof(arguments, dy), a->dtype, ROLE_INPUT, 2, (int64_t[]){a->T, a->d});
    const struct {
        size_t slot;
        int64_t rows, columns;
    } gradients[NUM_GRADIENTS] = {
        {offsetof(arguments, dx), a->T, a->d},          {offsetof(arguments, drouter_gate), 2 * a->n, a->d},
        {offsetof(arguments, ddown_embed), a->N, a->d}, {offsetof(arguments, dup_embed), a->N, a->d},
        {offsetof(arguments, dgate_proj), a->I, a->d},  {offsetof(arguments, dup_proj), a->I, a->d},
        {offsetof(arguments, ddown_proj), a->d, a->I},
    };
    for (int i = 0; dy && i < NUM_GRADIENTS; i++)
        if (!fmoe_problem_add(p, gradient_names[i], gradients[i].slot, a->dtype, ROLE_OUTPUT, 2,
                              (int64_t[]){gradients[i].rows, gradients[i].columns}))
            return FMOE_OUT_OF_MEMORY;
    float *values = dy ? fmoe_allocate(dy->count, sizeof *values) : NULL;
    if (!values)
        return FMOE_OUT_OF_MEMORY;
    fmoe_fill_normal(p->seed, STREAM_DY, 1, dy->count, values);
    fmoe_from_f32(a->dtype, dy->count, values, dy->data);
    free(values);
    return FMOE_OK;
}

/* The stored inputs as float32, and room for the reference's gradients. */
typedef struct {
    fmoe_config config;
    fmoe_weights weights;
    float *x, *dy;
} inputs;

static void free_inputs(inputs *in) {
    fmoe_weights_free(&in->weights);
    free(in->x);
    free(in->dy);
}

static float *copy_of(const float *values, int64_t count) {
    float *copy = fmoe_allocate(count, sizeof *copy);
    return copy ? memcpy(copy, values, (size_t)count * sizeof *copy) : NULL;
}

static fmoe_status read_inputs(const fmoe_problem *p, inputs *in) {
    const fmoe_layer_args *a = p->args;
    in->config = (fmoe_config){a->d, a->I, a->N, a->K, a->norm_topk_prob};
    in->weights = (fmoe_weights){
        .router_gate = fmoe_problem_f32(p, "router_gate"),
        .down_embed = fmoe_problem_f32(p, "down_embed"),
        .up_embed = fmoe_problem_f32(p, "up_embed"),
        .gate_proj = fmoe_problem_f32(p, "gate_proj"),
        .up_proj = fmoe_problem_f32(p, "up_proj"),
        .down_proj = fmoe_problem_f32(p, "down_proj"),
        .running_mean = copy_of(fmoe_problem_find(p, "running_mean")->pristine, a->d),
        .running_var = copy_of(fmoe_problem_find(p, "running_var")->pristine, a->d),
    };
    in->x = fmoe_problem_f32(p, "x");
    in->dy = fmoe_problem_f32(p, "dy");
    const fmoe_weights *w = &in->weights;
    bool complete = in->x && in->dy && w->router_gate && w->down_embed && w->up_embed && w->gate_proj && w->up_proj &&
                    w->down_proj && w->running_mean && w->running_var;
    return complete ? FMOE_OK : fmoe_fail(FMOE_OUT_OF_MEMORY, "no memory for the layer's inputs as float32");
}

/* All gradients at this choice; targets in the order of gradient_names. */
static fmoe_status gradients_at(const inputs *in, const fmoe_layer_args *a, const int32_t *indices, float **targets) {
    fmoe_gradients g = {targets[0], targets[1], targets[2], targets[3], targets[4], targets[5], targets[6]};
    return fmoe_layer_backward(&in->config, &in->weights, a->training, a->T, in->x, indices, in->dy, FMOE_OVERWRITE,
                               &g);
}

/* The router's gradient is a sum over tokens and chosen pairs of g · dg · x̂, and cancels where a token has no choice
 * (one key a side, or one expert a token and norm_topk_prob). Its size without that: dg is about ‖dy‖ · |up| a pair,
 * x̂ has d units of variance 1. */
static fmoe_status router_scale(const inputs *in, const fmoe_layer_args *a, const float *logits, const int32_t *indices,
                                double *scale) {
    int64_t count = a->T * a->K;
    float *g = fmoe_allocate(count, sizeof *g), *dg = fmoe_allocate(count, sizeof *dg);
    fmoe_status status = g && dg ? FMOE_OK : fmoe_no_memory(count, sizeof *g);
    if (status == FMOE_OK)
        status = fmoe_topk_at(a->T, a->n, a->K, a->norm_topk_prob, logits, indices, NULL, g);
    if (status == FMOE_OK)
        status = fmoe_expert_backward(a->T, a->d, a->N, a->K, in->x, in->weights.down_embed, in->weights.up_embed,
                                      indices, g, in->dy, FMOE_OVERWRITE, NULL, NULL, NULL, dg);
    double sum = 0;
    for (int64_t i = 0; status == FMOE_OK && i < count; i++)
        sum += (double)g[i] * g[i] * dg[i] * dg[i];
    *scale = sqrt(2 * (double)a->d * sum);
    free(g);
    free(dg);
    return status;
}

static fmoe_status reference(fmoe_problem *p) {
    const fmoe_layer_args *a = p->args;
    TRY(fmoe_step_layer.reference(p));
    const int32_t *indices = fmoe_problem_find(p, "indices")->expected;
    float *targets[NUM_GRADIENTS];
    for (int i = 0; i < NUM_GRADIENTS; i++)
        targets[i] = fmoe_problem_find(p, gradient_names[i])->expected;
    inputs in;
    fmoe_status status = read_inputs(p, &in);
    if (status == FMOE_OK)
        status = gradients_at(&in, a, indices, targets);
    if (status == FMOE_OK)
        status = router_scale(&in, a, fmoe_problem_find(p, "router_logits")->expected, indices,
                              &fmoe_problem_find(p, "drouter_gate")->natural_scale);
    free_inputs(&in);
    return status;
}

static double gradients_error(const fmoe_problem *p, float *const *expected, char *why) {
    double worst = 0;
    for (int i = 0; i < NUM_GRADIENTS; i++) {
        const fmoe_argument *g = fmoe_problem_find(p, gradient_names[i]);
        float *values = fmoe_problem_f32(p, gradient_names[i]);
        double error = values ? fmoe_relative_error(g->count, values, expected[i], g->natural_scale) : INFINITY;
        free(values);
        if (!(error <= worst)) {
            worst = error;
            snprintf(why, 200, "%s at the rung's own indices", gradient_names[i]);
        }
    }
    return worst;
}

/* Where the choice differs within its rule, the gradients are compared with the reference's at the rung's choice. */
static double error_at_choice(const fmoe_problem *p, char *why) {
    const fmoe_layer_args *a = p->args;
    float *expected[NUM_GRADIENTS], *own[NUM_GRADIENTS] = {NULL};
    bool complete = true;
    for (int i = 0; i < NUM_GRADIENTS; i++)
        expected[i] = fmoe_problem_find(p, gradient_names[i])->expected;
    const int32_t *indices = fmoe_problem_find(p, "indices")->expected;
    if (a->T == 0 || memcmp(a->indices, indices, (size_t)(a->T * a->K) * sizeof *indices) == 0)
        return gradients_error(p, expected, why);

    for (int i = 0; i < NUM_GRADIENTS; i++) {
        own[i] = fmoe_allocate(fmoe_problem_find(p, gradient_names[i])->count, sizeof *own[i]);
        complete = complete && own[i];
    }
    inputs in;
    double worst = INFINITY;
    snprintf(why, 200, "the reference could not be run at the rung's own indices");
    if (read_inputs(p, &in) == FMOE_OK && complete && gradients_at(&in, a, a->indices, own) == FMOE_OK)
        worst = gradients_error(p, own, why);
    free_inputs(&in);
    for (int i = 0; i < NUM_GRADIENTS; i++)
        free(own[i]);
    return worst;
}

static double error(const fmoe_problem *p, char *why) {
    char forward_why[200] = "";
    double forward = fmoe_step_layer.error(p, forward_why);
    double backward = forward <= fmoe_error_limit(p->c.dtype) ? error_at_choice(p, why) : 0;
    if (!(forward <= backward))
        memcpy(why, forward_why, sizeof forward_why);
    return forward <= backward ? backward : forward;
}

// [floor]
/* The forward pass's floor, and the same reasoning for the way back when everything useful was kept: twice the
 * products of the forward pass, three rows gathered a pair, and every weight read and every gradient written once. */
static fmoe_work work(const fmoe_problem *p, const fmoe_ceilings *c) {
    const fmoe_layer_args *a = p->args;
    fmoe_work w = fmoe_step_layer.work(p, c);
    double size = (double)fmoe_dtype_size(a->dtype), T = (double)a->T, d = (double)a->d, N = (double)a->N;
    double K = (double)a->K, n = (double)a->n, I = (double)a->I;
    double flops = 12 * T * I * d + 8 * T * n * d + 8 * T * K * d;
    double bytes = (2 * (2 * n + 3 * I) + 2 * N) * d * size + 3 * T * d * size + w.bytes - 2 * T * d * size;
    double gather = 3 * T * K * d * size / fmoe_gather_gbs(c, fmin(T, N) * d * size);
    w.floor_ms += 1e-6 * fmax(flops / fmoe_product_gflops(c, p->c.dtype), fmax(bytes / c->copy_gbs, gather));
    w.floor_why = "forward, then twice its products with everything kept";
    w.flops += flops;
    w.bytes += bytes;
    return w;
}
// [/floor]

const fmoe_step fmoe_step_layer_backward = {"layer_forward_backward", sizeof(arguments), draw, reference, error, work};
