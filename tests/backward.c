/* Chapter 9: the backward pass. */
#include "cuda_values.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What the properties below hold to account. A sentence about the GPU puts the GPU's in their place: its process runs
 * no other. */
static const fmoe_rung *topk_ladder = chapter9_topk_rungs;
static fmoe_status (*topk_backward)(int64_t T, int64_t n, int64_t K, bool norm, const float *logits,
                                    const int32_t *indices, const float *dweights, const float *dscores,
                                    float *dlogits) = fmoe_topk_backward;
static fmoe_status (*log_softmax_backward)(int64_t rows, int64_t n, const float *logits, const float *dlog_probs,
                                           float *dlogits) = fmoe_log_softmax_backward;

/* ---- Finite differences ------------------------------------------------------------------------------------------ */

/* Σ out · its gradient, in double, of whatever a forward function makes of a context. */
typedef double loss_fn(void *context);

static double weighted_sum(int64_t count, const float *out, const float *gradient) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum += (double)out[i] * gradient[i];
    return sum;
}

static double quotient(float *w, float h, loss_fn *loss, void *context) {
    float before = *w, above = before + h, below = before - h;
    *w = above;
    double high = loss(context);
    *w = below;
    double low = loss(context);
    *w = before;
    return (high - low) / ((double)above - below);
}

/* Two steps, h and h/2, whose h² errors cancel (Richardson). What is left is h⁴ and the rounding of float32 outputs. */
static const char *check_gradient(const char *name, float *w, int64_t count, const float *gradient, loss_fn *loss,
                                  void *context) {
    const float h = 1.0f / 16;
    double off = 0, norm = 0;
    for (int64_t i = 0; i < count; i++) {
        double difference = (4 * quotient(&w[i], h / 2, loss, context) - quotient(&w[i], h, loss, context)) / 3;
        off += (difference - gradient[i]) * (difference - gradient[i]);
        norm += difference * difference;
    }
    if (!(sqrt(off) <= 2e-3 * sqrt(norm) + 1e-4 * sqrt((double)count)))
        return because("gradient of %s: off by %.2e of its norm %.2e", name, sqrt(off / norm), sqrt(norm));
    return HOLDS;
}

/* ---- Router ------------------------------------------------------------------------------------------------------ */

typedef struct {
    bool training;
    int64_t T, d, n;
    float *x, *mean, *var, *gate, *out;
    const float *dout;
} router_context;

static double norm_loss(void *context) {
    router_context *c = context;
    float *mean OWNED = copy_of(c->mean, c->d), *var OWNED = copy_of(c->var, c->d);
    fmoe_router_norm(c->training, c->T, c->d, c->x, mean, var, c->out);
    return weighted_sum(c->T * c->d, c->out, c->dout);
}

/* Tokens whose batch variance is far from zero, where the quotient would need smaller steps than float32 has. */
static float *spread_tokens(uint64_t seed, int64_t T, int64_t d) {
    float *x = normals(seed, 0, 0.5f, T * d);
    for (int64_t i = 0; i < T * d; i++)
        x[i] += (float)(i / d % 2 * 4) + 0.5f * (float)(i % d % 3);
    return x;
}

static const char *norm_gradient(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1];
    bool training = size[2] != 0;
    if (training && T < 2)
        return DOES_NOT_APPLY;
    float *x OWNED = spread_tokens(seed, T, d), *out OWNED = floats(T * d), *dout OWNED = normals(seed, 1, 1, T * d);
    float *mean OWNED = normals(seed, 2, 1, d), *var OWNED = normals(seed, 3, 1, d), *dx OWNED = floats(T * d);
    for (int64_t i = 0; i < d; i++)
        var[i] = 0.5f + var[i] * var[i];
    router_context c = {
        .training = training, .T = T, .d = d, .x = x, .mean = mean, .var = var, .out = out, .dout = dout};
    CALL(fmoe_router_norm_backward(training, T, d, x, training ? NULL : mean, training ? NULL : var, dout, dx));
    return check_gradient("x", x, T * d, dx, norm_loss, &c);
}

SENTENCE(9, 1,
         "The norm's gradient passes through the batch statistics in training and past the buffers in evaluation.",
         "every token moves the mean and the variance that every other token is divided by", "finite differences") {
    for_sizes("T d training", norm_gradient,
              SIZES({2, 1, 1}, {3, 5, 1}, {9, 3, 1}, {4, 66, 1}, {1, 1, 0}, {1, 5, 0}, {7, 3, 0}, {2, 66, 0}));
}

static const char *norm_gradient_projects(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1];
    if (T < 2)
        return DOES_NOT_APPLY;
    float *x OWNED = normals(seed, 0, 1, T * d), *dout OWNED = normals(seed, 1, 1, T * d), *dx OWNED = floats(T * d);
    for (int64_t i = 0; i < T * d; i++)
        x[i] += 300;
    CALL(fmoe_router_norm_backward(true, T, d, x, NULL, NULL, dout, dx));
    for (int64_t c = 0; c < d; c++) {
        double mean = 0, sum = 0, along = 0, size_of = 0, spread = 0;
        for (int64_t t = 0; t < T; t++)
            mean += x[t * d + c] / (double)T;
        for (int64_t t = 0; t < T; t++) {
            sum += dx[t * d + c];
            along += dx[t * d + c] * (x[t * d + c] - mean);
            size_of += fabs((double)dx[t * d + c]);
            spread += (x[t * d + c] - mean) * (x[t * d + c] - mean) / (double)T;
        }
        /* eps lets a share of eps / var through along x̂. */
        if (!(fabs(sum) <= 1e-5 * size_of) || !(fabs(along) <= (1e-5 + 1e-4 / spread) * size_of * sqrt(spread)))
            return because("unit %d: the sum over tokens is %g, along x it is %g, of %g", (int)c, sum, along, size_of);
    }
    return HOLDS;
}

SENTENCE(9, 2, "In training a unit's gradients sum to zero over the tokens, and have nothing along x̂.",
         "shifting or stretching all tokens changes nothing, however far from zero they lie", "closed form") {
    for_sizes("T d", norm_gradient_projects, SIZES({5, 1}, {29, 7}, {300, 70}));
}

static double logits_loss(void *context) {
    router_context *c = context;
    fmoe_router_logits(c->T, c->d, c->n, c->x, c->gate, c->out);
    return weighted_sum(2 * c->T * c->n, c->out, c->dout);
}

static const char *logits_gradient(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], n = size[2];
    float *x OWNED = normals(seed, 0, 1, T * d), *gate OWNED = normals(seed, 1, 1, 2 * n * d);
    float *out OWNED = floats(2 * T * n), *dout OWNED = normals(seed, 2, 1, 2 * T * n);
    float *dx OWNED = floats(T * d), *dgate OWNED = floats(2 * n * d);
    router_context c = {.T = T, .d = d, .n = n, .x = x, .gate = gate, .out = out, .dout = dout};
    CALL(fmoe_router_logits_backward(T, d, n, x, gate, dout, FMOE_OVERWRITE, dx, dgate));
    CHECK(check_gradient("x_hat", x, T * d, dx, logits_loss, &c));
    return check_gradient("gate", gate, 2 * n * d, dgate, logits_loss, &c);
}

SENTENCE(9, 3, "The projection's gradients: dx̂ = dz · gate, dgate = dzᵀ · x̂, for the layout [2, T, n].",
         "the transpose of a product", "finite differences") {
    for_sizes("T d n", logits_gradient, SIZES({1, 1, 1}, {2, 3, 1}, {1, 2, 3}, {3, 5, 4}, {2, 67, 2}));
}

static double log_softmax_loss(void *context) {
    router_context *c = context;
    fmoe_log_softmax(c->T, c->n, c->x, c->out);
    return weighted_sum(c->T * c->n, c->out, c->dout);
}

static const char *log_softmax_gradient(const int64_t *size, uint64_t seed) {
    int64_t rows = size[0], n = size[1];
    float *z OWNED = normals(seed, 0, 2, rows * n), *out OWNED = floats(rows * n), *dz OWNED = floats(rows * n);
    float *dout OWNED = normals(seed, 1, 1, rows * n);
    router_context c = {.T = rows, .n = n, .x = z, .out = out, .dout = dout};
    CALL(log_softmax_backward(rows, n, z, dout, dz));
    for (int64_t r = 0; r < rows; r++) {
        double sum = 0;
        for (int64_t i = 0; i < n; i++)
            sum += dz[r * n + i];
        if (!(fabs(sum) <= 1e-5 * (double)n))
            return because("row %d: the gradients sum to %g", (int)r, sum);
    }
    return check_gradient("logits", z, rows * n, dz, log_softmax_loss, &c);
}

SENTENCE(9, 4, "log-softmax sends back dz = dlog p − p · Σ dlog p, which sums to zero over a row.",
         "a constant added to a row changes no probability", "finite differences, and the sum") {
    for_sizes("rows n", log_softmax_gradient, SIZES({1, 1}, {1, 2}, {3, 5}, {2, 40}));
}

