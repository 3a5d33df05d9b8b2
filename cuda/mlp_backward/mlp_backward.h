/* The shared MLP's way back on the GPU (chapter 9): the rungs, for their ladder. */
#ifndef FMOE_CUDA_MLP_BACKWARD_H
#define FMOE_CUDA_MLP_BACKWARD_H

#include "../../chapters/steps.h"
#include "../fmoe_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Each takes fmoe_mlp_backward_args with device pointers. */
fmoe_rung_fn cuda_mlp_backward_naive, cuda_mlp_backward_tiles, cuda_mlp_backward_cublas, cuda_mlp_backward_wgmma;
/* The workspace of the first two, with the hidden units' gradients in float32, and of the others. */
fmoe_workspace_fn cuda_mlp_backward_f32_bytes, cuda_mlp_backward_cublas_bytes, cuda_mlp_backward_wgmma_bytes;
/* Which cases: naive only small ones, wgmma 16-bit types whose rows are multiples of 16 bytes. */
bool cuda_mlp_backward_is_small(const void *args), cuda_mlp_backward_16_bit(const void *args);
/* The library's rung: only with what the forward pass kept, and where the library was found. */
bool cuda_mlp_backward_library_takes(const void *args), cuda_mlp_backward_library_available(void);

#ifdef __cplusplus
}
#endif
#endif
