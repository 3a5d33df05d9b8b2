// Two levels, the second: every bucket sorted by expert. A large bucket may be shared by several blocks.
#include "two_levels.cuh"

typedef struct {
    int *counters;       // [warps, digits]
    int *before, *after; // [digits]: what other blocks of the bucket place
    int *segment;        // [chunks]: how many of the bucket's records come from earlier chunks
    int *from;           // [chunks]: record i of the bucket, if it is of chunk c, is records[from[c] + i]
    uint32_t *staged;    // [slice]
} bucket_memory;

__host__ __device__ static inline int bucket_words(const levels &a) {
    return a.bucket_warps * GROUP + ((a.bucket_warps + 2) << a.low_bits) + 2 * a.chunks;
}

__device__ inline bucket_memory lay_out_shared(const levels &a, int *shared) {
    int digits = 1 << a.low_bits;
    bucket_memory m;
    m.counters = shared;
    m.before = m.counters + a.bucket_warps * digits;
    m.after = m.before + digits;
    m.segment = m.after + digits;
    m.from = m.segment + a.chunks;
    m.staged = (uint32_t *)(m.from + a.chunks);
    return m;
}

size_t sort_bucket_shared(const levels *l) {
    int words = bucket_words(*l), plan = l->buckets + 1;
    return sizeof(int) * (size_t)(words > plan ? words : plan);
}

// ---- Whose share a block takes

// The sum of a row of starts, by one warp.
__device__ inline int base_of(const levels &a, int bucket) {
    int sum = 0;
    for (int chunk = threadIdx.x % WARP; chunk < a.chunks; chunk += WARP)
        sum += a.starts[(int64_t)bucket * a.chunks + chunk];
    for (int step = WARP / 2; step; step /= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, step);
    return sum;
}

// A warp a bucket, 8 a block; no shared memory. Reads starts, writes bases.
__global__ void find_bases(levels a) {
    int bucket = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    let_next_start();
    wait_for_previous();
    if (bucket > a.buckets)
        return;
    int base = base_of(a, bucket);
    if (threadIdx.x % WARP == 0)
        a.bases[bucket] = base;
}

typedef struct {
    int bucket, slice; // bucket -1: nothing to do
} share;

// [helpers]
// Block b takes the first slice of bucket b. The blocks behind the last bucket are helpers: they count off the slices
// that are left over, bucket by bucket.
__device__ share share_of_helper(const levels &a, int helper, int *shared) {
    __shared__ int sums[MAX_WARPS];
    __shared__ share found;
    const int32_t *bases = a.planned ? a.bases : shared;
    __syncthreads(); // shared has been cleared
    if (!a.planned)
        for (int bucket = threadIdx.x / WARP; bucket <= a.buckets; bucket += blockDim.x / WARP)
            shared[bucket] = base_of(a, bucket);
    if (threadIdx.x == 0)
        found = {-1, 0};
    __syncthreads();
    for (int first = 0, seen = 0, total; first < a.buckets && seen <= helper; first += blockDim.x, seen += total) {
        int bucket = first + threadIdx.x, size = bucket < a.buckets ? bases[bucket + 1] - bases[bucket] : 0;
        int left_over = max(size - 1, 0) / a.slice, earlier = seen + scan_block(left_over, sums, &total);
        if (earlier <= helper && helper < earlier + left_over)
            found = {bucket, helper - earlier + 1};
    }
    __syncthreads();
    return found;
}
// [/helpers]

// ---- The bucket's records

// Where the bucket's segments lie. Returns its beginning in the result and its size.
__device__ int2 list_segments(const levels &a, int bucket, const bucket_memory &m) {
    __shared__ unsigned long long sums[MAX_WARPS];
    const int32_t *starts = a.starts + (int64_t)bucket * a.chunks, *ends = starts + a.chunks;
    unsigned long long seen = 0, total; // two sums in one number: starts above, lengths below
    for (int first = 0; first < a.chunks; first += blockDim.x, seen += total) {
        int chunk = first + threadIdx.x, start = 0, end = 0;
        if (chunk < a.chunks) {
            start = starts[chunk];
            end = ends[chunk];
        }
        unsigned long long both = (unsigned long long)start << 32 | (unsigned)(end - start);
        int earlier = (int)(seen + scan_block(both, sums, &total));
        if (chunk < a.chunks) {
            m.segment[chunk] = earlier;
            m.from[chunk] = (chunk << a.chunk_bits) + start - earlier;
        }
    }
    __syncthreads();
    return {(int)(seen >> 32), (int)seen};
}

// The last chunk that begins at or before record i.
__device__ inline int chunk_of(const levels &a, const int *segment, int i) {
    int chunk = 0;
    for (int step = 1 << (31 - __clz(a.chunks)); step; step /= 2)
        if (chunk + step < a.chunks && segment[chunk + step] <= i)
            chunk += step;
    return chunk;
}