/* ---- Top-k ------------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t T, n, K;
    bool norm;
    float *logits, *scores, *weights;
    const int32_t *indices;
    const float *dweights, *dscores;
} topk_context;

static double topk_loss(void *context) {
    topk_context *c = context;
    double sum = 0;
    fmoe_topk_at(c->T, c->n, c->K, c->norm, c->logits, c->indices, c->scores, c->weights);
    if (c->dweights)
        sum += weighted_sum(c->T * c->K, c->weights, c->dweights);
    if (c->dscores)
        sum += weighted_sum(c->T * c->K, c->scores, c->dscores);
    return sum;
}

static const char *topk_gradient(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2], given = size[4];
    if (K > n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = normals(seed, 0, 1, 2 * T * n), *dlogits OWNED = floats(2 * T * n);
    float *scores OWNED = floats(T * K), *weights OWNED = floats(T * K);
    float *dweights OWNED = normals(seed, 1, 3, T * K), *dscores OWNED = normals(seed, 2, 1, T * K);
    int32_t *indices OWNED = any_indices(seed, 3, n * n, T * K);
    topk_context c = {T, n, K, size[3] != 0, logits, scores, weights, indices, NULL, NULL};
    c.dweights = given & 1 ? dweights : NULL;
    c.dscores = given & 2 ? dscores : NULL;
    if (T > 1) /* and one token by the rule itself */
        CALL(fmoe_topk(1, n, K, false, logits, indices, NULL, NULL));
    CALL(topk_backward(T, n, K, c.norm, logits, indices, c.dweights, c.dscores, dlogits));
    return check_gradient("logits", logits, 2 * T * n, dlogits, topk_loss, &c);
}

SENTENCE(9, 5, "The top-k passes the gradients of weights and scores straight to the chosen pairs' keys.",
         "the choice is a constant; normalised weights are a softmax over it", "finite differences") {
    for_sizes("T n K norm given", topk_gradient,
              SIZES({1, 1, 1, 0, 1}, {1, 1, 1, 1, 1}, {2, 3, 4, 0, 1}, {2, 3, 4, 1, 1}, {2, 3, 9, 0, 2},
                    {2, 3, 9, 1, 3}, {3, 5, 2, 0, 3}, {3, 5, 7, 1, 3}, {1, 7, 20, 1, 1}, {2, 4, 3, 1, 0}));
}

/* ---- Experts ----------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t T, d, N, K;
    float *x, *down, *up, *weights, *y, *dy;
    int32_t *indices;
} expert_context;

static expert_context new_experts(uint64_t seed, int64_t T, int64_t d, int64_t N, int64_t K) {
    return (expert_context){T,
                            d,
                            N,
                            K,
                            normals(seed, 0, 1, T * d),
                            normals(seed, 1, 1 / sqrtf((float)d), N * d),
                            normals(seed, 2, 1, N * d),
                            normals(seed, 3, 1, T * K),
                            floats(T * d),
                            normals(seed, 4, 1, T * d),
                            any_indices(seed, 5, N, T * K)};
}

static void free_experts(expert_context *c) {
    free(c->x);
    free(c->down);
    free(c->up);
    free(c->weights);
    free(c->y);
    free(c->dy);
    free(c->indices);
}
#define EXPERTS FREED(free_experts)

static double expert_loss(void *context) {
    expert_context *c = context;
    fmoe_expert(c->T, c->d, c->N, c->K, c->x, c->down, c->up, c->indices, c->weights, c->y, NULL);
    return weighted_sum(c->T * c->d, c->y, c->dy);
}

static fmoe_status expert_backward(const expert_context *c, fmoe_write write, float *dx, float *ddown, float *dup,
                                   float *dweights) {
    return fmoe_expert_backward(c->T, c->d, c->N, c->K, c->x, c->down, c->up, c->indices, c->weights, c->dy, write, dx,
                                ddown, dup, dweights);
}

static const char *expert_gradient(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], N = size[2], K = size[3];
    if (K > N)
        return DOES_NOT_APPLY;
    expert_context c EXPERTS = new_experts(seed, T, d, N, K);
    float *dx OWNED = floats(T * d), *ddown OWNED = floats(N * d), *dup OWNED = floats(N * d);
    float *dweights OWNED = floats(T * K);
    CALL(expert_backward(&c, FMOE_OVERWRITE, dx, ddown, dup, dweights));
    CHECK(check_gradient("x", c.x, T * d, dx, expert_loss, &c));
    CHECK(check_gradient("down", c.down, N * d, ddown, expert_loss, &c));
    CHECK(check_gradient("up", c.up, N * d, dup, expert_loss, &c));
    return check_gradient("weights", c.weights, T * K, dweights, expert_loss, &c);
}

SENTENCE(9, 6, "The expert step's four gradients, for any indices and weights of either sign.",
         "two products sampled at the routed pairs, three sums of rows", "finite differences") {
    for_sizes("T d N K", expert_gradient,
              SIZES({1, 1, 1, 1}, {2, 3, 1, 1}, {3, 5, 4, 2}, {2, 4, 3, 3}, {5, 2, 9, 4}, {2, 67, 3, 2}));
}

static const char *untouched_rows(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], N = size[2], K = size[3];
    if (K > N || N < 2)
        return DOES_NOT_APPLY;
    expert_context c EXPERTS = new_experts(seed, T, d, N, K);
    int64_t alone = (int64_t)(seed % (uint64_t)N); /* nobody's choice */
    for (int64_t i = 0; i < T * K; i++)
        if (c.indices[i] == alone)
            c.indices[i] = (int32_t)((alone + 1) % N);
    float *ddown OWNED = normals(seed, 10, 1, N * d), *dup OWNED = normals(seed, 11, 1, N * d);
    float *down_before OWNED = copy_of(ddown, N * d), *up_before OWNED = copy_of(dup, N * d);
    CALL(expert_backward(&c, FMOE_ACCUMULATE, NULL, ddown, dup, NULL));
    if (!same_bits(ddown + alone * d, down_before + alone * d, d) ||
        !same_bits(dup + alone * d, up_before + alone * d, d))
        return because("accumulating, row %d of an expert that nobody chose changed", (int)alone);
    CALL(expert_backward(&c, FMOE_OVERWRITE, NULL, ddown, dup, NULL));
    for (int64_t i = alone * d; i < (alone + 1) * d; i++)
        if (ddown[i] != 0 || dup[i] != 0)
            return because("overwriting, row %d of an expert that nobody chose is not zero", (int)alone);
    return HOLDS;
}

SENTENCE(9, 7, "An expert that no token chose gets a row of zeros, or keeps its row when accumulating.",
         "most experts are idle in a small batch", "closed form, bit by bit") {
    for_sizes("T d N K", untouched_rows, SIZES({1, 1, 2, 1}, {3, 5, 4, 2}, {2, 70, 30, 3}, {40, 3, 9, 5}));
}

static const char *chosen_twice(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], N = size[2];
    if (N < 2)
        return DOES_NOT_APPLY;
    expert_context two EXPERTS = new_experts(seed, T, d, N, 2), one EXPERTS = new_experts(seed, T, d, N, 1);
    for (int64_t t = 0; t < T; t++) {
        two.indices[2 * t] = two.indices[2 * t + 1] = one.indices[t];
        one.weights[t] = two.weights[2 * t] + two.weights[2 * t + 1];
    }
    float *dx OWNED = floats(T * d), *ddown OWNED = floats(N * d), *dup OWNED = floats(N * d),
              *dg OWNED = floats(2 * T);
    float *dx1 OWNED = floats(T * d), *ddown1 OWNED = floats(N * d), *dup1 OWNED = floats(N * d),
               *dg1 OWNED = floats(T);
    CALL(expert_backward(&two, FMOE_OVERWRITE, dx, ddown, dup, dg));
    CALL(expert_backward(&one, FMOE_OVERWRITE, dx1, ddown1, dup1, dg1));
    double worst =
        fmax(fmoe_relative_error(T * d, dx, dx1, (double)T), fmoe_relative_error(N * d, ddown, ddown1, (double)T));
    worst = fmax(worst, fmoe_relative_error(N * d, dup, dup1, (double)T));
    if (!(worst <= 1e-5))
        return because("twice with g and h is not once with g + h: off by %.2e", worst);
    for (int64_t t = 0; t < T; t++)
        if (dg[2 * t] != dg1[t] || dg[2 * t + 1] != dg1[t])
            return because("token %d: both weights should have the gradient %g", (int)t, dg1[t]);
    return HOLDS;
}

SENTENCE(9, 8,
         "A token that chooses an expert twice trains it as if it had chosen it once with the sum of the weights.",
         "every pair counts, not every expert", "the same step with one choice") {
    for_sizes("T d N", chosen_twice, SIZES({1, 1, 2}, {3, 5, 4}, {20, 70, 3}));
}

/* ---- MLP --------------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t T, d, I;
    float *x, *gate, *up, *down, *y, *dy;
} mlp_context;

static double mlp_loss(void *context) {
    mlp_context *c = context;
    fmoe_mlp(c->T, c->d, c->I, c->x, c->gate, c->up, c->down, c->y);
    return weighted_sum(c->T * c->d, c->y, c->dy);
}

static const char *mlp_gradient(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], I = size[2];
    float scale = 1 / sqrtf((float)d);
    float *x OWNED = normals(seed, 0, 1, T * d), *gate OWNED = normals(seed, 1, scale, I * d);
    float *up OWNED = normals(seed, 2, scale, I * d), *down OWNED = normals(seed, 3, 1 / sqrtf((float)I), d * I);
    float *y OWNED = floats(T * d), *dy OWNED = normals(seed, 4, 1, T * d), *dx OWNED = floats(T * d);
    float *dgate OWNED = floats(I * d), *dup OWNED = floats(I * d), *ddown OWNED = floats(d * I);
    mlp_context c = {T, d, I, x, gate, up, down, y, dy};
    CALL(fmoe_mlp_backward(T, d, I, x, gate, up, down, dy, FMOE_OVERWRITE, dx, dgate, dup, ddown));
    CHECK(check_gradient("x", x, T * d, dx, mlp_loss, &c));
    CHECK(check_gradient("gate", gate, I * d, dgate, mlp_loss, &c));
    CHECK(check_gradient("up", up, I * d, dup, mlp_loss, &c));
    return check_gradient("down", down, d * I, ddown, mlp_loss, &c);
}

SENTENCE(9, 9, "The MLP's four gradients.", "six products, each the transpose of a forward one", "finite differences") {
    for_sizes("T d I", mlp_gradient, SIZES({1, 1, 1}, {3, 2, 5}, {2, 5, 3}, {4, 3, 67}, {2, 67, 2}));
}

/* ---- The layer --------------------------------------------------------------------------------------------------- */

