/* Exercise 9.1, starter, right: the rung "balanced" with a list of its own. PAIRS is yours. */
#include "plugin.h"

#include "9-backward/expert.c" // NOLINT(bugprone-suspicious-include): the chapter's rungs

enum { PAIRS = 4096 };

/* The rung's list, with PAIRS in the place of RUN. */
static int64_t list_runs(const expert_args *a, struct item *items) {
    const int32_t *offsets = a->offsets;
    int64_t count = 0;
    int32_t parts = 0;
    for (int32_t e = 0, end; e < a->N; e = end) {
        for (end = e + 1; end < a->N && end - e < PAIRS && offsets[end + 1] - offsets[e] <= PAIRS;)
            end++;
        if (offsets[end] - offsets[e] <= PAIRS) {
            items[count++] = (struct item){e, end, 0, 0, -1};
            continue;
        }
        for (int32_t first = offsets[e]; first < offsets[end]; first += PAIRS)
            items[count++] = (struct item){e, end, first, (int32_t)smaller(first + PAIRS, offsets[end]), parts++};
    }
    return count;
}

static ordered lay_out(const expert_args *a, void *workspace, size_t *used) {
    ordered o = carve_ordered(a, workspace, used);
    int64_t parts = 2 * a->T * a->K / PAIRS;
    o.items = carve(workspace, used, (size_t)(a->N + a->T * a->K / PAIRS) * sizeof *o.items);
    o.parts = carve_floats(workspace, used, 2 * a->d * parts);
    return o;
}

static size_t needed(const void *args) {
    size_t used = 0;
    lay_out(args, NULL, &used);
    return used;
}

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const expert_args *a = args;
    size_t used = 0;
    ordered o = lay_out(a, workspace, &used);
    const float *x = as_f32(a->dtype, a->x, a->T * a->d, o.x), *dy = as_f32(a->dtype, a->dy, a->T * a->d, o.dy);
    int64_t count = list_runs(a, o.items);
    (void)workspace_bytes, (void)stream;
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < count; i++)
        one_item(a, &o, x, dy, o.items[i]);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++)
        if (o.items[i].part >= 0 && (i == 0 || o.items[i - 1].expert != o.items[i].expert))
            add_parts(a, &o, o.items, i, count);
    gather_rows(a, &o, a->down, o.ds, a->dtype, a->dx);
    return FMOE_OK;
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "expert_backward", .name = "my runs", .run = run, .workspace = needed};
