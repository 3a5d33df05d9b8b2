// Rung: the product in tiles of shared memory and registers, in float32 for every storage type.
#include "router.cuh"

#define TILE_THREADS 512 // four groups, each with all 64 × 128 logits and a quarter of k
#define K_GROUPS     4
#define GROUP        (TILE_THREADS / K_GROUPS)
#define DEPTH        32 // of k in a tile

typedef struct {
    float x[DEPTH][TILE_TOKENS], gate[DEPTH][TILE_KEYS];
} tile_pair;

// [transpose]
// A tile stands with k downwards, while its rows in memory run along k: a warp that loads whole cache lines holds 32 k
// of four tokens, and stored at [k][token] they would meet in four banks. So groups of four tokens change places from
// one group of four k to the next, and the 32 stores go to 32 banks. Groups stay whole: 16-byte loads still find them.
__device__ inline int place_of(int k, int row) {
    return row ^ k / 4 % 8 * 4;
}
// [/transpose]

// What a thread has in its registers between global and shared memory.
template <typename E> struct in_flight {
    static constexpr int wide = pack16<E>::count, row_packs = DEPTH / wide; // packs a row
    static constexpr int row_step = TILE_THREADS / row_packs;               // rows between a thread's packs
    static constexpr int x_packs = (TILE_TOKENS + row_step - 1) / row_step, gate_packs = TILE_KEYS / row_step;
    uint4 x[x_packs], gate[gate_packs];
};

template <typename E, bool WIDE>
__device__ inline void fetch(const router_job &job, router_tile at, const E *x, const E *gate, int64_t k,
                             in_flight<E> &in) {
    int row = threadIdx.x / in.row_packs;
    k += threadIdx.x % in.row_packs * in.wide;
    for (int i = 0; i < in.x_packs; i++) {
        int64_t t = at.token + row + i * in.row_step;
        bool inside = t < job.T && row + i * in.row_step < TILE_TOKENS;
        in.x[i] = load_pack<E, WIDE>(x + t * job.d, inside ? k : job.d, job.d);
    }
    for (int i = 0; i < in.gate_packs; i++) {
        int64_t key = at.key + row + i * in.row_step;
        in.gate[i] = load_pack<E, WIDE>(gate + (at.side * job.n + key) * job.d, key < job.n ? k : job.d, job.d);
    }
}

// [place]
// x is normalised on its way into shared memory, by the one thread that brings it: x̂ is nowhere in memory.
template <typename E>
__device__ inline void place(const router_norm &norm, int64_t first, const in_flight<E> &in, tile_pair *tiles) {
    int row = threadIdx.x / in.row_packs, k = threadIdx.x % in.row_packs * in.wide;
    for (int j = 0; j < in.wide; j += 4) {
        // Below padded: NORM_PAD is a multiple of DEPTH.
        pack16<float> center = *(const pack16<float> *)(norm.center + first + k + j);
        pack16<float> scale = *(const pack16<float> *)(norm.scale + first + k + j);
        pack16<float> offset = *(const pack16<float> *)(norm.offset + first + k + j);
        int swap = place_of(k + j, 0);
        for (int i = 0; i < in.x_packs; i++)
            for (int c = 0; c < 4 && row + i * in.row_step < TILE_TOKENS;
                 c++) // in 16 bits half of the threads have none
                tiles->x[k + j + c][row + i * in.row_step ^ swap] =
                    normalised(to_f32(unpack<E>(in.x[i]).at[j + c]), center.at[c], scale.at[c], offset.at[c]);
        for (int i = 0; i < in.gate_packs; i++)
            for (int c = 0; c < 4; c++)
                tiles->gate[k + j + c][row + i * in.row_step ^ swap] = to_f32(unpack<E>(in.gate[i]).at[j + c]);
    }
}
// [/place]

// A thread's 8 tokens by 8 keys: two groups of four each, half a tile apart. The eight lanes of a quarter of a warp
// read 128 bytes of the gate in a row and all the same 16 bytes of x.
__device__ inline int first_row(void) {
    return threadIdx.x % GROUP / 16 * 4;
}
__device__ inline int first_column(void) {
    return threadIdx.x % 16 * 4;
}

