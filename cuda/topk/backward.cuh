// What the rungs of topk_backward share: their arguments, the checks, and a pair's two keys.
#ifndef FMOE_TOPK_BACKWARD_CUH
#define FMOE_TOPK_BACKWARD_CUH

#include "../../chapters/steps.h"
#include "../device.cuh"

typedef struct {
    int T, n, K;
    bool norm_topk_prob;
    fmoe_dtype dtype;
    const void *logits;              // [2, T, n] dtype
    const int32_t *indices;          // [T, K]
    const float *dweights, *dscores; // [T, K], NULL counts as zero
    float *dlogits;                  // [2, T, n]
    void *workspace;
    uint32_t reciprocal; // 2³²/n rounded up
    int64_t side_count;  // T · n
} backward_task;

static inline uint32_t reciprocal_of(int64_t n) {
    return (uint32_t)(((1ll << 32) + n - 1) / n); // n = 1 has one index, 0: any number does
}

fmoe_status backward_check(int64_t T, int64_t n, int64_t K, fmoe_dtype dtype, const void *logits,
                           const int32_t *indices, const float *dlogits);
// The same for a rung's arguments, and the task that they make.
fmoe_status backward_from_args(const void *args, void *workspace, size_t workspace_bytes, size_t needed,
                               backward_task *task);

// t · columns as 64 bits, by one instruction: both are below 2³².
__device__ inline uint64_t row_at(uint32_t t, int columns) {
    return (uint64_t)t * (uint32_t)columns;
}

template <typename E> __device__ const E *side_of_token(const backward_task &a, int side, uint32_t t) {
    return (const E *)a.logits + side * a.side_count + row_at(t, a.n);
}

__device__ inline bool is_pair(const backward_task &a, int32_t index) {
    return (uint32_t)index < (uint32_t)(a.n * a.n);
}

// [fixed-point]
// The power of two that makes integers of gradients whose absolute values sum to `size`: no partial sum, in whatever
// order, reaches 2³¹, and the rounding of each is 2⁻³⁰ of `size` at most. False where there is none: `size` is not
// finite, or so small that the power is no float.
__device__ inline bool fixed_point(float size, float *scale, float *unscale) {
    uint32_t exponent = __float_as_uint(size) >> 23; // size < 2^(exponent − 126)
    *scale = size > 0 ? __uint_as_float((283 - exponent) << 23) : 0;
    *unscale = size > 0 ? __uint_as_float((exponent - 29) << 23) : 0;
    return exponent - 30 <= 254 - 30 || size == 0;
}
// [/fixed-point]

#endif
