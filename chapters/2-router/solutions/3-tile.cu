// Exercise 2.3, solution: 64 tokens × 64 keys a block, 4 × 4 a thread, from pieces in shared memory; 8 threads a unit
// for the statistics; a warp a row for the softmax.
#include "plugin.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

enum {
    WARP = 32,
    THREADS = 256,
    STRIPES = THREADS / WARP, // threads that share out the tokens of a unit
    SIDE = 64,                // tokens and keys of a tile
    DEPTH = 16,               // hidden units that lie in shared memory at a time
    EACH = 4,                 // a thread's part of the tile is EACH × EACH
};

__device__ static float element(fmoe_dtype dtype, const void *tensor, int64_t i) {
    if (dtype == FMOE_F32)
        return ((const float *)tensor)[i];
    if (dtype == FMOE_F16)
        return __half2float(((const __half *)tensor)[i]);
    return __bfloat162float(((const __nv_bfloat16 *)tensor)[i]);
}

// A unit's norm: the mean in two parts, since 24 bits are not enough for it, and the reciprocal deviation.
typedef struct {
    float center, rest, scale;
} unit;

__device__ static unit unit_of(double mean, double var) {
    unit u;
    u.center = (float)mean;
    u.rest = (float)(mean - u.center);
    u.scale = (float)(1 / sqrt(var + FMOE_NORM_EPS));
    return u;
}

__device__ static float normalised(unit u, float x) {
    return (x - u.center - u.rest) * u.scale;
}

__device__ static unit unit_of_batch(const fmoe_router_args &a, int64_t h, double mean, double squares) {
    double keep = 1 - FMOE_NORM_MOMENTUM;
    a.running_mean[h] = (float)(keep * a.running_mean[h] + FMOE_NORM_MOMENTUM * mean);
    a.running_var[h] = (float)(keep * a.running_var[h] + FMOE_NORM_MOMENTUM * squares / (double)(a.T - 1));
    return unit_of(mean, squares / (double)a.T);
}

// Sums over the threads that have the same unit, in the order of their stripes.
__device__ static double over_stripes(double mine, double (*sums)[WARP]) {
    __syncthreads();
    sums[threadIdx.x / WARP][threadIdx.x % WARP] = mine;
    __syncthreads();
    double sum = 0;
    for (int s = 0; s < STRIPES; s++)
        sum += sums[s][threadIdx.x % WARP];
    return sum;
}

// A block of 256 threads for 32 units, 8 threads each with every eighth token; 2 KB of shared memory. A warp reads 32
// neighbouring units of a token. In training x comes twice, the second time from the L2 if it fits.
__global__ static void __launch_bounds__(THREADS) statistics(fmoe_router_args a, unit *units) {
    __shared__ double sums[STRIPES][WARP];
    int64_t h = (int64_t)blockIdx.x * WARP + threadIdx.x % WARP, stripe = threadIdx.x / WARP;
    bool there = h < a.d;
    if (!a.training) {
        if (there && stripe == 0)
            units[h] = unit_of(a.running_mean[h], a.running_var[h]);
        return;
    }
    double mean = 0, squares = 0;
    for (int64_t t = stripe; there && t < a.T; t += STRIPES)
        mean += element(a.dtype, a.x, t * a.d + h);
    mean = over_stripes(mean, sums) / (double)a.T;
    for (int64_t t = stripe; there && t < a.T; t += STRIPES) {
        double deviation = element(a.dtype, a.x, t * a.d + h) - mean;
        squares += deviation * deviation;
    }
    squares = over_stripes(squares, sums);
    if (there && stripe == 0)
        units[h] = unit_of_batch(a, h, mean, squares);
}

