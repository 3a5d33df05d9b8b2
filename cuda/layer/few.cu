// Few tokens in evaluation: the routed branch in one kernel. A step that takes two microseconds is not worth a launch
// of its own. A cluster of eight blocks has a token or two: its 64 warps share the gate's rows, every block then
// chooses the experts for itself, every warp takes one of a token, and the sums meet in the blocks' shared memory.
// Where the MLP is the rung rows, its first product is in the same kernel.
#include "../topk/choice.cuh"
#include "few.cuh"

#include <cooperative_groups.h>

#define BLOCKS 8 // a cluster

// One instance of the top-k serves all sizes up to these: other ones take the steps one by one.
typedef warp_shape<8, TOPK_PAIR_TOPK, FORM_BEST> shape;
#define ROWS (2 * TOPK_PAIR_KEYS / (BLOCKS * WARPS)) // of the gate a warp
static_assert(BLOCKS * WARPS >= TOPK_PAIR_TOPK && shape::keys >= TOPK_PAIR_KEYS, "a warp a pair");

template <typename E, int TOKENS> struct cluster_shared {
    shape::memory memory[TOKENS];
    int32_t indices[TOKENS][TOPK_PAIR_TOPK];
    float scores[TOKENS][TOPK_PAIR_TOPK], weights[TOKENS][TOPK_PAIR_TOPK];
    alignas(16) float part[WARPS][few_columns<E>], sum[TOKENS][few_columns<E>]; // the first parts hold x̂ at first
};

// ---- Logits ----

// [few-logits]
// The warp's rows of the gate are asked for before x̂ is made.
template <typename E, int TOKENS>
__device__ inline void dot_gate(const few_task &a, int t, int first_row, int lane, float (*x_hat)[few_columns<E>],
                                float (&logit)[TOKENS][ROWS]) {
    constexpr int EACH = pack16<E>::count;
    for (int first = 0; first < a.d; first += few_columns<E>) {
        uint4 raw[ROWS][LOADS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                int row = first_row + r * BLOCKS * WARPS;
                raw[r][i] = read_part<E>(a.gate, row, row < 2 * a.choice.n ? a.d : 0, first + (i * WARP + lane) * EACH);
            }
        __syncthreads();
        normalise<E, TOKENS>(a, t, first, x_hat);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < LOADS; i++)
#pragma unroll
            for (int e = 0; e < EACH; e += 4)
#pragma unroll
                for (int token = 0; token < TOKENS; token++) {
                    float4 four = *(const float4 *)&x_hat[token][(i * WARP + lane) * EACH + e];
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        pack16<E> pack = as_pack<E>(raw[r][i]);
                        float &sum = logit[token][r];
                        sum = fmaf(four.x, to_f32(pack.at[e]), sum);
                        sum = fmaf(four.y, to_f32(pack.at[e + 1]), sum);
                        sum = fmaf(four.z, to_f32(pack.at[e + 2]), sum);
                        sum = fmaf(four.w, to_f32(pack.at[e + 3]), sum);
                    }
                }
    }
}
// [/few-logits]

// Every block gets all logits, where its top-k expects them. (The cluster's type has no name before sm_90.)
template <typename E, int TOKENS, typename Cluster>
__device__ inline void find_logits(const few_task &a, const Cluster &cluster, int t, int block, int warp, int lane,
                                   cluster_shared<E, TOKENS> &s) {
    int n = a.choice.n, first_row = warp * BLOCKS + block;
    float logit[TOKENS][ROWS] = {};
    for (int i = threadIdx.x; i < TOKENS * 2 * shape::keys; i += THREADS)
        if (i % shape::keys >= n)
            s.memory[i / (2 * shape::keys)].value[i / shape::keys % 2][i % shape::keys] = -INFINITY;
    dot_gate<E>(a, t, first_row, lane, s.part, logit);
    cluster.barrier_wait(); // all blocks have begun: their shared memory is there
#pragma unroll
    for (int i = 0; i < TOKENS; i++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            int row = first_row + r * BLOCKS * WARPS, side = row >= n, key = row - side * n;
            float z = warp_sum(logit[i][r]);
            if (row < 2 * n && lane < BLOCKS)
                *cluster.map_shared_rank(&s.memory[i].value[side][key], lane) = z + 0.0f; // −0 becomes +0
            if (row < 2 * n && lane == 0 && t + i < a.choice.T)
                a.logits[((int64_t)side * a.choice.T + t + i) * n + key] = z;
        }
}

// ---- The choice ----

