/* Chapters 1 and 5: the expert step, token by token and along a schedule, and both ladders. */
#include "cuda_values.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One expert step: sizes, inputs, all in memory of their own. */
typedef struct {
    int64_t T, d, N, K;
    float *x, *down, *up, *weights;
    int32_t *indices;
    int32_t *offsets, *pairs; /* its schedule, where asked for */
} expert;

/* Any indices, repeated ones included, and weights of both signs. */
static expert new_expert(uint64_t seed, int64_t T, int64_t d, int64_t N, int64_t K) {
    expert m = {.T = T, .d = d, .N = N, .K = K};
    m.x = normals(seed, 1, 1, T * d);
    m.down = normals(seed, 2, 1 / sqrt((double)d), N * d);
    m.up = normals(seed, 3, 1, N * d);
    m.weights = normals(seed, 4, 1, T * K);
    m.indices = any_indices(seed, 5, N, T * K);
    return m;
}

static void free_expert(expert *m) {
    free(m->x);
    free(m->down);
    free(m->up);
    free(m->weights);
    free(m->indices);
    free(m->offsets);
    free(m->pairs);
}
#define EXPERT FREED(free_expert)

/* "T d N K" to a step. */
static expert expert_of(const int64_t *size, uint64_t seed) {
    return new_expert(seed, size[0], size[1], size[2], size[3]);
}

/* The reference on outputs full of NaN. pre_activations may be NULL. */
static float *run(const expert *m, float *pre_activations) {
    float *y = floats(m->T * m->d);
    fmoe_status status =
        fmoe_expert(m->T, m->d, m->N, m->K, m->x, m->down, m->up, m->indices, m->weights, y, pre_activations);
    cr_assert(status == FMOE_OK, "%s", fmoe_error_message());
    return y;
}

static void add_schedule(expert *m) {
    m->offsets = integers(m->N + 1);
    m->pairs = integers(m->T * m->K);
    fmoe_status status = fmoe_schedule(m->T, m->K, m->N, m->indices, m->offsets, m->pairs);
    cr_assert(status == FMOE_OK, "%s", fmoe_error_message());
}

static fmoe_status try_scheduled(const expert *m, float *y, float *pre_activations) {
    return fmoe_expert_scheduled(m->T, m->d, m->N, m->K, m->x, m->down, m->up, m->indices, m->weights, m->offsets,
                                 m->pairs, y, pre_activations);
}

static float *run_scheduled(const expert *m, float *pre_activations) {
    float *y = floats(m->T * m->d);
    fmoe_status status = try_scheduled(m, y, pre_activations);
    cr_assert(status == FMOE_OK, "%s", fmoe_error_message());
    return y;
}

/* What the terms of y would add up to if they were orthogonal: sums may cancel, their rounding errors do not. */
static double scale_of(const expert *m) {
    double sum = 0;
    for (int64_t i = 0; i < m->T * m->K; i++) {
        double s = 0, norm = 0;
        for (int64_t c = 0; c < m->d; c++) {
            double up = m->up[m->indices[i] * m->d + c];
            s += (double)m->x[i / m->K * m->d + c] * m->down[m->indices[i] * m->d + c];
            norm += up * up;
        }
        sum += pow(s / (1 + exp(-s)) * m->weights[i], 2) * norm;
    }
    return sqrt(sum);
}

/* HOLDS if ‖y − expected‖ is rounding only: float32's limit, measured against the terms summed. */
static const char *close_to(const expert *m, const float *y, const float *expected) {
    double sum = 0, scale = scale_of(m);
    for (int64_t i = 0; i < m->T * m->d; i++)
        sum += pow((double)y[i] - expected[i], 2);
    if (sqrt(sum) <= 1e-6 * scale) /* false for NaN */
        return HOLDS;
    return because("y is off by %.3g of its terms' norm %.3g", sqrt(sum) / scale, scale);
}

static const char *same_as(const expert *m, const float *y, const float *expected) {
    for (int64_t i = 0; i < m->T * m->d; i++)
        if (!same_bits(&y[i], &expected[i], 1))
            return because("token %lld, column %lld: %.9g and %.9g", (long long)(i / m->d), (long long)(i % m->d),
                           (double)y[i], (double)expected[i]);
    return HOLDS;
}

/* ==== Chapter 1 =================================================================================================== */

/* ---- The definition ---------------------------------------------------------------------------------------------- */

/* Y = (silu(X · downᵀ) ⊙ M) · up with M [T, N] holding the routing weights, zero where a token does not go. */
static float *masked_dense(const expert *m) {
    float *y = floats(m->T * m->d);
    long double *mask OWNED = poisoned(m->N, sizeof *mask), *sum OWNED = poisoned(m->d, sizeof *sum);
    for (int64_t t = 0; t < m->T; t++) {
        memset(mask, 0, (size_t)m->N * sizeof *mask);
        memset(sum, 0, (size_t)m->d * sizeof *sum);
        for (int64_t k = 0; k < m->K; k++)
            mask[m->indices[t * m->K + k]] += m->weights[t * m->K + k];
        for (int64_t e = 0; e < m->N; e++) {
            long double s = 0;
            for (int64_t c = 0; c < m->d; c++)
                s += (long double)m->x[t * m->d + c] * m->down[e * m->d + c];
            for (int64_t c = 0; c < m->d; c++)
                sum[c] += s / (1 + expl(-s)) * mask[e] * m->up[e * m->d + c];
        }
        for (int64_t c = 0; c < m->d; c++)
            y[t * m->d + c] = (float)sum[c];
    }
    return y;
}

static const char *equals_masked_dense(const int64_t *size, uint64_t seed) {
    if (size[3] > size[2])
        return DOES_NOT_APPLY;
    expert m EXPERT = expert_of(size, seed);
    float *y OWNED = run(&m, NULL), *expected OWNED = masked_dense(&m);
    return close_to(&m, y, expected);
}

SENTENCE(1, 1, "The expert step is a dense layer of N neurons under a mask of routing weights.",
         "the definition, with nothing left out: any sizes, indices and signs of the weights",
         "all T·N products in long double") {
    for_sizes("T d N K", equals_masked_dense,
              SIZES({1, 1, 1, 1}, {5, 1, 7, 3}, {3, 7, 4, 4}, {29, 72, 50, 6}, {7, 64, 65, 64}, {2, 130, 9, 5},
                    {3, 1024, 31, 8}));
    for_random_sizes("T d N K", equals_masked_dense, 20, (int64_t[]){1, 1, 1, 1}, (int64_t[]){20, 140, 60, 40});
}

static const char *returns_pre_activations(const int64_t *size, uint64_t seed) {
    if (size[3] > size[2])
        return DOES_NOT_APPLY;
    expert m EXPERT = expert_of(size, seed);
    float *s OWNED = floats(m.T * m.K);
    float *y OWNED = run(&m, s), *without OWNED = run(&m, NULL);
    CHECK(same_as(&m, y, without));
    for (int64_t i = 0; i < m.T * m.K; i++) {
        long double sum = 0, scale = 0;
        for (int64_t c = 0; c < m.d; c++) {
            long double term = (long double)m.x[i / m.K * m.d + c] * m.down[m.indices[i] * m.d + c];
            sum += term;
            scale += fabsl(term);
        }
        if (!(fabsl(s[i] - sum) <= 1e-7L * scale + 1e-40L))
            return because("pair %lld: %.9g, ⟨x, down⟩ is %.9Lg", (long long)i, (double)s[i], sum);
    }
    return HOLDS;
}

SENTENCE(1, 2, "The pre-activations returned are ⟨x, down⟩, and asking for them changes nothing.",
         "the backward pass is built on them", "dot products in long double; the run without them") {
    for_sizes("T d N K", returns_pre_activations, SIZES({1, 1, 1, 1}, {6, 5, 7, 3}, {11, 72, 40, 9}, {3, 257, 5, 5}));
}

/* ---- What follows from it ---------------------------------------------------------------------------------------- */

