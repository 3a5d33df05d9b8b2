// Exercise 3.3, starter, right: a token a thread, so that a warp has 32 tokens side by side. Everything a token needs
// lies in its part of the workspace.
#include "plugin.h"

#include <cuda_fp16.h>
#include <math.h>

// As in chapter 3: the sum's bits, made to rise with the sum, above the complement of the index.
__device__ static int64_t pack(float sum, int32_t index) {
    sum += 0.0f; // −0 becomes +0
    int32_t bits = __float_as_int(sum);
    bits ^= (bits >> 31) & 0x7fffffff;
    bits = sum == sum ? bits : (int32_t)0x80000000;
    return (int64_t)((uint64_t)(uint32_t)bits << 32 | (uint32_t)~index);
}

__device__ static int32_t index_of(int64_t packed) {
    return (int32_t) ~(uint32_t)packed;
}

// Logit i of a side of a token, whatever its type.
__device__ static float logit(const fmoe_topk_args &a, int64_t side, int64_t t, int64_t i) {
    int64_t at = (side * a.T + t) * a.n + i;
    if (a.dtype == FMOE_F32)
        return ((const float *)a.logits)[at];
    if (a.dtype == FMOE_F16)
        return __half2float(((const __half *)a.logits)[at]);
    return __uint_as_float((uint32_t)((const uint16_t *)a.logits)[at] << 16);
}

// The largest of a side, and log Σ exp(z − largest).
__device__ static float log_sum(const fmoe_topk_args &a, int64_t side, int64_t t, float *largest) {
    float max = logit(a, side, t, 0), sum = 0;
    for (int64_t i = 1; i < a.n; i++)
        max = fmaxf(max, logit(a, side, t, i));
    for (int64_t i = 0; i < a.n; i++)
        sum += expf(logit(a, side, t, i) - max);
    *largest = max;
    return logf(sum);
}

// The keys of a side in order, best first: a key's place is the number of keys that beat it.
__device__ static void rank_side(const fmoe_topk_args &a, int64_t side, int64_t t, int32_t *ranked) {
    for (int64_t i = 0; i < a.n; i++) {
        int64_t mine = pack(logit(a, side, t, i), (int32_t)i), place = 0;
        for (int64_t j = 0; j < a.n; j++)
            place += pack(logit(a, side, t, j), (int32_t)j) > mine;
        ranked[place] = (int32_t)i;
    }
}

// Puts a pair among the best so far, if it belongs there.
__device__ static void insert(int64_t K, int64_t *best, int64_t held, int64_t pair) {
    int64_t at = held < K ? held : K - 1;
    if (held == K && best[at] > pair)
        return;
    for (; at > 0 && best[at - 1] < pair; at--)
        best[at] = best[at - 1];
    best[at] = pair;
}

__device__ static void finish(const fmoe_topk_args &a, int64_t t, const int64_t *best) {
    float x_max, y_max, sum = 0;
    float shift = log_sum(a, 0, t, &x_max) + log_sum(a, 1, t, &y_max);
    for (int64_t k = 0; k < a.K; k++) {
        int32_t pair = index_of(best[k]);
        float score = logit(a, 0, t, pair / a.n) - x_max + (logit(a, 1, t, pair % a.n) - y_max) - shift;
        a.indices[t * a.K + k] = pair;
        a.scores[t * a.K + k] = score;
        a.weights[t * a.K + k] = expf(score);
        sum += expf(score);
    }
    for (int64_t k = 0; a.norm_topk_prob && k < a.K; k++)
        a.weights[t * a.K + k] /= sum;
}

// A thread a token, 64 a block; no shared memory. Reads a token's logits about n times a side; K·8 + n·8 bytes of
// workspace a token.
__global__ static void choose(fmoe_topk_args a, int64_t *all_best, int32_t *all_ranked) {
    int64_t t = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, held = 0;
    if (t >= a.T)
        return;
    int64_t *best = all_best + t * a.K;
    int32_t *x = all_ranked + t * 2 * a.n, *y = x + a.n;
    rank_side(a, 0, t, x);
    rank_side(a, 1, t, y);
    for (int64_t i = 0; i < a.n; i++)
        for (int64_t j = 0; j < a.n && (i + 1) * (j + 1) <= a.K; j++) {
            int64_t pair = pack(logit(a, 0, t, x[i]) + logit(a, 1, t, y[j]), (int32_t)(x[i] * a.n + y[j]));
            insert(a.K, best, held, pair);
            held += held < a.K;
        }
    finish(a, t, best);
}

static size_t needed(const void *args) {
    const fmoe_topk_args *a = (const fmoe_topk_args *)args;
    return (size_t)a->T * ((size_t)a->K * sizeof(int64_t) + 2 * (size_t)a->n * sizeof(int32_t));
}

static fmoe_status run(const void *args, void *workspace, size_t bytes, void *stream) {
    fmoe_topk_args a = *(const fmoe_topk_args *)args;
    (void)bytes;
    if (a.T == 0)
        return FMOE_OK;
    int64_t *best = (int64_t *)workspace;
    choose<<<(unsigned)((a.T + 63) / 64), 64, 0, (cudaStream_t)stream>>>(a, best, (int32_t *)(best + a.T * a.K));
    return cudaGetLastError() == cudaSuccess ? FMOE_OK : FMOE_CUDA;
}

const fmoe_plugin fmoe_plugin_rung = {
    FMOE_STEPS_VERSION, "topk", "a token a thread", run, BACKEND_CUDA, 0, needed, NULL, NULL};
