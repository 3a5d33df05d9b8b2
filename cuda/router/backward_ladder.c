/* The ladder of router_backward on the GPU (chapter 9). */
#include "../rungs.h"
#include "router.h"

const fmoe_rung cuda_router_backward_rungs[] = {
    {.name = "tiles",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "Two float32 products by tiles; the norm's sums come from dgate, so that dx̂ is never stored.",
     .run = CUDA_RUN(cuda_router_backward_tiles),
     .workspace = CUDA_PART(cuda_router_backward_tiles_bytes)},
    {.name = "wgmma",
     .level = LEVEL_HOPPER,
     .backend = BACKEND_CUDA,
     .idea = "dz and x̂ as sums of two bfloat16, multiplied by tensor cores: a product that is right to 4e-6.",
     .run = CUDA_RUN(cuda_router_backward_wgmma),
     .workspace = CUDA_PART(cuda_router_backward_wgmma_bytes),
     .supports = CUDA_PART(cuda_router_backward_16_bit)},
    {.run = NULL},
};
