/* Exercise 6.1, solution: blocks of 32 tokens, whose hidden units still fit a cache. */
#include "plugin.h"
#include "vec.h"
#include "workspace.h"

#include <omp.h>

enum { BLOCK = 32 }; /* tokens */

/* What a thread needs for one block. */
typedef struct {
    float *x, *y, *hidden;    /* [BLOCK, d], [BLOCK, d], [BLOCK, I] */
    float *row[2], *value[2]; /* weight rows; their products with the block's tokens */
    size_t bytes;
} block;

static block lay_out(const fmoe_mlp_args *a, void *memory) {
    block b = {.bytes = 0};
    size_t longest = (size_t)(a->d > a->I ? a->d : a->I) * sizeof(float);
    b.x = carve(memory, &b.bytes, BLOCK * (size_t)a->d * sizeof(float));
    b.y = carve(memory, &b.bytes, BLOCK * (size_t)a->d * sizeof(float));
    b.hidden = carve(memory, &b.bytes, BLOCK * (size_t)a->I * sizeof(float));
    for (int i = 0; i < 2; i++) {
        b.row[i] = carve(memory, &b.bytes, longest);
        b.value[i] = carve(memory, &b.bytes, BLOCK * sizeof(float));
    }
    return b;
}

static size_t needed(const void *args) {
    return lay_out(args, NULL).bytes * (size_t)omp_get_max_threads();
}

/* ⟨row t, w⟩ for `count` rows, four at a time: w is loaded once for four sums. */
__attribute__((noinline)) static void dots(int64_t count, int64_t k, const float *rows, const float *w, float *out) {
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) {
        const float *r0 = rows + t * k, *r1 = r0 + k, *r2 = r1 + k, *r3 = r2 + k;
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int64_t i = 0; i < k; i++) {
            s0 += r0[i] * w[i];
            s1 += r1[i] * w[i];
            s2 += r2[i] * w[i];
            s3 += r3[i] * w[i];
        }
        out[t] = s0, out[t + 1] = s1, out[t + 2] = s2, out[t + 3] = s3;
    }
    for (; t < count; t++)
        out[t] = dot(k, rows + t * k, w);
}

static void run_block(const fmoe_mlp_args *a, const block *b, int64_t first, int64_t count) {
    int64_t d = a->d, I = a->I, at = first * d * (int64_t)fmoe_dtype_size(a->dtype);
    fmoe_to_f32(a->dtype, count * d, (const char *)a->x + at, b->x);
    for (int64_t i = 0; i < I; i++) {
        float *p = b->value[0], *q = b->value[1];
        dots(count, d, b->x, load_row(a->dtype, a->gate, i, d, b->row[0]), p);
        dots(count, d, b->x, load_row(a->dtype, a->up, i, d, b->row[1]), q);
        for (int64_t t = 0; t < count; t++)
            b->hidden[t * I + i] = p[t] / (1 + exp_f32(-p[t])) * q[t];
    }
    for (int64_t c = 0; c < d; c++) {
        dots(count, I, b->hidden, load_row(a->dtype, a->down, c, I, b->row[0]), b->value[0]);
        for (int64_t t = 0; t < count; t++)
            b->y[t * d + c] = b->value[0][t];
    }
    fmoe_from_f32(a->dtype, count * d, b->y, (char *)a->y + at);
}

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_mlp_args *a = args;
    size_t each = lay_out(a, NULL).bytes;
    (void)workspace_bytes, (void)stream;
#pragma omp parallel for schedule(dynamic)
    for (int64_t first = 0; first < a->T; first += BLOCK) {
        block b = lay_out(a, (char *)workspace + each * (size_t)omp_get_thread_num());
        run_block(a, &b, first, a->T - first < BLOCK ? a->T - first : BLOCK);
    }
    return FMOE_OK;
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "mlp", .name = "token blocks", .run = run, .workspace = needed};
