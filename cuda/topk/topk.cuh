// What the rungs of topk share: their arguments, and numbers whose order is the order of the rule.
#ifndef FMOE_TOPK_CUH
#define FMOE_TOPK_CUH

#include "../device.cuh"
#include "topk.h"

typedef struct {
    int T, n, K;
    bool norm_topk_prob;
    fmoe_dtype dtype;
    const void *logits;      // [2, T, n] dtype
    int32_t *indices;        // [T, K]
    float *scores, *weights; // [T, K], optional
} topk_task;

// Checks the sizes and pointers, and makes the task of them.
fmoe_status topk_make(int64_t T, int64_t n, int64_t K, bool norm_topk_prob, fmoe_dtype dtype, const void *logits,
                      int32_t *indices, float *scores, float *weights, topk_task *task);
fmoe_status topk_from_args(const void *args, topk_task *task);

// The rungs that fmoe_cuda_topk chooses from. Nothing is launched for T = 0.
fmoe_status topk_run_staircase(const topk_task *task, cudaStream_t stream);
fmoe_status topk_run_keep_best(const topk_task *task, cudaStream_t stream);
fmoe_status topk_run_pair(const topk_task *task, cudaStream_t stream);

// [rising]
// The bits of a float, made to rise with it: −0 equals +0, and NaN is below −∞ (0x007fffff) but above 0, which is left
// for places that hold nothing.
#define NAN_BITS 0x00400000u

__device__ inline uint32_t rising_bits(float value) {
    uint32_t bits = __float_as_uint(value + 0.0f); // −0 becomes +0
    bits ^= (uint32_t)((int32_t)bits >> 31) | 0x80000000u;
    return value == value ? bits : NAN_BITS;
}

// The same of a sum or a logit that is not NaN and not −0.
__device__ inline uint32_t rising_plain(float value) {
    uint32_t bits = __float_as_uint(value);
    return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

__device__ inline float from_rising(uint32_t bits) {
    return bits == NAN_BITS ? NAN : __uint_as_float(bits & 0x80000000u ? bits ^ 0x80000000u : ~bits);
}

// A value and its index as one number: larger is better, and of equal values the smaller index is.
__device__ inline uint64_t pack(float value, uint32_t index) {
    return (uint64_t)rising_bits(value) << 32 | (uint32_t)~index;
}

__device__ inline uint32_t index_of(uint64_t packed) {
    return ~(uint32_t)packed;
}
// [/rising]

template <typename E> __device__ const E *side_of_token(const topk_task &a, int side, int64_t t) {
    return (const E *)a.logits + (side * (int64_t)a.T + t) * a.n;
}

__device__ inline float load_logit(const topk_task &a, int side, int64_t t, int i) {
    if (a.dtype == FMOE_F32)
        return side_of_token<float>(a, side, t)[i];
    if (a.dtype == FMOE_F16)
        return to_f32(side_of_token<__half>(a, side, t)[i]);
    return to_f32(side_of_token<__nv_bfloat16>(a, side, t)[i]);
}

#endif
