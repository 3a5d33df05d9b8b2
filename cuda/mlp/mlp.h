/* The shared MLP's rungs on the GPU, for its ladder (ladder.c), for fmoe_cuda_mlp and for the layer. */
#ifndef FMOE_CUDA_MLP_H
#define FMOE_CUDA_MLP_H

#include "../../chapters/steps.h"
#include "../fmoe_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What the layer, which joins two branches, asks besides: a float32 [T, d] that is added before y is rounded, or NULL;
 * an event (a cudaEvent_t) that only the second product waits for, or NULL; the most blocks that either product of the
 * wgmma rung may have at once, or 0 for as many as there are multiprocessors; a float32 [T, d] that gets the result,
 * not rounded, in place of y (add and ready are NULL then), or NULL. */
typedef struct {
    const float *add;
    void *ready;
    int blocks;
    float *sum;
} mlp_join;

/* fmoe_cuda_mlp, with a join or NULL. The workspace is fmoe_cuda_mlp's. */
fmoe_status cuda_mlp_into(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, size_t bytes, void *stream);

/* Each rung takes fmoe_mlp_args with device pointers. */
fmoe_rung_fn cuda_mlp_naive, cuda_mlp_rows, cuda_mlp_tiles, cuda_mlp_mma_sync, cuda_mlp_cublas, cuda_mlp_fragments,
    cuda_mlp_few_tokens, cuda_mlp_wgmma;
/* The workspace of the rungs that store the hidden units [T, I] and nothing else, and of those that need more. */
fmoe_workspace_fn cuda_mlp_hidden_bytes, cuda_mlp_cublas_bytes, cuda_mlp_wgmma_workspace;
/* Which cases a rung takes: naive only small ones; rows 8 tokens whose rows are multiples of 16 bytes; the tensor cores
 * 16-bit types in such rows, few-tokens at most 64 tokens of them, fragments 8 tokens in multiples of 64 bytes. */
bool cuda_mlp_is_small(const void *args), cuda_mlp_few_rows(const void *args), cuda_mlp_16_bit(const void *args),
    cuda_mlp_fits_int(const void *args), cuda_mlp_cublas_takes(const void *args),
    cuda_mlp_fragments_take(const void *args), cuda_mlp_few(const void *args);

#ifdef __cplusplus
}
#endif
#endif
