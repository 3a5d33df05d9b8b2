// Rungs `atomics` and `ordered`: the backward pass in its plainest forms. First token by token, each pair adding to
// rows of two tables that anyone may be adding to; then expert by expert along the schedule, each row with one owner.
#include "expert_backward.h"
#include "expert_backward.cuh"

#include "../../chapters/workspace.h"

#define WARPS_A_BLOCK 4 // of the kernels with a warp a token or a pair
#define THREADS       256

// ---- Rung `atomics`

// Launch: a warp a token, 4 a block. Shared memory: none. Traffic: two rows of the tables a pair; 8 bytes a pair and
// column of float32 additions in memory, which the L2 carries out as they come.
// [atomics]
template <typename E>
static __global__ void __launch_bounds__(WARPS_A_BLOCK *WARP)
    scatter_kernel(backward_task a, float *ddown, float *dup) {
    int t = blockIdx.x * WARPS_A_BLOCK + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (t >= a.T)
        return;
    const E *x = (const E *)a.x + (int64_t)t * a.d, *dy = (const E *)a.dy + (int64_t)t * a.d;
    for (int64_t pair = (int64_t)t * a.K; pair < (int64_t)(t + 1) * a.K; pair++) {
        int e = expert_of_pair(a, pair);
        float da = 0;
        for (int i = lane; i < a.d && e != NO_EXPERT; i += WARP)
            da = fmaf(to_f32(dy[i]), to_f32(((const E *)a.up)[(int64_t)e * a.d + i]), da);
        da = warp_sum(da);
        pair_scales scales = scales_of(a.pre_activations[pair], a.weights[pair]);
        if (lane == 0) {
            a.ds[pair] = da * scales.to_down;
            a.dweights[pair] = da * scales.silu;
        }
        for (int i = lane; i < a.d && e != NO_EXPERT; i += WARP) {
            atomicAdd(&ddown[(int64_t)e * a.d + i], da * scales.to_down * to_f32(x[i]));
            atomicAdd(&dup[(int64_t)e * a.d + i], scales.to_up * to_f32(dy[i]));
        }
    }
}
// [/atomics]

// Launch: a thread an element of both tables, 256 a block. Shared memory: none. Traffic: the float32 sums in, both
// gradients out.
template <typename E>
static __global__ void __launch_bounds__(THREADS) round_kernel(backward_task a, const float *ddown, const float *dup) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (int64_t)a.N * a.d) {
        ((E *)a.ddown)[i] = from_f32<E>(ddown[i]);
        ((E *)a.dup)[i] = from_f32<E>(dup[i]);
    }
}

// Launch: a block of 256 threads a token. Shared memory: none. Traffic: a row of `down` a pair, an element a thread; ds
// and the index of a pair again for every column, from the first-level cache.
template <typename E> static __global__ void __launch_bounds__(THREADS) plain_dx_kernel(backward_task a) {
    int t = blockIdx.x;
    for (int c = threadIdx.x; c < a.d; c += blockDim.x) {
        float sum = 0;
        for (int64_t pair = (int64_t)t * a.K; pair < (int64_t)(t + 1) * a.K; pair++) {
            int e = expert_of_pair(a, pair);
            if (e != NO_EXPERT)
                sum = fmaf(a.ds[pair], to_f32(((const E *)a.down)[(int64_t)e * a.d + c]), sum);
        }
        ((E *)a.dx)[(int64_t)t * a.d + c] = from_f32<E>(sum);
    }
}

template <typename E>
static fmoe_status atomics(const backward_task &a, float *ddown, float *dup, cudaStream_t stream) {
    size_t table = (size_t)a.N * a.d * sizeof(float);
    TRY(cuda_call("clearing ddown", cudaMemsetAsync(ddown, 0, table, stream)));
    TRY(cuda_call("clearing dup", cudaMemsetAsync(dup, 0, table, stream)));
    scatter_kernel<E><<<(unsigned)ceil_div(a.T, WARPS_A_BLOCK), WARPS_A_BLOCK * WARP, 0, stream>>>(a, ddown, dup);
    TRY(launched("scatter_kernel"));
    round_kernel<E><<<(unsigned)ceil_div((int64_t)a.N * a.d, THREADS), THREADS, 0, stream>>>(a, ddown, dup);
    TRY(launched("round_kernel"));
    plain_dx_kernel<E><<<(unsigned)a.T, THREADS, 0, stream>>>(a);
    return launched("plain_dx_kernel");
}

// ---- Rung `ordered`

