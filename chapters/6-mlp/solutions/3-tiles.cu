// Exercise 6.3, solution: a block stages strips of both operands in shared memory, and a thread keeps a patch of
// results in registers. gate and up are one product of two matrices, so that SwiGLU happens before anything is stored.
#include "plugin.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define TILE  64 // rows and columns of a block's tile
#define DEPTH 16 // columns of the operands that are staged at a time
#define PATCH 4  // rows and columns of a thread's results
#define SIDE  (TILE / PATCH)

// A strip [TILE, DEPTH] of a matrix [rows, k], turned round so that DEPTH is outside; zeros beyond the matrix. The row
// of shared memory is one number longer than the tile: else a warp's stores would fall into four banks.
template <typename E>
__device__ void stage(const E *matrix, int64_t rows, int64_t k, int64_t first, int64_t depth,
                      float strip[DEPTH][TILE + 1]) {
    for (int i = threadIdx.y * SIDE + threadIdx.x; i < TILE * DEPTH; i += SIDE * SIDE) {
        int64_t row = first + i / DEPTH, column = depth + i % DEPTH;
        strip[i % DEPTH][i / DEPTH] = row < rows && column < k ? (float)matrix[row * k + column] : 0;
    }
}

// Adds a strip's share to a thread's patch: 2 · PATCH loads for PATCH · PATCH multiply-adds. Its rows and columns lie
// SIDE apart, so that a warp reads neighbouring numbers.
__device__ void multiply(const float A[DEPTH][TILE + 1], const float B[DEPTH][TILE + 1], float sum[PATCH][PATCH]) {
#pragma unroll
    for (int k = 0; k < DEPTH; k++) {
        float a[PATCH], b[PATCH];
#pragma unroll
        for (int i = 0; i < PATCH; i++) {
            a[i] = A[k][threadIdx.y + i * SIDE];
            b[i] = B[k][threadIdx.x + i * SIDE];
        }
#pragma unroll
        for (int i = 0; i < PATCH; i++)
#pragma unroll
            for (int j = 0; j < PATCH; j++)
                sum[i][j] += a[i] * b[j];
    }
}

// A block of SIDE × SIDE threads a tile of 64 tokens × 64 hidden units; 12.5 KB of shared memory. Reads x I / 64 times
// and both weight matrices T / 64 times, from the L2 where they fit it, and writes the hidden units as float32.
template <typename E> __global__ void hidden_kernel(fmoe_mlp_args a, float *hidden) {
    __shared__ float x[DEPTH][TILE + 1], gate[DEPTH][TILE + 1], up[DEPTH][TILE + 1];
    int64_t first_i = (int64_t)blockIdx.x * TILE, first_t = (int64_t)blockIdx.y * TILE;
    float p[PATCH][PATCH] = {}, q[PATCH][PATCH] = {};
    for (int64_t depth = 0; depth < a.d; depth += DEPTH) {
        stage((const E *)a.x, a.T, a.d, first_t, depth, x);
        stage((const E *)a.gate, a.I, a.d, first_i, depth, gate);
        stage((const E *)a.up, a.I, a.d, first_i, depth, up);
        __syncthreads();
        multiply(x, gate, p);
        multiply(x, up, q);
        __syncthreads();
    }
    for (int i = 0; i < PATCH; i++)
        for (int j = 0; j < PATCH; j++) {
            int64_t t = first_t + threadIdx.y + i * SIDE, unit = first_i + threadIdx.x + j * SIDE;
            if (t < a.T && unit < a.I)
                hidden[t * a.I + unit] = p[i][j] / (1 + expf(-p[i][j])) * q[i][j];
        }
}

// A block of SIDE × SIDE threads a tile of 64 tokens × 64 columns of y; 8.3 KB of shared memory. Reads the hidden units
// d / 64 times and down T / 64 times, writes y once.
template <typename E> __global__ void output_kernel(fmoe_mlp_args a, const float *hidden) {
    __shared__ float h[DEPTH][TILE + 1], down[DEPTH][TILE + 1];
    int64_t first_c = (int64_t)blockIdx.x * TILE, first_t = (int64_t)blockIdx.y * TILE;
    float y[PATCH][PATCH] = {};
    for (int64_t depth = 0; depth < a.I; depth += DEPTH) {
        stage(hidden, a.T, a.I, first_t, depth, h);
        stage((const E *)a.down, a.d, a.I, first_c, depth, down);
        __syncthreads();
        multiply(h, down, y);
        __syncthreads();
    }
    for (int i = 0; i < PATCH; i++)
        for (int j = 0; j < PATCH; j++) {
            int64_t t = first_t + threadIdx.y + i * SIDE, c = first_c + threadIdx.x + j * SIDE;
            if (t < a.T && c < a.d)
                ((E *)a.y)[t * a.d + c] = (E)y[i][j];
        }
}

static unsigned tiles(int64_t count) {
    return (unsigned)((count + TILE - 1) / TILE);
}

template <typename E> static void two_products(const fmoe_mlp_args &a, float *hidden, cudaStream_t stream) {
    dim3 threads(SIDE, SIDE);
    hidden_kernel<E><<<dim3(tiles(a.I), tiles(a.T)), threads, 0, stream>>>(a, hidden);
    output_kernel<E><<<dim3(tiles(a.d), tiles(a.T)), threads, 0, stream>>>(a, hidden);
}

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    fmoe_mlp_args a = *(const fmoe_mlp_args *)args;
    (void)workspace_bytes;
    if (a.T == 0)
        return FMOE_OK;
    if (a.dtype == FMOE_F32)
        two_products<float>(a, (float *)workspace, (cudaStream_t)stream);
    else if (a.dtype == FMOE_F16)
        two_products<__half>(a, (float *)workspace, (cudaStream_t)stream);
    else
        two_products<__nv_bfloat16>(a, (float *)workspace, (cudaStream_t)stream);
    return cudaGetLastError() == cudaSuccess ? FMOE_OK : FMOE_CUDA;
}

static size_t needed(const void *args) {
    const fmoe_mlp_args *a = (const fmoe_mlp_args *)args;
    return (size_t)(a->T * a->I) * sizeof(float);
}

const fmoe_plugin fmoe_plugin_rung = {FMOE_STEPS_VERSION, "mlp", "tiles", run, BACKEND_CUDA, 0, needed, NULL, NULL};