static const char *one_hot_is_one_expert(const int64_t *size, uint64_t seed) {
    if (size[3] > size[2])
        return DOES_NOT_APPLY;
    expert m EXPERT = expert_of(size, seed);
    float *s OWNED = floats(m.T * m.K), *expected OWNED = floats(m.T * m.d);
    memset(m.weights, 0, (size_t)(m.T * m.K) * sizeof *m.weights);
    for (int64_t t = 0; t < m.T; t++)
        m.weights[t * m.K + (int64_t)(fresh_seed() % (uint64_t)m.K)] = 1;
    float *y OWNED = run(&m, s);
    for (int64_t i = 0; i < m.T * m.K; i++)
        if (m.weights[i] == 1)
            for (int64_t c = 0; c < m.d; c++)
                expected[i / m.K * m.d + c] =
                    (float)((double)s[i] / (1 + exp(-(double)s[i]))) * m.up[m.indices[i] * m.d + c];
    return close_to(&m, y, expected);
}

SENTENCE(1, 3, "A weight of one among zeros leaves silu(s) times that expert's up row.",
         "one expert is one neuron: a number times a row", "closed form") {
    for_sizes("T d N K", one_hot_is_one_expert, SIZES({1, 1, 1, 1}, {5, 3, 6, 4}, {9, 70, 33, 8}, {4, 16, 12, 12}));
}

static const char *linear_in_weights(const int64_t *size, uint64_t seed) {
    if (size[3] > size[2])
        return DOES_NOT_APPLY;
    expert m EXPERT = expert_of(size, seed);
    float *second OWNED = normals(seed, 6, 1, m.T * m.K), *both OWNED = floats(m.T * m.K);
    for (int64_t i = 0; i < m.T * m.K; i++)
        both[i] = m.weights[i] - 3 * second[i];
    expert with_second = m, with_both = m;
    with_second.weights = second;
    with_both.weights = both;
    float *y_first OWNED = run(&m, NULL), *y_second OWNED = run(&with_second, NULL), *y OWNED = run(&with_both, NULL);
    for (int64_t i = 0; i < m.T * m.d; i++)
        y_first[i] -= 3 * y_second[i];
    return close_to(&with_both, y, y_first);
}

SENTENCE(1, 4, "The output is linear in the routing weights, negative ones too.",
         "a weight multiplies after silu, never before it", "f(g − 3h) = f(g) − 3·f(h)") {
    for_sizes("T d N K", linear_in_weights, SIZES({1, 1, 1, 1}, {5, 3, 6, 4}, {9, 70, 33, 8}, {4, 16, 12, 12}));
}

static const char *any_order_of_experts(const int64_t *size, uint64_t seed) {
    if (size[3] > size[2])
        return DOES_NOT_APPLY;
    expert m EXPERT = expert_of(size, seed);
    float *y OWNED = run(&m, NULL);
    for (int64_t t = 0; t < m.T; t++) /* turned around */
        for (int64_t k = 0; k < m.K / 2; k++) {
            int64_t i = t * m.K + k, j = t * m.K + m.K - 1 - k;
            int32_t index = m.indices[i];
            float weight = m.weights[i];
            m.indices[i] = m.indices[j], m.indices[j] = index;
            m.weights[i] = m.weights[j], m.weights[j] = weight;
        }
    float *turned OWNED = run(&m, NULL);
    return close_to(&m, turned, y);
}

SENTENCE(1, 5, "The order of a token's experts changes nothing but rounding.", "y is a sum over a set",
         "the same experts listed backwards") {
    for_sizes("T d N K", any_order_of_experts, SIZES({1, 1, 2, 2}, {5, 3, 6, 4}, {9, 70, 33, 8}, {4, 16, 12, 12}));
}

static const char *repeated_is_summed(const int64_t *size, uint64_t seed) {
    if (size[3] > size[2] || size[3] < 2)
        return DOES_NOT_APPLY;
    expert m EXPERT = expert_of(size, seed);
    for (int64_t t = 0; t < m.T; t++)
        m.indices[t * m.K + m.K - 1] = m.indices[t * m.K];
    float *twice OWNED = run(&m, NULL);
    for (int64_t t = 0; t < m.T; t++) {
        m.weights[t * m.K] += m.weights[t * m.K + m.K - 1];
        m.weights[t * m.K + m.K - 1] = 0;
    }
    float *once OWNED = run(&m, NULL);
    /* The terms of the run with two, so that a sum of weights that cancels does not make the limit zero. */
    float *expected OWNED = masked_dense(&m);
    double scale = scale_of(&m) + 1e-3;
    for (int64_t i = 0; i < m.T * m.d; i++) {
        double moved = fabs((double)twice[i] - once[i]), off = fabs((double)once[i] - expected[i]);
        if (!(moved <= 1e-5 * scale && off <= 1e-5 * scale)) /* so written, NaN fails too */
            return because("y moves by %.3g and is off by %.3g, its scale is %.3g", moved, off, scale);
    }
    return HOLDS;
}

SENTENCE(1, 6, "An expert named twice counts as once with the sum of both weights.",
         "the stand-alone operator takes any indices, repeated ones included",
         "weights merged by hand; all T·N products in long double") {
    for_sizes("T d N K", repeated_is_summed, SIZES({1, 1, 2, 2}, {5, 3, 6, 4}, {9, 70, 33, 8}, {4, 16, 12, 12}));
}

static const char *zero_weights_give_zero(const int64_t *size, uint64_t seed) {
    if (size[3] > size[2])
        return DOES_NOT_APPLY;
    expert m EXPERT = expert_of(size, seed);
    int64_t silent = (int64_t)(fresh_seed() % (uint64_t)m.T);
    memset(m.weights + silent * m.K, 0, (size_t)m.K * sizeof *m.weights);
    float *y OWNED = run(&m, NULL);
    for (int64_t c = 0; c < m.d; c++)
        if (y[silent * m.d + c] != 0)
            return because("token %lld, column %lld is %.9g", (long long)silent, (long long)c,
                           (double)y[silent * m.d + c]);
    return HOLDS;
}

SENTENCE(1, 7, "A token whose weights are all zero gets zeros, exactly.", "nothing else is added to the sum", "zero") {
    for_sizes("T d N K", zero_weights_give_zero, SIZES({1, 1, 1, 1}, {5, 3, 6, 4}, {9, 70, 33, 8}, {4, 16, 12, 12}));
}

static const char *tokens_are_alone(const int64_t *size, uint64_t seed) {
    if (size[3] > size[2])
        return DOES_NOT_APPLY;
    expert m EXPERT = expert_of(size, seed);
    float *y OWNED = run(&m, NULL);
    int64_t bad = (int64_t)(fresh_seed() % (uint64_t)m.T);
    for (int64_t c = 0; c < m.d; c++)
        m.x[bad * m.d + c] = NAN;
    float *after OWNED = run(&m, NULL);
    for (int64_t i = 0; i < m.T * m.d; i++) {
        bool fine = i / m.d == bad ? isnan(after[i]) : same_bits(&after[i], &y[i], 1);
        if (!fine)
            return because("token %lld is NaN and token %lld goes from %.9g to %.9g", (long long)bad,
                           (long long)(i / m.d), (double)y[i], (double)after[i]);
    }
    return HOLDS;
}

SENTENCE(1, 8, "A token of NaNs becomes NaN and touches no other token.", "tokens share experts, not results",
         "the run without it, bit for bit") {
    for_sizes("T d N K", tokens_are_alone, SIZES({2, 1, 1, 1}, {5, 3, 6, 4}, {9, 70, 33, 8}, {65, 16, 12, 12}));
}

/* The same bits for any number of threads: token by token, or along the schedule where there is one. */
static const char *same_with_any_threads(const expert *m) {
    float *one OWNED = floats(m->T * m->d);
    FOR_THREADS(turn) {
        float *y OWNED = m->pairs ? run_scheduled(m, NULL) : run(m, NULL);
        if (turn.turn == 0)
            memcpy(one, y, (size_t)(m->T * m->d) * sizeof *one);
        CHECK(same_as(m, y, one));
    }
    return HOLDS;
}

