/* The tile machinery of chapters 6 to 9: C = A·Bᵀ in float32, with packed operands and a block of C held in registers.
 *
 *     A [M, k] ──pack──► panels of GEMM_MR rows ──┐
 *                                                 ├──► a tile of C, over all of k, in registers ──► epilogue
 *     B [N, k] ──pack──► panels of GEMM_NR rows ──┘
 *
 * An operand has any storage type and lies either way round (strides); packing converts and transposes it, so that the
 * inner loop reads both panels from front to back. An element of C is one chain of float32 sums over k = 0, 1, 2, ...
 * whatever the tile, the block or the thread it falls to: the same bits for any number of threads. What becomes of a
 * finished tile is the caller's business: an epilogue stores it, picks from it, or feeds it through SwiGLU.
 */
#ifndef FMOE_GEMM_H
#define FMOE_GEMM_H

#include "../ref_cpu/fmoe.h"

// [tile]
/* The block of C in registers: GEMM_MR × 2 vectors. That is 24 accumulators of 32 registers, or 12 of 16; what is left
 * holds the two vectors of B and the element of A that are being multiplied. */
#if defined(__AVX512F__)
#define GEMM_VECTOR 16
#elif defined(__AVX__)
#define GEMM_VECTOR 8
#else
#define GEMM_VECTOR 4
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define GEMM_MR 12
#else
#define GEMM_MR 6
#endif
#define GEMM_NR (2 * GEMM_VECTOR)
// [/tile]

/* One operand: row r at depth p lies at data[r · row_stride + p · depth_stride]. One of the strides is 1: depth_stride
 * for a matrix stored as [rows, k], row_stride for one stored as [k, rows]. */
typedef struct {
    fmoe_dtype dtype;
    const void *data;
    int64_t row_stride, depth_stride;
    const int32_t *gather; /* optional, needs depth_stride 1: row r is row gather[r] of data */
    const void *pair;      /* optional, B only: a second matrix of the same form (see gemm_epilogue) */
} gemm_operand;

/* A matrix [rows, columns] as an operand: its rows, or its columns, become rows of the product. */
static inline gemm_operand by_rows(fmoe_dtype dtype, const void *data, int64_t columns) {
    return (gemm_operand){.dtype = dtype, .data = data, .row_stride = columns, .depth_stride = 1};
}

static inline gemm_operand by_columns(fmoe_dtype dtype, const void *data, int64_t columns) {
    return (gemm_operand){.dtype = dtype, .data = data, .row_stride = 1, .depth_stride = columns};
}

/* Takes a finished tile: values[r][c] is element (row + r, column + c) of C. Called once for every tile, from several
 * threads, in any order. Where B has a pair, a tile holds GEMM_VECTOR columns of both products: those of the pair
 * are values[r][GEMM_VECTOR + c]. */
typedef void gemm_epilogue(void *context, int64_t row, int64_t column, int64_t rows, int64_t columns,
                           const float (*values)[GEMM_NR]);

/* C = A·Bᵀ for A [M, k] and B [N, k] by all threads; sizes may be 0. The workspace is aligned to 64 bytes and has the
 * bytes that gemm_workspace asks for under the same omp_get_max_threads(): A packed, and a block of B a thread. */
size_t gemm_workspace(int64_t M, int64_t N, int64_t k);
fmoe_status gemm(int64_t M, int64_t N, int64_t k, const gemm_operand *A, const gemm_operand *B, gemm_epilogue *epilogue,
                 void *context, void *workspace, size_t workspace_bytes);

/* The same by the calling thread alone, for callers that are parallel themselves. */
size_t gemm_serial_workspace(int64_t M, int64_t N, int64_t k);
fmoe_status gemm_serial(int64_t M, int64_t N, int64_t k, const gemm_operand *A, const gemm_operand *B,
                        gemm_epilogue *epilogue, void *context, void *workspace, size_t workspace_bytes);

/* The plain epilogue: stores C [M, N] in dtype. context: a gemm_target. */
typedef struct {
    fmoe_dtype dtype;
    void *data;
    int64_t row_stride;
} gemm_target;
gemm_epilogue gemm_store;

#endif
