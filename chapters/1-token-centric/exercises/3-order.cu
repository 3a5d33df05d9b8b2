// Exercise 1.3, starter, right: a thread a pair, then a thread an element of y whose neighbour has the next token.
#include "plugin.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

enum { THREADS = 128 };

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

// A thread a pair, 128 a block; no shared memory. A warp's 32 lanes walk 32 rows of down, an element of each at a time.
__global__ static void __launch_bounds__(THREADS) activate(fmoe_expert_args a, float *activations) {
    int64_t pair = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (pair >= a.T * a.K)
        return;
    float sum = 0;
    for (int64_t i = 0; i < a.d; i++)
        sum += element(a.dtype, a.x, pair / a.K * a.d + i) * element(a.dtype, a.down, a.indices[pair] * a.d + i);
    activations[pair] = sum / (1 + expf(-sum)) * a.weights[pair];
}

// A thread an element of y, 128 a block; no shared memory. Neighbouring threads have neighbouring tokens, and so rows
// of up that lie anywhere.
__global__ static void __launch_bounds__(THREADS) combine(fmoe_expert_args a, const float *activations) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, t = i % a.T, column = i / a.T;
    if (i >= a.T * a.d)
        return;
    float sum = 0;
    for (int64_t k = 0; k < a.K; k++)
        sum += activations[t * a.K + k] * element(a.dtype, a.up, a.indices[t * a.K + k] * a.d + column);
    store(a.dtype, a.y, t * a.d + column, sum);
}

static size_t needed(const void *args) {
    const fmoe_expert_args *a = (const fmoe_expert_args *)args;
    return (size_t)(a->T * a->K) * sizeof(float);
}

static unsigned blocks(int64_t threads) {
    return (unsigned)((threads + THREADS - 1) / THREADS);
}

static fmoe_status run(const void *args, void *workspace, size_t bytes, void *stream) {
    fmoe_expert_args a = *(const fmoe_expert_args *)args;
    (void)bytes;
    if (a.T == 0)
        return FMOE_OK;
    activate<<<blocks(a.T * a.K), THREADS, 0, (cudaStream_t)stream>>>(a, (float *)workspace);
    combine<<<blocks(a.T * a.d), THREADS, 0, (cudaStream_t)stream>>>(a, (const float *)workspace);
    return cudaGetLastError() == cudaSuccess ? FMOE_OK : FMOE_CUDA;
}

const fmoe_plugin fmoe_plugin_rung = {
    FMOE_STEPS_VERSION, "expert", "a thread a pair", run, BACKEND_CUDA, 0, needed, NULL, NULL};
