/* The hybrid layer as a step (chapter 8): x and the weights in, y and the routing out. */
#include "steps.h"

#include "../ref_cpu/check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    STREAM_X = 800,
    STREAM_OFFSET,
    STREAM_ROUTER_GATE,
    STREAM_DOWN_EMBED,
    STREAM_UP_EMBED,
    STREAM_GATE_PROJ,
    STREAM_UP_PROJ,
    STREAM_DOWN_PROJ,
    STREAM_VAR,
};

/* ---- Drawing ----------------------------------------------------------------------------------------------------- */

static fmoe_argument *add_matrix(fmoe_problem *p, const char *name, size_t slot, fmoe_dtype dtype, fmoe_role role,
                                 int64_t rows, int64_t columns) {
    return fmoe_problem_add(p, name, slot, dtype, role, 2, (int64_t[]){rows, columns});
}

/* Hidden unit h of x is normal around an offset of its own, as activations are; the router's norm takes it off. */
static float offset_of(uint64_t seed, int64_t h) {
    return 0.5f * fmoe_random_normal(seed, STREAM_OFFSET, (uint64_t)h);
}

/* Normal values of this scale, rounded to the storage type. d > 0: rows of d units, each with its offset. */
static fmoe_status fill(const fmoe_problem *p, fmoe_argument *a, uint64_t stream, float scale, int64_t d) {
    float *values = fmoe_allocate(a->count, sizeof *values);
    if (!values)
        return fmoe_no_memory(a->count, sizeof *values);
    fmoe_fill_normal(p->seed, stream, scale, a->count, values);
    for (int64_t i = 0; d > 0 && i < a->count; i++)
        values[i] += offset_of(p->seed, i % d);
    fmoe_from_f32(a->dtype, a->count, values, a->data);
    free(values);
    return FMOE_OK;
}

/* Routing weights shrink as 1/N, so without norm_topk_prob the up table has to be large for both branches to count:
 * an error in either must show in y. */
static float up_embed_scale(const fmoe_case *c) {
    float K = (float)c->K;
    return c->norm_topk_prob ? 2 * sqrtf(K) : fmaxf(1, (float)c->N / (20 * sqrtf(K)));
}

static fmoe_status draw_inputs(fmoe_problem *p, const fmoe_layer_args *a) {
    const struct {
        const char *name;
        size_t slot;
        int64_t rows, columns;
        uint64_t stream;
        float scale;
    } inputs[] = {
        {"x", offsetof(fmoe_layer_args, x), a->T, a->d, STREAM_X, 1},
        {"router_gate", offsetof(fmoe_layer_args, router_gate), 2 * a->n, a->d, STREAM_ROUTER_GATE, 0},
        {"down_embed", offsetof(fmoe_layer_args, down_embed), a->N, a->d, STREAM_DOWN_EMBED, 0},
        {"up_embed", offsetof(fmoe_layer_args, up_embed), a->N, a->d, STREAM_UP_EMBED, up_embed_scale(&p->c)},
        {"gate_proj", offsetof(fmoe_layer_args, gate_proj), a->I, a->d, STREAM_GATE_PROJ, 0},
        {"up_proj", offsetof(fmoe_layer_args, up_proj), a->I, a->d, STREAM_UP_PROJ, 0},
        {"down_proj", offsetof(fmoe_layer_args, down_proj), a->d, a->I, STREAM_DOWN_PROJ, 0},
    };
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++) {
        fmoe_argument *argument =
            add_matrix(p, inputs[i].name, inputs[i].slot, a->dtype, ROLE_INPUT, inputs[i].rows, inputs[i].columns);
        if (!argument)
            return FMOE_OUT_OF_MEMORY;
        /* Scale 0: by the row's length, so that the product with a normal row has variance 1. */
        float scale = inputs[i].scale > 0 ? inputs[i].scale : 1 / sqrtf((float)inputs[i].columns);
        TRY(fill(p, argument, inputs[i].stream, scale, i == 0 ? a->d : 0));
    }
    return FMOE_OK;
}

/* Running buffers as after some training: near what the batch will show, not at it. Or such that x̂ = x. */
static void draw_running(uint64_t seed, int64_t d, bool neutral, float *mean, float *var) {
    for (int64_t h = 0; h < d; h++) {
        mean[h] = neutral ? 0 : 0.9f * offset_of(seed, h) + 0.05f;
        var[h] =
            neutral ? (float)(1 - FMOE_NORM_EPS) : 0.7f + 0.6f * fmoe_random_uniform(seed, STREAM_VAR, (uint64_t)h);
    }
}