enum { NUM_TENSORS = 7 };
static const char *const tensor_names[NUM_TENSORS] = {"x",         "router_gate", "down_embed", "up_embed",
                                                      "gate_proj", "up_proj",     "down_proj"};

typedef struct {
    fmoe_config config;
    bool training;
    int64_t T, n;
    int64_t count[NUM_TENSORS];
    float *tensor[NUM_TENSORS], *mean, *var, *y, *dy;
    int32_t *indices;
} layer_context;

static layer_context new_layer(uint64_t seed, int64_t T, int64_t d, int64_t I, int64_t N, int64_t K, bool training,
                               bool norm) {
    int64_t n = fmoe_num_keys(N);
    float per_d = 1 / sqrtf((float)d), per_I = 1 / sqrtf((float)I);
    layer_context c = {.config = {d, I, N, K, norm}, .training = training, .T = T, .n = n};
    const int64_t count[NUM_TENSORS] = {T * d, 2 * n * d, N * d, N * d, I * d, I * d, d * I};
    const float scale[NUM_TENSORS] = {1, per_d, per_d, norm ? 1 : (float)n, per_d, per_d, per_I};
    memcpy(c.count, count, sizeof count);
    c.tensor[0] = spread_tokens(seed, T, d);
    for (int i = 1; i < NUM_TENSORS; i++)
        c.tensor[i] = normals(seed, 20 + (uint64_t)i, scale[i], count[i]);
    c.mean = normals(seed, 30, 1, d);
    c.var = normals(seed, 31, 1, d);
    for (int64_t i = 0; i < d; i++)
        c.var[i] = 1 + c.var[i] * c.var[i];
    c.y = floats(T * d);
    c.dy = normals(seed, 32, 1, T * d);
    c.indices = any_indices(seed, 33, n * n, T * K);
    return c;
}

static void free_layer(layer_context *c) {
    for (int i = 0; i < NUM_TENSORS; i++)
        free(c->tensor[i]);
    free(c->mean);
    free(c->var);
    free(c->y);
    free(c->dy);
    free(c->indices);
}
#define LAYER FREED(free_layer)

static fmoe_weights layer_weights(const layer_context *c, float *mean, float *var) {
    return (fmoe_weights){c->tensor[1], c->tensor[2], c->tensor[3], c->tensor[4],
                          c->tensor[5], c->tensor[6], mean,         var};
}

static double layer_loss(void *context) {
    layer_context *c = context;
    float *mean OWNED = copy_of(c->mean, c->config.hidden_size), *var OWNED = copy_of(c->var, c->config.hidden_size);
    fmoe_weights weights = layer_weights(c, mean, var);
    fmoe_outputs outputs = {.y = c->y};
    fmoe_layer_forward(&c->config, &weights, c->training, c->T, c->tensor[0], c->indices, &outputs);
    return weighted_sum(c->T * c->config.hidden_size, c->y, c->dy);
}

static fmoe_status layer_backward(const layer_context *c, fmoe_write write, float **to) {
    fmoe_weights weights = layer_weights(c, c->mean, c->var);
    fmoe_gradients gradients = {to[0], to[1], to[2], to[3], to[4], to[5], to[6]};
    return fmoe_layer_backward(&c->config, &weights, c->training, c->T, c->tensor[0], c->indices, c->dy, write,
                               &gradients);
}

static void free_all(float *(*pointers)[NUM_TENSORS]) {
    for (int i = 0; i < NUM_TENSORS; i++)
        free((*pointers)[i]);
}
#define ALL_OWNED FREED(free_all)

static void new_outputs(const layer_context *c, float **to) {
    for (int i = 0; i < NUM_TENSORS; i++)
        to[i] = floats(c->count[i]);
}

/* Gradients that are there already, and a copy of them. */
static void new_sums(const layer_context *c, uint64_t seed, uint64_t stream, float **before, float **sums) {
    for (int i = 0; i < NUM_TENSORS; i++) {
        before[i] = normals(seed, stream + (uint64_t)i, 1, c->count[i]);
        sums[i] = copy_of(before[i], c->count[i]);
    }
}

static const char *layer_gradient(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], N = size[3], K = size[4], n = fmoe_num_keys(N);
    if (K > n * n || (size[5] && T < 2))
        return DOES_NOT_APPLY;
    layer_context c LAYER = new_layer(seed, T, size[1], size[2], N, K, size[5] != 0, size[6] != 0);
    float *to[NUM_TENSORS] ALL_OWNED = {NULL};
    float *mean OWNED = copy_of(c.mean, size[1]), *var OWNED = copy_of(c.var, size[1]);
    new_outputs(&c, to);
    CALL(layer_backward(&c, FMOE_OVERWRITE, to));
    if (!same_bits(mean, c.mean, size[1]) || !same_bits(var, c.var, size[1]))
        return because("the backward pass moved a running buffer");
    for (int i = 0; i < NUM_TENSORS; i++)
        CHECK(check_gradient(tensor_names[i], c.tensor[i], c.count[i], to[i], layer_loss, &c));
    return HOLDS;
}

SENTENCE(9, 10, "The layer's seven gradients, in training and evaluation, with norm_topk_prob and without.",
         "x is reached through the MLP, the experts and the router; the running buffers stay", "finite differences") {
    for_sizes("T d I N K training norm", layer_gradient,
              SIZES({1, 1, 1, 1, 1, 0, 0}, {1, 3, 2, 4, 2, 0, 1}, {2, 4, 3, 4, 3, 1, 0}, {4, 3, 5, 9, 4, 1, 1},
                    {3, 5, 4, 11, 2, 0, 0}, {5, 4, 3, 16, 7, 1, 1}));
}

/* ---- Storing ----------------------------------------------------------------------------------------------------- */

/* before + fresh, rounded once, as accumulating does; fresh is itself rounded, so one unit of it may be missing. */
static const char *check_accumulated(const char *name, int64_t count, const float *before, const float *fresh,
                                     const float *after) {
    for (int64_t i = 0; i < count; i++) {
        double sum = (double)before[i] + fresh[i];
        if (!(fabs(after[i] - sum) <= 1.3e-7 * (fabs(sum) + fabs((double)fresh[i]))))
            return because("%s[%d]: %.9g and %.9g accumulate to %.9g", name, (int)i, before[i], fresh[i], after[i]);
    }
    return HOLDS;
}

static const char *accumulates(const int64_t *size, uint64_t seed) {
    int64_t N = size[3], K = size[4], n = fmoe_num_keys(N);
    if (K > n * n || size[0] < 2)
        return DOES_NOT_APPLY;
    layer_context c LAYER = new_layer(seed, size[0], size[1], size[2], N, K, true, false);
    float *fresh[NUM_TENSORS] ALL_OWNED = {NULL}, *before[NUM_TENSORS] ALL_OWNED = {NULL};
    float *after[NUM_TENSORS] ALL_OWNED = {NULL};
    new_outputs(&c, fresh); /* NaN, which only overwriting gets rid of */
    new_sums(&c, seed, 50, before, after);
    CALL(layer_backward(&c, FMOE_OVERWRITE, fresh));
    CALL(layer_backward(&c, FMOE_ACCUMULATE, after));
    if (!same_bits(fresh[0], after[0], c.count[0]))
        return because("dx was accumulated; it is always overwritten");
    for (int i = 1; i < NUM_TENSORS; i++)
        CHECK(check_accumulated(tensor_names[i], c.count[i], before[i], fresh[i], after[i]));
    return HOLDS;
}

SENTENCE(9, 11, "Accumulating adds to every weight's gradient what overwriting would store; dx is always overwritten.",
         "a large batch is trained on in parts", "the sum, rounded once") {
    for_sizes("T d I N K", accumulates, SIZES({2, 1, 1, 1, 1}, {3, 5, 4, 9, 2}, {7, 66, 70, 20, 5}));
}

static const char *each_optional(const int64_t *size, uint64_t seed) {
    int64_t N = size[3], K = size[4], n = fmoe_num_keys(N);
    if (K > n * n || size[0] < 2)
        return DOES_NOT_APPLY;
    layer_context c LAYER = new_layer(seed, size[0], size[1], size[2], N, K, true, true);
    float *all[NUM_TENSORS] ALL_OWNED = {NULL};
    new_outputs(&c, all);
    CALL(layer_backward(&c, FMOE_OVERWRITE, all));
    for (int i = 0; i < NUM_TENSORS; i++) {
        float *alone OWNED = floats(c.count[i]), *to[NUM_TENSORS] = {NULL};
        to[i] = alone;
        CALL(layer_backward(&c, FMOE_OVERWRITE, to));
        if (!same_bits(alone, all[i], c.count[i]))
            return because("d%s alone differs from d%s among all", tensor_names[i], tensor_names[i]);
    }
    return HOLDS;
}

SENTENCE(9, 12, "A gradient asked for alone has the bits it has among all seven.",
         "each is optional, and none is another's by-product", "all against one") {
    for_sizes("T d I N K", each_optional, SIZES({2, 1, 1, 1, 1}, {5, 7, 6, 10, 3}));
}