// A block of 256 threads a tile of 64 tokens × 64 keys; 8.5 KB of shared memory, its rows padded so that the stores of
// a warp meet different banks. Reads x once for every 64 keys and the gate once for every 64 tokens.
__global__ static void __launch_bounds__(THREADS) logits(fmoe_router_args a, const unit *units) {
    __shared__ float x[DEPTH][SIDE + 1], gate[DEPTH][SIDE + 1];
    int64_t first_t = (int64_t)blockIdx.x * SIDE, first_key = (int64_t)blockIdx.y * SIDE;
    int row = threadIdx.x / (SIDE / EACH) * EACH, column = threadIdx.x % (SIDE / EACH) * EACH;
    float sum[EACH][EACH] = {{0}};
    for (int64_t first = 0; first < a.d; first += DEPTH) {
        __syncthreads();
        for (int i = threadIdx.x; i < SIDE * DEPTH; i += THREADS) {
            int64_t h = first + i % DEPTH, t = first_t + i / DEPTH, key = first_key + i / DEPTH;
            x[i % DEPTH][i / DEPTH] = h < a.d && t < a.T ? normalised(units[h], element(a.dtype, a.x, t * a.d + h)) : 0;
            gate[i % DEPTH][i / DEPTH] = h < a.d && key < 2 * a.n ? element(a.dtype, a.gate, key * a.d + h) : 0;
        }
        __syncthreads();
        for (int h = 0; h < DEPTH; h++)
            for (int r = 0; r < EACH; r++)
                for (int c = 0; c < EACH; c++)
                    sum[r][c] += x[h][row + r] * gate[h][column + c];
    }
    for (int r = 0; r < EACH; r++)
        for (int c = 0; c < EACH; c++) {
            int64_t t = first_t + row + r, key = first_key + column + c;
            if (t < a.T && key < 2 * a.n)
                a.logits[(key / a.n * a.T + t) * a.n + key % a.n] = sum[r][c];
        }
}

// A warp a row of n logits, 8 rows a block; no shared memory.
__global__ static void __launch_bounds__(THREADS) softmax(fmoe_router_args a) {
    int64_t row = (int64_t)blockIdx.x * STRIPES + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= 2 * a.T)
        return;
    const float *z = a.logits + row * a.n;
    float max = -INFINITY, sum = 0;
    for (int64_t i = lane; i < a.n; i += WARP)
        max = fmaxf(max, z[i]);
    for (int apart = WARP / 2; apart > 0; apart /= 2)
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, apart));
    for (int64_t i = lane; i < a.n; i += WARP)
        sum += expf(z[i] - max);
    for (int apart = WARP / 2; apart > 0; apart /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    for (int64_t i = lane; i < a.n; i += WARP)
        a.log_probs[row * a.n + i] = z[i] - max - logf(sum);
}

static size_t needed(const void *args) {
    return (size_t)((const fmoe_router_args *)args)->d * sizeof(unit);
}

static unsigned blocks(int64_t count, int64_t a_block) {
    return (unsigned)((count + a_block - 1) / a_block);
}

static fmoe_status run(const void *args, void *workspace, size_t bytes, void *stream) {
    fmoe_router_args a = *(const fmoe_router_args *)args;
    cudaStream_t on = (cudaStream_t)stream;
    unit *units = (unit *)workspace;
    (void)bytes;
    if (a.training && a.T == 1)
        return FMOE_BATCH_OF_ONE;
    if (a.T == 0)
        return FMOE_OK;
    statistics<<<blocks(a.d, WARP), THREADS, 0, on>>>(a, units);
    logits<<<dim3(blocks(a.T, SIDE), blocks(2 * a.n, SIDE)), THREADS, 0, on>>>(a, units);
    softmax<<<blocks(2 * a.T, STRIPES), THREADS, 0, on>>>(a);
    return cudaGetLastError() == cudaSuccess ? FMOE_OK : FMOE_CUDA;
}

const fmoe_plugin fmoe_plugin_rung = {
    FMOE_STEPS_VERSION, "router", "64 by 64 a block", run, BACKEND_CUDA, 0, needed, NULL, NULL};
