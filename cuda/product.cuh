// Matrix products by warpgroups: C [rows, columns] = A · Bᵀ, float16 or bfloat16 in, float32 sums, and an epilogue that
// says what becomes of them. One persistent kernel for the shared MLP, the dense strategy and the gradients.
//
// OPERANDS. A is stored [rows, depth] and B [columns, depth] ("k-major", as weights are), or, with A_DOWN or B_DOWN,
// [depth, rows] and [depth, columns]: the depth runs down the rows of memory. Rows of memory start at multiples of 16
// bytes (product_fits); sizes may divide nothing: what is outside is read as zeros. describe_a, describe_b fill in the
// maps.
//     product_maps maps = {};
//     TRY(describe_a<A_DOWN>("x", &maps.a[0], dtype, x, rows, depth, pitch));
//     TRY(describe_b<B_DOWN, COLUMNS>("gate", &maps.b[0], dtype, gate, columns, depth, pitch)); // , 4 in clusters of 4
// A sum of two products, A₀·B₀ᵀ + A₁·B₁ᵀ, has the second pair in a[1], b[1], and work.second_from = depth of the first,
// a multiple of 64. work.paired: C's tiles have COLUMNS / 2 columns of B₀ and the same columns of B₁ beside each other
// (gate and up), work.columns counts those of one, and the epilogue gets both.
//
// WORK. product_plan(rows, columns, depth, tile columns, max_splits) fills in a product_work: all fields may be changed
// afterwards. With splits > 1 the depth is cut into so many parts, and the epilogue gets each part's sums on its own.
//
// KERNEL. product_launch<E, COLUMNS, A_DOWN, B_DOWN>(name, work, maps, epilogue, overlap, stream). COLUMNS of a tile:
// 256 or 128, a block's tile is 128 rows by so many. overlap: starts while the kernel before ends and waits for it
// before it reads anything. The kernel lets the next one start early in the same way, at once or, with work.early, when
// it has got so far.
//
// EPILOGUE. A struct passed by value (CUtensorMaps are welcome in it), called by each of the two warpgroups of a block
// with its 64 rows of every tile (of every part of the depth):
//     struct my_epilogue {
//         static constexpr int STAGING = ...; // bytes of shared memory for one warpgroup, a multiple of 1,024
//         template <int SUMS> __device__ void operator()(const product_place &at, float (&sums)[SUMS], char *staging)
//             const;
//     };
// Thread t of the warpgroup (at.thread, 0 to 127) has SUMS = COLUMNS / 2 sums, sum i in row at.row + sum_row(at, i) and
// column at.column + sum_column(at, i); i and i + 1 are neighbours for even i. Rows from work.rows on and columns from
// work.columns on are to be left out. at.barrier is for barrier_sync(at.barrier, 128). Shared memory beyond STAGING
// goes to the ring: 16 KB a warpgroup leave four stages of 128 × 256 tiles, 40 KB three. store_rounded and store_sums
// are epilogues (product_ends.cuh).
#ifndef FMOE_PRODUCT_CUH
#define FMOE_PRODUCT_CUH

#include "tile.cuh"

#include <limits.h>

#define PRODUCT_ROWS      128 // of a tile: 64 for each of the two warpgroups that multiply
#define PRODUCT_GROUP     128 // threads of a warpgroup
#define PRODUCT_THREADS   (3 * PRODUCT_GROUP)
#define PRODUCT_PANEL     (64 * TILE_DEPTH) // elements that a copy of 64 rows by 64 brings
#define PRODUCT_SHARED    (227 * 1024)
#define PRODUCT_REGISTERS 232 // a thread that multiplies; 40 for those that do not: 168 on average

