// Rung `atomics`: a counting sort that lets the threads race for places, and then has to sort what they did.
#include "schedule.cuh"

#define PAIR_THREADS 256
#define SCAN_THREADS 1024
#define SORT_THREADS 128
#define SORT_STAGED  2048

// [atomics]
// A thread a pair, 256 a block; no shared memory. Reads 4 bytes a pair, adds 1 in the L2.
__global__ void count_pairs(schedule_task a, int *counts) {
    int64_t pair = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (pair < a.num_pairs)
        atomicAdd(counts + expert_of(a, (int)pair), 1);
}

// One block of 1,024 threads; 128 bytes of shared memory. Reads N + 1 counts, writes N + 1 offsets and as many places.
__global__ void scan_experts(schedule_task a, int *counts) {
    __shared__ __align__(16) int sums[2 * SCAN_THREADS / WARP];
    for (int first = 0, base = 0, total; first <= a.N; first += blockDim.x, base += total) {
        int expert = first + threadIdx.x, count = expert <= a.N ? counts[expert] : 0;
        int place =
            base + scan_block<SCAN_THREADS / WARP>(count, SCAN_THREADS / WARP, first / SCAN_THREADS % 2, sums, &total);
        if (expert <= a.N)
            a.offsets[expert] = counts[expert] = place;
    }
}

// A thread a pair, 256 a block; no shared memory. Reads 4 bytes a pair, writes 4 somewhere. Who comes first is chance.
__global__ void place_pairs(schedule_task a, int *next) {
    int64_t pair = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (pair >= a.num_pairs)
        return;
    int expert = expert_of(a, (int)pair);
    a.pairs[atomicAdd(next + expert, 1)] = expert < a.N ? (int32_t)pair : -1;
}
// [/atomics]

// Rising order by Batcher's bitonic network, by all threads of a block. Each round first compares a run with its mirror
// image, so that every comparison puts the smaller number first, and numbers missing behind the end never move.
__device__ inline void sort_rising(int count, int32_t *list) {
    for (int64_t width = 2; width < 2 * (int64_t)count; width *= 2)
        for (int64_t half = width / 2; half > 0; half /= 2) {
            __syncthreads();
            for (int64_t c = threadIdx.x; c < count; c += blockDim.x) {
                int64_t within = c & (half - 1), low = 2 * c - within;
                int64_t high = half == width / 2 ? (low & -width) + width - 1 - within : low + half;
                if (high >= count)
                    continue;
                int32_t x = list[low], y = list[high];
                if (y < x) {
                    list[low] = y;
                    list[high] = x;
                }
            }
        }
    __syncthreads();
}

// [order]
// A block an expert, 128 threads, 8 KB of shared memory, where up to 2,048 pairs are sorted; more are sorted where they
// are. Reads and writes 4 bytes a pair. One block more notes bad indices.
__global__ void sort_lists(schedule_task a) {
    __shared__ int32_t staged[SORT_STAGED];
    int expert = blockIdx.x;
    if (expert == a.N) {
        note_bad_indices(a, a.offsets[a.N]);
        return;
    }
    int begin = a.offsets[expert], count = a.offsets[expert + 1] - begin;
    if (count > SORT_STAGED) {
        sort_rising(count, a.pairs + begin);
        return;
    }
    for (int i = threadIdx.x; i < count; i += blockDim.x)
        staged[i] = a.pairs[begin + i];
    sort_rising(count, staged);
    for (int i = threadIdx.x; i < count; i += blockDim.x)
        a.pairs[begin + i] = staged[i];
}
// [/order]

extern "C" size_t cuda_schedule_atomics_workspace(const void *args) {
    const fmoe_schedule_args *a = (const fmoe_schedule_args *)args;
    return schedule_note_bytes(a->T) + (size_t)(a->N + 1) * sizeof(int32_t);
}

extern "C" fmoe_status cuda_schedule_atomics(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    schedule_task a;
    size_t counters = (size_t)(((const fmoe_schedule_args *)args)->N + 1) * sizeof(int32_t);
    TRY(schedule_from_args(args, workspace, workspace_bytes, counters, &a));
    cudaStream_t s = (cudaStream_t)stream;
    if (a.T == 0)
        return schedule_nothing(&a, s);
    int *counts = (int *)a.rest;
    unsigned blocks = (unsigned)ceil_div(a.num_pairs, PAIR_THREADS);
    TRY(cuda_call("cudaMemsetAsync", cudaMemsetAsync(counts, 0, counters, s)));
    count_pairs<<<blocks, PAIR_THREADS, 0, s>>>(a, counts);
    TRY(launched("count_pairs"));
    scan_experts<<<1, SCAN_THREADS, 0, s>>>(a, counts);
    TRY(launched("scan_experts"));
    place_pairs<<<blocks, PAIR_THREADS, 0, s>>>(a, counts);
    TRY(launched("place_pairs"));
    sort_lists<<<(unsigned)a.N + 1, SORT_THREADS, 0, s>>>(a);
    return launched("sort_lists");
}
