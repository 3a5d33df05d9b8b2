// Exercise 3.3, solution: a block a token. Keys and candidates lie in shared memory, and each is ranked by counting who
// beats it, which needs no order and no branch.
#include "plugin.h"

#include <cuda_fp16.h>
#include <math.h>

// As in chapter 3: the sum's bits, made to rise with the sum, above the complement of the index.
__device__ static int64_t pack(float sum, int32_t index) {
    sum += 0.0f; // −0 becomes +0
    int32_t bits = __float_as_int(sum);
    bits ^= (bits >> 31) & 0x7fffffff;
    bits = sum == sum ? bits : (int32_t)0x80000000;
    return (int64_t)((uint64_t)(uint32_t)bits << 32 | (uint32_t)~index);
}

__device__ static int32_t index_of(int64_t packed) {
    return (int32_t) ~(uint32_t)packed;
}

// Logit i of a side of a token, whatever its type.
__device__ static float logit(const fmoe_topk_args &a, int64_t side, int64_t t, int64_t i) {
    int64_t at = (side * a.T + t) * a.n + i;
    if (a.dtype == FMOE_F32)
        return ((const float *)a.logits)[at];
    if (a.dtype == FMOE_F16)
        return __half2float(((const __half *)a.logits)[at]);
    return __uint_as_float((uint32_t)((const uint16_t *)a.logits)[at] << 16);
}

enum { THREADS = 256, WARP = 32 };

// What a block keeps of its token.
typedef struct {
    float *z;         // [2, n] logits
    int64_t *packed;  // [candidates, or 2n where that is more] what is being ranked
    float *value;     // [2, m] ranked keys: values, m = min(K, n)
    int32_t *key;     // [2, m] and numbers
    int64_t m, count; // count: candidates
} token;

__host__ __device__ static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

__host__ __device__ static int64_t count_candidates(int64_t n, int64_t K) {
    int64_t count = 0;
    for (int64_t i = 0; i < smaller(K, n); i++)
        count += smaller(n, K / (i + 1));
    return count;
}

static size_t shared_bytes(const fmoe_topk_args *a) {
    int64_t m = smaller(a->K, a->n), count = count_candidates(a->n, a->K);
    return (size_t)((count > 2 * a->n ? count : 2 * a->n) * 8 + 2 * a->n * 4 + 2 * m * 8);
}

__device__ static token lay_out(const fmoe_topk_args &a, int64_t *shared, int64_t count) {
    token k;
    k.m = smaller(a.K, a.n);
    k.count = count;
    k.packed = shared;
    k.z = (float *)(shared + (count > 2 * a.n ? count : 2 * a.n));
    k.value = k.z + 2 * a.n;
    k.key = (int32_t *)(k.value + 2 * k.m);
    return k;
}

// Each thread ranks keys of its own against all others; all lanes of a warp read the same word at a time, a broadcast.
__device__ static void rank_sides(const fmoe_topk_args &a, token k, int64_t t) {
    for (int64_t i = threadIdx.x; i < 2 * a.n; i += THREADS) {
        k.z[i] = logit(a, i / a.n, t, i % a.n);
        k.packed[i] = pack(k.z[i], (int32_t)(i % a.n));
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < 2 * a.n; i += THREADS) {
        const int64_t *side = k.packed + i / a.n * a.n;
        int64_t mine = k.packed[i], place = 0;
        for (int64_t j = 0; j < a.n; j++)
            place += side[j] > mine;
        if (place < k.m) {
            k.value[i / a.n * k.m + place] = k.z[i];
            k.key[i / a.n * k.m + place] = (int32_t)(i % a.n);
        }
    }
    __syncthreads();
}

// The staircase, row by row; the threads share out a row.
__device__ static void list_candidates(const fmoe_topk_args &a, token k) {
    int64_t first = 0;
    for (int64_t i = 0; i < k.m; i++) {
        int64_t length = smaller(a.n, a.K / (i + 1));
        for (int64_t j = threadIdx.x; j < length; j += THREADS)
            k.packed[first + j] = pack(k.value[i] + k.value[k.m + j], (int32_t)(k.key[i] * a.n + k.key[k.m + j]));
        first += length;
    }
    __syncthreads();
}

// Sums over a warp, in the same order each time; every lane has the result.
__device__ static float warp_sum(float sum) {
    for (int apart = WARP / 2; apart > 0; apart /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    return sum;
}

// log Σ exp(z − best) of a side, by one warp. The best key has rank 0.
__device__ static float log_sum(const fmoe_topk_args &a, token k, int64_t side) {
    float sum = 0;
    for (int64_t i = threadIdx.x % WARP; i < a.n; i += WARP)
        sum += expf(k.z[side * a.n + i] - k.value[side * k.m]);
    return logf(warp_sum(sum));
}

// A block of 256 threads a token. Shared memory as shared_bytes says: 4.3 KB at n 128, K 64, 31 KB at n 320, K 512.
// Reads a token's logits once and writes its K indices, scores and weights once.
__global__ static void __launch_bounds__(THREADS) choose(fmoe_topk_args a, int64_t count) {
    extern __shared__ int64_t shared[];
    __shared__ float shift[2], total;
    int64_t t = blockIdx.x;
    token k = lay_out(a, shared, count);
    rank_sides(a, k, t);
    list_candidates(a, k);
    if (threadIdx.x < 2 * WARP) {
        float log = log_sum(a, k, threadIdx.x / WARP);
        if (threadIdx.x % WARP == 0)
            shift[threadIdx.x / WARP] = log;
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < k.count; i += THREADS) {
        int64_t mine = k.packed[i], place = 0;
        for (int64_t j = 0; j < k.count; j++)
            place += k.packed[j] > mine;
        if (place < a.K) {
            int32_t pair = index_of(mine);
            float score = k.z[pair / a.n] - k.value[0] + (k.z[a.n + pair % a.n] - k.value[k.m]) - shift[0] - shift[1];
            a.indices[t * a.K + place] = pair;
            a.scores[t * a.K + place] = score;
            a.weights[t * a.K + place] = expf(score);
        }
    }
    if (!a.norm_topk_prob)
        return;
    __syncthreads(); // what the block wrote to memory is seen by all of it
    if (threadIdx.x < WARP) {
        float sum = 0;
        for (int64_t i = threadIdx.x; i < a.K; i += WARP)
            sum += a.weights[t * a.K + i];
        sum = warp_sum(sum);
        if (threadIdx.x == 0)
            total = sum;
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < a.K; i += THREADS)
        a.weights[t * a.K + i] /= total;
}

static bool fits(const void *args) {
    return shared_bytes((const fmoe_topk_args *)args) <= 48 * 1024;
}

static fmoe_status run(const void *args, void *workspace, size_t bytes, void *stream) {
    fmoe_topk_args a = *(const fmoe_topk_args *)args;
    (void)workspace, (void)bytes;
    if (a.T == 0)
        return FMOE_OK;
    choose<<<(unsigned)a.T, THREADS, shared_bytes(&a), (cudaStream_t)stream>>>(a, count_candidates(a.n, a.K));
    return cudaGetLastError() == cudaSuccess ? FMOE_OK : FMOE_CUDA;
}

const fmoe_plugin fmoe_plugin_rung = {
    FMOE_STEPS_VERSION, "topk", "a token a block", run, BACKEND_CUDA, 0, NULL, fits, NULL};
