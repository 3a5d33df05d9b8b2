/* The ladder of layer_forward_backward on the GPU (chapter 9). */
#include "../rungs.h"
#include "layer_backward.h"

const fmoe_rung cuda_layer_backward_rungs[] = {
    {.name = "in-turn",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "Step after step, there and back, from the last rungs of every ladder; what is kept never leaves the GPU.",
     .run = CUDA_RUN(cuda_layer_backward_in_turn),
     .workspace = CUDA_PART(cuda_layer_backward_bytes),
     .replay = true},
    {.run = NULL},
};
