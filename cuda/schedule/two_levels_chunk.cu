// Two levels, the first: every chunk of pairs sorted by bucket.
#include "two_levels.cuh"

size_t sort_chunk_shared(const levels *l) {
    int chunk = 1 << l->chunk_bits;
    return sizeof(int) * (size_t)(l->chunk_warps * l->buckets + (chunk <= MAX_STAGED ? chunk : 0));
}

// Row j of a group is one coalesced load. -1 behind the end.
__device__ inline void load_experts(const levels &a, int begin, int first, int end, int (&expert)[LANE_PAIRS]) {
#pragma unroll
    for (int j = 0; j < LANE_PAIRS; j++) {
        int position = first + j * WARP + threadIdx.x % WARP;
        expert[j] = position < end ? expert_of(a.call, begin + position) : -1;
    }
}

// [heavy]
// A segment this long would be counted again by every block that shares its bucket, so its histogram is kept. Two heavy
// segments begin at least a heavy length apart: the beginning, divided by that, is a slot of its own.
__device__ void count_heavy(const levels &a, const int *ends, const uint32_t *sorted) {
    __shared__ int bucket_of[1 << HEAVY_BITS];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int least = 1 << (a.chunk_bits - HEAVY_BITS), digits = 1 << a.low_bits, found = 0;
    if (threadIdx.x < 1 << HEAVY_BITS)
        bucket_of[threadIdx.x] = -1;
    __syncthreads();
    for (int b = threadIdx.x; b < a.buckets; b += blockDim.x) {
        int begin = b ? ends[b - 1] : 0;
        if (ends[b] - begin >= least) {
            bucket_of[begin / least] = b;
            found = 1;
        }
    }
    if (!__syncthreads_or(found))
        return;
    for (int slot = warp; slot < 1 << HEAVY_BITS; slot += warps) {
        int b = bucket_of[slot];
        if (b < 0)
            continue;
        int32_t *counts = a.heavy + ((int64_t)(blockIdx.x << HEAVY_BITS) + slot) * digits;
        for (int digit = lane; digit < digits; digit += WARP)
            counts[digit] = 0;
        __syncwarp();
        for (int i = (b ? ends[b - 1] : 0); i < ends[b]; i += WARP) {
            int digit = i + lane < ends[b] ? (int)(sorted[i + lane] >> POSITION_BITS) : -1;
            unsigned peers = __match_any_sync(ALL_LANES, digit);
            if (digit >= 0 && lane == __ffs(peers) - 1)
                atomicAdd(counts + digit, __popc(peers));
        }
    }
}
// [/heavy]

// [sort-chunk]
// A block a chunk, up to 16 warps, each with consecutive pairs. Shared memory: warps · buckets counters and the chunk's
// records, 16 KB + 8 to 16 KB. Reads the indices (twice, then from a cache, if a warp has more than 256), writes 4
// bytes a pair and the chunk's column of starts.
__global__ void __launch_bounds__(MAX_WARPS *WARP, PER_SM) sort_chunk(levels a) {
    extern __shared__ int counters[];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int begin = blockIdx.x << a.chunk_bits, count = records_in_chunk(a, blockIdx.x);
    int each = (1 << a.chunk_bits) / warps, first = warp * each, end = min(first + each, count);
    int *mine = counters + warp * a.buckets, expert[LANE_PAIRS], bucket[LANE_PAIRS];
    unsigned peers[LANE_PAIRS];
    bool staged = 1 << a.chunk_bits <= MAX_STAGED;
    uint32_t *sorted = staged ? (uint32_t *)(counters + warps * a.buckets) : a.records + begin;
    let_next_start();

    load_experts(a, begin, first, end, expert);
    for (int b = lane; b < a.buckets; b += WARP)
        mine[b] = 0;
    __syncwarp();
    for (int group = first; group < end; group += GROUP) {
        if (group > first)
            load_experts(a, begin, group, end, expert);
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++)
            if (expert[j] >= 0)
                atomicAdd(mine + (expert[j] >> a.low_bits), 1);
    }
    __syncthreads();
    scan_counters(a.buckets, 0, counters, NULL, NULL, a.starts + blockIdx.x, a.chunks, a.buckets);
    if (threadIdx.x == 0)
        a.starts[(int64_t)a.buckets * a.chunks + blockIdx.x] = count;

    for (int group = first; group < end; group += GROUP) {
        if (each > GROUP)
            load_experts(a, begin, group, end, expert);
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++)
            bucket[j] = expert[j] >> a.low_bits; // -1 stays -1
        int rows = rows_of(group, end);
        match_group(rows, bucket, peers);
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++)
            if (j < rows) {
                int place = take_place(bucket[j], peers[j], mine);
                if (expert[j] >= 0)
                    sorted[place] = (uint32_t)(expert[j] & ((1 << a.low_bits) - 1)) << POSITION_BITS |
                                    (uint32_t)(group + j * WARP + lane);
            }
    }
    __syncthreads();
    if (staged)
        for (int i = threadIdx.x; i < count; i += blockDim.x)
            a.records[begin + i] = sorted[i];
    // The last warp's counters have moved on to where the buckets end.
    if (a.even)
        count_heavy(a, counters + (warps - 1) * a.buckets, sorted);
}
// [/sort-chunk]
