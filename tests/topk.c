/* Chapter 3: the Cartesian-product top-k. */
#include "cuda_values.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The rungs that the properties below hold to account. A sentence about the GPU puts the GPU's in their place, and says
 * in which type the logits are stored: its process runs no other. */
static const fmoe_rung *ladder = chapter3_rungs;
static fmoe_dtype storage = FMOE_F32;

/* Whole numbers from 0 to kinds − 1: their sums are exact, and many are equal. */
static float *whole_numbers(uint64_t seed, int64_t kinds, int64_t count) {
    float *values = floats(count);
    for (int64_t i = 0; i < count; i++)
        values[i] = (float)(fmoe_random_bits(seed, 9, (uint64_t)i) % (uint64_t)kinds);
    return values;
}

/* ---- The rule of the contract, from scratch: ranks by counting, every pair, places by counting ---- */

/* Does a come before b? The larger value, then the smaller index, NaN last. */
static bool before(float a, int64_t a_index, float b, int64_t b_index) {
    if (isnan(a) != isnan(b))
        return isnan(b);
    if (!isnan(a) && a != b)
        return a > b;
    return a_index < b_index;
}

static int64_t rank_of(int64_t n, const float *z, int64_t key) {
    int64_t rank = 0;
    for (int64_t i = 0; i < n; i++)
        rank += before(z[i], i, z[key], key);
    return rank;
}

typedef struct {
    float sum;
    int64_t index;
} pair;

static int by_rule(const void *left, const void *right) {
    const pair *a = left, *b = right;
    return before(a->sum, a->index, b->sum, b->index) ? -1 : 1;
}

/* The K pairs of one token; all n² of them are candidates unless staircase. */
static void choose_by_rule(int64_t n, int64_t K, bool staircase, const float *x, const float *y, int32_t *indices) {
    pair *pairs OWNED = poisoned(n * n, sizeof *pairs);
    int32_t *a OWNED = integers(n), *b OWNED = integers(n);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        a[i] = (int32_t)rank_of(n, x, i);
        b[i] = (int32_t)rank_of(n, y, i);
    }
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++)
            if (!staircase || (a[i] + 1) * (b[j] + 1) <= K)
                pairs[count++] = (pair){x[i] + y[j], i * n + j};
    qsort(pairs, (size_t)count, sizeof *pairs, by_rule);
    for (int64_t k = 0; k < K; k++)
        indices[k] = (int32_t)pairs[k].index;
}

static const char *compare_choice(int64_t T, int64_t n, int64_t K, bool staircase, const float *logits,
                                  const int32_t *indices) {
    int32_t *expected OWNED = integers(K);
    for (int64_t t = 0; t < T; t++) {
        choose_by_rule(n, K, staircase, logits + t * n, logits + (T + t) * n, expected);
        for (int64_t k = 0; k < K; k++)
            if (indices[t * K + k] != expected[k])
                return because("token %d: place %d holds pair %d, should be %d", (int)t, (int)k, indices[t * K + k],
                               expected[k]);
    }
    return HOLDS;
}

/* ---- Choosing with the reference, and with any rung ---- */

typedef struct {
    int32_t *indices;
    float *scores, *weights;
} choice;

static void release_choice(choice *c) {
    free(c->indices);
    free(c->scores);
    free(c->weights);
}
#define OWNED_CHOICE FREED(release_choice)

static choice no_choice(int64_t count) {
    return (choice){integers(count), floats(count), floats(count)};
}

static fmoe_status choose(int64_t T, int64_t n, int64_t K, bool norm, const float *logits, choice c) {
    return fmoe_topk(T, n, K, norm, logits, c.indices, c.scores, c.weights);
}

/* Rungs that look at more pairs than the staircase hold the rule only where sums are exact. */
static bool scans_more(const fmoe_rung *rung) {
    static const char *const names[] = {"scans", "one-scan", "key-lists", "scans-gpu", "key-lists-gpu"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(rung->name, names[i]) == 0)
            return true;
    return false;
}

static fmoe_status run_rung(const fmoe_rung *rung, const fmoe_topk_args *args) {
    size_t bytes = rung->workspace ? rung->workspace(args) : 0;
    if (rung->backend == BACKEND_CUDA) {
        int64_t chosen = args->T * args->K;
        const tensor tensors[] = {TENSOR(fmoe_topk_args, logits, args->dtype, ROLE_INPUT, 2 * args->T * args->n),
                                  TENSOR(fmoe_topk_args, indices, FMOE_I32, ROLE_OUTPUT, chosen),
                                  TENSOR(fmoe_topk_args, scores, FMOE_F32, ROLE_OUTPUT, chosen),
                                  TENSOR(fmoe_topk_args, weights, FMOE_F32, ROLE_OUTPUT, chosen)};
        if ((int)rung->level > fmoe_device_get()->level)
            return FMOE_UNSUPPORTED;
        return run_on_device(rung->run, bytes, args, sizeof *args, tensors, 4);
    }
    void *workspace OWNED = workspace_of(bytes);
    return rung->run(args, workspace, bytes, NULL);
}

/* Without a rung the reference chooses. The logits are values of the storage type. */
static fmoe_status choose_by(const fmoe_rung *rung, int64_t T, int64_t n, int64_t K, bool norm, const float *logits,
                             choice c) {
    if (!rung)
        return choose(T, n, K, norm, logits, c);
    void *narrow OWNED = poisoned(2 * T * n, fmoe_dtype_size(storage));
    fmoe_from_f32(storage, 2 * T * n, logits, narrow);
    fmoe_topk_args args = {.T = T,
                           .n = n,
                           .K = K,
                           .norm_topk_prob = norm,
                           .dtype = storage,
                           .logits = narrow,
                           .indices = c.indices,
                           .scores = c.scores,
                           .weights = c.weights};
    if (rung->supports && !rung->supports(&args))
        return FMOE_UNSUPPORTED;
    return run_rung(rung, &args);
}

/* Do the reference and every rung choose by the rule? */
static const char *all_choose_by_rule(int64_t T, int64_t n, int64_t K, bool sums_exact, const float *logits) {
    choice c OWNED_CHOICE = no_choice(T * K);
    CALL(choose(T, n, K, false, logits, c));
    const char *result = compare_choice(T, n, K, !sums_exact, logits, c.indices);
    for (const fmoe_rung *rung = ladder; rung->run && result == HOLDS; rung++) {
        if (scans_more(rung) && !sums_exact)
            continue;
        memset(c.indices, 0x55, (size_t)(T * K) * sizeof *c.indices);
        fmoe_status status = choose_by(rung, T, n, K, false, logits, c);
        if (status == FMOE_UNSUPPORTED)
            continue;
        result = status != FMOE_OK ? fmoe_error_message() : compare_choice(T, n, K, !sums_exact, logits, c.indices);
        if (result != HOLDS) {
            char text[200];
            snprintf(text, sizeof text, "%s", result);
            return because("%s: %s", rung->name, text);
        }
    }
    return result;
}

