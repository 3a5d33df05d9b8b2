// Two levels: chunks of pairs are sorted by bucket, then buckets by expert. The layout that both kernels share.
//
//     pairs     │   chunk 0   │   chunk 1   │ ..  │   as the router left them
//     records   │ 0: b0 b1 .. │ 1: b0 b1 .. │ ..  │   sort_chunk: each chunk by bucket, in its own place
//     pairs     │ bucket 0 │ bucket 1 │ ...       │   sort_bucket: gathers its segment of every chunk
//
// Nothing is scanned over the grid in between. Where bucket b starts within chunk c, starts[b][c], is how many pairs of
// the chunk belong to smaller buckets; so its sum over the chunks is where bucket b begins in the result.
#ifndef FMOE_SCHEDULE_TWO_LEVELS_CUH
#define FMOE_SCHEDULE_TWO_LEVELS_CUH

#include "schedule.cuh"

#ifndef MAX_WARPS
#define MAX_WARPS     16
#define LANE_PAIRS    8                   // a lane holds so many pairs in registers, ...
#define PER_SM 2
#endif
#define GROUP         (LANE_PAIRS * WARP) // ... a warp so many
#define CHUNK_COUNTERS  8192 // 32 KB of shared memory: fewer warps where there are more buckets, ...
#define BUCKET_COUNTERS 4096 // ... or more experts in a bucket
#define POSITION_BITS 20                  // a record: the expert's digit within the bucket, the position in the chunk
#define MAX_STAGED    4096                // so many records are put in order in shared memory
#define HEAVY_BITS    4                   // a segment of 1/16 of a chunk is heavy: a chunk has at most 16

typedef struct {
    schedule_task call;
    int low_bits, buckets;   // a bucket is 2^low_bits experts; the last one holds expert N
    int chunk_bits, chunks;  // a chunk is 2^chunk_bits pairs
    int chunk_warps;         // of sort_chunk's blocks
    int bucket_warps, slice; // of sort_bucket's blocks, and how many records such a block takes if even
    bool even, planned;      // even: several blocks share a large bucket. planned: bases is there
    uint32_t *records;       // [T·K]
    int32_t *starts;         // [buckets + 1, chunks]
    int32_t *bases;          // [buckets + 1]: where each bucket begins in the result
    int32_t *heavy;          // [chunks, 16, 2^low_bits]: the histograms of heavy segments
} levels;

// Fills in all but call; returns the bytes of workspace after the note.
size_t levels_lay_out(int64_t num_pairs, int64_t N, bool even, char *memory, levels *l);

// Two blocks a multiprocessor at least, so that the next kernel's can start beside this one's.
__global__ void __launch_bounds__(MAX_WARPS *WARP, PER_SM) sort_chunk(levels a);
__global__ void __launch_bounds__(MAX_WARPS *WARP, PER_SM) sort_bucket(levels a);
__global__ void find_bases(levels a);
size_t sort_chunk_shared(const levels *l);
size_t sort_bucket_shared(const levels *l);

// The next kernel's blocks may start: they prepare, then wait until this grid is done (sm_90; only where it was
// launched so).
__device__ inline void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline int records_in_chunk(const levels &a, int chunk) {
    return min(1 << a.chunk_bits, a.call.num_pairs - (chunk << a.chunk_bits));
}

// [scan-counters]
// Turns counters [warps, digits] into places: by digit, and for one digit by warp. before and after, if given, are the
// counts of other blocks' pairs. Writes the first `outs` digits' beginnings. Ends with a barrier.
__device__ inline void scan_counters(int digits, int base, int *counters, const int *before, const int *after,
                                     int32_t *out, int stride, int outs) {
    __shared__ int sums[MAX_WARPS];
    int warps = blockDim.x / WARP, total;
    for (int first = 0; first < digits; first += blockDim.x) {
        int digit = first + threadIdx.x, held[MAX_WARPS], count = 0;
#pragma unroll
        for (int w = 0; w < MAX_WARPS; w++) {
            held[w] = digit < digits && w < warps ? counters[w * digits + digit] : 0;
            count += held[w];
        }
        if (before && digit < digits)
            count += before[digit] + after[digit];
        int place = base + scan_block(count, sums, &total);
        base += total;
        if (out && digit < outs)
            out[(int64_t)digit * stride] = place;
        if (before && digit < digits)
            place += before[digit];
#pragma unroll
        for (int w = 0; w < MAX_WARPS; w++) {
            if (digit < digits && w < warps)
                counters[w * digits + digit] = place;
            place += held[w];
        }
    }
    __syncthreads();
}
// [/scan-counters]

// A group's rows, of 32 pairs each, that there are.
__device__ inline int rows_of(int group, int end) {
    return min(LANE_PAIRS, (end - group + WARP - 1) / WARP);
}

// Who holds the same digit, row by row: none of these instructions waits for another.
__device__ inline void match_group(int rows, const int (&digit)[LANE_PAIRS], unsigned (&peers)[LANE_PAIRS]) {
#pragma unroll
    for (int j = 0; j < LANE_PAIRS; j++)
        if (j < rows) {
#ifdef BALLOT_BITS
            peers[j] = __ballot_sync(ALL_LANES, digit[j] >= 0);
            for (int b = 0; b < BALLOT_BITS; b++) { unsigned m = __ballot_sync(ALL_LANES, digit[j] >> b & 1); peers[j] &= (digit[j] >> b & 1) ? m : ~m; }
#else
            peers[j] = __match_any_sync(ALL_LANES, digit[j]);
#endif
        }
}

#endif
