// Exercise 5.3, solution: two phases along a schedule, without an atomic addition of floats. The schedule itself is
// placed with integer atomics: the order of an expert's pairs then differs from run to run, and nobody can see it,
// because a pair's activation is stored where the pair belongs.
#include "plugin.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define WARP    32
#define THREADS 256

typedef struct {
    int *offsets;      // [N + 1]: counts, then where an expert's pairs begin, then where they end
    int *pairs;        // [T·K], by expert
    float *activation; // [T·K], by token
    size_t bytes;
} plan;

static plan lay_out(const fmoe_expert_args *a, void *workspace) {
    size_t pairs = (size_t)(a->T * a->K);
    plan p;
    p.offsets = (int *)workspace;
    p.pairs = p.offsets + a->N + 1;
    p.activation = (float *)(p.pairs + pairs);
    p.bytes = 4 * ((size_t)a->N + 1 + 2 * pairs);
    return p;
}

// A thread a pair, THREADS a block; no shared memory. Reads 4 bytes a pair, adds to one of N counters.
__global__ void count_kernel(fmoe_expert_args a, int *offsets) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.T * a.K)
        atomicAdd(&offsets[a.indices[i] + 1], 1);
}

// One block of 1,024 threads, 4 KB of shared memory. Turns counts into beginnings, 1,024 experts a round.
__global__ void scan_kernel(int64_t N, int *offsets) {
    __shared__ int sums[1024];
    int carry = 0, thread = (int)threadIdx.x;
    for (int64_t first = 1; first <= N; first += 1024) {
        int64_t e = first + thread;
        sums[thread] = e <= N ? offsets[e] : 0;
        __syncthreads();
        for (int step = 1; step < 1024; step *= 2) {
            int below = thread >= step ? sums[thread - step] : 0;
            __syncthreads();
            sums[thread] += below;
            __syncthreads();
        }
        if (e <= N)
            offsets[e] = carry + sums[thread];
        carry += sums[1023];
        __syncthreads();
    }
}

// A thread a pair, THREADS a block; no shared memory. Reads 4 bytes a pair, writes 4.
__global__ void place_kernel(fmoe_expert_args a, plan p) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.T * a.K)
        p.pairs[atomicAdd(&p.offsets[a.indices[i]], 1)] = (int)i;
}

// A warp a position of the schedule, THREADS / WARP a block; no shared memory. Gathers a row of x a pair; neighbouring
// warps have the same expert, so that its row of down comes from the L1.
template <typename E> __global__ void activate_kernel(fmoe_expert_args a, plan p) {
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    int lane = threadIdx.x % WARP;
    if (at >= a.T * a.K)
        return;
    int64_t pair = p.pairs[at];
    const E *x = (const E *)a.x + pair / a.K * a.d, *down = (const E *)a.down + a.indices[pair] * a.d;
    float s = 0;
    for (int64_t i = lane; i < a.d; i += WARP)
        s += (float)x[i] * (float)down[i];
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        s += __shfl_xor_sync(0xffffffff, s, distance);
    if (lane == 0)
        p.activation[pair] = s / (1 + expf(-s)) * a.weights[pair];
}

// A block of THREADS a token and THREADS columns; no shared memory. Gathers K rows of up, writes y once.
template <typename E> __global__ void combine_kernel(fmoe_expert_args a, plan p) {
    int64_t t = blockIdx.x, column = (int64_t)blockIdx.y * THREADS + threadIdx.x;
    if (column >= a.d)
        return;
    const float *activation = p.activation + t * a.K;
    const int32_t *expert = a.indices + t * a.K;
    float sum = 0;
#pragma unroll 4
    for (int64_t k = 0; k < a.K; k++)
        sum += activation[k] * (float)((const E *)a.up)[expert[k] * a.d + column];
    ((E *)a.y)[t * a.d + column] = (E)sum;
}

static unsigned blocks(int64_t threads) {
    return (unsigned)((threads + THREADS - 1) / THREADS);
}

template <typename E> static void two_phases(const fmoe_expert_args &a, const plan &p, cudaStream_t stream) {
    activate_kernel<E><<<blocks(a.T * a.K * WARP), THREADS, 0, stream>>>(a, p);
    combine_kernel<E><<<dim3((unsigned)a.T, blocks(a.d)), THREADS, 0, stream>>>(a, p);
}

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    fmoe_expert_args a = *(const fmoe_expert_args *)args;
    plan p = lay_out(&a, workspace);
    cudaStream_t on = (cudaStream_t)stream;
    (void)workspace_bytes;
    if (a.T == 0)
        return FMOE_OK;
    cudaMemsetAsync(p.offsets, 0, (size_t)(a.N + 1) * sizeof(int), on);
    count_kernel<<<blocks(a.T * a.K), THREADS, 0, on>>>(a, p.offsets);
    scan_kernel<<<1, 1024, 0, on>>>(a.N, p.offsets);
    place_kernel<<<blocks(a.T * a.K), THREADS, 0, on>>>(a, p);
    if (a.dtype == FMOE_F32)
        two_phases<float>(a, p, on);
    else if (a.dtype == FMOE_F16)
        two_phases<__half>(a, p, on);
    else
        two_phases<__nv_bfloat16>(a, p, on);
    return cudaGetLastError() == cudaSuccess ? FMOE_OK : FMOE_CUDA;
}

static size_t needed(const void *args) {
    return lay_out((const fmoe_expert_args *)args, NULL).bytes;
}

const fmoe_plugin fmoe_plugin_rung = {
    FMOE_STEPS_VERSION, "expert", "two phases", run, BACKEND_CUDA, 0, needed, NULL, NULL};
