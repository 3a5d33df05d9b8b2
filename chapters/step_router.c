// The router step (chapter 2): batch norm, projection onto 2n keys, log-softmax of each side.
#include "steps.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { STREAM_X = 200, STREAM_GATE, STREAM_OFFSET, STREAM_SPREAD, STREAM_MEAN, STREAM_VAR };

// Hidden units as a trained network has them: each with its own offset (a few standard deviations) and its own spread.
static float offset_of(uint64_t seed, int64_t h) {
    return 3 * fmoe_random_normal(seed, STREAM_OFFSET, (uint64_t)h);
}

static float spread_of(uint64_t seed, int64_t h) {
    return 0.5f + fmoe_random_uniform(seed, STREAM_SPREAD, (uint64_t)h);
}

static void draw_x(uint64_t seed, int64_t T, int64_t d, float *x) {
    fmoe_fill_normal(seed, STREAM_X, 1, T * d, x);
    for (int64_t t = 0; t < T; t++)
        for (int64_t h = 0; h < d; h++)
            x[t * d + h] = (x[t * d + h] + offset_of(seed, h)) * spread_of(seed, h);
}

// Running buffers near the truth, as after some hundred steps.
static void draw_running(uint64_t seed, int64_t d, float *mean, float *var) {
    for (int64_t h = 0; h < d; h++) {
        float spread = spread_of(seed, h);
        mean[h] = (offset_of(seed, h) + 0.1f * fmoe_random_normal(seed, STREAM_MEAN, (uint64_t)h)) * spread;
        var[h] = spread * spread * (0.8f + 0.4f * fmoe_random_uniform(seed, STREAM_VAR, (uint64_t)h));
    }
}

fmoe_status fmoe_router_draw(const fmoe_case *c, uint64_t seed, void *x, void *gate, float *running_mean,
                             float *running_var) {
    int64_t tokens = c->T * c->d, keys = 2 * c->n * c->d;
    float *values = malloc((size_t)(tokens > keys ? tokens : keys) * sizeof(float) + 1);
    if (!values)
        return FMOE_OUT_OF_MEMORY;
    draw_x(seed, c->T, c->d, values);
    fmoe_from_f32(c->dtype, tokens, values, x);
    fmoe_fill_normal(seed, STREAM_GATE, 1 / sqrtf((float)c->d), keys, values);
    fmoe_from_f32(c->dtype, keys, values, gate);
    free(values);
    draw_running(seed, c->d, running_mean, running_var);
    return FMOE_OK;
}

static fmoe_status draw(fmoe_problem *p) {
    fmoe_router_args *args = p->args;
    const fmoe_case *c = &p->c;
    args->T = c->T, args->d = c->d, args->n = c->n;
    args->training = c->training;
    args->dtype = c->dtype;

    int64_t units[] = {c->d}, sides[] = {2, c->T, c->n};
    fmoe_argument *x =
        fmoe_problem_add(p, "x", offsetof(fmoe_router_args, x), c->dtype, ROLE_INPUT, 2, (int64_t[]){c->T, c->d});
    fmoe_argument *gate = fmoe_problem_add(p, "gate", offsetof(fmoe_router_args, gate), c->dtype, ROLE_INPUT, 2,
                                           (int64_t[]){2 * c->n, c->d});
    fmoe_argument *mean =
        fmoe_problem_add(p, "running_mean", offsetof(fmoe_router_args, running_mean), FMOE_F32, ROLE_INOUT, 1, units);
    fmoe_argument *var =
        fmoe_problem_add(p, "running_var", offsetof(fmoe_router_args, running_var), FMOE_F32, ROLE_INOUT, 1, units);
    if (!x || !gate || !mean || !var ||
        !fmoe_problem_add(p, "logits", offsetof(fmoe_router_args, logits), FMOE_F32, ROLE_OUTPUT, 3, sides) ||
        !fmoe_problem_add(p, "log_probs", offsetof(fmoe_router_args, log_probs), FMOE_F32, ROLE_OUTPUT, 3, sides))
        return FMOE_OUT_OF_MEMORY;

    // ROLE_INOUT keeps the value before a run in pristine; data is restored from it.
    fmoe_status status = fmoe_router_draw(c, p->seed, x->data, gate->data, mean->pristine, var->pristine);
    if (status == FMOE_OK) {
        memcpy(mean->data, mean->pristine, (size_t)c->d * sizeof(float));
        memcpy(var->data, var->pristine, (size_t)c->d * sizeof(float));
    }
    return status;
}

