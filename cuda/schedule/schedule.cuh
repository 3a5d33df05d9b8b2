// What the rungs of schedule share: their arguments, the checks, a block's scan, and the note about bad indices.
#ifndef FMOE_SCHEDULE_CUH
#define FMOE_SCHEDULE_CUH

#include "../device.cuh"
#include "schedule.h"

typedef struct {
    int T, K, N, num_pairs;
    const int32_t *indices; // [T, K]
    int32_t *offsets;       // [N + 1]
    int32_t *pairs;         // [T·K]
    void *note;             // the workspace's beginning
    char *rest;             // what follows the note in the workspace
} schedule_task;

// Checks sizes, pointers and the workspace, which holds the note and then `needed` bytes for the rung.
fmoe_status schedule_from_args(const void *args, void *workspace, size_t workspace_bytes, size_t needed,
                               schedule_task *task);
// T = 0: all offsets are 0, and nothing is noted.
fmoe_status schedule_nothing(const schedule_task *task, cudaStream_t stream);

static inline size_t round_256(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

static inline size_t schedule_note_bytes(int64_t T) {
    return round_256(cuda_note_workspace(T));
}

// As an unsigned number a negative index is larger than any N: every bad index is expert N, a slot behind the last.
__device__ inline int expert_of(const schedule_task &a, int pair) {
    return (int)min((unsigned)a.indices[pair], (unsigned)a.N);
}

// [scan]
// The sum of the values of the threads before this one, and of all, in a block's first WARPS warps. A warp adds by
// shuffles, in five steps; the warps' sums meet in shared memory. Warps from `active` on have nothing to add. sums:
// [2, WARPS], 16 bytes aligned; taking the halves in turns makes one barrier enough. Every thread of the block calls
// it.
template <int WARPS, typename V> __device__ inline V scan_block(V value, int active, int turn, V *sums, V *total) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    V inclusive = value, before = 0, all = 0;
    sums += turn * WARPS;
    if (warp < active)
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            V other = __shfl_up_sync(ALL_LANES, inclusive, step);
            inclusive += lane >= step ? other : 0;
        }
    if (lane == WARP - 1 && warp < WARPS)
        sums[warp] = inclusive;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        before += w < warp ? sums[w] : 0;
        all += sums[w];
    }
    *total = all;
    return before + inclusive - value;
}
// [/scan]

// The note of a call of which `good` pairs have an expert, by all threads of one block. Where all have, that is two
// stores; else the block looks for the first one, and gives all tokens up to there a line.
__device__ inline void note_bad_indices(const schedule_task &a, int good) {
    __shared__ int first;
    cuda_note note = {CUDA_NOTE_MARK, 0, a.N, LIMIT_EXPERTS};
    if (good < a.num_pairs) {
        if (threadIdx.x == 0)
            first = INT32_MAX;
        __syncthreads();
        bool found = false;
#pragma unroll 1
        for (int64_t begin = 0; begin < a.num_pairs && !found; begin += blockDim.x) {
            int64_t pair = begin + threadIdx.x;
            bool bad = pair < a.num_pairs && expert_of(a, (int)pair) == a.N;
            if (bad)
                atomicMin(&first, (int)pair);
            found = __syncthreads_or(bad);
        }
        int t = first / a.K, k = first % a.K;
        cuda_note_line *lines = cuda_note_lines(a.note);
#pragma unroll 1
        for (int64_t line = threadIdx.x; line < t; line += blockDim.x)
            lines[line] = {-1, 0};
        if (threadIdx.x == 0)
            lines[t] = {k, a.indices[first]};
        note.tokens = (long long)t + 1;
    }
    if (threadIdx.x == 0)
        *(cuda_note *)a.note = note;
}

// [launch]
// With `early` the kernel's blocks may start before the kernel in front of it has finished: wait_for_previous is where
// they wait for its results.
template <typename Task>
static fmoe_status launch_early(const char *name, void (*kernel)(Task), int blocks, int threads, size_t shared,
                                bool early, const Task &task, cudaStream_t stream) {
    // More than 48 KB, of which the kernels' own variables take up to 3 KB, has to be asked for.
    if (shared > 45 * 1024 &&
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared) != cudaSuccess) {
        cudaGetLastError(); // forgotten: the status says it
        return fmoe_fail(FMOE_UNSUPPORTED, "%s needs %zu bytes of shared memory a block, more than this GPU has", name,
                         shared);
    }
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    return cuda_call(name, cudaLaunchKernelEx(&config, kernel, task));
}
// [/launch]

#endif
