// Exercise 7.3, solution: the first phase pair by pair, or densely with the chosen sums picked, by a rule of two sizes.
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

// ---- The dense first phase ----

#define TILE  64 // tokens and experts of a block's tile
#define DEPTH 16 // columns of the operands that are staged at a time
#define PATCH 4  // tokens and experts of a thread
#define SIDE  (TILE / PATCH)

// A strip [TILE, DEPTH] of a matrix [rows, d], turned round; zeros beyond the matrix.
template <typename E>
__device__ void stage(const E *matrix, int64_t rows, int64_t d, int64_t first, int64_t depth,
                      float strip[DEPTH][TILE + 1]) {
    for (int i = threadIdx.x; i < TILE * DEPTH; i += THREADS) {
        int64_t row = first + i / DEPTH, column = depth + i % DEPTH;
        strip[i % DEPTH][i / DEPTH] = row < rows && column < d ? (float)matrix[row * d + column] : 0;
    }
}

// A block of THREADS a tile of TILE tokens × TILE experts; 25 KB of shared memory. Reads x N / TILE times and down
// T / TILE times, from the L2 where they fit it, and TILE · K indices a tile. Whatever was not chosen is left behind.
template <typename E> __global__ void dense_kernel(fmoe_expert_args a, float *activation) {
    __shared__ float x[DEPTH][TILE + 1], down[DEPTH][TILE + 1], tile[TILE][TILE + 1];
    int64_t first_e = (int64_t)blockIdx.x * TILE, first_t = (int64_t)blockIdx.y * TILE;
    int row = threadIdx.x / SIDE, column = threadIdx.x % SIDE;
    float sum[PATCH][PATCH] = {};
    for (int64_t depth = 0; depth < a.d; depth += DEPTH) {
        stage((const E *)a.x, a.T, a.d, first_t, depth, x);
        stage((const E *)a.down, a.N, a.d, first_e, depth, down);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; k++)
#pragma unroll
            for (int i = 0; i < PATCH; i++)
#pragma unroll
                for (int j = 0; j < PATCH; j++)
                    sum[i][j] += x[k][row + i * SIDE] * down[k][column + j * SIDE];
        __syncthreads();
    }
    for (int i = 0; i < PATCH; i++)
        for (int j = 0; j < PATCH; j++)
            tile[row + i * SIDE][column + j * SIDE] = sum[i][j];
    __syncthreads();
    // A warp a token: its lanes look through the token's K indices for those of this tile.
    for (int i = threadIdx.x / WARP; i < TILE && first_t + i < a.T; i += THREADS / WARP)
        for (int64_t pair = (first_t + i) * a.K + threadIdx.x % WARP; pair < (first_t + i + 1) * a.K; pair += WARP) {
            int64_t e = a.indices[pair] - first_e;
            if (e >= 0 && e < TILE) {
                float s = tile[i][e];
                activation[pair] = s / (1 + expf(-s)) * a.weights[pair];
            }
        }
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

// From two experts in five on, as measured.
static bool dense_pays(const fmoe_expert_args &a) {
    return 5 * a.K >= 2 * a.N;
}

template <typename E> static void two_phases(const fmoe_expert_args &a, float *activation, cudaStream_t stream) {
    if (dense_pays(a))
        dense_kernel<E><<<dim3(blocks(a.N, TILE), blocks(a.T, TILE)), THREADS, 0, stream>>>(a, activation);
    else
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
    FMOE_STEPS_VERSION, "expert", "two ways", run, BACKEND_CUDA, 0, needed, NULL, NULL};