static bool all_zero(int64_t count, const float *values) {
    for (int64_t i = 0; i < count; i++)
        if (values[i] != 0)
            return false;
    return true;
}

static const char *no_tokens(const int64_t *size, uint64_t seed) {
    layer_context c LAYER = new_layer(seed, 0, size[0], size[1], size[2], 1, size[3] != 0, true);
    float *zero[NUM_TENSORS] ALL_OWNED = {NULL}, *kept[NUM_TENSORS] ALL_OWNED = {NULL};
    float *before[NUM_TENSORS] ALL_OWNED = {NULL};
    new_outputs(&c, zero);
    new_sums(&c, seed, 60, before, kept);
    CALL(layer_backward(&c, FMOE_OVERWRITE, zero));
    CALL(layer_backward(&c, FMOE_ACCUMULATE, kept));
    for (int i = 1; i < NUM_TENSORS; i++) {
        if (!all_zero(c.count[i], zero[i]))
            return because("d%s is not zero", tensor_names[i]);
        if (!same_bits(kept[i], before[i], c.count[i]))
            return because("d%s changed while accumulating", tensor_names[i]);
    }
    CALL(fmoe_topk_backward(0, 3, 2, false, NULL, NULL, NULL, NULL, NULL));
    CALL(fmoe_log_softmax_backward(0, 3, NULL, NULL, NULL));
    CALL(fmoe_router_norm_backward(true, 0, 3, NULL, NULL, NULL, NULL, NULL));
    return HOLDS;
}

SENTENCE(9, 13, "Without tokens, weight gradients become zero when overwriting and stay when accumulating.",
         "T = 0 is legal, with null pointers for what is empty", "closed form") {
    for_sizes("d I N training", no_tokens, SIZES({1, 1, 1, 0}, {5, 7, 10, 1}, {70, 66, 9, 0}));
}

/* ---- Bits -------------------------------------------------------------------------------------------------------- */

static const char *reference_repeats(const int64_t *size, uint64_t seed) {
    int64_t N = size[3], K = size[4], n = fmoe_num_keys(N);
    if (K > n * n || size[0] < 2)
        return DOES_NOT_APPLY;
    layer_context c LAYER = new_layer(seed, size[0], size[1], size[2], N, K, true, true);
    float *first[NUM_TENSORS] ALL_OWNED = {NULL}, *again[NUM_TENSORS] ALL_OWNED = {NULL};
    new_outputs(&c, first);
    new_outputs(&c, again);
    FOR_THREADS(run) {
        CALL(layer_backward(&c, FMOE_OVERWRITE, run.turn ? again : first));
        for (int i = 0; run.turn && i < NUM_TENSORS; i++)
            if (!same_bits(first[i], again[i], c.count[i]))
                return because("d%s with %d threads differs from one thread's", tensor_names[i], run.threads);
    }
    return HOLDS;
}

SENTENCE(9, 14, "The reference's gradients have the same bits with any number of threads.",
         "a row of a gradient has one owner, and its sum one order", "1, 2, 3 and 7 threads") {
    for_sizes("T d I N K", reference_repeats, SIZES({2, 1, 1, 1, 1}, {33, 70, 20, 30, 5}, {50, 65, 130, 100, 9}));
}

static const char *type_name(int64_t type) {
    return fmoe_dtype_name((fmoe_dtype)type);
}

/* ---- The ladders ------------------------------------------------------------------------------------------------- */

static const char *topk_rungs(const int64_t *size, uint64_t seed) {
    if (size[2] > size[1] * size[1])
        return DOES_NOT_APPLY;
    return rungs_agree(&fmoe_step_topk_backward, topk_ladder, seed, "T%d-n%d-K%d-normal-%s%s", (int)size[0],
                       (int)size[1], (int)size[2], type_name(size[3]), size[4] ? "-norm" : "");
}

SENTENCE(9, 15, "Every rung of topk_backward computes the logits' gradients.",
         "products of two exponentials must be as good as exponentials of sums", "the reference, to 1e-5") {
    for_sizes("T n K type norm", topk_rungs,
              SIZES({0, 3, 2, 0, 0}, {1, 1, 1, 0, 0}, {1, 1, 1, 0, 1}, {3, 5, 1, 0, 1}, {7, 13, 6, 0, 0},
                    {7, 13, 6, 1, 1}, {7, 13, 6, 2, 0}, {29, 17, 289, 0, 1}, {5, 40, 100, 2, 1}, {64, 33, 16, 1, 0}));
}

static const char *const routings[] = {"uniform", "normal", "hot"};

static const char *expert_rungs(const int64_t *size, uint64_t seed) {
    int64_t N = size[2], K = size[3];
    if (K > N || (size[5] == 1 && K > fmoe_num_keys(N) * fmoe_num_keys(N)))
        return DOES_NOT_APPLY;
    return rungs_agree(&fmoe_step_expert_backward, chapter9_expert_rungs, seed, "T%d-d%d-N%d-K%d-%s-%s", (int)size[0],
                       (int)size[1], (int)N, (int)K, routings[size[5]], type_name(size[4]));
}

SENTENCE(9, 16, "Every rung of expert_backward computes the four gradients: odd sizes, idle experts, hot ones.",
         "an expert with 257 pairs is cut in two, one with none must still be zeroed", "the reference") {
    for_sizes("T d N K type routing", expert_rungs,
              SIZES({0, 7, 5, 2, 0, 0}, {1, 4, 9, 9, 0, 0}, {3, 1, 9, 9, 2, 2}, {3, 5, 4, 4, 0, 0},
                    {29, 72, 170, 6, 0, 1}, {29, 72, 170, 6, 1, 1}, {29, 72, 170, 6, 2, 0}, {256, 3, 7, 1, 0, 2},
                    {257, 3, 7, 1, 0, 2}, {257, 17, 7, 2, 2, 2}, {1030, 9, 3, 1, 0, 2}, {40, 16, 600, 3, 0, 0},
                    {600, 33, 2, 2, 1, 0}, {7, 130, 1000, 20, 0, 0}));
}

static const char *mlp_rungs(const int64_t *size, uint64_t seed) {
    return rungs_agree(&fmoe_step_mlp_backward, chapter9_mlp_rungs, seed, "T%d-d%d-I%d-%s", (int)size[0], (int)size[1],
                       (int)size[2], type_name(size[3]));
}

SENTENCE(9, 17, "Every rung of mlp_backward computes the four gradients.",
         "eight products with operands either way round", "the reference") {
    for_sizes("T d I type", mlp_rungs,
              SIZES({0, 5, 7, 0}, {1, 4, 17, 0}, {9, 1, 17, 1}, {3, 7, 5, 2}, {13, 40, 33, 0}, {65, 17, 100, 1},
                    {30, 66, 35, 2}, {100, 3, 50, 0}));
}

static const char *router_rungs(const int64_t *size, uint64_t seed) {
    if (size[4] && size[0] == 1)
        return DOES_NOT_APPLY;
    return rungs_agree(&fmoe_step_router_backward, chapter9_router_rungs, seed, "T%d-d%d-n%d-%s%s", (int)size[0],
                       (int)size[1], (int)size[2], type_name(size[3]), size[4] ? "-train" : "");
}

SENTENCE(9, 47, "Every rung of router_backward computes the gradients of the gate and, through the norm, of x.",
         "two products with the logits' two sides, and a norm that either moves or stands", "the reference") {
    for_sizes("T d n type training", router_rungs,
              SIZES({0, 7, 3, 0, 0}, {0, 7, 3, 0, 1}, {1, 72, 33, 0, 0}, {9, 5, 1, 2, 1}, {29, 72, 13, 0, 1},
                    {65, 7, 13, 1, 1}, {29, 66, 13, 2, 0}, {130, 200, 2, 0, 1}, {300, 33, 40, 0, 0}));
}

static const char *layer_rungs(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], N = size[3], K = size[4], n = fmoe_num_keys(N);
    bool training = size[6] & 1, norm = size[6] & 2;
    if (K > n * n || (training && T == 1))
        return DOES_NOT_APPLY;
    return rungs_agree(&fmoe_step_layer_backward, chapter9_layer_rungs, seed, "T%d-d%d-I%d-N%d-K%d-normal-%s%s%s",
                       (int)T, (int)size[1], (int)size[2], (int)N, (int)K, type_name(size[5]), training ? "-train" : "",
                       norm ? "-norm" : "");
}

SENTENCE(9, 18, "Every rung of layer_forward_backward computes y, the routing, the buffers and seven gradients.",
         "what was kept must be what would be computed again", "the reference, at the rung's own choice") {
    for_sizes("T d I N K type mode", layer_rungs,
              SIZES({0, 5, 4, 9, 2, 0, 0}, {0, 5, 4, 9, 2, 0, 1}, {1, 5, 9, 9, 9, 0, 0}, {9, 6, 3, 1, 1, 0, 2},
                    {2, 3, 5, 4, 2, 0, 1}, {29, 72, 50, 170, 6, 0, 3}, {29, 72, 50, 170, 6, 1, 1},
                    {29, 72, 50, 170, 6, 2, 2}, {40, 65, 33, 100, 100, 0, 1}, {300, 20, 17, 26, 5, 0, 0}));
}

