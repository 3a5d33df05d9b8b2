/* Exercise 4.2, solution: positions from the back go to pairs from the back, and the order is stable again. Half of it
 * also runs on two threads: one fills from the front, the other from the back. */
#include "plugin.h"

#include <string.h>

/* The first half of the pairs from the front, the second from the back: where they meet, every place is taken, and
 * which thread was faster does not show. */
// [place]
static void place(const fmoe_schedule_args *a, int32_t *begin, int32_t *end) {
    int64_t count = a->T * a->K, half = count / 2;
#pragma omp parallel sections
    {
#pragma omp section
        for (int64_t pair = 0; pair < half; pair++)
            a->pairs[begin[a->indices[pair]]++] = (int32_t)pair;
#pragma omp section
        for (int64_t pair = count - 1; pair >= half; pair--)
            a->pairs[--end[a->indices[pair]]] = (int32_t)pair;
    }
}
// [/place]

static fmoe_status run(const void *args, void *workspace, size_t bytes, void *stream) {
    const fmoe_schedule_args *a = args;
    int32_t *begin = workspace, *end = begin + a->N; /* [N] each */
    (void)bytes, (void)stream;
    memset(a->offsets, 0, (size_t)(a->N + 1) * sizeof *a->offsets);
    for (int64_t pair = 0; pair < a->T * a->K; pair++)
        a->offsets[a->indices[pair] + 1]++;
    for (int64_t e = 0; e < a->N; e++)
        a->offsets[e + 1] += a->offsets[e];
    memcpy(begin, a->offsets, (size_t)a->N * sizeof *begin);
    memcpy(end, a->offsets + 1, (size_t)a->N * sizeof *end);
    place(a, begin, end);
    return FMOE_OK;
}

static size_t needed(const void *args) {
    return (size_t)(2 * ((const fmoe_schedule_args *)args)->N) * sizeof(int32_t);
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "schedule", .name = "both ends", .run = run, .workspace = needed};
