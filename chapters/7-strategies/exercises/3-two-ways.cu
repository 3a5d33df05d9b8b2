// Exercise 7.3, starter, right: one strategy, a warp a pair, whatever K / N is.
#include "plugin.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define WARP    32
#define THREADS 256

// A warp a pair, THREADS / WARP a block; no shared memory. Gathers a row of down a pair.
template <typename E> __global__ void pair_kernel(fmoe_expert_args a, float *activation) {
    int64_t pair = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    int lane = threadIdx.x % WARP;
    if (pair >= a.T * a.K)
        return;
    const E *x = (const E *)a.x + pair / a.K * a.d, *down = (const E *)a.down + a.indices[pair] * a.d;
    float s = 0;
    for (int64_t i = lane; i < a.d; i += WARP)
        s += (float)x[i] * (float)down[i];
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        s += __shfl_xor_sync(0xffffffff, s, distance);
    if (lane == 0)
        activation[pair] = s / (1 + expf(-s)) * a.weights[pair];
}

// A block of THREADS a token and THREADS columns; no shared memory. Gathers K rows of up, writes y once.
template <typename E> __global__ void combine_kernel(fmoe_expert_args a, const float *activation) {
    int64_t t = blockIdx.x, column = (int64_t)blockIdx.y * THREADS + threadIdx.x;
    if (column >= a.d)
        return;
    float sum = 0;
#pragma unroll 4
    for (int64_t k = 0; k < a.K; k++)
        sum += activation[t * a.K + k] * (float)((const E *)a.up)[a.indices[t * a.K + k] * a.d + column];
    ((E *)a.y)[t * a.d + column] = (E)sum;
}

static unsigned blocks(int64_t count, int64_t each) {
    return (unsigned)((count + each - 1) / each);
}

template <typename E> static void two_phases(const fmoe_expert_args &a, float *activation, cudaStream_t stream) {
    pair_kernel<E><<<blocks(a.T * a.K * WARP, THREADS), THREADS, 0, stream>>>(a, activation);
    combine_kernel<E><<<dim3((unsigned)a.T, blocks(a.d, THREADS)), THREADS, 0, stream>>>(a, activation);
}

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    fmoe_expert_args a = *(const fmoe_expert_args *)args;
    (void)workspace_bytes;
    if (a.T == 0)
        return FMOE_OK;
    if (a.dtype == FMOE_F32)
        two_phases<float>(a, (float *)workspace, (cudaStream_t)stream);
    else if (a.dtype == FMOE_F16)
        two_phases<__half>(a, (float *)workspace, (cudaStream_t)stream);
    else
        two_phases<__nv_bfloat16>(a, (float *)workspace, (cudaStream_t)stream);
    return cudaGetLastError() == cudaSuccess ? FMOE_OK : FMOE_CUDA;
}

static size_t needed(const void *args) {
    const fmoe_expert_args *a = (const fmoe_expert_args *)args;
    return (size_t)(a->T * a->K) * sizeof(float);
}

const fmoe_plugin fmoe_plugin_rung = {
    FMOE_STEPS_VERSION, "expert", "one way", run, BACKEND_CUDA, 0, needed, NULL, NULL};