static const char *rungs_same_bits(const int64_t *size, uint64_t seed) {
    int64_t type = size[0];
    CHECK(rungs_repeat(&fmoe_step_router_backward, chapter9_router_rungs, seed, "T133-d70-n13-%s-train",
                       type_name(type)));
    CHECK(rungs_repeat(&fmoe_step_topk_backward, chapter9_topk_rungs, seed, "T33-n13-K9-normal-%s", type_name(type)));
    CHECK(rungs_repeat(&fmoe_step_expert_backward, chapter9_expert_rungs, seed, "T300-d37-N50-K3-hot-%s",
                       type_name(type)));
    CHECK(rungs_repeat(&fmoe_step_mlp_backward, chapter9_mlp_rungs, seed, "T33-d40-I65-%s", type_name(type)));
    return rungs_repeat(&fmoe_step_layer_backward, chapter9_layer_rungs, seed, "T33-d40-I65-N100-K7-normal-%s-train",
                        type_name(type));
}

SENTENCE(9, 19, "Every rung of the five ladders writes the same bits with any number of threads.",
         "copies are as many as they are, not as there are threads; runs are cut at 256 pairs, not at a thread's share",
         "1, 2, 3 and 7 threads") {
    for_sizes("type", rungs_same_bits, SIZES({0}, {1}, {2}));
}

/* ---- Bad input --------------------------------------------------------------------------------------------------- */

SENTENCE(9, 20, "Every backward function refuses what its forward function refuses, and names it.",
         "a status and a message, never a crash, and nothing written", "the contract") {
    float a[64] = {0}, out[64];
    int32_t indices[8] = {0, 1, 2, 3, 0, 1, 2, 9};
    for (int i = 0; i < 64; i++)
        out[i] = 7;
    refused(fmoe_router_norm_backward(true, 1, 2, a, a, a, a, out), FMOE_BATCH_OF_ONE, "tokens = 1");
    refused(fmoe_router_norm_backward(false, 2, 2, a, NULL, a, a, out), FMOE_NULL_POINTER, "running_mean");
    refused(fmoe_router_norm_backward(true, 2, 2, a, a, a, a, NULL), FMOE_NULL_POINTER, "dx");
    refused(fmoe_router_logits_backward(2, 0, 2, a, a, a, FMOE_OVERWRITE, out, out), FMOE_BAD_SIZE, "hidden_size = 0");
    refused(fmoe_router_logits_backward(2, 2, 2, a, a, NULL, FMOE_OVERWRITE, out, out), FMOE_NULL_POINTER, "dlogits");
    refused(fmoe_log_softmax_backward(2, -1, a, a, out), FMOE_BAD_SIZE, "num_keys = -1");
    refused(fmoe_log_softmax_backward(2, 2, a, NULL, out), FMOE_NULL_POINTER, "dlog_probs");
    refused(fmoe_topk_backward(1, 2, 5, false, a, indices, a, a, out), FMOE_BAD_TOPK, "5 exceeds n² = 4");
    refused(fmoe_topk_backward(2, 3, 4, false, a, indices, a, a, out), FMOE_BAD_INDEX, "indices[1, 3] = 9");
    refused(fmoe_topk_backward(1, 2, 2, false, a, NULL, a, a, out), FMOE_NULL_POINTER, "indices");
    refused(fmoe_expert_backward(2, 2, 9, 4, a, a, a, indices, a, a, FMOE_OVERWRITE, out, out, out, out),
            FMOE_BAD_INDEX, "[0, num_experts = 9)");
    refused(fmoe_expert_backward(1, 2, 9, 4, a, a, a, indices, a, NULL, FMOE_OVERWRITE, out, out, out, out),
            FMOE_NULL_POINTER, "dy");
    refused(fmoe_expert_backward(1, 2, 3, 4, a, a, a, indices, a, a, FMOE_OVERWRITE, out, out, out, out), FMOE_BAD_TOPK,
            "4 exceeds num_experts = 3");
    refused(
        fmoe_expert_backward(INT64_C(1) << 31, 1, 2, 2, a, a, a, indices, a, a, FMOE_OVERWRITE, NULL, NULL, NULL, NULL),
        FMOE_OVERFLOW, "tokens × num_experts_per_tok");
    refused(fmoe_mlp_backward(INT64_MAX / 2, 2, 2, a, a, a, a, a, FMOE_OVERWRITE, out, out, out, out), FMOE_OVERFLOW,
            "tokens × hidden_size");
    refused(fmoe_mlp_backward(1, 2, 0, a, a, a, a, a, FMOE_OVERWRITE, out, out, out, out), FMOE_BAD_SIZE,
            "intermediate_size = 0");
    refused(fmoe_mlp_backward(1, 2, 2, a, a, a, a, NULL, FMOE_OVERWRITE, out, out, out, out), FMOE_NULL_POINTER, "dy");

    fmoe_config config = {2, 2, 4, 2, false};
    fmoe_weights weights = {a, a, a, a, a, a, a, a};
    fmoe_gradients gradients = {out, out, out, out, out, out, out};
    refused(fmoe_layer_backward(&config, &weights, false, 4, a, indices, a, FMOE_OVERWRITE, &gradients), FMOE_BAD_INDEX,
            "indices[3, 1] = 9");
    refused(fmoe_layer_backward(&config, &weights, false, 1, a, indices, a, FMOE_OVERWRITE, NULL), FMOE_NULL_POINTER,
            "gradients");
    refused(fmoe_layer_backward(&config, &weights, true, 1, a, indices, a, FMOE_OVERWRITE, &gradients),
            FMOE_BATCH_OF_ONE, "tokens = 1");
    weights.up_proj = NULL;
    refused(fmoe_layer_backward(&config, &weights, false, 1, a, indices, a, FMOE_OVERWRITE, &gradients),
            FMOE_NULL_POINTER, "up_proj.weight");
    for (int i = 0; i < 64; i++)
        expect(out[i] == 7, "a refused call wrote to an output");
}

/* ---- On the GPU: top-k ------------------------------------------------------------------------------------------- */

/* To the type's limit of the gradient and of the terms that it is a sum of, in case they cancel. */
static const char *gradient_close(const char *name, fmoe_dtype dtype, int64_t count, const void *out, const float *ref,
                                  double terms) {
    float *values OWNED = floats(count);
    fmoe_to_f32(dtype, count, out, values);
    double off = 0, norm = terms * terms;
    for (int64_t i = 0; i < count; i++) {
        off += ((double)values[i] - ref[i]) * ((double)values[i] - ref[i]);
        norm += (double)ref[i] * ref[i];
    }
    double error = norm > 0 ? sqrt(off / norm) : sqrt(off);
    return error <= fmoe_error_limit(dtype) ? HOLDS : because("%s: error %.2g", name, error);
}

CUDA_SENTENCE(9, 21,
              "Every GPU rung of topk_backward computes the logits' gradients, for n up to 1,024 and K to 4,096.",
              "fixed point and registers must be as good as floating point in order", "the reference, to 1e-5") {
    topk_ladder = cuda_topk_backward_rungs;
    for_sizes("T n K type norm", topk_rungs,
              SIZES({0, 3, 2, 0, 0}, {1, 1, 1, 0, 0}, {1, 1, 1, 0, 1}, {3, 5, 1, 0, 1}, {7, 13, 6, 0, 0},
                    {7, 13, 6, 1, 1}, {7, 13, 6, 2, 0}, {29, 17, 289, 0, 1}, {5, 40, 100, 2, 1}, {64, 33, 16, 1, 0},
                    {33, 128, 64, 0, 0}, {1001, 128, 64, 2, 1}, {5, 256, 32, 1, 1}, {3, 320, 512, 0, 0},
                    {2, 1024, 4096, 0, 1}, {2, 1023, 4095, 2, 0}, {3, 64, 4096, 0, 0}, {40000, 8, 2, 0, 1}));
    for_random_sizes("T n K type norm", topk_rungs, 200, (int64_t[]){1, 1, 1, 0, 0}, (int64_t[]){40, 200, 300, 2, 1});
}

/* Against the reference where the sum over the chosen pairs is what is hard: repeated indices, gradients of very
 * different size, and either of the two left out. */
static const char *uneven_gradients(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2], norm = size[3], given = size[4];
    if (K > n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = normals(seed, 0, 2, 2 * T * n);
    float *dweights OWNED = normals(seed, 1, 1, T * K), *dscores OWNED = normals(seed, 2, 1, T * K);
    for (int64_t i = 0; i < T * K; i++) {
        float scale = ldexpf(1, (int)(i / K * 7 % 60) - 30); /* a token's own */
        dweights[i] *= scale;
        dscores[i] *= scale;
    }
    int32_t *indices OWNED = any_indices(seed, 3, n * n, T * K);
    float *out OWNED = floats(2 * T * n), *ref OWNED = floats(2 * T * n);
    const float *dw = given & 1 ? dweights : NULL, *ds = given & 2 ? dscores : NULL;
    CALL(gpu_topk_backward(T, n, K, norm, logits, indices, dw, ds, out));
    CALL(fmoe_topk_backward(T, n, K, norm, logits, indices, dw, ds, ref));
    for (int64_t t = 0; t < T; t++) { /* each token by itself, so that none hides behind a larger one */
        double off = 0, gradients = 0;
        for (int64_t i = 0; i < 2 * n; i++) {
            int64_t at = (i / n * T + t) * n + i % n;
            off += ((double)out[at] - ref[at]) * ((double)out[at] - ref[at]);
        }
        for (int64_t k = t * K; k < (t + 1) * K; k++)
            gradients += (dw ? (double)dw[k] * dw[k] : 0) + (ds ? (double)ds[k] * ds[k] : 0);
        if (!(sqrt(off) <= 2e-6 * sqrt((double)K * gradients)))
            return because("token %d is off by %g, from gradients of %g", (int)t, sqrt(off), sqrt(gradients));
    }
    return HOLDS;
}

