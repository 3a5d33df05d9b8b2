/* Rows by vectors of 16 floats, one cache line: what the expert rungs are made of once `omp simd` is not enough.
 *
 * gcc and clang lower these vectors to whatever the machine has (one register with AVX-512, two with AVX2, four with
 * NEON). Every function sums in an order that depends on d alone, never on who calls it, so a dot product has the same
 * bits in whichever thread and whichever group of rows it is computed. */
#ifndef FMOE_ROWS_H
#define FMOE_ROWS_H

#include <stdint.h>
#include <string.h>

enum { LANES = 16, ROWS = 8 };
typedef float lanes __attribute__((vector_size(64)));
typedef float half_lanes __attribute__((vector_size(32)));
typedef float quarter_lanes __attribute__((vector_size(16)));

/* A tree: 16 sums, then 8, 4, 2, 1. */
// [tree]
static inline float sum_lanes(const lanes *sums) {
    half_lanes half[2];
    memcpy(half, sums, sizeof half);
    half[0] += half[1];
    quarter_lanes quarter[2];
    memcpy(quarter, half, sizeof quarter);
    quarter[0] += quarter[1];
    return (quarter[0][0] + quarter[0][1]) + (quarter[0][2] + quarter[0][3]);
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
