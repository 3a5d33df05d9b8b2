/* Exercise 6.2, solution: a bfloat16 row is widened in registers on its way into the sum. */
#include "plugin.h"
#include "vec.h"
#include "workspace.h"

#include <omp.h>

enum { MOST_TOKENS = 7 };

typedef struct {
    float *x, *hidden; /* [T, d], [T, I] */
    size_t bytes;
} plan;

static plan lay_out(const fmoe_mlp_args *a, void *workspace) {
    plan p = {.bytes = 0};
    p.x = carve(workspace, &p.bytes, (size_t)(a->T * a->d) * sizeof(float));
    p.hidden = carve(workspace, &p.bytes, (size_t)(a->T * a->I) * sizeof(float));
    return p;
}

static size_t needed(const void *args) {
    return lay_out(args, NULL).bytes;
}

static bool supports(const void *args) {
    return ((const fmoe_mlp_args *)args)->T <= MOST_TOKENS;
}

/* ⟨row, x⟩ for a row as it is stored: a bfloat16 is the upper half of a float32. Not inlined: inside a parallel region
 * gcc 12 leaves the sums of an inlined function as scalar code. */
__attribute__((noinline)) static float dot_bf16(int64_t count, const uint16_t *row, const float *x) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)row[i] << 16;
        float value;
        memcpy(&value, &bits, sizeof value);
        sum += value * x[i];
    }
    return sum;
}

static const uint16_t *row_of(const void *matrix, int64_t row, int64_t columns) {
    return (const uint16_t *)matrix + row * columns;
}

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_mlp_args *a = args;
    plan p = lay_out(a, workspace);
    int64_t T = a->T, d = a->d, I = a->I;
    (void)workspace_bytes, (void)stream;
    fmoe_to_f32(a->dtype, T * d, a->x, p.x);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < I; i++)
            for (int64_t t = 0; t < T; t++) {
                float gate = dot_bf16(d, row_of(a->gate, i, d), p.x + t * d);
                p.hidden[t * I + i] = gate / (1 + expf(-gate)) * dot_bf16(d, row_of(a->up, i, d), p.x + t * d);
            }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < d; c++)
            for (int64_t t = 0; t < T; t++)
                store_one(a->dtype, a->y, t * d + c, dot_bf16(I, row_of(a->down, c, I), p.hidden + t * I));
    }
    return FMOE_OK;
}

const fmoe_plugin fmoe_plugin_rung = {.version = FMOE_STEPS_VERSION,
                                      .step = "mlp",
                                      .name = "in registers",
                                      .run = run,
                                      .dtypes = FMOE_ONLY(FMOE_BF16),
                                      .workspace = needed,
                                      .supports = supports};
