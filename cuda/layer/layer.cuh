// What the layer's rungs share: the workspace, the parts of the routed branch, and the two branches' order.
#ifndef FMOE_LAYER_CUH
#define FMOE_LAYER_CUH

#include "../ptx.cuh"
#include "layer.h"

#define FEW_TOKENS  32 // up to so many tokens' clusters find room at the same time,
#define FEW_AT_ONCE 16 // and up to so many have registers for all of their rows at once

// Where the layer's intermediate results and the steps' own workspaces lie. What the caller did not ask for is here
// too.
typedef struct {
    float *logits;    // [2, T, n]
    int32_t *indices; // [T, K]
    float *weights;   // [T, K]
    float *routed;    // [T, d] the experts' sum,
    float *shared;    // [T, d] and the MLP's: float32, because y is rounded once, when both are added
    void *router, *topk, *experts, *mlp;
    size_t router_bytes, topk_bytes, experts_bytes, mlp_bytes;
} layer_scratch;

layer_scratch layer_carve(const fmoe_layer_args *args, void *workspace, size_t *used);

// Everything the host can see; every rung starts so.
fmoe_status layer_check(const fmoe_layer_args *args, const void *workspace, size_t bytes, size_t needed);

// ---- Parts ----

// The expert step of chapter 5 with the sum left in float32. routed.cu
fmoe_status routed_experts(const fmoe_layer_args *args, const layer_scratch &s, cudaStream_t stream);
size_t routed_experts_bytes(const fmoe_layer_args *args);

// The whole branch in one kernel, for few tokens in evaluation (sm_90 on). few.cu
bool few_fit(const fmoe_layer_args *args);
fmoe_status few_routed(const fmoe_layer_args *args, const layer_scratch &s, cudaStream_t stream);

#endif