static fmoe_status reference(fmoe_problem *p) {
    const fmoe_router_args *args = p->args;
    int64_t T = args->T, d = args->d, n = args->n;
    fmoe_argument *mean = fmoe_problem_find(p, "running_mean"), *var = fmoe_problem_find(p, "running_var");
    float *x = fmoe_problem_f32(p, "x"), *gate = fmoe_problem_f32(p, "gate");
    float *x_hat = malloc((size_t)(T * d) * sizeof(float) + 1);
    float *logits = fmoe_problem_find(p, "logits")->expected;
    fmoe_status status = x && gate && x_hat ? FMOE_OK : FMOE_OUT_OF_MEMORY;
    if (status == FMOE_OK) {
        memcpy(mean->expected, mean->pristine, (size_t)d * sizeof(float));
        memcpy(var->expected, var->pristine, (size_t)d * sizeof(float));
        status = fmoe_router_norm(args->training, T, d, x, mean->expected, var->expected, x_hat);
    }
    if (status == FMOE_OK)
        status = fmoe_router_logits(T, d, n, x_hat, gate, logits);
    if (status == FMOE_OK)
        status = fmoe_log_softmax(2 * T, n, logits, fmoe_problem_find(p, "log_probs")->expected);
    free(x);
    free(gate);
    free(x_hat);
    return status;
}

// Logits decide discretely, so besides the relative measure no single one may be off by 2e-5 of the largest.
static bool logits_close(const fmoe_argument *logits, char *why) {
    const float *out = logits->data, *ref = logits->expected;
    double scale = 1;
    for (int64_t i = 0; i < logits->count; i++)
        scale = fmax(scale, fabs((double)ref[i]));
    for (int64_t i = 0; i < logits->count; i++)
        if (!(fabs((double)out[i] - ref[i]) < 2e-5 * scale)) {
            snprintf(why, 200, "logits: element %lld is %.9g, should be %.9g", (long long)i, out[i], ref[i]);
            return false;
        }
    return true;
}

// Everything this step writes is float32, whatever x is stored in, and is held to the float32 limit.
static double error(const fmoe_problem *p, char *why) {
    const fmoe_router_args *args = p->args;
    static const char *names[] = {"logits", "log_probs", "running_mean", "running_var"};
    if (!logits_close(fmoe_problem_find(p, "logits"), why))
        return INFINITY;
    double worst = 0;
    for (int i = 0; i < 4; i++) {
        const fmoe_argument *a = fmoe_problem_find(p, names[i]);
        // A logit sums d products of about 1/√d: it cancels to zero for a constant input.
        double scale = i < 2 ? sqrt((double)a->count) : 0;
        double e = fmoe_relative_error(a->count, a->data, a->expected, scale);
        if (!args->training && i >= 2 && memcmp(a->data, a->pristine, (size_t)a->count * sizeof(float)) != 0)
            e = INFINITY;
        if (e > fmoe_error_limit(FMOE_F32)) {
            snprintf(why, 200, "%s: error %.2e", names[i], e);
            return INFINITY;
        }
        worst = fmax(worst, e);
    }
    return worst;
}

// Training reads x twice because no logit can be computed before the last token is counted.
static fmoe_work work(const fmoe_problem *p, const fmoe_ceilings *ceilings) {
    const fmoe_router_args *args = p->args;
    double T = (double)args->T, d = (double)args->d, n = (double)args->n;
    double size = (double)fmoe_dtype_size(args->dtype);
    fmoe_work w;
    w.bytes = (T * d + 2 * n * d) * size + 2 * 2 * T * n * 4;
    w.flops = 2 * T * 2 * n * d + 2 * T * d + 4 * 2 * T * n;
    double statistics_ms = args->training ? T * d * size / ceilings->copy_gbs / 1e6 : 0;
    double copy_ms = w.bytes / ceilings->copy_gbs / 1e6;
    double product_ms = w.flops / fmoe_product_gflops(ceilings, args->dtype) / 1e6;
    w.floor_ms = statistics_ms + fmax(copy_ms, product_ms);
    w.floor_why = product_ms > copy_ms ? "the product at the rate of its type" : "x and the logits at the copy rate";
    return w;
}

const fmoe_step fmoe_step_router = {"router", sizeof(fmoe_router_args), draw, reference, error, work};
