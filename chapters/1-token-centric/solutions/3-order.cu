// Exercise 1.3, solution: a block a token. A warp a row of down, neighbouring lanes at neighbouring elements; then a
// thread a column of y, which every thread of the block reads from the same row of up.
#include "plugin.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

enum { THREADS = 256, WARP = 32 };

__device__ static float element(fmoe_dtype dtype, const void *tensor, int64_t i) {
    if (dtype == FMOE_F32)
        return ((const float *)tensor)[i];
    if (dtype == FMOE_F16)
        return __half2float(((const __half *)tensor)[i]);
    return __bfloat162float(((const __nv_bfloat16 *)tensor)[i]);
}

__device__ static void store(fmoe_dtype dtype, void *tensor, int64_t i, float value) {
    if (dtype == FMOE_F32)
        ((float *)tensor)[i] = value;
    else if (dtype == FMOE_F16)
        ((__half *)tensor)[i] = __float2half_rn(value);
    else
        ((__nv_bfloat16 *)tensor)[i] = __float2bfloat16_rn(value);
}

// A block of 256 threads a token; 4·K bytes of shared memory. Reads a row of each table a pair, once, in pieces of 32
// elements, and x K times (from the L1).
__global__ static void __launch_bounds__(THREADS) one_token(fmoe_expert_args a) {
    extern __shared__ float activation[]; // [K]
    int64_t t = blockIdx.x, lane = threadIdx.x % WARP;
    const int32_t *expert = a.indices + t * a.K;
    for (int64_t k = threadIdx.x / WARP; k < a.K; k += THREADS / WARP) {
        float sum = 0;
        for (int64_t i = lane; i < a.d; i += WARP)
            sum += element(a.dtype, a.x, t * a.d + i) * element(a.dtype, a.down, expert[k] * a.d + i);
        for (int apart = WARP / 2; apart > 0; apart /= 2)
            sum += __shfl_xor_sync(0xffffffffu, sum, apart);
        if (lane == 0)
            activation[k] = sum / (1 + expf(-sum)) * a.weights[t * a.K + k];
    }
    __syncthreads();
    for (int64_t column = threadIdx.x; column < a.d; column += THREADS) {
        float sum = 0;
        for (int64_t k = 0; k < a.K; k++)
            sum += activation[k] * element(a.dtype, a.up, expert[k] * a.d + column);
        store(a.dtype, a.y, t * a.d + column, sum);
    }
}

static bool fits(const void *args) {
    return ((const fmoe_expert_args *)args)->K <= 12 * 1024;
}

static fmoe_status run(const void *args, void *workspace, size_t bytes, void *stream) {
    fmoe_expert_args a = *(const fmoe_expert_args *)args;
    (void)workspace, (void)bytes;
    if (a.T == 0)
        return FMOE_OK;
    one_token<<<(unsigned)a.T, THREADS, (size_t)a.K * sizeof(float), (cudaStream_t)stream>>>(a);
    return cudaGetLastError() == cudaSuccess ? FMOE_OK : FMOE_CUDA;
}

const fmoe_plugin fmoe_plugin_rung = {
    FMOE_STEPS_VERSION, "expert", "a block a token", run, BACKEND_CUDA, 0, NULL, fits, NULL};