typedef struct {
    int rows, columns, depth; // of C; columns of one of the two if paired
    int second_from;          // where in the depth the second pair of maps begins; INT_MAX: nowhere
    bool paired;
    int splits;  // parts of the depth
    int cluster; // blocks that share B: 1, 2, or 4 where tiles have 256 columns
    int band;    // the tiles of so many clusters' rows are walked column by column before the next rows
    int blocks;  // at most so many at once; 0: one a multiprocessor
    int early;   // the tile with which the next kernel may start; 0: it may at once
} product_work;

typedef struct {
    CUtensorMap a[2], b[2];
} product_maps;

typedef struct {
    int row, column; // of C: the warpgroup's first
    int split;
    int thread;  // in the warpgroup
    int barrier; // the warpgroup's own
} product_place;

__device__ inline int sum_row(const product_place &at, int i) {
    return at.thread / 32 * 16 + at.thread % 32 / 4 + i / 2 % 2 * 8;
}
__device__ inline int sum_column(const product_place &at, int i) {
    return i / 4 * 8 + at.thread % 4 * 2 + i % 2;
}

// ---- Tiles in order ----

typedef struct {
    int row, column; // in tiles, the rows of a cluster together
} product_tile;

typedef struct {
    int split, first, count; // blocks of 64 of the depth
} product_part;

__host__ __device__ inline int product_tiles_down(const product_work &work) {
    return (work.rows + PRODUCT_ROWS * work.cluster - 1) / (PRODUCT_ROWS * work.cluster);
}
__host__ __device__ inline int product_tiles_across(const product_work &work, int columns) {
    int width = work.paired ? columns / 2 : columns;
    return (work.columns + width - 1) / width;
}
__host__ __device__ inline int product_depth_blocks(const product_work &work) {
    return (work.depth + TILE_DEPTH - 1) / TILE_DEPTH;
}

// [raster]
// Bands of rows, column after column in each: the tiles in work at the same time are a block of the matrix about as
// tall as it is wide, so what they read of A and of B is little and meets in the L2.
__device__ inline product_tile product_tile_of(const product_work &work, int number, int down, int across) {
    int rest = number % (down * across), band = rest / (work.band * across), in_band = rest % (work.band * across);
    int height = min(work.band, down - band * work.band);
    return {band * work.band + in_band % height, in_band / height};
}
// [/raster]

__device__ inline product_part product_part_of(const product_work &work, int number, int down, int across) {
    int blocks = product_depth_blocks(work);
    if (work.splits == 1)
        return {0, 0, blocks};
    int split = number / (down * across);
    int first = (int)((int64_t)blocks * split / work.splits), end = (int)((int64_t)blocks * (split + 1) / work.splits);
    return {split, first, end - first};
}

// ---- Shared memory ----

template <typename E, int COLUMNS, int STAGING> struct product_shared {
    static constexpr int STAGE_BYTES = (PRODUCT_ROWS + COLUMNS) * TILE_DEPTH * 2;
    static constexpr int ROOM = (PRODUCT_SHARED - 2048 - 2 * STAGING) / STAGE_BYTES, STAGES = ROOM < 8 ? ROOM : 8;
    E a[STAGES][2 * PRODUCT_PANEL], b[STAGES][COLUMNS / 64 * PRODUCT_PANEL];
    char staging[2][STAGING];
    uint64_t full[STAGES], empty[STAGES];
};

// Where in the ring: the stage, and the parity of its turn.
struct product_turn {
    int stage, parity;
    template <int STAGES> __device__ void next() {
        if (++stage == STAGES)
            stage = 0, parity ^= 1;
    }
};

// ---- The warp that brings the operands ----

template <int BLOCKS>
__device__ inline void bring_box(void *to, const CUtensorMap *map, int column, int row, uint64_t *full) {
    if constexpr (BLOCKS > 1)
        copy_box_to_cluster(to, map, column, row, full, (1 << BLOCKS) - 1);
    else
        copy_box(to, map, column, row, full);
}

