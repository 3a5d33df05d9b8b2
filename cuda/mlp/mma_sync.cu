// Rung: tensor cores, a warp at a time: 64 × 64 sums a warp, tiles of 16-bit elements brought by asynchronous copies.
#include "../tile.cuh"
#include "mlp.cuh"

#define MMA_THREADS 128 // 2 × 2 warps
#define MMA_TILE    128 // tokens, and rows of weights: of down, or 64 of gate and 64 of up
#define MMA_STAGES  3

typedef struct {
    int64_t T, rows, columns; // tokens; outputs; k
    const void *x, *a, *b;    // [T, columns]; weights [rows, columns]: gate and up, or down
    mlp_target out;           // [T, rows]
} mma_job;

template <typename E> struct mma_stage { E x[MMA_TILE * TILE_DEPTH], weights[MMA_TILE * TILE_DEPTH]; };

// Where a thread copies from in every turn: eight threads a row of 128 bytes, rows 16 apart. Found once: 64-bit
// products in the loop would cost as much as the copies.
#define COPY_ROWS (MMA_THREADS / 8)
#define COPIES    (MMA_TILE / COPY_ROWS)
template <typename E> struct mma_sources {
    const E *x, *a, *b; // of the first row, at the thread's piece; a and b for half of the copies each
    int64_t step;       // elements from row to row
    int x_copies, a_copies, b_copies, columns; // rows that there are; elements from the thread's piece on
};

__device__ inline int copies_of(int64_t left, int most) {
    int64_t rows = (left - threadIdx.x / 8 + COPY_ROWS - 1) / COPY_ROWS;
    return (int)(left <= (int)threadIdx.x / 8 ? 0 : rows < most ? rows : most);
}

template <typename E, bool PAIR>
__device__ inline mma_sources<E> find_sources(const mma_job &job, int64_t token, int64_t first) {
    int64_t row = threadIdx.x / 8, column = threadIdx.x % 8 * 8, half = PAIR ? 0 : MMA_TILE / 2;
    mma_sources<E> from;
    from.x = (const E *)job.x + (token + row) * job.columns + column;
    from.a = (const E *)job.a + (first + row) * job.columns + column;
    from.b = (const E *)(PAIR ? job.b : job.a) + (first + half + row) * job.columns + column;
    from.step = COPY_ROWS * job.columns;
    from.x_copies = copies_of(job.T - token, COPIES);
    from.a_copies = copies_of(job.rows - first, COPIES / 2);
    from.b_copies = copies_of(job.rows - first - half, COPIES / 2);
    from.columns = (int)(job.columns - column);
    return from;
}

// Always closes a group, so that groups count turns. Outside are zeros; the address must be valid all the same.
template <typename E>
__device__ inline void copy_stage(const mma_job &job, const mma_sources<E> &from, int k, mma_stage<E> *to) {
    int row = threadIdx.x / 8, piece = threadIdx.x % 8;
    bool inside = k < from.columns;
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        bool has = inside && i < from.x_copies;
        copy_async_16(to->x + tile_at(row + i * COPY_ROWS, piece), has ? from.x + i * from.step + k : job.x, has);
    }
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        int own = i % (COPIES / 2);
        bool has = inside && own < (i == own ? from.a_copies : from.b_copies);
        copy_async_16(to->weights + tile_at(row + i * COPY_ROWS, piece),
                      has ? (i == own ? from.a : from.b) + own * from.step + k : job.a, has);
    }
    copy_async_commit();
}

// Eight columns of the tile that a warp's sums j are: with PAIR the first four are gate's, the others up's of the same
// hidden units.
template <bool PAIR> __device__ inline int column_of(int warp, int j) {
    return PAIR ? j / 4 * (MMA_TILE / 2) + warp % 2 * 32 + j % 4 * 8 : warp % 2 * 64 + j * 8;
}

// [warp-tile]
// Eight ldmatrix feed 32 products: 4 KB of shared memory for 64 × 64 × 16 multiply-adds, half of what a warp's tile of
// 32 × 64 would need.
template <typename E, bool PAIR>
__device__ inline void multiply(const mma_stage<E> &tiles, int warp, float (&sums)[4][8][4]) {
#pragma unroll
    for (int step = 0; step < TILE_DEPTH / 16; step++) {
        unsigned x[4][4], weights[4][4];
        for (int i = 0; i < 4; i++) {
            load_left(x[i], tiles.x, warp / 2 * 64 + 16 * i, step);
            load_right(weights[i], tiles.weights, column_of<PAIR>(warp, 2 * i), step);
        }
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 8; j++)
                mma_16x8x16<E>(sums[i][j], x[i], weights[j / 2][j % 2 * 2], weights[j / 2][j % 2 * 2 + 1]);
    }
}
// [/warp-tile]

template <typename E, bool PAIR>
__device__ inline void store_sums(const mma_job &job, int warp, int64_t token, int64_t first,
                                  const float (&sums)[4][8][4]) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int64_t t = token + warp / 2 * 64 + 16 * i + 8 * half + lane / 4;
