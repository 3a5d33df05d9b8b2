// Rung: up to 64 tokens at the speed of reading the weights. Tensor cores take 64 rows of weights as their left operand
// and the tokens as the right one; asynchronous copies keep up to 56 KB of weights a multiprocessor in flight.
#include "../tile.cuh"
#include "mlp.cuh"

#define BLOCK_ROWS    64  // rows of weights a block: of down, or 32 of gate and 32 of up
#define FEW_THREADS   128 // a warpgroup
#define SUMS_PITCH    12  // floats from token to token of 8 rows' sums: a warp's stores meet no bank twice
#define HIDDEN_STAGES 8
#define OUTPUT_STAGES 6
#define SPLIT         4 // blocks at most, a cluster, that share a product's k

typedef struct {
    int T, rows, columns;  // tokens; outputs; k
    int split;             // blocks, a cluster, that share k
    const void *a, *b, *x; // weights [rows, columns], gate and up or down; tokens [T, columns]
    mlp_target out;        // [T, rows]
} few_job;

template <typename E, int TOKENS> struct few_stage { E weights[BLOCK_ROWS * TILE_DEPTH], tokens[TOKENS * TILE_DEPTH]; };

template <typename E, int TOKENS, int STAGES> struct few_shared {
    few_stage<E, TOKENS> stages[STAGES];
    float parts[8][TOKENS][SUMS_PITCH]; // of 8 rows each
};

// ---- Products of 64 × TOKENS

#define FEW_MMA_64(types, s, a, b)                                                                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." types " "                                               \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                             \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                   \
                 "%32, %33, 1, 1, 1, 0, 0;"                                                                            \
                 : WGMMA_8(s, 0), WGMMA_8(s, 8), WGMMA_8(s, 16), WGMMA_8(s, 24)                                        \
                 : "l"(a), "l"(b))
#define FEW_MMA_32(types, s, a, b)                                                                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." types " "                                               \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, 1, 1, 1, 0, 0;"    \
                 : WGMMA_8(s, 0), WGMMA_8(s, 8)                                                                        \
                 : "l"(a), "l"(b))
#define FEW_MMA_8(types, s, a, b)                                                                                      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32." types " {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"        \
                 : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])                                                      \
                 : "l"(a), "l"(b))
#define FEW_MMA(types, s, a, b)                                                                                        \
    do {                                                                                                               \
        if constexpr (SUMS == 32)                                                                                      \
            FEW_MMA_64(types, s, a, b);                                                                                \
        else if constexpr (SUMS == 16)                                                                                 \
            FEW_MMA_32(types, s, a, b);                                                                                \
        else                                                                                                           \
            FEW_MMA_8(types, s, a, b);                                                                                 \
    } while (0)

// sums [64 × 2 SUMS] += a [64 × 16] · bᵀ, b [2 SUMS × 16], both in shared memory. Runs on after the instruction.
template <typename E, int SUMS> __device__ inline void few_mma(float (&sums)[SUMS], uint64_t a, uint64_t b) {
    if constexpr (is_bf16<E>::value)
        FEW_MMA("bf16.bf16", sums, a, b);
    else
        FEW_MMA("f16.f16", sums, a, b);
}

// ---- Copies

// Where a thread copies from: eight threads a row of 128 bytes, rows 16 apart. With PAIR rows 0 to 31 of a tile are
// gate's and 32 to 63 up's of the same hidden units.
template <typename E> struct few_sources {
    const E *weights[BLOCK_ROWS / 16], *tokens; // NULL: no such row
    int rows_of_tokens, columns;                // 16 rows further each; elements from the thread's piece on
};