// `count` rows of an operand by 64 of its depth, to so many blocks of the cluster.
template <typename E, bool DOWN, int BLOCKS>
__device__ inline void bring_rows(E *to, const CUtensorMap *map, int row, int depth, int count, uint64_t *full) {
    if constexpr (DOWN) {
        for (int panel = 0; panel < count / 64; panel++)
            bring_box<BLOCKS>(to + panel * PRODUCT_PANEL, map, row + panel * 64, depth, full);
    } else {
        bring_box<BLOCKS>(to, map, depth, row, full);
    }
}

// [product-producer]
// What a tile's blocks of the depth are copied from: this block's rows of A, and B in halves, or in quarters in a
// cluster of four. The blocks of a cluster have different rows and the same columns: each brings one part of B to all
// of them. A block of the depth leaves one thread 1,000 cycles, so what does not change with the depth is found once a
// tile.
template <int CLUSTER> struct product_source {
    static constexpr int PARTS = CLUSTER > 2 ? CLUSTER : 2, OWN = PARTS / CLUSTER;
    const CUtensorMap *a, *b[OWN];
    int row, columns[OWN];
};

template <int COLUMNS, int CLUSTER>
__device__ inline product_source<CLUSTER> product_source_of(const product_work &work, const product_maps &maps,
                                                            const product_tile &tile, int rank, int second) {
    typedef product_source<CLUSTER> source;
    constexpr int PART = COLUMNS / source::PARTS;
    source from;
    from.a = &maps.a[second], from.row = (CLUSTER * tile.row + rank) * PRODUCT_ROWS;
    for (int i = 0; i < source::OWN; i++) {
        int part = rank + i;
        bool up = part >= source::PARTS / 2;
        from.b[i] = &maps.b[work.paired ? up : second];
        from.columns[i] = work.paired ? tile.column * (COLUMNS / 2) + part % (source::PARTS / 2) * PART
                                      : tile.column * COLUMNS + part * PART;
    }
    return from;
}

template <typename E, int COLUMNS, bool A_DOWN, bool B_DOWN, int CLUSTER>
__device__ inline void bring_stage(const product_source<CLUSTER> &from, int depth, int rank, E *a, E *b,
                                   uint64_t *full) {
    constexpr int PART = COLUMNS / product_source<CLUSTER>::PARTS;
    barrier_arrive_expecting(full, (PRODUCT_ROWS + COLUMNS) * TILE_DEPTH * 2);
    bring_rows<E, A_DOWN, 1>(a, from.a, from.row, depth, PRODUCT_ROWS, full);
    for (int i = 0; i < product_source<CLUSTER>::OWN; i++)
        bring_rows<E, B_DOWN, CLUSTER>(b + (rank + i) * PART * TILE_DEPTH, from.b[i], from.columns[i], depth, PART,
                                       full);
}
// [/product-producer]

template <typename E, int COLUMNS, bool A_DOWN, bool B_DOWN, int CLUSTER, typename S>
__device__ inline void product_bring(S *s, const product_work &work, const product_maps &maps, int rank) {
    int down = product_tiles_down(work), across = product_tiles_across(work, COLUMNS);
    int cluster = blockIdx.x / work.cluster, clusters = gridDim.x / work.cluster;
    product_turn turn = {0, 0};
    for (int number = cluster; number < down * across * work.splits; number += clusters) {
        product_tile tile = product_tile_of(work, number, down, across);
        product_part part = product_part_of(work, number, down, across);
        int depth = part.first * TILE_DEPTH, until = work.second_from;
        product_source<CLUSTER> from = product_source_of<COLUMNS, CLUSTER>(work, maps, tile, rank, 0);
        for (int left = part.count; left > 0; left--) {
            if (depth >= until) {
                from = product_source_of<COLUMNS, CLUSTER>(work, maps, tile, rank, 1);
                depth -= until, until = INT_MAX;
            }
            barrier_wait(&s->empty[turn.stage], turn.parity ^ 1);
            bring_stage<E, COLUMNS, A_DOWN, B_DOWN>(from, depth, rank, s->a[turn.stage], s->b[turn.stage],
                                                    &s->full[turn.stage]);
            depth += TILE_DEPTH;
            turn.template next<S::STAGES>();
        }
    }
}

