// Exercise 2.3, starter, right: a thread a hidden unit, a thread a logit, a thread a row.
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

// A thread a unit, 128 a block; no shared memory. Reads x twice in training.
__global__ static void statistics(fmoe_router_args a, unit *units) {
    int64_t h = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (h >= a.d)
        return;
    if (!a.training) {
        units[h] = unit_of(a.running_mean[h], a.running_var[h]);
        return;
    }
    double mean = 0, squares = 0;
    for (int64_t t = 0; t < a.T; t++)
        mean += element(a.dtype, a.x, t * a.d + h);
    mean /= (double)a.T;
    for (int64_t t = 0; t < a.T; t++) {
        double deviation = element(a.dtype, a.x, t * a.d + h) - mean;
        squares += deviation * deviation;
    }
    units[h] = unit_of_batch(a, h, mean, squares);
}

// A thread a logit, 128 a block; no shared memory. Neighbours have the same token and the next key, whose row begins
// 2·d or 4·d bytes further on.
__global__ static void logits(fmoe_router_args a, const unit *units) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, t = i / (2 * a.n), key = i % (2 * a.n);
    if (t >= a.T)
        return;
    float sum = 0;
    for (int64_t h = 0; h < a.d; h++)
        sum += normalised(units[h], element(a.dtype, a.x, t * a.d + h)) * element(a.dtype, a.gate, key * a.d + h);
    a.logits[(key / a.n * a.T + t) * a.n + key % a.n] = sum;
}

// A thread a row of n logits, 128 a block; no shared memory.
__global__ static void softmax(fmoe_router_args a) {
    int64_t row = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (row >= 2 * a.T)
        return;
    const float *z = a.logits + row * a.n;
    float max = z[0], sum = 0;
    for (int64_t i = 1; i < a.n; i++)
        max = fmaxf(max, z[i]);
    for (int64_t i = 0; i < a.n; i++)
        sum += expf(z[i] - max);
    for (int64_t i = 0; i < a.n; i++)
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
    statistics<<<blocks(a.d, THREADS), THREADS, 0, on>>>(a, units);
    logits<<<blocks(a.T * 2 * a.n, THREADS), THREADS, 0, on>>>(a, units);
    softmax<<<blocks(2 * a.T, THREADS), THREADS, 0, on>>>(a);
    return cudaGetLastError() == cudaSuccess ? FMOE_OK : FMOE_CUDA;
}

const fmoe_plugin fmoe_plugin_rung = {
    FMOE_STEPS_VERSION, "router", "a thread a logit", run, BACKEND_CUDA, 0, needed, NULL, NULL};