template <typename E, bool PAIR>
__device__ inline few_sources<E> find_sources(const few_job &job, int first_row, int first_k) {
    int row = threadIdx.x / 8, column = first_k + threadIdx.x % 8 * 8;
    few_sources<E> from;
#pragma unroll
    for (int i = 0; i < BLOCK_ROWS / 16; i++) {
        int at = first_row + (PAIR ? row + i % 2 * 16 : row + i * 16);
        const E *weights = (const E *)(PAIR && i >= 2 ? job.b : job.a);
        from.weights[i] = at < job.rows ? weights + (int64_t)at * job.columns + column : NULL;
    }
    from.tokens = (const E *)job.x + (int64_t)row * job.columns + column;
    from.rows_of_tokens = job.T - row;
    from.columns = job.columns - column;
    return from;
}

// What is outside becomes zeros; the address must be valid all the same.
template <typename E, int TOKENS>
__device__ inline void copy_weights(const few_job &job, const few_sources<E> &from, int k, few_stage<E, TOKENS> *to) {
#pragma unroll
    for (int i = 0; i < BLOCK_ROWS / 16; i++) {
        bool inside = from.weights[i] && k < from.columns;
        copy_async_16(to->weights + tile_at(threadIdx.x / 8 + i * 16, threadIdx.x % 8),
                      inside ? from.weights[i] + k : job.a, inside);
    }
}

template <typename E, int TOKENS>
__device__ inline void copy_tokens(const few_job &job, const few_sources<E> &from, int k, few_stage<E, TOKENS> *to) {
    int row = threadIdx.x / 8;
#pragma unroll
    for (int i = 0; i < TOKENS; i += 16) {
        bool inside = i < from.rows_of_tokens && k < from.columns;
        if (TOKENS >= 16 || row < TOKENS)
            copy_async_16(to->tokens + tile_at(row + i, threadIdx.x % 8),
                          inside ? from.tokens + (int64_t)i * job.columns + k : job.x, inside);
    }
}

// [ahead]
// All but one of the stages are filled ahead. Of the second product the weights come first, while the kernel before
// still runs, and then the tokens, which are what it writes. A stage's copies are a group; groups end in order.
template <typename E, int TOKENS, bool PAIR, int STAGES>
__device__ inline void copy_ahead(const few_job &job, const few_sources<E> &from, few_stage<E, TOKENS> *stages) {
    for (int c = 0; c < STAGES - 1 && !PAIR; c++)
        copy_weights(job, from, c * TILE_DEPTH, &stages[c]);
    start_next_kernel();
    if (!PAIR)
        wait_for_kernel_before();
    for (int c = 0; c < STAGES - 1; c++) {
        if (PAIR)
            copy_weights(job, from, c * TILE_DEPTH, &stages[c]);
        copy_tokens(job, from, c * TILE_DEPTH, &stages[c]);
        copy_async_commit();
    }
}
// [/ahead]

// ---- Products

// [multiply]
template <typename E, int TOKENS, bool PAIR, int STAGES>
__device__ inline void multiply(const few_job &job, few_sources<E> from, int chunks, few_stage<E, TOKENS> *stages,
                                float (&sums)[TOKENS / 2]) {
    from.columns = min(from.columns, chunks * TILE_DEPTH); // what is beyond is another block's
    copy_ahead<E, TOKENS, PAIR, STAGES>(job, from, stages);
    for (int c = 0; c < chunks; c++) {
        few_stage<E, TOKENS> *stage = &stages[c % STAGES], *next = &stages[(c + STAGES - 1) % STAGES];
        copy_async_wait<STAGES - 2>(); // this chunk is here, for this thread's part
        shared_stores_done();          // and wgmma may read it
        wgmma_wait<0>();               // the chunk before is done with
        __syncthreads();               // all of that for all threads
        uint64_t weights = wgmma_operand(stage->weights), tokens = wgmma_operand(stage->tokens);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < TILE_DEPTH / 16; step++)
            few_mma<E>(sums, weights + 2 * step, tokens + 2 * step);
        wgmma_commit();
        if (c + STAGES - 1 < chunks) {
            copy_weights(job, from, (c + STAGES - 1) * TILE_DEPTH, next);
            copy_tokens(job, from, (c + STAGES - 1) * TILE_DEPTH, next);
        }
        copy_async_commit();
    }
    wgmma_wait<0>();
    wgmma_arrived(sums);
}
// [/multiply]

