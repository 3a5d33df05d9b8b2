// The vendor's matrix product, opened at run time: where it is missing, nothing else is.
#include "bench.cuh"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

// cuBLAS's own names and numbers, so that its headers are not needed either.
enum { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1, CUBLAS_COMPUTE_32F = 68, CUBLAS_DEFAULT_ALGORITHM = -1 };
typedef int gemm_ex(void *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a, int a_type,
                    int lda, const void *b, int b_type, int ldb, const void *beta, void *c, int c_type, int ldc,
                    int compute_type, int algorithm);

static gemm_ex *gemm;
static int (*set_stream)(void *handle, cudaStream_t stream);
static void *handle;

static void *open_library() {
    const char *folders[] = {"", "/usr/local/cuda/lib64/"};
    char name[64];
    for (int version = 13; version >= 11; version--)
        for (int f = 0; f < 2; f++) {
            snprintf(name, sizeof name, "%slibcublas.so.%d", folders[f], version);
            void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
            if (library)
                return library;
        }
    return NULL;
}

bool cublas_available(void) {
    static bool tried;
    if (tried)
        return handle;
    tried = true;
    void *library = open_library();
    if (!library)
        return false;
    int (*create)(void **handle) = (int (*)(void **))dlsym(library, "cublasCreate_v2");
    set_stream = (int (*)(void *, cudaStream_t))dlsym(library, "cublasSetStream_v2");
    gemm = (gemm_ex *)dlsym(library, "cublasGemmEx");
    if (!create || !set_stream || !gemm || create(&handle) != 0)
        handle = NULL;
    return handle;
}

static int type_of(fmoe_dtype dtype) {
    return dtype == FMOE_F32 ? CUDA_R_32F : dtype == FMOE_F16 ? CUDA_R_16F : CUDA_R_16BF;
}

// cuBLAS counts columns first: its C [N, M] is this c, and cᵀ = b · aᵀ.
fmoe_status cublas_product(fmoe_dtype dtype, int M, int N, int K, const void *a, const void *b, void *c, void *stream) {
    TRY(check_dtype(dtype));
    if (!cublas_available())
        return fmoe_fail(FMOE_UNSUPPORTED, "libcublas.so is not installed");
    float one = 1, zero = 0;
    int type = type_of(dtype), error = set_stream(handle, (cudaStream_t)stream);
    if (error == 0)
        error = gemm(handle, CUBLAS_OP_T, CUBLAS_OP_N, N, M, K, &one, b, type, K, a, type, K, &zero, c, type, N,
                     CUBLAS_COMPUTE_32F, CUBLAS_DEFAULT_ALGORITHM);
    return error == 0 ? FMOE_OK : fmoe_fail(FMOE_CUDA, "cublasGemmEx: status %d", error);
}
