/* The expert step's way back on the GPU (chapter 9): the entry point, and the rungs for their ladder. */
#ifndef FMOE_CUDA_EXPERT_BACKWARD_H
#define FMOE_CUDA_EXPERT_BACKWARD_H

#include "../../chapters/steps.h"

#ifdef __cplusplus
extern "C" {
#endif

/* dx [T, d], ddown, dup [N, d] of gradient_dtype (dtype or float32) and dweights [T, K], each optional, from dy [T, d].
 * dx and dweights are overwritten; write says what happens to the tables' gradients, in which the rows of experts that
 * nobody chose become zero, or stay. x, down, up, dy of dtype; indices, weights [T, K] as they were on the way forward.
 * What the forward pass may have kept, and what is made again where it is NULL: pre_activations [T, K]; the schedule,
 * offsets [N+1] and pairs [T·K], both or neither, which fmoe_cuda_schedule made from the same indices.
 * Notes bad indices; their terms are left out, their dweights are 0. N ≤ FMOE_CUDA_MAX_EXPERTS. */
fmoe_status fmoe_cuda_expert_backward(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype, const void *x,
                                      const void *down, const void *up, const int32_t *indices, const float *weights,
                                      const float *pre_activations, const int32_t *offsets, const int32_t *pairs,
                                      const void *dy, fmoe_write write, fmoe_dtype gradient_dtype, void *dx,
                                      void *ddown, void *dup, float *dweights, void *workspace, size_t workspace_bytes,
                                      void *stream);
/* kept: whether pre_activations, offsets and pairs are given. */
size_t fmoe_cuda_expert_backward_workspace(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype, bool kept);

/* Each takes fmoe_expert_backward_args with device pointers. */
fmoe_rung_fn cuda_expert_backward_atomics, cuda_expert_backward_ordered, cuda_expert_backward_balanced,
    cuda_expert_backward_on_the_way, cuda_expert_backward_slices;
/* The workspace of atomics, which has both tables in float32, of the ordered rung and of the last three. */
fmoe_workspace_fn cuda_expert_backward_atomics_bytes, cuda_expert_backward_ordered_bytes,
    cuda_expert_backward_lists_bytes;

#ifdef __cplusplus
}
#endif
#endif
