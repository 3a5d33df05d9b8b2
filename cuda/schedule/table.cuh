// Rung `table`: its geometry, its records, and how its kernels call it.
#ifndef FMOE_SCHEDULE_TABLE_CUH
#define FMOE_SCHEDULE_TABLE_CUH

#include "two_levels_bucket.cuh"

#define TABLE_WARPS   16
#define TURNS         32  // so many rows of 32 a warp has under way when it adds to the counters
#define BUCKET        128 // neighbouring experts; expert N is in the last one
#define MOST_CHUNKS   128
#define CHUNKS_A_WARP (MOST_CHUNKS / TABLE_WARPS)
#define PLACES_PITCH  (BUCKET + 4) // so that a column lies in different banks
#define EIGHT         8
#define BOTH          0x10001u
#define SLICE_ROWS    5
#define SLICE         (SLICE_ROWS * TABLE_WARPS * WARP) // places of the result a block fills
#define DIGIT_SHIFT   24                                // a record: the expert within its bucket, ...
#define RANK_SHIFT    12 // ... how many of the chunk's earlier pairs have it, the pair within the chunk

typedef struct {
    schedule_task call;
    int buckets, pitch; // pitch: experts in all buckets and, if their number is odd, in one more
    int chunk, chunks;  // a chunk is 2,048 pairs, or 4,096
    uint32_t *records;  // [T·K]
    uint16_t *starts;   // [buckets + 1, MOST_CHUNKS]: how many pairs of a chunk belong to smaller buckets
    int32_t *bases;     // [buckets + 1]: their sums
    uint16_t *counts;   // [chunks, pitch]
} table;

__device__ inline uint32_t make_record(int digit, int rank, int pair) {
    return (uint32_t)(digit << DIGIT_SHIFT | rank << RANK_SHIFT | pair);
}

__device__ inline int digit_of(uint32_t record) {
    return (int)(record >> DIGIT_SHIFT);
}

__device__ inline int rank_of(uint32_t record) {
    return (int)(record >> RANK_SHIFT & ((1 << (DIGIT_SHIFT - RANK_SHIFT)) - 1));
}

__device__ inline int pair_of(uint32_t record) {
    return (int)(record & ((1 << RANK_SHIFT) - 1));
}

// Where an expert's counter lies. Routers choose rows and columns of a grid, experts at equal distances: what lies
// 128 apart is moved to other banks. Groups of eight stay together.
__device__ inline int slot_of(int expert) {
    return expert ^ expert / BUCKET % 8 * 8;
}

__device__ inline int eight_of(int bucket, int lane) {
    return bucket * (BUCKET / 8) + (lane ^ bucket % 8);
}

__device__ inline unsigned sum_lanes(unsigned value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_add_sync(ALL_LANES, value);
#else
    for (int step = WARP / 2; step; step /= 2)
        value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
#endif
}

#endif
