/* Chapter 7: four strategies for one expert step, and the rule that chooses between them. */
#include "values.h"

#include "../chapters/7-strategies/strategies.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* "T d N K" to a problem of float32. */
static fmoe_problem problem_of(const int64_t *size, const char *routing, uint64_t seed) {
    return new_problem(&fmoe_step_expert, seed, "T%lld-d%lld-N%lld-K%lld-%s-f32", (long long)size[0],
                       (long long)size[1], (long long)size[2], (long long)size[3], routing);
}
#define PROBLEM FREED(fmoe_problem_free)

/* What a rung writes, in memory of its own; NULL if it refuses. */
static float *run(const fmoe_rung *rung, const fmoe_expert_args *args) {
    fmoe_expert_args a = *args;
    float *y = floats(a.T * a.d);
    a.y = y;
    size_t bytes = rung->workspace(&a);
    void *workspace OWNED = workspace_of(bytes);
    if (rung->run(&a, workspace, bytes, NULL) == FMOE_OK)
        return y;
    free(y);
    return NULL;
}

static int32_t *indices_of(const fmoe_problem *p) {
    return fmoe_problem_find(p, "indices")->data;
}

/* ---- All the same function --------------------------------------------------------------------------------------- */

static const char *const dtypes[] = {"f32", "f16", "bf16"};

static const char *agree(const char *routing, const int64_t *size, uint64_t seed) {
    if (size[3] > size[2])
        return DOES_NOT_APPLY;
    for (int t = 0; t < 3; t++)
        CHECK(rungs_agree(&fmoe_step_expert, chapter7_rungs, seed, "T%lld-d%lld-N%lld-K%lld-%s-%s", (long long)size[0],
                          (long long)size[1], (long long)size[2], (long long)size[3], routing, dtypes[t]));
    return HOLDS;
}

static const char *agree_uniform(const int64_t *size, uint64_t seed) {
    return agree("uniform", size, seed);
}

static const char *agree_hot(const int64_t *size, uint64_t seed) {
    return agree("hot", size, seed);
}

static const char *agree_normal(const int64_t *size, uint64_t seed) {
    int64_t n = fmoe_num_keys(size[2]);
    return size[3] > n * n ? DOES_NOT_APPLY : agree("normal", size, seed);
}

SENTENCE(7, 1, "Every strategy computes the expert step, on uniform, hot and the router's own routing, in three types.",
         "the same function by other ways", "the reference") {
    for_sizes("T d N K", agree_uniform, SIZES({37, 24, 100, 7}, {300, 40, 1000, 20}));
    for_sizes("T d N K", agree_hot, SIZES({300, 16, 600, 9}));
    for_sizes("T d N K", agree_normal, SIZES({37, 24, 100, 7}, {260, 32, 256, 64}));
}

SENTENCE(7, 2, "The same on a trained model's routing, where some experts are busy and most idle.",
         "skew is the ordinary case", "the reference") {
    const char *why = rungs_agree(&fmoe_step_expert, chapter7_rungs, fresh_seed(), "T96-d16-N16384-K64-trained-f32");
    expect(why == HOLDS, "%s", why);
}

SENTENCE(7, 3, "Any sizes: no tokens, one of everything, K = N, N that is no square, experts chosen twice.",
         "the operator takes any indices, and tiles have edges", "the reference") {
    for_sizes("T d N K", agree_uniform,
              SIZES({0, 3, 4, 2}, {1, 1, 1, 1}, {3, 1, 2, 2}, {5, 7, 3, 3}, {13, 33, 17, 17}, {29, 72, 170, 6},
                    {241, 5, 99, 40}, {2, 300, 259, 100}));
}

/* ---- What nobody chose ------------------------------------------------------------------------------------------- */

