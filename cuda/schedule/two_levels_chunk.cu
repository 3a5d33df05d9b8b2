// Two levels, the first: every chunk of pairs sorted by bucket.
#include "two_levels.cuh"

typedef struct {
    int *counters;    // [warps, buckets]
    int *histogram;   // [heavy_batch, digits]
    uint32_t *sorted; // the chunk's records: in shared memory if they fit, else in place
} chunk_memory;

// So many histograms of heavy segments are counted at a time: 8 KB, all 16 of them if a bucket has up to 128 experts.
__host__ __device__ static inline int heavy_batch(const levels &a) {
    int most = 2048 >> a.low_bits;
    return most < HEAVY_SLOTS ? most : HEAVY_SLOTS;
}

__host__ __device__ static inline bool is_staged(const levels &a) {
    return 1 << a.chunk_bits <= MAX_STAGED;
}

size_t sort_chunk_shared(const levels *l) {
    int histogram = l->even ? heavy_batch(*l) << l->low_bits : 0, staged = is_staged(*l) ? 1 << l->chunk_bits : 0;
    return sizeof(int) * (size_t)(l->chunk_warps * l->buckets + histogram + staged);
}

__device__ inline chunk_memory lay_out_shared(const levels &a, int *shared) {
    chunk_memory m;
    m.counters = shared;
    m.histogram = m.counters + a.chunk_warps * a.buckets;
    m.sorted = is_staged(a) ? (uint32_t *)(m.histogram + (a.even ? heavy_batch(a) << a.low_bits : 0))
                            : a.records + ((int64_t)blockIdx.x << a.chunk_bits);
    return m;
}

// One coalesced load a row; behind the end, the last pair again and no expert.
template <int ROWS>
__device__ inline void load_experts(const levels &a, int begin, int first, int end, int (&expert)[ROWS]) {
    int position = first + threadIdx.x % WARP;
#pragma unroll
    for (int j = 0; j < ROWS; j++)
        expert[j] = a.call.indices[begin + min(position + j * WARP, end - 1)];
#pragma unroll
    for (int j = 0; j < ROWS; j++)
        expert[j] = position + j * WARP < end ? (int)min((unsigned)expert[j], (unsigned)a.call.N) : -1;
}

template <int ROWS>
__device__ inline void rank_in_buckets(const levels &a, const int (&expert)[ROWS], int *counters, int (&rank)[ROWS]) {
    int bucket[ROWS];
#pragma unroll
    for (int j = 0; j < ROWS; j++)
        bucket[j] = expert[j] >> a.low_bits; // -1 stays -1
    take_ranks(bucket, 32 - __clz(a.buckets - 1), counters, rank);
}

typedef struct {
    int count, begin[HEAVY_SLOTS], end[HEAVY_SLOTS];
} heavy_list;

// Counters become places, by bucket and then by warp; the chunk's rows of starts and sizes; its heavy segments. Ends
// with a barrier.
template <int WARPS>
__device__ inline void place_buckets(const levels &a, int count, int *counters, heavy_list *heavy) {
    __shared__ __align__(16) int sums[2 * WARPS];
    int32_t *starts = a.starts + (int64_t)blockIdx.x * (a.buckets + 1);
    for (int first = 0, base = 0, turn = 0, total; first < a.buckets; first += WARPS * WARP, base += total, turn ^= 1) {
        int active = warps_for<WARPS>(a.buckets - first), bucket = first + threadIdx.x, held[WARPS], size = 0;
        bool inside = bucket < a.buckets;
        if (threadIdx.x / WARP < active)
            size = sum_column<WARPS>(counters, a.buckets, min(bucket, a.buckets - 1), held);
        size = inside ? size : 0;
        int place = base + scan_block<WARPS>(size, active, turn, sums, &total);
        if (inside) {
            starts[bucket] = place;
            place_column<WARPS>(counters, a.buckets, bucket, held, place);
            if (a.even && !a.planned)
                a.sizes[(int64_t)blockIdx.x * a.pitch + bucket] = (uint16_t)size;
            if (size >= 1 << heavy_bits(a)) {
                int entry = atomicAdd(&heavy->count, 1);
                heavy->begin[entry] = place;
                heavy->end[entry] = place + size;
            }
        }
    }
    if (threadIdx.x == 0)
        starts[a.buckets] = count;
    __syncthreads();
}

