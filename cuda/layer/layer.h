/* The layer on the GPU: its entry point and its rungs (ladder.c). */
#ifndef FMOE_CUDA_LAYER_H
#define FMOE_CUDA_LAYER_H

#include "../../chapters/steps.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Step: layer (chapter 8) ------------------------------------------------------------------------------------- */

/* fmoe_weights on the device: all of one dtype, the running buffers float32. */
typedef struct {
    const void *router_gate;           /* [2n, d] */
    const void *down_embed, *up_embed; /* [N, d] */
    const void *gate_proj, *up_proj;   /* [I, d] */
    const void *down_proj;             /* [d, I] */
    float *running_mean, *running_var; /* [d]: move in training */
} fmoe_cuda_weights;

/* y is required, the others optional; the backward pass reads router_logits and indices. */
typedef struct {
    void *y;              /* [T, d] dtype */
    float *router_logits; /* [2, T, n] */
    float *scores;        /* [T, K] */
    int32_t *indices;     /* [T, K] */
} fmoe_cuda_outputs;

/* What running two branches side by side needs besides the caller's stream: a stream and two events. Made once, used by
 * one call at a time (a captured graph keeps the order but not the object). */
typedef struct fmoe_cuda_side fmoe_cuda_side;
fmoe_status fmoe_cuda_side_create(fmoe_cuda_side **side);
void fmoe_cuda_side_destroy(fmoe_cuda_side *side); /* NULL is allowed */

/* y = MLP(x) + routed experts(x), rounded once. side: NULL runs everything on the stream, one step after another.
 * config and the structs of pointers lie on the host and are read during the call. n, K and the sizes have the limits
 * of the steps above. */
fmoe_status fmoe_cuda_layer_forward(const fmoe_config *config, const fmoe_cuda_weights *weights, bool training,
                                    int64_t T, fmoe_dtype dtype, const void *x, const fmoe_cuda_outputs *outputs,
                                    fmoe_cuda_side *side, void *workspace, size_t workspace_bytes, void *stream);
size_t fmoe_cuda_layer_workspace(const fmoe_config *config, bool training, int64_t T, fmoe_dtype dtype);

/* ---- Rungs ------------------------------------------------------------------------------------------------------- */

/* Each takes fmoe_layer_args with device pointers. */
fmoe_rung_fn cuda_layer_in_turn, cuda_layer_two_streams, cuda_layer_divided, cuda_layer_few;
bool cuda_layer_is_few(const void *args); /* up to 32 tokens in evaluation, on sm_90 */
fmoe_workspace_fn cuda_layer_bytes;
/* in-turn up to the end of a step, for the chapter's account of its time: in this order, and then in-turn itself. */
fmoe_rung_fn cuda_layer_until_router, cuda_layer_until_topk, cuda_layer_until_experts;
extern const fmoe_rung cuda_layer_until[4];

#ifdef __cplusplus
}
#endif
#endif