CUDA_SENTENCE(
    9, 22, "fmoe_cuda_topk_backward passes on the gradients of weights and scores, for any indices; each is optional.",
    "indices may repeat, and a token's gradients may all be 2^30 times another's",
    "finite differences of the forward pass, and the reference token by token") {
    topk_backward = gpu_topk_backward;
    for_sizes("T n K norm given", topk_gradient,
              SIZES({1, 1, 1, 0, 1}, {1, 1, 1, 1, 1}, {2, 3, 4, 0, 1}, {2, 3, 4, 1, 1}, {2, 3, 9, 0, 2},
                    {2, 3, 9, 1, 3}, {3, 5, 2, 0, 3}, {3, 5, 7, 1, 3}, {1, 7, 20, 1, 1}, {2, 4, 3, 1, 0},
                    {2, 33, 40, 1, 3}));
    for_sizes("T n K norm given", uneven_gradients,
              SIZES({64, 13, 6, 0, 1}, {64, 128, 64, 1, 3}, {9, 320, 512, 0, 2}, {7, 5, 25, 1, 0}, {61, 40, 9, 0, 3},
                    {3, 200, 4000, 1, 3}));
}

/* Every rung in its turn, then the public function. Without dscores, which the rungs do not take. */
static fmoe_status backward_by(const fmoe_rung *rung, int64_t T, int64_t n, int64_t K, bool norm, const float *logits,
                               const int32_t *indices, const float *dweights, float *dlogits) {
    if (!rung->run)
        return gpu_topk_backward(T, n, K, norm, logits, indices, dweights, NULL, dlogits);
    fmoe_topk_backward_args args = {T, n, K, norm, FMOE_F32, logits, indices, dweights, dlogits};
    const tensor tensors[] = {TENSOR(fmoe_topk_backward_args, logits, FMOE_F32, ROLE_INPUT, 2 * T * n),
                              TENSOR(fmoe_topk_backward_args, indices, FMOE_I32, ROLE_INPUT, T * K),
                              TENSOR(fmoe_topk_backward_args, dweights, FMOE_F32, ROLE_INPUT, T * K),
                              TENSOR(fmoe_topk_backward_args, dlogits, FMOE_F32, ROLE_OUTPUT, 2 * T * n)};
    return run_on_device(rung->run, rung->workspace ? rung->workspace(&args) : 0, &args, sizeof args, tensors, 4);
}

static const char *name_of(const fmoe_rung *rung) {
    return rung->run ? rung->name : "fmoe_cuda_topk_backward";
}

static const char *backward_alone(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2], norm = size[3], kind = size[4], count = 2 * T * n;
    if (K > n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = normals(seed, 0, 1, count), *dweights OWNED = normals(seed, 1, 1, T * K);
    int32_t *indices OWNED = any_indices(seed, 2, n * n, T * K);
    int64_t bad = (int64_t)(seed % (uint64_t)T), side = (int64_t)(seed / 11 % 2);
    float *slot = kind == 2 ? dweights + bad * K : logits + (side * T + bad) * n + (int64_t)(seed / 23 % (uint64_t)n);
    float *sound OWNED = floats(count), *broken OWNED = floats(count);
    for (const fmoe_rung *rung = cuda_topk_backward_rungs;; rung++) {
        float before = *slot;
        CALL(backward_by(rung, T, n, K, norm, logits, indices, dweights, sound));
        *slot = kind == 1 ? INFINITY : NAN;
        fmoe_status status = backward_by(rung, T, n, K, norm, logits, indices, dweights, broken);
        *slot = before;
        CALL(status);
        bool shows = false;
        for (int64_t i = 0; i < count; i++) {
            int64_t t = i / n % T;
            shows |= t == bad && isnan(broken[i]);
            if (t != bad && !(fabsf(broken[i] - sound[i]) <= 1e-6f))
                return because("%s: token %d changed", name_of(rung), (int)t);
        }
        if (!shows)
            return because("%s: token %d has no NaN", name_of(rung), (int)bad);
        if (!rung->run)
            return HOLDS;
    }
}

CUDA_SENTENCE(9, 23,
              "A NaN or +∞ logit, or a NaN gradient, makes its own token's gradients NaN and touches no other's.",
              "integers know no NaN, so fixed point needs a way around", "the same batch without it") {
    for_sizes("T n K norm kind", backward_alone,
              SIZES({1, 1, 1, 0, 0}, {9, 13, 6, 0, 0}, {9, 13, 6, 1, 1}, {9, 13, 6, 0, 2}, {33, 128, 64, 1, 0},
                    {33, 128, 64, 0, 1}, {33, 128, 64, 1, 2}, {3, 320, 512, 0, 0}, {3, 320, 512, 1, 2}));
    for_random_sizes("T n K norm kind", backward_alone, 60, (int64_t[]){1, 2, 1, 0, 0}, (int64_t[]){19, 60, 70, 1, 2});
}

/* The gradients of every token's legal pairs alone, by the reference, and the norm of the terms that they sum. */
static fmoe_status without_bad_pairs(int64_t T, int64_t n, int64_t K, bool norm, const float *logits,
                                     const int32_t *indices, const float *dweights, float *dlogits, double *terms) {
    float *two OWNED = floats(2 * n), *gradient OWNED = floats(2 * n);
    float *dw OWNED = floats(K), *weights OWNED = floats(K);
    int32_t *legal OWNED = integers(K);
    double squares = 0;
    for (int64_t t = 0; t < T; t++) {
        int64_t count = 0;
        for (int64_t k = t * K; k < (t + 1) * K; k++)
            if (indices[k] >= 0 && indices[k] < n * n) {
                dw[count] = dweights[k];
                legal[count++] = indices[k];
            }
        memcpy(two, logits + t * n, (size_t)n * sizeof *two);
        memcpy(two + n, logits + (T + t) * n, (size_t)n * sizeof *two);
        memset(gradient, 0, 2 * (size_t)n * sizeof *gradient);
        fmoe_status status = FMOE_OK;
        if (count > 0)
            status = fmoe_topk_backward(1, n, count, norm, two, legal, dw, NULL, gradient);
        if (count > 0 && status == FMOE_OK)
            status = fmoe_topk_at(1, n, count, norm, two, legal, NULL, weights);
        if (status != FMOE_OK)
            return status;
        for (int64_t k = 0; k < count; k++)
            squares += (double)weights[k] * weights[k] * dw[k] * dw[k];
        memcpy(dlogits + t * n, gradient, (size_t)n * sizeof *two);
        memcpy(dlogits + (T + t) * n, gradient + n, (size_t)n * sizeof *two);
    }
    *terms = sqrt(2 * squares);
    return FMOE_OK;
}

static const char *bad_indices(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2], norm = size[3], bad = size[4];
    if (K < 1 || K > n * n || bad > T * K)
        return DOES_NOT_APPLY;
    float *logits OWNED = normals(seed, 0, 1, 2 * T * n), *dweights OWNED = normals(seed, 1, 1, T * K);
    int32_t *indices OWNED = any_indices(seed, 2, n * n, T * K);
    const int32_t wrong[] = {-1, (int32_t)(n * n), INT32_MIN, INT32_MAX};
    int64_t first = T * K;
    for (int64_t i = 0; i < bad; i++) {
        int64_t at = (int64_t)(fmoe_random_bits(seed, 3, (uint64_t)i) % (uint64_t)(T * K));
        indices[at] = wrong[fmoe_random_bits(seed, 4, (uint64_t)i) % 4];
        first = at < first ? at : first;
    }
    float *out OWNED = floats(2 * T * n), *ref OWNED = floats(2 * T * n);
    double terms = 0;
    CALL(without_bad_pairs(T, n, K, norm, logits, indices, dweights, ref, &terms));
    for (const fmoe_rung *rung = cuda_topk_backward_rungs;; rung++) {
        fmoe_status status = backward_by(rung, T, n, K, norm, logits, indices, dweights, out);
        bool public = !rung->run;
        if (status != (public && bad ? FMOE_BAD_INDEX : FMOE_OK))
            return because("%s: %s, %s", name_of(rung), fmoe_status_name(status), fmoe_error_message());
        char place[64];
        snprintf(place, sizeof place, "indices[%d, %d] = %d is outside [0, n² = %d)", (int)(first / K),
                 (int)(first % K), bad ? indices[first] : 0, (int)(n * n));
        if (public && bad && strcmp(fmoe_error_message(), place) != 0)
            return because("the note says \"%s\" and should say \"%s\"", fmoe_error_message(), place);
        CHECK(gradient_close(name_of(rung), FMOE_F32, 2 * T * n, out, ref, terms));
        if (public)
            return HOLDS;
    }
}

CUDA_SENTENCE(
    9, 24, "A bad index is skipped, never followed, and fmoe_cuda_check names the first; without one it says nothing.",
    "what only the device can see is told later, and no other pair pays for it",
    "the reference on the legal pairs alone") {
    for_sizes("T n K norm bad", bad_indices,
              SIZES({1, 1, 1, 0, 0}, {1, 3, 4, 0, 1}, {5, 13, 6, 1, 3}, {5, 13, 6, 0, 9}, {33, 128, 64, 1, 0},
                    {33, 128, 64, 0, 1}, {33, 128, 64, 1, 40}, {2, 320, 512, 0, 5}, {1000, 20, 7, 0, 2},
                    {3, 4, 5, 1, 15}));
    for_random_sizes("T n K norm bad", bad_indices, 60, (int64_t[]){1, 1, 1, 0, 0}, (int64_t[]){40, 60, 200, 1, 9});
}

