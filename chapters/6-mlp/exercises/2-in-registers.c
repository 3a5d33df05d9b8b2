/* Exercise 6.2, starter, right: a row of weights is converted into a buffer and then multiplied. */
#include "plugin.h"
#include "vec.h"
#include "workspace.h"

#include <omp.h>

enum { MOST_TOKENS = 7 };

typedef struct {
    float *x, *hidden; /* [T, d], [T, I] */
    float *rows;       /* [threads, 2, the longest row]: weights as float32 */
    int64_t longest;
    size_t bytes;
} plan;

static plan lay_out(const fmoe_mlp_args *a, void *workspace) {
    plan p = {.longest = a->d > a->I ? a->d : a->I};
    p.x = carve(workspace, &p.bytes, (size_t)(a->T * a->d) * sizeof(float));
    p.hidden = carve(workspace, &p.bytes, (size_t)(a->T * a->I) * sizeof(float));
    p.rows = carve(workspace, &p.bytes, 2 * (size_t)(omp_get_max_threads() * p.longest) * sizeof(float));
    return p;
}

static size_t needed(const void *args) {
    return lay_out(args, NULL).bytes;
}

static bool supports(const void *args) {
    return ((const fmoe_mlp_args *)args)->T <= MOST_TOKENS;
}

/* Not inlined: inside a parallel region gcc 12 leaves the sums of an inlined function as scalar code. */
__attribute__((noinline)) static float dot_f32(int64_t count, const float *row, const float *x) {
    return dot(count, row, x);
}

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_mlp_args *a = args;
    plan p = lay_out(a, workspace);
    int64_t T = a->T, d = a->d, I = a->I;
    (void)workspace_bytes, (void)stream;
    fmoe_to_f32(a->dtype, T * d, a->x, p.x);
#pragma omp parallel
    {
        float *row[2] = {p.rows + 2 * omp_get_thread_num() * p.longest,
                         p.rows + (2 * omp_get_thread_num() + 1) * p.longest};
#pragma omp for schedule(static)
        for (int64_t i = 0; i < I; i++) {
            const float *gate = load_row(a->dtype, a->gate, i, d, row[0]),
                        *up = load_row(a->dtype, a->up, i, d, row[1]);
            for (int64_t t = 0; t < T; t++) {
                float s = dot_f32(d, gate, p.x + t * d);
                p.hidden[t * I + i] = s / (1 + expf(-s)) * dot_f32(d, up, p.x + t * d);
            }
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < d; c++) {
            const float *down = load_row(a->dtype, a->down, c, I, row[0]);
            for (int64_t t = 0; t < T; t++)
                store_one(a->dtype, a->y, t * d + c, dot_f32(I, down, p.hidden + t * I));
        }
    }
    return FMOE_OK;
}

const fmoe_plugin fmoe_plugin_rung = {.version = FMOE_STEPS_VERSION,
                                      .step = "mlp",
                                      .name = "through a buffer",
                                      .run = run,
                                      .dtypes = FMOE_ONLY(FMOE_BF16),
                                      .workspace = needed,
                                      .supports = supports};
