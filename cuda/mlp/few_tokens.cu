// Rung: up to 64 tokens at the speed of reading the weights. Tensor cores take the tokens as the 64 rows of their left
// operand and rows of weights as the right one. Four warpgroups share k, and ask for half of it before they wait.
#include "../tile.cuh"
#include "mlp.cuh"

#define FEW_GROUPS    4 // warpgroups a block
#define FEW_GROUP     128
#define FEW_THREADS   (FEW_GROUPS * FEW_GROUP)
#define HIDDEN_ROWS   64 // of weights a block: 32 of gate and the same 32 of up
#define HIDDEN_STAGES 2
#define OUTPUT_ROWS   40 // of down: 26 clusters of four blocks at d = 1024, where an H200 has room for 30
#define OUTPUT_STAGES 2
#define SPLIT         4 // blocks at most, a cluster, that share a product's k

typedef struct {
    int T, rows, columns;  // tokens; outputs; k
    int split;             // blocks, a cluster, that share k
    const void *a, *b, *x; // weights [rows, columns], gate and up or down; tokens [T, columns]
    mlp_target out;        // [T, rows]
} few_job;

// A warpgroup's ring. When it has done its products its sums take the place of all rings.
template <typename E, int ROWS, int STAGES> struct few_ring {
    E weights[STAGES][ROWS * TILE_DEPTH], tokens[STAGES][MLP_FEW_TOKENS * TILE_DEPTH];
};

template <typename E, int ROWS, int STAGES> struct few_shared {
    static constexpr int FOURS = ROWS / 8; // times four sums a thread
    union {
        few_ring<E, ROWS, STAGES> rings[FEW_GROUPS];
        float4 sums[FEW_GROUPS][FOURS][FEW_GROUP];
    };
    float4 parts[FOURS * FEW_GROUP]; // of the tokens that this block finishes, from each block of the cluster
};

// ---- Products of 64 × ROWS

#define FEW_MMA_64(types, s, a, b)                                                                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." types " "                                               \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                             \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                   \
                 "%32, %33, 1, 1, 1, 0, 0;"                                                                            \
                 : WGMMA_8(s, 0), WGMMA_8(s, 8), WGMMA_8(s, 16), WGMMA_8(s, 24)                                        \
                 : "l"(a), "l"(b))
#define FEW_MMA_40(types, s, a, b)                                                                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n40k16.f32." types " "                                               \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19}, "        \
                 "%20, %21, 1, 1, 1, 0, 0;"                                                                            \
                 : WGMMA_8(s, 0), WGMMA_8(s, 8), "+f"(s[16]), "+f"(s[17]), "+f"(s[18]), "+f"(s[19])                    \
                 : "l"(a), "l"(b))

// sums [64 × 2 SUMS] += a [64 × 16] · bᵀ, b [2 SUMS × 16], both in shared memory. Runs on after the instruction.
template <typename E, int SUMS> __device__ inline void few_mma(float (&sums)[SUMS], uint64_t a, uint64_t b) {
    static_assert(SUMS == 32 || SUMS == 20, "64 or 40 rows of weights");
    if constexpr (is_bf16<E>::value && SUMS == 32)
        FEW_MMA_64("bf16.bf16", sums, a, b);
    else if constexpr (is_bf16<E>::value)
        FEW_MMA_40("bf16.bf16", sums, a, b);
    else if constexpr (SUMS == 32)
        FEW_MMA_64("f16.f16", sums, a, b);
    else
        FEW_MMA_40("f16.f16", sums, a, b);
}

// ---- Copies

// Where a thread copies from: eight threads a row of 128 bytes, rows 16 apart. With PAIR rows 0 to 31 of a tile are
// gate's and 32 to 63 up's of the same hidden units.
template <typename E, int ROWS> struct few_sources {
    const E *weights[(ROWS + 15) / 16], *tokens; // NULL: no such row
    int columns;                                 // elements from the thread's piece on
};

