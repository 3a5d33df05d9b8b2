// Rung `cublas`: the vendor's products, which take operands either way round as well, and a kernel for the middle.
#include "../../chapters/workspace.h"
#include "mlp_backward.cuh"

#include <dlfcn.h>
#include <stdio.h>

// cuBLAS's own names and numbers, so that its headers are not needed (see cuda/machine/cublas.cu).
enum { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1, CUBLAS_COMPUTE_32F = 68, CUBLAS_DEFAULT_ALGORITHM = -1 };
typedef int gemm_ex(void *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a, int a_type,
                    int lda, const void *b, int b_type, int ldb, const void *beta, void *c, int c_type, int ldc,
                    int compute_type, int algorithm);
typedef struct {
    void *handle; // NULL: not there
    gemm_ex *gemm;
    int (*set_stream)(void *handle, cudaStream_t stream);
} cublas_library;

static void *open_library(void) {
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

static const cublas_library *library(void) {
    static cublas_library l;
    static bool tried;
    if (tried)
        return &l;
    tried = true;
    void *file = open_library();
    int (*create)(void **) = file ? (int (*)(void **))dlsym(file, "cublasCreate_v2") : NULL;
    l.gemm = file ? (gemm_ex *)dlsym(file, "cublasGemmEx") : NULL;
    l.set_stream = file ? (int (*)(void *, cudaStream_t))dlsym(file, "cublasSetStream_v2") : NULL;
    if (!create || !l.gemm || !l.set_stream || create(&l.handle) != 0)
        l.handle = NULL;
    return &l;
}

// An operand stored [rows, depth], or, `down`, [depth, rows].
typedef struct {
    const void *values;
    bool down;
} cublas_operand;

// c [M, N] = a · bᵀ, or + what is in c. cuBLAS counts columns first: its c [N, M] is ours, and cᵀ = b · aᵀ.
static fmoe_status multiply(fmoe_dtype dtype, int64_t M, int64_t N, int64_t K, cublas_operand a, cublas_operand b,
                            void *c, fmoe_dtype c_dtype, bool add) {
    const int types[] = {CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF};
    int type = types[dtype];
    float one = 1, before = add ? 1 : 0;
    int error = library()->gemm(library()->handle, b.down ? CUBLAS_OP_N : CUBLAS_OP_T,
                                a.down ? CUBLAS_OP_T : CUBLAS_OP_N, (int)N, (int)M, (int)K, &one, b.values, type,
                                (int)(b.down ? N : K), a.values, type, (int)(a.down ? M : K), &before, c,
                                types[c_dtype], (int)N, CUBLAS_COMPUTE_32F, CUBLAS_DEFAULT_ALGORITHM);
    return error == 0 ? FMOE_OK : fmoe_fail(FMOE_CUDA, "cublasGemmEx: status %d", error);
}

#define MIDDLE_THREADS 256

// Launch: a thread an element, 256 a block. Shared memory: none. Traffic: dh and both derivatives in, dp and dq out.
template <typename E>
static __global__ void __launch_bounds__(MIDDLE_THREADS)
    middle_kernel(int64_t count, const float *dh, const E *by_p, const E *by_q, E *dp, E *dq) {
    int64_t i = (int64_t)blockIdx.x * MIDDLE_THREADS + threadIdx.x;
    if (i < count) {
        dp[i] = from_f32<E>(dh[i] * to_f32(by_p[i]));
        dq[i] = from_f32<E>(dh[i] * to_f32(by_q[i]));
    }
}

template <typename E> static fmoe_status middle(const mlp_backward_task &t, const float *dh, cudaStream_t stream) {
    unsigned blocks = (unsigned)ceil_div(t.T * t.I, MIDDLE_THREADS);
    middle_kernel<E><<<blocks, MIDDLE_THREADS, 0, stream>>>(t.T * t.I, dh, (const E *)t.h_by_p, (const E *)t.h_by_q,
                                                            (E *)t.dp, (E *)t.dq);
    return launched("middle_kernel");
}

// dh is kept in float32: rounded as well it would be the fourth rounding on the way to dx, too many for the limits.
static size_t lay_out(mlp_backward_task *t, float **dh, void *workspace) {
    size_t used = mlp_backward_lay_out(t, 0, workspace);
    *dh = (float *)carve(workspace, &used, (size_t)(t->T * t->I) * sizeof(float));
    return used;
}

extern "C" size_t cuda_mlp_backward_cublas_bytes(const void *args) {
    const fmoe_mlp_backward_args *a = (const fmoe_mlp_backward_args *)args;
    mlp_backward_task t = {};
    float *dh;
    t.T = a->T, t.d = a->d, t.I = a->I, t.middle = a->dtype;
    return lay_out(&t, &dh, NULL);
}

extern "C" bool cuda_mlp_backward_library_available(void) {
    return library()->handle;
}

extern "C" bool cuda_mlp_backward_library_takes(const void *args) {
    const fmoe_mlp_backward_args *a = (const fmoe_mlp_backward_args *)args;
    return a->h && a->T <= INT32_MAX && a->d <= INT32_MAX && a->I <= INT32_MAX;
}

extern "C" fmoe_status cuda_mlp_backward_cublas(const void *args, void *workspace, size_t bytes, void *stream) {
    mlp_backward_task t;
    TRY(mlp_backward_from_args(args, &t));
    if (!cuda_mlp_backward_library_available() || !cuda_mlp_backward_library_takes(args))
        return fmoe_fail(FMOE_UNSUPPORTED, "libcublas.so is missing, h was not kept, or a size is no int");
    float *dh;
    t.middle = t.dtype;
    TRY(check_workspace(workspace, bytes, lay_out(&t, &dh, workspace)));
    if (t.T == 0)
        return mlp_backward_no_tokens(t, (cudaStream_t)stream);
    if (library()->set_stream(library()->handle, (cudaStream_t)stream) != 0)
        return fmoe_fail(FMOE_CUDA, "cublasSetStream failed");
    TRY(multiply(t.dtype, t.T, t.I, t.d, {t.dy, false}, {t.down, true}, dh, FMOE_F32, false));
    WITH_DTYPE(t.dtype, E, TRY(middle<E>(t, dh, (cudaStream_t)stream)));
    TRY(multiply(t.dtype, t.d, t.I, t.T, {t.dy, true}, {t.h, true}, t.ddown, t.dtype, false));
    TRY(multiply(t.dtype, t.I, t.d, t.T, {t.dp, true}, {t.x, true}, t.dgate, t.dtype, false));
    TRY(multiply(t.dtype, t.I, t.d, t.T, {t.dq, true}, {t.x, true}, t.dup, t.dtype, false));
    TRY(multiply(t.dtype, t.T, t.d, t.I, {t.dp, false}, {t.gate, true}, t.dx, t.dtype, false));
    return multiply(t.dtype, t.T, t.d, t.I, {t.dq, false}, {t.up, true}, t.dx, t.dtype, true);
}