CUDA_SENTENCE(9, 25,
              "Every GPU rung of topk_backward but the one with atomic additions writes the same bits in every run.",
              "integers add up alike in any order; floats need one", "three runs") {
    static const char *const cases[] = {"T33-n13-K9-normal-f32", "T2001-n128-K64-normal-f32-norm",
                                        "T1000-n40-K100-normal-bf16", "T30-n320-K512-normal-f16"};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *wrong =
            rungs_repeat(&fmoe_step_topk_backward, cuda_topk_backward_rungs, fresh_seed(), "%s", cases[i]);
        expect(wrong == HOLDS, "%s", wrong);
    }
}

CUDA_SENTENCE(9, 26,
              "A backward call depends on its arguments alone: captured in a graph and replayed, or beside another.",
              "what a call notes lies in its workspace, which nobody cleared for it",
              "the reference on data that the capture has not seen; two streams that start together") {
    static const char *const cases[] = {"T129-n13-K6-normal-f32", "T1000-n128-K64-normal-bf16-norm",
                                        "T20-n320-K512-normal-f32"};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *wrong = rungs_replay(&fmoe_step_topk_backward, cuda_topk_backward_rungs, fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
        wrong = rungs_side_by_side(&fmoe_step_topk_backward, cuda_topk_backward_rungs, fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
    }
}

/* ---- On the GPU: router ------------------------------------------------------------------------------------------ */

/* The public function at random data, and what the reference makes of the stored values. */
typedef struct {
    gpu_router_backward_args args;
    float *x, *gate, *mean, *var, *dlogits; /* the stored values */
    float *dx, *dgate, *dx_hat;             /* the reference's */
} router_gradients;

static void free_router_gradients(router_gradients *g) {
    float *all[] = {g->x, g->gate, g->mean, g->var, g->dlogits, g->dx, g->dgate, g->dx_hat};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        free(all[i]);
    void *given[] = {(void *)g->args.x, (void *)g->args.gate, g->args.dx, g->args.dgate};
    for (size_t i = 0; i < sizeof given / sizeof given[0]; i++)
        free(given[i]);
}

static router_gradients draw_router(uint64_t seed, int64_t T, int64_t d, int64_t n, fmoe_dtype dtype, bool training) {
    router_gradients g = {.args = {.training = training, .T = T, .d = d, .n = n, .dtype = dtype}};
    float *x OWNED = normals(seed, 0, 1, T * d), *gate OWNED = normals(seed, 1, 1 / sqrt((double)d), 2 * n * d);
    for (int64_t i = 0; i < T * d; i++)
        x[i] += (float)(i % d % 7) - 3;
    g.args.x = stored(dtype, x, T * d);
    g.args.gate = stored(dtype, gate, 2 * n * d);
    g.x = rounded_to(dtype, x, T * d);
    g.gate = rounded_to(dtype, gate, 2 * n * d);
    g.mean = normals(seed, 2, 1, d);
    g.var = normals(seed, 3, 1, d);
    for (int64_t h = 0; h < d; h++)
        g.var[h] = 0.5f + g.var[h] * g.var[h];
    g.args.running_mean = training ? NULL : g.mean;
    g.args.running_var = training ? NULL : g.var;
    g.args.dlogits = g.dlogits = normals(seed, 4, 1, 2 * T * n);
    g.dx = floats(T * d);
    g.dgate = zeros(2 * n * d, sizeof(float));
    g.dx_hat = floats(T * d);
    return g;
}

/* dgate is added to what it holds. */
static fmoe_status refer(router_gradients *g, int64_t T, int64_t d, int64_t n) {
    bool training = g->args.training;
    float *mean OWNED = copy_of(g->mean, d), *var OWNED = copy_of(g->var, d), *x_hat OWNED = floats(T * d);
    fmoe_status status = fmoe_router_norm(training, T, d, g->x, mean, var, x_hat);
    if (status == FMOE_OK)
        status = fmoe_router_logits_backward(T, d, n, x_hat, g->gate, g->dlogits, FMOE_ACCUMULATE, g->dx_hat, g->dgate);
    if (status == FMOE_OK)
        status = fmoe_router_norm_backward(training, T, d, g->x, g->mean, g->var, g->dx_hat, g->dx);
    return status;
}

static const char *router_backward(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], n = size[2];
    fmoe_dtype dtype = (fmoe_dtype)size[3], gradient_dtype = size[5] & 1 ? dtype : FMOE_F32;
    bool training = size[4], accumulate = size[5] & 2;
    if (training && T == 1)
        return DOES_NOT_APPLY;
    router_gradients g FREED(free_router_gradients) = draw_router(seed, T, d, n, dtype, training);
    g.args.gradient_dtype = gradient_dtype;
    g.args.write = accumulate ? FMOE_ACCUMULATE : FMOE_OVERWRITE;
    float *before OWNED = normals(seed, 5, 3, 2 * n * d),
                  *rounded OWNED = rounded_to(gradient_dtype, before, 2 * n * d);
    g.args.dx = poisoned(T * d, fmoe_dtype_size(gradient_dtype));
    g.args.dgate = stored(gradient_dtype, before, 2 * n * d);
    if (accumulate)
        memcpy(g.dgate, rounded, (size_t)(2 * n * d) * sizeof *rounded);
    CALL(gpu_router_backward(&g.args));
    CALL(refer(&g, T, d, n));
    /* Two tokens have x̂ of ±1: what comes through the statistics cancels all but eps. And a few numbers may all be near
     * zero by chance. They are measured by their terms. */
    double dx_terms = 0, dgate_terms = 0;
    for (int64_t i = 0; (T == 2 || T * d < 32) && i < T * d; i++)
        dx_terms += (double)g.dx_hat[i] * g.dx_hat[i];
    for (int64_t i = 0; n * d < 16 && i < 2 * T * n; i++)
        dgate_terms += (double)g.dlogits[i] * g.dlogits[i];
    CHECK(gradient_close("dx", gradient_dtype, T * d, g.args.dx, g.dx, sqrt(dx_terms)));
    CHECK(gradient_close("dgate", gradient_dtype, 2 * n * d, g.args.dgate, g.dgate, sqrt(dgate_terms)));
    /* Each alone has the bits that it has with the other. */
    float *narrow_dx OWNED = g.args.dx, *narrow_dgate OWNED = g.args.dgate;
    g.args.dx = poisoned(T * d, fmoe_dtype_size(gradient_dtype));
    g.args.dgate = NULL;
    CALL(gpu_router_backward(&g.args));
    if (memcmp(g.args.dx, narrow_dx, (size_t)(T * d) * fmoe_dtype_size(gradient_dtype)) != 0)
        return because("dx alone has other bits");
    free(g.args.dx);
    g.args.dx = NULL;
    g.args.dgate = stored(gradient_dtype, before, 2 * n * d);
    CALL(gpu_router_backward(&g.args));
    if (memcmp(g.args.dgate, narrow_dgate, (size_t)(2 * n * d) * fmoe_dtype_size(gradient_dtype)) != 0)
        return because("dgate alone has other bits, or a second run has");
    return HOLDS;
}

CUDA_SENTENCE(
    9, 27, "fmoe_cuda_router_backward: dx and dgate for any sizes and types, overwritten or added to, in either mode.",
    "a sum over tokens that is cut in slices must be joined in order, and rounded once",
    "the reference; each gradient alone, and again, bit by bit") {
    for_sizes("T d n type training how", router_backward,
              SIZES({1, 1, 1, 0, 0, 0}, {2, 1, 1, 0, 1, 0}, {3, 7, 13, 1, 0, 1}, {65, 7, 13, 2, 1, 2},
                    {29, 72, 13, 0, 1, 0}, {29, 72, 13, 2, 0, 3}, {130, 200, 1, 1, 1, 1}, {520, 33, 20, 0, 0, 2},
                    {257, 64, 128, 2, 1, 1}, {193, 16, 320, 1, 1, 3}, {1000, 130, 65, 0, 1, 0}, {2051, 24, 33, 2, 1, 0},
                    {300, 136, 40, 1, 1, 0}, {513, 264, 70, 1, 0, 2}, {1000, 72, 128, 2, 0, 2}, {640, 520, 9, 2, 1, 3},
                    {70, 136, 513, 0, 0, 0}));
    for_random_sizes("T d n type training how", router_backward, 100, (int64_t[]){1, 1, 1, 0, 0, 0},
                     (int64_t[]){200, 150, 100, 2, 1, 3});
}

/* The loss of norm and projection together. */
static double router_loss(void *context) {
    router_context *c = context;
    float *mean OWNED = copy_of(c->mean, c->d), *var OWNED = copy_of(c->var, c->d), *x_hat OWNED = floats(c->T * c->d);
    fmoe_router_norm(c->training, c->T, c->d, c->x, mean, var, x_hat);
    fmoe_router_logits(c->T, c->d, c->n, x_hat, c->gate, c->out);
    return weighted_sum(2 * c->T * c->n, c->out, c->dout);
}

static const char *router_differences(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], n = size[2], training = size[3];
    if (training && T < 2)
        return DOES_NOT_APPLY;
    float *x OWNED = spread_tokens(seed, T, d), *gate OWNED = normals(seed, 4, 1, 2 * n * d);
    float *mean OWNED = normals(seed, 2, 1, d), *var OWNED = normals(seed, 3, 1, d), *out OWNED = floats(2 * T * n);
    float *dout OWNED = normals(seed, 1, 1, 2 * T * n), *dx OWNED = floats(T * d), *dgate OWNED = floats(2 * n * d);
    for (int64_t i = 0; i < d; i++)
        var[i] = 0.5f + var[i] * var[i];
    gpu_router_backward_args args = {.training = training,
                                     .T = T,
                                     .d = d,
                                     .n = n,
                                     .x = x,
                                     .gate = gate,
                                     .running_mean = mean,
                                     .running_var = var,
                                     .dlogits = dout,
                                     .dx = dx,
                                     .dgate = dgate};
    CALL(gpu_router_backward(&args));
    router_context c = {training, T, d, n, x, mean, var, gate, out, dout};
    CHECK(check_gradient("x", x, T * d, dx, router_loss, &c));
    return check_gradient("gate", gate, 2 * n * d, dgate, router_loss, &c);
}