template <typename E, int ROWS, bool PAIR>
__device__ inline few_sources<E, ROWS> find_sources(const few_job &job, int first_row, int first_k) {
    int row = threadIdx.x % FEW_GROUP / 8, column = first_k + threadIdx.x % 8 * 8;
    few_sources<E, ROWS> from;
#pragma unroll
    for (int i = 0; i < (ROWS + 15) / 16; i++) {
        int at = first_row + (PAIR ? row + i % 2 * 16 : row + i * 16);
        const E *weights = (const E *)(PAIR && i >= 2 ? job.b : job.a);
        from.weights[i] = at < job.rows ? weights + (int64_t)at * job.columns + column : NULL;
    }
    from.tokens = (const E *)job.x + (int64_t)row * job.columns + column;
    from.columns = job.columns - column;
    return from;
}

// What is outside becomes zeros; the address must be valid all the same.
template <typename E, int ROWS>
__device__ inline void copy_weights(const few_job &job, const few_sources<E, ROWS> &from, int k, E *to) {
    int row = threadIdx.x % FEW_GROUP / 8;
#pragma unroll
    for (int i = 0; i < (ROWS + 15) / 16; i++) {
        bool inside = from.weights[i] && k < from.columns;
        if (row + i * 16 < ROWS)
            copy_async_16(to + tile_at(row + i * 16, threadIdx.x % 8), inside ? from.weights[i] + k : job.a, inside);
    }
}

// Rows beyond the last token stay as they are: no token's sums depend on another row.
template <typename E, int ROWS>
__device__ inline void copy_tokens(const few_job &job, const few_sources<E, ROWS> &from, int k, E *to) {
    int row = threadIdx.x % FEW_GROUP / 8;
    bool inside = k < from.columns;
#pragma unroll
    for (int i = 0; i < MLP_FEW_TOKENS; i += 16)
        if (row + i < job.T)
            copy_async_16(to + tile_at(row + i, threadIdx.x % 8),
                          inside ? from.tokens + (int64_t)i * job.columns + k : job.x, inside);
}

// [ahead]
// The whole ring is filled ahead. Of the second product the weights come first, while the kernel before still runs,
// and then the tokens, which are what it writes. A stage's copies are a group; groups end in order.
template <typename E, int ROWS, bool PAIR, int STAGES>
__device__ inline void copy_ahead(const few_job &job, const few_sources<E, ROWS> &from, int first_k,
                                  few_ring<E, ROWS, STAGES> &ring) {
#pragma unroll 1
    for (int i = 0; i < STAGES && !PAIR; i++)
        copy_weights(job, from, first_k + i * FEW_GROUPS * TILE_DEPTH, ring.weights[i]);
    start_next_kernel();
    if (!PAIR)
        wait_for_kernel_before();
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) {
        int k = first_k + i * FEW_GROUPS * TILE_DEPTH;
        if (PAIR)
            copy_weights(job, from, k, ring.weights[i]);
        copy_tokens(job, from, k, ring.tokens[i]);
        copy_async_commit();
    }
}
// [/ahead]

// ---- Products

// [multiply]
// Warpgroup g has chunks g, g + 4, ... of the block's k. It waits for its own copies only. All four make as many turns:
// a chunk that there is not is zeros, as is all that lies beyond k.
template <typename E, int ROWS, bool PAIR, int STAGES>
__device__ inline void multiply(const few_job &job, few_sources<E, ROWS> from, int chunks,
                                few_ring<E, ROWS, STAGES> &ring, float (&sums)[ROWS / 2]) {
    int group = threadIdx.x / FEW_GROUP, stage = 0;
    int end = (chunks + FEW_GROUPS - 1) / FEW_GROUPS * FEW_GROUPS;
    from.columns = min(from.columns, chunks * TILE_DEPTH); // what is beyond is another block's
    copy_ahead<E, ROWS, PAIR>(job, from, group * TILE_DEPTH, ring);
    for (int c = group; c < end; c += FEW_GROUPS) {
        copy_async_wait<STAGES - 1>();      // this chunk is here, for this thread's part,
        shared_stores_done();               // wgmma may read it,
        barrier_sync(1 + group, FEW_GROUP); // and all of that for all threads
        uint64_t tokens = wgmma_operand(ring.tokens[stage]), weights = wgmma_operand(ring.weights[stage]);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < TILE_DEPTH / 16; step++)
            few_mma<E>(sums, tokens + 2 * step, weights + 2 * step);
        wgmma_commit();
        int next = c + STAGES * FEW_GROUPS;
        if (next < end) { // into this stage, when all warps are done with it
            wgmma_wait<0>();
            barrier_sync(1 + group, FEW_GROUP);
            copy_weights(job, from, next * TILE_DEPTH, ring.weights[stage]);
            copy_tokens(job, from, next * TILE_DEPTH, ring.tokens[stage]);
        }
        copy_async_commit();
        stage = stage + 1 < STAGES ? stage + 1 : 0;
    }
    wgmma_wait<0>();
    wgmma_arrived(sums);
    copy_async_wait<0>();
}
// [/multiply]

