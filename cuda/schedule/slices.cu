// Rung `slices`: the CPU's `threads` once more. The pairs are cut into slices, a warp each, with a histogram each.
#include "schedule.cuh"

#define SLICE_WARPS  2 // a block: few, so that the slices spread over the multiprocessors
#define SCAN_THREADS 1024
#define SCAN_EACH    4 // counters a thread
#define SCAN_TILE    (SCAN_THREADS * SCAN_EACH)

typedef struct {
    schedule_task call;
    int slices, length; // a slice is `length` pairs, a multiple of 32
    int64_t counters;   // (N + 1) · slices
    int *counts;        // [N + 1, slices]
    int *tiles;         // [counters / SCAN_TILE]
} slice_task;

// As many slices as keep the counters at 32 bytes a pair, between 1 and 2,048. Returns the bytes after the note.
static size_t lay_out(int64_t num_pairs, int64_t N, char *memory, slice_task *s) {
    int64_t most = 8 * num_pairs / (N + 1);
    most = most < 1 ? 1 : most < 2048 ? most : 2048;
    s->length = (int)(ceil_div(ceil_div(num_pairs, most), WARP) * WARP);
    s->slices = num_pairs ? (int)ceil_div(num_pairs, s->length) : 1;
    s->counters = (N + 1) * s->slices;
    size_t counts = round_256((size_t)s->counters * sizeof(int));
    s->counts = (int *)memory;
    s->tiles = (int *)(memory + counts);
    return counts + (size_t)ceil_div(s->counters, SCAN_TILE) * sizeof(int);
}

__device__ inline int slice_of_warp() {
    return blockIdx.x * SLICE_WARPS + threadIdx.x / WARP;
}

// [count-slices]
// A warp a slice, 2 a block; no shared memory. Reads 4 bytes a pair, adds 1 in the L2.
__global__ void count_slices(slice_task s) {
    int slice = slice_of_warp(), lane = threadIdx.x % WARP;
    if (slice >= s.slices)
        return;
    int64_t begin = (int64_t)slice * s.length;
    int count = (int)min((int64_t)s.length, s.call.num_pairs - begin);
#pragma unroll 4
    for (int i = lane; i < count; i += WARP)
        atomicAdd(s.counts + (int64_t)expert_of(s.call, (int)begin + i) * s.slices + slice, 1);
}
// [/count-slices]

// [scan-tiles]
// A block of 1,024 threads a tile of 4,096 counters. Reads them, writes the tile's sum.
__global__ void sum_tiles(slice_task s) {
    __shared__ __align__(16) int sums[2 * SCAN_THREADS / WARP];
    int64_t begin = (int64_t)blockIdx.x * SCAN_TILE;
    int sum = 0, total;
    for (int i = threadIdx.x; i < SCAN_TILE; i += SCAN_THREADS)
        sum += begin + i < s.counters ? s.counts[begin + i] : 0;
    scan_block<SCAN_THREADS / WARP>(sum, SCAN_THREADS / WARP, 0, sums, &total);
    if (threadIdx.x == 0)
        s.tiles[blockIdx.x] = total;
}

// One block: the sums of the tiles become their beginnings.
__global__ void scan_tiles(slice_task s, int tiles) {
    __shared__ __align__(16) int sums[2 * SCAN_THREADS / WARP];
    for (int first = 0, base = 0, total; first < tiles; first += SCAN_THREADS, base += total) {
        int tile = first + threadIdx.x,
            begin = base + scan_block<SCAN_THREADS / WARP>(tile < tiles ? s.tiles[tile] : 0, SCAN_THREADS / WARP,
                                                           first / SCAN_THREADS % 2, sums, &total);
        if (tile < tiles)
            s.tiles[tile] = begin;
    }
}

