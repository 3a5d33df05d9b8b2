// What the rungs of mlp_backward share: their arguments and workspace, the checks, the middle of the MLP.
#ifndef FMOE_MLP_BACKWARD_CUH
#define FMOE_MLP_BACKWARD_CUH

#include "../device.cuh"
#include "mlp_backward.h"

// Letters as in fmoe.h: p = x · gateᵀ, q = x · upᵀ, h = silu(p) ⊙ q, y = h · downᵀ.
typedef struct {
    int64_t T, d, I;
    fmoe_dtype dtype;
    const void *x, *gate, *up, *down, *dy; // [T, d], [I, d], [I, d], [d, I], [T, d] dtype
    const void *h, *h_by_p, *h_by_q;       // [T, I], kept, of dtype, or made, in the workspace, of `middle`
    bool made;
    bool accumulate;                // the weights' gradients
    bool wide, wide_dx;             // gradients of the weights, and of x, in float32 though dtype is not
    void *dx, *dgate, *dup, *ddown; // each may be NULL
    fmoe_dtype middle; // of what is between the products: dtype where tensor cores multiply it, else float32
    void *dp, *dq;     // [T, I] middle, in the workspace
    float *parts;      // of dx, where its depth is split
    int blocks;        // at most so many multiprocessors for the wgmma rung's products; 0: all
} mlp_backward_task;

// Lays out the workspace, NULL to learn its size, with `parts` times dx in float32.
size_t mlp_backward_lay_out(mlp_backward_task *task, int parts, void *workspace);
// The checks, and the task; the workspace is not laid out yet.
fmoe_status mlp_backward_from_args(const void *args, mlp_backward_task *task);
// Zeros, when there are no tokens.
fmoe_status mlp_backward_no_tokens(const mlp_backward_task &task, cudaStream_t stream);

// The rungs, for any gradients: lay out the workspace and run.
fmoe_status mlp_backward_tiles(mlp_backward_task *task, void *workspace, size_t bytes, cudaStream_t stream);
fmoe_status mlp_backward_wgmma(mlp_backward_task *task, void *workspace, size_t bytes, cudaStream_t stream);
// y = h · downᵀ in float32, and on the way h, h_by_p and h_by_q [T, I] of dtype, which the wgmma rung takes as kept.
fmoe_status mlp_forward_keeping(const mlp_backward_task &task, float *y, cudaStream_t stream);
// The parts of dx's depth that the wgmma rung works on at once, or 0 if it is not split.
int mlp_backward_parts(const mlp_backward_task &task);

// [middle]
// A hidden unit, and what dh is multiplied by on the way back.
typedef struct {
    float h, by_p, by_q;
} hidden_unit;

__device__ inline hidden_unit hidden_of(float p, float q) {
    float sigmoid = __fdividef(1, 1 + __expf(-p)), silu = p * sigmoid;
    return {silu * q, sigmoid * (1 + p * (1 - sigmoid)) * q, silu};
}
// [/middle]

#endif