// ---- Joining the blocks of a cluster

// [push]
// The sums are 8 tiles of 8 rows, and each block of the cluster finishes some of them, gate's and up's of the same
// hidden units. Every block stores its part of a tile straight into the shared memory of the block that finishes it.
template <bool PAIR> struct few_share {
    static constexpr int tiles = PAIR ? 4 : 8; // of outputs
    int each;                                  // tiles a block finishes
    __device__ few_share(int split) : each(tiles / split) {
    }
    __device__ int owner(int tile) const {
        return tile % tiles / each;
    }
    // Where part `rank` of a tile lies, in rows of SUMS_PITCH floats for each token.
    __device__ int place(int rank, int tile) const {
        return rank * each * (8 / tiles) + tile / tiles * each + tile % tiles % each;
    }
};

__device__ inline void store_in(float *mine, unsigned rank, float value) {
    asm volatile("{\n"
                 ".reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "st.shared::cluster.f32 [remote], %2;\n"
                 "}" ::"r"(shared_address(mine)),
                 "r"(rank), "f"(value)
                 : "memory");
}

template <bool PAIR, int TOKENS>
__device__ inline void push(const float (&sums)[TOKENS / 2], int split, int rank, float (*to)[TOKENS][SUMS_PITCH]) {
    few_share<PAIR> share(split);
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int tile = threadIdx.x / WARP * 2 + half, owner = share.owner(tile), place = share.place(rank, tile);
#pragma unroll
        for (int i = 0; i < TOKENS / 4; i++) {
            float *at = &to[place][i / 2 * 8 + lane % 4 * 2 + i % 2][lane / 4],
                  value = sums[i / 2 * 4 + half * 2 + i % 2];
            if (split == 1)
                *at = value;
            else
                store_in(at, owner, value);
        }
    }
}
// [/push]

// [finish]
// Four rows of a token, of all parts in the order of the blocks.
template <int TOKENS>
__device__ inline void add_parts(const float (*parts)[TOKENS][SUMS_PITCH], int split, int step, int token, int row,
                                 float (&all)[4]) {
    for (int rank = 0; rank < split; rank++) {
        float4 part = *(const float4 *)&parts[rank * step][token][row];
        all[0] += part.x, all[1] += part.y, all[2] += part.z, all[3] += part.w;
    }
}

template <typename E, bool PAIR, int TOKENS>
__device__ inline void finish(const few_job &job, int first_row, int rank, const float (*parts)[TOKENS][SUMS_PITCH]) {
    int each = few_share<PAIR>(job.split).each, fours = 2 * each;
    for (int i = threadIdx.x; i < job.T * fours; i += FEW_THREADS) {
        int t = i / fours, tile = i % fours / 2, row = i % 2 * 4, output = first_row + (rank * each + tile) * 8 + row;
        if (output >= job.rows)
            continue;
        float outputs[4] = {}, up[4] = {};
        add_parts<TOKENS>(parts + tile, job.split, PAIR ? 2 * each : each, t, row, outputs);
        if (PAIR)
            add_parts<TOKENS>(parts + each + tile, job.split, 2 * each, t, row, up);
#pragma unroll
        for (int c = 0; c < 4 && PAIR; c++)
            outputs[c] = swiglu(outputs[c], up[c]);
        store_results<E>(job.out, (int64_t)t * job.rows + output, outputs);
    }
}

// [/finish]

