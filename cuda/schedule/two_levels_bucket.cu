// Two levels, the second: every bucket sorted by expert. A large bucket may be shared by several blocks.
#include "two_levels_bucket.cuh"

size_t sort_bucket_shared(const levels *l) {
    size_t words = sizeof(int) * (size_t)bucket_words(*l),
           plan = sizeof(uint16_t) * (size_t)(l->bucket_warps * l->pitch);
    return words > plan ? words : plan;
}

// ---- Whose share a block takes

// 32 buckets a block of 8 warps; 1 KB of shared memory. Reads starts, writes bases.
__global__ void find_bases(levels a) {
    __shared__ int sums[8][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, bucket = blockIdx.x * WARP + lane, sum = 0;
    const int32_t *starts = a.starts + min(bucket, a.buckets);
    let_next_start();
    wait_for_previous();
#pragma unroll 8
    for (int chunk = warp; chunk < a.chunks; chunk += 8)
        sum += starts[(int64_t)chunk * (a.buckets + 1)];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || bucket > a.buckets)
        return;
    int base = 0;
    for (int w = 0; w < 8; w++)
        base += sums[w][lane];
    a.bases[bucket] = base;
}

typedef struct {
    int bucket, slice; // bucket -1: nothing to do
} share;

// [helpers]
// The sizes of all buckets, as WARPS numbers each that are to be added up: a warp adds up every WARPS-th row of the
// table, eight numbers of 16 bits a load.
template <int WARPS> __device__ inline void sum_sizes(const levels &a, uint4 *sums) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, eights = a.pitch / 8;
    for (int i = lane; i < eights; i += WARP) {
        const uint4 *sizes = (const uint4 *)a.sizes + i;
        uint4 sum = {};
#pragma unroll 8
        for (int chunk = warp; chunk < a.chunks; chunk += WARPS) {
            uint4 eight = sizes[chunk * eights];
            sum = {sum.x + eight.x, sum.y + eight.y, sum.z + eight.z, sum.w + eight.w}; // no sum exceeds 16 bits
        }
        sums[warp * eights + i] = sum;
    }
    __syncthreads();
}

template <int WARPS> __device__ inline int size_of_bucket(const levels &a, int bucket, const uint16_t *sums) {
    if (a.planned)
        return a.bases[bucket + 1] - a.bases[bucket];
    int size = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++)
        size += sums[w * a.pitch + bucket];
    return size;
}

// Block b takes the first slice of bucket b. The blocks behind the last bucket are helpers: they count off the slices
// that are left over, bucket by bucket.
template <int WARPS> __device__ inline share share_of_helper(const levels &a, int helper, int *shared) {
    __shared__ __align__(16) int sums[2 * WARPS];
    __shared__ share found;
    if (threadIdx.x == 0)
        found = {-1, 0};
    if (!a.planned)
        sum_sizes<WARPS>(a, (uint4 *)shared);
#pragma unroll 1
    for (int first = 0, seen = 0, turn = 0, total; first < a.buckets && seen <= helper;
         first += WARPS * WARP, seen += total, turn ^= 1) {
        int bucket = first + threadIdx.x, left_over = 0;
        if (bucket < a.buckets)
            left_over = max(size_of_bucket<WARPS>(a, bucket, (const uint16_t *)shared) - 1, 0) / a.slice;
        int earlier = seen + scan_block<WARPS>(left_over, warps_for<WARPS>(a.buckets - first), turn, sums, &total);
        if (earlier <= helper && helper < earlier + left_over)
            found = {bucket, helper - earlier + 1};
    }
    __syncthreads();
    return found;
}
// [/helpers]

// [list-segments]
// Where the bucket's segments lie. Returns its beginning in the result and its size.
template <int WARPS> __device__ inline int2 list_segments(const levels &a, int bucket, const bucket_memory &m) {
    __shared__ __align__(16) unsigned long long sums[2 * WARPS];
    unsigned long long seen = 0, total; // two sums in one number: starts above, lengths below
#pragma unroll 1
    for (int first = 0, turn = 0; first < m.padded; first += WARPS * WARP, seen += total, turn ^= 1) {
        int chunk = first + threadIdx.x, start = 0, end = 0;
        if (chunk < a.chunks) {
            const int32_t *starts = a.starts + (int64_t)chunk * (a.buckets + 1) + bucket;
            start = starts[0];
            end = starts[1];
        }
        unsigned long long both = (unsigned long long)start << 32 | (unsigned)(end - start);
        int earlier = (int)(seen + scan_block<WARPS>(both, warps_for<WARPS>(a.chunks - first), turn, sums, &total));
        if (chunk < m.padded) {
            m.segment[chunk] = chunk < a.chunks ? earlier : INT32_MAX;
            m.from[chunk] = (chunk << a.chunk_bits) + start - earlier;
        }
    }
    __syncthreads();
    return {(int)(seen >> 32), (int)seen};
}
// [/list-segments]