// ---- Joining the warpgroups of a block and the blocks of a cluster

__device__ inline float4 add_parts(const float4 *parts, int count, int step) {
    float4 all = parts[0];
    for (int i = 1; i < count; i++) {
        float4 part = parts[i * step];
        all.x += part.x, all.y += part.y, all.z += part.z, all.w += part.w;
    }
    return all;
}

// Four sums of a thread are two neighbours of one token and of the eighth after it.
template <typename E, bool PAIR>
__device__ inline void finish(const few_job &job, int token, int column, float4 p, float4 q) {
    const float sums[4] = {p.x, p.y, p.z, p.w}, up[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float two[2];
        for (int i = 0; i < 2; i++)
            two[i] = PAIR ? swiglu(sums[half * 2 + i], up[half * 2 + i]) : sums[half * 2 + i];
        int t = token + 8 * half;
        if (t < job.T && column < job.rows) // rows are multiples of 8: both columns or none
            store_results<E>(job.out, (int64_t)t * job.rows + column, two);
    }
}

// Sums of `width` threads, in `count` parts: of 16 tokens for each warp, from `first` on.
template <typename E, int ROWS, bool PAIR>
__device__ inline void finish_all(const few_job &job, const float4 *sums, int count, int width, int first,
                                  int first_row) {
    constexpr int FOURS = ROWS / 8, RESULTS = PAIR ? FOURS / 2 : FOURS;
    for (int i = threadIdx.x; i < RESULTS * width; i += FEW_THREADS) {
        int four = i / width, thread = i % width, lane = thread % WARP;
        float4 p = add_parts(sums + i, count, FOURS * width), q = {};
        if (PAIR)
            q = add_parts(sums + RESULTS * width + i, count, FOURS * width);
        finish<E, PAIR>(job, first + thread / WARP * 16 + lane / 4, first_row + four * 8 + lane % 4 * 2, p, q);
    }
}