/* Poisons the experts that `spoil` picks: both rows become NaN or infinity. */
static void poison(const fmoe_problem *p, const bool *spoil) {
    const fmoe_expert_args *a = p->args;
    float *down = fmoe_problem_find(p, "down")->data, *up = fmoe_problem_find(p, "up")->data;
    for (int64_t e = 0; e < a->N; e++)
        for (int64_t i = 0; spoil[e] && i < a->d; i++) {
            down[e * a->d + i] = e % 2 ? NAN : INFINITY;
            up[e * a->d + i] = e % 3 ? NAN : -INFINITY;
        }
}

static const char *unchosen_stay_out(const int64_t *size, uint64_t seed) {
    fmoe_problem p PROBLEM = problem_of(size, "uniform", seed);
    const fmoe_expert_args *a = p.args;
    bool *idle OWNED = poisoned(a->N, sizeof *idle);
    memset(idle, true, (size_t)a->N);
    for (int64_t i = 0; i < a->T * a->K; i++)
        idle[a->indices[i]] = false;
    poison(&p, idle);
    return rungs_right(chapter7_rungs, &p);
}

SENTENCE(7, 4, "An expert that nobody chose may hold NaN or infinity: it does not reach y.",
         "a mask must select; a product with zero would not do", "the reference on the tables as they were") {
    for_sizes("T d N K", unchosen_stay_out, SIZES({1, 3, 9, 1}, {5, 8, 40, 3}, {40, 20, 700, 6}, {3, 8, 3000, 5}));
}

static const char *bad_expert_stays_with_its_tokens(const int64_t *size, uint64_t seed) {
    fmoe_problem p PROBLEM = problem_of(size, "uniform", seed);
    const fmoe_expert_args *a = p.args;
    bool *spoiled OWNED = zeros(a->N, sizeof *spoiled);
    int32_t bad = a->indices[0];
    spoiled[bad] = true;
    for (int s = 0; s < NUM_STRATEGIES; s++) {
        float *before OWNED = run(&chapter7_rungs[s], a);
        if (s == 0)
            poison(&p, spoiled);
        float *after OWNED = run(&chapter7_rungs[s], a);
        if (!before || !after)
            return because("%s refuses", chapter7_rungs[s].name);
        for (int64_t t = 0; t < a->T; t++) {
            bool chose = false;
            for (int64_t k = 0; k < a->K; k++)
                chose |= a->indices[t * a->K + k] == bad;
            for (int64_t i = 0; i < a->d; i++)
                if (isfinite(after[t * a->d + i]) == chose)
                    return because("%s: token %d %s expert %d, y[%d] = %g", chapter7_rungs[s].name, (int)t,
                                   chose ? "chose" : "did not choose", bad, (int)i, (double)after[t * a->d + i]);
        }
    }
    return HOLDS;
}

SENTENCE(7, 5, "A broken expert spoils the tokens that chose it and no other, by every strategy.",
         "tokens are independent of each other", "who chose it") {
    for_sizes("T d N K", bad_expert_stays_with_its_tokens,
              SIZES({2, 3, 9, 1}, {9, 8, 40, 3}, {40, 20, 700, 6}, {3, 8, 3000, 5}));
}

/* ---- Cartesian rows ---------------------------------------------------------------------------------------------- */

/* What the counting half of Cartesian rows finds in a problem. */
static fmoe_status rows_of(const fmoe_problem *p, row_counts *counts) {
    void *workspace OWNED = workspace_of(rows_workspace(p->args));
    return count_rows(p->args, workspace, counts);
}

static const char *groups_counted(const int64_t *size, uint64_t seed) {
    if (size[2] > size[1])
        return DOES_NOT_APPLY;
    fmoe_problem p PROBLEM = problem_of((int64_t[]){size[0], 1, size[1], size[2]}, "uniform", seed);
    const fmoe_expert_args *a = p.args;
    int64_t n = (int64_t)floor(sqrt((double)a->N)), rows = (a->N + n - 1) / n;
    row_counts expected = {0, 0}, counts = {-1, -1};
    for (int64_t t = 0; t < a->T; t++)
        for (int64_t row = 0; row < rows; row++) {
            bool any = false;
            for (int64_t k = 0; k < a->K; k++)
                any |= a->indices[t * a->K + k] / n == row;
            expected.groups += any;
            expected.products += any ? ((row + 1) * n < a->N ? n : a->N - row * n) : 0;
        }
    if (rows_of(&p, &counts) != FMOE_OK || counts.groups != expected.groups || counts.products != expected.products)
        return because("%lld groups and %lld products, there are %lld and %lld", (long long)counts.groups,
                       (long long)counts.products, (long long)expected.groups, (long long)expected.products);
    return HOLDS;
}

