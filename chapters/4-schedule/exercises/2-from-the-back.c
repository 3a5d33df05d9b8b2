/* Exercise 4.2, starter, not done: a counting sort that hands out each expert's positions from the back. It groups the
 * pairs by expert, every one once, and it is wrong. */
#include "plugin.h"

#include <string.h>

// [place]
static void place(const fmoe_schedule_args *a, int32_t *end) {
    for (int64_t pair = 0; pair < a->T * a->K; pair++)
        a->pairs[--end[a->indices[pair]]] = (int32_t)pair;
}
// [/place]

/* Counts, then running sums: offsets[e + 1] is where expert e ends. Handing out from the back moves each end to the
 * expert's beginning, so a copy takes it. */
static fmoe_status run(const void *args, void *workspace, size_t bytes, void *stream) {
    const fmoe_schedule_args *a = args;
    int32_t *end = workspace; /* [N] */
    (void)bytes, (void)stream;
    memset(a->offsets, 0, (size_t)(a->N + 1) * sizeof *a->offsets);
    for (int64_t pair = 0; pair < a->T * a->K; pair++)
        a->offsets[a->indices[pair] + 1]++;
    for (int64_t e = 0; e < a->N; e++)
        a->offsets[e + 1] += a->offsets[e];
    memcpy(end, a->offsets + 1, (size_t)a->N * sizeof *end);
    place(a, end);
    return FMOE_OK;
}

static size_t needed(const void *args) {
    return (size_t)((const fmoe_schedule_args *)args)->N * sizeof(int32_t);
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "schedule", .name = "from the back", .run = run, .workspace = needed};
