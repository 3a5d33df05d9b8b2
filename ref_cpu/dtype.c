/* float16 and bfloat16 as they lie in memory, from and to float32.
 *
 * A float32 is 1 sign bit, 8 exponent bits (bias 127), 23 mantissa bits; a bfloat16 is its upper half; a float16 has
 * 5 exponent bits (bias 15) and 10 mantissa bits. The loops choose with ?: and never branch, so that the compiler
 * turns them into vector instructions: faster code converts its rows with them too. */
#include "check.h"

#include <string.h>

size_t fmoe_dtype_size(fmoe_dtype dtype) {
    switch (dtype) {
    case FMOE_F32:
    case FMOE_I32:
        return 4;
    case FMOE_F16:
    case FMOE_BF16:
        return 2;
    case FMOE_I64:
        return 8;
    }
    return 0;
}

const char *fmoe_dtype_name(fmoe_dtype dtype) {
    switch (dtype) {
    case FMOE_F32:
        return "f32";
    case FMOE_F16:
        return "f16";
    case FMOE_BF16:
        return "bf16";
    case FMOE_I32:
        return "i32";
    case FMOE_I64:
        return "i64";
    }
    return "unknown";
}

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

// [f16]
static inline float f16_to_f32(uint16_t half) {
    uint32_t sign = (half & 0x8000u) << 16;
    uint32_t magnitude = half & 0x7fffu;
    uint32_t rebias = 112u << 23; /* 127 − 15 */
    /* An exponent of all ones (infinity, NaN) stays all ones: 31 + 112 + 112 = 255. */
    uint32_t normal = (magnitude << 13) + rebias + (magnitude >= 0x7c00u ? rebias : 0);
    /* Subnormals are multiples of 2^-24. */
    uint32_t subnormal = as_bits((float)(int32_t)magnitude * 0x1p-24f);
    uint32_t is_subnormal = magnitude < 0x0400u ? UINT32_MAX : 0; /* a mask: ?: would skip the product by a jump */
    return as_float(sign | (subnormal & is_subnormal) | (normal & ~is_subnormal));
}

static inline uint16_t f32_to_f16(float value) {
    uint32_t bits = as_bits(value);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    /* Just under half a unit, and one more if the result would be odd: nearest, ties to even. A carry runs into the
     * exponent, which is right: the next binade, and infinity after the last. */
    uint32_t rounded = magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1);
    uint32_t normal = magnitude >= 0x47800000u ? 0x7c00u : rounded >> 13; /* from 2^16 on: infinity */
    /* Below 2^-14 the unit is 2^-24, and that is the unit of a float32 in [0.5, 1): the addition rounds. */
    uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    return (uint16_t)(sign | (magnitude > 0x7f800000u ? nan : finite));
}
// [/f16]

// [bf16]
static inline float bf16_to_f32(uint16_t half) {
    return as_float((uint32_t)half << 16);
}

static inline uint16_t f32_to_bf16(float value) {
    uint32_t bits = as_bits(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    uint32_t nan = (bits >> 16) | 0x40u; /* a quiet NaN, whatever its payload lost */
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}
// [/bf16]

/* Tensors from files may not be aligned to the element size, hence memcpy: it becomes one load or store. */
static inline void widen(bool bf16, int64_t count, const char *source, float *target) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        uint16_t half;
        memcpy(&half, source + 2 * i, 2);
        target[i] = bf16 ? bf16_to_f32(half) : f16_to_f32(half);
    }
}

static inline void narrow(bool bf16, int64_t count, const float *source, char *target) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        uint16_t half = bf16 ? f32_to_bf16(source[i]) : f32_to_f16(source[i]);
        memcpy(target + 2 * i, &half, 2);
    }
}

void fmoe_to_f32(fmoe_dtype dtype, int64_t count, const void *source, float *target) {
    if (dtype == FMOE_F32 && count > 0)
        memcpy(target, source, (size_t)count * 4);
    else if (dtype == FMOE_F16)
        widen(false, count, source, target);
    else if (dtype == FMOE_BF16)
        widen(true, count, source, target);
}

void fmoe_from_f32(fmoe_dtype dtype, int64_t count, const float *source, void *target) {
    if (dtype == FMOE_F32 && count > 0)
        memcpy(target, source, (size_t)count * 4);
    else if (dtype == FMOE_F16)
        narrow(false, count, source, target);
    else if (dtype == FMOE_BF16)
        narrow(true, count, source, target);
}