// A block a tile. Reads and writes the counters, which become places; the first slice's are the offsets.
__global__ void place_tiles(slice_task s) {
    __shared__ __align__(16) int sums[2 * SCAN_THREADS / WARP];
    int64_t first = (int64_t)blockIdx.x * SCAN_TILE + (int64_t)threadIdx.x * SCAN_EACH;
    int held[SCAN_EACH], sum = 0, total;
    for (int i = 0; i < SCAN_EACH; i++) {
        held[i] = first + i < s.counters ? s.counts[first + i] : 0;
        sum += held[i];
    }
    int place = s.tiles[blockIdx.x] + scan_block<SCAN_THREADS / WARP>(sum, SCAN_THREADS / WARP, 0, sums, &total);
    for (int i = 0; i < SCAN_EACH; i++) {
        if (first + i >= s.counters)
            break;
        s.counts[first + i] = place;
        if ((first + i) % s.slices == 0)
            s.call.offsets[(first + i) / s.slices] = place;
        place += held[i];
    }
}
// [/scan-tiles]

// [place-slices]
// A warp a slice, 2 a block, and a block that notes bad indices; no shared memory. Reads 4 bytes a pair and a counter,
// writes 4 bytes somewhere. A warp takes 32 pairs at a time, in their order, so that places rise with pairs.
__global__ void place_slices(slice_task s) {
    if (blockIdx.x == gridDim.x - 1) {
        note_bad_indices(s.call, s.call.offsets[s.call.N]);
        return;
    }
    int slice = slice_of_warp(), lane = threadIdx.x % WARP;
    if (slice >= s.slices)
        return;
    int64_t begin = (int64_t)slice * s.length, end = min(begin + s.length, (int64_t)s.call.num_pairs);
    for (int64_t row = begin; row < end; row += WARP) {
        int64_t pair = row + lane;
        int expert = pair < end ? expert_of(s.call, (int)pair) : -1;
        unsigned peers = __match_any_sync(ALL_LANES, expert);
        int rank = __popc(peers & ((1u << lane) - 1)), place = 0;
        int *next = s.counts + (int64_t)expert * s.slices + slice;
        if (expert >= 0)
            place = *next;
        __syncwarp();
        if (expert >= 0 && rank == 0)
            *next = place + __popc(peers);
        __syncwarp();
        if (expert >= 0)
            s.call.pairs[place + rank] = expert < s.call.N ? (int32_t)pair : -1;
    }
}
// [/place-slices]

extern "C" size_t cuda_schedule_slices_workspace(const void *args) {
    const fmoe_schedule_args *a = (const fmoe_schedule_args *)args;
    slice_task s;
    return schedule_note_bytes(a->T) + lay_out(a->T * a->K, a->N, NULL, &s);
}

extern "C" fmoe_status cuda_schedule_slices(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    slice_task s;
    TRY(schedule_from_args(args, workspace, workspace_bytes, 0, &s.call));
    size_t needed = lay_out(s.call.num_pairs, s.call.N, s.call.rest, &s);
    TRY(check_workspace(workspace, workspace_bytes, schedule_note_bytes(s.call.T) + needed));
    cudaStream_t stream_ = (cudaStream_t)stream;
    if (s.call.T == 0)
        return schedule_nothing(&s.call, stream_);
    unsigned blocks = (unsigned)ceil_div(s.slices, SLICE_WARPS), tiles = (unsigned)ceil_div(s.counters, SCAN_TILE);
    TRY(cuda_call("cudaMemsetAsync", cudaMemsetAsync(s.counts, 0, (size_t)s.counters * sizeof(int), stream_)));
    count_slices<<<blocks, SLICE_WARPS * WARP, 0, stream_>>>(s);
    TRY(launched("count_slices"));
    sum_tiles<<<tiles, SCAN_THREADS, 0, stream_>>>(s);
    TRY(launched("sum_tiles"));
    scan_tiles<<<1, SCAN_THREADS, 0, stream_>>>(s, (int)tiles);
    TRY(launched("scan_tiles"));
    place_tiles<<<tiles, SCAN_THREADS, 0, stream_>>>(s);
    TRY(launched("place_tiles"));
    place_slices<<<blocks + 1, SLICE_WARPS * WARP, 0, stream_>>>(s);
    return launched("place_slices");
}
