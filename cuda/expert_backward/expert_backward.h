/* The expert step's way back on the GPU (chapter 9): the rungs, for their ladder. */
#ifndef FMOE_CUDA_EXPERT_BACKWARD_H
#define FMOE_CUDA_EXPERT_BACKWARD_H

#include "../../chapters/steps.h"
#include "../fmoe_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

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