static const char *no_router_tokens(const int64_t *size, uint64_t seed) {
    int64_t d = size[0], n = size[1], training = size[2];
    float *gate OWNED = normals(seed, 0, 1, 2 * n * d), *mean OWNED = filled(0, d), *var OWNED = filled(1, d);
    float *dgate OWNED = normals(seed, 1, 1, 2 * n * d), *before OWNED = copy_of(dgate, 2 * n * d);
    gpu_router_backward_args args = {.training = training,
                                     .d = d,
                                     .n = n,
                                     .gate = gate,
                                     .running_mean = mean,
                                     .running_var = var,
                                     .dgate = dgate,
                                     .write = FMOE_ACCUMULATE};
    CALL(gpu_router_backward(&args));
    if (!same_bits(dgate, before, 2 * n * d))
        return because("accumulating, dgate changed");
    args.write = FMOE_OVERWRITE;
    CALL(gpu_router_backward(&args));
    for (int64_t i = 0; i < 2 * n * d; i++)
        if (dgate[i] != 0)
            return because("overwriting, dgate[%d] is %g", (int)i, dgate[i]);
    return HOLDS;
}

CUDA_SENTENCE(9, 28, "The GPU's gradients of norm and projection are slopes; without tokens dgate is zeroed, or kept.",
              "a check that does not share the reference's derivation", "finite differences; closed form") {
    for_sizes("T d n training", router_differences,
              SIZES({2, 1, 1, 1}, {3, 5, 2, 1}, {9, 3, 4, 1}, {4, 34, 3, 1}, {1, 1, 1, 0}, {1, 5, 2, 0}, {7, 3, 5, 0},
                    {2, 34, 3, 0}));
    for_sizes("d n training", no_router_tokens, SIZES({1, 1, 0}, {72, 13, 1}, {130, 65, 0}));
}

static const char *log_softmax_close(const int64_t *size, uint64_t seed) {
    int64_t rows = size[0], n = size[1], count = rows * n;
    float *z OWNED = normals(seed, 0, 4, count), *dlog_p OWNED = normals(seed, 1, 1, count);
    float *out OWNED = floats(count), *ref OWNED = floats(count);
    CALL(gpu_log_softmax_backward(rows, n, z, dlog_p, out));
    CALL(fmoe_log_softmax_backward(rows, n, z, dlog_p, ref));
    double error = fmoe_relative_error(count, out, ref, sqrt((double)count));
    return error <= fmoe_error_limit(FMOE_F32) ? HOLDS : because("error %.2g", error);
}

CUDA_SENTENCE(9, 29, "The GPU's log-softmax sends back dz = dlog p − p · Σ dlog p, which sums to zero over a row.",
              "a constant added to a row changes no probability", "finite differences, the sum, and the reference") {
    log_softmax_backward = gpu_log_softmax_backward;
    for_sizes("rows n", log_softmax_gradient, SIZES({1, 1}, {1, 2}, {3, 5}, {2, 40}));
    for_sizes("rows n", log_softmax_close,
              SIZES({0, 3}, {1, 1}, {5, 31}, {5, 32}, {5, 33}, {9, 128}, {7, 1024}, {2, 3000}, {5000, 4}));
}

CUDA_HOST_SENTENCE(9, 30,
                   "Every backward function of the GPU names bad arguments and its limits before it launches anything.",
                   "a status and a message, never a crash", "the contract") {
    float m[16] = {0};
    int32_t indices[8] = {0};
    const size_t plenty = (size_t)1 << 40;
#define TOPK(T, n, K, dtype, logits, indices, dlogits, workspace, bytes)                                               \
    fmoe_cuda_topk_backward(T, n, K, false, dtype, logits, indices, m, m, dlogits, workspace, bytes, NULL)
    refused(TOPK(-1, 4, 2, FMOE_F32, m, indices, m, m, plenty), FMOE_BAD_SIZE, "tokens = -1");
    refused(TOPK(2, 0, 2, FMOE_F32, m, indices, m, m, plenty), FMOE_BAD_SIZE, "num_keys = 0");
    refused(TOPK(1, 2, 5, FMOE_F32, m, indices, m, m, plenty), FMOE_BAD_TOPK, "5 exceeds n² = 4");
    refused(TOPK(2, 1025, 2, FMOE_F32, m, indices, m, m, plenty), FMOE_UNSUPPORTED, "num_keys = 1025");
    refused(TOPK(2, 128, 4097, FMOE_F32, m, indices, m, m, plenty), FMOE_UNSUPPORTED, "num_experts_per_tok = 4097");
    refused(TOPK(INT64_MAX / 8, 4, 2, FMOE_F32, m, indices, m, m, plenty), FMOE_OVERFLOW, "tokens");
    refused(TOPK(2, 4, 2, FMOE_I32, m, indices, m, m, plenty), FMOE_UNSUPPORTED, "dtype = 3");
    refused(TOPK(2, 4, 2, FMOE_F32, NULL, indices, m, m, plenty), FMOE_NULL_POINTER, "router_logits");
    refused(TOPK(2, 4, 2, FMOE_F32, m, NULL, m, m, plenty), FMOE_NULL_POINTER, "indices");
    refused(TOPK(2, 4, 2, FMOE_F32, m, indices, NULL, m, plenty), FMOE_NULL_POINTER, "dlogits");
    size_t needed = fmoe_cuda_topk_backward_workspace(2, 4, 2, FMOE_F32);
    expect(needed >= 256, "there is no room for a note in %zu bytes", needed);
    refused(TOPK(2, 4, 2, FMOE_F32, m, indices, m, m, needed - 1), FMOE_BAD_WORKSPACE, "workspace_bytes");
    refused(TOPK(2, 4, 2, FMOE_F32, m, indices, m, NULL, needed), FMOE_NULL_POINTER, "workspace");
#undef TOPK
#define ROUTER(training, T, d, n, dtype, x, gate, mean, dlogits, gradients, dx, workspace, bytes)                      \
    fmoe_cuda_router_backward(training, T, d, n, dtype, x, gate, mean, m, dlogits, FMOE_OVERWRITE, gradients, dx, m,   \
                              workspace, bytes, NULL)
    void *x = m;
    refused(ROUTER(false, -1, 2, 2, FMOE_F32, x, x, m, m, FMOE_F32, m, m, plenty), FMOE_BAD_SIZE, "tokens = -1");
    refused(ROUTER(false, 2, 0, 2, FMOE_F32, x, x, m, m, FMOE_F32, m, m, plenty), FMOE_BAD_SIZE, "hidden_size = 0");
    refused(ROUTER(false, 2, 2, 0, FMOE_F32, x, x, m, m, FMOE_F32, m, m, plenty), FMOE_BAD_SIZE, "num_keys = 0");
    refused(ROUTER(true, 1, 2, 2, FMOE_F32, x, x, m, m, FMOE_F32, m, m, plenty), FMOE_BATCH_OF_ONE, "tokens = 1");
    refused(ROUTER(false, 2, 2, 2, FMOE_I32, x, x, m, m, FMOE_F32, m, m, plenty), FMOE_UNSUPPORTED, "dtype = 3");
    refused(ROUTER(false, 2, 2, 2, FMOE_F16, x, x, m, m, FMOE_BF16, m, m, plenty), FMOE_UNSUPPORTED, "gradient_dtype");
    refused(ROUTER(false, 2, 2, 2, FMOE_F32, NULL, x, m, m, FMOE_F32, m, m, plenty), FMOE_NULL_POINTER, "x");
    refused(ROUTER(false, 2, 2, 2, FMOE_F32, x, NULL, m, m, FMOE_F32, m, m, plenty), FMOE_NULL_POINTER, "router_gate");
    refused(ROUTER(false, 2, 2, 2, FMOE_F32, x, x, NULL, m, FMOE_F32, m, m, plenty), FMOE_NULL_POINTER, "running_mean");
    refused(ROUTER(false, 2, 2, 2, FMOE_F32, x, x, m, NULL, FMOE_F32, m, m, plenty), FMOE_NULL_POINTER, "dlogits");
    needed = fmoe_cuda_router_backward_workspace(true, 2, 2, 2, FMOE_F32);
    expect(needed > 0, "training needs no workspace");
    refused(ROUTER(true, 2, 2, 2, FMOE_F32, x, x, m, m, FMOE_F32, m, m, needed - 1), FMOE_BAD_WORKSPACE,
            "workspace_bytes");
#undef ROUTER
    refused(fmoe_cuda_log_softmax_backward(2, -1, m, m, m, NULL), FMOE_BAD_SIZE, "num_keys = -1");
    refused(fmoe_cuda_log_softmax_backward(-2, 2, m, m, m, NULL), FMOE_BAD_SIZE, "rows = -2");
    refused(fmoe_cuda_log_softmax_backward(2, 2, m, NULL, m, NULL), FMOE_NULL_POINTER, "dlog_probs");
    refused(fmoe_cuda_check(NULL, NULL), FMOE_NULL_POINTER, "workspace");
}