/* ---- The sentences ---- */

static const char *k_best_of_all(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2], kinds = size[3];
    if (K > n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = whole_numbers(seed, kinds, 2 * T * n);
    return all_choose_by_rule(T, n, K, true, logits);
}

SENTENCE(3, 1, "The chosen pairs are the K best of all n², best first, when sums are exact.", "the definition",
         "a full sort of all pairs, for the reference and every rung") {
    for_sizes("T n K kinds", k_best_of_all,
              SIZES({1, 1, 1, 5}, {3, 4, 16, 9}, {7, 13, 6, 1000}, {2, 13, 169, 30}, {2, 64, 100, 100000},
                    {2, 100, 64, 1000000}, {1, 70, 700, 50}, {1, 2, 3, 1}));
    for_random_sizes("T n K kinds", k_best_of_all, 200, (int64_t[]){1, 1, 1, 1}, (int64_t[]){3, 20, 90, 60});
}

static const char *none_outside(const int64_t *size, uint64_t seed) {
    int64_t n = size[0], K = size[1];
    if (K > n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = whole_numbers(seed, 30, 2 * n), *x = logits, *y = logits + n;
    choice c OWNED_CHOICE = no_choice(K);
    CALL(choose(1, n, K, false, logits, c));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) {
            int64_t a = rank_of(n, x, i), b = rank_of(n, y, j), better = 0;
            for (int64_t other = 0; other < n * n; other++)
                better += before(x[other / n] + y[other % n], other, x[i] + y[j], i * n + j);
            if (better < (a + 1) * (b + 1) - 1)
                return because("only %d pairs beat the one of ranks (%d, %d)", (int)better, (int)a, (int)b);
            bool chosen = false;
            for (int64_t k = 0; k < K; k++)
                chosen |= c.indices[k] == i * n + j;
            if (chosen != (better < K))
                return because("pair (%d, %d) of ranks (%d, %d), beaten by %d, is%s chosen", (int)i, (int)j, (int)a,
                               (int)b, (int)better, chosen ? "" : " not");
            if (chosen && (a + 1) * (b + 1) > K)
                return because("a pair of ranks (%d, %d) is chosen", (int)a, (int)b);
        }
    return HOLDS;
}

SENTENCE(3, 2, "No pair outside (a+1)(b+1) ≤ K can enter the top K.", "(a+1)(b+1) − 1 other pairs do at least as well",
         "counting who beats whom") {
    for_sizes("n K", none_outside, SIZES({1, 1}, {4, 3}, {13, 20}, {20, 1}, {20, 64}, {6, 36}));
    for_random_sizes("n K", none_outside, 40, (int64_t[]){1, 1}, (int64_t[]){16, 60});
}

static const char *equal_logits(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2];
    if (K > n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = floats(2 * T * n);
    for (int64_t row = 0; row < 2 * T; row++)
        for (int64_t i = 0; i < n; i++)
            logits[row * n + i] = fmoe_random_normal(seed, 0, (uint64_t)row);
    choice c OWNED_CHOICE = no_choice(T * K);
    CALL(choose(T, n, K, true, logits, c));
    for (int64_t t = 0; t < T; t++)
        for (int64_t k = 0; k < K; k++) {
            if (c.indices[t * K + k] != k)
                return because("token %d: place %d holds pair %d", (int)t, (int)k, c.indices[t * K + k]);
            if (!(fabs(c.weights[t * K + k] * (double)K - 1) < 1e-6))
                return because("token %d: weight %d is %g", (int)t, (int)k, c.weights[t * K + k]);
        }
    return all_choose_by_rule(T, n, K, true, logits);
}

SENTENCE(3, 3, "Equal logits choose pairs 0 to K−1, with equal weights.", "ties go to the smaller index",
         "closed form") {
    for_sizes("T n K", equal_logits, SIZES({1, 1, 1}, {3, 4, 4}, {2, 13, 6}, {1, 128, 64}, {2, 9, 30}, {1, 16, 256}));
}