static const char *reference_repeats(const int64_t *size, uint64_t seed) {
    if (size[3] > size[2])
        return DOES_NOT_APPLY;
    expert m EXPERT = expert_of(size, seed);
    return same_with_any_threads(&m);
}

SENTENCE(1, 9, "The reference gives the same bits with 1, 2, 3 and 7 threads, and again.",
         "every output has one owner and one order of its sum", "the run with one thread") {
    for_sizes("T d N K", reference_repeats,
              SIZES({1, 1, 1, 1}, {5, 3, 6, 4}, {200, 72, 33, 8}, {301, 64, 100, 16}, {64, 257, 12, 12}));
}

/* ---- Bad input --------------------------------------------------------------------------------------------------- */

SENTENCE(1, 10, "Bad input is refused with a status, and a message that names argument, value and limit.",
         "library functions never exit, abort or print", "a table of bad calls") {
    expert m EXPERT = new_expert(fresh_seed(), 3, 4, 5, 2);
    float y[12], *x = m.x, *down = m.down, *up = m.up, *g = m.weights;
    int32_t *e = m.indices;
    refused(fmoe_expert(-1, 4, 5, 2, x, down, up, e, g, y, NULL), FMOE_BAD_SIZE, "-1");
    refused(fmoe_expert(3, 0, 5, 2, x, down, up, e, g, y, NULL), FMOE_BAD_SIZE, "hidden_size = 0");
    refused(fmoe_expert(3, 4, 0, 2, x, down, up, e, g, y, NULL), FMOE_BAD_SIZE, "num_experts = 0");
    refused(fmoe_expert(3, 4, 5, 0, x, down, up, e, g, y, NULL), FMOE_BAD_TOPK, "num_experts_per_tok = 0");
    refused(fmoe_expert(3, 4, 5, 6, x, down, up, e, g, y, NULL), FMOE_BAD_TOPK, "num_experts_per_tok = 6");
    refused(fmoe_expert(INT64_MAX / 2, 4, 5, 2, x, down, up, e, g, y, NULL), FMOE_OVERFLOW, "4611686018427387903");
    refused(fmoe_expert(3, 4, 5, 2, NULL, down, up, e, g, y, NULL), FMOE_NULL_POINTER, "x is");
    refused(fmoe_expert(3, 4, 5, 2, x, NULL, up, e, g, y, NULL), FMOE_NULL_POINTER, "down_embed");
    refused(fmoe_expert(3, 4, 5, 2, x, down, NULL, e, g, y, NULL), FMOE_NULL_POINTER, "up_embed");
    refused(fmoe_expert(3, 4, 5, 2, x, down, up, NULL, g, y, NULL), FMOE_NULL_POINTER, "indices");
    refused(fmoe_expert(3, 4, 5, 2, x, down, up, e, NULL, y, NULL), FMOE_NULL_POINTER, "weights");
    refused(fmoe_expert(3, 4, 5, 2, x, down, up, e, g, NULL, NULL), FMOE_NULL_POINTER, "y is");
    m.indices[5] = 5;
    refused(fmoe_expert(3, 4, 5, 2, x, down, up, e, g, y, NULL), FMOE_BAD_INDEX, "5");
    m.indices[5] = -7;
    refused(fmoe_expert(3, 4, 5, 2, x, down, up, e, g, y, NULL), FMOE_BAD_INDEX, "-7");
}

SENTENCE(1, 11, "No tokens are legal: nothing is read, nothing is written.", "the last batch may be empty",
         "guard values, and NULL for what is empty") {
    float table[6] = {1, 2, 3, 4, 5, 6}, y[2] = {7, 8};
    expect(fmoe_expert(0, 2, 3, 1, NULL, table, table, NULL, NULL, NULL, NULL) == FMOE_OK, "%s", fmoe_error_message());
    expect(fmoe_expert(0, 2, 3, 1, table, table, table, NULL, NULL, y, y + 1) == FMOE_OK, "%s", fmoe_error_message());
    expect(y[0] == 7 && y[1] == 8, "an output of no elements was written to");
}

/* ---- The ladder -------------------------------------------------------------------------------------------------- */

static const char *const dtypes[] = {"f32", "f16", "bf16"};

/* T, d, N, K and which storage type; N is a square where the routing is the router's. */
static const char *ladder_agrees(const fmoe_rung *rungs, const int64_t *size, const char *routing, uint64_t seed) {
    if (size[3] > size[2] || size[4] > 2)
        return DOES_NOT_APPLY;
    return rungs_agree(&fmoe_step_expert, rungs, seed, "T%d-d%d-N%d-K%d-%s-%s", (int)size[0], (int)size[1],
                       (int)size[2], (int)size[3], routing, dtypes[size[4]]);
}

static const char *ladder_repeats(const fmoe_rung *rungs, const int64_t *size, const char *routing, uint64_t seed) {
    if (size[3] > size[2] || size[4] > 2)
        return DOES_NOT_APPLY;
    return rungs_repeat(&fmoe_step_expert, rungs, seed, "T%d-d%d-N%d-K%d-%s-%s", (int)size[0], (int)size[1],
                        (int)size[2], (int)size[3], routing, dtypes[size[4]]);
}

/* d 1, 7, 72, 1024; K = N; T odd, 0 and larger than a thread's share; experts most of which are empty. */
#define LADDER_SIZES                                                                                                   \
    SIZES({0, 3, 2, 1, 0}, {1, 1, 1, 1, 0}, {5, 1, 9, 7, 1}, {3, 7, 4, 4, 2}, {29, 72, 50, 9, 0}, {29, 72, 50, 9, 1},  \
          {29, 72, 50, 9, 2}, {7, 1024, 33, 16, 0}, {7, 1024, 33, 17, 1}, {101, 64, 16, 16, 2}, {301, 33, 7, 3, 0},    \
          {3, 130, 4096, 5, 0}, {3, 200, 600, 520, 1})

static const char *agrees1_uniform(const int64_t *size, uint64_t seed) {
    return ladder_agrees(chapter1_rungs, size, "uniform", seed);
}

static const char *agrees1_hot(const int64_t *size, uint64_t seed) {
    return ladder_agrees(chapter1_rungs, size, "hot", seed);
}

static const char *agrees1_normal(const int64_t *size, uint64_t seed) {
    return ladder_agrees(chapter1_rungs, size, "normal", seed);
}

static const char *agrees1_trained(const int64_t *size, uint64_t seed) {
    return ladder_agrees(chapter1_rungs, size, "trained", seed);
}

#define ROUTER_SIZES  SIZES({1, 1, 1, 1, 0}, {9, 7, 16, 16, 0}, {31, 40, 169, 12, 1}, {31, 40, 169, 9, 2})
#define TRAINED_SIZES SIZES({1, 1, 16384, 1, 0}, {17, 12, 16384, 64, 0}, {17, 8, 16384, 65, 2})

SENTENCE(1, 12, "Every rung of chapter 1 computes the reference's output, for any sizes, routing and storage type.",
         "a fast wrong answer is worth nothing",
         "fmoe_expert; NaN in outputs and workspace before, guard bands after") {
    for_sizes("T d N K dtype", agrees1_uniform, LADDER_SIZES);
    for_sizes("T d N K dtype", agrees1_hot, SIZES({13, 20, 40, 1, 0}, {13, 72, 40, 9, 1}, {40, 9, 3, 3, 2}));
    for_sizes("T d N K dtype", agrees1_normal, ROUTER_SIZES);
    for_sizes("T d N K dtype", agrees1_trained, TRAINED_SIZES);
}

static const char *repeats1(const int64_t *size, uint64_t seed) {
    return ladder_repeats(chapter1_rungs, size, "uniform", seed);
}

