/* Chapter 5: the fused expert step. Running the schedule. */
#include "../../cuda/rungs.h"
#include "../steps.h"

#include <stdlib.h>

static const char *const cases[] = {"T1024-d256-N16384-K64-normal-f32",
                                    "T1024-d256-N16384-K64-uniform-f32",
                                    "T1024-d256-N16384-K64-trained-f32",
                                    "T1024-d256-N16384-K64-hot-f32",
                                    "T1024-d256-N16384-K512-uniform-f32",
                                    "T8192-d256-N1024-K2-hot-f32",
                                    NULL};
static const char *const quick_cases[] = {"T1024-d256-N16384-K64-normal-f32", "T1024-d256-N16384-K64-trained-f32",
                                          "T8192-d256-N1024-K2-hot-f32", NULL};

// [share]
/* The pairs of the thread that has most, over the mean, when `threads` threads own equal ranges of experts. */
static double largest_share(int64_t N, const int32_t *offsets, int64_t threads) {
    int32_t most = 0;
    for (int64_t i = 0; i < threads; i++) {
        int32_t pairs = offsets[N * (i + 1) / threads] - offsets[N * i / threads];
        if (pairs > most)
            most = pairs;
    }
    return (double)most * (double)threads / (double)offsets[N];
}
// [/share]

static void print_shares(const fmoe_case *c, const int32_t *offsets) {
    int64_t used = 0, busiest = 0;
    for (int64_t e = 0; e < c->N; e++) {
        int64_t pairs = offsets[e + 1] - offsets[e];
        used += pairs > 0;
        busiest = pairs > busiest ? pairs : busiest;
    }
    printf("  %-36s %6lld %8lld %8.1f %8.2f %8.2f %8.2f\n", c->name, (long long)used, (long long)busiest,
           (double)offsets[c->N] / (double)c->N, largest_share(c->N, offsets, 2), largest_share(c->N, offsets, 16),
           largest_share(c->N, offsets, c->N));
}

static int shares_of(const char *name) {
    fmoe_case c;
    int64_t pairs = fmoe_case_parse(name, &c) == FMOE_OK ? c.T * c.K : 0;
    int32_t *indices = malloc(sizeof *indices * (size_t)pairs + 1);
    int32_t *schedule = malloc(sizeof *schedule * (size_t)(pairs + c.N + 1));
    float *weights = malloc(sizeof *weights * (size_t)pairs + 1);
    fmoe_status status = FMOE_OUT_OF_MEMORY;
    if (indices && schedule && weights)
        status = fmoe_case_route(&c, fmoe_opt.seed, indices, weights);
    if (status == FMOE_OK)
        status = fmoe_schedule(c.T, c.K, c.N, indices, schedule, schedule + c.N + 1);
    if (status == FMOE_OK)
        print_shares(&c, schedule);
    else
        fprintf(stderr, "%s: %s\n", name, fmoe_error_message());
    free(indices);
    free(schedule);
    free(weights);
    return status != FMOE_OK;
}

/* The prediction: what a split by experts leaves to the thread that has most. */
static int before(void) {
    printf("Threads own equal ranges of experts: the pairs of the busiest thread, over the mean\n"
           "  %-36s %6s %8s %8s %8s %8s %8s\n",
           "routing", "used", "busiest", "mean", "2", "16", "N threads");
    int failed = 0;
    for (const char *const *name = fmoe_opt.quick ? quick_cases : cases; *name && !failed; name++)
        failed = shares_of(*name);
    printf("\n");
    return failed;
}

static const char *const cuda_cases[] = {
    "T4096-d1024-N16384-K64-normal-bf16",     "T4096-d1024-N16384-K64-trained-bf16",
    "T4096-d1024-N16384-K64-uniform-bf16",    "T4096-d1024-N16384-K64-hot-bf16",
    "T1024-d1024-N102400-K512-uniform-bf16",  "T1024-d1024-N102400-K1024-uniform-bf16",
    "T4096-d1024-N102400-K512-uniform-bf16",  "T4096-d1024-N102400-K512-normal-bf16",
    "T16384-d1024-N102400-K512-uniform-bf16", "T1024-d1024-N1024-K32-uniform-bf16",
    "T1024-d1024-N4096-K32-uniform-bf16",     "T1024-d1024-N16384-K32-uniform-bf16",
    "T1024-d1024-N65536-K32-uniform-bf16",    NULL};

static const fmoe_ladder ladders[] = {
    {&fmoe_step_expert, chapter5_rungs, cases, quick_cases, cuda_expert_scheduled_rungs, cuda_cases}, {0}};

static const fmoe_chapter chapter = {
    .number = 5, .title = "the fused expert step: running the schedule", .ladders = ladders, .before = before};

int main(int argc, char **argv) {
    return fmoe_chapter_main(&chapter, argc, argv);
}
