/* A training step of the layer on the GPU (chapter 9): forward, and every gradient. */
#ifndef FMOE_CUDA_LAYER_BACKWARD_H
#define FMOE_CUDA_LAYER_BACKWARD_H

#include "../../chapters/steps.h"

#ifdef __cplusplus
extern "C" {
#endif

extern const fmoe_rung cuda_layer_backward_rungs[]; /* ladder.c */

/* Takes fmoe_layer_backward_args with device pointers. */
fmoe_rung_fn cuda_layer_backward_in_turn;
fmoe_workspace_fn cuda_layer_backward_bytes;

#ifdef __cplusplus
}
#endif
#endif