#pragma unroll
            for (int j = 0; j < (PAIR ? 4 : 8); j++) {
                int64_t output = first + column_of<PAIR>(warp, j) + lane % 4 * 2;
                float p = sums[i][j][2 * half], q = sums[i][j][2 * half + 1];
                if (PAIR)
                    p = swiglu(p, sums[i][j + 4][2 * half]), q = swiglu(q, sums[i][j + 4][2 * half + 1]);
                float two[2] = {p, q}; // rows are multiples of 8 elements: either both are outputs or none
                if (t < job.T && output < job.rows)
                    store_results<E>(job.out, t * job.rows + output, two);
            }
        }
}

// Launch: a block of 128 threads for 128 tokens by 128 outputs, or 64 hidden units; two blocks a multiprocessor where
// there is room. Shared memory: 96 KB, three pairs of tiles of 128 × 64. Traffic: x once for every 128 (64) outputs and
// the weights once for every 128 tokens, mostly from the L2; the outputs once.
template <typename E, bool PAIR> __global__ void __launch_bounds__(MMA_THREADS, 2) mma_kernel(mma_job job) {
#if HAS_MMA_SYNC
    extern __shared__ __align__(1024) char shared[];
    mma_stage<E> *stages = (mma_stage<E> *)shared;
    // [raster]
    // Blocks that run at the same time have 8 tiles of tokens by some 33 tiles of outputs: a near square of them, so
    // that what they read is little and mostly in the L2.
    int64_t width = PAIR ? MMA_TILE / 2 : MMA_TILE, output_tiles = (job.rows + width - 1) / width;
    int64_t token_tiles = (job.T + MMA_TILE - 1) / MMA_TILE, band = blockIdx.x / (8 * output_tiles);
    int64_t tall = min((int64_t)8, token_tiles - 8 * band), in_band = blockIdx.x - 8 * band * output_tiles;
    int64_t token = (8 * band + in_band % tall) * MMA_TILE, first = in_band / tall * width;
    // [/raster]
    int warp = threadIdx.x / WARP, turns = (int)((job.columns + TILE_DEPTH - 1) / TILE_DEPTH);
    mma_sources<E> from = find_sources<E, PAIR>(job, token, first);
    float sums[4][8][4] = {};
    for (int i = 0; i < MMA_STAGES - 1; i++)
        copy_stage(job, from, i * TILE_DEPTH, &stages[i]);
    // [turns]
    for (int turn = 0; turn < turns; turn++) {
        copy_async_wait<MMA_STAGES - 2>(); // this turn's tiles have come, for this thread's part ...
        __syncthreads();                   // ... and for all; and nobody reads the stage that is filled next
        int ahead = turn + MMA_STAGES - 1;
        copy_stage(job, from, ahead * TILE_DEPTH, &stages[ahead % MMA_STAGES]);
        multiply<E, PAIR>(stages[turn % MMA_STAGES], warp, sums);
    }
    // [/turns]
    copy_async_wait<0>();
    store_sums<E, PAIR>(job, warp, token, first, sums);
#endif
}

template <typename E, bool PAIR> static fmoe_status launch(const mma_job &job, cudaStream_t stream) {
    int shared = MMA_STAGES * (int)sizeof(mma_stage<E>);
    int64_t blocks = ceil_div(job.T, MMA_TILE) * ceil_div(job.rows, PAIR ? MMA_TILE / 2 : MMA_TILE);
    TRY(cuda_call("mma_kernel",
                  cudaFuncSetAttribute(mma_kernel<E, PAIR>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)));
    mma_kernel<E, PAIR><<<(unsigned)blocks, MMA_THREADS, shared, stream>>>(job);
    return launched("mma_kernel");
}

template <typename E>
static fmoe_status run(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, cudaStream_t stream) {
    mma_job hidden = {args->T, args->I, args->d, args->x, args->gate, args->up, {workspace, NULL, NULL}};
    mma_job output = {args->T, args->d, args->I, workspace, args->down, NULL, mlp_target_of(args, join)};
    bool overlap;
    TRY((launch<E, true>(hidden, stream)));
    TRY(mlp_wait(join, stream, &overlap));
    return launch<E, false>(output, stream);
}

fmoe_status mlp_mma_sync_into(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, size_t bytes,
                              cudaStream_t stream) {
    TRY(mlp_check(args, workspace, bytes, cuda_mlp_hidden_bytes(args)));
    TRY(mlp_check_16_bit(args));
    if (args->T == 0)
        return FMOE_OK;
    return (args->dtype == FMOE_F16 ? run<__half> : run<__nv_bfloat16>)(args, join, workspace, stream);
}

extern "C" fmoe_status cuda_mlp_mma_sync(const void *args, void *workspace, size_t bytes, void *stream) {
    return mlp_mma_sync_into((const fmoe_mlp_args *)args, NULL, workspace, bytes, (cudaStream_t)stream);
}