static const char *ties_by_index(const int64_t *size, uint64_t seed) {
    int64_t n = size[0], K = size[1];
    if (K > n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = whole_numbers(seed, 2, 2 * n);
    choice c OWNED_CHOICE = no_choice(K);
    CALL(choose(1, n, K, false, logits, c));
    /* All pairs of sum 2 in order of index, then all of sum 1, then all of sum 0. */
    int64_t place = 0;
    for (int sum = 2; sum >= 0; sum--)
        for (int64_t index = 0; index < n * n && place < K; index++)
            if (logits[index / n] + logits[n + index % n] == (float)sum && c.indices[place++] != index)
                return because("place %d holds pair %d, should be %d", (int)place - 1, c.indices[place - 1],
                               (int)index);
    return all_choose_by_rule(1, n, K, true, logits);
}

SENTENCE(3, 4, "Equal sums come in order of their index, at the K-th place too.",
         "17 % of a trained model's tokens tie there", "closed form for logits of 0 and 1") {
    for_random_sizes("n K", ties_by_index, 150, (int64_t[]){1, 1}, (int64_t[]){24, 300});
}

static const char *rounded_sums(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2];
    if (K > n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = normals(seed, 0, 1, 2 * T * n);
    for (int64_t i = 0; i < T * n; i++)
        logits[i] += 1e6f; /* a sixteenth is the last place of a sum, so most sums are rounded into ties */
    return all_choose_by_rule(T, n, K, false, logits);
}

SENTENCE(3, 5, "Where rounding makes sums equal, the rule still decides: candidates by rank, then the smaller index.",
         "reference, CPU and GPU must choose alike", "the rule, written again from scratch") {
    for_sizes("T n K", rounded_sums, SIZES({3, 4, 7}, {2, 40, 64}, {1, 100, 33}));
    for_random_sizes("T n K", rounded_sums, 100, (int64_t[]){1, 1, 1}, (int64_t[]){3, 24, 100});
}

static const char *any_k(const int64_t *size, uint64_t seed) {
    int64_t n = size[0];
    float *logits OWNED = whole_numbers(seed, 7, 2 * n);
    int32_t *all OWNED = integers(n * n);
    choose_by_rule(n, n * n, false, logits, logits + n, all);
    for (int64_t K = 1; K <= n * n; K++) {
        choice c OWNED_CHOICE = no_choice(K);
        if (choose(1, n, K, false, logits, c) != FMOE_OK)
            return because("K = %d: %s", (int)K, fmoe_error_message());
        if (!same_bits(c.indices, all, K))
            return because("K = %d: not the first K of all pairs", (int)K);
        const char *wrong = all_choose_by_rule(1, n, K, true, logits);
        if (wrong != HOLDS)
            return wrong;
    }
    return HOLDS;
}

SENTENCE(3, 6, "Any K from 1 to n² works, K > n included, and a smaller K's choice is the start of a larger's.",
         "no limit of the Triton kernels is inherited", "one sort of all pairs for every K") {
    for_sizes("n", any_k, SIZES({1}, {2}, {3}, {5}, {8}, {11}));
}

SENTENCE(3, 7, "With a single key there is one pair: index 0, score 0, weight 1.", "log 1 = 0", "closed form") {
    for (int i = 0; i < 8; i++) {
        float logits[2] = {100 * fmoe_random_normal(fresh_seed(), 0, 0), fmoe_random_normal(fresh_seed(), 0, 0)};
        choice c OWNED_CHOICE = no_choice(1);
        expect(choose(1, 1, 1, i % 2, logits, c) == FMOE_OK, "%s", fmoe_error_message());
        expect(c.indices[0] == 0 && c.scores[0] == 0 && c.weights[0] == 1, "pair %d, score %g, weight %g", c.indices[0],
               c.scores[0], c.weights[0]);
    }
}

/* Logits in which NaN, infinities and zeros of both signs are frequent. */
static float *wild_numbers(uint64_t seed, int64_t count) {
    static const float wild[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1, -1, 3.4e38f, -3.4e38f, 1e-45f};
    float *values = normals(seed, 0, 1, count);
    for (int64_t i = 0; i < count; i++) {
        uint64_t bits = fmoe_random_bits(seed, 1, (uint64_t)i);
        if (bits % 3 == 0)
            values[i] = wild[bits / 3 % 10];
    }
    return values;
}

static const char *wild_logits(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2];
    if (K > n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = wild_numbers(seed, 2 * T * n);
    return all_choose_by_rule(T, n, K, false, logits);
}

/* Only infinities and whole numbers: sums of −∞ and sums that are NaN alternate along a row of ranks. */
static const char *infinite_logits(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2];
    if (K > n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = whole_numbers(seed, 6, 2 * T * n);
    for (int64_t i = 0; i < 2 * T * n; i++)
        logits[i] = logits[i] == 5 ? INFINITY : logits[i] >= 3 ? -INFINITY : logits[i];
    return all_choose_by_rule(T, n, K, false, logits);
}

SENTENCE(3, 8, "The rule holds for infinities, zeros of both signs and NaN: a NaN sum ranks below −∞, then by index.",
         "whatever comes in, the indices are legal and reproducible", "the rule, written again from scratch") {
    for_sizes("T n K", wild_logits, SIZES({1, 1, 1}, {2, 2, 4}, {3, 40, 64}));
    for_random_sizes("T n K", wild_logits, 200, (int64_t[]){1, 1, 1}, (int64_t[]){3, 16, 80});
    for_random_sizes("T n K", infinite_logits, 200, (int64_t[]){1, 1, 1}, (int64_t[]){3, 9, 30});
}

static const char *token_alone(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2], norm = size[3];
    if (K > n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = normals(seed, 0, 1, 2 * T * n);
    int64_t bad = (int64_t)(seed % (uint64_t)T), side = (int64_t)(seed / 11 % 2);
    float *slot = logits + (side * T + bad) * n + (int64_t)(seed / 23 % (uint64_t)n);
    choice sound OWNED_CHOICE = no_choice(T * K), c OWNED_CHOICE = no_choice(T * K);
    for (const fmoe_rung *rung = NULL; !rung || rung->run; rung = rung ? rung + 1 : ladder) {
        const char *who = rung ? rung->name : "reference";
        float before_it = *slot;
        fmoe_status status = choose_by(rung, T, n, K, norm, logits, sound);
        *slot = seed % 2 ? NAN : INFINITY;
        if (status == FMOE_OK)
            status = choose_by(rung, T, n, K, norm, logits, c);
        *slot = before_it;
        if (status == FMOE_UNSUPPORTED)
            continue;
        if (status != FMOE_OK)
            return because("%s: %s", who, fmoe_error_message());
        for (int64_t i = 0; i < T * K; i++) {
            if (i / K == bad && !isnan(c.weights[i]))
                return because("%s: weight %d of the token is %g", who, (int)(i % K), c.weights[i]);
            if (i / K == bad && (c.indices[i] < 0 || c.indices[i] >= n * n))
                return because("%s: index %d of the token is %d", who, (int)(i % K), c.indices[i]);
            if (i / K != bad && (c.indices[i] != sound.indices[i] || c.weights[i] != sound.weights[i] ||
                                 c.scores[i] != sound.scores[i]))
                return because("%s: token %d changed", who, (int)(i / K));
        }
    }
    return HOLDS;
}

SENTENCE(3, 9, "A token with a NaN or +∞ logit gets NaN weights and legal indices, and no other token is touched.",
         "one broken token must not take the batch with it", "the same batch without it") {
    for_random_sizes("T n K norm", token_alone, 80, (int64_t[]){1, 1, 1, 0}, (int64_t[]){5, 12, 30, 1});
}

static const char *dead_keys(const int64_t *size, uint64_t seed) {
    int64_t n = size[0], K = size[1], alive = size[2], norm = size[3];
    if (K > n * n || alive > n)
        return DOES_NOT_APPLY;
    float *logits OWNED = normals(seed, 0, 1, 2 * n);
    for (int64_t i = alive; i < n; i++)
        logits[i] = logits[n + i] = -INFINITY;
    choice c OWNED_CHOICE = no_choice(K);
    CALL(choose(1, n, K, norm, logits, c));
    double sum = 0;
    for (int64_t k = 0; k < K; k++) {
        bool lives = c.indices[k] / n < alive && c.indices[k] % n < alive;
        if (lives != (k < alive * alive))
            return because("place %d holds pair %d", (int)k, c.indices[k]);
        if (lives ? !(c.weights[k] > 0) : c.weights[k] != 0 || c.scores[k] != -INFINITY)
            return because("place %d: score %g, weight %g", (int)k, c.scores[k], c.weights[k]);
        sum += c.weights[k];
    }
    if (norm && !(fabs(sum - 1) < 1e-6))
        return because("the weights sum to %.9g", sum);
    return all_choose_by_rule(1, n, K, false, logits);
}

SENTENCE(3, 10, "A key with logit −∞ is chosen only when no other is left, with weight zero.", "exp(−∞) = 0",
         "counting the pairs that are left") {
    for_sizes("n K alive norm", dead_keys, SIZES({2, 4, 1, 0}, {13, 9, 3, 1}, {13, 20, 4, 1}, {40, 64, 5, 0}));
    for_random_sizes("n K alive norm", dead_keys, 80, (int64_t[]){1, 1, 1, 0}, (int64_t[]){16, 80, 16, 1});
}

static const char *tiny_logits(const int64_t *size, uint64_t seed) {
    int64_t n = size[0], K = size[1];
    if (K > n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = whole_numbers(seed, 1000, 2 * n), *whole OWNED = copy_of(logits, 2 * n);
    for (int64_t i = 0; i < 2 * n; i++)
        logits[i] = ldexpf(logits[i], -149); /* multiples of the smallest float there is */
    choice c OWNED_CHOICE = no_choice(K), d OWNED_CHOICE = no_choice(K);
    CALL(choose(1, n, K, false, logits, c));
    CALL(choose(1, n, K, false, whole, d));
    for (int64_t k = 0; k < K; k++)
        if (c.indices[k] != d.indices[k])
            return because("place %d holds pair %d, for whole numbers %d", (int)k, c.indices[k], d.indices[k]);
    return all_choose_by_rule(1, n, K, true, logits);
}

SENTENCE(3, 11, "Subnormal logits are told apart.", "nothing is flushed to zero", "the same logits times 2^149") {
    for_sizes("n K", tiny_logits, SIZES({4, 7}, {13, 40}, {70, 64}, {2, 1}));
}

static long double log_sum(int64_t n, const float *z) {
    long double largest = -INFINITY, sum = 0;
    for (int64_t i = 0; i < n; i++)
        largest = z[i] > largest ? z[i] : largest;
    for (int64_t i = 0; i < n; i++)
        sum += expl(z[i] - largest);
    return largest + logl(sum);
}

/* Are scores and weights those of the indices, by the formula in long double? */
static const char *check_values(int64_t T, int64_t n, int64_t K, bool norm, const float *logits, choice c) {
    for (int64_t t = 0; t < T; t++) {
        const float *x = logits + t * n, *y = logits + (T + t) * n;
        long double shift = log_sum(n, x) + log_sum(n, y), sum = 0;
        for (int64_t k = 0; k < K; k++) {
            int32_t index = c.indices[t * K + k];
            sum += expl((long double)x[index / n] + y[index % n] - shift);
        }
        for (int64_t k = 0; k < K; k++) {
            int32_t index = c.indices[t * K + k];
            long double score = (long double)x[index / n] + y[index % n] - shift;
            long double weight = expl(score) / (norm ? sum : 1);
            if (!(fabsl(c.scores[t * K + k] - score) <= 2e-7L * (1 + fabsl(score))))
                return because("token %d: score %d is %.9g, should be %.9Lg", (int)t, (int)k, c.scores[t * K + k],
                               score);
            if (!(fabsl(c.weights[t * K + k] - weight) <= 2e-7L * weight + 1e-40L))
                return because("token %d: weight %d is %.9g, should be %.9Lg", (int)t, (int)k, c.weights[t * K + k],
                               weight);
        }
    }
    return HOLDS;
}

static const char *scores_are(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2], norm = size[3];
    if (K > n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = normals(seed, 0, 3, 2 * T * n);
    choice c OWNED_CHOICE = no_choice(T * K);
    CALL(choose(T, n, K, norm, logits, c));
    return check_values(T, n, K, norm, logits, c);
}

SENTENCE(3, 12,
         "A score is log p_x[i] + log p_y[j], and its weight is exp(score), divided by the token's sum if asked.",
         "the two sides' softmaxes multiply", "the formula in long double") {
    for_sizes("T n K norm", scores_are,
              SIZES({1, 2, 1, 0}, {3, 4, 16, 0}, {2, 128, 64, 0}, {2, 128, 64, 1}, {1, 320, 100, 1}));
    for_random_sizes("T n K norm", scores_are, 60, (int64_t[]){1, 1, 1, 0}, (int64_t[]){5, 30, 200, 1});
}

static const char *normalised_weights(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2];
    if (K > n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = normals(seed, 0, 2, 2 * T * n);
    choice c OWNED_CHOICE = no_choice(T * K), plain OWNED_CHOICE = no_choice(T * K);
    CALL(choose(T, n, K, true, logits, c));
    CALL(choose(T, n, K, false, logits, plain));
    for (int64_t t = 0; t < T; t++) {
        double sum = 0, plain_sum = 0;
        for (int64_t k = t * K; k < (t + 1) * K; k++) {
            sum += c.weights[k];
            plain_sum += plain.weights[k];
            if (c.indices[k] != plain.indices[k] || c.scores[k] != plain.scores[k])
                return because("token %d: place %d is another choice or score", (int)t, (int)(k % K));
        }
        if (!(fabs(sum - 1) <= 1e-6))
            return because("token %d: the weights sum to %.9g", (int)t, sum);
        if (!(plain_sum <= 1 + 1e-6) || (K == n * n && !(fabs(plain_sum - 1) <= 1e-6)))
            return because("token %d: without normalising they sum to %.9g", (int)t, plain_sum);
    }
    return HOLDS;
}

SENTENCE(3, 13, "With norm_topk_prob a token's weights sum to one; without, to at most one, and to one if K = n².",
         "they are part of a distribution over all pairs", "sums in double") {
    for_sizes("T n K", normalised_weights, SIZES({1, 1, 1}, {5, 4, 16}, {3, 13, 6}, {2, 128, 64}, {1, 20, 400}));
}

static const char *shifted_sides(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2];
    if (K > n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = whole_numbers(seed, 4096, 2 * T * n), *shifted OWNED = floats(2 * T * n);
    for (int64_t i = 0; i < 2 * T * n; i++) {
        logits[i] /= 512;
        int64_t row = i / n;
        shifted[i] = logits[i] + (float)(row * 3 - 40); /* exact */
    }
    choice c OWNED_CHOICE = no_choice(T * K), d OWNED_CHOICE = no_choice(T * K);
    CALL(choose(T, n, K, false, logits, c));
    CALL(choose(T, n, K, false, shifted, d));
    for (int64_t k = 0; k < T * K; k++)
        if (c.indices[k] != d.indices[k] || !(fabsf(c.scores[k] - d.scores[k]) <= 4e-6f))
            return because("place %d: pair %d, score %.9g; shifted pair %d, score %.9g", (int)k, c.indices[k],
                           c.scores[k], d.indices[k], d.scores[k]);
    return HOLDS;
}

SENTENCE(3, 14, "A constant added to all logits of a side changes no choice and no score.",
         "so raw logits may be compared, and log-softmax is taken of the chosen only", "the same logits, shifted") {
    for_sizes("T n K", shifted_sides, SIZES({1, 2, 3}, {5, 13, 6}, {3, 128, 64}, {2, 20, 400}));
}

enum { TRAINED_TOKENS = 4096, TRAINED_KEYS = 128 };

static float *trained_logits(void) {
    fmoe_file *file = NULL;
    float *logits = NULL;
    const char *path = "tests/golden/trained_logits_16384_layer0.safetensors";
    expect(fmoe_file_open(path, &file) == FMOE_OK, "%s", fmoe_error_message());
    fmoe_status status =
        fmoe_file_read_f32(file, "router_logits", 3, (int64_t[]){2, TRAINED_TOKENS, TRAINED_KEYS}, &logits);
    fmoe_file_close(file);
    expect(status == FMOE_OK, "%s", fmoe_error_message());
    return logits;
}

SENTENCE(3, 15, "A trained model's 4,096 tokens choose 7,080 of 16,384 experts, the busiest 828 times, and 17 % tie.",
         "real routing is skewed and full of ties", "figures of the independent PyTorch run that made the file") {
    enum { T = TRAINED_TOKENS, n = TRAINED_KEYS, K = 64 };
    float *logits OWNED = trained_logits();
    choice c OWNED_CHOICE = no_choice((int64_t)T * K), next OWNED_CHOICE = no_choice((int64_t)T * (K + 1));
    expect(choose(T, n, K, false, logits, c) == FMOE_OK, "%s", fmoe_error_message());
    expect(choose(T, n, K + 1, false, logits, next) == FMOE_OK, "%s", fmoe_error_message());
    static int load[n * n];
    int chosen = 0, busiest = 0, ties = 0;
    double rows = 0, columns = 0;
    for (int64_t t = 0; t < T; t++) {
        bool row[n] = {false}, column[n] = {false};
        for (int64_t k = 0; k < K; k++) {
            int32_t index = c.indices[t * K + k];
            busiest = ++load[index] > busiest ? load[index] : busiest;
            chosen += load[index] == 1;
            rows += !row[index / n];
            columns += !column[index % n];
            row[index / n] = column[index % n] = true;
        }
        const int32_t *last = next.indices + t * (K + 1) + K - 1;
        const float *x = logits + t * n, *y = logits + (T + t) * n;
        ties += x[last[0] / n] + y[last[0] % n] == x[last[1] / n] + y[last[1] % n];
    }
    expect(chosen == 7080, "%d experts are chosen", chosen);
    expect(busiest == 828, "the busiest is chosen %d times", busiest);
    expect(fabs(rows / T - 33.5) < 0.05, "a token's pairs lie in %.2f rows", rows / T);
    expect(fabs(columns / T - 23.8) < 0.05, "a token's pairs lie in %.2f columns", columns / T);
    expect(fabs((double)ties / T - 0.17) < 0.005, "%.1f %% of the tokens tie at the K-th place", 100.0 * ties / T);
    for (const fmoe_rung *rung = chapter3_rungs; rung->run; rung++) {
        choice d OWNED_CHOICE = no_choice((int64_t)T * K);
        fmoe_status status = choose_by(rung, T, n, K, false, logits, d);
        expect(status == FMOE_UNSUPPORTED || same_bits(c.indices, d.indices, (int64_t)T * K), "%s chooses otherwise",
               rung->name);
    }
}

static const char *at_any_choice(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2], norm = size[3];
    if (K > n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = normals(seed, 0, 2, 2 * T * n);
    choice c OWNED_CHOICE = no_choice(T * K), same OWNED_CHOICE = no_choice(T * K);
    CALL(choose(T, n, K, norm, logits, c));
    CALL(fmoe_topk_at(T, n, K, norm, logits, c.indices, same.scores, same.weights));
    if (!same_bits(c.scores, same.scores, T * K) || !same_bits(c.weights, same.weights, T * K))
        return because("its own choice has other scores or weights");
    for (int64_t k = 0; k < T * K; k++)
        c.indices[k] = (int32_t)(fmoe_random_bits(seed, 1, (uint64_t)k) % (uint64_t)(n * n)); /* repeated ones too */
    CALL(fmoe_topk_at(T, n, K, norm, logits, c.indices, c.scores, NULL));
    CALL(fmoe_topk_at(T, n, K, norm, logits, c.indices, NULL, c.weights));
    return check_values(T, n, K, norm, logits, c);
}

SENTENCE(3, 16, "fmoe_topk_at gives the scores and weights of any choice, its own or one made elsewhere.",
         "what follows a choice can be compared although choices differ", "the formula in long double") {
    for_random_sizes("T n K norm", at_any_choice, 100, (int64_t[]){1, 1, 1, 0}, (int64_t[]){4, 16, 60, 1});
}

SENTENCE(3, 17, "floor(sqrt(N)) is exact next to every square up to 2^62.", "a double holds 53 bits of N's 63",
         "squaring the result") {
    for (int64_t N = -3; N < 1; N++)
        expect(fmoe_num_keys(N) == 0, "num_keys(%lld) = %lld", (long long)N, (long long)fmoe_num_keys(N));
    for (int i = 0; i < 3000; i++) {
        int64_t n = i < 1000 ? i + 1 : (int64_t)(fmoe_random_bits(fresh_seed(), 0, 0) >> (33 + i % 30)) + 1;
        for (int64_t N = n * n - 1; N <= n * n + 1; N++) {
            int64_t root = fmoe_num_keys(N);
            expect(root * root <= N && (root + 1) > N / (root + 1), "num_keys(%lld) = %lld", (long long)N,
                   (long long)root);
        }
    }
    int64_t most = (int64_t)1 << 31;
    expect(fmoe_num_keys(most * most) == most, "num_keys(2^62) = %lld", (long long)fmoe_num_keys(most * most));
    expect(fmoe_num_keys(most * most - 1) == most - 1, "num_keys(2^62 − 1)");
    expect(fmoe_num_keys(INT64_MAX) == 3037000499, "num_keys(2^63 − 1) = %lld", (long long)fmoe_num_keys(INT64_MAX));
}

static const char *rungs_compute_it(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2], type = size[3], norm = size[4];
    if (K > n * n)
        return DOES_NOT_APPLY;
    return rungs_agree(&fmoe_step_topk, ladder, seed, "T%d-n%d-K%d-normal-%s%s", (int)T, (int)n, (int)K,
                       fmoe_dtype_name((fmoe_dtype)type), norm ? "-norm" : "");
}

SENTENCE(3, 18, "Every rung of the ladder computes the same step, for any sizes and types.",
         "a faster rung is only worth its time if it is right",
         "the reference: choices as sets, scores and weights at the rung's own choice") {
    for_sizes("T n K type norm", rungs_compute_it,
              SIZES({0, 3, 2, 0, 0}, {1, 1, 1, 0, 1}, {3, 2, 4, 1, 0}, {29, 13, 6, 2, 1}, {3, 13, 169, 0, 0},
                    {5, 128, 64, 2, 0}, {3, 128, 64, 1, 1}, {2, 320, 512, 0, 1}, {1, 320, 17, 2, 0},
                    {1, 65, 4225, 0, 0}, {2, 129, 65, 0, 0}));
    for_random_sizes("T n K type norm", rungs_compute_it, 100, (int64_t[]){1, 1, 1, 0, 0},
                     (int64_t[]){7, 90, 150, 2, 1});
}

static const char *rungs_repeat_bits(const int64_t *size, uint64_t seed) {
    if (size[2] > size[1] * size[1])
        return DOES_NOT_APPLY;
    return rungs_repeat(&fmoe_step_topk, ladder, seed, "T%d-n%d-K%d-normal-bf16-norm", (int)size[0], (int)size[1],
                        (int)size[2]);
}

static const char *reference_repeats(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2], count = T * K;
    float *logits OWNED = normals(seed, 0, 1, 2 * T * n);
    choice first OWNED_CHOICE = no_choice(count), again OWNED_CHOICE = no_choice(count);
    FOR_THREADS(run) {
        CALL(choose(T, n, K, true, logits, run.turn ? again : first));
        if (run.turn &&
            (!same_bits(first.indices, again.indices, count) || !same_bits(first.scores, again.scores, count) ||
             !same_bits(first.weights, again.weights, count)))
            return because("%d threads give other bits than one", run.threads);
    }
    return HOLDS;
}

