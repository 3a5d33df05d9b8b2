// topk_backward, the first rungs: from the gradients of the routing weights to those of the logits (chapter 9). A key
// collects from every chosen pair that it is part of; the rungs differ in how.
#include "backward.cuh"

fmoe_status backward_check(int64_t T, int64_t n, int64_t K, fmoe_dtype dtype, const void *logits,
                           const int32_t *indices, const float *dlogits) {
    TRY(fmoe_check_tokens(T));
    TRY(fmoe_check_size("num_keys", n));
    if (n > FMOE_CUDA_MAX_KEYS)
        return fmoe_fail(FMOE_UNSUPPORTED, "num_keys = %lld exceeds %d, the most on the GPU", (long long)n,
                         FMOE_CUDA_MAX_KEYS);
    TRY(fmoe_check_topk(K, "n²", n * n));
    if (K > FMOE_CUDA_MAX_TOPK)
        return fmoe_fail(FMOE_UNSUPPORTED, "num_experts_per_tok = %lld exceeds %d, the most on the GPU", (long long)K,
                         FMOE_CUDA_MAX_TOPK);
    TRY(check_dtype(dtype));
    TRY(fmoe_check_shape("tokens", T, "num_keys", n));
    TRY(fmoe_check_shape("tokens", T, "num_experts_per_tok", K));
    if (T > INT32_MAX)
        return fmoe_fail(FMOE_UNSUPPORTED, "tokens = %lld exceeds %d, the most on the GPU", (long long)T, INT32_MAX);
    TRY(fmoe_check_pointer("router_logits", logits, 2 * T * n));
    TRY(fmoe_check_pointer("indices", indices, T * K));
    return fmoe_check_pointer("dlogits", dlogits, 2 * T * n);
}

fmoe_status backward_from_args(const void *args, void *workspace, size_t workspace_bytes, size_t needed,
                               backward_task *task) {
    const fmoe_topk_backward_args *a = (const fmoe_topk_backward_args *)args;
    TRY(backward_check(a->T, a->n, a->K, a->dtype, a->logits, a->indices, a->dlogits));
    if (a->T > 0 || workspace)
        TRY(check_workspace(workspace, workspace_bytes, needed));
    *task = {(int)a->T, (int)a->n,  (int)a->K, a->norm_topk_prob,   a->dtype,   a->logits, a->indices, a->dweights,
             NULL,      a->dlogits, workspace, reciprocal_of(a->n), a->T * a->n};
    return FMOE_OK;
}

// ---- What the three rungs below share: a warp lists the gradients of a token's pairs

typedef struct {
    uint16_t x, y;  // the pair's keys; NO_KEY for an index that is none
    float gradient; // of its score
} pair;

#define NO_KEY 0xffff

typedef struct {
    float largest, log_sum; // log Σ exp z = largest + log_sum
} log_sum_exp;

template <typename E> __device__ log_sum_exp side_sum(int n, const E *z, int lane) {
    float largest = -INFINITY, sum = 0;
    for (int i = lane; i < n; i += WARP)
        largest = fmaxf(largest, to_f32(z[i]));
    largest = warp_max(largest);
    for (int i = lane; i < n; i += WARP)
        sum += expf(to_f32(z[i]) - largest);
    return {largest, logf(warp_sum(sum))};
}

__device__ inline float log_probability(float z, log_sum_exp side) {
    return (z - side.largest) - side.log_sum;
}

// [list-pairs]
// The gradients of all scores of a token, by the formulas: scores, weights, their sum and mean, gradients.
template <typename E>
__device__ void list_pairs(const backward_task &a, int64_t t, int lane, log_sum_exp side_x, log_sum_exp side_y,
                           pair *list) {
    const E *x = side_of_token<E>(a, 0, t), *y = side_of_token<E>(a, 1, t);
    const float *dweights = a.dweights ? a.dweights + t * a.K : NULL;
    float best = -INFINITY, sum = 0, mean = 0;
    for (int k = lane; k < a.K; k += WARP) {
        int32_t index = a.indices[t * a.K + k], i = index / a.n, j = index % a.n;
        list[k] = {NO_KEY, NO_KEY, -INFINITY};
        if (is_pair(a, index))
            list[k] = {(uint16_t)i, (uint16_t)j,
                       log_probability(to_f32(x[i]), side_x) + log_probability(to_f32(y[j]), side_y)};
        best = fmaxf(best, list[k].gradient);
    }
    best = a.norm_topk_prob ? warp_max(best) : 0;
    for (int k = lane; k < a.K; k += WARP) {
        list[k].gradient = expf(list[k].gradient - best);
        sum += list[k].gradient;
        mean += dweights ? list[k].gradient * dweights[k] : 0;
    }
    sum = a.norm_topk_prob ? warp_sum(sum) : 1;
    mean = a.norm_topk_prob ? warp_sum(mean) / sum : 0;
    for (int k = lane; k < a.K; k += WARP)
        list[k].gradient = dweights ? list[k].gradient / sum * (dweights[k] - mean) : 0;
}
// [/list-pairs]