#define REPEAT_SIZES                                                                                                   \
    SIZES({1, 1, 1, 1, 0}, {29, 72, 50, 9, 0}, {29, 71, 50, 17, 1}, {29, 72, 50, 9, 2}, {131, 130, 64, 33, 0},         \
          {301, 33, 7, 3, 0})

SENTENCE(1, 13, "Every rung of chapter 1 writes the same bits with 1, 2, 3 and 7 threads, and again.",
         "a token belongs to one thread, and its sum has one order", "the run with one thread") {
    for_sizes("T d N K dtype", repeats1, REPEAT_SIZES);
}

/* "T d N K" to a problem with uniform routing. */
static fmoe_problem problem_of(const int64_t *size, const char *dtype, uint64_t seed) {
    return new_problem(&fmoe_step_expert, seed, "T%d-d%d-N%d-K%d-uniform-%s", (int)size[0], (int)size[1], (int)size[2],
                       (int)size[3], dtype);
}
#define PROBLEM FREED(fmoe_problem_free)

/* The workspace that the best rung asks for, over its inputs and outputs. */
static const char *stays_small(fmoe_workspace_fn *workspace, const int64_t *size, uint64_t seed) {
    if (size[3] > size[2] || size[4] > 2)
        return DOES_NOT_APPLY;
    fmoe_problem p PROBLEM = problem_of(size, dtypes[size[4]], seed);
    double given = 0, asked = (double)workspace(p.args);
    for (int i = 0; i < p.num_arguments; i++)
        given += (double)p.arguments[i].count * (double)fmoe_dtype_size(p.arguments[i].dtype);
    return asked < given ? HOLDS : because("%.0f bytes of workspace beside %.0f of inputs and outputs", asked, given);
}

static const char *small1(const int64_t *size, uint64_t seed) {
    return stays_small(cpu_expert_token_best_workspace, size, seed);
}

#define MEMORY_SIZES                                                                                                   \
    SIZES({1024, 16, 1024, 16, 0}, {1024, 16, 1024, 16, 2}, {256, 64, 4096, 64, 1}, {64, 256, 512, 8, 0})

SENTENCE(1, 14, "Chapter 1's best rung needs less memory than its inputs and outputs.",
         "a row is used where it lies, never copied for later", "the sum of the tensors' sizes") {
    for_sizes("T d N K dtype", small1, MEMORY_SIZES);
}

/* ==== Chapter 5 =================================================================================================== */

/* Which experts are asked for: 0 any, 1 every token also asks for expert 0, 2 all ask for the last one alone. */
static void skew(expert *m, int64_t how) {
    for (int64_t t = 0; t < m->T && how == 1; t++)
        m->indices[t * m->K] = 0;
    for (int64_t i = 0; i < m->T * m->K && how == 2; i++)
        m->indices[i] = (int32_t)m->N - 1;
}

/* "T d N K skew" to a step with its schedule. */
static expert scheduled_of(const int64_t *size, uint64_t seed) {
    expert m = expert_of(size, seed);
    skew(&m, size[4]);
    add_schedule(&m);
    return m;
}

static const char *scheduled_is_the_same(const int64_t *size, uint64_t seed) {
    if (size[3] > size[2] || size[4] > 2)
        return DOES_NOT_APPLY;
    expert m EXPERT = scheduled_of(size, seed);
    float *y OWNED = run_scheduled(&m, NULL), *expected OWNED = run(&m, NULL);
    return same_as(&m, y, expected);
}

#define SCHEDULED_SIZES                                                                                                \
    SIZES({1, 1, 1, 1, 0}, {5, 1, 9, 7, 0}, {3, 7, 4, 4, 0}, {29, 72, 50, 6, 0}, {29, 72, 50, 6, 1},                   \
          {29, 72, 50, 6, 2}, {131, 33, 7, 3, 1}, {3, 257, 100, 64, 2})

SENTENCE(5, 1, "Along the schedule the output has the same bits as token by token.",
         "activations go back to token order, and the second phase is one and the same",
         "fmoe_expert, bit for bit; any indices, a hot expert, all experts empty but one") {
    for_sizes("T d N K skew", scheduled_is_the_same, SCHEDULED_SIZES);
}

static const char *pre_activations_return(const int64_t *size, uint64_t seed) {
    if (size[3] > size[2] || size[4] > 2)
        return DOES_NOT_APPLY;
    expert m EXPERT = scheduled_of(size, seed);
    float *s OWNED = floats(m.T * m.K), *expected OWNED = floats(m.T * m.K);
    float *y OWNED = run_scheduled(&m, s), *y_expected OWNED = run(&m, expected);
    CHECK(same_as(&m, y, y_expected));
    for (int64_t i = 0; i < m.T * m.K; i++)
        if (!same_bits(&s[i], &expected[i], 1))
            return because("pair %lld has %.9g, token by token it has %.9g", (long long)i, (double)s[i],
                           (double)expected[i]);
    return HOLDS;
}

SENTENCE(5, 2, "Its pre-activations lie in token order, whatever order they were computed in.",
         "who reads them later knows pairs, not positions", "fmoe_expert's, bit for bit") {
    for_sizes("T d N K skew", pre_activations_return, SCHEDULED_SIZES);
}

static const char *scheduled_repeats(const int64_t *size, uint64_t seed) {
    if (size[3] > size[2] || size[4] > 2)
        return DOES_NOT_APPLY;
    expert m EXPERT = scheduled_of(size, seed);
    return same_with_any_threads(&m);
}

SENTENCE(5, 3, "The scheduled reference gives the same bits with 1, 2, 3 and 7 threads, and again.",
         "no thread adds to what another adds to", "the run with one thread") {
    for_sizes("T d N K skew", scheduled_repeats,
              SIZES({1, 1, 1, 1, 0}, {200, 72, 33, 8, 0}, {301, 64, 100, 16, 1}, {64, 257, 12, 12, 2}));
}

SENTENCE(5, 4, "A schedule that does not belong to the indices is refused, and so is every other bad input.",
         "a wrong schedule would read beyond arrays or leave pairs out", "a table of bad calls") {
    expert m EXPERT = new_expert(fresh_seed(), 3, 4, 5, 2);
    for (int32_t i = 0; i < 6; i++)
        m.indices[i] = i % 3 + 1; /* experts 1, 2, 3, 1, 2, 3 */
    add_schedule(&m);             /* offsets 0 0 2 4 6 6, pairs 0 3 1 4 2 5 */
    float y[12];
    expect(try_scheduled(&m, y, NULL) == FMOE_OK, "%s", fmoe_error_message());

    expert bad = m;
    bad.pairs = (int32_t[]){0, 3, 1, 4, 5, 2};
    refused(try_scheduled(&bad, y, NULL), FMOE_BAD_INDEX, "pairs[5] = 2");
    bad.pairs = (int32_t[]){1, 3, 0, 4, 2, 5};
    refused(try_scheduled(&bad, y, NULL), FMOE_BAD_INDEX, "pairs[0] = 1");
    bad.pairs = (int32_t[]){0, 3, 1, 1, 2, 5};
    refused(try_scheduled(&bad, y, NULL), FMOE_BAD_INDEX, "pairs[3] = 1");
    bad.pairs = (int32_t[]){0, 3, 1, 4, 2, 6};
    refused(try_scheduled(&bad, y, NULL), FMOE_BAD_INDEX, "pairs[5] = 6");
    bad.pairs = (int32_t[]){-1, 3, 1, 4, 2, 5};
    refused(try_scheduled(&bad, y, NULL), FMOE_BAD_INDEX, "pairs[0] = -1");
    bad.pairs = m.pairs;
    bad.offsets = (int32_t[]){0, 0, 2, 4, 6, 5};
    refused(try_scheduled(&bad, y, NULL), FMOE_BAD_INDEX, "5");
    bad.offsets = (int32_t[]){0, 0, 4, 2, 6, 6};
    refused(try_scheduled(&bad, y, NULL), FMOE_BAD_INDEX, "offsets[2] = 4");
    bad.offsets = (int32_t[]){1, 0, 2, 4, 6, 6};
    refused(try_scheduled(&bad, y, NULL), FMOE_BAD_INDEX, "from 1");
    bad.offsets = NULL;
    refused(try_scheduled(&bad, y, NULL), FMOE_NULL_POINTER, "offsets");
    bad = m;
    bad.pairs = NULL;
    refused(try_scheduled(&bad, y, NULL), FMOE_NULL_POINTER, "pairs");
    bad = m;
    bad.K = 6;
    refused(try_scheduled(&bad, y, NULL), FMOE_BAD_TOPK, "num_experts_per_tok = 6");
    bad = m;
    bad.down = NULL;
    refused(try_scheduled(&bad, y, NULL), FMOE_NULL_POINTER, "down_embed");
    refused(try_scheduled(&m, NULL, NULL), FMOE_NULL_POINTER, "y is");
    m.indices[0] = 5;
    refused(try_scheduled(&m, y, NULL), FMOE_BAD_INDEX, "5");
}