SENTENCE(3, 19, "Reference and rungs give the same bits for any number of threads.", "a token has one owner",
         "runs with 1, 2, 3 and 7 threads") {
    for_sizes("T n K", reference_repeats, SIZES({1, 3, 2}, {29, 13, 6}, {40, 40, 64}));
    for_sizes("T n K", rungs_repeat_bits, SIZES({1, 3, 2}, {29, 13, 40}, {67, 128, 64}));
}

SENTENCE(3, 20, "Bad arguments are named, each with its status; without tokens nothing is written.",
         "a library neither prints nor exits", "the contract") {
    float logits[16] = {0}, scores[8] = {0}, weights[8] = {0};
    int32_t indices[8] = {0};
    refused(fmoe_topk(-1, 4, 2, false, logits, indices, scores, weights), FMOE_BAD_SIZE, "tokens = -1");
    refused(fmoe_topk(2, 0, 2, false, logits, indices, scores, weights), FMOE_BAD_SIZE, "num_keys = 0");
    refused(fmoe_topk(2, 4, 0, false, logits, indices, scores, weights), FMOE_BAD_TOPK, "num_experts_per_tok = 0");
    refused(fmoe_topk(2, 4, 17, false, logits, indices, scores, weights), FMOE_BAD_TOPK,
            "num_experts_per_tok = 17 exceeds n² = 16");
    refused(fmoe_topk(2, 46341, 2, false, logits, indices, scores, weights), FMOE_OVERFLOW, "num_keys = 46341");
    refused(fmoe_topk(INT64_MAX / 8, 4, 2, false, logits, indices, scores, weights), FMOE_OVERFLOW, "tokens");
    refused(fmoe_topk(2, 4, 2, false, NULL, indices, scores, weights), FMOE_NULL_POINTER, "router_logits");
    refused(fmoe_topk(2, 4, 2, false, logits, NULL, scores, weights), FMOE_NULL_POINTER, "indices");
    refused(fmoe_topk_at(2, 4, 2, false, logits, NULL, scores, weights), FMOE_NULL_POINTER, "indices");
    indices[3] = 16;
    refused(fmoe_topk_at(2, 4, 2, false, logits, indices, scores, weights), FMOE_BAD_INDEX, "16");
    indices[3] = -1;
    refused(fmoe_topk_at(2, 4, 2, false, logits, indices, scores, weights), FMOE_BAD_INDEX, "-1");
    for (int i = 0; i < 8; i++)
        expect(scores[i] == 0 && weights[i] == 0, "a failed call wrote something");
    expect(fmoe_topk(0, 4, 2, false, NULL, NULL, NULL, NULL) == FMOE_OK, "T = 0: %s", fmoe_error_message());
    expect(fmoe_topk(2, 4, 2, false, logits, indices, NULL, NULL) == FMOE_OK, "indices only: %s", fmoe_error_message());
    expect(indices[1] == 1 && indices[3] == 1, "indices only: chose %d and %d", indices[1], indices[3]);
}

