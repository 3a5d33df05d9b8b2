/* Rows of any storage type for the CPU rungs: load a row as float32, dot, add a multiple, store.
 *
 * A rung that works row by row reads float32 rows in place and converts 16-bit rows into a small buffer that stays in
 * the first-level cache; the arithmetic is float32 either way. `omp simd` lets the compiler reorder the sums, which C
 * otherwise forbids, and so use the machine's vector registers.
 */
#ifndef FMOE_VEC_H
#define FMOE_VEC_H

#include "../ref_cpu/fmoe.h"

/* Element i of a tensor. Slow; for rungs that show the definition. */
static inline float load_one(fmoe_dtype dtype, const void *tensor, int64_t i) {
    float value;
    fmoe_to_f32(dtype, 1, (const char *)tensor + i * (int64_t)fmoe_dtype_size(dtype), &value);
    return value;
}

static inline void store_one(fmoe_dtype dtype, void *tensor, int64_t i, float value) {
    fmoe_from_f32(dtype, 1, &value, (char *)tensor + i * (int64_t)fmoe_dtype_size(dtype));
}

/* Row `row` of a [rows, d] tensor as float32: the row itself, or its copy in buffer (d floats). */
static inline const float *load_row(fmoe_dtype dtype, const void *tensor, int64_t row, int64_t d, float *buffer) {
    if (dtype == FMOE_F32)
        return (const float *)tensor + row * d;
    fmoe_to_f32(dtype, d, (const char *)tensor + row * d * 2, buffer);
    return buffer;
}

static inline void store_row(fmoe_dtype dtype, void *tensor, int64_t row, int64_t d, const float *values) {
    fmoe_from_f32(dtype, d, values, (char *)tensor + row * d * (int64_t)fmoe_dtype_size(dtype));
}

static inline float dot(int64_t d, const float *a, const float *b) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < d; i++)
        sum += a[i] * b[i];
    return sum;
}

static inline void add_scaled(int64_t d, float scale, const float *a, float *sum) {
#pragma omp simd
    for (int64_t i = 0; i < d; i++)
        sum[i] += scale * a[i];
}

#endif
