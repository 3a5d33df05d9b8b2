// Rung `cusparse`, the library's. The expert step as two operations on a sparse matrix of T rows and N columns, whose
// entries are the pairs: a sampled product, S = x · downᵀ at the entries, and a sparse one, y = A · up.
#include "expert.h"
#include "expert.cuh"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

// cuSPARSE's own names and numbers, so that its headers are not needed; the library is opened at run time.
enum { CUSPARSE_INDEX_32I = 2, CUSPARSE_ORDER_ROW = 2, CUSPARSE_TRANSPOSE = 1, CUSPARSE_SPMM_CSR_ALG2 = 6 };
typedef int create_csr(void **matrix, int64_t rows, int64_t columns, int64_t entries, const void *offsets,
                       const void *indices, const void *values, int offset_type, int index_type, int base, int type);
typedef int create_dense(void **matrix, int64_t rows, int64_t columns, int64_t pitch, const void *values, int type,
                         int order);
typedef int get_size(void *handle, int op_a, int op_b, const void *alpha, const void *a, const void *b,
                     const void *beta, void *c, int compute_type, int algorithm, size_t *bytes);
typedef int multiply(void *handle, int op_a, int op_b, const void *alpha, const void *a, const void *b,
                     const void *beta, void *c, int compute_type, int algorithm, void *buffer);

static struct {
    void *handle;
    int (*set_stream)(void *handle, cudaStream_t stream);
    create_csr *csr;
    create_dense *dense;
    int (*destroy_csr)(void *matrix), (*destroy_dense)(void *matrix);
    get_size *sampled_size, *sparse_size;
    multiply *sampled, *sparse;
} library;

static void *open_library() {
    const char *folders[] = {"", "/usr/local/cuda/lib64/"};
    char name[64];
    for (int version = 12; version >= 11; version--)
        for (int f = 0; f < 2; f++) {
            snprintf(name, sizeof name, "%slibcusparse.so.%d", folders[f], version);
            void *opened = dlopen(name, RTLD_NOW | RTLD_LOCAL);
            if (opened)
                return opened;
        }
    return NULL;
}

extern "C" bool cuda_expert_cusparse_available(void) {
    static bool tried;
    if (tried)
        return library.handle;
    tried = true;
    void *from = open_library();
    if (!from)
        return false;
    int (*create)(void **handle) = (int (*)(void **))dlsym(from, "cusparseCreate");
    library.set_stream = (int (*)(void *, cudaStream_t))dlsym(from, "cusparseSetStream");
    library.csr = (create_csr *)dlsym(from, "cusparseCreateCsr");
    library.dense = (create_dense *)dlsym(from, "cusparseCreateDnMat");
    library.destroy_csr = (int (*)(void *))dlsym(from, "cusparseDestroySpMat");
    library.destroy_dense = (int (*)(void *))dlsym(from, "cusparseDestroyDnMat");
    library.sampled_size = (get_size *)dlsym(from, "cusparseSDDMM_bufferSize");
    library.sparse_size = (get_size *)dlsym(from, "cusparseSpMM_bufferSize");
    library.sampled = (multiply *)dlsym(from, "cusparseSDDMM");
    library.sparse = (multiply *)dlsym(from, "cusparseSpMM");
    bool complete = create && library.set_stream && library.csr && library.dense && library.destroy_csr &&
                    library.destroy_dense && library.sampled_size && library.sparse_size && library.sampled &&
                    library.sparse;
    if (!complete || create(&library.handle) != 0)
        library.handle = NULL;
    return library.handle;
}

// ---- A problem: what the library keeps about it, and the workspace

typedef struct {
    fmoe_expert_args args;
    const char *workspace;
    void *s, *a;             // [T, N] sparse: pre-activations, activations
    void *x, *down, *up, *y; // dense
    size_t offsets, columns, values, wide_x, wide_down, sums, buffer, bytes; // where the parts begin in the workspace
} sparse_problem;