SENTENCE(5, 5, "A schedule of no tokens is legal and writes nothing.", "the last batch may be empty",
         "guard values, and NULL for what is empty") {
    float table[6] = {1, 2, 3, 4, 5, 6}, y[2] = {7, 8};
    int32_t offsets[4] = {0};
    expert m = {.T = 0, .d = 2, .N = 3, .K = 1, .down = table, .up = table, .offsets = offsets};
    expect(try_scheduled(&m, NULL, NULL) == FMOE_OK, "%s", fmoe_error_message());
    expect(try_scheduled(&m, y, y + 1) == FMOE_OK, "%s", fmoe_error_message());
    expect(y[0] == 7 && y[1] == 8, "an output of no elements was written to");
}

/* ---- The ladder -------------------------------------------------------------------------------------------------- */

static const char *agrees5_uniform(const int64_t *size, uint64_t seed) {
    return ladder_agrees(chapter5_rungs, size, "uniform", seed);
}

static const char *agrees5_hot(const int64_t *size, uint64_t seed) {
    return ladder_agrees(chapter5_rungs, size, "hot", seed);
}

static const char *agrees5_normal(const int64_t *size, uint64_t seed) {
    return ladder_agrees(chapter5_rungs, size, "normal", seed);
}

static const char *agrees5_trained(const int64_t *size, uint64_t seed) {
    return ladder_agrees(chapter5_rungs, size, "trained", seed);
}

SENTENCE(5, 6, "Every rung of chapter 5 computes the reference's output, for any sizes, routing and storage type.",
         "a fast wrong answer is worth nothing",
         "fmoe_expert; NaN in outputs and workspace before, guard bands after") {
    for_sizes("T d N K dtype", agrees5_uniform, LADDER_SIZES);
    for_sizes("T d N K dtype", agrees5_hot, /* K = 1: all experts empty but one; 700 pairs: more than a chunk */
              SIZES({13, 20, 40, 1, 0}, {700, 8, 40, 1, 0}, {13, 72, 40, 9, 1}, {40, 9, 3, 3, 2}));
    for_sizes("T d N K dtype", agrees5_normal, ROUTER_SIZES);
    for_sizes("T d N K dtype", agrees5_trained, TRAINED_SIZES);
}

static const char *repeats5(const int64_t *size, uint64_t seed) {
    return ladder_repeats(chapter5_rungs, size, size[5] ? "hot" : "uniform", seed);
}

SENTENCE(5, 7, "Every rung of chapter 5 writes the same bits with 1, 2, 3 and 7 threads, and again.",
         "a pair has one place in the schedule, an output one owner and one order of its sum",
         "the run with one thread") {
    for_sizes("T d N K dtype hot", repeats5,
              SIZES({1, 1, 1, 1, 0, 0}, {29, 72, 50, 9, 0, 0}, {29, 71, 50, 17, 1, 1}, {29, 72, 50, 9, 2, 0},
                    {131, 130, 64, 33, 0, 1}, {301, 33, 7, 3, 0, 0}, {700, 8, 40, 1, 0, 1}, {900, 300, 60, 8, 0, 0}));
}

/* A problem whose rows of experts that no token asks for are NaN, in both tables. */
static void spoil_unused(const fmoe_problem *p) {
    const fmoe_expert_args *a = p->args;
    float *down = fmoe_problem_find(p, "down")->data, *up = fmoe_problem_find(p, "up")->data;
    bool *used OWNED = zeros(a->N, sizeof *used);
    for (int64_t i = 0; i < a->T * a->K; i++)
        used[a->indices[i]] = true;
    for (int64_t i = 0; i < a->N * a->d; i++)
        if (!used[i / a->d])
            down[i] = up[i] = NAN;
}

static const char *unused_are_not_read(const int64_t *size, uint64_t seed) {
    if (size[3] > size[2])
        return DOES_NOT_APPLY;
    fmoe_problem p PROBLEM = problem_of(size, "f32", seed);
    spoil_unused(&p);
    return rungs_right(chapter5_rungs, &p);
}

SENTENCE(5, 8, "Rows of experts that nobody asked for take no part.",
         "a trained router leaves more than half of 16,384 experts idle", "NaN in every idle row of both tables") {
    for_sizes("T d N K", unused_are_not_read, SIZES({1, 1, 2, 1}, {5, 7, 90, 3}, {20, 72, 300, 6}, {40, 33, 1000, 16}));
}

static const char *small5(const int64_t *size, uint64_t seed) {
    return stays_small(cpu_expert_scheduled_best_workspace, size, seed);
}

SENTENCE(5, 9, "Chapter 5's best rung needs less memory than its inputs and outputs.",
         "a schedule is two numbers a pair, as the routing itself is", "the sum of the tensors' sizes") {
    for_sizes("T d N K dtype", small5, MEMORY_SIZES);
}

/* ---- On the GPU: both ladders ------------------------------------------------------------------------------------ */

/* The ladder that the properties below hold to account, set by the sentence. */
static const fmoe_rung *gpu_ladder;

static const char *const gpu_routings[] = {"uniform", "hot", "normal", "trained"};

static const char *gpu_agrees(const int64_t *size, uint64_t seed) {
    return ladder_agrees(gpu_ladder, size, gpu_routings[size[5]], seed);
}

/* d 1, 7, 72 and 1,024, and around the widths of loads and slices; K = N; most experts empty; one expert for all. */
#define GPU_SIZES                                                                                                      \
    SIZES({0, 3, 2, 1, 0, 0}, {1, 1, 1, 1, 0, 0}, {5, 1, 9, 7, 1, 0}, {3, 7, 4, 4, 2, 0}, {29, 72, 50, 9, 0, 0},       \
          {29, 72, 50, 9, 1, 0}, {29, 72, 50, 9, 2, 0}, {7, 1024, 33, 16, 0, 0}, {7, 1024, 33, 17, 1, 1},              \
          {33, 1024, 100, 33, 2, 0}, {101, 64, 16, 16, 2, 0}, {301, 33, 7, 3, 0, 1}, {3, 130, 4096, 5, 0, 0},          \
          {3, 200, 600, 520, 1, 0}, {13, 20, 40, 1, 0, 1}, {700, 8, 40, 1, 0, 1}, {9, 7, 16, 16, 0, 2},                \
          {31, 40, 169, 12, 1, 2}, {31, 256, 169, 9, 2, 2}, {17, 12, 16384, 64, 0, 3}, {65, 8, 16384, 65, 2, 3},       \
          {5, 1025, 20, 6, 2, 0}, {5, 2048, 20, 6, 2, 0}, {3, 2056, 20, 6, 1, 0}, {1025, 16, 300, 2, 2, 0})

static const char *gpu_repeats(const int64_t *size, uint64_t seed) {
    return ladder_repeats(gpu_ladder, size, gpu_routings[size[5]], seed);
}

