// Two levels, the second: every bucket sorted by expert. A large bucket may be shared by several blocks.
#include "two_levels_bucket.cuh"

size_t sort_bucket_shared(const levels *l) {
    int words = bucket_words(*l), plan = l->buckets + 1;
    return sizeof(int) * (size_t)(words > plan ? words : plan);
}

// ---- Whose share a block takes

// Where a lane's bucket begins: the sum of a column of starts, of every parts-th chunk from `part` on.
__device__ inline int sum_starts(const levels &a, int bucket, int part, int parts) {
    int sum = 0, pitch = a.buckets + 1;
    const int32_t *starts = a.starts + min(bucket, a.buckets);
#pragma unroll 8
    for (int chunk = part; chunk < a.chunks; chunk += parts)
        sum += starts[(int64_t)chunk * pitch];
    return sum;
}

// 32 buckets a block of 8 warps; 1 KB of shared memory. Reads starts, writes bases.
__global__ void find_bases(levels a) {
    __shared__ int sums[8][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, bucket = blockIdx.x * WARP + lane;
    let_next_start();
    wait_for_previous();
    sums[warp][lane] = sum_starts(a, bucket, warp, 8);
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
// Block b takes the first slice of bucket b. The blocks behind the last bucket are helpers: they count off the slices
// that are left over, bucket by bucket.
template <int WARPS> __device__ inline share share_of_helper(const levels &a, int helper, int *shared) {
    __shared__ __align__(16) int sums[2 * WARPS];
    __shared__ share found;
    const int32_t *bases = a.planned ? a.bases : shared;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (!a.planned) {
        int groups = a.buckets / WARP + 1, parts = max(WARPS / groups, 1);
        for (int bucket = threadIdx.x; bucket <= a.buckets; bucket += WARPS * WARP)
            shared[bucket] = 0;
        __syncthreads();
        for (int unit = warp; unit < groups * parts; unit += WARPS) {
            int bucket = unit / parts * WARP + lane, sum = sum_starts(a, bucket, unit % parts, parts);
            if (bucket <= a.buckets)
                atomicAdd(shared + bucket, sum);
        }
    }
    if (threadIdx.x == 0)
        found = {-1, 0};
    __syncthreads();
    for (int first = 0, seen = 0, turn = 0, total; first < a.buckets && seen <= helper;
         first += WARPS * WARP, seen += total, turn ^= 1) {
        int bucket = first + threadIdx.x, left_over = 0;
        if (bucket < a.buckets)
            left_over = max(bases[bucket + 1] - bases[bucket] - 1, 0) / a.slice;
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
    int good = place_experts<WARPS>(a, m, base, high - low < size, low == 0, lowest);
    bool staged = size <= a.slice;
    int *out = staged ? m.staged : a.call.pairs, out_base = staged ? base : 0;
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
        for (int j = 0; j < BUCKET_ROWS; j++)
            if (digit[j] >= 0)
                out[rank[j] - out_base] = lowest + digit[j] == a.call.N ? -1 : pair[j];
    }
    __syncthreads();
    if (staged)
#pragma unroll 4
        for (int i = threadIdx.x; i < size; i += WARPS * WARP)
            a.call.pairs[base + i] = m.staged[i];
    if (bucket == a.buckets - 1 && low == 0)
        note_bad_indices(a.call, good);
}
// [/sort-share]

// [sort-bucket]
// A block a bucket, and T·K / slice helpers if even; 16 or 4 warps. Shared memory: (warps + 2) · 2^low_bits counters,
// 16 bytes a chunk, up to 10 KB for a slice; 20 to 84 KB. Reads starts and 4 bytes a record, writes 4 bytes a pair and
// the offsets.
template <int WARPS> __global__ void __launch_bounds__(WARPS *WARP, 2) sort_bucket(levels a) {
    extern __shared__ int shared[];
    bucket_memory m = lay_out_bucket(a, shared);
    share mine = {(int)blockIdx.x, 0};
    let_next_start();
    wait_for_previous();
    if (mine.bucket >= a.buckets)
        mine = share_of_helper<WARPS>(a, mine.bucket - a.buckets, shared);
    if (mine.bucket < 0)
        return;
    clear_row(1 << a.low_bits, m.counters + (threadIdx.x / WARP << a.low_bits));
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
