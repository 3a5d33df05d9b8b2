// Few tokens in evaluation: the routed branch in one kernel. A step that takes two microseconds is not worth a launch
// of its own. A cluster of eight blocks has a token: its 64 warps share the gate's rows, every block then chooses the
// experts for itself, every warp takes one of them, and the sums meet in the blocks' shared memory.
#include "../topk/choice.cuh"
#include "layer.cuh"

#include <cooperative_groups.h>

#define BLOCKS  8 // a cluster
#define WARPS   8
#define THREADS (WARPS * WARP)
#define LOADS   4 // of 16 bytes a lane and row

// One instance of the top-k serves all sizes up to these: other ones take the steps one by one.
typedef warp_shape<8, TOPK_PAIR_TOPK, FORM_BEST> shape;
#define ROWS (2 * TOPK_PAIR_KEYS / (BLOCKS * WARPS)) // of the gate a warp
static_assert(BLOCKS * WARPS >= TOPK_PAIR_TOPK && shape::keys >= TOPK_PAIR_KEYS, "a warp a pair");

typedef struct {
    topk_task choice;
    int d;
    const void *x, *gate, *down, *up;
    const float *mean, *var;
    float *logits, *routed;
} few_task;

template <typename E> struct cluster_shared {
    static constexpr int EACH = pack16<E>::count, COLUMNS = LOADS * WARP * EACH;
    shape::memory memory;
    int32_t indices[TOPK_PAIR_TOPK];
    float scores[TOPK_PAIR_TOPK], weights[TOPK_PAIR_TOPK];
    alignas(16) float part[WARPS][COLUMNS], sum[COLUMNS]; // part[0] holds x̂ at first
};

template <typename E> __device__ inline uint4 read_part(const void *table, int64_t row, int d, int column) {
    return column < d ? __ldg((const uint4 *)((const E *)table + row * d + column)) : make_uint4(0, 0, 0, 0);
}

template <typename E> __device__ inline pack16<E> as_pack(uint4 raw) {
    return *(pack16<E> *)&raw;
}

// ---- Logits ----

// [normalise]
// In evaluation the mean is a float32, so x − mean loses nothing that counts.
template <typename E> __device__ inline void normalise(const few_task &a, int t, int first, float *x_hat) {
    for (int c = threadIdx.x; c < cluster_shared<E>::COLUMNS; c += THREADS) {
        int column = first + c;
        bool inside = column < a.d;
        float x = inside ? to_f32(((const E *)a.x)[(int64_t)t * a.d + column]) - a.mean[column] : 0;
        x_hat[c] = x * rsqrtf((inside ? a.var[column] : 1) + (float)FMOE_NORM_EPS);
    }
}
// [/normalise]

// [few-logits]
// The warp's rows of the gate are asked for before x̂ is made, AT_ONCE rows at a time.
template <typename E, int AT_ONCE>
__device__ inline void dot_gate(const few_task &a, int t, int first_row, int rows, int lane, float *x_hat,
                                float (&logit)[ROWS]) {
    constexpr int EACH = pack16<E>::count;
    for (int first = 0; first < a.d; first += cluster_shared<E>::COLUMNS)
#pragma unroll
        for (int r = 0; r < ROWS; r += AT_ONCE) {
            uint4 raw[AT_ONCE][LOADS];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
                for (int i = 0; i < LOADS; i++) {
                    int row = first_row + (r + j) * BLOCKS * WARPS;
                    raw[j][i] = read_part<E>(a.gate, row, row < rows ? a.d : 0, first + (i * WARP + lane) * EACH);
                }
            if (r == 0) {
                __syncthreads();
                normalise<E>(a, t, first, x_hat);
                __syncthreads();
            }
#pragma unroll
            for (int i = 0; i < LOADS; i++)
#pragma unroll
                for (int e = 0; e < EACH; e += 4) {
                    float4 four = *(const float4 *)(x_hat + (i * WARP + lane) * EACH + e);
#pragma unroll
                    for (int j = 0; j < AT_ONCE; j++) {
                        pack16<E> pack = as_pack<E>(raw[j][i]);
                        logit[r + j] = fmaf(four.x, to_f32(pack.at[e]), logit[r + j]);
                        logit[r + j] = fmaf(four.y, to_f32(pack.at[e + 1]), logit[r + j]);
                        logit[r + j] = fmaf(four.z, to_f32(pack.at[e + 2]), logit[r + j]);
                        logit[r + j] = fmaf(four.w, to_f32(pack.at[e + 3]), logit[r + j]);
                    }
                }
        }
}
// [/few-logits]

// Every block gets all logits, where its top-k expects them. (The cluster's type has no name before sm_90.)
template <typename E, int AT_ONCE, typename Cluster>
__device__ inline void find_logits(const few_task &a, const Cluster &cluster, int t, int block, int warp, int lane,
                                   cluster_shared<E> &s) {
    int n = a.choice.n, first_row = warp * BLOCKS + block;
    float logit[ROWS] = {};
    for (int i = threadIdx.x; i < 2 * shape::keys; i += THREADS)
        if (i % shape::keys >= n)
            s.memory.value[i / shape::keys][i % shape::keys] = -INFINITY;
    dot_gate<E, AT_ONCE>(a, t, first_row, 2 * n, lane, s.part[0], logit);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int row = first_row + r * BLOCKS * WARPS, side = row >= n, key = row - side * n;
        float z = warp_sum(logit[r]);
        if (row < 2 * n && lane < BLOCKS)
            *cluster.map_shared_rank(&s.memory.value[side][key], lane) = z + 0.0f; // −0 becomes +0
        if (row < 2 * n && lane == 0)
            a.logits[((int64_t)side * a.choice.T + t) * n + key] = z;
    }
}

