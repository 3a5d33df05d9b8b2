// Four kernels, each with the kind of mistake that one tool of compute-sanitizer is there for.
#include "faults.h"

#include <cuda_runtime.h>

// One block of 33 threads; no shared memory. Writes one element more than there are.
static __global__ void beyond(float *values) {
    values[threadIdx.x] = 1;
}

// One block of 64 threads, 256 bytes of shared memory. Reads what another warp writes, with no barrier between them.
static __global__ void no_barrier(float *values) {
    __shared__ float shared[64];
    shared[threadIdx.x] = values[threadIdx.x % 32];
    values[threadIdx.x % 32] = shared[63 - threadIdx.x];
}

// One warp; no shared memory. Reads what nobody has written.
static __global__ void unwritten(const float *values, float *target) {
    target[threadIdx.x] = values[threadIdx.x] + 1;
}

// One warp; no shared memory. Half of it waits for a barrier that the other half never reaches.
static __global__ void half_a_barrier(float *values) {
    if (threadIdx.x % 2)
        __syncthreads();
    values[threadIdx.x] = 1;
}

extern "C" int run_fault(const char *tool) {
    float *values, *fresh;
    if (cudaMalloc(&values, 32 * sizeof(float)) != cudaSuccess || cudaMalloc(&fresh, 32 * sizeof(float)) != cudaSuccess)
        return 1;
    if (tool[0] != 'i')
        cudaMemset(values, 0, 32 * sizeof(float));
    switch (tool[0]) {
    case 'm':
        beyond<<<1, 33>>>(values);
        break;
    case 'r':
        no_barrier<<<1, 64>>>(values);
        break;
    case 'i':
        unwritten<<<1, 32>>>(values, fresh);
        break;
    default:
        half_a_barrier<<<1, 32>>>(values);
    }
    return cudaDeviceSynchronize() != cudaSuccess;
}
