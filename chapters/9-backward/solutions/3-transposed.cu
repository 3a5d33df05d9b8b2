// Exercise 9.3, solution: along the schedule that the forward pass kept, every row of a gradient has one owner, and its
// sum one order.
#include "plugin.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define WARP    32
#define THREADS 256

typedef struct {
    float *activation, *ds; // [T·K]: what a pair's rows are multiplied by on their way into dup, and into ddown and dx
    size_t bytes;
} plan;

static plan lay_out(const fmoe_expert_backward_args *a, void *workspace) {
    plan p;
    p.activation = (float *)workspace;
    p.ds = p.activation + a->T * a->K;
    p.bytes = (size_t)(2 * a->T * a->K) * sizeof(float);
    return p;
}

// A warp a pair, THREADS / WARP a block; no shared memory. Gathers a row of up and one of dy a pair, writes 12 bytes.
template <typename E> __global__ void pair_kernel(fmoe_expert_backward_args a, plan p) {
    int64_t pair = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    int lane = threadIdx.x % WARP;
    if (pair >= a.T * a.K)
        return;
    const E *dy = (const E *)a.dy + pair / a.K * a.d, *up = (const E *)a.up + a.indices[pair] * a.d;
    float da = 0;
    for (int64_t i = lane; i < a.d; i += WARP)
        da += (float)dy[i] * (float)up[i];
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        da += __shfl_xor_sync(0xffffffff, da, distance);
    if (lane == 0) {
        float s = a.pre_activations[pair], sigmoid = 1 / (1 + expf(-s)), silu = s * sigmoid;
        p.activation[pair] = silu * a.weights[pair];
        p.ds[pair] = da * a.weights[pair] * sigmoid * (1 + s * (1 - sigmoid));
        a.dweights[pair] = da * silu;
    }
}

// A block of THREADS a token and THREADS columns; no shared memory. Gathers K rows of down, writes dx once.
template <typename E> __global__ void dx_kernel(fmoe_expert_backward_args a, plan p) {
    int64_t t = blockIdx.x, column = (int64_t)blockIdx.y * THREADS + threadIdx.x;
    if (column >= a.d)
        return;
    float sum = 0;
#pragma unroll 4
    for (int64_t pair = t * a.K; pair < (t + 1) * a.K; pair++)
        sum += p.ds[pair] * (float)((const E *)a.down)[a.indices[pair] * a.d + column];
    ((E *)a.dx)[t * a.d + column] = (E)sum;
}

// A block of THREADS an expert and THREADS columns; no shared memory. Gathers a row of x and one of dy a pair, and
// writes both rows of gradients once, zeros if no token chose the expert.
template <typename E> __global__ void tables_kernel(fmoe_expert_backward_args a, plan p) {
    int64_t e = blockIdx.x, column = (int64_t)blockIdx.y * THREADS + threadIdx.x;
    if (column >= a.d)
        return;
    float ddown = 0, dup = 0;
    int end = a.offsets[e + 1];
#pragma unroll 4
    for (int i = a.offsets[e]; i < end; i++) {
        int64_t pair = a.pairs[i], at = pair / a.K * a.d + column;
        ddown += p.ds[pair] * (float)((const E *)a.x)[at];
        dup += p.activation[pair] * (float)((const E *)a.dy)[at];
    }
    ((E *)a.ddown)[e * a.d + column] = (E)ddown;
    ((E *)a.dup)[e * a.d + column] = (E)dup;
}

static unsigned blocks(int64_t threads) {
    return (unsigned)((threads + THREADS - 1) / THREADS);
}

template <typename E> static void backward(const fmoe_expert_backward_args &a, const plan &p, cudaStream_t stream) {
    if (a.T > 0) {
        pair_kernel<E><<<blocks(a.T * a.K * WARP), THREADS, 0, stream>>>(a, p);
        dx_kernel<E><<<dim3((unsigned)a.T, blocks(a.d)), THREADS, 0, stream>>>(a, p);
    }
    tables_kernel<E><<<dim3((unsigned)a.N, blocks(a.d)), THREADS, 0, stream>>>(a, p);
}

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    fmoe_expert_backward_args a = *(const fmoe_expert_backward_args *)args;
    plan p = lay_out(&a, workspace);
    (void)workspace_bytes;
    if (a.dtype == FMOE_F32)
        backward<float>(a, p, (cudaStream_t)stream);
    else if (a.dtype == FMOE_F16)
        backward<__half>(a, p, (cudaStream_t)stream);
    else
        backward<__nv_bfloat16>(a, p, (cudaStream_t)stream);
    return cudaGetLastError() == cudaSuccess ? FMOE_OK : FMOE_CUDA;
}

static size_t needed(const void *args) {
    return lay_out((const fmoe_expert_backward_args *)args, NULL).bytes;
}

const fmoe_plugin fmoe_plugin_rung = {
    FMOE_STEPS_VERSION, "expert_backward", "transposed", run, BACKEND_CUDA, 0, needed, NULL, NULL};
