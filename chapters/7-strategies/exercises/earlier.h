/* What chapter 7's rungs call of chapters 1, 3, 4 and 5, in plain form: a plugin is linked with none of them. */
#ifndef FMOE_STRATEGIES_EARLIER_H
#define FMOE_STRATEGIES_EARLIER_H

#include "plugin.h"

#include "../ref_cpu/check.h"

#pragma weak cpu_expert_scheduled_best // named in the chooser's table, and not called by the exercises
#pragma weak cpu_expert_scheduled_best_workspace
#include "7-strategies/cpu.c"   // NOLINT(bugprone-suspicious-include): the chapter's rungs
#define smaller smaller_of_gemm // names that both files have
#define four    four_of_gemm
#include "gemm.c" // NOLINT(bugprone-suspicious-include): chapter 6's tiles
#undef smaller
#undef four

int64_t fmoe_num_keys(int64_t N) {
    int64_t n = 1;
    while ((n + 1) * (n + 1) <= N)
        n++;
    return n;
}

size_t cpu_schedule_best_workspace(const void *args) {
    (void)args;
    return 0;
}

/* Chapter 4's counting sort, on one thread. */
fmoe_status cpu_schedule_best(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_schedule_args *a = args;
    (void)workspace, (void)workspace_bytes, (void)stream;
    memset(a->offsets, 0, (size_t)(a->N + 1) * sizeof *a->offsets);
    for (int64_t i = 0; i < a->T * a->K; i++) {
        if (a->indices[i] < 0 || a->indices[i] >= a->N)
            return FMOE_BAD_INDEX;
        a->offsets[a->indices[i] + 1]++;
    }
    for (int64_t e = 0; e < a->N; e++)
        a->offsets[e + 1] += a->offsets[e];
    for (int64_t i = 0; i < a->T * a->K; i++)
        a->pairs[a->offsets[a->indices[i]]++] = (int32_t)i;
    memmove(a->offsets + 1, a->offsets, (size_t)a->N * sizeof *a->offsets);
    a->offsets[0] = 0;
    return FMOE_OK;
}

/* A thread's rows: a token's, ROWS experts', a sum, and the token's activations. */
static int64_t token_floats(const fmoe_expert_args *a) {
    return (2 + ROWS) * a->d + a->K;
}

size_t cpu_expert_token_best_workspace(const void *args) {
    return (size_t)(omp_get_max_threads() * token_floats(args)) * sizeof(float);
}

/* Chapter 1, eight experts a pass: all of a token's rows of down, then all of its rows of up. */
fmoe_status cpu_expert_token_best(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    (void)workspace_bytes, (void)stream;
#pragma omp parallel for schedule(dynamic, 8)
    for (int64_t t = 0; t < a->T; t++) {
        float *activation = (float *)workspace + omp_get_thread_num() * token_floats(a), *buffers = activation + a->K;
        const int32_t *expert = a->indices + t * a->K;
        const float *x = load_row(a->dtype, a->x, t, a->d, buffers), *row[ROWS];
        for (int64_t k = 0; k < a->K; k += ROWS) {
            float dots[ROWS];
            for (int64_t j = 0; j < ROWS; j++)
                row[j] = load_row(a->dtype, a->down, expert[smaller(k + j, a->K - 1)], a->d, buffers + (1 + j) * a->d);
            dot_rows(a->d, x, row, dots);
            memcpy(activation + k, dots, (size_t)smaller(ROWS, a->K - k) * sizeof *dots);
        }
        token_output(a, t, activation, buffers);
    }
    return FMOE_OK;
}

#endif
