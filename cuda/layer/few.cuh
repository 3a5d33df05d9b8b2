// What the layer's kernels for few tokens share: their arguments, reading rows, and x̂.
#ifndef FMOE_LAYER_FEW_CUH
#define FMOE_LAYER_FEW_CUH

#include "../mlp/rows.cuh"
#include "../topk/topk.cuh"
#include "layer.cuh"

#define WARPS   8 // a block
#define THREADS (WARPS * WARP)
#define LOADS   4 // of 16 bytes a lane and row

typedef struct {
    topk_task choice;
    int d;
    const void *x, *gate, *down, *up;
    const float *mean, *var;
    float *logits, *routed;
    int clusters;      // of the routed branch; the blocks behind them make the MLP's hidden units
    fmoe_mlp_args mlp; // its first product, if there are such blocks
    void *hidden;      // [T, I]
} few_task;

static inline few_task few_task_of(const fmoe_layer_args *args, const layer_scratch &s) {
    topk_task choice = {(int)args->T, (int)args->n, (int)args->K, args->norm_topk_prob, FMOE_F32, s.logits,
                        s.indices,    args->scores, NULL};
    return {choice,
            (int)args->d,
            args->x,
            args->router_gate,
            args->down_embed,
            args->up_embed,
            args->running_mean,
            args->running_var,
            s.logits,
            s.routed,
            0,
            {},
            NULL};
}

// Columns of a row that a warp has at once.
template <typename E> constexpr int few_columns = LOADS *WARP *pack16<E>::count;

template <typename E> __device__ inline uint4 read_part(const void *table, int64_t row, int d, int column) {
    return column < d ? __ldg((const uint4 *)((const E *)table + row * d + column)) : make_uint4(0, 0, 0, 0);
}

template <typename E> __device__ inline pack16<E> as_pack(uint4 raw) {
    return *(pack16<E> *)&raw;
}

// [normalise]
// x̂ of some tokens from column `first` on, by all threads, each with the same columns of all its tokens. In evaluation
// the mean is a float32, so x − mean loses nothing that counts. A token that is not there repeats the last.
template <typename E, int TOKENS>
__device__ inline void normalise(const few_task &a, int t, int first, float (*x_hat)[few_columns<E>]) {
    constexpr int EACH = pack16<E>::count, ACROSS = LOADS * WARP;
    int c = threadIdx.x % ACROSS * EACH, column = first + c;
    bool inside = column < a.d;
    float mean[EACH], scale[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        mean[e] = inside ? a.mean[column + e] : 0;
        scale[e] = rsqrtf((inside ? a.var[column + e] : 1) + (float)FMOE_NORM_EPS);
    }
#pragma unroll
    for (int i = threadIdx.x / ACROSS; i < TOKENS; i += THREADS / ACROSS) {
        pack16<E> x = as_pack<E>(read_part<E>(a.x, min(t + i, a.choice.T - 1), a.d, column));
#pragma unroll
        for (int e = 0; e < EACH; e++)
            x_hat[i][c + e] = (to_f32(x.at[e]) - mean[e]) * scale[e];
    }
}
// [/normalise]

#endif