template <typename E, int COLUMNS, bool A_DOWN, bool B_DOWN, typename S>
__device__ inline void product_produce(S *s, const product_work &work, const product_maps &maps, int rank) {
    if (COLUMNS == 256 && work.cluster == 4)
        product_bring<E, COLUMNS, A_DOWN, B_DOWN, 4>(s, work, maps, rank);
    else if (work.cluster == 2)
        product_bring<E, COLUMNS, A_DOWN, B_DOWN, 2>(s, work, maps, rank);
    else
        product_bring<E, COLUMNS, A_DOWN, B_DOWN, 1>(s, work, maps, rank);
}

// ---- The warpgroups that multiply ----

// This warpgroup is done with a stage: says so to every block that writes into it.
__device__ inline void product_release(uint64_t *empty, int cluster) {
    int warp = threadIdx.x % PRODUCT_GROUP / WARP;
    if (threadIdx.x % WARP == 0 && warp < cluster)
        barrier_arrive_in(empty, warp);
}

// [product-consumer]
// 64 rows of a tile. Each block of the depth is four products deep. The stage before is free as soon as the first of
// them has been handed in, for products are done in turn; the other three follow while that one runs, and beside(block)
// while they do. The last three are still under way at the end; returns their stage. (The loop has its test at the end:
// see the router.)
template <typename E, bool A_DOWN, bool B_DOWN, typename S, int SUMS, typename Beside>
__device__ inline int product_blocks(S *s, product_turn &turn, int count, int group, int cluster, float (&sums)[SUMS],
                                     Beside beside) {
    constexpr int A_STEP = A_DOWN ? 128 : 2, B_STEP = B_DOWN ? 128 : 2;
    int block = 0, before = 0;
    do {
        const E *left = s->a[turn.stage] + group * PRODUCT_PANEL, *right = s->b[turn.stage];
        uint64_t a = A_DOWN ? wgmma_operand_transposed(left) : wgmma_operand(left);
        uint64_t b = B_DOWN ? wgmma_operand_transposed(right) : wgmma_operand(right);
        barrier_wait(&s->full[turn.stage], turn.parity);
        wgmma_fence();
        wgmma_from_shared<E, A_DOWN, B_DOWN>(sums, a, b, block > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (block > 0)
            product_release(&s->empty[before], cluster);
#pragma unroll
        for (int step = 1; step < TILE_DEPTH / 16; step++)
            wgmma_from_shared<E, A_DOWN, B_DOWN>(sums, a + step * A_STEP, b + step * B_STEP, true);
        wgmma_commit();
        beside(block);
        before = turn.stage;
        turn.template next<S::STAGES>();
    } while (++block < count);
    return before;
}
// [/product-consumer]

// A tile's place is found while its first products are under way: no division keeps the tensor cores waiting.
template <typename E, int COLUMNS, bool A_DOWN, bool B_DOWN, typename S, typename Epilogue>
__device__ inline void product_consume(S *s, const product_work &work, const Epilogue &epilogue, int rank, int group) {
    int down = product_tiles_down(work), across = product_tiles_across(work, COLUMNS);
    int cluster = blockIdx.x / work.cluster, clusters = gridDim.x / work.cluster;
    int width = work.paired ? COLUMNS / 2 : COLUMNS;
    product_turn turn = {0, 0};
    for (int number = cluster; number < down * across * work.splits; number += clusters) {
        product_part part = product_part_of(work, number, down, across);
        // [early]
        if (work.early > 0 && number >= work.early)
            start_next_kernel(); // where all blocks have got so far; the next one waits before it reads
        // [/early]
        product_place at = {0, 0, part.split, (int)threadIdx.x % PRODUCT_GROUP, 1 + group};
        float sums[COLUMNS / 2];
        int last = product_blocks<E, A_DOWN, B_DOWN>(s, turn, part.count, group, work.cluster, sums, [&](int block) {
            if (block > 0)
                return;
            product_tile tile = product_tile_of(work, number, down, across);
            at.row = (tile.row * work.cluster + rank) * PRODUCT_ROWS + group * 64, at.column = tile.column * width;
        });
        wgmma_wait<0>();
        wgmma_arrived(sums);
        product_release(&s->empty[last], work.cluster);
        epilogue(at, sums, s->staging[group]);
    }
    store_box_wait();
}

// The ring's barriers, before any thread of the cluster uses them.
template <typename S> __device__ inline void product_set_up(S *s, int cluster) {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < S::STAGES; stage++) {
            barrier_init(&s->full[stage], 1);
            barrier_init(&s->empty[stage], 2 * cluster);
        }
        barrier_init_done();
    }
    cluster_sync();
}