/* ---- On the GPU -------------------------------------------------------------------------------------------------- */

CUDA_SENTENCE(3, 21, "Every GPU rung chooses the K best of all n² pairs, best first, when sums are exact.",
              "ties, K > n, K = n² and one key are where a kernel's corners are", "a full sort of all pairs") {
    ladder = cuda_topk_rungs;
    for_sizes("T n K kinds", k_best_of_all,
              SIZES({1, 1, 1, 5}, {3, 4, 16, 9}, {7, 13, 6, 1000}, {2, 13, 169, 30}, {2, 64, 100, 100000},
                    {2, 100, 64, 1000000}, {1, 70, 700, 50}, {1, 2, 3, 1}, {5, 128, 64, 40}, {1, 300, 512, 3000},
                    {1, 65, 4096, 200}, {1, 64, 4096, 3}, {3, 129, 33, 100000}));
    for_random_sizes("T n K kinds", k_best_of_all, 300, (int64_t[]){1, 1, 1, 1}, (int64_t[]){5, 40, 200, 60});
    for_sizes("T n K", equal_logits,
              SIZES({1, 1, 1}, {3, 4, 4}, {2, 13, 6}, {5, 128, 64}, {2, 9, 30}, {1, 16, 256}, {1, 300, 512}));
    for_random_sizes("n K", ties_by_index, 200, (int64_t[]){1, 1}, (int64_t[]){24, 300});
    for_sizes("n", any_k, SIZES({1}, {2}, {3}, {5}));
}

