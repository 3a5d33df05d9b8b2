// A plugin with device pointers: the expert step in float32, a thread a pair and then a thread an element of y. The
// environment's MISTAKE plants one.
#include "plugin.h"

#include <cstdlib>
#include <cstring>

static bool is_mistake(const char *name) {
    const char *mistake = getenv("MISTAKE");
    return mistake && strcmp(mistake, name) == 0;
}

// A thread a pair, 128 a block; no shared memory. Reads a row of x and one of the table a pair, writes 4 bytes.
__global__ void activate(fmoe_expert_args a, float *activations) {
    int64_t pair = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (pair >= a.T * a.K)
        return;
    const float *x = (const float *)a.x + pair / a.K * a.d, *down = (const float *)a.down + a.indices[pair] * a.d;
    double sum = 0;
    for (int64_t i = 0; i < a.d; i++)
        sum += (double)x[i] * down[i];
    activations[pair] = (float)(sum / (1 + exp(-sum)) * a.weights[pair]);
}

// A thread an element, 128 a block; no shared memory. Reads K activations and K elements of the table, writes 4 bytes.
__global__ void combine(fmoe_expert_args a, const float *activations, int64_t beyond) {
    int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, t = at / a.d;
    if (at >= a.T * a.d)
        return;
    double sum = 0;
    for (int64_t k = 0; k < a.K; k++)
        sum += (double)activations[t * a.K + k] * ((const float *)a.up)[a.indices[t * a.K + k] * a.d + at % a.d];
    ((float *)a.y)[at + beyond] = (float)sum;
}

static size_t needed(const void *args) {
    const fmoe_expert_args *a = (const fmoe_expert_args *)args;
    return (size_t)(a->T * a->K) * sizeof(float);
}

static unsigned blocks(int64_t threads) {
    return (unsigned)((threads + 127) / 128);
}

/* One that no copy waits for by itself. */
static cudaStream_t other_stream(void) {
    static cudaStream_t made;
    if (!made)
        cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking);
    return made;
}

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    fmoe_expert_args a = *(const fmoe_expert_args *)args;
    (void)workspace_bytes;
    if (a.T == 0)
        return FMOE_OK;
    int64_t beyond = is_mistake("BEYOND") ? 1 : is_mistake("ILLEGAL") ? (int64_t)1 << 40 : 0;
    cudaStream_t on = is_mistake("OTHER_STREAM") ? other_stream() : (cudaStream_t)stream;
    activate<<<blocks(a.T * a.K), 128, 0, on>>>(a, (float *)workspace);
    combine<<<blocks(a.T * a.d), 128, 0, on>>>(a, (float *)workspace, beyond);
    return cudaGetLastError() == cudaSuccess ? FMOE_OK : FMOE_CUDA;
}

const fmoe_plugin fmoe_plugin_rung = {FMOE_STEPS_VERSION,  "expert", "mine", run, BACKEND_CUDA,
                                      FMOE_ONLY(FMOE_F32), needed,   NULL,   NULL};