// [register-tile]
// Four 16-byte loads feed 64 multiply-adds.
__device__ inline void multiply(const tile_pair *tiles, int first, float (&sums)[8][8]) {
#pragma unroll
    for (int k = first; k < first + DEPTH / K_GROUPS; k++) {
        float a[8], b[8];
        *(pack16<float> *)a = *(const pack16<float> *)&tiles->x[k][place_of(k, first_row())];
        *(pack16<float> *)(a + 4) = *(const pack16<float> *)&tiles->x[k][place_of(k, first_row()) + TILE_TOKENS / 2];
        *(pack16<float> *)b = *(const pack16<float> *)&tiles->gate[k][place_of(k, first_column())];
        *(pack16<float> *)(b + 4) =
            *(const pack16<float> *)&tiles->gate[k][place_of(k, first_column()) + TILE_KEYS / 2];
        for (int i = 0; i < 8; i++)
            for (int j = 0; j < 8; j++)
                sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
    }
}
// [/register-tile]

// The last group's sums to shared memory, then the others' on top of them, one after the other.
__device__ inline void add_groups(const float (&sums)[8][8], float *tile) {
    for (int group = K_GROUPS - 1; group >= 0; group--) {
        for (int i = 0; i < 8 && group == (int)threadIdx.x / GROUP; i++)
            for (int j = 0; j < 8; j += 4) {
                float *to = tile + (first_row() + i % 4 + i / 4 * (TILE_TOKENS / 2)) * TILE_PITCH + first_column() +
                            j / 4 * (TILE_KEYS / 2);
                pack16<float> four = group == K_GROUPS - 1 ? pack16<float>{} : *(const pack16<float> *)to;
                for (int c = 0; c < 4; c++)
                    four.at[c] += sums[i][j + c];
                *(pack16<float> *)to = four;
            }
        __syncthreads();
    }
}

// Launch: a block of 512 threads for 64 tokens by 128 keys of one side. 4,096 tokens make 128 blocks, one a
// multiprocessor, and its sixteen warps share out k because there are no more logits to share out. Shared memory: 48
// KB, two pairs of tiles; while one is multiplied the next is loaded into registers. Traffic: x once for every 128 keys
// and the gate once for every 64 tokens, mostly from the L2; logits and log-probabilities once.
template <typename E, bool WIDE>
__global__ void __launch_bounds__(TILE_THREADS) tiles_kernel(router_job job, const E *x, const E *gate) {
    __shared__ alignas(16) union {
        tile_pair pair[2];
        float logits[TILE_TOKENS * TILE_PITCH];
    } tiles;
    router_tile at = router_tile_of(job);
    float sums[8][8] = {};
    in_flight<E> in;
    fetch<E, WIDE>(job, at, x, gate, 0, in);
    for (int64_t k = 0, turn = 0; k < job.d; k += DEPTH, turn ^= 1) {
        place(job.norm, k, in, &tiles.pair[turn]);
        __syncthreads();
        if (k + DEPTH < job.d)
            fetch<E, WIDE>(job, at, x, gate, k + DEPTH, in);
        multiply(&tiles.pair[turn], threadIdx.x / GROUP * (DEPTH / K_GROUPS), sums);
    }
    __syncthreads();
    add_groups(sums, tiles.logits);
    finish_tile<E, false>(job, at, tiles.logits, threadIdx.x / WARP, TILE_THREADS / WARP, x, gate);
}

template <typename E, bool WIDE> static fmoe_status run(router_job job, const fmoe_router_args *args, void *stream) {
    tiles_kernel<E, WIDE>
        <<<router_tiles(job), TILE_THREADS, 0, (cudaStream_t)stream>>>(job, (const E *)args->x, (const E *)args->gate);
    return launched("tiles_kernel");
}

extern "C" fmoe_status cuda_router_tiles(const void *arguments, void *workspace, size_t bytes, void *stream) {
    const fmoe_router_args *args = (const fmoe_router_args *)arguments;
    size_t used = 0;
    router_scratch s = router_carve(args, false, workspace, &used);
    TRY(router_check(args, workspace, bytes, used));
    if (args->T == 0)
        return FMOE_OK;
    router_job job = router_job_of(args, s);
    TRY(router_set_norm(args, s, false, (cudaStream_t)stream));
    WITH_DTYPE(args->dtype, E, TRY((rows_are_wide<E>(args->d) ? run<E, true> : run<E, false>)(job, args, stream)));
    return job.key_tiles > 1 ? router_log_softmax(args, (cudaStream_t)stream) : FMOE_OK;
}