// Launch: a warpgroup a block, `split` blocks a cluster for 64 rows of weights. Shared memory: STAGES times 16 KB and
// 24 KB of sums. Traffic: each weight once; the tokens
// once a block, from the L2.
template <typename E, int TOKENS, bool PAIR, int STAGES>
__global__ void __launch_bounds__(FEW_THREADS, 1) few_kernel(few_job job) {
#if HAS_WGMMA
    extern __shared__ __align__(1024) char shared[];
    few_shared<E, TOKENS, STAGES> &s = *(few_shared<E, TOKENS, STAGES> *)shared;
    int rank = job.split > 1 ? (int)cluster_rank() : 0;
    int first_row = (int)blockIdx.x / job.split * (PAIR ? BLOCK_ROWS / 2 : BLOCK_ROWS);
    int all = (job.columns + TILE_DEPTH - 1) / TILE_DEPTH, each = (all + job.split - 1) / job.split;
    int chunks = max(0, min(each, all - rank * each));
    float sums[TOKENS / 2] = {};
    few_sources<E> from = find_sources<E, PAIR>(job, first_row, rank * each * TILE_DEPTH);
    multiply<E, TOKENS, PAIR, STAGES>(job, from, chunks, s.stages, sums);
    if (job.split > 1)
        cluster_sync(); // all blocks have begun
    push<PAIR, TOKENS>(sums, job.split, rank, s.parts);
    if (job.split > 1)
        cluster_sync();
    else
        __syncthreads();
    finish<E, PAIR, TOKENS>(job, first_row, rank, s.parts);
#endif
}

template <typename E, int TOKENS, bool PAIR, int STAGES>
static fmoe_status launch(const few_job &job, bool overlap, cudaStream_t stream) {
    auto kernel = few_kernel<E, TOKENS, PAIR, STAGES>;
    int shared = (int)sizeof(few_shared<E, TOKENS, STAGES>);
    TRY(cuda_call("few_kernel", cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)));
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = (unsigned)job.split;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = (unsigned)(ceil_div(job.rows, PAIR ? BLOCK_ROWS / 2 : BLOCK_ROWS) * job.split);
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

template <typename E, int TOKENS>
static fmoe_status run(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, cudaStream_t stream) {
    int T = (int)args->T, d = (int)args->d, I = (int)args->I;
    few_job hidden = {}, output = {};
    bool overlap;
    hidden.a = args->gate, hidden.b = args->up, hidden.x = args->x;
    output.a = args->down, output.x = workspace;
    hidden.T = output.T = T;
    hidden.rows = output.columns = I, hidden.columns = output.rows = d;
    hidden.split = split_of(ceil_div(I, BLOCK_ROWS / 2), d);
    output.split = split_of(ceil_div(d, BLOCK_ROWS), I);
    hidden.out.to = workspace, output.out = mlp_target_of(args, join);
    TRY((launch<E, TOKENS, true, HIDDEN_STAGES>(hidden, false, stream)));
    TRY(mlp_wait(join, stream, &overlap));
    return launch<E, TOKENS, false, OUTPUT_STAGES>(output, overlap, stream);
}

template <typename E>
static fmoe_status run_tokens(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, cudaStream_t stream) {
    return (args->T <= 8 ? run<E, 8> : args->T <= 32 ? run<E, 32> : run<E, 64>)(args, join, workspace, stream);
}

fmoe_status mlp_few_tokens_into(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, size_t bytes,
                                cudaStream_t stream) {
    TRY(mlp_check(args, workspace, bytes, cuda_mlp_hidden_bytes(args)));
    TRY(mlp_check_rows(args, cuda_mlp_few(args), "at most 64 tokens, 16-bit types and multiples of 8 only"));
    if (args->T == 0)
        return FMOE_OK;
    return (args->dtype == FMOE_F16 ? run_tokens<__half> : run_tokens<__nv_bfloat16>)(args, join, workspace, stream);
}

extern "C" fmoe_status cuda_mlp_few_tokens(const void *args, void *workspace, size_t bytes, void *stream) {
    return mlp_few_tokens_into((const fmoe_mlp_args *)args, NULL, workspace, bytes, (cudaStream_t)stream);
}