// Launch: persistent blocks of 384 threads in clusters of one, two or four, a block a multiprocessor: one warp that
// feeds and two warpgroups that multiply. Shared memory: 227 KB, a ring of stages (48 KB each for tiles of 128 × 256)
// and the epilogue's staging. Traffic: a cluster of two reads 64 KB and does 256 × 256 × 64 products a step.
template <typename E, int COLUMNS, bool A_DOWN, bool B_DOWN, typename Epilogue>
__global__ void __launch_bounds__(PRODUCT_THREADS, 1)
    product_kernel(product_work work, const __grid_constant__ product_maps maps,
                   const __grid_constant__ Epilogue epilogue) {
#if HAS_WGMMA
    extern __shared__ char shared[];
    typedef product_shared<E, COLUMNS, Epilogue::STAGING> S;
    S *s = (S *)(shared + (-shared_address(shared) & 1023));
    int group = threadIdx.x / PRODUCT_GROUP, rank = work.cluster > 1 ? (int)cluster_rank() : 0;
    if (threadIdx.x == 0)
        for (int i = 0; i < 2; i++)
            expect_map(&maps.a[i]), expect_map(&maps.b[i]);
    product_set_up(s, work.cluster);
    if (work.early == 0)
        start_next_kernel();
    wait_for_kernel_before();
    if (group == 2) {
        give_registers<40>();
        if (threadIdx.x == 2 * PRODUCT_GROUP)
            product_produce<E, COLUMNS, A_DOWN, B_DOWN>(s, work, maps, rank);
    } else {
        take_registers<PRODUCT_REGISTERS>();
        product_consume<E, COLUMNS, A_DOWN, B_DOWN>(s, work, epilogue, rank, group);
    }
    cluster_sync(); // no block ends while the other still writes into it
#endif
}

// ---- Host ----

// Whether the copy engine can read rows of so many 16-bit elements.
static inline bool product_fits(int64_t pitch) {
    return pitch % 8 == 0;
}

// What many blocks read comes from the L2 mostly: a tenth fewer of its sectors are read with 128 bytes than with 256.
template <bool A_DOWN>
static inline fmoe_status describe_a(const char *name, CUtensorMap *map, fmoe_dtype dtype, const void *a, int64_t rows,
                                     int64_t depth, int64_t pitch) {
    CUtensorMapL2promotion fetch = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
    return A_DOWN ? describe_part(name, map, dtype, a, depth, rows, pitch, TILE_DEPTH, fetch)
                  : describe_part(name, map, dtype, a, rows, depth, pitch, PRODUCT_ROWS, fetch);
}