CUDA_SENTENCE(3, 22,
              "On the GPU too the rule decides where rounding makes sums equal, for infinities, NaN and subnormals.",
              "reference, CPU and GPU must choose alike", "the rule, written again from scratch") {
    ladder = cuda_topk_rungs;
    for_sizes("T n K", rounded_sums, SIZES({3, 4, 7}, {2, 40, 64}, {1, 100, 33}, {5, 128, 64}, {1, 130, 600}));
    for_random_sizes("T n K", rounded_sums, 200, (int64_t[]){1, 1, 1}, (int64_t[]){5, 40, 200});
    for_sizes("T n K", wild_logits, SIZES({1, 1, 1}, {2, 2, 4}, {3, 40, 64}, {3, 128, 64}, {1, 90, 700}));
    for_random_sizes("T n K", wild_logits, 300, (int64_t[]){1, 1, 1}, (int64_t[]){5, 30, 150});
    for_random_sizes("T n K", infinite_logits, 200, (int64_t[]){1, 1, 1}, (int64_t[]){5, 16, 60});
    for_sizes("n K alive norm", dead_keys,
              SIZES({2, 4, 1, 0}, {13, 9, 3, 1}, {13, 20, 4, 1}, {40, 64, 5, 0}, {128, 64, 2, 0}));
    for_sizes("n K", tiny_logits, SIZES({4, 7}, {13, 40}, {70, 64}, {2, 1}, {128, 64}));
}