/* Rows of length 1 at right angles to each other: normal ones, each less its parts along the rows before it. */
static void make_orthonormal(uint64_t seed, int64_t rows, int64_t d, float *matrix) {
    fmoe_fill_normal(seed, STREAM_ROUTER_GATE, 1, rows * d, matrix);
    for (int64_t r = 0; r < rows; r++) {
        float *row = matrix + r * d;
        for (int64_t before = 0; before < r; before++) {
            double along = fmoe_dot(d, row, matrix + before * d);
            for (int64_t h = 0; h < d; h++)
                row[h] -= (float)(along * matrix[before * d + h]);
        }
        double length = sqrt(fmoe_dot(d, row, row));
        for (int64_t h = 0; h < d; h++)
            row[h] = (float)(row[h] / length);
    }
}

/* x_t = Σ_r logits[t, r] · gate[r]: through a gate with orthonormal rows the router finds these logits again, but for
 * the rounding of x and gate to the storage type. */
static void spread_logits(const fmoe_layer_args *a, const float *logits, const float *gate, float *x) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < a->T; t++)
        for (int64_t first = 0; first < a->d; first += FMOE_BLOCK) {
            double sum[FMOE_BLOCK] = {0};
            int64_t width = fmoe_block_width(first, a->d);
            for (int64_t r = 0; r < 2 * a->n; r++)
                fmoe_add_row(width, logits[(r / a->n * a->T + t) * a->n + r % a->n], gate + r * a->d + first, sum);
            fmoe_store_row(width, sum, FMOE_OVERWRITE, x + t * a->d + first);
        }
}

/* "trained": x and the gate such that the layer routes as the trained model did, with a norm that changes nothing. */
static fmoe_status draw_trained(fmoe_problem *p, const fmoe_layer_args *a) {
    int64_t gate_count = 2 * a->n * a->d, x_count = a->T * a->d, logits_count = 2 * a->T * a->n;
    if (2 * a->n > a->d)
        return fmoe_fail(FMOE_BAD_SIZE, "case '%s': 2n = %lld rows at right angles do not fit into d = %lld", p->c.name,
                         (long long)(2 * a->n), (long long)a->d);
    float *gate = fmoe_allocate(gate_count + x_count + logits_count, sizeof *gate);
    if (!gate)
        return fmoe_no_memory(gate_count + x_count + logits_count, sizeof *gate);
    float *x = gate + gate_count, *logits = x + x_count;
    fmoe_status status = fmoe_case_logits(&p->c, p->seed, logits);
    if (status == FMOE_OK) {
        make_orthonormal(p->seed, 2 * a->n, a->d, gate);
        spread_logits(a, logits, gate, x);
        fmoe_from_f32(a->dtype, gate_count, gate, fmoe_problem_find(p, "router_gate")->data);
        fmoe_from_f32(a->dtype, x_count, x, fmoe_problem_find(p, "x")->data);
    }
    free(gate);
    return status;
}

static fmoe_status draw(fmoe_problem *p) {
    fmoe_layer_args *a = p->args;
    fmoe_case *c = &p->c;
    if (c->N == 0)
        c->N = c->n * c->n;
    TRY(fmoe_check_size("d", c->d));
    TRY(fmoe_check_size("I", c->I));
    TRY(fmoe_check_experts(c->N));
    if (c->routing == ROUTING_UNIFORM || c->routing == ROUTING_HOT)
        return fmoe_fail(FMOE_UNSUPPORTED,
                         "case '%s': the layer routes by itself; only normal and trained routing can be named",
                         c->name);
    int64_t n = fmoe_num_keys(c->N);
    *a = (fmoe_layer_args){.T = c->T,
                           .d = c->d,
                           .I = c->I,
                           .N = c->N,
                           .K = c->K,
                           .n = n,
                           .training = c->training,
                           .norm_topk_prob = c->norm_topk_prob,
                           .dtype = c->dtype};
    TRY(fmoe_check_topk(a->K, "n²", n * n));
    TRY(draw_inputs(p, a));
    if (c->routing == ROUTING_TRAINED)
        TRY(draw_trained(p, a));

    fmoe_argument *mean = fmoe_problem_add(p, "running_mean", offsetof(fmoe_layer_args, running_mean), FMOE_F32,
                                           ROLE_INOUT, 1, (int64_t[]){a->d});
    fmoe_argument *var = fmoe_problem_add(p, "running_var", offsetof(fmoe_layer_args, running_var), FMOE_F32,
                                          ROLE_INOUT, 1, (int64_t[]){a->d});
    if (!mean || !var)
        return FMOE_OUT_OF_MEMORY;
    draw_running(p->seed, a->d, c->routing == ROUTING_TRAINED, mean->pristine, var->pristine);
    draw_running(p->seed, a->d, c->routing == ROUTING_TRAINED, mean->data, var->data);

    int64_t sides[] = {2, a->T, n};
    if (!add_matrix(p, "y", offsetof(fmoe_layer_args, y), a->dtype, ROLE_OUTPUT, a->T, a->d) ||
        !fmoe_problem_add(p, "router_logits", offsetof(fmoe_layer_args, router_logits), FMOE_F32, ROLE_OUTPUT, 3,
                          sides) ||
        !add_matrix(p, "scores", offsetof(fmoe_layer_args, scores), FMOE_F32, ROLE_OUTPUT, a->T, a->K) ||
        !add_matrix(p, "indices", offsetof(fmoe_layer_args, indices), FMOE_I32, ROLE_OUTPUT, a->T, a->K))
        return FMOE_OUT_OF_MEMORY;
    return FMOE_OK;
}

