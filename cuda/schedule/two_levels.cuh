// Two levels: chunks of pairs are sorted by bucket, then buckets by expert. What both kernels share.
//
//     pairs     │   chunk 0   │   chunk 1   │ ..  │   as the router left them
//     records   │ 0: b0 b1 .. │ 1: b0 b1 .. │ ..  │   sort_chunk: each chunk by bucket, in its own place
//     pairs     │ bucket 0 │ bucket 1 │ ...       │   sort_bucket: gathers its segment of every chunk
//
// Nothing is scanned over the grid in between. Where bucket b starts within chunk c, starts[c][b], is how many pairs of
// the chunk belong to smaller buckets; so its sum over the chunks is where bucket b begins in the result.
#ifndef FMOE_SCHEDULE_TWO_LEVELS_CUH
#define FMOE_SCHEDULE_TWO_LEVELS_CUH

#include "schedule.cuh"

#define MANY_WARPS    16 // a block's, if there are few enough digits for that many rows of counters: 32 KB ...
#define FEW_WARPS     4  // ... and if not
#define MANY_BUCKETS  512
#define MANY_EXPERTS  256
#define BUCKET_ROWS   5    // so many rows of 32 records a warp of sort_bucket holds in registers
#define POSITION_BITS 20   // a record: the expert's digit within the bucket, the position within the chunk
#define MAX_STAGED    4096 // so many records of a chunk are put in order in shared memory
#define MAX_CHUNKS    2048
#define SLOT_BITS     4 // a segment is heavy from 1/16 of a chunk on: a chunk has at most 16
#define HEAVY_SLOTS   (1 << SLOT_BITS)

typedef struct {
    schedule_task call;
    int low_bits, buckets;   // a bucket is 2^low_bits experts; the last one holds expert N
    int chunk_bits, chunks;  // a chunk is 2^chunk_bits pairs
    int chunk_warps;         // of sort_chunk's blocks
    int bucket_warps, slice; // of sort_bucket's blocks, and how many records such a block takes if even
    int staged;              // so many records sort_bucket puts in order in shared memory
    int pitch;               // of sizes: buckets, rounded up to 16 bytes
    bool even, planned;      // even: several blocks share a large bucket. planned: bases are there, else sizes
    uint32_t *records;       // [T·K]
    int32_t *starts;         // [chunks, buckets + 1]
    int32_t *bases;          // [buckets + 1]: where each bucket begins in the result
    uint16_t *sizes;         // [chunks, pitch]: of the segments
    uint32_t *heavy;         // [chunks, 16, 2^low_bits]: the histograms of heavy segments
} levels;

// Fills in all but call; returns the bytes of workspace after the note.
size_t levels_lay_out(int64_t num_pairs, int64_t N, bool even, char *memory, levels *l);

typedef void levels_kernel(levels a);
levels_kernel *sort_chunk_for(const levels *l);
levels_kernel *sort_bucket_for(const levels *l);
levels_kernel *find_bases_kernel(void);
size_t sort_chunk_shared(const levels *l);
size_t sort_bucket_shared(const levels *l);

// [early-start]
// The next kernel's blocks may start: they prepare, then wait until this grid is done. From sm_90 on, and only where
// that kernel was launched so.
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
// [/early-start]

// A segment of 2^heavy_bits records is heavy. Two such begin at least so far apart that each has a slot of its own.
__host__ __device__ static inline int heavy_bits(const levels &a) {
    return a.chunk_bits - SLOT_BITS;
}

__device__ inline uint32_t *heavy_histogram(const levels &a, int chunk, int begin) {
    return a.heavy + ((((int64_t)chunk << SLOT_BITS) + (begin >> heavy_bits(a))) << a.low_bits);
}

// [add-if]
// An atomic addition to shared memory by some lanes only; the others' result stays. Written as a predicated
// instruction, of which the compiler of CUDA 13 makes a branch for sm_90a all the same.
__device__ inline void add_if(bool adds, int *counter, int value, int *result) {
    unsigned address = (unsigned)__cvta_generic_to_shared(counter);
    asm volatile("{.reg .pred p;\n"
                 " setp.ne.s32 p, %3, 0;\n"
                 " @p atom.shared.add.s32 %0, [%1], %2;}"
                 : "+r"(*result)
                 : "r"(address), "r"(value), "r"((int)adds)
                 : "memory");
}
// [/add-if]

// [take-ranks]
// ROWS rows of 32 consecutive digits (-1: none) take the next numbers of their digits' counters, in order. The lanes
// with the same digit find one another by a vote on each bit; the first of them moves the counter on for all. A warp's
// accesses to shared memory happen in its program's order, so that no row waits for the counters of the row before.
template <int ROWS>
__device__ inline void take_ranks(const int (&digit)[ROWS], int bits, int *counters, int (&rank)[ROWS]) {
    unsigned peers[ROWS], earlier = (1u << threadIdx.x % WARP) - 1;
#pragma unroll
    for (int j = 0; j < ROWS; j++)
        peers[j] = __ballot_sync(ALL_LANES, digit[j] >= 0);
#pragma unroll 1
    for (int bit = 0; bit < bits; bit++)
#pragma unroll
        for (int j = 0; j < ROWS; j++) {
            bool set = digit[j] >> bit & 1;
            unsigned votes = __ballot_sync(ALL_LANES, set);
            peers[j] &= set ? votes : ~votes;
        }
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        rank[j] = 0;
        add_if(digit[j] >= 0 && (peers[j] & earlier) == 0, counters + digit[j], __popc(peers[j]), &rank[j]);
        __syncwarp();
    }
#pragma unroll
    for (int j = 0; j < ROWS; j++)
        rank[j] = __shfl_sync(ALL_LANES, rank[j], __ffs(peers[j]) - 1) + __popc(peers[j] & earlier);
}
// [/take-ranks]

// [columns]
// counters [WARPS, digits]: what all warps hold of a digit, ...
template <int WARPS> __device__ inline int sum_column(const int *counters, int digits, int digit, int (&held)[WARPS]) {
    int count = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++)
        count += held[w] = counters[w * digits + digit];
    return count;
}

// ... and where each warp's begin, warp after warp.
template <int WARPS>
__device__ inline void place_column(int *counters, int digits, int digit, const int (&held)[WARPS], int place) {
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        counters[w * digits + digit] = place;
        place += held[w];
    }
}
// [/columns]

__device__ inline void clear_row(int digits, int *counters) {
#pragma unroll 4
    for (int digit = threadIdx.x % WARP; digit < digits; digit += WARP)
        counters[digit] = 0;
    __syncwarp();
}

// How many warps of a block have something to do for this many numbers.
template <int WARPS> __device__ inline int warps_for(int numbers) {
    return min((numbers + WARP - 1) / WARP, WARPS);
}

#endif
