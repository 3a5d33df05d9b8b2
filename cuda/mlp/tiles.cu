// Rung: both products in tiles of shared memory and registers, in float32 for every storage type and every size.
#include "mlp.cuh"

#define TILE_THREADS 256
#define TILE         128 // tokens, and rows of weights: of down, or 64 of gate and 64 of up
#define DEPTH        16  // of k in a tile

typedef struct {
    float x[DEPTH][TILE], weights[DEPTH][TILE];
} tile_pair;

// One of the two products.
typedef struct {
    int64_t T, rows, columns; // tokens; outputs; k
    const void *x, *a, *b;    // [T, columns]; weights [rows, columns]: gate and up, or down
    mlp_target out;           // [T, rows]
    bool wide_in, wide_out;   // rows of x and weights are multiples of 16 bytes; those of out, of four elements
} tiles_job;

// [transpose]
// A tile stands with k downwards, while its rows in memory run along k: the 32 elements that a warp stores at once are
// of 8 rows and 4 k, or of 16 and 2, and would meet in few banks. So groups of eight rows change places from one group
// of four k to the next.
__device__ inline int place_of(int k, int row) {
    return row ^ k / 4 * 8;
}
// [/transpose]

// What a thread has in its registers between global and shared memory: 16 bytes of a row at a time.
template <typename E> struct in_flight {
    static constexpr int wide = pack16<E>::count, row_packs = DEPTH / wide, packs = TILE * row_packs / TILE_THREADS;
    uint4 x[packs], weights[packs];
};

template <typename E> __device__ inline uint4 load_pack(const tiles_job &job, const E *row, int64_t k) {
    if (job.wide_in)
        return row && k < job.columns ? *(const uint4 *)(row + k) : make_uint4(0, 0, 0, 0);
    pack16<E> pack;
    for (int i = 0; i < pack.count; i++)
        pack.at[i] = row && k + i < job.columns ? row[k + i] : from_f32<E>(0);
    return *(uint4 *)&pack;
}

// With PAIR the first half of the tile's rows are gate's, the other half up's of the same hidden units.
template <typename E, bool PAIR> __device__ inline const E *weight_row(const tiles_job &job, int64_t first, int row) {
    int64_t at = first + (PAIR ? row % (TILE / 2) : row);
    const void *weights = PAIR && row >= TILE / 2 ? job.b : job.a;
    return at < job.rows ? (const E *)weights + at * job.columns : NULL;
}

template <typename E, bool PAIR>
__device__ inline void fetch(const tiles_job &job, int64_t token, int64_t first, int64_t k, in_flight<E> &in) {
    k += threadIdx.x % in.row_packs * in.wide;
    for (int i = 0; i < in.packs; i++) {
        int row = threadIdx.x / in.row_packs + i * (TILE / in.packs);
        const E *x = token + row < job.T ? (const E *)job.x + (token + row) * job.columns : NULL;
        in.x[i] = load_pack<E>(job, x, k);
        in.weights[i] = load_pack<E>(job, weight_row<E, PAIR>(job, first, row), k);
    }
}

template <typename E> __device__ inline void place(const in_flight<E> &in, tile_pair *tiles) {
    int first = threadIdx.x % in.row_packs * in.wide;
    for (int i = 0; i < in.packs; i++) {
        int row = threadIdx.x / in.row_packs + i * (TILE / in.packs);
        float x[in.wide], weights[in.wide];
        unpack_f32<E>(in.x[i], x);
        unpack_f32<E>(in.weights[i], weights);
        for (int c = 0; c < in.wide; c++) {
            tiles->x[first + c][place_of(first + c, row)] = x[c];
            tiles->weights[first + c][place_of(first + c, row)] = weights[c];
        }
    }
}

// A thread's 8 tokens by 8 rows of weights: two groups of four each, half a tile apart, so that with PAIR it has gate
// and up of the same hidden units. A warp has 4 groups of tokens by 8 of rows.
__device__ inline int first_token(void) {
    return (threadIdx.x / 64 * 4 + threadIdx.x % 32 / 8) * 4;
}
__device__ inline int first_output(void) {
    return (threadIdx.x / 32 % 2 * 8 + threadIdx.x % 8) * 4;
}

__device__ inline void load_eight(const float (&row)[TILE], int k, int first, float (&eight)[8]) {
    *(float4 *)eight = *(const float4 *)&row[place_of(k, first)];
    *(float4 *)(eight + 4) = *(const float4 *)&row[place_of(k, first) + TILE / 2];
}

