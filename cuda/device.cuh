// What the kernels of all steps share: storage types, 16-byte loads, warp reductions, launches that report.
#ifndef FMOE_DEVICE_CUH
#define FMOE_DEVICE_CUH

#include "fmoe_cuda.h"

// check.h is C and has OpenMP pragmas: nvcc passes -fopenmp on to the host compiler.
extern "C" {
#include "../ref_cpu/check.h"
}

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define WARP      32
#define ALL_LANES 0xffffffffu

// ---- Storage types ----

__device__ inline float to_f32(float value) {
    return value;
}
__device__ inline float to_f32(__half value) {
    return __half2float(value);
}
__device__ inline float to_f32(__nv_bfloat16 value) {
    return __bfloat162float(value);
}

template <typename E> __device__ E from_f32(float value);
template <> __device__ inline float from_f32<float>(float value) {
    return value;
}
template <> __device__ inline __half from_f32<__half>(float value) {
    return __float2half_rn(value);
}
template <> __device__ inline __nv_bfloat16 from_f32<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// 16 bytes of elements, moved in one instruction where the address allows it.
template <typename E> struct alignas(16) pack16 {
    static constexpr int count = 16 / sizeof(E);
    E at[count];
};

// Runs the statement with E as the element type that a dtype names.
#define WITH_DTYPE(dtype, E, ...)                                                                                      \
    do {                                                                                                               \
        if ((dtype) == FMOE_F32) {                                                                                     \
            typedef float E;                                                                                           \
            __VA_ARGS__;                                                                                               \
        } else if ((dtype) == FMOE_F16) {                                                                              \
            typedef __half E;                                                                                          \
            __VA_ARGS__;                                                                                               \
        } else {                                                                                                       \
            typedef __nv_bfloat16 E;                                                                                   \
            __VA_ARGS__;                                                                                               \
        }                                                                                                              \
    } while (0)

// ---- Warps ----

__device__ inline float warp_max(float value) {
    for (int step = WARP / 2; step; step /= 2)
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
    return value;
}

// Every lane gets the same bits: the partners of each step add the same two numbers.
__device__ inline float warp_sum(float value) {
    for (int step = WARP / 2; step; step /= 2)
        value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

// ---- Notes: what only the device can see, at the beginning of a workspace ----

// Every token has a line, which its own warp writes each time, bad index or none: nothing has to be zeroed before the
// launch, no two writers meet, and the first bad place in memory order is whatever the host finds first.
typedef enum { LIMIT_PAIRS, LIMIT_EXPERTS } cuda_limit; // "n²" or "num_experts" in the message

typedef struct {
    unsigned long long mark; // CUDA_NOTE_MARK: a function that notes has written this
    long long tokens;        // lines that follow, CUDA_NOTE_BYTES after the workspace's start
    long long limit;
    cuda_limit limit_is;
} cuda_note;

typedef struct {
    int32_t k, value; // the token's first bad index; k is -1 where there is none
} cuda_note_line;

#define CUDA_NOTE_MARK  0x464c4f572e4e4f54ull
#define CUDA_NOTE_BYTES 256

static inline size_t cuda_note_workspace(int64_t T) {
    return CUDA_NOTE_BYTES + (size_t)T * sizeof(cuda_note_line);
}

__device__ inline cuda_note_line *cuda_note_lines(void *workspace) {
    return (cuda_note_line *)((char *)workspace + CUDA_NOTE_BYTES);
}

// ---- Host ----

static inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// After a launch: its status, with the kernel's name in the message.
static inline fmoe_status launched(const char *kernel) {
    cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? FMOE_OK : fmoe_fail(FMOE_CUDA, "%s: %s", kernel, cudaGetErrorString(error));
}

static inline fmoe_status cuda_call(const char *what, cudaError_t error) {
    return error == cudaSuccess ? FMOE_OK : fmoe_fail(FMOE_CUDA, "%s: %s", what, cudaGetErrorString(error));
}

static inline fmoe_status check_workspace(const void *workspace, size_t bytes, size_t needed) {
    if (needed > 0 && !workspace)
        return fmoe_fail(FMOE_NULL_POINTER, "workspace is NULL and should hold %zu bytes", needed);
    if (bytes < needed)
        return fmoe_fail(FMOE_BAD_WORKSPACE, "workspace_bytes = %zu is below the %zu that are needed", bytes, needed);
    return FMOE_OK;
}

static inline fmoe_status check_dtype(fmoe_dtype dtype) {
    if (dtype != FMOE_F32 && dtype != FMOE_F16 && dtype != FMOE_BF16)
        return fmoe_fail(FMOE_UNSUPPORTED, "dtype = %d is neither f32, f16 nor bf16", (int)dtype);
    return FMOE_OK;
}

#endif
