// Exercise 8.3, solution: the top-k, which keeps one block busy, runs beside the hidden units, which do not need it.
#include "plugin.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define WARP        32
#define THREADS     256
#define MOST_TOKENS 8
#define MOST_CHOSEN 256

// Intermediate results, in the workspace.
typedef struct {
    float *hidden;     // [T, I]
    float *activation; // [T, K]: first the routing weights
    float *routed;     // [T, d]
    size_t bytes;
} plan;

static plan lay_out(const fmoe_layer_args *a, void *workspace) {
    plan p;
    p.hidden = (float *)workspace;
    p.activation = p.hidden + a->T * a->I;
    p.routed = p.activation + a->T * a->K;
    p.bytes = (size_t)(a->T * (a->I + a->K + a->d)) * sizeof(float);
    return p;
}

__device__ inline float sum_of_warp(float sum) {
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(0xffffffff, sum, distance);
    return sum;
}

template <typename E> __device__ float dot_by_warp(int64_t count, const E *a, const E *b) {
    float sum = 0;
    for (int64_t i = threadIdx.x % WARP; i < count; i += WARP)
        sum += (float)a[i] * (float)b[i];
    return sum_of_warp(sum);
}

__device__ inline float silu(float s) {
    return s / (1 + expf(-s));
}

// ---- Router ----

// A warp a token and key, THREADS / WARP a block; no shared memory. Reads a token, the statistics and a row of the
// gate.
template <typename E> __global__ void logits_kernel(fmoe_layer_args a) {
    int64_t warp = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP, t = warp / (2 * a.n),
            key = warp % (2 * a.n);
    if (t >= a.T)
        return;
    const E *x = (const E *)a.x + t * a.d, *gate = (const E *)a.router_gate + key * a.d;
    float sum = 0;
    for (int64_t h = threadIdx.x % WARP; h < a.d; h += WARP) {
        float scale = rsqrtf(a.running_var[h] + (float)FMOE_NORM_EPS);
        sum += ((float)x[h] - a.running_mean[h]) * scale * (float)gate[h];
    }
    sum = sum_of_warp(sum);
    if (threadIdx.x % WARP == 0)
        a.router_logits[(key / a.n * a.T + t) * a.n + key % a.n] = sum;
}

// log Σ exp of a side, by every thread of a warp.
__device__ float log_sum_exp(int64_t n, const float *z) {
    float most = z[0], sum = 0;
    for (int64_t i = 1; i < n; i++)
        most = fmaxf(most, z[i]);
    for (int64_t i = threadIdx.x % WARP; i < n; i += WARP)
        sum += expf(z[i] - most);
    return most + logf(sum_of_warp(sum));
}

// A key's rank is the number of keys that beat it. Only the K best are of interest.
__device__ void rank_side(int64_t n, int64_t K, const float *z, float *value, int *key) {
    for (int64_t i = threadIdx.x; i < n; i += THREADS) {
        int64_t rank = 0;
        for (int64_t j = 0; j < n; j++)
            rank += z[j] > z[i] || (z[j] == z[i] && j < i);
        if (rank < K) {
            value[rank] = z[i];
            key[rank] = (int)i;
        }
    }
}

// A token's top-k by a block of THREADS: both sides ranked, then the candidates (a + 1)(b + 1) <= K, each of which
// takes the place of the number of candidates that beat it. 22 KB of shared memory; reads 2n logits, writes 3K numbers.
__device__ void topk_by_block(const fmoe_layer_args &a, int64_t t, float *weights) {
    __shared__ float value[2][MOST_CHOSEN], sum[8 * MOST_CHOSEN], total;
    __shared__ int key[2][MOST_CHOSEN], index[8 * MOST_CHOSEN], count;
    const float *x = a.router_logits + t * a.n, *y = a.router_logits + (a.T + t) * a.n;
    rank_side(a.n, a.K, x, value[0], key[0]);
    rank_side(a.n, a.K, y, value[1], key[1]);
    __syncthreads();
    // Row i of the staircase has the partners 0 to K / (i + 1) − 1; it begins where the rows above it end.
    int rows = (int)min(a.n, a.K);
    for (int i = threadIdx.x; i < rows; i += THREADS) {
        int at = 0;
        for (int above = 0; above < i; above++)
            at += min(rows, (int)a.K / (above + 1));
        int partners = min(rows, (int)a.K / (i + 1));
        for (int j = 0; j < partners; j++) {
            sum[at + j] = value[0][i] + value[1][j];
            index[at + j] = key[0][i] * (int)a.n + key[1][j];
        }
        if (i == rows - 1)
            count = at + partners;
    }
    __syncthreads();
    float shift = log_sum_exp(a.n, x) + log_sum_exp(a.n, y);
    for (int c = threadIdx.x; c < count; c += THREADS) {
        int64_t place = 0;
        for (int other = 0; other < count; other++)
            place += sum[other] > sum[c] || (sum[other] == sum[c] && index[other] < index[c]);
        if (place < a.K) {
            a.indices[t * a.K + place] = index[c];
            a.scores[t * a.K + place] = sum[c] - shift;
            weights[t * a.K + place] = expf(sum[c] - shift);
        }
    }
    if (!a.norm_topk_prob)
        return;
    __syncthreads();
    if (threadIdx.x == 0) {
        total = 0;
        for (int64_t k = 0; k < a.K; k++)
            total += weights[t * a.K + k];
    }
    __syncthreads();
    for (int64_t k = threadIdx.x; k < a.K; k += THREADS)
        weights[t * a.K + k] /= total;
}