// [register-tile]
// Four 16-byte loads feed 64 multiply-adds.
__device__ inline void multiply(const tile_pair *tiles, float (&sums)[8][8]) {
#pragma unroll
    for (int k = 0; k < DEPTH; k++) {
        float x[8], weights[8];
        load_eight(tiles->x[k], k, first_token(), x);
        load_eight(tiles->weights[k], k, first_output(), weights);
        for (int i = 0; i < 8; i++)
            for (int j = 0; j < 8; j++)
                sums[i][j] = fmaf(x[i], weights[j], sums[i][j]);
    }
}
// [/register-tile]

// Four outputs in a row of one token.
template <typename E>
__device__ inline void store_outputs(const tiles_job &job, int64_t token, int64_t output, const float (&sums)[4]) {
    int64_t place = token * job.rows + output;
    if (token < job.T && job.wide_out && output < job.rows)
        store_results<E>(job.out, place, sums);
    if (token < job.T && !job.wide_out)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (output + i < job.rows)
                store_result<E>(job.out, place + i, sums[i]);
}

// Launch: a block of 256 threads for 128 tokens by 128 outputs, or 64 hidden units; two blocks a multiprocessor. Shared
// memory: 32 KB, two pairs of tiles; while one is multiplied the next is loaded into registers. Traffic: x once for
// every 128 (64) outputs and the weights once for every 128 tokens, mostly from the L2; the outputs once.
template <typename E, bool PAIR> __global__ void __launch_bounds__(TILE_THREADS, 2) tiles_kernel(tiles_job job) {
    __shared__ alignas(16) tile_pair pairs[2];
    int64_t output_tiles = (job.rows + TILE / (PAIR ? 2 : 1) - 1) / (TILE / (PAIR ? 2 : 1));
    int64_t token = blockIdx.x / output_tiles * TILE, first = blockIdx.x % output_tiles * (TILE / (PAIR ? 2 : 1));
    float sums[8][8] = {};
    in_flight<E> in;
    fetch<E, PAIR>(job, token, first, 0, in);
    for (int64_t k = 0, turn = 0; k < job.columns; k += DEPTH, turn ^= 1) {
        place<E>(in, &pairs[turn]);
        __syncthreads();
        if (k + DEPTH < job.columns)
            fetch<E, PAIR>(job, token, first, k + DEPTH, in);
        multiply(&pairs[turn], sums);
    }
    // [swiglu-in-registers]
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int64_t t = token + first_token() + i % 4 + i / 4 * (TILE / 2);
        float outputs[2][4];
        for (int c = 0; c < 4; c++) {
            outputs[0][c] = PAIR ? swiglu(sums[i][c], sums[i][4 + c]) : sums[i][c];
            outputs[1][c] = sums[i][4 + c];
        }
#pragma unroll
        for (int half = 0; half < (PAIR ? 1 : 2); half++)
            store_outputs<E>(job, t, first + first_output() + half * (TILE / 2), outputs[half]);
    }
    // [/swiglu-in-registers]
}

template <typename E, bool PAIR> static fmoe_status launch(tiles_job job, cudaStream_t stream) {
    job.wide_in = job.columns % pack16<E>::count == 0;
    job.wide_out = job.rows % 4 == 0;
    int64_t blocks = ceil_div(job.T, TILE) * ceil_div(job.rows, PAIR ? TILE / 2 : TILE);
    tiles_kernel<E, PAIR><<<(unsigned)blocks, TILE_THREADS, 0, stream>>>(job);
    return launched("tiles_kernel");
}

template <typename E>
static fmoe_status run(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, cudaStream_t stream) {
    tiles_job hidden = {args->T, args->I, args->d, args->x, args->gate, args->up, {workspace, NULL, NULL},
                        false,   false};
    tiles_job output = {args->T, args->d, args->I, workspace, args->down, NULL, mlp_target_of(args, join),
                        false,   false};
    bool overlap;
    TRY((launch<E, true>(hidden, stream)));
    TRY(mlp_wait(join, stream, &overlap));
    return launch<E, false>(output, stream);
}

fmoe_status mlp_tiles_into(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, size_t bytes,
                           cudaStream_t stream) {
    TRY(mlp_check(args, workspace, bytes, cuda_mlp_hidden_bytes(args)));
    if (args->T == 0)
        return FMOE_OK;
    WITH_DTYPE(args->dtype, E, TRY(run<E>(args, join, workspace, stream)));
    return FMOE_OK;
}

extern "C" fmoe_status cuda_mlp_tiles(const void *args, void *workspace, size_t bytes, void *stream) {
    return mlp_tiles_into((const fmoe_mlp_args *)args, NULL, workspace, bytes, (cudaStream_t)stream);
}
