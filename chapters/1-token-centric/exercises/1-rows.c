/* Exercise 1.1, starter, right: how many experts a pass. It is the rung "blocked", in which EXPERTS rows are multiplied
 * with the token at once. */
#include "plugin.h"
#include "rows.h"
#include "vec.h"

#include <math.h>
#include <omp.h>

enum { EXPERTS = 8 };

typedef struct {
    float *activation, *sum, *token, *buffer[EXPERTS];
} scratch;

static size_t scratch_floats(const fmoe_expert_args *a) {
    return padded(a->K) + (2 + EXPERTS) * padded(a->d);
}

static scratch scratch_at(const fmoe_expert_args *a, float *at) {
    scratch s = {.activation = at, .sum = at + padded(a->K)};
    s.token = s.sum + padded(a->d);
    for (int j = 0; j < EXPERTS; j++)
        s.buffer[j] = s.token + (size_t)(1 + j) * padded(a->d);
    return s;
}

// [pass]
/* dots[j] = ⟨x, rows[j]⟩: one register for x, one for a row, and EXPERTS for the sums. */
static inline void dots_of(int64_t d, const float *x, const float *const rows[EXPERTS], float dots[EXPERTS]) {
    lanes sum[EXPERTS] = {{0}};
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
        lanes u, v;
        memcpy(&u, x + i, sizeof u);
        for (int j = 0; j < EXPERTS; j++) {
            memcpy(&v, rows[j] + i, sizeof v);
            sum[j] += u * v;
        }
    }
    for (int j = 0; j < EXPERTS; j++)
        dots[j] = sum_lanes(&sum[j]);
    for (; i < d; i++)
        for (int j = 0; j < EXPERTS; j++)
            dots[j] += x[i] * rows[j][i];
}

static inline void add_all(int64_t d, const float scales[EXPERTS], const float *const rows[EXPERTS], float *sum) {
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
        lanes s, v;
        memcpy(&s, sum + i, sizeof s);
        for (int j = 0; j < EXPERTS; j++) {
            memcpy(&v, rows[j] + i, sizeof v);
            s += scales[j] * v;
        }
        memcpy(sum + i, &s, sizeof s);
    }
    for (; i < d; i++)
        for (int j = 0; j < EXPERTS; j++)
            sum[i] += scales[j] * rows[j][i];
}
// [/pass]

static const float *row_of(const fmoe_expert_args *a, const void *table, int32_t expert, float *buffer) {
    return load_row(a->dtype, table, expert, a->d, buffer);
}

static void one_token(const fmoe_expert_args *a, int64_t t, scratch s) {
    const int32_t *expert = a->indices + t * a->K;
    const float *x = load_row(a->dtype, a->x, t, a->d, s.token), *row[EXPERTS];
    int64_t whole = a->K / EXPERTS * EXPERTS;
    for (int64_t k = 0; k < whole; k += EXPERTS) {
        for (int j = 0; j < EXPERTS; j++)
            row[j] = row_of(a, a->down, expert[k + j], s.buffer[j]);
        dots_of(a->d, x, row, s.activation + k);
    }
    for (int64_t k = whole; k < a->K; k++)
        s.activation[k] = dot_row(a->d, x, row_of(a, a->down, expert[k], s.buffer[0]));
    for (int64_t k = 0; k < a->K; k++)
        s.activation[k] *= a->weights[t * a->K + k] / (1 + expf(-s.activation[k]));
    memset(s.sum, 0, (size_t)a->d * sizeof(float));
    for (int64_t k = 0; k < whole; k += EXPERTS) {
        for (int j = 0; j < EXPERTS; j++)
            row[j] = row_of(a, a->up, expert[k + j], s.buffer[j]);
        add_all(a->d, s.activation + k, row, s.sum);
    }
    for (int64_t k = whole; k < a->K; k++)
        add_row(a->d, s.activation[k], row_of(a, a->up, expert[k], s.buffer[0]), s.sum);
    store_row(a->dtype, a->y, t, a->d, s.sum);
}

static size_t needed(const void *args) {
    return (size_t)omp_get_max_threads() * scratch_floats(args) * sizeof(float);
}

static fmoe_status run(const void *args, void *workspace, size_t bytes, void *stream) {
    const fmoe_expert_args *a = args;
    (void)bytes, (void)stream;
#pragma omp parallel
    {
        scratch s = scratch_at(a, (float *)workspace + (size_t)omp_get_thread_num() * scratch_floats(a));
#pragma omp for schedule(dynamic, 16)
        for (int64_t t = 0; t < a->T; t++)
            one_token(a, t, s);
    }
    return FMOE_OK;
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "expert", .name = "my rows", .run = run, .workspace = needed};