// Launch: a warp a pair, 4 a block. Shared memory: none. Traffic: a row of `up` and one of dy a pair.
// [ordered-numbers]
template <typename E> static __global__ void __launch_bounds__(WARPS_A_BLOCK *WARP) dot_kernel(backward_task a) {
    int64_t pair = (int64_t)blockIdx.x * WARPS_A_BLOCK + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    if (pair >= (int64_t)a.T * a.K)
        return;
    int e = expert_of_pair(a, pair);
    const E *dy = (const E *)a.dy + pair / a.K * a.d, *up = (const E *)a.up + (int64_t)e * a.d;
    float da = 0;
    for (int i = lane; i < a.d && e != NO_EXPERT; i += WARP)
        da = fmaf(to_f32(dy[i]), to_f32(up[i]), da);
    da = warp_sum(da);
    pair_scales scales = scales_of(a.pre_activations[pair], a.weights[pair]);
    if (lane == 0) {
        a.activations[pair] = scales.to_up;
        a.ds[pair] = da * scales.to_down;
        a.dweights[pair] = da * scales.silu;
    }
}
// [/ordered-numbers]

// Launch: a block of 256 threads an expert. Shared memory: none. Traffic: a row of x and one of dy a pair, an element a
// thread; both gradient rows out once, whether the expert has pairs or not.
// [ordered]
template <typename E> static __global__ void __launch_bounds__(THREADS) expert_rows_kernel(backward_task a) {
    int e = blockIdx.x, first = a.offsets[e], end = a.offsets[e + 1];
    for (int c = threadIdx.x; c < a.d; c += blockDim.x) {
        float ddown = 0, dup = 0;
        for (int i = first; i < end; i++) {
            int pair = a.pairs[i];
            int64_t at = (int64_t)(pair / a.K) * a.d + c;
            ddown = fmaf(a.ds[pair], to_f32(((const E *)a.x)[at]), ddown);
            dup = fmaf(a.activations[pair], to_f32(((const E *)a.dy)[at]), dup);
        }
        ((E *)a.ddown)[(int64_t)e * a.d + c] = from_f32<E>(ddown);
        ((E *)a.dup)[(int64_t)e * a.d + c] = from_f32<E>(dup);
    }
}
// [/ordered]

template <typename E> static fmoe_status ordered(const backward_task &a, cudaStream_t stream) {
    unsigned blocks = (unsigned)ceil_div((int64_t)a.T * a.K, WARPS_A_BLOCK);
    dot_kernel<E><<<blocks, WARPS_A_BLOCK * WARP, 0, stream>>>(a);
    TRY(launched("dot_kernel"));
    expert_rows_kernel<E><<<(unsigned)a.N, THREADS, 0, stream>>>(a);
    TRY(launched("expert_rows_kernel"));
    plain_dx_kernel<E><<<(unsigned)a.T, THREADS, 0, stream>>>(a);
    return launched("plain_dx_kernel");
}

// ---- Host

static const backward_needs plain_needs = {true, false, false, false};

extern "C" size_t cuda_expert_backward_ordered_bytes(const void *args) {
    const fmoe_expert_backward_args *a = (const fmoe_expert_backward_args *)args;
    backward_task task = {};
    task.T = (int)a->T, task.d = (int)a->d, task.N = (int)a->N, task.K = (int)a->K;
    return backward_lay_out(&task, plain_needs, NULL, NULL);
}

extern "C" size_t cuda_expert_backward_atomics_bytes(const void *args) {
    const fmoe_expert_backward_args *a = (const fmoe_expert_backward_args *)args;
    size_t used = cuda_expert_backward_ordered_bytes(args);
    carve(NULL, &used, (size_t)(a->N * a->d) * sizeof(float));
    carve(NULL, &used, (size_t)(a->N * a->d) * sizeof(float));
    return used;
}

extern "C" fmoe_status cuda_expert_backward_atomics(const void *args, void *workspace, size_t workspace_bytes,
                                                    void *stream) {
    backward_task a;
    TRY(backward_from_args(args, workspace, workspace_bytes, plain_needs, &a));
    TRY(check_workspace(workspace, workspace_bytes, cuda_expert_backward_atomics_bytes(args)));
    if (a.T == 0)
        return backward_no_tokens(a, (cudaStream_t)stream);
    size_t used = cuda_expert_backward_ordered_bytes(args), table = (size_t)a.N * a.d * sizeof(float);
    float *ddown = (float *)carve(workspace, &used, table), *dup = (float *)carve(workspace, &used, table);
    WITH_DTYPE(a.dtype, E, return atomics<E>(a, ddown, dup, (cudaStream_t)stream));
}

extern "C" fmoe_status cuda_expert_backward_ordered(const void *args, void *workspace, size_t workspace_bytes,
                                                    void *stream) {
    backward_task a;
    TRY(backward_from_args(args, workspace, workspace_bytes, plain_needs, &a));
    if (a.T == 0)
        return backward_no_tokens(a, (cudaStream_t)stream);
    WITH_DTYPE(a.dtype, E, return ordered<E>(a, (cudaStream_t)stream));
}
