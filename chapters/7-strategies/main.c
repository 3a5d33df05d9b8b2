/* Chapter 7: strategies. The ladder at a few cases, then a map of which strategy wins where. */
#include "../../cuda/rungs.h"
#include "../../cuda/strategies/map.h"
#include "../device.h"
#include "strategies.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

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
static const char *const cuda_cases[] = {
    "T4096-d1024-N16384-K64-normal-bf16",     "T4096-d1024-N16384-K64-trained-bf16",
    "T4096-d1024-N102400-K512-normal-bf16",   "T4096-d1024-N102400-K512-uniform-bf16",
    "T16384-d1024-N102400-K512-uniform-bf16", "T1024-d1024-N102400-K512-uniform-bf16",
    "T1024-d1024-N102400-K1024-uniform-bf16", "T1024-d1024-N102400-K2048-uniform-bf16",
    "T1024-d1024-N102400-K4096-uniform-bf16", "T1024-d1024-N1024-K32-uniform-bf16",
    "T1024-d1024-N4096-K32-uniform-bf16",     "T1024-d1024-N16384-K32-uniform-bf16",
    "T1024-d1024-N65536-K32-uniform-bf16",    NULL,
};
static const fmoe_ladder ladders[] = {
    {.step = &fmoe_step_expert,
     .rungs = chapter7_rungs,
     .cases = cases,
     .quick_cases = quick_cases,
     .cuda = cuda_strategies_rungs,
     .cuda_cases = cuda_cases},
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

static int cpu_map(void) {
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

/* ---- The same on the GPU ----------------------------------------------------------------------------------------- */

#ifdef FMOE_WITH_CUDA

enum { GPU_MAP_D = 1024, MOST_TRAINED = 4096, MOST_PAIRS = 1 << 24 };

static const int64_t gpu_tokens[] = {16384, 4096, 1024, 256, 64, 16, 4, 1}, gpu_quick_tokens[] = {4096, 256, 16};
static const int64_t gpu_chosen[] = {64, 256, 1024, 4096}, gpu_quick_chosen[] = {64, 1024, 4096};

static void print_gpu_cell(const cuda_map_cell *cell) {
    int best = 0, second = -1;
    for (int s = 1; s < CUDA_NUM_STRATEGIES; s++)
        if (cell->fits[s] && cell->timing[s].median_ms < cell->timing[best].median_ms)
            best = s;
    for (int s = 0; s < CUDA_NUM_STRATEGIES; s++)
        if (cell->fits[s] && s != best && (second < 0 || cell->timing[s].median_ms < cell->timing[second].median_ms))
            second = s;
    static const char *const brief[] = {"token", "dense", "rows"};
    char text[64];
    double ms = cell->timing[best].median_ms;
    int length = snprintf(text, sizeof text, "%s", brief[best]);
    if (second >= 0)
        length += snprintf(text + length, sizeof text - (size_t)length, " %.1f", cell->timing[second].median_ms / ms);
    if ((int)cell->choice != best)
        snprintf(text + length, sizeof text - (size_t)length, " %c+%.0f%%", *brief[cell->choice],
                 100 * (cell->timing[cell->choice].median_ms / ms - 1));
    printf("  %-16s", text);
    fflush(stdout);
}

static bool gpu_map_cell(cuda_map *map, const char *routing, int64_t T, int64_t K, const float *logits) {
    char name[96];
    cuda_map_cell cell;
    snprintf(name, sizeof name, "T%lld-d%d-N%d-K%lld-%s-bf16", (long long)T, GPU_MAP_D, MAP_N, (long long)K, routing);
    fmoe_progress("crossover map: %s", name);
    if (cuda_map_measure(map, T, K, logits, &cell) != FMOE_OK) {
        printf("\n%s: %s\n", name, fmoe_error_message());
        return false;
    }
    fmoe_work work = {.bytes = NAN, .flops = 4.0 * (double)(T * K) * GPU_MAP_D, .floor_ms = NAN};
    for (int s = 0; s < CUDA_NUM_STRATEGIES; s++) {
        const fmoe_rung *rung = &cuda_strategies_rungs[s];
        if (!cell.fits[s])
            continue;
        if (!(cell.error[s] <= fmoe_error_limit(FMOE_BF16))) {
            printf("\n%s at %s FAILED: error %.2g\n", rung->name, name, cell.error[s]);
            return false;
        }
        fmoe_csv_row("crossover", name, rung->name, rung->level, rung->backend, FMOE_BF16, cell.timing[s],
                     cell.error[s], work);
    }
    print_gpu_cell(&cell);
    return true;
}

/* One number of tokens: their logits are drawn once for all K. */
static bool gpu_map_line(cuda_map *map, const char *routing, int64_t T, const int64_t *K, int num_K) {
    char name[96];
    fmoe_case c;
    float *logits = NULL;
    bool ok = true;
    snprintf(name, sizeof name, "T%lld-n%d-K1-%s-f32", (long long)T, (int)fmoe_num_keys(MAP_N), routing);
    if (fmoe_case_parse(name, &c) != FMOE_OK)
        return false;
    if (c.routing != ROUTING_UNIFORM) {
        logits = malloc((size_t)(2 * T * c.n) * sizeof *logits);
        ok = logits && fmoe_case_logits(&c, fmoe_opt.seed, logits) == FMOE_OK;
        if (!ok)
            printf("\n%s: %s\n", name, logits ? fmoe_error_message() : "no memory");
    }
    printf("  T %10lld ", (long long)T);
    for (int k = 0; k < num_K && ok; k++)
        if (T * K[k] <= MOST_PAIRS)
            ok = gpu_map_cell(map, routing, T, K[k], logits);
    printf("\n");
    free(logits);
    return ok;
}

static bool gpu_map_routing(cuda_map *map, const char *routing) {
    const int64_t *T = fmoe_opt.quick ? gpu_quick_tokens : gpu_tokens;
    const int64_t *K = fmoe_opt.quick ? gpu_quick_chosen : gpu_chosen;
    int num_T = fmoe_opt.quick ? COUNT(gpu_quick_tokens) : COUNT(gpu_tokens);
    int num_K = fmoe_opt.quick ? COUNT(gpu_quick_chosen) : COUNT(gpu_chosen);
    printf("\n  %-8s K/N = ", routing);
    for (int k = 0; k < num_K; k++)
        printf("  1/%-14lld", (long long)(MAP_N / K[k]));
    printf("\n");
    for (int t = 0; t < num_T; t++)
        if ((T[t] <= MOST_TRAINED || strcmp(routing, "trained") != 0) && !gpu_map_line(map, routing, T[t], K, num_K))
            return false;
    return true;
}

static int gpu_map(void) {
    cuda_map *map;
    printf("\nCrossover map on %s, d %d, N %d, bf16: the fastest strategy and how many times longer the second takes.\n"
           "d+8%%: the chooser takes dense there, and it is 8 %% slower.\n",
           fmoe_device_get()->name, GPU_MAP_D, MAP_N);
    bool ok = cuda_map_open(gpu_tokens[0], GPU_MAP_D, MAP_N, &map) == FMOE_OK;
    if (!ok)
        printf("%s\n", fmoe_error_message());
    for (int r = 0; r < COUNT(routings) && ok; r++)
        ok = gpu_map_routing(map, routings[r]);
    cuda_map_close(map);
    printf("\n");
    return ok ? 0 : 1;
}

#else

static int gpu_map(void) {
    return 0;
}

#endif

static int crossover_map(void) {
    if (cpu_map() != 0)
        return 1;
    return fmoe_device_get()->present ? gpu_map() : 0;
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
