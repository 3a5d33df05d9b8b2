// Rung: the product on tensor cores, x̂ split into two 16-bit numbers.
#include "split.cuh"

#define SPLIT_THREADS 256
#define GATE_STAGES   3

template <typename E> struct split_stage {
    E gate[TILE_KEYS * TILE_DEPTH];
    float norm[3][TILE_DEPTH]; // center, scale, offset
};

template <typename E> struct split_tiles {
    split_stage<E> stages[GATE_STAGES];
    E hi[2][TILE_TOKENS * TILE_DEPTH], lo[2][TILE_TOKENS * TILE_DEPTH];
};

// Where a thread takes its share of every chunk from: eight threads a row, 16 bytes each, rows 32 apart. Found once:
// 64-bit products in the loop cost as much as the products that it is for.
#define X_ROWS    (TILE_TOKENS / 32)
#define GATE_ROWS (TILE_KEYS / 32)
template <typename E> struct split_sources {
    const E *x, *gate;            // of the first row, hidden unit 0 of the thread's piece
    int64_t step;                 // elements from row to row
    int x_rows, gate_rows, units; // how many of the rows there are, and of the hidden units from the piece's first on
    const float *norm;            // four values for this thread to bring, or NULL
    int norm_place;
};

template <typename E>
__device__ inline split_sources<E> find_sources(const router_job &job, router_tile at, const E *x, const E *gate) {
    int row = threadIdx.x / 8, column = threadIdx.x % 8 * 8, four = threadIdx.x % 16 * 4;
    int64_t x_left = job.T - at.token - row, gate_left = job.n - at.key - row;
    split_sources<E> from;
    from.x = x + (at.token + row) * job.d + column;
    from.gate = gate + (at.side * job.n + at.key + row) * job.d + column;
    from.step = 32 * job.d;
    from.x_rows = x_left <= 0 ? 0 : x_left >= TILE_TOKENS ? X_ROWS : (int)(x_left + 31) / 32;
    from.gate_rows = gate_left <= 0 ? 0 : gate_left >= TILE_KEYS ? GATE_ROWS : (int)(gate_left + 31) / 32;
    from.units = (int)job.d - column;
    const float *norms[] = {job.norm.center, job.norm.scale, job.norm.offset};
    from.norm = NULL;
    for (int i = 0; i < 3; i++)
        if (threadIdx.x / 16 == i)
            from.norm = norms[i] + four;
    from.norm_place = threadIdx.x / 16 * TILE_DEPTH + four;
    return from;
}

// Whole registers: see load_pack.
template <typename E> __device__ inline void fetch_x(const split_sources<E> &from, int k, uint4 (&in)[X_ROWS]) {
    for (int i = 0; i < X_ROWS; i++) {
        bool inside = i < from.x_rows && k < from.units;
        in[i] = inside ? *(const uint4 *)(from.x + i * from.step + k) : make_uint4(0, 0, 0, 0);
    }
}

// The gate's tile and the norm of its hidden units, asynchronously. Always closes a group, so that groups count turns.
template <typename E>
__device__ inline void copy_stage(const split_sources<E> &from, const E *gate, int d, int k, split_stage<E> *stage) {
    int row = threadIdx.x / 8, piece = threadIdx.x % 8;
    for (int i = 0; i < GATE_ROWS; i++) {
        bool inside = i < from.gate_rows && k < from.units;
        copy_async_16(stage->gate + tile_at(row + 32 * i, piece), inside ? from.gate + i * from.step + k : gate,
                      inside);
    }
    if (from.norm && k < d)
        copy_async_16(&stage->norm[0][0] + from.norm_place, from.norm + k, true);
    copy_async_commit();
}

// [split-once]
// Every element of the tile is normalised and split once, by the thread that brought it, though four warps use it.
template <typename E>
__device__ inline void place_split(const split_stage<E> &stage, const uint4 (&in)[X_ROWS], E *hi, E *lo) {
    int h = threadIdx.x % 8 * 8;
    unsigned high[X_ROWS][4], low[X_ROWS][4];
    for (int j = 0; j < 4; j++) {
        float2 center = *(const float2 *)&stage.norm[0][h + 2 * j], scale = *(const float2 *)&stage.norm[1][h + 2 * j];
        float2 offset = *(const float2 *)&stage.norm[2][h + 2 * j];
        for (int i = 0; i < X_ROWS; i++)
            split<E>(((const unsigned *)&in[i])[j], center, scale, offset, high[i][j], low[i][j]);
    }
    for (int i = 0; i < X_ROWS; i++) {
        int place = tile_at(threadIdx.x / 8 + i * 32, threadIdx.x % 8);
        *(uint4 *)(hi + place) = make_uint4(high[i][0], high[i][1], high[i][2], high[i][3]);
        *(uint4 *)(lo + place) = make_uint4(low[i][0], low[i][1], low[i][2], low[i][3]);
    }
}
// [/split-once]

// [two-products]
// A warp's 32 tokens by 32 keys: six ldmatrix feed sixteen products, hi and lo with the same keys.
template <typename E>
__device__ inline void multiply_split(const E *hi, const E *lo, const E *gate, int row, int key,
                                      float (&sums)[2][4][4]) {
#pragma unroll
    for (int step = 0; step < TILE_DEPTH / 16; step++) {
        unsigned high[2][4], low[2][4], keys[2][4];
        for (int i = 0; i < 2; i++) {
            load_left(high[i], hi, row + 16 * i, step);
            load_left(low[i], lo, row + 16 * i, step);
            load_right(keys[i], gate, key + 16 * i, step);
        }
        // A product takes its sums from the one before with some thirty cycles' delay: eight others come in between.
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 4; j++)
                mma_16x8x16<E>(sums[i][j], low[i], keys[j / 2][j % 2 * 2], keys[j / 2][j % 2 * 2 + 1]);
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 4; j++)
                mma_16x8x16<E>(sums[i][j], high[i], keys[j / 2][j % 2 * 2], keys[j / 2][j % 2 * 2 + 1]);
    }
}
// [/two-products]