/* Normal logits, of which many are equal once they are stored, and infinite or NaN ones among them. */
static const char *rule_in_16_bits(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2];
    if (K > n * n)
        return DOES_NOT_APPLY;
    storage = size[3] ? FMOE_BF16 : FMOE_F16;
    float *drawn OWNED = size[4] ? wild_numbers(seed, 2 * T * n) : normals(seed, 0, 1, 2 * T * n);
    float *logits OWNED = floats(2 * T * n);
    uint16_t *narrow OWNED = poisoned(2 * T * n, sizeof *narrow);
    fmoe_from_f32(storage, 2 * T * n, drawn, narrow);
    fmoe_to_f32(storage, 2 * T * n, narrow, logits);
    return all_choose_by_rule(T, n, K, false, logits);
}

CUDA_SENTENCE(3, 23, "The rule holds for logits stored in float16 and bfloat16, with what a NaN looks like there.",
              "16-bit keys fit other registers than 32-bit ones, so they take other paths",
              "the rule on the stored values, written again from scratch") {
    ladder = cuda_topk_rungs;
    for_sizes("T n K bf16 wild", rule_in_16_bits,
              SIZES({1, 1, 1, 0, 0}, {3, 13, 20, 1, 0}, {5, 128, 64, 1, 0}, {5, 128, 64, 0, 1}, {2, 256, 32, 1, 1},
                    {1, 320, 512, 0, 0}, {7, 100, 16, 1, 1}));
    for_random_sizes("T n K bf16 wild", rule_in_16_bits, 300, (int64_t[]){1, 1, 1, 0, 0},
                     (int64_t[]){5, 40, 150, 1, 1});
}

CUDA_SENTENCE(3, 24,
              "On the GPU a token with a NaN or +∞ logit gets NaN weights and legal indices, and no other is touched.",
              "tokens share warps and blocks, and must not notice", "the same batch without it") {
    ladder = cuda_topk_rungs;
    for_random_sizes("T n K norm", token_alone, 150, (int64_t[]){1, 1, 1, 0}, (int64_t[]){19, 40, 70, 1});
    for_sizes("T n K norm", token_alone, SIZES({33, 128, 64, 0}, {9, 256, 32, 1}, {3, 320, 512, 0}, {5, 50, 700, 1}));
}

CUDA_SENTENCE(3, 25, "Every GPU rung computes choices, scores and weights, for n up to 1,024 and K up to 4,096.",
              "each size has its own registers and shared memory",
              "the reference: choices as sets, scores and weights at the rung's own choice") {
    ladder = cuda_topk_rungs;
    for_sizes("T n K type norm", rungs_compute_it,
              SIZES({0, 3, 2, 0, 0}, {1, 1, 1, 0, 1}, {3, 2, 4, 1, 0}, {29, 13, 6, 2, 1}, {3, 13, 169, 0, 0},
                    {5, 128, 64, 2, 0}, {3, 128, 64, 1, 1}, {2, 320, 512, 0, 1}, {1, 320, 17, 2, 0},
                    {1, 64, 4096, 0, 0}, {2, 129, 65, 0, 0}, {3, 1024, 1, 0, 0}, {3, 1024, 64, 2, 1},
                    {2, 1024, 4096, 0, 0}, {2, 1023, 4095, 1, 1}, {257, 128, 16, 0, 0}, {1001, 64, 8, 2, 0},
                    {65, 256, 32, 2, 1}, {33, 128, 128, 0, 1}, {9, 200, 200, 0, 0}, {5, 513, 1000, 2, 0},
                    {70000, 8, 2, 0, 0}, {9001, 128, 64, 2, 0}, {20011, 36, 5, 0, 1}));
    for_random_sizes("T n K type norm", rungs_compute_it, 200, (int64_t[]){1, 1, 1, 0, 0},
                     (int64_t[]){40, 200, 300, 2, 1});
}

/* Are the GPU's scores and weights those of its indices, each by itself, however small? */
static const char *public_values(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2], norm = size[3], spread = size[4];
    if (K > n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = normals(seed, 0, (double)spread, 2 * T * n);
    choice c OWNED_CHOICE = no_choice(T * K), only OWNED_CHOICE = no_choice(T * K);
    CALL(gpu_topk(FMOE_F32, T, n, K, norm, logits, c.indices, c.scores, c.weights));
    CALL(gpu_topk(FMOE_F32, T, n, K, norm, logits, only.indices, NULL, NULL));
    if (!same_bits(c.indices, only.indices, T * K))
        return because("without scores and weights it chooses otherwise");
    CHECK(compare_choice(T, n, K, true, logits, c.indices));
    float *scores OWNED = floats(T * K), *weights OWNED = floats(T * K);
    CALL(fmoe_topk_at(T, n, K, norm, logits, c.indices, scores, weights));
    for (int64_t k = 0; k < T * K; k++) {
        /* A score is rounded to 24 bits a few times; its error is the weight's relative one. */
        float step = 4e-7f * (1 + fabsf(scores[k]) + (float)spread);
        if (!(fabsf(c.scores[k] - scores[k]) <= step))
            return because("place %d: score %.9g, should be %.9g", (int)k, c.scores[k], scores[k]);
        if (!(fabsf(c.weights[k] - weights[k]) <= 3 * step * weights[k] + 1e-37f))
            return because("place %d: weight %.9g, should be %.9g", (int)k, c.weights[k], weights[k]);
    }
    return HOLDS;
}