// [choose]
// Token t + i by one warp, to shared memory: all that the kernel of chapter 3 does between its loads and its stores.
template <typename E, int TOKENS>
__device__ inline void choose_experts(topk_task a, int t, int i, int lane, cluster_shared<E, TOKENS> &s) {
    constexpr int S = 8, P = shape::held / shape::lanes, R = shape::choice_network::registers;
    candidates<shape> list;
    uint32_t keys[R];
    int64_t first = (int64_t)(t + i) * a.K; // where finish stores
    list.list(lane);
    a.indices = s.indices[i] - first, a.scores = s.scores[i] - first, a.weights = s.weights[i] - first;
    float log_sum = choose<shape, S, FORM_BEST, P, R>(a, s.memory[i], list, lane, keys);
    finish<shape, R>(a, t + i, s.memory[i], lane, log_sum, keys);
}
// [/choose]

// ---- The experts ----

// [pair]
// A warp's pair: its activation, and the first columns of its row of the up table, asked for before they are needed.
template <typename E>
__device__ inline float activate(const few_task &a, int t, int expert, float weight, int lane, uint4 (&up)[LOADS]) {
    constexpr int EACH = pack16<E>::count;
    float s = 0;
#pragma unroll
    for (int i = 0; i < LOADS; i++)
        up[i] = read_part<E>(a.up, expert, a.d, (i * WARP + lane) * EACH);
    for (int first = 0; first < a.d; first += few_columns<E>) {
        uint4 x[LOADS], down[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            down[i] = read_part<E>(a.down, expert, a.d, first + (i * WARP + lane) * EACH);
            x[i] = read_part<E>(a.x, t, a.d, first + (i * WARP + lane) * EACH);
        }
#pragma unroll
        for (int i = 0; i < LOADS; i++)
#pragma unroll
            for (int e = 0; e < EACH; e++)
                s = fmaf(to_f32(as_pack<E>(x[i]).at[e]), to_f32(as_pack<E>(down[i]).at[e]), s);
    }
    s = warp_sum(s);
    return s / (1 + expf(-s)) * weight;
}
// [/pair]

// Some columns of the block's sum for a token, of which the warps' parts are added in their order.
template <typename E, int TOKENS>
__device__ inline void add_warps(cluster_shared<E, TOKENS> &s, int token, float activation, const uint4 (&up)[LOADS],
                                 int warp, int lane) {
    constexpr int EACH = pack16<E>::count;
#pragma unroll
    for (int i = 0; i < LOADS; i++)
#pragma unroll
        for (int e = 0; e < EACH; e += 4) {
            pack16<E> row = as_pack<E>(up[i]);
            float4 four = {activation * to_f32(row.at[e]), activation * to_f32(row.at[e + 1]),
                           activation * to_f32(row.at[e + 2]), activation * to_f32(row.at[e + 3])};
            *(float4 *)&s.part[warp][(i * WARP + lane) * EACH + e] = four;
        }
    __syncthreads();
    for (int c = threadIdx.x * 4; c < few_columns<E>; c += THREADS * 4) {
        float4 all = {0, 0, 0, 0};
        for (int w = 0; w < WARPS; w++) {
            float4 part = *(const float4 *)&s.part[w][c];
            all.x += part.x, all.y += part.y, all.z += part.z, all.w += part.w;
        }
        *(float4 *)&s.sum[token][c] = all;
    }
    if (token + 1 < TOKENS)
        __syncthreads(); // the parts are read before the next token's are written
}

// [with-mlp]
// Behind the clusters of the routed branch come blocks that make the MLP's hidden units, a warp one: launched by
// themselves, beside this kernel, they would cost a fork and a join.
template <typename E> __device__ inline void make_hidden(const few_task &a, int block) {
    int64_t unit = (int64_t)(block / a.mlp.T) * WARPS + threadIdx.x / WARP;
    if (unit < a.mlp.I)
        hidden_unit<E>(a.mlp, (E *)a.hidden, unit, block % a.mlp.T);
}
// [/with-mlp]

