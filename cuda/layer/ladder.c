/* The layer's ladder on the GPU (chapter 8): what is left when every step is as fast as it can be. */
#include "../rungs.h"
#include "layer.h"

const fmoe_rung cuda_layer_rungs[] = {
    {.name = "in-turn",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "Router, top-k, experts, MLP, one after the other on one stream; the MLP's last store adds the experts'.",
     .run = CUDA_RUN(cuda_layer_in_turn),
     .workspace = CUDA_PART(cuda_layer_bytes)},
    {.name = "two-streams",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "The routed branch on a stream of its own, beside the MLP's first product; the second waits for its sum.",
     .run = CUDA_RUN(cuda_layer_two_streams),
     .workspace = CUDA_PART(cuda_layer_bytes)},
    {.name = "graph",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "The same calls captured once and replayed: the device finds the next kernel by itself.",
     .run = CUDA_RUN(cuda_layer_two_streams),
     .workspace = CUDA_PART(cuda_layer_bytes),
     .replay = true},
    {.name = "divided",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "The products get two thirds of the multiprocessors, the gathers the rest; a last kernel adds both sums.",
     .run = CUDA_RUN(cuda_layer_divided),
     .workspace = CUDA_PART(cuda_layer_bytes),
     .replay = true},
    {.name = "few-tokens",
     .level = LEVEL_HOPPER,
     .backend = BACKEND_CUDA,
     .idea = "Up to 16 tokens: the routed branch is one kernel, a cluster has a token or two; for one, the MLP's first "
             "product is in it.",
     .run = CUDA_RUN(cuda_layer_few),
     .workspace = CUDA_PART(cuda_layer_bytes),
     .supports = CUDA_PART(cuda_layer_is_few),
     .replay = true},
    {0},
};

#define UNTIL(function)                                                                                                \
    {                                                                                                                  \
        .level = LEVEL_CORE, .backend = BACKEND_CUDA, .run = CUDA_RUN(function),                                       \
        .workspace = CUDA_PART(cuda_layer_bytes), .replay = true                                                       \
    }

const fmoe_rung cuda_layer_until[] = {UNTIL(cuda_layer_until_router), UNTIL(cuda_layer_until_topk),
                                      UNTIL(cuda_layer_until_experts), UNTIL(cuda_layer_in_turn)};
