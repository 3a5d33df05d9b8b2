/* The device back end of flashmoe.c: the steps of ref_cpu/fmoe.h as CUDA kernels, one entry point a step.
 *
 * Habits, those of cuBLAS and CUB: every pointer is a device pointer, dense and row-major; `stream` is a cudaStream_t;
 * temporary memory is the caller's workspace, whose size a function of the same name and `_workspace` tells (256-byte
 * aligned, contents undefined, one call at a time). Nothing is allocated, nothing synchronises with the host and there
 * is no global state, so every call can be captured in a CUDA graph and replayed with new data in the same places.
 *
 * Letters, shapes, rules and statuses are fmoe.h's; `dtype` is the storage type of the pointers that are `void *`, the
 * others are float32. A call returns before the device is done. What the host can see is refused at once with a status
 * and a message (fmoe_error_message); FMOE_UNSUPPORTED marks what is legal but beyond this back end's limits. What only
 * the device can see, an index out of range, is skipped and noted in the workspace: fmoe_cuda_check reads the note.
 *
 * The same input gives the same bits in every run. Pointers are aligned to 16 bytes, as cudaMalloc's are.
 */
#ifndef FMOE_CUDA_H
#define FMOE_CUDA_H

#include "../ref_cpu/fmoe.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What this build and the current device can run together: 0 plain CUDA (sm_75 and up), 1 mma.sync and asynchronous
 * copies (sm_80 and up), 2 Hopper's wgmma and bulk copies (sm_90a). -1: no device, or no code for it in this build. */
int fmoe_cuda_level(void);

/* Waits for the stream and reads what the last call that used this workspace noted: FMOE_OK, or FMOE_BAD_INDEX with the
 * first place, the value and the limit in the message. The only function that synchronises. Only for workspaces of the
 * functions that say "notes bad indices". */
fmoe_status fmoe_cuda_check(const void *workspace, void *stream);

/* ---- Step: router (chapter 2) ------------------------------------------------------------------------------------ */

/* x̂ = batch norm of x; logits = x̂ · gateᵀ; log_probs = log-softmax of each side.
 * x [T, d], gate [2n, d] of dtype; running_mean, running_var [d], read in evaluation and moved in training;
 * logits [2, T, n]; log_probs [2, T, n] (optional). Logits are within 2e-5 · max(1, largest |logit|) for every dtype.
 */
fmoe_status fmoe_cuda_router(bool training, int64_t T, int64_t d, int64_t n, fmoe_dtype dtype, const void *x,
                             const void *gate, float *running_mean, float *running_var, float *logits, float *log_probs,
                             void *workspace, size_t workspace_bytes, void *stream);
size_t fmoe_cuda_router_workspace(bool training, int64_t T, int64_t d, int64_t n, fmoe_dtype dtype);

/* dx [T, d] and dgate [2n, d], each optional and of gradient_dtype (dtype or float32), from dlogits [2, T, n]. dx is
 * overwritten; write says what happens to dgate. In evaluation the running buffers are what the forward pass used, in
 * training they are not read and may be NULL. */
fmoe_status fmoe_cuda_router_backward(bool training, int64_t T, int64_t d, int64_t n, fmoe_dtype dtype, const void *x,
                                      const void *gate, const float *running_mean, const float *running_var,
                                      const float *dlogits, fmoe_write write, fmoe_dtype gradient_dtype, void *dx,
                                      void *dgate, void *workspace, size_t workspace_bytes, void *stream);
size_t fmoe_cuda_router_backward_workspace(bool training, int64_t T, int64_t d, int64_t n, fmoe_dtype dtype);

/* log p = z − log Σ exp z over each row of n. logits, log_probs [rows, n]. Needs no workspace. */
fmoe_status fmoe_cuda_log_softmax(int64_t rows, int64_t n, const float *logits, float *log_probs, void *stream);
/* dz = dlog_p − softmax(z) · Σ dlog_p. All [rows, n]. Needs no workspace. */
fmoe_status fmoe_cuda_log_softmax_backward(int64_t rows, int64_t n, const float *logits, const float *dlog_probs,
                                           float *dlogits, void *stream);

/* ---- Step: topk (chapter 3) -------------------------------------------------------------------------------------- */

#define FMOE_CUDA_MAX_KEYS 1024
#define FMOE_CUDA_MAX_TOPK 4096