// One side of log-softmax backwards, in place: each key's share of the total goes.
template <typename E>
__device__ void side_backward(int n, const E *z, log_sum_exp side, int lane, const float *dlog_p, float *dlogits) {
    float total = 0;
    for (int i = lane; i < n; i += WARP)
        total += dlog_p[i];
    total = warp_sum(total);
    for (int i = lane; i < n; i += WARP)
        dlogits[i] = dlog_p[i] - expf(log_probability(to_f32(z[i]), side)) * total;
}

// ---- Rung `atomics`

#define ATOMICS_WARPS 4

// A warp a token, 4 warps a block; no shared memory. Reads logits (three times, twice from a cache), indices and
// dweights; writes 8 bytes a pair.
template <typename E> __global__ void atomics_list(backward_task a) {
    int lane = threadIdx.x % WARP;
    int64_t t = (int64_t)blockIdx.x * ATOMICS_WARPS + threadIdx.x / WARP;
    if (t >= a.T)
        return;
    log_sum_exp x = side_sum(a.n, side_of_token<E>(a, 0, t), lane);
    log_sum_exp y = side_sum(a.n, side_of_token<E>(a, 1, t), lane);
    list_pairs<E>(a, t, lane, x, y, (pair *)a.workspace + t * a.K);
}

// [atomics]
// A thread a pair, 256 a block; no shared memory. Reads 8 bytes a pair and adds two floats in the L2: in the order in
// which they happen to arrive.
__global__ void atomics_add(backward_task a) {
    int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, t = at / a.K;
    if (t >= a.T)
        return;
    pair p = ((const pair *)a.workspace)[at];
    if (p.x == NO_KEY)
        return;
    atomicAdd(a.dlogits + t * a.n + p.x, p.gradient);
    atomicAdd(a.dlogits + (a.T + t) * a.n + p.y, p.gradient);
}
// [/atomics]

// A warp a side of a token, 4 a block; no shared memory. Reads logits and dlogits, writes dlogits in place.
template <typename E> __global__ void atomics_softmax(backward_task a) {
    int lane = threadIdx.x % WARP;
    int64_t row = (int64_t)blockIdx.x * ATOMICS_WARPS + threadIdx.x / WARP;
    if (row >= 2 * (int64_t)a.T)
        return;
    const E *z = (const E *)a.logits + row * a.n;
    float *dlogits = a.dlogits + row * a.n;
    side_backward(a.n, z, side_sum(a.n, z, lane), lane, dlogits, dlogits);
}

extern "C" size_t cuda_topk_backward_atomics_workspace(const void *args) {
    const fmoe_topk_backward_args *a = (const fmoe_topk_backward_args *)args;
    return (size_t)(a->T * a->K) * sizeof(pair);
}

extern "C" fmoe_status cuda_topk_backward_atomics(const void *args, void *workspace, size_t workspace_bytes,
                                                  void *stream) {
    backward_task a;
    TRY(backward_from_args(args, workspace, workspace_bytes, cuda_topk_backward_atomics_workspace(args), &a));
    if (a.T == 0)
        return FMOE_OK;
    cudaStream_t s = (cudaStream_t)stream;
    int64_t T = a.T, threads = ATOMICS_WARPS * WARP;
    TRY(cuda_call("cudaMemsetAsync", cudaMemsetAsync(a.dlogits, 0, (size_t)(2 * T * a.n) * sizeof(float), s)));
    WITH_DTYPE(a.dtype, E, atomics_list<E><<<(unsigned)ceil_div(T, ATOMICS_WARPS), threads, 0, s>>>(a));
    TRY(launched("atomics_list"));
    atomics_add<<<(unsigned)ceil_div(T * a.K, 256), 256, 0, s>>>(a);
    TRY(launched("atomics_add"));
    WITH_DTYPE(a.dtype, E, atomics_softmax<E><<<(unsigned)ceil_div(2 * T, ATOMICS_WARPS), threads, 0, s>>>(a));
    return launched("atomics_softmax");
}

