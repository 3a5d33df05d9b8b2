/* The ladder of topk_backward on the GPU (chapter 9): backward.cu and backward_registers.cu. */
#include "../rungs.h"

fmoe_rung_fn cuda_topk_backward_atomics, cuda_topk_backward_gather, cuda_topk_backward_fixed_point,
    cuda_topk_backward_registers;
fmoe_workspace_fn cuda_topk_backward_atomics_workspace, cuda_topk_backward_registers_workspace;

static bool within_limits(const void *args) {
    const fmoe_topk_backward_args *a = args;
    return a->n <= 1024 && a->K <= 4096;
}

const fmoe_rung cuda_topk_backward_rungs[] = {
    {.name = "atomics",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "A thread a chosen pair adds to both keys: four launches, and other bits every time.",
     .run = CUDA_RUN(cuda_topk_backward_atomics),
     .workspace = CUDA_PART(cuda_topk_backward_atomics_workspace),
     .supports = within_limits},
    {.name = "gather",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea =
         "A warp a token, one launch; every key walks the token's pairs in order: 2n·K steps, always the same bits.",
     .run = CUDA_RUN(cuda_topk_backward_gather),
     .supports = within_limits},
    {.name = "fixed-point",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea =
         "Integers add up to the same sum in any order: atomics again, in shared memory, K steps and the same bits.",
     .run = CUDA_RUN(cuda_topk_backward_fixed_point),
     .supports = within_limits},
    {.name = "registers",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "All of a token is loaded before anything is computed, 2n exponentials in place of 4n + K, two rounds of "
             "shuffles in place of seven.",
     .run = CUDA_RUN(cuda_topk_backward_registers),
     .workspace = CUDA_PART(cuda_topk_backward_registers_workspace),
     .supports = within_limits},
    {.run = NULL},
};