SENTENCE(7, 6, "Cartesian rows forms a tile row for each distinct (token, e / n), and for no other.",
         "its cost is groups × n products, not T × N", "looking for each row among each token's experts") {
    for_sizes("T N K", groups_counted,
              SIZES({0, 9, 2}, {1, 1, 1}, {1, 9, 9}, {20, 16, 5}, {50, 170, 6}, {9, 1023, 64}));
}

static double rows_a_token(const char *name, double *model) {
    fmoe_problem p PROBLEM = new_problem(&fmoe_step_expert, fresh_seed(), "%s", name);
    row_counts counts = {0, 0};
    *model = strategy_rows_a_token(p.args);
    return rows_of(&p, &counts) == FMOE_OK ? (double)counts.groups / (double)p.c.T : NAN;
}

SENTENCE(7, 7, "64 experts of a router's choice lie in about 18 of the 128 rows, 64 drawn uniformly in about 50.",
         "pairs that share a good key cluster, and Cartesian rows lives on it",
         "n · (1 − (1 − 1/n)^K) for uniform draws; a count for the router's; the model of either") {
    double model, uniform = rows_a_token("T1000-d1-N16384-K64-uniform-f32", &model);
    double exact = 128 * (1 - pow(1 - 1.0 / 128, 64));
    expect(fabs(uniform - exact) < 1, "uniform: %.1f rows, expected are %.1f", uniform, exact);
    expect(fabs(model - exact) < 1, "uniform: the model says %.1f rows, expected are %.1f", model, exact);
    double normal = rows_a_token("T2000-d1-N16384-K64-normal-f32", &model);
    expect(fabs(normal - 18) < 1.5, "normal: %.1f rows", normal);
    expect(fabs(model / normal - 1) < 0.15, "normal: the model says %.1f rows, there are %.1f", model, normal);
    normal = rows_a_token("T1000-d1-N1024-K256-normal-f32", &model);
    expect(fabs(model / normal - 1) < 0.15, "N 1024, K 256: the model says %.1f rows, there are %.1f", model, normal);
}

/* ---- The chooser ------------------------------------------------------------------------------------------------- */

/* The chapter's cost table once more, written down from the text and not from the code. Nanoseconds. */
static double row_cost(double d, double size, double rows) {
    double bytes = rows * d * size;
    double l2 = bytes > 1e6 ? 1e6 / bytes : 1, cached = bytes > 12e6 ? 12e6 / bytes : 1;
    return d * (size > 2 ? 0.035 : 0.045) + d * size * ((cached - l2) * 0.009 + (1 - cached) * 0.03);
}

static double cost(strategy s, const fmoe_expert_args *a) {
    double T = (double)a->T, N = (double)a->N, K = (double)a->K, d = (double)a->d, P = T * K;
    double size = a->dtype == FMOE_F32 ? 4 : 2, n = floor(sqrt(N));
    double throws = a->from_router && 1.1 * pow(K, 0.7) < K ? 1.1 * pow(K, 0.7) : K;
    double products = T * n * n * (1 - exp(-throws / n));
    if (s == STRATEGY_TOKEN)
        return P * 6 + 2 * P * row_cost(d, size, N);
    if (s == STRATEGY_EXPERT)
        return 0.4 * N + (P < N ? P : N) * d * size * 0.03 + P * (9 + row_cost(d, size, T) + row_cost(d, size, N));
    if (s == STRATEGY_DENSE)
        return 0.02 * T * N * d + N * d + 6 * P;
    return 0.01 * products * d + 0.5 * (products < N ? products : N) * d + P * (15 + row_cost(d, size, N));
}

