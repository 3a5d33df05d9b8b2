/* The ladder of expert_backward on the GPU (chapter 9): from atomic additions to one owner a row, and fewer rows. */
#include "../rungs.h"
#include "expert_backward.h"

const fmoe_rung cuda_expert_backward_rungs[] = {
    {.name = "atomics",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "A warp a token adds its pairs to both tables in float32, atomically: the order, and the bits, are luck.",
     .run = CUDA_RUN(cuda_expert_backward_atomics),
     .workspace = CUDA_PART(cuda_expert_backward_atomics_bytes)},
    {.name = "ordered",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "Along the schedule, a block an expert: one owner and one order a row, and each row is written once.",
     .run = CUDA_RUN(cuda_expert_backward_ordered),
     .workspace = CUDA_PART(cuda_expert_backward_ordered_bytes)},
    {.name = "balanced",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea =
         "Lists of about 128 pairs, whoever's they are, 16 bytes a load, eight rows in flight; long experts are cut.",
     .run = CUDA_RUN(cuda_expert_backward_balanced),
     .workspace = CUDA_PART(cuda_expert_backward_lists_bytes)},
    {.name = "on-the-way",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "dA from the rows of dy that dup gathers anyway: three rows a pair in place of four.",
     .run = CUDA_RUN(cuda_expert_backward_on_the_way),
     .workspace = CUDA_PART(cuda_expert_backward_lists_bytes)},
    {.name = "slices",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "dx in slices of columns that the L2 keeps, as on the way forward.",
     .run = CUDA_RUN(cuda_expert_backward_slices),
     .workspace = CUDA_PART(cuda_expert_backward_lists_bytes)},
    {.run = NULL},
};