/* ---- Reference --------------------------------------------------------------------------------------------------- */

/* The reference on the stored inputs. The running buffers begin as drawn and are left as the pass leaves them. */
static fmoe_status run_reference(const fmoe_problem *p, const int32_t *chosen, float *running_mean, float *running_var,
                                 fmoe_outputs *outputs) {
    const fmoe_layer_args *a = p->args;
    fmoe_config config = {a->d, a->I, a->N, a->K, a->norm_topk_prob};
    fmoe_weights w = {
        .router_gate = fmoe_problem_f32(p, "router_gate"),
        .down_embed = fmoe_problem_f32(p, "down_embed"),
        .up_embed = fmoe_problem_f32(p, "up_embed"),
        .gate_proj = fmoe_problem_f32(p, "gate_proj"),
        .up_proj = fmoe_problem_f32(p, "up_proj"),
        .down_proj = fmoe_problem_f32(p, "down_proj"),
        .running_mean = fmoe_allocate(a->d, sizeof(float)),
        .running_var = fmoe_allocate(a->d, sizeof(float)),
    };
    float *x = fmoe_problem_f32(p, "x");
    fmoe_status status = FMOE_OUT_OF_MEMORY;
    if (x && w.router_gate && w.down_embed && w.up_embed && w.gate_proj && w.up_proj && w.down_proj && w.running_mean &&
        w.running_var) {
        size_t bytes = (size_t)a->d * sizeof(float);
        memcpy(w.running_mean, fmoe_problem_find(p, "running_mean")->pristine, bytes);
        memcpy(w.running_var, fmoe_problem_find(p, "running_var")->pristine, bytes);
        status = fmoe_layer_forward(&config, &w, a->training, a->T, x, chosen, outputs);
        memcpy(running_mean, w.running_mean, bytes);
        memcpy(running_var, w.running_var, bytes);
    }
    free(x);
    fmoe_weights_free(&w);
    return status;
}

static fmoe_status reference(fmoe_problem *p) {
    fmoe_outputs outputs = {
        .y = fmoe_problem_find(p, "y")->expected,
        .router_logits = fmoe_problem_find(p, "router_logits")->expected,
        .scores = fmoe_problem_find(p, "scores")->expected,
        .indices = fmoe_problem_find(p, "indices")->expected,
    };
    return run_reference(p, NULL, fmoe_problem_find(p, "running_mean")->expected,
                         fmoe_problem_find(p, "running_var")->expected, &outputs);
}

/* ---- Comparing --------------------------------------------------------------------------------------------------- */

/* Logits decide discretely, so they have a limit of their own, the same for every storage type. */
static bool logits_close(const fmoe_argument *logits, char *why) {
    const float *out = logits->data, *ref = logits->expected;
    double scale = 1;
    for (int64_t i = 0; i < logits->count; i++)
        scale = fmax(scale, fabs((double)ref[i]));
    for (int64_t i = 0; i < logits->count; i++)
        if (!(fabs((double)out[i] - ref[i]) < 2e-5 * scale)) {
            snprintf(why, 200, "router_logits: element %lld is %.9g and should be %.9g", (long long)i, (double)out[i],
                     (double)ref[i]);
            return false;
        }
    return true;
}

/* Training moves the buffers as the reference does; evaluation does not touch them. */
static bool buffers_right(const fmoe_problem *p, char *why) {
    const char *names[] = {"running_mean", "running_var"};
    for (int i = 0; i < 2; i++) {
        const fmoe_argument *a = fmoe_problem_find(p, names[i]);
        bool right = ((const fmoe_layer_args *)p->args)->training
                         ? fmoe_relative_error(a->count, a->data, a->expected, 0) <= fmoe_error_limit(FMOE_F32)
                         : memcmp(a->data, a->pristine, (size_t)a->count * sizeof(float)) == 0;
        if (!right) {
            snprintf(why, 200, "%s is not as the reference leaves it", names[i]);
            return false;
        }
    }
    return true;
}

