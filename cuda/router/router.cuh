// What the router's rungs share: the norm as the kernels use it, the workspace, and how a tile of logits is stored.
#ifndef FMOE_ROUTER_CUH
#define FMOE_ROUTER_CUH

#include "../device.cuh"
#include "router.h"

#include <math.h>

// [norm]
// x̂ = (x − center) · scale + offset. center is the mean rounded to float32; the first subtraction is exact where the
// mean is large; offset is what the rounding of the mean lost, already scaled. Arrays of `padded` hidden units, the
// ones beyond d all zero, so that x = 0 there becomes x̂ = 0.
#define NORM_PAD 64
typedef struct {
    float *center, *scale, *offset;
} router_norm;

__device__ inline void set_norm(router_norm norm, int64_t h, double mean, double var) {
    double scale = 1 / sqrt(var + FMOE_NORM_EPS);
    float center = (float)mean;
    norm.center[h] = center;
    norm.scale[h] = (float)scale;
    norm.offset[h] = (float)((center - mean) * scale);
}

__device__ inline float normalised(float x, float center, float scale, float offset) {
    return fmaf(x - center, scale, offset);
}

// The scale from a running variance, to some 1e-7: a kernel that makes it on the way has no time for doubles.
__device__ inline float running_scale(float var) {
    return rsqrtf(var + (float)FMOE_NORM_EPS);
}
// [/norm]

// ---- Workspace ----

#define STATISTICS_TOKENS 64 // whose sums are taken together

typedef struct {
    int64_t padded; // hidden units, a multiple of NORM_PAD
    router_norm norm;
    int64_t blocks;                 // of tokens; 0 in evaluation
    float *shifts, *sums, *squares; // [blocks, d]: one token's x, sums of x − shift and of its square
    float *x_hat;                   // [T, d]
} router_scratch;

router_scratch router_carve(const fmoe_router_args *args, bool stores_x_hat, void *workspace, size_t *used);

// Everything the host can see; every rung starts so.
fmoe_status router_check(const fmoe_router_args *args, const void *workspace, size_t bytes, size_t needed);
fmoe_status router_check_16_bit(const fmoe_router_args *args); // of the rungs that need it

// ---- Parts, each a kernel or two on the stream ----

// scratch.norm, from this batch (the running buffers move) or from the running buffers. overlap: a kernel starts while
// the one before ends (sm_90 on). statistics.cu
fmoe_status router_set_norm(const fmoe_router_args *args, router_scratch scratch, bool overlap, cudaStream_t stream);
// scratch.x_hat. one_pass.cu
fmoe_status router_normalise(const fmoe_router_args *args, router_scratch scratch, cudaStream_t stream);
// logits = x̂ · gateᵀ, a thread a logit. columns.cu
fmoe_status router_project(const fmoe_router_args *args, const float *x_hat, cudaStream_t stream);
// A warp a row. softmax.cu
fmoe_status router_log_softmax(const fmoe_router_args *args, cudaStream_t stream);

// ---- 16 bytes of a row of x or gate ----

// [load-pack]
// WIDE: rows are multiples of 16 bytes, so a pack lies in its row or outside. Otherwise the elements come one by one.
// Outside are zeros. A uint4 and not a pack16<E>: 16-bit elements that may or may not have been loaded are taken apart
// at once, which waits for the load; whole registers are left alone until unpack.
template <typename E, bool WIDE> __device__ inline uint4 load_pack(const E *row, int64_t column, int64_t columns) {
    if constexpr (WIDE) {
        return column < columns ? *(const uint4 *)(row + column) : make_uint4(0, 0, 0, 0);
    } else {
        pack16<E> pack;
        for (int i = 0; i < pack.count; i++)
            pack.at[i] = column + i < columns ? row[column + i] : from_f32<E>(0);
        return *(uint4 *)&pack;
    }
}
// [/load-pack]

template <typename E> __device__ inline pack16<E> unpack(uint4 raw) {
    return *(pack16<E> *)&raw;
}