/* The K best of the n² pairs by fmoe.h's rule, best first, with scores and routing weights. n ≤ FMOE_CUDA_MAX_KEYS,
 * 1 ≤ K ≤ min(n², FMOE_CUDA_MAX_TOPK).
 * logits [2, T, n] of dtype; indices, scores, weights [T, K] (scores and weights optional). */
fmoe_status fmoe_cuda_topk(int64_t T, int64_t n, int64_t K, bool norm_topk_prob, fmoe_dtype dtype, const void *logits,
                           int32_t *indices, float *scores, float *weights, void *workspace, size_t workspace_bytes,
                           void *stream);
size_t fmoe_cuda_topk_workspace(int64_t T, int64_t n, int64_t K, fmoe_dtype dtype);

/* dlogits [2, T, n] from the gradients of weights and of scores, [T, K] each and optional (NULL counts as zero).
 * logits [2, T, n] of dtype; indices [T, K]: any in [0, n²), repeated ones included. Notes bad indices. The same limits
 * as fmoe_cuda_topk. */
fmoe_status fmoe_cuda_topk_backward(int64_t T, int64_t n, int64_t K, bool norm_topk_prob, fmoe_dtype dtype,
                                    const void *logits, const int32_t *indices, const float *dweights,
                                    const float *dscores, float *dlogits, void *workspace, size_t workspace_bytes,
                                    void *stream);
size_t fmoe_cuda_topk_backward_workspace(int64_t T, int64_t n, int64_t K, fmoe_dtype dtype);

/* ---- Step: schedule (chapter 4) ---------------------------------------------------------------------------------- */

#define FMOE_CUDA_MAX_EXPERTS (1 << 22)

/* Expert-major order of the T·K pairs: offsets [N+1], pairs [T·K], rising within an expert. indices [T, K]: repeated
 * ones included. Notes bad indices: such a pair is in no expert's list, offsets[N] counts the good ones, and pairs from
 * there on are -1. N ≤ FMOE_CUDA_MAX_EXPERTS. */
fmoe_status fmoe_cuda_schedule(int64_t T, int64_t K, int64_t N, const int32_t *indices, int32_t *offsets,
                               int32_t *pairs, void *workspace, size_t workspace_bytes, void *stream);
size_t fmoe_cuda_schedule_workspace(int64_t T, int64_t K, int64_t N);

/* ---- Step: expert (chapters 1 and 5) ----------------------------------------------------------------------------- */

/* y_t = Σ_k silu(⟨x_t, down[e]⟩) · g · up[e] with e = indices[t, k], g = weights[t, k]; repeated indices and negative
 * weights are fine; 1 ≤ K ≤ N. Notes bad indices; their terms are left out.
 * x [T, d], down, up [N, d], y [T, d] of dtype; indices, weights [T, K]; pre_activations [T, K] (optional):
 * ⟨x_t, down[e]⟩, 0 for a bad index. Fastest where a row is a multiple of 16 bytes. Where tokens choose a good part of
 * all experts every token may be multiplied by every expert (chapter 7), the products that nobody asked for with an
 * activation of zero: tables of 16-bit types must not hold infinities or NaNs then, even in rows that nobody chose. */
fmoe_status fmoe_cuda_expert(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype, const void *x,
                             const void *down, const void *up, const int32_t *indices, const float *weights, void *y,
                             float *pre_activations, void *workspace, size_t workspace_bytes, void *stream);
size_t fmoe_cuda_expert_workspace(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype);

/* ---- Step: mlp (chapter 6) --------------------------------------------------------------------------------------- */

/* y = (silu(x · gateᵀ) ⊙ (x · upᵀ)) · downᵀ: the shared SwiGLU MLP.
 * x, y [T, d], gate, up [I, d], down [d, I] of dtype. The hidden units between the products are rounded once to dtype.
 * Tensor cores take 16-bit types whose rows, of d and of I elements, are multiples of 16 bytes. */
fmoe_status fmoe_cuda_mlp(int64_t T, int64_t d, int64_t I, fmoe_dtype dtype, const void *x, const void *gate,
                          const void *up, const void *down, void *y, void *workspace, size_t workspace_bytes,
                          void *stream);
size_t fmoe_cuda_mlp_workspace(int64_t T, int64_t d, int64_t I, fmoe_dtype dtype);

#ifdef __cplusplus
}
#endif
#endif
