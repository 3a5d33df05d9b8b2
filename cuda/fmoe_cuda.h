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
 * training they are not read and may be NULL. Within float32's limit of error whatever dtype is: where tensor cores
 * multiply (16-bit types in rows of multiples of 16 bytes, from 256 tokens on, sm_90a) every factor is a sum of two
 * bfloat16. */
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

/* ---- Step: layer (chapter 8) ------------------------------------------------------------------------------------- */

/* fmoe_weights on the device, [rows, columns] as in a state dict: the matrices of the call's dtype, the running buffers
 * float32. */
typedef struct {
    const void *router_gate;           /* [2n, d] */
    const void *down_embed, *up_embed; /* [N, d] */
    const void *gate_proj, *up_proj;   /* [I, d] */
    const void *down_proj;             /* [d, I] */
    float *running_mean, *running_var; /* [d]: read in evaluation, moved once a call in training */
} fmoe_cuda_weights;

/* y is required; the others may be NULL, and y has the same bits then. The backward pass reads router_logits and
 * indices. */
typedef struct {
    void *y;              /* [T, d] dtype */
    float *router_logits; /* [2, T, n] */
    float *scores;        /* [T, K]: natural logarithms */
    int32_t *indices;     /* [T, K] in [0, n²) */
} fmoe_cuda_outputs;

/* What running the two branches side by side needs besides the caller's stream: a stream of the device that was current
 * when it was made, and two events. Used by one call at a time; a graph that was captured with it keeps the order of
 * the kernels but not the object, which may be destroyed. create allocates, the calls that use it do not. */
typedef struct fmoe_cuda_side fmoe_cuda_side;
fmoe_status fmoe_cuda_side_create(fmoe_cuda_side **side); /* NULL in *side where it fails */
void fmoe_cuda_side_destroy(fmoe_cuda_side *side);        /* NULL is allowed */

/* y = MLP(x) + routed experts(x): steps 1 to 8 of fmoe_layer_forward, each of y's elements rounded once, from the
 * float32 sum of both branches. Logits are within 2e-5 · max(1, largest |logit|), whatever dtype is.
 * x [T, d] of dtype. side: NULL runs one step after another on the stream. config, weights and outputs are structs in
 * the host's memory, read during the call; what the latter two point to lies on the device.
 * 1 ≤ K ≤ min(n², FMOE_CUDA_MAX_TOPK), n ≤ FMOE_CUDA_MAX_KEYS; training needs T ≥ 2. Everything the host can see is
 * checked before the first launch, so a call that fails has moved no running buffer. A token with a NaN or an infinity
 * spoils its own y and, in evaluation, no other token's. Tables of 16-bit types may hold anything in rows that nobody
 * chooses. */
fmoe_status fmoe_cuda_layer_forward(const fmoe_config *config, const fmoe_cuda_weights *weights, bool training,
                                    int64_t T, fmoe_dtype dtype, const void *x, const fmoe_cuda_outputs *outputs,
                                    fmoe_cuda_side *side, void *workspace, size_t workspace_bytes, void *stream);
/* Enough with and without a side, whichever outputs are asked for. 0 for sizes that the call would refuse. */
size_t fmoe_cuda_layer_workspace(const fmoe_config *config, bool training, int64_t T, fmoe_dtype dtype);

/* ---- The way back (chapter 9) ------------------------------------------------------------------------------------ */

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

/* What the layer's forward pass keeps for the way back, on the device. Only router_logits and indices are required; a
 * member that is NULL is not kept, and made again on the way back. offsets and pairs are both NULL or neither, and so
 * are h, h_by_p and h_by_q. */
typedef struct {
    float *router_logits;      /* [2, T, n]: 8 · T · n bytes */
    int32_t *indices;          /* [T, K] in [0, n²): 4 · T · K */
    float *weights;            /* [T, K] the routing weights: 4 · T · K */
    float *pre_activations;    /* [T, K] ⟨x, down[e]⟩: 4 · T · K */
    int32_t *offsets, *pairs;  /* [N + 1], [T·K] the schedule: 4 · (N + 1 + T · K) */
    void *h, *h_by_p, *h_by_q; /* [T, I] of dtype, as in fmoe_cuda_mlp_backward: 3 · T · I elements */
} fmoe_cuda_kept;

/* Lays out in one block of memory (256-byte aligned) all that is worth keeping, and tells the block's size; with NULL
 * for memory only the size, with NULL for kept nothing else. h and its derivatives are NULL where the back end makes
 * them again in any case (float32 or rows that are no multiples of 16 bytes; before sm_90). Whoever has less memory
 * sets members to NULL, or to memory elsewhere, before the forward pass. 0 for sizes that the calls would refuse. */
size_t fmoe_cuda_layer_keep(const fmoe_config *config, int64_t T, fmoe_dtype dtype, void *memory, fmoe_cuda_kept *kept);

/* fmoe_cuda_layer_forward that fills in what `kept` (on the host, like config and weights) points to. y [T, d] of
 * dtype; scores [T, K] (optional). FMOE_UNSUPPORTED for an h where fmoe_cuda_layer_keep has none. */
fmoe_status fmoe_cuda_layer_forward_keeping(const fmoe_config *config, const fmoe_cuda_weights *weights, bool training,
                                            int64_t T, fmoe_dtype dtype, const void *x, void *y, float *scores,
                                            const fmoe_cuda_kept *kept, void *workspace, size_t workspace_bytes,
                                            void *stream);
size_t fmoe_cuda_layer_forward_keeping_workspace(const fmoe_config *config, bool training, int64_t T, fmoe_dtype dtype,
                                                 const fmoe_cuda_kept *kept);

/* Gradients on the device, each optional, shaped like what they are gradients of, of the call's gradient_dtype. */
typedef struct {
    void *dx; /* [T, d], always overwritten */
    void *router_gate, *down_embed, *up_embed, *gate_proj, *up_proj, *down_proj;
} fmoe_cuda_gradients;

/* All gradients of the layer from dy [T, d] of dtype: steps 1 to 8 of fmoe_layer_backward. x and weights as on the way
 * forward; kept is what that left, by fmoe_cuda_layer_forward_keeping, or the router_logits and indices of
 * fmoe_cuda_layer_forward. In training the statistics are x's and the running buffers, which have moved, are not read
 * (NULL is allowed); in evaluation they are constants. gradient_dtype is dtype or float32, each gradient is rounded to
 * it once; write says what happens to the weights' gradients. A gradient that is not asked for is not computed, and the
 * others have the same bits without it. Without tokens the weights' gradients become zero, or stay.
 * Notes bad indices: pairs with an index outside [0, N) are left out. The limits of fmoe_cuda_layer_forward. */
fmoe_status fmoe_cuda_layer_backward(const fmoe_config *config, const fmoe_cuda_weights *weights, bool training,
                                     int64_t T, fmoe_dtype dtype, const void *x, const fmoe_cuda_kept *kept,
                                     const void *dy, fmoe_write write, fmoe_dtype gradient_dtype,
                                     const fmoe_cuda_gradients *gradients, void *workspace, size_t workspace_bytes,
                                     void *stream);
/* kept: which members are NULL counts, nothing else is read. */
size_t fmoe_cuda_layer_backward_workspace(const fmoe_config *config, bool training, int64_t T, fmoe_dtype dtype,
                                          const fmoe_cuda_kept *kept);

#ifdef __cplusplus
}
#endif
#endif
