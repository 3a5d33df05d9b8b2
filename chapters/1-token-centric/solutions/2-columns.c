/* Exercise 1.2, solution: the second half goes by strips of columns, whose sums stay in registers for all K experts. */
#include "plugin.h"

#include "1-token-centric/cpu.c" // NOLINT(bugprone-suspicious-include): the chapter's rungs: only what changes stands here

enum { STRIP = 4 }; /* registers of sums */

// [second-half]
/* Σ_k activation[k] · up[expert[k]], columns first to first + STRIP · LANES. */
static inline void add_strip(const fmoe_expert_args *a, const int32_t *expert, scratch s, int64_t first) {
    lanes sum[STRIP] = {{0}};
    for (int64_t k = 0; k < a->K; k++) {
        const float *row = (const float *)a->up + expert[k] * a->d + first;
        for (int j = 0; j < STRIP; j++) {
            lanes v;
            memcpy(&v, row + (ptrdiff_t)j * LANES, sizeof v);
            sum[j] += s.activation[k] * v;
        }
    }
    memcpy(s.sum + first, sum, sizeof sum);
}

static void second_half(const fmoe_expert_args *a, const int32_t *expert, scratch s) {
    int64_t first = 0;
    for (; first + STRIP * LANES <= a->d; first += STRIP * LANES)
        add_strip(a, expert, s, first);
    for (; first < a->d; first++) {
        s.sum[first] = 0;
        for (int64_t k = 0; k < a->K; k++)
            s.sum[first] += s.activation[k] * ((const float *)a->up)[expert[k] * a->d + first];
    }
}
// [/second-half]

static void one_token(const fmoe_expert_args *a, int64_t t, scratch s) {
    const int32_t *expert = a->indices + t * a->K;
    const float *x = (const float *)a->x + t * a->d, *row[ROWS];
    int64_t k = 0;
    for (; k + ROWS <= a->K; k += ROWS) {
        load_eight(a, a->down, expert + k, s, row);
        dot_rows(a->d, x, row, s.activation + k);
    }
    for (; k < a->K; k++)
        s.activation[k] = dot_row(a->d, x, (const float *)a->down + expert[k] * a->d);
    for (k = 0; k < a->K; k++)
        s.activation[k] = silu(s.activation[k]) * a->weights[t * a->K + k];
    second_half(a, expert, s);
}

static fmoe_status run(const void *args, void *workspace, size_t bytes, void *stream) {
    const fmoe_expert_args *a = args;
    (void)bytes, (void)stream;
    return each_token(a, one_token, a->dtype, workspace);
}

const fmoe_plugin fmoe_plugin_rung = {.version = FMOE_STEPS_VERSION,
                                      .step = "expert",
                                      .name = "my columns",
                                      .run = run,
                                      .dtypes = FMOE_ONLY(FMOE_F32),
                                      .workspace = all_threads};