static const float one = 1, zero = 0;

static int type_of(fmoe_dtype dtype) {
    return dtype == FMOE_F32 ? CUDA_R_32F : dtype == FMOE_F16 ? CUDA_R_16F : CUDA_R_16BF;
}

static void forget(sparse_problem *p) {
    void *sparse[] = {p->s, p->a}, *dense[] = {p->x, p->down, p->up, p->y};
    for (void *matrix : sparse)
        if (matrix)
            library.destroy_csr(matrix);
    for (void *matrix : dense)
        if (matrix)
            library.destroy_dense(matrix);
    memset(p, 0, sizeof *p);
}

// The library has no sampled product of bfloat16: it is given float32 copies of x and down.
static bool is_widened(fmoe_dtype dtype) {
    return dtype == FMOE_BF16;
}

// Its sparse product stores sums of 16 bits on the way if y has 16 bits, and misses the error limit: y is float32, and
// rounded after it.
static bool is_narrowed(fmoe_dtype dtype) {
    return dtype != FMOE_F32;
}

static void lay_out(const fmoe_expert_args *a, sparse_problem *p) {
    size_t pairs = (size_t)(a->T * a->K), floats = sizeof(float);
    bool widened = is_widened(a->dtype);
    p->offsets = expert_bytes(a->T, a->K, 0);
    p->columns = p->offsets + up_to_256((size_t)(a->T + 1) * sizeof(int32_t));
    p->values = p->columns + up_to_256(pairs * sizeof(int32_t));
    p->wide_x = p->values + up_to_256(pairs * floats);
    p->wide_down = p->wide_x + (widened ? up_to_256((size_t)(a->T * a->d) * floats) : 0);
    p->sums = p->wide_down + (widened ? up_to_256((size_t)(a->N * a->d) * floats) : 0);
    p->buffer = p->sums + (is_narrowed(a->dtype) ? up_to_256((size_t)(a->T * a->d) * floats) : 0);
}

// The matrices, as the library sees them, and the bytes it wants for itself. Nonzero: it refuses.
static int describe(const fmoe_expert_args *a, const char *workspace, sparse_problem *p) {
    expert_task task = {};
    task.T = (int)a->T;
    task.K = (int)a->K;
    expert_lay_out(&task, (void *)workspace);
    memset(p, 0, sizeof *p);
    lay_out(a, p);
    p->args = *a;
    p->workspace = workspace;
    bool wide = is_widened(a->dtype), narrowed = is_narrowed(a->dtype);
    int type = type_of(a->dtype), sampled_type = wide ? CUDA_R_32F : type, error = 0;
    const void *x = wide ? workspace + p->wide_x : a->x, *down = wide ? workspace + p->wide_down : a->down;
    const char *offsets = workspace + p->offsets, *columns = workspace + p->columns;
    int64_t pairs = a->T * a->K;
    error |= library.csr(&p->s, a->T, a->N, pairs, offsets, columns, task.activations, CUSPARSE_INDEX_32I,
                         CUSPARSE_INDEX_32I, 0, CUDA_R_32F);
    error |= library.csr(&p->a, a->T, a->N, pairs, offsets, columns, workspace + p->values, CUSPARSE_INDEX_32I,
                         CUSPARSE_INDEX_32I, 0, type);
    error |= library.dense(&p->x, a->T, a->d, a->d, x, sampled_type, CUSPARSE_ORDER_ROW);
    error |= library.dense(&p->down, a->N, a->d, a->d, down, sampled_type, CUSPARSE_ORDER_ROW);
    error |= library.dense(&p->up, a->N, a->d, a->d, a->up, type, CUSPARSE_ORDER_ROW);
    error |= library.dense(&p->y, a->T, a->d, a->d, narrowed ? workspace + p->sums : (const char *)a->y, CUDA_R_32F,
                           CUSPARSE_ORDER_ROW);
    size_t sampled = 0, sparse = 0;
    if (error == 0)
        error = library.sampled_size(library.handle, 0, CUSPARSE_TRANSPOSE, &one, p->x, p->down, &zero, p->s,
                                     CUDA_R_32F, 0, &sampled);
    if (error == 0)
        error = library.sparse_size(library.handle, 0, 0, &one, p->a, p->up, &zero, p->y, CUDA_R_32F,
                                    CUSPARSE_SPMM_CSR_ALG2, &sparse);
    p->bytes = p->buffer + (sampled > sparse ? sampled : sparse);
    return error;
}