// ---- The choice ----

// [choose]
// By one warp, to shared memory: all that the kernel of chapter 3 does between its loads and its stores.
template <typename E> __device__ inline void choose_experts(topk_task a, int t, int lane, cluster_shared<E> &s) {
    constexpr int S = 8, P = shape::held / shape::lanes, R = shape::choice_network::registers;
    candidates<shape> list;
    uint32_t keys[R];
    int64_t first = (int64_t)t * a.K; // where finish stores
    list.list(lane);
    a.indices = s.indices - first, a.scores = s.scores - first, a.weights = s.weights - first;
    float log_sum = choose<shape, S, FORM_BEST, P, R>(a, s.memory, list, lane, keys);
    finish<shape, R>(a, t, s.memory, lane, log_sum, keys);
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
    for (int first = 0; first < a.d; first += cluster_shared<E>::COLUMNS) {
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

// Up to COLUMNS columns of the block's sum, of which the warps' parts are added in their order.
template <typename E>
__device__ inline void add_warps(cluster_shared<E> &s, float activation, const uint4 (&up)[LOADS], int warp, int lane) {
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
    for (int c = threadIdx.x * 4; c < cluster_shared<E>::COLUMNS; c += THREADS * 4) {
        float4 all = {0, 0, 0, 0};
        for (int w = 0; w < WARPS; w++) {
            float4 part = *(const float4 *)&s.part[w][c];
            all.x += part.x, all.y += part.y, all.z += part.z, all.w += part.w;
        }
        *(float4 *)&s.sum[c] = all;
    }
}

// Launch: a cluster of 8 blocks of 8 warps a token. Shared memory: 40 KB (16-bit) or 22 KB: what the top-k needs, and
// the warps' parts of the sum. Traffic: the gate once from memory and once a token from the L2; two rows a pair; the
// token's logits and sum, float32, once.
// [few]
template <typename E, int AT_ONCE>
__global__ void __launch_bounds__(THREADS, AT_ONCE == ROWS ? 2 : 4)
    few_routed_kernel(const __grid_constant__ few_task a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    __shared__ cluster_shared<E> s;
    auto cluster = cooperative_groups::this_cluster();
    int t = blockIdx.x / BLOCKS, block = blockIdx.x % BLOCKS, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int K = a.choice.K, k = warp * BLOCKS + block;
    cluster.sync(); // all blocks have begun: their shared memory is there
    find_logits<E, AT_ONCE>(a, cluster, t, block, warp, lane, s);
    cluster.sync();
    if (warp == 0)
        choose_experts<E>(a.choice, t, lane, s);
    __syncthreads();
    if (block == 0 && threadIdx.x < K) {
        int64_t to = (int64_t)t * K + threadIdx.x;
        a.choice.indices[to] = s.indices[threadIdx.x];
        if (a.choice.scores)
            a.choice.scores[to] = s.scores[threadIdx.x];
    }
    uint4 up[LOADS] = {};
    int expert = k < K ? s.indices[k] : 0;
    float activation = k < K ? activate<E>(a, t, expert, s.weights[k], lane, up) : 0;
    for (int first = 0; first < a.d; first += cluster_shared<E>::COLUMNS) {
        if (first > 0 && k < K)
            for (int i = 0; i < LOADS; i++)
                up[i] = read_part<E>(a.up, expert, a.d, first + (i * WARP + lane) * pack16<E>::count);
        add_warps<E>(s, activation, up, warp, lane);
        cluster.sync();
        int column = block * (cluster_shared<E>::COLUMNS / BLOCKS) + threadIdx.x;
        if (threadIdx.x < cluster_shared<E>::COLUMNS / BLOCKS && first + column < a.d) {
            float all = 0;
            for (int b = 0; b < BLOCKS; b++)
                all += *cluster.map_shared_rank(&s.sum[column], b);
            a.routed[(int64_t)t * a.d + first + column] = all;
        }
        cluster.sync();
    }
#endif
}
// [/few]

template <typename E> static fmoe_status run(const few_task &a, cudaStream_t stream) {
    cudaLaunchAttribute clusters = {};
    clusters.id = cudaLaunchAttributeClusterDimension;
    clusters.val.clusterDim.x = BLOCKS, clusters.val.clusterDim.y = clusters.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = (unsigned)a.choice.T * BLOCKS, config.blockDim = THREADS, config.stream = stream;
    config.attrs = &clusters, config.numAttrs = 1;
    cudaLaunchKernelEx(&config, a.choice.T <= FEW_AT_ONCE ? few_routed_kernel<E, ROWS> : few_routed_kernel<E, ROWS / 2>,
                       a);
    return launched("few_routed_kernel");
}

bool few_fit(const fmoe_layer_args *args) {
    return fmoe_cuda_level() >= LEVEL_HOPPER && !args->training && args->T <= FEW_TOKENS && args->n <= TOPK_PAIR_KEYS &&
           args->K <= TOPK_PAIR_TOPK && args->d <= INT32_MAX &&
           args->d * (int64_t)fmoe_dtype_size(args->dtype) % 16 == 0;
}

fmoe_status few_routed(const fmoe_layer_args *args, const layer_scratch &s, cudaStream_t stream) {
    topk_task choice = {(int)args->T, (int)args->n, (int)args->K, args->norm_topk_prob, FMOE_F32, s.logits,
                        s.indices,    args->scores, NULL};
    few_task a = {choice,         (int)args->d,       args->x,           args->router_gate, args->down_embed,
                  args->up_embed, args->running_mean, args->running_var, s.logits,          s.routed};
    WITH_DTYPE(args->dtype, E, return run<E>(a, stream));
}
