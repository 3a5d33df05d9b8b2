// Exercise 4.3, starter, right: a thread an expert. Each reads all the indices, twice.
#include "plugin.h"

// Threads 0 to N − 1, 128 a block; no shared memory. All lanes of a warp read the same index at a time. 4·T·K bytes a
// warp, from the L2.
__global__ static void count(fmoe_schedule_args a) {
    int64_t e = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= a.N)
        return;
    int32_t found = 0;
    for (int64_t pair = 0; pair < a.T * a.K; pair++)
        found += a.indices[pair] == e;
    a.offsets[e + 1] = found;
}

// One thread.
__global__ static void add_up(fmoe_schedule_args a) {
    a.offsets[0] = 0;
    for (int64_t e = 0; e < a.N; e++)
        a.offsets[e + 1] += a.offsets[e];
}

// As count. Pairs rise, so the order is stable.
__global__ static void place(fmoe_schedule_args a) {
    int64_t e = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= a.N)
        return;
    int32_t at = a.offsets[e];
    for (int64_t pair = 0; pair < a.T * a.K; pair++)
        if (a.indices[pair] == e)
            a.pairs[at++] = (int32_t)pair;
}

// Beyond this a call takes seconds.
static bool supports(const void *args) {
    const fmoe_schedule_args *a = (const fmoe_schedule_args *)args;
    return (double)(a->T * a->K) * (double)a->N < 1e10;
}

static fmoe_status run(const void *args, void *workspace, size_t bytes, void *stream) {
    fmoe_schedule_args a = *(const fmoe_schedule_args *)args;
    unsigned blocks = (unsigned)((a.N + 127) / 128);
    (void)workspace, (void)bytes;
    count<<<blocks, 128, 0, (cudaStream_t)stream>>>(a);
    add_up<<<1, 1, 0, (cudaStream_t)stream>>>(a);
    place<<<blocks, 128, 0, (cudaStream_t)stream>>>(a);
    return cudaGetLastError() == cudaSuccess ? FMOE_OK : FMOE_CUDA;
}

const fmoe_plugin fmoe_plugin_rung = {FMOE_STEPS_VERSION, "schedule", "a thread an expert", run, BACKEND_CUDA, 0, NULL,
                                      supports,           NULL};