#define GPU_REPEAT_SIZES                                                                                               \
    SIZES({1, 1, 1, 1, 0, 0}, {29, 72, 50, 9, 0, 0}, {29, 71, 50, 17, 1, 1}, {131, 130, 64, 33, 2, 0},                 \
          {700, 8, 40, 1, 0, 1}, {1001, 256, 600, 8, 2, 0}, {300, 1024, 1024, 16, 2, 2})

static void gpu_depends_on_arguments_alone(void) {
    static const char *const cases[] = {"T29-d72-N50-K9-uniform-f32", "T300-d256-N1024-K16-normal-bf16",
                                        "T200-d1024-N600-K8-hot-f16"};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *wrong = rungs_replay(&fmoe_step_expert, gpu_ladder, fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
        wrong = rungs_side_by_side(&fmoe_step_expert, gpu_ladder, fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
    }
}

static const char *gpu_name(const fmoe_rung *rung) {
    return rung->run ? rung->name : "fmoe_cuda_expert";
}

static fmoe_status expert_on_gpu(const fmoe_rung *rung, const expert *m, float *y, float *pre_activations) {
    fmoe_expert_args args = {.T = m->T,
                             .d = m->d,
                             .N = m->N,
                             .K = m->K,
                             .x = m->x,
                             .down = m->down,
                             .up = m->up,
                             .indices = m->indices,
                             .weights = m->weights,
                             .y = y};
    return expert_by(rung, &args, pre_activations);
}

/* ‖y − expected‖ within float32's limit of the terms summed, and pre-activations, where there are any, of ‖x‖ ‖down‖.
 */
static const char *gpu_close(const fmoe_rung *rung, const expert *m, double scale, const float *y,
                             const float *expected, const float *pre, const float *expected_pre) {
    double off = 0, off_pre = 0, terms = 0;
    for (int64_t i = 0; i < m->T * m->d; i++) {
        off += pow((double)y[i] - expected[i], 2);
        terms += (double)m->x[i] * m->x[i];
    }
    for (int64_t i = 0; i < m->T * m->K && pre; i++)
        off_pre += pow((double)pre[i] - expected_pre[i], 2);
    double limit = fmoe_error_limit(FMOE_F32);
    if (!(sqrt(off) <= limit * scale))
        return because("%s: y is off by %.3g of its terms' norm %.3g", gpu_name(rung), sqrt(off) / scale, scale);
    if (!(sqrt(off_pre) <= limit * sqrt((double)m->K * terms)))
        return because("%s: the pre-activations are off by %.3g", gpu_name(rung), sqrt(off_pre));
    return HOLDS;
}

/* Repeated indices, weights of either sign; then some indices that are none, and a token of NaNs. */
static const char *gpu_any_indices(const int64_t *size, uint64_t seed) {
    if (size[3] > size[2])
        return DOES_NOT_APPLY;
    expert m EXPERT = expert_of(size, seed);
    float *expected_pre OWNED = floats(m.T * m.K), *expected OWNED = run(&m, expected_pre);
    float *y OWNED = floats(m.T * m.d), *pre OWNED = floats(m.T * m.K), *only OWNED = floats(m.T * m.d);
    double scale = scale_of(&m);
    for (const fmoe_rung *rung = gpu_ladder;; rung++) {
        fmoe_status status = expert_on_gpu(rung, &m, y, pre);
        if (status != FMOE_UNSUPPORTED) {
            CALL(status);
            CHECK(gpu_close(rung, &m, scale, y, expected, rung->run ? NULL : pre, expected_pre));
        }
        if (!rung->run)
            break;
    }
    const fmoe_rung public = {.run = NULL};
    CALL(expert_on_gpu(&public, &m, only, NULL));
    return same_bits(only, y, m.T * m.d) ? HOLDS : because("without pre-activations y has other bits");
}

static const char *gpu_bad_experts(const int64_t *size, uint64_t seed) {
    int64_t bad = size[4], first = -1;
    if (size[3] > size[2])
        return DOES_NOT_APPLY;
    expert m EXPERT = expert_of(size, seed), good EXPERT = expert_of(size, seed);
    int64_t pairs = m.T * m.K;
    const int32_t wrong[] = {-1, (int32_t)m.N, INT32_MIN, INT32_MAX};
    for (int64_t i = 0; i < bad; i++) {
        int64_t at = (int64_t)(fmoe_random_bits(seed, 30, (uint64_t)i) % (uint64_t)pairs);
        m.indices[at] = wrong[i % 4];
        good.weights[at] = 0;
        first = first < 0 || at < first ? at : first;
    }
    float *expected_pre OWNED = floats(pairs), *expected OWNED = run(&good, expected_pre);
    for (int64_t i = 0; i < pairs; i++)
        if (m.indices[i] < 0 || m.indices[i] >= m.N)
            expected_pre[i] = 0;
    char note[96] = "";
    if (bad && m.K > 0)
        snprintf(note, sizeof note, "indices[%d, %d] = %d is outside [0, num_experts = %d)", (int)(first / m.K),
                 (int)(first % m.K), m.indices[first], (int)m.N);
    float *y OWNED = floats(m.T * m.d), *pre OWNED = floats(pairs);
    double scale = scale_of(&good) + 1e-30;
    for (const fmoe_rung *rung = gpu_ladder;; rung++) {
        fmoe_status status = expert_on_gpu(rung, &m, y, pre);
        if (status != FMOE_UNSUPPORTED) {
            if (status != (bad ? FMOE_BAD_INDEX : FMOE_OK) || (bad && strcmp(fmoe_error_message(), note) != 0))
                return because("%s: %s, \"%s\", should be \"%s\"", gpu_name(rung), fmoe_status_name(status),
                               fmoe_error_message(), note);
            CHECK(gpu_close(rung, &m, scale, y, expected, rung->run ? NULL : pre, expected_pre));
        }
        if (!rung->run)
            return HOLDS;
    }
}

#define ANY_SIZES                                                                                                      \
    SIZES({1, 1, 1, 1}, {5, 7, 4, 4}, {29, 72, 17, 9}, {33, 64, 300, 33}, {7, 1024, 40, 40}, {65, 130, 9, 5},          \
          {300, 16, 2, 2})
#define BAD_SIZES                                                                                                      \
    SIZES({1, 1, 1, 1, 1}, {5, 7, 4, 4, 0}, {29, 72, 17, 9, 1}, {29, 72, 17, 9, 60}, {33, 64, 300, 33, 7},             \
          {7, 1024, 40, 40, 3}, {300, 16, 2, 2, 5})

CUDA_SENTENCE(1, 15,
              "Every GPU rung of chapter 1 computes the reference's output, for any sizes, routing and storage type.",
              "a row that fills no load of 16 bytes, a token that fills no block, must not show",
              "fmoe_expert; NaN in outputs and workspace before, guard bands after") {
    gpu_ladder = cuda_expert_token_rungs;
    for_sizes("T d N K dtype routing", gpu_agrees, GPU_SIZES);
    for_random_sizes("T d N K dtype routing", gpu_agrees, 60, (int64_t[]){1, 1, 1, 1, 0, 0},
                     (int64_t[]){100, 300, 100, 40, 2, 1});
}

CUDA_SENTENCE(
    1, 16, "On the GPU indices may repeat, weights be negative, and the pre-activations are ⟨x, down⟩, if asked for.",
    "the expert step is an operator of its own, for any routing", "fmoe_expert, measured by the terms summed") {
    gpu_ladder = cuda_expert_token_rungs;
    for_sizes("T d N K", gpu_any_indices, ANY_SIZES);
    for_random_sizes("T d N K", gpu_any_indices, 30, (int64_t[]){1, 1, 1, 1}, (int64_t[]){60, 200, 60, 40});
    expert none EXPERT = new_expert(fresh_seed(), 0, 7, 5, 2);
    const fmoe_rung public = {.run = NULL};
    expect(expert_on_gpu(&public, &none, NULL, NULL) == FMOE_OK, "T = 0: %s", fmoe_error_message());
}

CUDA_SENTENCE(1, 17,
              "On the GPU a bad index adds nothing, fmoe_cuda_check names the first, and nothing else is touched.",
              "an index is an address, and the device sees it first", "fmoe_expert without those pairs; guard bands") {
    gpu_ladder = cuda_expert_token_rungs;
    for_sizes("T d N K bad", gpu_bad_experts, BAD_SIZES);
    for_random_sizes("T d N K bad", gpu_bad_experts, 30, (int64_t[]){1, 1, 1, 1, 0}, (int64_t[]){60, 150, 60, 40, 9});
}

CUDA_SENTENCE(1, 18,
              "Every GPU rung of chapter 1 writes the same bits in every run, and depends on its arguments alone.",
              "a token has one owner and its sum one order",
              "three runs; a graph replayed with new data; two streams that start together") {
    gpu_ladder = cuda_expert_token_rungs;
    for_sizes("T d N K dtype routing", gpu_repeats, GPU_REPEAT_SIZES);
    gpu_depends_on_arguments_alone();
}

CUDA_HOST_SENTENCE(1, 19, "fmoe_cuda_expert names bad arguments before it launches anything.",
                   "what the host can see it says at once", "the contract") {
    float m[16] = {0};
    int32_t indices[8] = {0};
    const size_t plenty = (size_t)1 << 40;
#define RUN(T, d, N, K, dtype, x, down, up, indices, weights, y, workspace, bytes)                                     \
    fmoe_cuda_expert(T, d, N, K, dtype, x, down, up, indices, weights, y, NULL, workspace, bytes, NULL)
    refused(RUN(-1, 2, 4, 2, FMOE_F32, m, m, m, indices, m, m, m, plenty), FMOE_BAD_SIZE, "tokens = -1");
    refused(RUN(2, 0, 4, 2, FMOE_F32, m, m, m, indices, m, m, m, plenty), FMOE_BAD_SIZE, "hidden_size = 0");
    refused(RUN(2, 2, 0, 2, FMOE_F32, m, m, m, indices, m, m, m, plenty), FMOE_BAD_SIZE, "num_experts = 0");
    refused(RUN(2, 2, 4, 5, FMOE_F32, m, m, m, indices, m, m, m, plenty), FMOE_BAD_TOPK, "5 exceeds num_experts = 4");
    refused(RUN(2, 2, 4, 2, FMOE_I32, m, m, m, indices, m, m, m, plenty), FMOE_UNSUPPORTED, "dtype = 3");
    refused(RUN(INT64_MAX / 8, 1000, 4, 2, FMOE_F32, m, m, m, indices, m, m, m, plenty), FMOE_OVERFLOW, "tokens");
    refused(RUN(2, 2, 4, 2, FMOE_F32, NULL, m, m, indices, m, m, m, plenty), FMOE_NULL_POINTER, "x");
    refused(RUN(2, 2, 4, 2, FMOE_F32, m, NULL, m, indices, m, m, m, plenty), FMOE_NULL_POINTER, "down_embed");
    refused(RUN(2, 2, 4, 2, FMOE_F32, m, m, NULL, indices, m, m, m, plenty), FMOE_NULL_POINTER, "up_embed");
    refused(RUN(2, 2, 4, 2, FMOE_F32, m, m, m, NULL, m, m, m, plenty), FMOE_NULL_POINTER, "indices");
    refused(RUN(2, 2, 4, 2, FMOE_F32, m, m, m, indices, NULL, m, m, plenty), FMOE_NULL_POINTER, "weights");
    refused(RUN(2, 2, 4, 2, FMOE_F32, m, m, m, indices, m, NULL, m, plenty), FMOE_NULL_POINTER, "y");
    size_t needed = fmoe_cuda_expert_workspace(2, 2, 4, 2, FMOE_F32);
    expect(needed >= 256, "there is no room for a note in %zu bytes", needed);
    refused(RUN(2, 2, 4, 2, FMOE_F32, m, m, m, indices, m, m, m, needed - 1), FMOE_BAD_WORKSPACE, "workspace_bytes");
    refused(RUN(2, 2, 4, 2, FMOE_F32, m, m, m, indices, m, m, NULL, needed), FMOE_NULL_POINTER, "workspace");
#undef RUN
}

/* Tables larger than what the L2 keeps of them, read often enough: walked in slices of 1,024, 256 and 512 bytes of a
 * row, the last of which is not whole. */
#define SLICED_SIZES SIZES({1100, 1024, 8000, 30, 2, 0}, {1000, 136, 24600, 99, 2, 0}, {600, 200, 13000, 90, 0, 0})

CUDA_SENTENCE(5, 10,
              "Every GPU rung of chapter 5 computes the reference's output, for any sizes, routing and storage type.",
              "a hot expert, an empty one, a pair at the end of a chunk must not show",
              "fmoe_expert; NaN in outputs and workspace before, guard bands after") {
    gpu_ladder = cuda_expert_scheduled_rungs;
    for_sizes("T d N K dtype routing", gpu_agrees, GPU_SIZES);
    for_sizes("T d N K dtype routing", gpu_agrees, SLICED_SIZES);
    for_random_sizes("T d N K dtype routing", gpu_agrees, 60, (int64_t[]){1, 1, 1, 1, 0, 0},
                     (int64_t[]){100, 300, 100, 40, 2, 1});
}

static const char *gpu_unused(const int64_t *size, uint64_t seed) {
    if (size[3] > size[2])
        return DOES_NOT_APPLY;
    fmoe_problem p PROBLEM = problem_of(size, "f32", seed);
    spoil_unused(&p);
    return rungs_right(gpu_ladder, &p);
}

CUDA_SENTENCE(5, 11,
              "On the GPU too rows that nobody asked for take no part; indices may repeat and weights be negative.",
              "loads in flight reach for rows before anyone knows that they are needed",
              "NaN in every idle row of both tables; fmoe_expert") {
    static const fmoe_rung *const ladders[] = {cuda_expert_token_rungs, cuda_expert_scheduled_rungs};
    for (int i = 0; i < 2; i++) {
        gpu_ladder = ladders[i];
        for_sizes("T d N K", gpu_unused,
                  SIZES({1, 1, 2, 1}, {5, 7, 90, 3}, {20, 72, 300, 6}, {40, 33, 1000, 16}, {9, 1024, 500, 5}));
    }
    for_sizes("T d N K", gpu_any_indices, ANY_SIZES);
}

CUDA_SENTENCE(5, 12, "A bad index is in no schedule and adds nothing, and fmoe_cuda_check names the first.",
              "a schedule's positions behind the good pairs hold none",
              "fmoe_expert without those pairs; guard bands") {
    gpu_ladder = cuda_expert_scheduled_rungs;
    for_sizes("T d N K bad", gpu_bad_experts, BAD_SIZES);
    for_sizes("T d N K bad", gpu_bad_experts, SIZES({600, 200, 13000, 90, 5}));
    for_random_sizes("T d N K bad", gpu_bad_experts, 30, (int64_t[]){1, 1, 1, 1, 0}, (int64_t[]){60, 150, 60, 40, 9});
}

CUDA_SENTENCE(5, 13,
              "Every GPU rung of chapter 5 writes the same bits in every run, and depends on its arguments alone.",
              "no atomics: a pair has one place, an output one owner and one order of its sum",
              "three runs; a graph replayed with new data; two streams that start together") {
    gpu_ladder = cuda_expert_scheduled_rungs;
    for_sizes("T d N K dtype routing", gpu_repeats, GPU_REPEAT_SIZES);
    gpu_depends_on_arguments_alone();
}

/* ---- On the GPU: the strategies ---------------------------------------------------------------------------------- */

/* Tiles of tokens, of experts and of grid rows that are not full; a K that is large for N; a d that fills no chunk;
 * 16-bit types in rows of 16 bytes, which tensor cores take; more pairs in a tile than its threads hold. */
#define STRATEGY_SIZES                                                                                                 \
    SIZES({1, 8, 1, 1, 2, 0}, {5, 16, 9, 7, 1, 0}, {3, 8, 4, 4, 2, 0}, {29, 72, 50, 9, 2, 0}, {29, 72, 50, 9, 1, 1},   \
          {7, 1024, 33, 33, 2, 0}, {130, 64, 300, 20, 2, 0}, {257, 136, 520, 40, 1, 0}, {65, 264, 1000, 300, 2, 0},    \
          {300, 72, 169, 12, 2, 2}, {129, 128, 256, 33, 1, 2}, {70, 1024, 16384, 64, 2, 2}, {33, 40, 16384, 64, 2, 3}, \
          {700, 8, 40, 1, 2, 1}, {400, 64, 102400, 512, 2, 2}, {128, 128, 25700, 2048, 1, 0},                          \
          {70, 40, 1000, 900, 2, 0}, {70, 16, 22500, 2700, 1, 0}, {70, 16, 90000, 6000, 2, 0})

CUDA_SENTENCE(7, 15, "On the GPU every strategy computes the reference's output, whichever suits the routing.",
              "dense tiles hold pairs that nobody chose, and a chosen one may lie at any edge",
              "fmoe_expert; NaN in outputs and workspace before, guard bands after") {
    gpu_ladder = cuda_strategies_rungs;
    for_sizes("T d N K dtype routing", gpu_agrees, GPU_SIZES);
    for_sizes("T d N K dtype routing", gpu_agrees, STRATEGY_SIZES);
}

static const char *gpu_agrees_aligned(const int64_t *size, uint64_t seed) {
    const int64_t aligned[] = {size[0], 8 * size[1], size[2], size[3], size[4], size[5]};
    return gpu_agrees(aligned, seed);
}

CUDA_SENTENCE(7, 16, "On the GPU tensor cores take any number of tokens, experts and choices.",
              "a list is as long as the routing makes it", "fmoe_expert") {
    gpu_ladder = cuda_strategies_rungs;
    for_random_sizes("T d/8 N K dtype routing", gpu_agrees_aligned, 60, (int64_t[]){1, 1, 1, 1, 1, 0},
                     (int64_t[]){200, 40, 900, 60, 2, 1});
}

CUDA_SENTENCE(7, 17, "On the GPU every strategy writes the same bits in every run, and depends on its arguments alone.",
              "lists are built without a race, and parts of a sum are added in one order",
              "three runs; a graph replayed with new data; two streams that start together") {
    gpu_ladder = cuda_strategies_rungs;
    for_sizes("T d N K dtype routing", gpu_repeats, GPU_REPEAT_SIZES);
    for_sizes("T d N K dtype routing", gpu_repeats,
              SIZES({257, 136, 520, 40, 1, 0}, {300, 1024, 1024, 64, 2, 2}, {128, 256, 9000, 700, 2, 0}));
    gpu_depends_on_arguments_alone();
}

/* Every third token chooses one expert K times; every other weight is negative. */
static void repeat_and_negate(const fmoe_problem *p) {
    const fmoe_expert_args *a = p->args;
    int32_t *indices = fmoe_problem_find(p, "indices")->data;
    float *weights = fmoe_problem_find(p, "weights")->data;
    for (int64_t i = 0; i < a->T * a->K; i++) {
        if (i / a->K % 3 == 0)
            indices[i] = indices[i / a->K * a->K];
        if (i % 2)
            weights[i] = -weights[i];
    }
}

/* Afterwards `bad` indices, whose weights are 0 for the reference, are none. */
static const char *strategies_take_any(const int64_t *size, uint64_t seed) {
    if (size[3] > size[2])
        return DOES_NOT_APPLY;
    fmoe_problem p PROBLEM = problem_of(size, "bf16", seed);
    repeat_and_negate(&p);
    const fmoe_expert_args *a = p.args;
    int32_t *indices = fmoe_problem_find(&p, "indices")->data;
    float *weights = fmoe_problem_find(&p, "weights")->data;
    int64_t first = -1;
    const int32_t wrong[] = {-1, (int32_t)a->N, INT32_MIN, INT32_MAX};
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t i = 0; i < size[4]; i++) {
            int64_t at = (int64_t)(fmoe_random_bits(seed, 30, (uint64_t)i) % (uint64_t)(a->T * a->K));
            weights[at] = pass ? 7 : 0;
            if (pass)
                indices[at] = wrong[i % 4];
            first = first < 0 || at < first ? at : first;
        }
        if (pass == 0)
            CALL(p.step->reference(&p));
    }
    CHECK(rungs_right(cuda_strategies_rungs, &p));
    char note[96] = "";
    if (first >= 0)
        snprintf(note, sizeof note, "indices[%d, %d] = %d is outside [0, num_experts = %d)", (int)(first / a->K),
                 (int)(first % a->K), indices[first], (int)a->N);
    for (const fmoe_rung *rung = cuda_strategies_rungs; rung->run; rung++) {
        fmoe_status status = expert_by(rung, a, NULL);
        if (status == FMOE_UNSUPPORTED)
            continue;
        if (status != (first < 0 ? FMOE_OK : FMOE_BAD_INDEX) || (first >= 0 && strcmp(fmoe_error_message(), note) != 0))
            return because("%s: %s, \"%s\", should be \"%s\"", rung->name, fmoe_status_name(status),
                           fmoe_error_message(), note);
    }
    return HOLDS;
}

