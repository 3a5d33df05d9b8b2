// A block works on one token: loading it, sorting in shared memory, and the scores and weights of its choice. For the
// first three rungs.
#ifndef FMOE_TOPK_BLOCK_CUH
#define FMOE_TOPK_BLOCK_CUH

#include "topk.cuh"

#define BLOCK_THREADS 256
#define BLOCK_WARPS   (BLOCK_THREADS / WARP)

static inline int power_of_two_from(int count) {
    int power = 1;
    while (power < count)
        power *= 2;
    return power;
}

// side: x [n], then y [n]. Ends with a barrier.
__device__ inline void load_token(const topk_task &a, int64_t t, float *side) {
    for (int i = threadIdx.x; i < 2 * a.n; i += BLOCK_THREADS)
        side[i] = load_logit(a, i >= a.n, t, i >= a.n ? i - a.n : i);
    __syncthreads();
}

// [bitonic]
// Sorts a power of two of keys, largest first: Batcher's bitonic network. Runs of `width` are sorted after each round:
// the first step of a round compares a run with its mirror image, the others over half the distance each. A barrier
// separates the steps.
__device__ inline void sort_block(int count, uint64_t *keys) {
    for (int width = 2; width <= count; width *= 2)
        for (int half = width / 2; half > 0; half /= 2) {
            for (int c = threadIdx.x; c < count / 2; c += BLOCK_THREADS) {
                int low = c / half * 2 * half + c % half;
                int high = half == width / 2 ? low / width * width + width - 1 - c % half : low + half;
                uint64_t a = keys[low], b = keys[high];
                if (a < b) {
                    keys[low] = b;
                    keys[high] = a;
                }
            }
            __syncthreads();
        }
}
// [/bitonic]

// Both sides ranked, best first: `size` packed keys each, a power of two. Ends with a barrier.
__device__ inline void rank_sides(const topk_task &a, const float *side, int size, uint64_t *ranked) {
    for (int s = 0; s < 2; s++) {
        for (int i = threadIdx.x; i < size; i += BLOCK_THREADS)
            ranked[s * size + i] = i < a.n ? pack(side[s * a.n + i], i) : 0;
        __syncthreads();
        sort_block(size, ranked + s * size);
    }
}

// The pair of two ranked keys.
__device__ inline uint64_t pair_of(uint64_t x, uint64_t y, int n) {
    return pack(from_rising((uint32_t)(x >> 32)) + from_rising((uint32_t)(y >> 32)), index_of(x) * n + index_of(y));
}

// Every thread gets the sum over the block; the order of the additions is fixed.
__device__ inline float block_sum(float value, float *scratch) {
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % WARP == 0)
        scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    value = 0;
    for (int w = 0; w < BLOCK_WARPS; w++)
        value += scratch[w];
    return value;
}

__device__ inline float block_max(float value, float *scratch) {
    value = warp_max(value);
    __syncthreads();
    if (threadIdx.x % WARP == 0)
        scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    for (int w = 0; w < BLOCK_WARPS; w++)
        value = fmaxf(value, scratch[w]);
    return value;
}

// log Σ exp(z − max). The largest logit stays apart twice: one of 1e30 would swallow the rest of the logarithm, and its
// own exponential, 1, would swallow the digits of a small rest.
__device__ inline float block_log_sum(int n, const float *z, float *max, float *scratch) {
    float largest = -INFINITY, rest = 0, largest_ones = 0;
    for (int i = threadIdx.x; i < n; i += BLOCK_THREADS)
        largest = fmaxf(largest, z[i]);
    *max = block_max(largest, scratch);
    for (int i = threadIdx.x; i < n; i += BLOCK_THREADS)
        if (z[i] == *max)
            largest_ones += 1;
        else
            rest += expf(z[i] - *max);
    rest = block_sum(rest, scratch);
    return log1pf(block_sum(largest_ones, scratch) - 1 + rest + (*max - *max)); // NaN for a side of infinities
}

// [finish-block]
// Indices, scores and weights of the token's choice, best first in `best`.
__device__ inline void finish_block(const topk_task &a, int64_t t, const float *side, const uint64_t *best) {
    __shared__ float scratch[BLOCK_WARPS];
    const float *x = side, *y = side + a.n;
    float x_max, y_max, log_sum = block_log_sum(a.n, x, &x_max, scratch);
    log_sum += block_log_sum(a.n, y, &y_max, scratch);
    float largest = -INFINITY, sum = 0;
    for (int k = threadIdx.x; k < a.K; k += BLOCK_THREADS) {
        uint32_t index = index_of(best[k]);
        largest = fmaxf(largest, (x[index / a.n] - x_max) + (y[index % a.n] - y_max) - log_sum);
    }
    // A common factor cancels when the weights are normalised, and without it they could all underflow.
    float shift = a.norm_topk_prob ? block_max(largest, scratch) : 0;
    for (int pass = a.norm_topk_prob ? 0 : 1; pass < 2; pass++) { // the sum, then the results
        float total = pass && a.norm_topk_prob ? block_sum(sum, scratch) : 1;
        for (int k = threadIdx.x; k < a.K; k += BLOCK_THREADS) {
            uint32_t index = index_of(best[k]);
            float score = (x[index / a.n] - x_max) + (y[index % a.n] - y_max) - log_sum;
            float weight = expf(score - shift);
            sum += weight;
            if (pass == 0)
                continue;
            a.indices[t * a.K + k] = index;
            if (a.scores)
                a.scores[t * a.K + k] = score;
            if (a.weights)
                a.weights[t * a.K + k] = weight / total;
        }
    }
}
// [/finish-block]

#endif