template <typename E> static inline bool rows_are_wide(int64_t d) {
    return d % (int64_t)pack16<E>::count == 0;
}

// ---- Tiles of logits ----

#define TILE_TOKENS 64
#define TILE_KEYS   128
#define TILE_PITCH                                                                                                     \
    (TILE_KEYS + 8) // floats from row to row of a tile in shared memory: 8-byte stores of 4 rows meet no bank twice

// What the kernels with tiles are given. With whole_rows a tile holds all keys of a side, and its softmax is done at
// once; log_probs is NULL where nothing is to be done.
typedef struct {
    int64_t T, d, n;
    unsigned key_tiles; // a side
    float *logits, *log_probs;
    router_norm norm;
    const float *mean, *var; // the running buffers, where the kernel makes the norm of them itself; or NULL
} router_job;

static inline router_job router_job_of(const fmoe_router_args *args, router_scratch scratch) {
    router_job job = {args->T,      args->d, args->n, (unsigned)ceil_div(args->n, TILE_KEYS), args->logits, NULL,
                      scratch.norm, NULL,    NULL};
    if (job.key_tiles == 1)
        job.log_probs = args->log_probs;
    return job;
}

static inline unsigned router_tiles(router_job job) {
    return (unsigned)(ceil_div(job.T, TILE_TOKENS) * 2 * job.key_tiles);
}

// A block's tile. Blocks of the same tokens are neighbours, so x comes from memory once.
typedef struct {
    int64_t token, key, side; // the first token, the first key of its side
} router_tile;

__device__ inline router_tile router_tile_of(const router_job &job) {
    unsigned side_tiles = job.key_tiles,
             tile = blockIdx.x % (2 * side_tiles); // 64-bit divisions take hundreds of cycles
    router_tile at = {(int64_t)(blockIdx.x / (2 * side_tiles)) * TILE_TOKENS, tile % side_tiles * TILE_KEYS,
                      tile / side_tiles};
    return at;
}

__device__ inline float normalised_at(const router_job &job, int64_t h, float x) {
    return job.mean ? normalised(x, job.mean[h], running_scale(job.var[h]), 0)
                    : normalised(x, job.norm.center[h], job.norm.scale[h], job.norm.offset[h]);
}

// [plain-row]
// Splitting x̂ loses infinity (∞ − ∞ is NaN), and a float16 has no room for an x̂ beyond 65,504, which a running variance
// near zero can give. Either way NaN is in the product, so a row with a NaN is computed again by a warp, without
// splitting.
template <typename E>
__device__ __noinline__ void plain_row(router_job job, router_tile at, int row, const E *x, const E *gate,
                                       float *tile) {
#pragma unroll 1
    for (int key = 0; key < TILE_KEYS && at.key + key < job.n; key++) {
        const E *x_row = x + (at.token + row) * job.d, *gate_row = gate + (at.side * job.n + at.key + key) * job.d;
        float sum = 0;
#pragma unroll 1
        for (int64_t h = threadIdx.x % WARP; h < job.d; h += WARP)
            sum = fmaf(normalised_at(job, h, to_f32(x_row[h])), to_f32(gate_row[h]), sum);
        tile[row * TILE_PITCH + key] = warp_sum(sum); // the same in every lane
    }
    __syncwarp();
}
// [/plain-row]

// Eight lanes have a row: lane l of them keys 4l to 4l + 3 and those 32, 64 and 96 further, so that the loads and
// stores of eight lanes are 128 bytes in a row.
#define ROW_LANES 8
#define LANE_KEYS (TILE_KEYS / ROW_LANES)

__device__ inline int key_of(int i) {
    return threadIdx.x % ROW_LANES * 4 + i / 4 * 32 + i % 4;
}

__device__ inline void read_row(const float *row, float (&z)[LANE_KEYS]) {
    for (int i = 0; i < LANE_KEYS; i += 4) {
        pack16<float> four = *(const pack16<float> *)(row + key_of(i));
        for (int j = 0; j < 4; j++)
            z[i + j] = four.at[j];
    }
}