CUDA_SENTENCE(7, 18,
              "On the GPU every strategy takes repeated indices and negative weights, and leaves a bad index out by "
              "name.",
              "two pairs may meet in one place of a tile", "fmoe_expert without the bad pairs; the note") {
    for_sizes("T d N K bad", strategies_take_any,
              SIZES({1, 8, 1, 1, 0}, {5, 16, 4, 4, 0}, {29, 72, 17, 9, 1}, {130, 64, 300, 33, 7},
                    {257, 136, 520, 40, 0}, {300, 16, 2, 2, 5}, {65, 264, 1000, 300, 60}));
}

CUDA_SENTENCE(7, 19, "On the GPU the chooser takes the strategy that its model calls cheapest, of those that fit.",
              "the same call takes the same way every time", "the costs one by one; the strategy's own bits") {
    static const char *const cases[] = {"T1-d1024-N16384-K64-normal-bf16", "T300-d256-N16384-K64-normal-bf16",
                                        "T128-d128-N2048-K512-uniform-bf16", "T128-d128-N256-K256-uniform-f16",
                                        "T50-d75-N300-K20-uniform-f32"};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        fmoe_problem p PROBLEM = new_problem(&fmoe_step_expert, fresh_seed(), "%s", cases[i]);
        const fmoe_expert_args *a = p.args;
        cuda_strategy choice = cuda_strategy_choose(a);
        for (int s = 0; s < CUDA_NUM_STRATEGIES; s++) {
            double us = cuda_strategy_cost_us((cuda_strategy)s, a);
            expect(us > 0, "%s: %s costs %g µs", cases[i], cuda_strategies_rungs[s].name, us);
            expect(cuda_strategy_cost_us(choice, a) <= us, "%s: %s at %g µs would be cheaper", cases[i],
                   cuda_strategies_rungs[s].name, us);
        }
        const fmoe_argument *y = fmoe_problem_find(&p, "y");
        size_t bytes = (size_t)y->count * fmoe_dtype_size(y->dtype);
        void *by_choice OWNED = malloc(bytes + 1);
        cr_assert(by_choice != NULL);
        expect(expert_by(&cuda_strategies_rungs[CUDA_NUM_STRATEGIES], a, NULL) == FMOE_OK, "%s", fmoe_error_message());
        memcpy(by_choice, y->data, bytes);
        expect(expert_by(&cuda_strategies_rungs[choice], a, NULL) == FMOE_OK, "%s", fmoe_error_message());
        expect(memcmp(by_choice, y->data, bytes) == 0, "%s: the chooser's bits are not those of %s", cases[i],
               cuda_strategies_rungs[choice].name);
    }
}
