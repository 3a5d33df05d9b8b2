/* The layer's rungs on the GPU, for its ladder (ladder.c) and for the chapter's account of its time. */
#ifndef FMOE_CUDA_LAYER_H
#define FMOE_CUDA_LAYER_H

#include "../../chapters/steps.h"
#include "../fmoe_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Each takes fmoe_layer_args with device pointers. */
fmoe_rung_fn cuda_layer_in_turn, cuda_layer_two_streams, cuda_layer_divided, cuda_layer_few;
bool cuda_layer_is_few(const void *args); /* up to 16 tokens in evaluation, on sm_90 */
fmoe_workspace_fn cuda_layer_bytes;
/* in-turn up to the end of a step, for the chapter's account of its time: in this order, and then in-turn itself. */
fmoe_rung_fn cuda_layer_until_router, cuda_layer_until_topk, cuda_layer_until_experts;
extern const fmoe_rung cuda_layer_until[4];

#ifdef __cplusplus
}
#endif
#endif