CUDA_SENTENCE(3, 26, "fmoe_cuda_topk's scores and weights are right one by one, large or tiny; both are optional.",
              "a norm over all of them forgives the small ones", "the formula in double at the choice") {
    for_sizes("T n K norm spread", public_values,
              SIZES({1, 1, 1, 0, 1}, {5, 13, 30, 1, 3}, {9, 128, 64, 0, 1}, {9, 128, 64, 1, 20}, {3, 320, 512, 0, 8},
                    {2, 100, 2000, 1, 2}, {33, 256, 32, 1, 5}));
    for_random_sizes("T n K norm spread", public_values, 150, (int64_t[]){1, 1, 1, 0, 1},
                     (int64_t[]){9, 60, 150, 1, 20});
}

CUDA_SENTENCE(3, 27, "Every GPU rung chooses the reference's very pairs for a trained model's 4,096 tokens.",
              "17 % of them tie at the K-th place, where a rule that is not kept shows", "the reference, bit by bit") {
    enum { T = TRAINED_TOKENS, n = TRAINED_KEYS, K = 64 };
    float *logits OWNED = trained_logits();
    choice c OWNED_CHOICE = no_choice((int64_t)T * K);
    expect(choose(T, n, K, false, logits, c) == FMOE_OK, "%s", fmoe_error_message());
    static const fmoe_dtype types[] = {FMOE_F32, FMOE_BF16}; /* the file's own type, and a wider one */
    for (int i = 0; i < 2; i++)
        for (const fmoe_rung *rung = cuda_topk_rungs; rung->run; rung++) {
            storage = types[i];
            choice d OWNED_CHOICE = no_choice((int64_t)T * K);
            fmoe_status status = choose_by(rung, T, n, K, false, logits, d);
            expect(status == FMOE_OK || status == FMOE_UNSUPPORTED, "%s: %s", rung->name, fmoe_error_message());
            expect(status == FMOE_UNSUPPORTED || same_bits(c.indices, d.indices, (int64_t)T * K),
                   "%s chooses otherwise", rung->name);
        }
}

CUDA_SENTENCE(3, 28, "Every GPU rung of the top-k writes the same bits in every run.", "a token has one owner",
              "three runs") {
    ladder = cuda_topk_rungs;
    for_sizes("T n K", rungs_repeat_bits,
              SIZES({1, 3, 2}, {29, 13, 40}, {1037, 128, 64}, {300, 256, 32}, {50, 320, 512}, {4001, 40, 7}));
}

CUDA_SENTENCE(3, 29,
              "A top-k depends on its arguments alone: captured in a graph and replayed, or beside another call.",
              "no hidden state, no wait, no memory of its own",
              "the reference on data that the capture has not seen; two streams that start together") {
    static const char *const cases[] = {"T129-n13-K6-normal-f32", "T1000-n128-K64-normal-bf16-norm",
                                        "T50-n320-K512-normal-f32", "T20-n100-K3000-normal-f16"};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *wrong = rungs_replay(&fmoe_step_topk, cuda_topk_rungs, fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
        wrong = rungs_side_by_side(&fmoe_step_topk, cuda_topk_rungs, fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
    }
}

CUDA_HOST_SENTENCE(3, 30, "The GPU's top-k names bad arguments and its own limits before it launches anything.",
                   "n = 1,025 is legal and unsupported, K = n² + 1 is neither", "the contract") {
    float m[16] = {0};
    int32_t indices[8] = {0};
    const size_t plenty = (size_t)1 << 40;
#define TOPK(T, n, K, dtype, logits, indices, workspace, bytes)                                                        \
    fmoe_cuda_topk(T, n, K, false, dtype, logits, indices, m, m, workspace, bytes, NULL)
    refused(TOPK(-1, 4, 2, FMOE_F32, m, indices, m, plenty), FMOE_BAD_SIZE, "tokens = -1");
    refused(TOPK(2, 0, 2, FMOE_F32, m, indices, m, plenty), FMOE_BAD_SIZE, "num_keys = 0");
    refused(TOPK(2, 4, 0, FMOE_F32, m, indices, m, plenty), FMOE_BAD_TOPK, "num_experts_per_tok = 0");
    refused(TOPK(2, 4, 17, FMOE_F32, m, indices, m, plenty), FMOE_BAD_TOPK, "num_experts_per_tok = 17 exceeds n² = 16");
    refused(TOPK(2, 1025, 2, FMOE_F32, m, indices, m, plenty), FMOE_UNSUPPORTED, "num_keys = 1025");
    refused(TOPK(2, 128, 4097, FMOE_F32, m, indices, m, plenty), FMOE_UNSUPPORTED, "num_experts_per_tok = 4097");
    refused(TOPK(2, 46341, 2, FMOE_F32, m, indices, m, plenty), FMOE_UNSUPPORTED, "num_keys = 46341");
    refused(TOPK(INT64_MAX / 8, 4, 2, FMOE_F32, m, indices, m, plenty), FMOE_OVERFLOW, "tokens");
    refused(TOPK(2, 4, 2, FMOE_I64, m, indices, m, plenty), FMOE_UNSUPPORTED, "dtype = 4");
    refused(TOPK(2, 4, 2, FMOE_F32, NULL, indices, m, plenty), FMOE_NULL_POINTER, "router_logits");
    refused(TOPK(2, 4, 2, FMOE_F32, m, NULL, m, plenty), FMOE_NULL_POINTER, "indices");
    size_t needed = fmoe_cuda_topk_workspace(2, 4, 2, FMOE_F32);
    if (needed > 0) {
        refused(TOPK(2, 4, 2, FMOE_F32, m, indices, m, needed - 1), FMOE_BAD_WORKSPACE, "workspace_bytes");
        refused(TOPK(2, 4, 2, FMOE_F32, m, indices, NULL, needed), FMOE_NULL_POINTER, "workspace");
    }
    expect(TOPK(0, 4, 2, FMOE_F32, NULL, NULL, m, plenty) == FMOE_OK, "T = 0: %s", fmoe_error_message());
#undef TOPK
}
