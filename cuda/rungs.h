/* The CUDA ladders. A ladder's table is plain C, compiled with or without nvcc, so that every reader can list its rungs
 * and ideas; the kernels behind it are there only in a build with CUDA. */
#ifndef FMOE_RUNGS_H
#define FMOE_RUNGS_H

#include "../chapters/steps.h"

#ifdef FMOE_WITH_CUDA
#define CUDA_RUN(function)  function
#define CUDA_PART(function) function /* a workspace or supports function */
#else
#define CUDA_RUN(function)  cuda_not_built
#define CUDA_PART(function) NULL
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Stands in for every kernel in a build without CUDA: FMOE_UNSUPPORTED (chapters/device.c). */
fmoe_rung_fn cuda_not_built;

/* Each ended by a rung whose run is NULL. */
extern const fmoe_rung cuda_expert_token_rungs[], cuda_router_rungs[], cuda_topk_rungs[], cuda_schedule_rungs[],
    cuda_expert_scheduled_rungs[], cuda_mlp_rungs[], cuda_strategies_rungs[], cuda_layer_rungs[],
    cuda_router_backward_rungs[], cuda_topk_backward_rungs[], cuda_expert_backward_rungs[], cuda_mlp_backward_rungs[];

#ifdef __cplusplus
}
#endif
#endif