extern "C" size_t cuda_expert_cusparse_bytes(const void *args) {
    const fmoe_expert_args *a = (const fmoe_expert_args *)args;
    if (!cuda_expert_cusparse_available() || a->T == 0)
        return expert_bytes(a->T, a->K, 0);
    sparse_problem p;
    // Only asked about: the library wants addresses that could be some.
    fmoe_expert_args asked = *a;
    const void **pointers[] = {&asked.x, &asked.down, &asked.up, (const void **)&asked.y};
    for (const void **pointer : pointers)
        *pointer = *pointer ? *pointer : (const void *)4096;
    size_t bytes = describe(&asked, (const char *)4096, &p) == 0 ? p.bytes : expert_bytes(a->T, a->K, 0);
    forget(&p);
    return bytes;
}

extern "C" bool cuda_expert_cusparse_supports(const void *args) {
    const fmoe_expert_args *a = (const fmoe_expert_args *)args;
    return a->T <= INT32_MAX / a->K; // offsets of 32 bits
}

// ---- What the library does not do

// Launch: a warp a token, 8 a block. Shared memory: none. Traffic: 8 bytes a pair. The matrix's rows are the tokens:
// its offsets are t · K, its columns the indices as they stand. In place of a bad index the token's first good one
// stands, or 0; its activation will be 0.
// [csr]
static __global__ void __launch_bounds__(8 * WARP) csr_kernel(expert_task a, int32_t *offsets, int32_t *columns) {
    int t = blockIdx.x * 8 + threadIdx.x / WARP, lane = threadIdx.x % WARP, first_bad = a.K, first_good = a.K;
    if (t >= a.T)
        return;
    int64_t row = (int64_t)t * a.K;
    for (int k = a.K - 1 - lane; k >= 0; k -= WARP) {
        bool good = expert_of_pair(a, row + k) != NO_EXPERT;
        first_bad = good ? first_bad : k;
        first_good = good ? k : first_good;
    }
    for (int step = WARP / 2; step; step /= 2) {
        first_bad = min(first_bad, __shfl_xor_sync(ALL_LANES, first_bad, step));
        first_good = min(first_good, __shfl_xor_sync(ALL_LANES, first_good, step));
    }
    int32_t instead = first_good < a.K ? a.indices[row + first_good] : 0;
    for (int k = lane; k < a.K; k += WARP) {
        int32_t e = expert_of_pair(a, row + k);
        columns[row + k] = e == NO_EXPERT ? instead : e;
    }
    if (lane > 0)
        return;
    offsets[t] = (int32_t)row;
    if (t == a.T - 1)
        offsets[a.T] = a.T * a.K;
    write_note(a, t, first_bad);
}
// [/csr]

// Launch: a thread an element, 256 a block. Shared memory: none. Traffic: 6 bytes an element.
template <typename E> __global__ void __launch_bounds__(256) widen_kernel(const E *from, float *to, int64_t count) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count)
        to[i] = to_f32(from[i]);
}

// The same back.
template <typename E> __global__ void __launch_bounds__(256) narrow_kernel(const float *from, E *to, int64_t count) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count)
        to[i] = from_f32<E>(from[i]);
}

// Launch: a thread a pair, 256 a block. Shared memory: none. Traffic: 12 bytes a pair in, one element out.
// [between]
template <typename E> __global__ void __launch_bounds__(256) values_kernel(expert_task a, E *values) {
    int64_t pair = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (pair < (int64_t)a.T * a.K)
        values[pair] =
            from_f32<E>(expert_of_pair(a, pair) == NO_EXPERT ? 0 : silu(a.activations[pair]) * a.weights[pair]);
}
// [/between]