// Launch: clusters of 8 blocks of 8 warps, each for one token or two, and behind them, WITH_MLP, as many blocks as the
// hidden units want. Shared memory: 40 KB for one token, 48 KB for two, or 22 and 28 KB in float32: what the top-k
// needs, the warps' parts of a sum, and the sums. Traffic: the gate once from memory and once a cluster from the L2;
// two rows a pair; a token's logits and sum, float32, once; the MLP's gate and up once.
// [few]
template <typename E, int TOKENS, bool WITH_MLP>
__global__ void __launch_bounds__(THREADS, 2) few_routed_kernel(const __grid_constant__ few_task a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    __shared__ cluster_shared<E, TOKENS> s;
    constexpr int EACH = pack16<E>::count, COLUMNS = few_columns<E>, OWN = COLUMNS / BLOCKS;
    auto cluster = cooperative_groups::this_cluster();
    int t = blockIdx.x / BLOCKS * TOKENS, block = blockIdx.x % BLOCKS, warp = threadIdx.x / WARP;
    int lane = threadIdx.x % WARP, K = a.choice.K, k = warp * BLOCKS + block, tokens = min(TOKENS, a.choice.T - t);
    if (WITH_MLP) {
        start_next_kernel();
        if ((int)blockIdx.x >= a.clusters * BLOCKS) {
            make_hidden<E>(a, blockIdx.x - a.clusters * BLOCKS);
            return;
        }
    }
    cluster.barrier_arrive();
    find_logits(a, cluster, t, block, warp, lane, s);
    cluster.sync();
    if (warp < TOKENS)
        choose_experts(a.choice, t, warp, lane, s);
    __syncthreads();
    for (int i = threadIdx.x; block == 0 && i < tokens * K; i += THREADS) {
        int64_t to = (int64_t)t * K + i;
        a.choice.indices[to] = s.indices[i / K][i % K];
        if (a.choice.scores)
            a.choice.scores[to] = s.scores[i / K][i % K];
    }
    uint4 up[TOKENS][LOADS] = {};
    float activation[TOKENS] = {};
#pragma unroll
    for (int i = 0; i < TOKENS; i++)
        if (k < K && i < tokens)
            activation[i] = activate<E>(a, t + i, s.indices[i][k], s.weights[i][k], lane, up[i]);
    for (int first = 0; first < a.d; first += COLUMNS) {
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            if (first > 0 && k < K && i < tokens)
#pragma unroll
                for (int j = 0; j < LOADS; j++)
                    up[i][j] = read_part<E>(a.up, s.indices[i][k], a.d, first + (j * WARP + lane) * EACH);
            add_warps(s, i, activation[i], up[i], warp, lane);
        }
        cluster.sync();
        for (int c = threadIdx.x; c < tokens * OWN; c += THREADS) {
            int i = c / OWN, column = block * OWN + c % OWN;
            float all = 0;
            for (int b = 0; b < BLOCKS; b++)
                all += *cluster.map_shared_rank(&s.sum[i][column], b);
            if (first + column < a.d)
                a.routed[(int64_t)(t + i) * a.d + first + column] = all;
        }
        cluster.sync();
    }
#endif
}
// [/few]

template <typename E, int TOKENS, bool WITH_MLP> static fmoe_status run(const few_task &a, cudaStream_t stream) {
    int64_t hidden = WITH_MLP ? ceil_div(a.mlp.I, WARPS) * a.mlp.T : 0;
    cudaLaunchAttribute clusters = {};
    clusters.id = cudaLaunchAttributeClusterDimension;
    clusters.val.clusterDim.x = BLOCKS, clusters.val.clusterDim.y = clusters.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = (unsigned)(a.clusters + ceil_div(hidden, BLOCKS)) * BLOCKS;
    config.blockDim = THREADS, config.stream = stream;
    config.attrs = &clusters, config.numAttrs = 1;
    cudaLaunchKernelEx(&config, few_routed_kernel<E, TOKENS, WITH_MLP>, a);
    return launched("few_routed_kernel");
}

bool few_fit(const fmoe_layer_args *args) {
    return fmoe_cuda_level() >= LEVEL_HOPPER && !args->training && args->T <= FEW_TOKENS && args->n <= TOPK_PAIR_KEYS &&
           args->K <= TOPK_PAIR_TOPK && args->d <= INT32_MAX &&
           args->d * (int64_t)fmoe_dtype_size(args->dtype) % 16 == 0;
}

// Beside the MLP there is room for eight clusters at once.
fmoe_status few_routed(const fmoe_layer_args *args, const layer_scratch &s, cudaStream_t stream) {
    few_task a = few_task_of(args, s);
    bool one = args->T <= FEW_TOKENS / 2;
    a.clusters = (int)ceil_div(args->T, one ? 1 : 2);
    WITH_DTYPE(args->dtype, E, return one ? run<E, 1, false>(a, stream) : run<E, 2, false>(a, stream));
}

// [few-layer]
fmoe_status few_layer(const fmoe_layer_args *args, const fmoe_mlp_args *mlp, const layer_scratch &s,
                      cudaStream_t stream) {
    const mlp_join join = {s.routed, NULL, 0, NULL};
    few_task a = few_task_of(args, s);
    a.clusters = (int)args->T, a.mlp = *mlp, a.hidden = s.mlp;
    WITH_DTYPE(args->dtype, E, TRY((run<E, 1, true>(a, stream))));
    return mlp_rows_output(mlp, &join, true, s.mlp, stream);
}
// [/few-layer]