/* y and scores against the reference's at the same choice. */
static double after_choice(const fmoe_problem *p, const float *y_ref, const float *scores_ref, char *why) {
    const fmoe_argument *scores = fmoe_problem_find(p, "scores");
    float *y = fmoe_problem_f32(p, "y");
    if (!y)
        return INFINITY;
    double error = fmoe_relative_error(fmoe_problem_find(p, "y")->count, y, y_ref, 0);
    free(y);
    snprintf(why, 200, "y at the rung's own indices");
    if (!(fmoe_relative_error(scores->count, scores->data, scores_ref, 0) <= fmoe_error_limit(FMOE_F32))) {
        snprintf(why, 200, "scores at the rung's own indices");
        return INFINITY;
    }
    return error;
}

/* Where the choice differs within its rule, everything after it is compared with the reference at the rung's choice. */
static double compare_at_choice(const fmoe_problem *p, char *why) {
    const fmoe_layer_args *a = p->args;
    const fmoe_argument *y = fmoe_problem_find(p, "y"), *scores = fmoe_problem_find(p, "scores");
    const int32_t *expected = fmoe_problem_find(p, "indices")->expected;
    if (a->T == 0 || memcmp(a->indices, expected, (size_t)(a->T * a->K) * sizeof *expected) == 0)
        return after_choice(p, y->expected, scores->expected, why);

    float *scratch = fmoe_allocate(y->count + scores->count + 2 * a->d, sizeof *scratch);
    if (!scratch) {
        snprintf(why, 200, "no memory to compare with");
        return INFINITY;
    }
    fmoe_outputs at = {.y = scratch, .scores = scratch + y->count};
    float *mean = at.scores + scores->count, *var = mean + a->d;
    double error = INFINITY;
    if (run_reference(p, a->indices, mean, var, &at) != FMOE_OK)
        snprintf(why, 200, "the reference at the rung's own indices: %.150s", fmoe_error_message());
    else
        error = after_choice(p, at.y, at.scores, why);
    free(scratch);
    return error;
}

static double error(const fmoe_problem *p, char *why) {
    const fmoe_layer_args *a = p->args;
    const fmoe_argument *logits = fmoe_problem_find(p, "router_logits");
    if (!logits_close(logits, why) || !buffers_right(p, why))
        return INFINITY;
    int64_t token =
        fmoe_compare_indices(a->T, a->n, a->K, logits->expected, a->indices, fmoe_problem_find(p, "indices")->expected);
    if (token >= 0) {
        snprintf(why, 200, "indices: token %lld's set is not the K best", (long long)token);
        return INFINITY;
    }
    return compare_at_choice(p, why);
}

/* ---- Floor ------------------------------------------------------------------------------------------------------- */

static double experts_used(const fmoe_problem *p) {
    const fmoe_layer_args *a = p->args;
    const int32_t *indices = fmoe_problem_find(p, "indices")->expected;
    unsigned char *used = calloc((size_t)a->N, 1);
    if (!used)
        return (double)a->N;
    double count = 0;
    for (int64_t i = 0; i < a->T * a->K; i++) {
        count += !used[indices[i]];
        used[indices[i]] = 1;
    }
    free(used);
    return count;
}

// [floor]
/* The branches may run side by side, so three things bound the layer, and the largest is its floor: all that is read
 * and written, once, from whichever cache holds it; all multiplications; and the rows that the experts gather, two a
 * pair, from the smaller of the table in use and the tokens (or, if that is cheaper, the dense product of all tokens
 * with all experts). */
static fmoe_work work(const fmoe_problem *p, const fmoe_ceilings *c) {
    const fmoe_layer_args *a = p->args;
    double size = (double)fmoe_dtype_size(a->dtype), T = (double)a->T, d = (double)a->d, I = (double)a->I;
    double n = (double)a->n, K = (double)a->K, N = (double)a->N, used = experts_used(p);
    double weights = (2 * n * d + 2 * used * d + 3 * I * d) * size + 2 * d * 4;
    fmoe_work w = {.bytes = weights + 2 * T * d * size + 2 * T * n * 4 + 2 * T * K * 4,
                   .flops = 4 * T * n * d + 4 * T * K * d + 6 * T * I * d};

    double gather = 2 * T * K * d * size / fmoe_gather_gbs(c, fmin(used, T) * d * size);
    double routed = fmin(gather, 4 * T * N * d / fmoe_product_gflops(c, p->c.dtype));
    double copy = w.bytes / fmax(c->copy_gbs, fmoe_gather_gbs(c, w.bytes)),
           multiply = w.flops / fmoe_product_gflops(c, p->c.dtype);
    w.floor_ms = 1e-6 * fmax(routed, fmax(copy, multiply));
    w.floor_why = "all products at the multiply-add rate";
    if (copy >= fmax(routed, multiply))
        w.floor_why = "weights and tokens, read once";
    else if (routed > multiply)
        w.floor_why = "the experts' rows, two a pair, gathered";
    return w;
}
// [/floor]

const fmoe_step fmoe_step_layer = {"layer", sizeof(fmoe_layer_args), draw, reference, error, work};