// ---- Both branches ----

// A hidden unit of a token by a warp.
template <typename E> __device__ void hidden_unit(const fmoe_layer_args &a, const plan &p, int64_t warp) {
    int64_t t = warp / a.I, i = warp % a.I;
    if (t >= a.T)
        return;
    const E *x = (const E *)a.x + t * a.d;
    float gate = dot_by_warp(a.d, x, (const E *)a.gate_proj + i * a.d);
    float up = dot_by_warp(a.d, x, (const E *)a.up_proj + i * a.d);
    if (threadIdx.x % WARP == 0)
        p.hidden[t * a.I + i] = silu(gate) * up;
}

// A warp a pair, THREADS / WARP a block; no shared memory. Reads a row of down a pair.
template <typename E> __global__ void activate_kernel(fmoe_layer_args a, plan p) {
    int64_t pair = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (pair >= a.T * a.K)
        return;
    const E *x = (const E *)a.x + pair / a.K * a.d, *down = (const E *)a.down_embed + a.indices[pair] * a.d;
    float s = dot_by_warp(a.d, x, down);
    if (threadIdx.x % WARP == 0)
        p.activation[pair] *= silu(s);
}

// A thread a column of a token, THREADS a block; no shared memory. Reads an element of K rows of up.
template <typename E> __global__ void routed_kernel(fmoe_layer_args a, plan p) {
    int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, t = at / a.d;
    if (t >= a.T)
        return;
    float sum = 0;
    for (int64_t k = 0; k < a.K; k++)
        sum += p.activation[t * a.K + k] * (float)((const E *)a.up_embed)[a.indices[t * a.K + k] * a.d + at % a.d];
    p.routed[at] = sum;
}

// A warp a column of a token, THREADS / WARP a block; no shared memory. Reads a row of the MLP's down, rounds y once.
template <typename E> __global__ void output_kernel(fmoe_layer_args a, plan p) {
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP, t = at / a.d;
    if (t >= a.T)
        return;
    const E *down = (const E *)a.down_proj + at % a.d * a.I;
    float sum = 0;
    for (int64_t i = threadIdx.x % WARP; i < a.I; i += WARP)
        sum += p.hidden[t * a.I + i] * (float)down[i];
    sum = sum_of_warp(sum);
    if (threadIdx.x % WARP == 0)
        ((E *)a.y)[at] = (E)(sum + p.routed[at]);
}

// Blocks 0 to T − 1 of THREADS have a token's top-k each, with the shared memory of topk_by_block; all others have a
// warp a hidden unit, and read the MLP's first two matrices meanwhile.
template <typename E> __global__ void topk_and_hidden_kernel(fmoe_layer_args a, plan p) {
    if (blockIdx.x < a.T)
        topk_by_block(a, blockIdx.x, p.activation);
    else
        hidden_unit<E>(a, p, ((blockIdx.x - a.T) * THREADS + threadIdx.x) / WARP);
}

static unsigned blocks(int64_t threads) {
    return (unsigned)((threads + THREADS - 1) / THREADS);
}

template <typename E> static void layer(const fmoe_layer_args &a, const plan &p, cudaStream_t stream) {
    logits_kernel<E><<<blocks(a.T * 2 * a.n * WARP), THREADS, 0, stream>>>(a);
    topk_and_hidden_kernel<E><<<(unsigned)a.T + blocks(a.T * a.I * WARP), THREADS, 0, stream>>>(a, p);
    activate_kernel<E><<<blocks(a.T * a.K * WARP), THREADS, 0, stream>>>(a, p);
    routed_kernel<E><<<blocks(a.T * a.d), THREADS, 0, stream>>>(a, p);
    output_kernel<E><<<blocks(a.T * a.d * WARP), THREADS, 0, stream>>>(a, p);
}

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    fmoe_layer_args a = *(const fmoe_layer_args *)args;
    plan p = lay_out(&a, workspace);
    (void)workspace_bytes;
    if (a.T == 0)
        return FMOE_OK;
    if (a.dtype == FMOE_F32)
        layer<float>(a, p, (cudaStream_t)stream);
    else if (a.dtype == FMOE_F16)
        layer<__half>(a, p, (cudaStream_t)stream);
    else
        layer<__nv_bfloat16>(a, p, (cudaStream_t)stream);
    return cudaGetLastError() == cudaSuccess ? FMOE_OK : FMOE_CUDA;
}

static size_t needed(const void *args) {
    return lay_out((const fmoe_layer_args *)args, NULL).bytes;
}

static bool few_tokens(const void *args) {
    const fmoe_layer_args *a = (const fmoe_layer_args *)args;
    return a->T <= MOST_TOKENS && a->K <= MOST_CHOSEN && !a->training;
}

const fmoe_plugin fmoe_plugin_rung = {FMOE_STEPS_VERSION, "layer", "five kernels", run, BACKEND_CUDA, 0, needed,
                                      few_tokens,         NULL};
