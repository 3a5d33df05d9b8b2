/* What the steps of the reference share: saying what was wrong with an argument, temporary memory, sums of rows. */
#ifndef FMOE_CHECK_H
#define FMOE_CHECK_H

#include "fmoe.h"

/* Keeps the formatted message for fmoe_error_message() and returns the status. */
fmoe_status fmoe_fail(fmoe_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Leaves the function with the status of a call that failed. */
#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        fmoe_status status_ = (call);                                                                                  \
        if (status_ != FMOE_OK)                                                                                        \
            return status_;                                                                                            \
    } while (0)

/* No array may have more elements than this: a few of them, of doubles, still fit a byte count. */
#define FMOE_MAX_ELEMENTS (INT64_MAX / 64)

fmoe_status fmoe_check_size(const char *name, int64_t value); /* at least 1 */
fmoe_status fmoe_check_tokens(int64_t T);                     /* at least 0 */
fmoe_status fmoe_check_topk(int64_t K, const char *limit_name, int64_t limit);
/* The [rows, columns] array's element count; both sizes were checked before. */
fmoe_status fmoe_check_shape(const char *row_name, int64_t rows, const char *column_name, int64_t columns);
/* A schedule numbers the T·K pairs with int32_t. Sizes below 1 are left to the other checks. */
fmoe_status fmoe_check_pairs(int64_t T, int64_t K);
/* An array without elements may be NULL. */
fmoe_status fmoe_check_pointer(const char *name, const void *pointer, int64_t count);
/* N is at least 1 and every index fits int32_t. */
fmoe_status fmoe_check_experts(int64_t N);
fmoe_status fmoe_check_indices(int64_t T, int64_t K, const int32_t *indices, const char *limit_name, int64_t limit);

/* Uninitialised memory that the caller frees; NULL only when there is none. */
void *fmoe_allocate(int64_t count, size_t size);
fmoe_status fmoe_no_memory(int64_t count, size_t size);

/* ⟨a, b⟩. Always this one function, so that the same two rows give the same bits whoever asks. */
double fmoe_dot(int64_t count, const float *a, const float *b);

/* log Σ exp z over n logits is best + what is returned; NaN if one of them is NaN or +∞ (router.c). */
double fmoe_log_sum_exp(int64_t n, const float *z, double *best);

/* Sums of rows run over blocks of columns: the sums of a block are doubles on the stack, and the block of every row
 * stays in the first-level cache. */
#define FMOE_BLOCK 64

static inline int64_t fmoe_block_width(int64_t first, int64_t columns) {
    return columns - first < FMOE_BLOCK ? columns - first : FMOE_BLOCK;
}

static inline void fmoe_add_row(int64_t width, double scale, const float *row, double *sum) {
#pragma omp simd
    for (int64_t c = 0; c < width; c++)
        sum[c] += scale * row[c];
}

static inline void fmoe_store_row(int64_t width, const double *sum, fmoe_write write, float *row) {
    for (int64_t c = 0; c < width; c++)
        row[c] = (float)(write == FMOE_ACCUMULATE ? row[c] + sum[c] : sum[c]);
}

#endif