__device__ inline void sums_to_tile(const float (&sums)[2][4][4], int row, int key, float *tile) {
    int lane = threadIdx.x % WARP;
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
            for (int half = 0; half < 2; half++) {
                float *to = tile + (row + 16 * i + 8 * half + lane / 4) * TILE_PITCH + key + 8 * j + lane % 4 * 2;
                *(float2 *)to = make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
            }
}

// [turn]
// One chunk's products, while the next chunk is split and the one after it is on its way. Of the two warps that share a
// scheduler one splits first and the other multiplies first, so that the tensor cores and the other units work at once.
// `next` holds the next chunk's x and `after` is free: the caller changes them over, because a copy from one to the
// other would wait for the load.
template <typename E>
__device__ inline void take_turn(const split_sources<E> &from, const E *gate, int d, int turn, split_tiles<E> &tiles,
                                 uint4 (&next)[X_ROWS], uint4 (&after)[X_ROWS], float (&sums)[2][4][4]) {
    int k = turn * TILE_DEPTH, warp = threadIdx.x / WARP, now = turn % 2;
    bool more = k + TILE_DEPTH < d, splits_first = warp < SPLIT_THREADS / WARP / 2;
    const split_stage<E> &following = tiles.stages[(turn + 1) % GATE_STAGES];
    copy_async_wait<0>();
    __syncthreads();
    copy_stage(from, gate, d, k + 2 * TILE_DEPTH, &tiles.stages[(turn + 2) % GATE_STAGES]);
    fetch_x(from, k + 2 * TILE_DEPTH, after);
    if (more && splits_first)
        place_split(following, next, tiles.hi[1 - now], tiles.lo[1 - now]);
    multiply_split(tiles.hi[now], tiles.lo[now], tiles.stages[turn % GATE_STAGES].gate, warp / 4 * 32, warp % 4 * 32,
                   sums);
    if (more && !splits_first)
        place_split(following, next, tiles.hi[1 - now], tiles.lo[1 - now]);
}
// [/turn]

// Launch: a block of 256 threads for 64 tokens by 128 keys of one side; its warps are 2 by 4 tiles of 32 × 32. Shared
// memory: 82 KB, three tiles of the gate and two each of hi and lo. Traffic: as the tiles rung's, in 16-bit elements; x
// goes through registers, the gate asynchronously to shared memory.
template <typename E>
__global__ void __launch_bounds__(SPLIT_THREADS) split_kernel(router_job job, const E *x, const E *gate) {
#if HAS_MMA_SYNC
    extern __shared__ __align__(1024) char shared[];
    split_tiles<E> &tiles = *(split_tiles<E> *)shared;
    router_tile at = router_tile_of(job);
    int warp = threadIdx.x / WARP, d = (int)job.d, turns = (d + TILE_DEPTH - 1) / TILE_DEPTH;
    float sums[2][4][4] = {};
    uint4 a[X_ROWS], b[X_ROWS];

    split_sources<E> from = find_sources(job, at, x, gate);
    copy_stage(from, gate, d, 0, &tiles.stages[0]);
    copy_stage(from, gate, d, TILE_DEPTH, &tiles.stages[1]);
    fetch_x(from, 0, a);
    fetch_x(from, TILE_DEPTH, b);
    copy_async_wait<1>();
    __syncthreads();
    place_split(tiles.stages[0], a, tiles.hi[0], tiles.lo[0]);
    for (int turn = 0; turn < turns; turn += 2) {
        take_turn(from, gate, d, turn, tiles, b, a, sums);
        if (turn + 1 < turns)
            take_turn(from, gate, d, turn + 1, tiles, a, b, sums);
    }
    copy_async_wait<0>();
    __syncthreads();
    float *tile = (float *)shared;
    sums_to_tile(sums, warp / 4 * 32, warp % 4 * 32, tile);
    __syncthreads();
    finish_tile<E, true>(job, at, tile, warp, SPLIT_THREADS / WARP, x, gate);
#endif
}

template <typename E> static fmoe_status run(router_job job, const fmoe_router_args *args, cudaStream_t stream) {
    int shared = (int)sizeof(split_tiles<E>);
    TRY(cuda_call("split_kernel",
                  cudaFuncSetAttribute(split_kernel<E>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)));
    split_kernel<E>
        <<<router_tiles(job), SPLIT_THREADS, shared, stream>>>(job, (const E *)args->x, (const E *)args->gate);
    return launched("split_kernel");
}

extern "C" fmoe_status cuda_router_split(const void *arguments, void *workspace, size_t bytes, void *stream) {
    const fmoe_router_args *args = (const fmoe_router_args *)arguments;
    size_t used = 0;
    router_scratch s = router_carve(args, false, workspace, &used);
    TRY(router_check(args, workspace, bytes, used));
    TRY(router_check_16_bit(args));
    if (args->T == 0)
        return FMOE_OK;
    router_job job = router_job_of(args, s);
    TRY(router_set_norm(args, s, false, (cudaStream_t)stream));
    if (args->dtype == FMOE_F16)
        TRY(run<__half>(job, args, (cudaStream_t)stream));
    else
        TRY(run<__nv_bfloat16>(job, args, (cudaStream_t)stream));
    return job.key_tiles > 1 ? router_log_softmax(args, (cudaStream_t)stream) : FMOE_OK;
}
