/* Chapter 7: strategies. The ladder at a few cases, then a map of which strategy wins where. */
#include "strategies.h"

#include <math.h>
#include <stdlib.h>

static const char *const cases[] = {
    "T1024-d256-N16384-K64-normal-f32",
    "T256-d256-N16384-K1024-normal-f32",
    "T256-d256-N16384-K4096-uniform-f32",
    NULL,
};
static const char *const quick_cases[] = {
    "T256-d128-N16384-K64-normal-f32",
    "T256-d128-N4096-K2048-uniform-f32",
    NULL,
};
static const fmoe_ladder ladders[] = {
    {.step = &fmoe_step_expert, .rungs = chapter7_rungs, .cases = cases, .quick_cases = quick_cases},
    {0},
};

/* ---- The crossover map ------------------------------------------------------------------------------------------- */

enum { MAP_D = 128, MAP_N = 16384, MAX_RUNS = 9 };

static const int64_t tokens[] = {256, 32, 4}, quick_tokens[] = {32, 4};
static const int64_t chosen[] = {64, 512, 2048, 4096, 8192}, quick_chosen[] = {64, 2048, 8192};
static const char *const routings[] = {"uniform", "normal", "trained"};
#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

static int by_time(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

/* Few runs, after the checked one: a map needs to know who wins, not by how many percent. */
static fmoe_timing time_briefly(const fmoe_rung *rung, const void *args, void *workspace, size_t bytes) {
    double ms[MAX_RUNS], spent = 0;
    int runs = 0;
    while (runs < MAX_RUNS && (runs == 0 || spent < 10)) {
        double start = fmoe_now_ms();
        rung->run(args, workspace, bytes, NULL);
        ms[runs] = fmoe_now_ms() - start;
        spent += ms[runs++];
    }
    qsort(ms, (size_t)runs, sizeof *ms, by_time);
    return (fmoe_timing){.median_ms = ms[runs / 2], .min_ms = ms[0], .max_ms = ms[runs - 1], .runs = runs};
}

/* Checks and times one strategy; false if it is wrong or there is no memory. */
static bool measure(strategy s, fmoe_problem *p, double *ms) {
    const fmoe_rung *rung = &chapter7_rungs[s];
    char why[256];
    double error;
    size_t bytes = rung->workspace(p->args);
    void *workspace = aligned_alloc(256, (bytes + 511) / 256 * 256);
    bool ok = workspace && fmoe_rung_check(rung, p, &error, why) == FMOE_OK && error <= fmoe_error_limit(p->c.dtype);
    if (ok) {
        fmoe_timing timing = time_briefly(rung, p->args, workspace, bytes);
        fmoe_work work = p->step->work(p, fmoe_machine_ceilings());
        fmoe_csv_row("crossover", p->c.name, rung->name, rung->level, rung->backend, p->c.dtype, timing, error, work);
        *ms = timing.median_ms;
    } else {
        printf("\n%s at %s FAILED: %s\n", rung->name, p->c.name, workspace ? why : "no memory");
    }
    free(workspace);
    return ok;
}

/* "expert 1.3": the winner and how many times longer the next one took; "t+8%": the chooser takes token, which is 8 %
 * slower than the winner. */
static void print_cell(const double *ms, strategy choice) {
    int best = 0, second = -1;
    for (int s = 1; s < NUM_STRATEGIES; s++)
        if (ms[s] < ms[best])
            best = s;
    for (int s = 0; s < NUM_STRATEGIES; s++)
        if (s != best && (second < 0 || ms[s] < ms[second]))
            second = s;
    static const char *const brief[] = {"token", "expert", "dense", "rows"};
    char text[64];
    int length = snprintf(text, sizeof text, "%s %.1f", brief[best], ms[second] / ms[best]);
    if ((int)choice != best)
        snprintf(text + length, sizeof text - (size_t)length, " %c+%.0f%%", *brief[choice],
                 100 * (ms[choice] / ms[best] - 1));
    printf("  %-16s", text);
    fflush(stdout);
}

/* How far a token's pairs are spread over the grid, counted and as the model guesses. */
static void print_spread(const char *routing, const int64_t *K, int num_K) {
    printf("  rows, guess  ");
    for (int k = 0; k < num_K; k++) {
        char name[96];
        fmoe_case c;
        fmoe_problem p;
        snprintf(name, sizeof name, "T64-d1-N%d-K%lld-%s-f32", MAP_N, (long long)K[k], routing);
        if (fmoe_case_parse(name, &c) != FMOE_OK ||
            fmoe_problem_new(&fmoe_step_expert, &c, fmoe_opt.seed, &p) != FMOE_OK)
            continue;
        void *workspace = aligned_alloc(256, (rows_workspace(p.args) + 511) / 256 * 256);
        row_counts counts;
        char text[64] = "";
        if (workspace && count_rows(p.args, workspace, &counts) == FMOE_OK)
            snprintf(text, sizeof text, "%.1f (%.1f)", (double)counts.groups / (double)c.T,
                     strategy_rows_a_token(p.args));
        printf("  %-16s", text);
        free(workspace);
        fmoe_problem_free(&p);
    }
    printf("\n");
}

static bool map_cell(const char *routing, int64_t T, int64_t K) {
    char name[96];
    fmoe_case c;
    fmoe_problem p;
    snprintf(name, sizeof name, "T%lld-d%d-N%d-K%lld-%s-f32", (long long)T, MAP_D, MAP_N, (long long)K, routing);
    fmoe_progress("crossover map: %s", name);
    if (fmoe_case_parse(name, &c) != FMOE_OK || fmoe_problem_new(&fmoe_step_expert, &c, fmoe_opt.seed, &p) != FMOE_OK) {
        printf("\n%s: %s\n", name, fmoe_error_message());
        return false;
    }
    double ms[NUM_STRATEGIES];
    bool ok = true;
    for (strategy s = 0; s < NUM_STRATEGIES && ok; s++)
        ok = measure(s, &p, &ms[s]);
    if (ok)
        print_cell(ms, strategy_choose(p.args));
    fmoe_problem_free(&p);
    return ok;
}

static bool map_routing(const char *routing) {
    const int64_t *T = fmoe_opt.quick ? quick_tokens : tokens, *K = fmoe_opt.quick ? quick_chosen : chosen;
    int num_T = fmoe_opt.quick ? COUNT(quick_tokens) : COUNT(tokens);
    int num_K = fmoe_opt.quick ? COUNT(quick_chosen) : COUNT(chosen);
    printf("\n  %-8s K/N = ", routing);
    for (int k = 0; k < num_K; k++)
        printf(k ? "  1/%-14lld" : "1/%-14lld", (long long)(MAP_N / K[k]));
    printf("\n");
    for (int t = 0; t < num_T; t++) {
        printf("  T %10lld ", (long long)T[t]);
        for (int k = 0; k < num_K; k++)
            if (!map_cell(routing, T[t], K[k]))
                return false;
        printf("\n");
    }
    print_spread(routing, K, num_K);
    return true;
}

static int crossover_map(void) {
    printf("\nCrossover map, d %d, N %d, f32: the fastest strategy and how many times longer the second takes.\n"
           "d+8%%: the chooser takes dense there, and it is 8 %% slower. Below each map, in how many of the %d grid\n"
           "rows a token's experts lie, and in brackets the chooser's guess.\n",
           MAP_D, MAP_N, (int)fmoe_num_keys(MAP_N));
    for (int r = 0; r < (fmoe_opt.quick ? 2 : COUNT(routings)); r++)
        if (!map_routing(routings[r]))
            return 1;
    printf("\n");
    return 0;
}

static const fmoe_chapter chapter = {
    .number = 7,
    .title = "strategies: masked dense, Cartesian rows, the chooser",
    .ladders = ladders,
    .after = crossover_map,
    .gnuplot = "crossover.gp",
};

int main(int argc, char **argv) {
    return fmoe_chapter_main(&chapter, argc, argv);
}
