/* Rows by vectors: what the expert rungs are made of once `omp simd` is not enough.
 *
 * gcc and clang turn these vectors into registers: 16 floats with AVX-512, 8 with AVX2, two of 4 elsewhere. Every
 * function sums in an order that depends on d alone, never on who calls it, so a dot product has the same bits in
 * whichever thread and whichever group of rows it is computed. */
#ifndef FMOE_ROWS_H
#define FMOE_ROWS_H

#include <stdint.h>
#include <string.h>

/* Eight sums, a row and a token must fit the registers: 16 of them with AVX2, 32 with AVX-512. */
#ifdef __AVX512F__
enum { LANES = 16, ROWS = 8 };
#else
enum { LANES = 8, ROWS = 8 };
#endif
typedef float lanes __attribute__((vector_size(LANES * 4)));
typedef float four __attribute__((vector_size(16)));

/* Rows of a workspace take whole cache lines, 16 elements of 4 bytes, so that no two threads write to the same one. */
static inline size_t padded(int64_t elements) {
    return ((size_t)elements + 15) / 16 * 16;
}

/* A tree: of 16 lanes (or 8) make 8, 4, 2, 1. */
// [tree]
static inline float sum_lanes(const lanes *sums) {
    four part[LANES / 4];
    memcpy(part, sums, sizeof part);
    for (int n = LANES / 8; n > 0; n /= 2)
        for (int j = 0; j < n; j++)
            part[j] += part[j + n];
    return (part[0][0] + part[0][1]) + (part[0][2] + part[0][3]);
}
// [/tree]

/* Four sums at a time: a multiply-add takes four cycles, and the next one into the same register waits for it. */
// [dot_row]
static inline float dot_row(int64_t d, const float *a, const float *b) {
    lanes sum[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= d; i += 4 * LANES)
        for (int j = 0; j < 4; j++) {
            lanes u, v;
            memcpy(&u, a + i + j * LANES, sizeof u);
            memcpy(&v, b + i + j * LANES, sizeof v);
            sum[j] += u * v;
        }
    for (; i + LANES <= d; i += LANES) {
        lanes u, v;
        memcpy(&u, a + i, sizeof u);
        memcpy(&v, b + i, sizeof v);
        sum[0] += u * v;
    }
    sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    float total = sum_lanes(&sum[0]);
    for (; i < d; i++)
        total += a[i] * b[i];
    return total;
}
// [/dot_row]

/* dots[j] = ⟨a, rows[j]⟩: a is loaded once for eight rows, and eight rows are on their way from memory at once. */
// [dot_rows]
static inline void dot_rows(int64_t d, const float *a, const float *const rows[ROWS], float dots[ROWS]) {
    lanes sum[ROWS] = {{0}};
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
        lanes u, v;
        memcpy(&u, a + i, sizeof u);
        for (int j = 0; j < ROWS; j++) {
            memcpy(&v, rows[j] + i, sizeof v);
            sum[j] += u * v;
        }
    }
    for (int j = 0; j < ROWS; j++)
        dots[j] = sum_lanes(&sum[j]);
    for (; i < d; i++)
        for (int j = 0; j < ROWS; j++)
            dots[j] += a[i] * rows[j][i];
}
// [/dot_rows]

static inline void add_row(int64_t d, float scale, const float *row, float *sum) {
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
        lanes s, v;
        memcpy(&s, sum + i, sizeof s);
        memcpy(&v, row + i, sizeof v);
        s += scale * v;
        memcpy(sum + i, &s, sizeof s);
    }
    for (; i < d; i++)
        sum[i] += scale * row[i];
}

/* sum += Σ_j scales[j] · rows[j]: sum is loaded and stored once for eight rows. */
// [add_rows]
static inline void add_rows(int64_t d, const float scales[ROWS], const float *const rows[ROWS], float *sum) {
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
        lanes s, v;
        memcpy(&s, sum + i, sizeof s);
        for (int j = 0; j < ROWS; j++) {
            memcpy(&v, rows[j] + i, sizeof v);
            s += scales[j] * v;
        }
        memcpy(sum + i, &s, sizeof s);
    }
    for (; i < d; i++)
        for (int j = 0; j < ROWS; j++)
            sum[i] += scales[j] * rows[j][i];
}
// [/add_rows]

#endif
