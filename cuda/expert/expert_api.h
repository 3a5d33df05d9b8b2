/* The expert step's device entry point (chapters 1 and 5); habits and statuses as in fmoe_cuda.h. */
#ifndef FMOE_CUDA_EXPERT_API_H
#define FMOE_CUDA_EXPERT_API_H

#include "../fmoe_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y_t = Σ_k silu(⟨x_t, down[e]⟩) · g · up[e] with e = indices[t, k], g = weights[t, k]; repeated indices and negative
 * weights are fine; 1 ≤ K ≤ N. Notes bad indices; their terms are left out.
 * x [T, d], down, up [N, d], y [T, d] of dtype; indices, weights [T, K]; pre_activations [T, K] (optional):
 * ⟨x_t, down[e]⟩, 0 for a bad index. Fastest where a row is a multiple of 16 bytes. */
fmoe_status fmoe_cuda_expert(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype, const void *x,
                             const void *down, const void *up, const int32_t *indices, const float *weights, void *y,
                             float *pre_activations, void *workspace, size_t workspace_bytes, void *stream);
size_t fmoe_cuda_expert_workspace(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype);

#ifdef __cplusplus
}
#endif
#endif
