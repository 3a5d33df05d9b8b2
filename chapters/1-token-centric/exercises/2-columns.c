/* Exercise 1.2, starter, right: the rung "blocked" in float32, whose second half loads and stores the output once for
 * eight experts. */
#include "plugin.h"

#include "1-token-centric/cpu.c" // NOLINT(bugprone-suspicious-include): the chapter's rungs: only what changes stands here

// [second-half]
/* s.sum = Σ_k activation[k] · up[expert[k]] */
static void second_half(const fmoe_expert_args *a, const int32_t *expert, scratch s) {
    const float *row[ROWS];
    int64_t k = 0;
    memset(s.sum, 0, (size_t)a->d * sizeof(float));
    for (; k + ROWS <= a->K; k += ROWS) {
        for (int j = 0; j < ROWS; j++)
            row[j] = (const float *)a->up + expert[k + j] * a->d;
        add_rows(a->d, s.activation + k, row, s.sum);
    }
    for (; k < a->K; k++)
        add_row(a->d, s.activation[k], (const float *)a->up + expert[k] * a->d, s.sum);
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