// ---- Rungs `gather` and `fixed-point`: everything of a token stays in the shared memory of its warp

// The gradients that have arrived at every key, `dlog_p` of both sides [2n]: each key walks the list in its order.
// [gather]
__device__ inline void walk(int n, int K, const pair *list, int lane, float *dlog_p) {
    for (int key = lane; key < n; key += WARP) {
        float of_x = 0, of_y = 0;
        for (int k = 0; k < K; k++) {
            pair p = list[k];
            of_x += p.x == key ? p.gradient : 0;
            of_y += p.y == key ? p.gradient : 0;
        }
        dlog_p[key] = of_x;
        dlog_p[n + key] = of_y;
    }
}
// [/gather]

// The same by integer atomics: integers add up to the same sum in any order. False where numbers do not fit them.
// [integer-atomics]
__device__ inline bool add_integers(int n, int K, const pair *list, int lane, float *dlog_p) {
    float size = 0, scale, unscale;
    int *sums = (int *)dlog_p;
    for (int k = lane; k < K; k += WARP)
        size += fabsf(list[k].gradient);
    if (!fixed_point(warp_sum(size), &scale, &unscale))
        return false;
    for (int i = lane; i < 2 * n; i += WARP)
        sums[i] = 0;
    __syncwarp();
    for (int k = lane; k < K; k += WARP)
        if (list[k].x != NO_KEY) {
            int gradient = __float2int_rn(list[k].gradient * scale);
            atomicAdd(sums + list[k].x, gradient);
            atomicAdd(sums + n + list[k].y, gradient);
        }
    __syncwarp();
    for (int i = lane; i < 2 * n; i += WARP)
        dlog_p[i] = (float)sums[i] * unscale;
    return true;
}
// [/integer-atomics]

static size_t token_bytes(int n, int K) {
    return (size_t)K * sizeof(pair) + (size_t)n * 2 * sizeof(float);
}

// A warp a token, blockDim.x / 32 of them a block. Shared memory a warp: the list (8 bytes a pair) and 2n floats. Reads
// logits once from memory and twice more from a cache, indices and dweights likewise; writes dlogits once.
template <typename E, bool INTEGERS> __global__ void token_a_warp(backward_task a) {
    extern __shared__ pair shared[];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int64_t t = (int64_t)blockIdx.x * warps + warp;
    if (t >= a.T)
        return;
    pair *list = shared + warp * (a.K + a.n); // a pair is as long as two floats
    float *dlog_x = (float *)(list + a.K), *dlog_y = dlog_x + a.n;
    const E *x = side_of_token<E>(a, 0, t), *y = side_of_token<E>(a, 1, t);
    log_sum_exp side_x = side_sum(a.n, x, lane), side_y = side_sum(a.n, y, lane);
    list_pairs<E>(a, t, lane, side_x, side_y, list);
    __syncwarp();
    if (!INTEGERS || !add_integers(a.n, a.K, list, lane, dlog_x))
        walk(a.n, a.K, list, lane, dlog_x);
    __syncwarp();
    side_backward(a.n, x, side_x, lane, dlog_x, a.dlogits + t * a.n);
    side_backward(a.n, y, side_y, lane, dlog_y, a.dlogits + (a.T + t) * a.n);
}

template <bool INTEGERS> static fmoe_status run_token_a_warp(const void *args, void *stream) {
    backward_task a;
    TRY(backward_from_args(args, NULL, 0, 0, &a));
    if (a.T == 0)
        return FMOE_OK;
    int warps = token_bytes(a.n, a.K) <= 12 * 1024 ? 4 : 1; // 48 KB a block, on every GPU
    WITH_DTYPE(
        a.dtype, E,
        token_a_warp<E, INTEGERS>
        <<<(unsigned)ceil_div(a.T, warps), warps * WARP, warps * token_bytes(a.n, a.K), (cudaStream_t)stream>>>(a));
    return launched("token_a_warp");
}

extern "C" fmoe_status cuda_topk_backward_gather(const void *args, void *, size_t, void *stream) {
    return run_token_a_warp<false>(args, stream);
}

extern "C" fmoe_status cuda_topk_backward_fixed_point(const void *args, void *, size_t, void *stream) {
    return run_token_a_warp<true>(args, stream);
}
