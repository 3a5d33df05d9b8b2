// Exercise 6.3, starter, right: a thread a result. Two rows come from memory (or a cache) for every multiply-add.
#include "plugin.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define SIDE 16

// A thread a hidden unit of a token, SIDE × SIDE a block; no shared memory. A block reads SIDE rows of x and 2 · SIDE
// rows of weights, each of them SIDE times, out of the L1 where it can.
template <typename E> __global__ void hidden_kernel(fmoe_mlp_args a, float *hidden) {
    int64_t i = (int64_t)blockIdx.x * SIDE + threadIdx.x, t = (int64_t)blockIdx.y * SIDE + threadIdx.y;
    if (t >= a.T || i >= a.I)
        return;
    const E *x = (const E *)a.x + t * a.d, *gate = (const E *)a.gate + i * a.d, *up = (const E *)a.up + i * a.d;
    float p = 0, q = 0;
    for (int64_t c = 0; c < a.d; c++) {
        p += (float)x[c] * (float)gate[c];
        q += (float)x[c] * (float)up[c];
    }
    hidden[t * a.I + i] = p / (1 + expf(-p)) * q;
}

// A thread an element of y, SIDE × SIDE a block; no shared memory. Traffic as above, with rows of I numbers.
template <typename E> __global__ void output_kernel(fmoe_mlp_args a, const float *hidden) {
    int64_t c = (int64_t)blockIdx.x * SIDE + threadIdx.x, t = (int64_t)blockIdx.y * SIDE + threadIdx.y;
    if (t >= a.T || c >= a.d)
        return;
    const E *down = (const E *)a.down + c * a.I;
    float y = 0;
    for (int64_t i = 0; i < a.I; i++)
        y += hidden[t * a.I + i] * (float)down[i];
    ((E *)a.y)[t * a.d + c] = (E)y;
}

static unsigned tiles(int64_t count) {
    return (unsigned)((count + SIDE - 1) / SIDE);
}

template <typename E> static void two_products(const fmoe_mlp_args &a, float *hidden, cudaStream_t stream) {
    dim3 threads(SIDE, SIDE);
    hidden_kernel<E><<<dim3(tiles(a.I), tiles(a.T)), threads, 0, stream>>>(a, hidden);
    output_kernel<E><<<dim3(tiles(a.d), tiles(a.T)), threads, 0, stream>>>(a, hidden);
}

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    fmoe_mlp_args a = *(const fmoe_mlp_args *)args;
    (void)workspace_bytes;
    if (a.T == 0)
        return FMOE_OK;
    if (a.dtype == FMOE_F32)
        two_products<float>(a, (float *)workspace, (cudaStream_t)stream);
    else if (a.dtype == FMOE_F16)
        two_products<__half>(a, (float *)workspace, (cudaStream_t)stream);
    else
        two_products<__nv_bfloat16>(a, (float *)workspace, (cudaStream_t)stream);
    return cudaGetLastError() == cudaSuccess ? FMOE_OK : FMOE_CUDA;
}

static size_t needed(const void *args) {
    const fmoe_mlp_args *a = (const fmoe_mlp_args *)args;
    return (size_t)(a->T * a->I) * sizeof(float);
}

const fmoe_plugin fmoe_plugin_rung = {
    FMOE_STEPS_VERSION, "mlp", "a thread a result", run, BACKEND_CUDA, 0, needed, NULL, NULL};