// [heavy]
// Every block that takes a share of a bucket must know what the others place. It would count a heavy segment again, so
// the segment's histogram is kept. Two heavy segments begin at least a heavy length apart: each has a slot.
template <int THREADS> __device__ void count_heavy(const levels &a, const heavy_list &heavy, const chunk_memory &m) {
    int batch = heavy_batch(a);
    for (int first = 0; first < heavy.count; first += batch) {
        int entries = min(batch, heavy.count - first);
#pragma unroll 1
        for (int i = threadIdx.x; i < entries << a.low_bits; i += THREADS)
            m.histogram[i] = 0;
        __syncthreads();
#pragma unroll 1
        for (int e = 0; e < entries; e++)
            for (int i = heavy.begin[first + e] + threadIdx.x; i < heavy.end[first + e]; i += THREADS)
                atomicAdd(m.histogram + (e << a.low_bits) + (m.sorted[i] >> POSITION_BITS), 1);
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < entries << a.low_bits; i += THREADS) {
            int begin = heavy.begin[first + (i >> a.low_bits)], digit = i & ((1 << a.low_bits) - 1);
            heavy_histogram(a, blockIdx.x, begin)[digit] = (uint32_t)m.histogram[i];
        }
        __syncthreads();
    }
}
// [/heavy]

// [sort-chunk]
// A block a chunk, 16 or 4 warps, each with consecutive pairs. Shared memory: warps · buckets counters, the chunk's
// records and 8 KB; 24 to 56 KB. Reads the indices (again, from a cache, if a warp has more rows than fit registers),
// writes 4 bytes a pair and the chunk's rows of starts and sizes. The next kernel may start once little is left to do:
// blocks that came earlier would take issue slots from this one.
template <int WARPS, int ROWS> __global__ void __launch_bounds__(WARPS *WARP, 2) sort_chunk(levels a) {
    extern __shared__ int shared[];
    __shared__ heavy_list heavy;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int begin = blockIdx.x << a.chunk_bits, count = min(1 << a.chunk_bits, a.call.num_pairs - begin);
    int each = (1 << a.chunk_bits) / WARPS, first = warp * each, end = min(first + each, count);
    bool again = each > ROWS * WARP; // more rows than registers
    chunk_memory m = lay_out_shared(a, shared);
    int *counters = m.counters + warp * a.buckets, expert[ROWS], rank[ROWS];
    if (first < end)
        load_experts(a, begin, first, end, expert);
    clear_row(a.buckets, counters);
    if (threadIdx.x == 0)
        heavy.count = 0;
    for (int row = first; row < end; row += ROWS * WARP) {
        if (row > first)
            load_experts(a, begin, row, end, expert);
        rank_in_buckets(a, expert, counters, rank);
    }
    __syncthreads();
    place_buckets<WARPS>(a, count, m.counters, &heavy);
    for (int row = first; row < end; row += ROWS * WARP) {
        if (again) { // the counters are places by now
            load_experts(a, begin, row, end, expert);
            rank_in_buckets(a, expert, counters, rank);
        } else {
#pragma unroll
            for (int j = 0; j < ROWS; j++)
                rank[j] += counters[max(expert[j], 0) >> a.low_bits];
        }
#pragma unroll
        for (int j = 0; j < ROWS; j++)
            if (expert[j] >= 0)
                m.sorted[rank[j]] = (uint32_t)(expert[j] & ((1 << a.low_bits) - 1)) << POSITION_BITS |
                                    (uint32_t)(row + j * WARP + lane);
    }
    __syncthreads();
    let_next_start();
    if (is_staged(a))
#pragma unroll 4
        for (int i = threadIdx.x; i < count; i += WARPS * WARP)
            a.records[begin + i] = m.sorted[i];
    if (a.even)
        count_heavy<WARPS * WARP>(a, heavy, m);
}
// [/sort-chunk]

levels_kernel *sort_chunk_for(const levels *l) {
    if (l->chunk_warps == FEW_WARPS)
        return sort_chunk<FEW_WARPS, 8>;
    return (1 << l->chunk_bits) / MANY_WARPS <= 4 * WARP ? sort_chunk<MANY_WARPS, 4> : sort_chunk<MANY_WARPS, 8>;
}