__device__ inline void load_records(const levels &a, const bucket_memory &m, int first, int end,
                                    int (&digit)[LANE_PAIRS], int (&pair)[LANE_PAIRS]) {
#pragma unroll
    for (int j = 0; j < LANE_PAIRS; j++) {
        int i = first + j * WARP + threadIdx.x % WARP;
        digit[j] = -1;
        if (i < end) {
            int chunk = chunk_of(a, m.segment, i);
            uint32_t record = a.records[m.from[chunk] + i];
            digit[j] = (int)(record >> POSITION_BITS);
            pair[j] = (chunk << a.chunk_bits) + (int)(record & ((1u << POSITION_BITS) - 1));
        }
    }
}

// [others]
// The counts of the bucket's records outside [low, high), a warp a segment. A heavy segment brought its histogram.
__device__ void count_others(const levels &a, const bucket_memory &m, int size, int low, int high) {
    int lane = threadIdx.x % WARP, digits = 1 << a.low_bits, least = 1 << (a.chunk_bits - HEAVY_BITS);
    for (int chunk = threadIdx.x / WARP; chunk < a.chunks; chunk += blockDim.x / WARP) {
        int begin = m.segment[chunk], end = chunk + 1 < a.chunks ? m.segment[chunk + 1] : size;
        if (end - begin >= least && (end <= low || begin >= high)) {
            int slot = (m.from[chunk] + begin - (chunk << a.chunk_bits)) / least;
            const int32_t *counts = a.heavy + ((int64_t)(chunk << HEAVY_BITS) + slot) * digits;
            for (int digit = lane; digit < digits; digit += WARP)
                if (counts[digit])
                    atomicAdd((end <= low ? m.before : m.after) + digit, counts[digit]);
        } else {
            for (int i = begin + lane; i < end; i += WARP)
                if (i < low || i >= high)
                    atomicAdd((i < low ? m.before : m.after) + (a.records[m.from[chunk] + i] >> POSITION_BITS), 1);
        }
    }
}
// [/others]

__device__ inline void clear_counters(const levels &a, const bucket_memory &m) {
    for (int i = threadIdx.x; i < (a.bucket_warps + 2) << a.low_bits; i += blockDim.x)
        m.counters[i] = 0;
}

// [sort-bucket]
// A block a bucket, and T·K / slice helpers if even; up to 16 warps. Shared memory: (warps + 2) · 2^low_bits counters,
// 8 bytes a chunk, 1 KB a warp; 10 to 50 KB. Reads starts and 4 bytes a record, writes 4 bytes a pair and the offsets.
__global__ void __launch_bounds__(MAX_WARPS *WARP, PER_SM) sort_bucket(levels a) {
    extern __shared__ int shared[];
    int warp = threadIdx.x / WARP, warps = blockDim.x / WARP, digits = 1 << a.low_bits;
    int digit[LANE_PAIRS], pair[LANE_PAIRS];
    unsigned peers[LANE_PAIRS];
    bucket_memory m = lay_out_shared(a, shared);
    share mine = {(int)blockIdx.x, 0};
    let_next_start();
    clear_counters(a, m);
    wait_for_previous();
    if (mine.bucket >= a.buckets) {
        mine = share_of_helper(a, mine.bucket - a.buckets, shared);
        if (mine.bucket < 0)
            return;
        clear_counters(a, m);
    }

    int2 base_size = list_segments(a, mine.bucket, m);
    int base = base_size.x, size = base_size.y, low = 0, high = size;
    bool shared_out = a.even && size > a.slice;
    if (shared_out) {
        low = mine.slice * a.slice;
        high = min(low + a.slice, size);
        count_others(a, m, size, low, high);
    }
    int each = (high - low + blockDim.x - 1) / blockDim.x * WARP;
    int first = low + warp * each, end = min(first + each, high), *counters = m.counters + warp * digits;
    for (int group = first; group < end; group += GROUP) {
        load_records(a, m, group, end, digit, pair);
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++)
            if (digit[j] >= 0)
                atomicAdd(counters + digit[j], 1);
    }
    __syncthreads();

    int lowest = mine.bucket << a.low_bits, outs = min(digits, a.call.N + 1 - lowest), good = 0;
    scan_counters(digits, base, m.counters, shared_out ? m.before : NULL, m.after,
                  mine.slice == 0 ? a.call.offsets + lowest : NULL, 1, outs);
    bool notes = mine.bucket == a.buckets - 1 && mine.slice == 0;
    if (notes) {
        good = m.counters[a.call.N - lowest];
        __syncthreads();
    }

    bool staged = size <= warps * GROUP;
    for (int group = first; group < end; group += GROUP) {
        if (each > GROUP)
            load_records(a, m, group, end, digit, pair);
        int rows = rows_of(group, end);
        match_group(rows, digit, peers);
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++) {
            if (j >= rows)
                continue;
            int place = take_place(digit[j], peers[j], counters);
            if (digit[j] < 0)
                continue;
            int value = lowest + digit[j] == a.call.N ? -1 : pair[j];
            if (staged)
                m.staged[place - base] = (uint32_t)value;
            else
                a.call.pairs[place] = value;
        }
    }
    __syncthreads();
    if (staged)
        for (int i = threadIdx.x; i < size; i += blockDim.x)
            a.call.pairs[base + i] = (int32_t)m.staged[i];
    if (notes)
        note_bad_indices(a.call, good);
}
// [/sort-bucket]
