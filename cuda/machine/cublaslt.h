/* The vendor's other interface to its products (cublaslt.cu): the caller's workspace, and an algorithm chosen once. */
#ifndef FMOE_CUBLASLT_H
#define FMOE_CUBLASLT_H

#include "machine_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CUBLASLT_WORKSPACE ((size_t)32 << 20)

/* As cublas_product (machine_cuda.h), with CUBLASLT_WORKSPACE bytes of workspace, by the library's first choice for
 * these sizes, which is asked for at their first product. Without cuBLASLt by cublas_product. */
fmoe_status cublaslt_product(fmoe_dtype dtype, int M, int N, int K, const void *a, const void *b, void *c,
                             void *workspace, void *stream);

#ifdef __cplusplus
}
#endif
#endif
