/* Rows of any storage type for the CPU rungs: load a row as float32, dot, add a multiple, store; and two functions
 * of float32 rows that softmax needs.
 *
 * A rung that works row by row reads float32 rows in place and converts 16-bit rows into a small buffer that stays in
 * the first-level cache; the arithmetic is float32 either way. `omp simd` lets the compiler reorder the sums, which C
 * otherwise forbids, and so use the machine's vector registers.
 */
#ifndef FMOE_VEC_H
#define FMOE_VEC_H

#include "../ref_cpu/fmoe.h"

#include <math.h>
#include <string.h>

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

// [serial-dot]
/* C may not reorder a sum, so each addition waits for the one before it. */
static inline float serial_dot(int64_t count, const float *a, const float *b) {
    float sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum += a[i] * b[i];
    return sum;
}
// [/serial-dot]

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

/* In lanes by hand: a float maximum is no reduction that every compiler vectorises. */
static inline float largest(int64_t n, const float *z) {
    enum { WIDTH = 16 };
    float lane[WIDTH], max = z[0];
    int64_t i = 0;
    for (int l = 0; l < WIDTH; l++)
        lane[l] = max;
    for (; i + WIDTH <= n; i += WIDTH)
#pragma omp simd
        for (int l = 0; l < WIDTH; l++)
            lane[l] = z[i + l] > lane[l] ? z[i + l] : lane[l];
    for (int l = 0; l < WIDTH; l++)
        max = lane[l] > max ? lane[l] : max;
    for (; i < n; i++)
        max = z[i] > max ? z[i] : max;
    return max;
}

/* exp without a call, so that a loop over it vectorises: exp(x) = 2^k · exp(r), r = x − k ln 2, |r| ≤ ln 2 / 2, and
 * Taylor's series for exp(r). Within 2 units in the last place; results below the smallest normal number are 0;
 * infinities and NaN as in expf. */
static inline float exp_f32(float x) {
    float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 · 2^23: rounds to an integer, which sits in the low bits */
    float k = shifted - 12582912.0f;
    float r = x - k * 0.693359375f + k * 2.12194440e-4f; /* ln 2 in two parts: k times the first is exact */
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 1.0f / 2;
    p = p * r * r + r + 1;
    uint32_t exponent, bits;
    memcpy(&exponent, &shifted, 4);
    memcpy(&bits, &p, 4);
    bits += exponent << 23;
    memcpy(&p, &bits, 4);
    float above = x + INFINITY; /* NaN stays NaN */
    p = x <= 88.72283f ? p : above;
    return x < -87.33654f ? 0 : p;
}

#endif