// [sort-share]
// The block's records, [low, high) of the bucket: ranks, then the places where the ranks begin, then the pairs.
template <int WARPS>
__device__ inline void sort_share(const levels &a, const bucket_memory &m, int bucket, int base, int size, int low,
                                  int high) {
    int warp = threadIdx.x / WARP, digits = 1 << a.low_bits, lowest = bucket << a.low_bits;
    int each = (high - low + WARPS * WARP - 1) / (WARPS * WARP) * WARP; // of a warp
    int first = low + warp * each, end = min(first + each, high), *counters = m.counters + warp * digits;
    int digit[BUCKET_ROWS], pair[BUCKET_ROWS], rank[BUCKET_ROWS];
    bool again = each > BUCKET_ROWS * WARP; // more rows than registers
    for (int row = first; row < end; row += BUCKET_ROWS * WARP) {
        load_records(a, m, row, end, digit, pair);
        take_ranks(digit, a.low_bits, counters, rank);
    }
    __syncthreads();
    int good = place_experts<WARPS>(a, m, base, low == 0, lowest);
    bool divided = high - low < size, staged = high - low <= a.staged;
    for (int row = first; row < end; row += BUCKET_ROWS * WARP) {
        if (again) { // the counters are places by now
            load_records(a, m, row, end, digit, pair);
            take_ranks(digit, a.low_bits, counters, rank);
        } else {
#pragma unroll
            for (int j = 0; j < BUCKET_ROWS; j++)
                rank[j] += counters[max(digit[j], 0)];
        }
#pragma unroll
        for (int j = 0; j < BUCKET_ROWS; j++) {
            if (digit[j] < 0)
                continue;
            pair[j] = lowest + digit[j] == a.call.N ? -1 : pair[j];
            int place = rank[j] + (divided ? m.before[digit[j]] : base);
            if (!staged) {
                a.call.pairs[place] = pair[j];
                continue;
            }
            m.staged[rank[j]] = pair[j];
            if (divided)
                m.place[rank[j]] = place;
        }
    }
    __syncthreads();
    if (staged)
#pragma unroll 4
        for (int i = threadIdx.x; i < high - low; i += WARPS * WARP)
            a.call.pairs[divided ? m.place[i] : base + i] = m.staged[i];
    if (bucket == a.buckets - 1 && low == 0)
        note_bad_indices(a.call, good);
}
// [/sort-share]

// A warp clears its own counters, and the block before and after.
__device__ inline void clear_counters(const levels &a, const bucket_memory &m) {
    clear_row(1 << a.low_bits, m.counters + (threadIdx.x / WARP << a.low_bits));
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 << a.low_bits; i += blockDim.x)
        m.before[i] = 0; // and after
}

// [sort-bucket]
// A block a bucket, and T·K / slice helpers if even; 16 or 4 warps. Shared memory: (warps + 2) · 2^low_bits counters, 8
// bytes a chunk, 8 a record for up to 3,584 records; 20 to 80 KB. Reads starts and 4 bytes a record, writes 4 bytes a
// pair and the offsets.
template <int WARPS> __global__ void __launch_bounds__(WARPS *WARP, 2) sort_bucket(levels a) {
    extern __shared__ __align__(16) int shared[];
    bucket_memory m = lay_out_bucket(a, shared);
    share mine = {(int)blockIdx.x, 0};
    bool helps = mine.bucket >= a.buckets;
    if (!helps)
        clear_counters(a, m);
    let_next_start();
    wait_for_previous();
    if (helps) {
        mine = share_of_helper<WARPS>(a, mine.bucket - a.buckets, shared);
        if (mine.bucket < 0)
            return;
        clear_counters(a, m);
    }
    int2 base_size = list_segments<WARPS>(a, mine.bucket, m);
    int base = base_size.x, size = base_size.y, low = 0, high = size;
    if (a.even && size > a.slice) {
        low = mine.slice * a.slice;
        high = low + min(a.slice, size - low);
        count_others<WARPS>(a, m, size, low, high);
    }
    sort_share<WARPS>(a, m, mine.bucket, base, size, low, high);
}
// [/sort-bucket]

levels_kernel *sort_bucket_for(const levels *l) {
    return l->bucket_warps == FEW_WARPS ? sort_bucket<FEW_WARPS> : sort_bucket<MANY_WARPS>;
}

levels_kernel *find_bases_kernel(void) {
    return find_bases;
}
