// The vendor's matrix product as its users call it: an algorithm for each shape, chosen once, and a workspace. Opened
// at run time.
#include "../device.cuh"
#include "cublaslt.h"

#include <dlfcn.h>
#include <stdio.h>

// cuBLASLt's own names and numbers, so that its headers are not needed.
enum { LT_COMPUTE_32F = 68, LT_TRANS_A = 3, LT_WORKSPACE_BYTES = 1, LT_OP_T = 1 };
typedef struct {
    uint64_t algorithm[8];
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
} lt_choice;
typedef struct {
    void *handle;
    int (*create)(void **);
    int (*describe)(void **product, int compute_type, int scale_type);
    int (*set_product)(void *product, int attribute, const void *value, size_t bytes);
    int (*layout)(void **layout, int type, uint64_t rows, uint64_t columns, int64_t ld);
    int (*preference)(void **preference);
    int (*set_preference)(void *preference, int attribute, const void *value, size_t bytes);
    int (*choose)(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference, int count,
                  lt_choice *choices, int *found);
    int (*multiply)(void *handle, void *product, const void *alpha, const void *a, void *a_layout, const void *b,
                    void *b_layout, const void *beta, const void *c, void *c_layout, void *d, void *d_layout,
                    const uint64_t *algorithm, void *workspace, size_t workspace_bytes, cudaStream_t stream);
} lt_library;

static void *open_library(void) {
    const char *folders[] = {"", "/usr/local/cuda/lib64/"};
    char name[64];
    for (int version = 13; version >= 11; version--)
        for (int f = 0; f < 2; f++) {
            snprintf(name, sizeof name, "%slibcublasLt.so.%d", folders[f], version);
            void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
            if (library)
                return library;
        }
    return NULL;
}

static bool find(void *library, const char *name, void *function) {
    return (*(void **)function = dlsym(library, name)) != NULL;
}

// Whose handle is NULL where there is none.
static lt_library *lt_get(void) {
    static lt_library lt;
    static bool tried;
    if (tried)
        return &lt;
    tried = true;
    void *library = open_library();
    bool all = library && find(library, "cublasLtCreate", &lt.create) &&
               find(library, "cublasLtMatmulDescCreate", &lt.describe) &&
               find(library, "cublasLtMatmulDescSetAttribute", &lt.set_product) &&
               find(library, "cublasLtMatrixLayoutCreate", &lt.layout) &&
               find(library, "cublasLtMatmulPreferenceCreate", &lt.preference) &&
               find(library, "cublasLtMatmulPreferenceSetAttribute", &lt.set_preference) &&
               find(library, "cublasLtMatmulAlgoGetHeuristic", &lt.choose) &&
               find(library, "cublasLtMatmul", &lt.multiply);
    if (!all || lt.create(&lt.handle) != 0)
        lt.handle = NULL;
    return &lt;
}

// ---- A product that was prepared

typedef struct {
    fmoe_dtype dtype;
    int M, N, K;
    void *product, *a, *b, *c;
    lt_choice choice;
    bool usable;
} lt_plan;

// cuBLAS counts columns first: its c [N, M] is ours, and cᵀ = b · aᵀ.
static bool prepare(lt_library *lt, lt_plan *p) {
    int type = p->dtype == FMOE_F32 ? CUDA_R_32F : p->dtype == FMOE_F16 ? CUDA_R_16F : CUDA_R_16BF;
    int transposed = LT_OP_T, found = 0;
    size_t most = CUBLASLT_WORKSPACE;
    void *preference = NULL;
    return lt->describe(&p->product, LT_COMPUTE_32F, CUDA_R_32F) == 0 &&
           lt->set_product(p->product, LT_TRANS_A, &transposed, sizeof transposed) == 0 &&
           lt->layout(&p->a, type, (uint64_t)p->K, (uint64_t)p->N, p->K) == 0 &&
           lt->layout(&p->b, type, (uint64_t)p->K, (uint64_t)p->M, p->K) == 0 &&
           lt->layout(&p->c, type, (uint64_t)p->N, (uint64_t)p->M, p->N) == 0 && lt->preference(&preference) == 0 &&
           lt->set_preference(preference, LT_WORKSPACE_BYTES, &most, sizeof most) == 0 &&
           lt->choose(lt->handle, p->product, p->a, p->b, p->c, p->c, preference, 1, &p->choice, &found) == 0 &&
           found > 0;
}

// Kept for the process's life: a program has few shapes. NULL if they do not fit.
static lt_plan *plan_of(lt_library *lt, fmoe_dtype dtype, int M, int N, int K) {
    static lt_plan plans[64];
    static int count;
    for (int i = 0; i < count; i++)
        if (plans[i].dtype == dtype && plans[i].M == M && plans[i].N == N && plans[i].K == K)
            return &plans[i];
    if (count == (int)(sizeof plans / sizeof *plans))
        return NULL;
    lt_plan *p = &plans[count++];
    p->dtype = dtype, p->M = M, p->N = N, p->K = K;
    p->usable = prepare(lt, p);
    return p;
}

fmoe_status cublaslt_product(fmoe_dtype dtype, int M, int N, int K, const void *a, const void *b, void *c,
                             void *workspace, void *stream) {
    TRY(check_dtype(dtype));
    lt_library *lt = lt_get();
    lt_plan *p = lt->handle ? plan_of(lt, dtype, M, N, K) : NULL;
    if (!p || !p->usable)
        return cublas_product(dtype, M, N, K, a, b, c, stream);
    float one = 1, zero = 0;
    int error = lt->multiply(lt->handle, p->product, &one, b, p->a, a, p->b, &zero, c, p->c, c, p->c,
                             p->choice.algorithm, workspace, CUBLASLT_WORKSPACE, (cudaStream_t)stream);
    return error == 0 ? FMOE_OK : fmoe_fail(FMOE_CUDA, "cublasLtMatmul: status %d", error);
}
