/* The vendor library on a CPU, where it is installed: loaded when asked for, so that nothing here depends on it. */
#ifndef FMOE_OPENBLAS_H
#define FMOE_OPENBLAS_H

#include <stdbool.h>

/* C = alpha · op(A) · op(B) + beta · C, in float32, as in the CBLAS interface. */
typedef void openblas_sgemm_fn(int order, int transpose_a, int transpose_b, int M, int N, int K, float alpha,
                               const float *A, int lda, const float *B, int ldb, float beta, float *C, int ldc);
enum { BLAS_ROW_MAJOR = 101, BLAS_NO_TRANSPOSE = 111, BLAS_TRANSPOSE = 112 };

bool openblas_available(void);
/* Only if it is available. Uses as many threads as OpenMP would. */
openblas_sgemm_fn *openblas_sgemm(void);

#endif