// FULL: 128 keys, in rows that start at multiples of 16 bytes.
template <bool FULL> __device__ inline void store_row(float *row, int keys, const float (&z)[LANE_KEYS]) {
    if constexpr (FULL)
        for (int i = 0; i < LANE_KEYS; i += 4)
            *(float4 *)(row + key_of(i)) = make_float4(z[i], z[i + 1], z[i + 2], z[i + 3]);
    else
        for (int i = 0; i < LANE_KEYS; i++)
            if (key_of(i) < keys)
                row[key_of(i)] = z[i];
}

// [softmax-row]
// All lanes of a warp take part, four rows at once: three exchanges find four largest logits, three more four sums.
// exp(−a) by __expf is off by some a · 6e-8 of itself, and a · exp(−a) is never more than 0.37: in a sum that holds an
// exp(0) the fast exponential is as good as any.
template <bool FULL>
__device__ inline void best_and_sum(int keys, const float (&z)[LANE_KEYS], float &best, float &sum) {
    best = -INFINITY, sum = 0;
    for (int i = 0; i < LANE_KEYS; i++)
        best = FULL || key_of(i) < keys ? fmaxf(best, z[i]) : best;
    for (int step = 1; step < ROW_LANES; step *= 2)
        best = fmaxf(best, __shfl_xor_sync(ALL_LANES, best, step));
    for (int i = 0; i < LANE_KEYS; i++)
        sum += FULL || key_of(i) < keys ? __expf(z[i] - best) : 0;
    for (int step = 1; step < ROW_LANES; step *= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, step);
}
// [/softmax-row]

template <typename E, bool SPLIT, bool FULL>
__device__ inline void finish_rows(const router_job &job, router_tile at, float *tile, int warp, int warps, const E *x,
                                   const E *gate) {
    int keys = (int)(job.n - at.key < TILE_KEYS ? job.n - at.key : TILE_KEYS);
    int rows = (int)(job.T - at.token < TILE_TOKENS ? job.T - at.token : TILE_TOKENS);
    constexpr int at_once = WARP / ROW_LANES;
    for (int first = warp * at_once; first < rows; first += warps * at_once) {
        int row = first + threadIdx.x % WARP / ROW_LANES;
        float z[LANE_KEYS], best, sum;
        read_row(tile + row * TILE_PITCH, z);
        best_and_sum<FULL>(keys, z, best, sum);
        unsigned lost = SPLIT ? __ballot_sync(ALL_LANES, sum != sum && row < rows) : 0;
        if (lost) {
#pragma unroll 1
            for (int i = 0; i < at_once; i++)
                if (lost >> i * ROW_LANES & 1)
                    plain_row(job, at, first + i, x, gate, tile);
            read_row(tile + row * TILE_PITCH, z);
            best_and_sum<FULL>(keys, z, best, sum);
        }
        if (row >= rows)
            continue;
        int64_t to = (at.side * job.T + at.token + row) * job.n + at.key;
        store_row<FULL>(job.logits + to, keys, z);
        if (!job.log_probs)
            continue;
        float log_sum = logf(sum);
        for (int i = 0; i < LANE_KEYS; i++)
            z[i] = z[i] - best - log_sum;
        store_row<FULL>(job.log_probs + to, keys, z);
    }
}

// The rows of a tile that stands in shared memory, by `warps` warps, of which this is number `warp`.
template <typename E, bool SPLIT>
__device__ inline void finish_tile(const router_job &job, router_tile at, float *tile, int warp, int warps, const E *x,
                                   const E *gate) {
    if (job.n % 4 == 0 && job.n - at.key >= TILE_KEYS)
        finish_rows<E, SPLIT, true>(job, at, tile, warp, warps, x, gate);
    else
        finish_rows<E, SPLIT, false>(job, at, tile, warp, warps, x, gate);
}

#endif
