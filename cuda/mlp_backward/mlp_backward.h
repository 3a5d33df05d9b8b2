/* The shared MLP's way back on the GPU (chapter 9): the entry point, and the rungs for their ladder. */
#ifndef FMOE_CUDA_MLP_BACKWARD_H
#define FMOE_CUDA_MLP_BACKWARD_H

#include "../../chapters/steps.h"

#ifdef __cplusplus
extern "C" {
#endif

/* dx [T, d], dgate, dup [I, d] and ddown [d, I] of gradient_dtype (dtype or float32), each optional, from dy [T, d]. dx
 * is overwritten; write says what happens to the weights' gradients. x, gate, up [I, d], down [d, I], dy of dtype.
 * What the forward pass may have kept, all [T, I] of dtype: h = silu(p) ⊙ q with p = x · gateᵀ and q = x · upᵀ, and its
 * derivatives h_by_p = silu'(p) ⊙ q and h_by_q = silu(p). All three or none: then they are made again. */
fmoe_status fmoe_cuda_mlp_backward(int64_t T, int64_t d, int64_t I, fmoe_dtype dtype, const void *x, const void *gate,
                                   const void *up, const void *down, const void *h, const void *h_by_p,
                                   const void *h_by_q, const void *dy, fmoe_write write, fmoe_dtype gradient_dtype,
                                   void *dx, void *dgate, void *dup, void *ddown, void *workspace,
                                   size_t workspace_bytes, void *stream);
size_t fmoe_cuda_mlp_backward_workspace(int64_t T, int64_t d, int64_t I, fmoe_dtype dtype, bool kept);

/* Each takes fmoe_mlp_backward_args with device pointers. */
fmoe_rung_fn cuda_mlp_backward_naive, cuda_mlp_backward_tiles, cuda_mlp_backward_cublas, cuda_mlp_backward_wgmma;
/* The workspace of the first two, with the hidden units' gradients in float32, and of the others. */
fmoe_workspace_fn cuda_mlp_backward_f32_bytes, cuda_mlp_backward_wgmma_bytes;
/* Which cases: naive only small ones, wgmma 16-bit types whose rows are multiples of 16 bytes. */
bool cuda_mlp_backward_is_small(const void *args), cuda_mlp_backward_16_bit(const void *args);
/* The library's rung: only with what the forward pass kept, and where the library was found. */
bool cuda_mlp_backward_library_takes(const void *args), cuda_mlp_backward_library_available(void);

#ifdef __cplusplus
}
#endif
#endif