static fmoe_expert_args random_args(void) {
    fmoe_expert_args a = {.T = 1 + (int64_t)exp2((double)(fresh_seed() % 1400) / 100)};
    a.d = 1 + (int64_t)(fresh_seed() % 2000);
    a.N = 1 + (int64_t)exp2((double)(fresh_seed() % 1700) / 100);
    a.K = 1 + (int64_t)pow((double)(a.N - 1), (double)(fresh_seed() % 1000) / 999);
    a.K = a.K > a.N ? a.N : a.K;
    a.dtype = (fmoe_dtype)(fresh_seed() % 3);
    a.from_router = fresh_seed() % 2;
    return a;
}

SENTENCE(7, 8, "The chooser takes the strategy that the chapter's cost table says is cheapest.",
         "the rule is stated, so a reader can predict it", "the table, evaluated a second time") {
    int64_t taken[NUM_STRATEGIES] = {0};
    for (int i = 0; i < 2000; i++) {
        fmoe_expert_args a = random_args();
        strategy best = STRATEGY_TOKEN, chosen = strategy_choose(&a);
        for (strategy s = 0; s < NUM_STRATEGIES; s++) {
            best = cost(s, &a) < cost(best, &a) ? s : best;
            double us = strategy_cost_us(s, &a);
            expect(fabs(us * 1e3 / cost(s, &a) - 1) < 1e-9, "%s at T %d, d %d, N %d, K %d: %g µs, the table says %g",
                   strategy_names[s], (int)a.T, (int)a.d, (int)a.N, (int)a.K, us, 1e-3 * cost(s, &a));
        }
        expect(chosen == best || cost(chosen, &a) <= cost(best, &a) * (1 + 1e-9),
               "T %d, d %d, N %d, K %d: chose %s, cheapest is %s", (int)a.T, (int)a.d, (int)a.N, (int)a.K,
               strategy_names[chosen], strategy_names[best]);
        taken[chosen]++;
    }
    expect(taken[STRATEGY_TOKEN] && taken[STRATEGY_EXPERT] && taken[STRATEGY_DENSE], "a strategy is never taken");
}

static const char *takes_what_it_names(const int64_t *size, uint64_t seed) {
    fmoe_problem p PROBLEM = problem_of(size, "uniform", seed);
    fmoe_expert_args a = *(fmoe_expert_args *)p.args;
    for (int hint = 0; hint < 2; hint++) {
        a.from_router = hint;
        strategy s = strategy_choose(&a);
        float *chosen OWNED = run(&chapter7_rungs[NUM_STRATEGIES], &a), *named OWNED = run(&chapter7_rungs[s], &a);
        if (!chosen || !named || !same_bits(chosen, named, a.T * a.d))
            return because("it names %s and writes other bits", strategy_names[s]);
    }
    return HOLDS;
}

SENTENCE(7, 9, "The chooser writes the bits of the strategy that it names.", "it adds nothing of its own",
         "a run of that strategy") {
    for_sizes("T d N K", takes_what_it_names,
              SIZES({1, 16, 100, 4}, {16, 64, 4096, 8}, {300, 32, 64, 32}, {200, 300, 900, 100}));
}

static const char *hint_is_a_hint(const int64_t *size, uint64_t seed) {
    fmoe_problem p PROBLEM = problem_of(size, "normal", seed);
    fmoe_expert_args *a = p.args;
    for (const fmoe_rung *rung = chapter7_rungs; rung->run; rung++) {
        a->from_router = true;
        float *with OWNED = run(rung, a);
        a->from_router = false;
        float *without OWNED = run(rung, a);
        double error = with && without ? fmoe_relative_error(a->T * a->d, with, without, 0) : INFINITY;
        if (rung - chapter7_rungs < NUM_STRATEGIES ? error != 0 : !(error <= fmoe_error_limit(FMOE_F32)))
            return because("%s: the hint moves y by %g", rung->name, error);
    }
    return HOLDS;
}

