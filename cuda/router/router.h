/* The router's rungs on the GPU, there and back, for their ladders (ladder.c, backward_ladder.c) and for
 * fmoe_cuda_router and fmoe_cuda_router_backward. */
#ifndef FMOE_CUDA_ROUTER_H
#define FMOE_CUDA_ROUTER_H

#include "../../chapters/steps.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Each takes fmoe_router_args with device pointers; log_probs may be NULL. */
fmoe_rung_fn cuda_router_columns, cuda_router_one_pass, cuda_router_tiles, cuda_router_split, cuda_router_wgmma,
    cuda_router_cublas;
/* The workspace of the rungs that store x̂, of those that do not, and of the library's. */
fmoe_workspace_fn cuda_router_x_hat_bytes, cuda_router_bytes, cuda_router_cublas_bytes;
/* What the tensor-core rungs do: 16-bit storage, rows of x that start at multiples of 16 bytes. */
bool cuda_router_16_bit(const void *args);
/* The library counts with int. */
bool cuda_router_fits_int(const void *args);

/* The way back (chapter 9): each takes fmoe_router_backward_args with device pointers. */
fmoe_rung_fn cuda_router_backward_tiles, cuda_router_backward_wgmma;
fmoe_workspace_fn cuda_router_backward_tiles_bytes, cuda_router_backward_wgmma_bytes;
/* As cuda_router_16_bit, from 256 tokens on. */
bool cuda_router_backward_16_bit(const void *args);

#ifdef __cplusplus
}
#endif
#endif
