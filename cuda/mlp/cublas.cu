// Rung: the vendor's products. The activation needs gate's and up's whole, so they go through memory and back.
#include "../machine/cublaslt.h"
#include "mlp.cuh"

#include "../../chapters/workspace.h"

#define SWIGLU_THREADS 256

typedef struct {
    void *gate, *up; // the products, [T, I]; the hidden units replace gate's
    void *product;   // the library's
} cublas_scratch;

static cublas_scratch carve_cublas(const fmoe_mlp_args *args, void *workspace, size_t *used) {
    cublas_scratch s;
    size_t hidden = cuda_mlp_hidden_bytes(args);
    s.gate = carve(workspace, used, hidden);
    s.up = carve(workspace, used, hidden);
    s.product = carve(workspace, used, CUBLASLT_WORKSPACE);
    return s;
}

extern "C" size_t cuda_mlp_cublas_bytes(const void *args) {
    size_t used = 0;
    carve_cublas((const fmoe_mlp_args *)args, NULL, &used);
    return used;
}

// Launch: a thread 16 bytes of each product, 256 a block. Shared memory: none. Traffic: both products in, the hidden
// units out, in place of gate's.
template <typename E>
__global__ void __launch_bounds__(SWIGLU_THREADS) swiglu_kernel(int64_t count, E *gate, const E *up) {
    int64_t first = ((int64_t)blockIdx.x * SWIGLU_THREADS + threadIdx.x) * pack16<E>::count;
    if (first + pack16<E>::count <= count) {
        float p[pack16<E>::count], q[pack16<E>::count];
        unpack_f32<E>(*(const uint4 *)(gate + first), p);
        unpack_f32<E>(*(const uint4 *)(up + first), q);
        pack16<E> h;
        for (int i = 0; i < h.count; i++)
            h.at[i] = from_f32<E>(swiglu(p[i], q[i]));
        *(pack16<E> *)(gate + first) = h;
        return;
    }
    for (int64_t i = first; i < count; i++)
        gate[i] = from_f32<E>(swiglu(to_f32(gate[i]), to_f32(up[i])));
}

extern "C" fmoe_status cuda_mlp_cublas(const void *arguments, void *workspace, size_t bytes, void *stream) {
    const fmoe_mlp_args *args = (const fmoe_mlp_args *)arguments;
    size_t used = 0;
    cublas_scratch s = carve_cublas(args, workspace, &used);
    TRY(mlp_check(args, workspace, bytes, used));
    TRY(mlp_check_rows(args, cuda_mlp_fits_int(args), "the library counts with int"));
    if (args->T == 0)
        return FMOE_OK;
    int T = (int)args->T, d = (int)args->d, I = (int)args->I;
    TRY(cublaslt_product(args->dtype, T, I, d, args->x, args->gate, s.gate, s.product, stream));
    TRY(cublaslt_product(args->dtype, T, I, d, args->x, args->up, s.up, s.product, stream));
    int64_t count = args->T * args->I,
            blocks = ceil_div(count, SWIGLU_THREADS * 16 / (int64_t)fmoe_dtype_size(args->dtype));
    WITH_DTYPE(args->dtype, E,
               swiglu_kernel<E>
               <<<(unsigned)blocks, SWIGLU_THREADS, 0, (cudaStream_t)stream>>>(count, (E *)s.gate, (const E *)s.up));
    TRY(launched("swiglu_kernel"));
    return cublaslt_product(args->dtype, T, d, I, s.gate, args->down, args->y, s.product, stream);
}