SENTENCE(7, 10, "The hint that indices come from the router changes speed, never a result.",
         "a caller may be wrong about it", "the run without it") {
    for_sizes("T d N K", hint_is_a_hint, SIZES({1, 8, 16, 4}, {50, 24, 256, 16}, {64, 200, 1024, 256}));
    bool matters = false;
    for (int i = 0; i < 200 && !matters; i++) {
        fmoe_expert_args a = random_args(), b = a;
        b.from_router = !a.from_router;
        matters = strategy_cost_us(STRATEGY_ROWS, &a) != strategy_cost_us(STRATEGY_ROWS, &b);
    }
    expect(matters, "the hint changes no cost at all");
}

SENTENCE(7, 11, "The choice depends on sizes, type and hint alone: not on the indices, not on the number of threads.",
         "another choice would give other bits", "the same call with other indices and other threads") {
    for (int i = 0; i < 50; i++) {
        fmoe_expert_args a = random_args(), b = a;
        int32_t index = 0;
        b.indices = &index;
        strategy one = STRATEGY_TOKEN;
        FOR_THREADS(run) {
            strategy any = strategy_choose(run.turn ? &b : &a);
            one = run.turn ? one : any;
            expect(any == one, "%s with one thread, %s with %d", strategy_names[one], strategy_names[any], run.threads);
        }
    }
}

/* ---- Threads, memory, bad input ---------------------------------------------------------------------------------- */

static const char *repeat_uniform(const int64_t *size, uint64_t seed) {
    return rungs_repeat(&fmoe_step_expert, chapter7_rungs, seed, "T%lld-d%lld-N%lld-K%lld-uniform-%s",
                        (long long)size[0], (long long)size[1], (long long)size[2], (long long)size[3],
                        dtypes[seed % 3]);
}

SENTENCE(7, 12, "Every strategy writes the same bits with 1, 2, 3 and 7 threads, and again on a second run.",
         "each output belongs to one thread, and each sum has one order", "the run with one thread") {
    for_sizes("T d N K", repeat_uniform, SIZES({3, 5, 10, 4}, {70, 33, 300, 12}, {520, 16, 600, 30}));
}

SENTENCE(7, 13, "Dense and Cartesian rows work in tiles: neither keeps T × N floats.",
         "4096 tokens and 16384 experts would be 268 MB", "the workspace they ask for") {
    fmoe_expert_args a = {.T = 4096, .d = 64, .N = 16384, .K = 16, .dtype = FMOE_F32};
    size_t all = (size_t)(a.T * a.N) * sizeof(float);
    expect(dense_workspace(&a) < all / 8, "dense asks for %zu bytes", dense_workspace(&a));
    expect(rows_workspace(&a) < all / 8, "Cartesian rows asks for %zu bytes", rows_workspace(&a));
    for (a.T = 1; a.T <= 1000; a.T *= 10)
        expect(dense_workspace(&a) < (size_t)48 << 20, "T %d: dense asks for %zu bytes", (int)a.T, dense_workspace(&a));
}

static const char *bad_index_refused(const int64_t *size, uint64_t seed) {
    fmoe_problem p PROBLEM = problem_of((int64_t[]){9, 4, 50, 3}, "uniform", seed);
    int32_t *indices = indices_of(&p);
    int64_t at = (int64_t)(seed % 27);
    indices[at] = (int32_t)size[0] - 1;
    for (int s = STRATEGY_DENSE; s <= STRATEGY_ROWS; s++) {
        float *y OWNED = run(&chapter7_rungs[s], p.args);
        if (y)
            return because("%s takes index %d of 50 experts at pair %d", strategy_names[s], indices[at], (int)at);
    }
    return HOLDS;
}

SENTENCE(7, 14, "Dense and Cartesian rows refuse an index outside [0, N).", "they sort before they read",
         "the status") {
    for_sizes("index", bad_index_refused, SIZES({0}, {51}, {64}, {1000000000}));
}