template <typename E> static fmoe_status widen(const void *from, float *to, int64_t count, cudaStream_t stream) {
    widen_kernel<E><<<(unsigned)ceil_div(count, 256), 256, 0, stream>>>((const E *)from, to, count);
    return launched("widen_kernel");
}

static fmoe_status library_call(const char *name, int error) {
    return error == 0 ? FMOE_OK : fmoe_fail(FMOE_CUDA, "%s: status %d", name, error);
}

// [two-products]
template <typename E>
static fmoe_status run(const expert_task &a, const sparse_problem *p, char *workspace, cudaStream_t stream) {
    void *buffer = workspace + p->buffer;
    csr_kernel<<<(unsigned)ceil_div(a.T, 8), 8 * WARP, 0, stream>>>(a, (int32_t *)(workspace + p->offsets),
                                                                    (int32_t *)(workspace + p->columns));
    TRY(launched("csr_kernel"));
    if (is_widened(a.dtype)) {
        TRY(widen<E>(a.x, (float *)(workspace + p->wide_x), (int64_t)a.T * a.d, stream));
        TRY(widen<E>(a.down, (float *)(workspace + p->wide_down), (int64_t)a.N * a.d, stream));
    }
    TRY(library_call("cusparseSDDMM", library.sampled(library.handle, 0, CUSPARSE_TRANSPOSE, &one, p->x, p->down, &zero,
                                                      p->s, CUDA_R_32F, 0, buffer)));
    values_kernel<E><<<(unsigned)ceil_div((int64_t)a.T * a.K, 256), 256, 0, stream>>>(a, (E *)(workspace + p->values));
    TRY(launched("values_kernel"));
    TRY(library_call("cusparseSpMM", library.sparse(library.handle, 0, 0, &one, p->a, p->up, &zero, p->y, CUDA_R_32F,
                                                    CUSPARSE_SPMM_CSR_ALG2, buffer)));
    if (!is_narrowed(a.dtype))
        return FMOE_OK;
    int64_t count = (int64_t)a.T * a.d;
    narrow_kernel<E>
        <<<(unsigned)ceil_div(count, 256), 256, 0, stream>>>((float *)(workspace + p->sums), (E *)a.y, count);
    return launched("narrow_kernel");
}
// [/two-products]

// The library's own view of the last problem is kept, so that a second call does not pay for it again. This is a
// baseline's privilege: nothing else here remembers a call.
static sparse_problem last;

extern "C" fmoe_status cuda_expert_cusparse(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    expert_task a;
    TRY(expert_from_args(args, workspace, workspace_bytes, cuda_expert_bytes(args), &a));
    if (a.T == 0)
        return FMOE_OK;
    if (!cuda_expert_cusparse_available())
        return fmoe_fail(FMOE_UNSUPPORTED, "libcusparse.so is not installed");
    if (!cuda_expert_cusparse_supports(args))
        return fmoe_fail(FMOE_UNSUPPORTED, "tokens · num_experts_per_tok exceeds %d", INT32_MAX);
    if (memcmp(&last.args, args, sizeof last.args) != 0 || last.workspace != workspace) {
        forget(&last);
        int error = describe((const fmoe_expert_args *)args, (const char *)workspace, &last);
        if (error != 0) {
            forget(&last);
            return fmoe_fail(FMOE_UNSUPPORTED, "cuSPARSE: status %d", error);
        }
    }
    TRY(check_workspace(workspace, workspace_bytes, last.bytes));
    TRY(library_call("cusparseSetStream", library.set_stream(library.handle, (cudaStream_t)stream)));
    WITH_DTYPE(a.dtype, E, return run<E>(a, &last, (char *)workspace, (cudaStream_t)stream));
}