// [push]
// Each block of a cluster finishes the tokens of `width` threads. A block adds up what its warpgroups have, and stores
// its part straight into the shared memory of the block that finishes it.
__device__ inline void store_in(float4 *mine, unsigned rank, float4 v) {
    asm volatile("{\n"
                 ".reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};\n"
                 "}" ::"r"(shared_address(mine)),
                 "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}

template <int FOURS> __device__ inline void push(const float4 *sums, int width, int rank, float4 *parts) {
    for (int i = threadIdx.x; i < FOURS * FEW_GROUP; i += FEW_THREADS) {
        int four = i / FEW_GROUP, thread = i % FEW_GROUP;
        store_in(parts + (rank * FOURS + four) * width + thread % width, thread / width,
                 add_parts(sums + i, FEW_GROUPS, FOURS * FEW_GROUP));
    }
}
// [/push]

// Launch: four warpgroups a block, `split` blocks a cluster for ROWS rows of weights. Shared memory: 128 KB for the
// hidden units, 104 KB for the outputs, and 16 or 10 KB more where a cluster shares k. Traffic: each weight once; the
// tokens once a block, from the L2.
template <typename E, int ROWS, bool PAIR, int STAGES>
__global__ void __launch_bounds__(FEW_THREADS, 1) few_kernel(few_job job) {
#if HAS_WGMMA
    extern __shared__ __align__(1024) char shared[];
    typedef few_shared<E, ROWS, STAGES> S;
    S &s = *(S *)shared;
    int group = threadIdx.x / FEW_GROUP, rank = job.split > 1 ? (int)cluster_rank() : 0;
    int first_row = (int)blockIdx.x / job.split * (PAIR ? ROWS / 2 : ROWS);
    int all = (job.columns + TILE_DEPTH - 1) / TILE_DEPTH, each = (all + job.split - 1) / job.split;
    int chunks = max(0, min(each, all - rank * each));
    float sums[ROWS / 2] = {};
    few_sources<E, ROWS> from = find_sources<E, ROWS, PAIR>(job, first_row, rank * each * TILE_DEPTH);
    multiply<E, ROWS, PAIR, STAGES>(job, from, chunks, s.rings[group], sums);
    __syncthreads(); // nobody reads a ring any more
#pragma unroll
    for (int i = 0; i < S::FOURS; i++)
        s.sums[group][i][threadIdx.x % FEW_GROUP] =
            make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
    if (job.split == 1) {
        __syncthreads();
        finish_all<E, ROWS, PAIR>(job, &s.sums[0][0][0], FEW_GROUPS, FEW_GROUP, 0, first_row);
        return;
    }
    int width = FEW_GROUP / job.split;
    cluster_sync(); // and all blocks have begun
    push<S::FOURS>(&s.sums[0][0][0], width, rank, s.parts);
    cluster_sync();
    finish_all<E, ROWS, PAIR>(job, s.parts, job.split, width, rank * width / 2, first_row);
#endif
}

template <typename E, int ROWS, bool PAIR, int STAGES>
static fmoe_status launch(const few_job &job, bool overlap, cudaStream_t stream) {
    auto kernel = few_kernel<E, ROWS, PAIR, STAGES>;
    int shared = (int)sizeof(few_shared<E, ROWS, STAGES>);
    if (job.split == 1)
        shared -= (int)sizeof(few_shared<E, ROWS, STAGES>::parts); // the last of it
    TRY(cuda_call("few_kernel", cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)));
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = (unsigned)job.split;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = (unsigned)(ceil_div(job.rows, PAIR ? ROWS / 2 : ROWS) * job.split);
    config.blockDim = FEW_THREADS, config.dynamicSmemBytes = (size_t)shared, config.stream = stream;
    config.attrs = job.split > 1 ? attributes : attributes + 1;
    config.numAttrs = (job.split > 1) + overlap;
    cudaLaunchKernelEx(&config, kernel, job);
    return launched("few_kernel");
}

// Blocks that share k: until there is one a multiprocessor, more or less, or a chunk each.
static int split_of(int64_t blocks, int64_t columns) {
    int split = 1;
    while (split < SPLIT && blocks * split <= 64 && split * 2 * TILE_DEPTH <= columns)
        split *= 2;
    return split;
}

template <typename E>
static fmoe_status run(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, cudaStream_t stream) {
    int T = (int)args->T, d = (int)args->d, I = (int)args->I;
    few_job hidden = {}, output = {};
    bool overlap;
    hidden.a = args->gate, hidden.b = args->up, hidden.x = args->x;
    output.a = args->down, output.x = workspace;
    hidden.T = output.T = T;
    hidden.rows = output.columns = I, hidden.columns = output.rows = d;
    hidden.split = split_of(ceil_div(I, HIDDEN_ROWS / 2), d);
    output.split = split_of(ceil_div(d, OUTPUT_ROWS), I);
    hidden.out.to = workspace, output.out = mlp_target_of(args, join);
    TRY((launch<E, HIDDEN_ROWS, true, HIDDEN_STAGES>(hidden, false, stream)));
    TRY(mlp_wait(join, stream, &overlap));
    return launch<E, OUTPUT_ROWS, false, OUTPUT_STAGES>(output, overlap, stream);
}

fmoe_status mlp_few_tokens_into(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, size_t bytes,
                                cudaStream_t stream) {
    TRY(mlp_check(args, workspace, bytes, cuda_mlp_hidden_bytes(args)));
    TRY(mlp_check_rows(args, cuda_mlp_few(args), "at most 64 tokens, 16-bit types and multiples of 8 only"));
    if (args->T == 0)
        return FMOE_OK;
    return (args->dtype == FMOE_F16 ? run<__half> : run<__nv_bfloat16>)(args, join, workspace, stream);
}

extern "C" fmoe_status cuda_mlp_few_tokens(const void *args, void *workspace, size_t bytes, void *stream) {
    return mlp_few_tokens_into((const fmoe_mlp_args *)args, NULL, workspace, bytes, (cudaStream_t)stream);
}
