// Rung: the vendor's product. It cannot normalise on the way in, so x̂ goes through memory, and logits that keep their
// digits want it in float32.
#include "../machine/machine_cuda.h"
#include "router.cuh"

#include "../../chapters/workspace.h"

#define CONVERT_THREADS 256

static float *carve_gate(const fmoe_router_args *args, void *workspace, size_t *used) {
    return (float *)carve(workspace, used, (size_t)(2 * args->n) * (size_t)args->d * sizeof(float));
}

extern "C" size_t cuda_router_cublas_bytes(const void *args) {
    size_t used = cuda_router_x_hat_bytes(args);
    carve_gate((const fmoe_router_args *)args, NULL, &used);
    return used;
}

extern "C" bool cuda_router_fits_int(const void *arguments) {
    const fmoe_router_args *args = (const fmoe_router_args *)arguments;
    return args->T <= INT32_MAX && args->d <= INT32_MAX && args->n <= INT32_MAX;
}

// Launch: a thread an element, 256 a block. Shared memory: none. Traffic: the gate once in its type, once in float32.
template <typename E> __global__ void convert_kernel(int64_t count, const E *from, float *to) {
    int64_t i = (int64_t)blockIdx.x * CONVERT_THREADS + threadIdx.x;
    if (i < count)
        to[i] = to_f32(from[i]);
}

static fmoe_status convert_gate(const fmoe_router_args *args, float *gate, cudaStream_t stream) {
    int64_t count = 2 * args->n * args->d;
    unsigned blocks = (unsigned)ceil_div(count, CONVERT_THREADS);
    WITH_DTYPE(args->dtype, E,
               convert_kernel<E><<<blocks, CONVERT_THREADS, 0, stream>>>(count, (const E *)args->gate, gate));
    return launched("convert_kernel");
}

// A product for each side: its logits are one matrix [T, n].
extern "C" fmoe_status cuda_router_cublas(const void *arguments, void *workspace, size_t bytes, void *stream) {
    const fmoe_router_args *args = (const fmoe_router_args *)arguments;
    size_t used = 0;
    router_scratch s = router_carve(args, true, workspace, &used);
    float *gate = carve_gate(args, workspace, &used);
    TRY(router_check(args, workspace, bytes, used));
    if (!cuda_router_fits_int(args))
        return fmoe_fail(FMOE_UNSUPPORTED, "tokens = %lld: the library counts with int", (long long)args->T);
    if (args->T == 0)
        return FMOE_OK;
    TRY(router_set_norm(args, s, false, (cudaStream_t)stream));
    TRY(router_normalise(args, s, (cudaStream_t)stream));
    TRY(convert_gate(args, gate, (cudaStream_t)stream));
    for (int64_t side = 0; side < 2; side++)
        TRY(cublas_product(FMOE_F32, (int)args->T, (int)args->n, (int)args->d, s.x_hat, gate + side * args->n * args->d,
                           args->logits + side * args->T * args->n, stream));
    return router_log_softmax(args, (cudaStream_t)stream);
}
