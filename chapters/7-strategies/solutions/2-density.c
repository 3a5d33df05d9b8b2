/* Exercise 7.2, solution: groups of at least LEAST pairs go into tiles, the others are computed pair by pair. */
#include "7-strategies/exercises/earlier.h"

enum { LEAST = 32 }; /* pairs of a group that goes into a tile */

/* Where the pairs of a row's group g end. */
static int32_t group_end(const fmoe_expert_args *a, const cartesian *s, int64_t row, int64_t g) {
    int64_t end = s->b.offsets[row + 1], last = (s->b.block_of[s->b.offsets[row] + g] + (int64_t)1) * a->K;
    int32_t i = s->b.begins[s->b.offsets[row] + g];
    while (i < end && s->b.pairs[i] < last)
        i++;
    return i;
}

/* A group's pairs one by one: the row's experts are in a cache, since its other groups ask for them too. */
static void pair_by_pair(const fmoe_expert_args *a, const cartesian *s, int64_t row, int64_t g, float *buffers) {
    int64_t token = s->b.block_of[s->b.offsets[row] + g];
    const float *x = load_row(a->dtype, a->x, token, a->d, buffers);
    for (int32_t i = s->b.begins[s->b.offsets[row] + g], end = group_end(a, s, row, g); i < end; i++) {
        int32_t pair = s->b.pairs[i];
        s->activations[pair] = dot_row(a->d, x, load_row(a->dtype, a->down, a->indices[pair], a->d, buffers + a->d));
    }
}

/* Computes a row's small groups, and leaves the large ones in front, as the tiles want them. */
static void split_row(const fmoe_expert_args *a, const cartesian *s, int64_t row, float *buffers) {
    int32_t *tokens = s->b.block_of + s->b.offsets[row], *begins = s->b.begins + s->b.offsets[row], large = 0;
    for (int64_t g = 0; g < s->counts[row]; g++) {
        if (group_end(a, s, row, g) - begins[g] < LEAST) {
            pair_by_pair(a, s, row, g, buffers);
        } else {
            tokens[large] = tokens[g];
            begins[large++] = begins[g];
        }
    }
    s->counts[row] = large;
}

static fmoe_status mixed(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    cartesian s;
    (void)workspace_bytes, (void)stream;
    lay_out_rows(a, workspace, &s);
    TRY(group_rows(a, &s));
    int64_t runs = (a->T + RUN - 1) / RUN;
    bool failed = false;
#pragma omp parallel reduction(|| : failed)
    {
        int64_t me = omp_get_thread_num();
        float *buffers = s.buffers + me * (1 + ROWS) * a->d;
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < s.b.count; row++)
            split_row(a, &s, row, buffers);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t row = 0; row < s.b.count; row++)
            for (int64_t run = 0; run < runs; run++)
                failed |= row_run(a, &s, row, run, s.tiles + me * RUN * s.b.width,
                                  s.gemm_scratch + me * (int64_t)s.gemm_bytes) != FMOE_OK;
#pragma omp for schedule(dynamic, 8)
        for (int64_t t = 0; t < a->T; t++)
            token_output(a, t, s.activations + t * a->K, buffers);
    }
    return failed ? FMOE_BAD_WORKSPACE : FMOE_OK;
}

const fmoe_plugin fmoe_plugin_rung = {.version = FMOE_STEPS_VERSION,
                                      .step = "expert",
                                      .name = "rows by density",
                                      .run = mixed,
                                      .workspace = rows_workspace};