template <bool B_DOWN, int COLUMNS>
static inline fmoe_status describe_b(const char *name, CUtensorMap *map, fmoe_dtype dtype, const void *b,
                                     int64_t columns, int64_t depth, int64_t pitch, int cluster = 2) {
    CUtensorMapL2promotion fetch = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
    return B_DOWN ? describe_part(name, map, dtype, b, depth, columns, pitch, TILE_DEPTH, fetch)
                  : describe_part(name, map, dtype, b, columns, depth, pitch, COLUMNS / (cluster == 4 ? 4 : 2), fetch);
}

static inline int multiprocessors(void) {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count > 1 ? count : 2;
}

// [product-cost]
// Clocks that a product takes, roughly: rounds of tiles on all multiprocessors, each some blocks of the depth and an
// epilogue; then the parts are written, read and added.
static inline double product_clocks(const product_work &work, int columns) {
    int tiles = product_tiles_down(work) * product_tiles_across(work, columns) * work.splits;
    int rounds = (int)ceil_div(tiles * work.cluster, multiprocessors() / work.cluster * work.cluster);
    double blocks = (double)ceil_div(product_depth_blocks(work), work.splits), block = columns == 256 ? 1070 : 640;
    double parts = work.splits > 1 ? 2500 + 8.0 * work.splits * work.rows * work.columns / 2200 : 0;
    return 3300 + rounds * (blocks * block + 2200) + parts;
}
// [/product-cost]

// The cheapest number of parts, each at least four blocks deep.
static inline product_work product_plan(int64_t rows, int64_t columns, int64_t depth, int tile_columns,
                                        int max_splits) {
    product_work best = {(int)rows, (int)columns, (int)depth, INT_MAX, false, 1, rows > PRODUCT_ROWS ? 2 : 1, 8, 0, 0};
    int limit = min(max_splits, product_depth_blocks(best) / 4);
    for (product_work work = best; work.splits <= limit; work.splits++)
        if (product_clocks(work, tile_columns) < product_clocks(best, tile_columns))
            best = work;
    return best;
}

// The first tile of the last band; 0 if there is one band.
static inline int product_last_band(const product_work &work, int tile_columns) {
    int rows = (product_tiles_down(work) - 1) / work.band * work.band;
    return rows * product_tiles_across(work, tile_columns);
}

// Blocks of a product in clusters, with all of a multiprocessor's shared memory.
template <typename... Parameters, typename... Arguments>
static inline fmoe_status product_start(const char *name, void (*kernel)(Parameters...), int clusters, int cluster,
                                        bool overlap, cudaStream_t stream, const Arguments &...arguments) {
    TRY(cuda_call(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, PRODUCT_SHARED)));
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = cluster, attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = clusters * cluster;
    config.blockDim = PRODUCT_THREADS, config.dynamicSmemBytes = PRODUCT_SHARED, config.stream = stream;
    config.attrs = attributes, config.numAttrs = overlap ? 2 : 1;
    cudaLaunchKernelEx(&config, kernel, arguments...);
    return launched(name);
}

// Rows, columns and depth were checked to be positive ints, and splits to be no more than the blocks of the depth.
template <typename E, int COLUMNS, bool A_DOWN, bool B_DOWN, typename Epilogue>
static inline fmoe_status product_launch(const char *name, const product_work &work, const product_maps &maps,
                                         const Epilogue &epilogue, bool overlap, cudaStream_t stream) {
    void (*kernel)(product_work, product_maps, Epilogue) = product_kernel<E, COLUMNS, A_DOWN, B_DOWN, Epilogue>;
    int tiles = product_tiles_down(work) * product_tiles_across(work, COLUMNS) * work.splits;
    int blocks = work.blocks > 0 ? work.blocks : multiprocessors(), clusters = max(blocks / work.cluster, 1);
    if (work.early == 0) // otherwise blocks that are done early make room for the next kernel's
        clusters = (int)ceil_div(tiles, ceil_div(tiles, clusters)); // in as many rounds, all of them full
    return product_start(name, kernel, min(clusters, tiles), work.cluster, overlap, stream, work, maps, epilogue);
}

#include "product_ends.cuh"

#endif
