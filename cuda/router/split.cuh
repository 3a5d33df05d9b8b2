// x̂ as a sum of two numbers of the storage type.
#ifndef FMOE_SPLIT_CUH
#define FMOE_SPLIT_CUH

#include "../tile.cuh"
#include "router.cuh"

template <typename E> struct pair_of;
template <> struct pair_of<__half> { typedef __half2 type; };
template <> struct pair_of<__nv_bfloat16> { typedef __nv_bfloat162 type; };

__device__ inline float2 to_f32_pair(__half2 pair) {
    return __half22float2(pair);
}
__device__ inline float2 to_f32_pair(__nv_bfloat162 pair) {
    return __bfloat1622float2(pair);
}
template <typename P> __device__ P from_f32_pair(float a, float b);
template <> __device__ inline __half2 from_f32_pair<__half2>(float a, float b) {
    return __floats2half2_rn(a, b);
}
template <> __device__ inline __nv_bfloat162 from_f32_pair<__nv_bfloat162>(float a, float b) {
    return __floats2bfloat162_rn(a, b);
}

// [split]
// hi is x̂ rounded to the storage type and lo what that lost, rounded again: 2 · 8 bits of x̂ are kept in bfloat16, 2 ·
// 11 in float16. The gate is exact in its storage type, so (hi + lo) · gateᵀ is as good as that. Two neighbours at
// once, packed as the tensor cores take them.
template <typename E>
__device__ inline void split(unsigned x, float2 center, float2 scale, float2 offset, unsigned &hi, unsigned &lo) {
    typedef typename pair_of<E>::type pair;
    float2 in = to_f32_pair(*(pair *)&x);
    float a = normalised(in.x, center.x, scale.x, offset.x), b = normalised(in.y, center.y, scale.y, offset.y);
    pair high = from_f32_pair<pair>(a, b);
    float2 rounded = to_f32_pair(high);
    pair low = from_f32_pair<pair>(a - rounded.x, b - rounded.y);
    hi = *(unsigned *)&high;
    lo = *(unsigned *)&low;
}
// [/split]

#endif
