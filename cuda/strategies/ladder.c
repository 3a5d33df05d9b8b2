/* The strategies' ladder on the GPU (chapter 7). */
#include "../expert/expert.h"
#include "../rungs.h"
#include "strategies.h"

const fmoe_rung cuda_strategies_rungs[] = {
    {.name = "token",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "Chapter 5's best: two rows a pair, gathered through the L2. 4·T·K·d operations, none wasted.",
     .run = CUDA_RUN(cuda_expert_slices),
     .workspace = CUDA_PART(cuda_expert_slices_bytes)},
    {.name = "dense",
     .level = LEVEL_HOPPER,
     .backend = BACKEND_CUDA,
     .idea = "All T·N products on tensor cores, masked in the epilogue, and T·N more: no rows are gathered at all.",
     .run = CUDA_RUN(cuda_strategy_dense),
     .workspace = CUDA_PART(cuda_strategy_dense_bytes),
     .supports = CUDA_PART(cuda_strategy_dense_fits)},
    {.name = "cartesian rows",
     .level = LEVEL_HOPPER,
     .backend = BACKEND_CUDA,
     .idea = "A token meets all n experts of the grid rows it chose from, on tensor cores; the output goes by token.",
     .run = CUDA_RUN(cuda_strategy_rows),
     .workspace = CUDA_PART(cuda_strategy_rows_bytes),
     .supports = CUDA_PART(cuda_strategy_rows_fits)},
    {.name = "chooser",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea =
         "Whichever of the three a cost model of T, N, K, d, the storage type and the caller's hint says is fastest.",
     .run = CUDA_RUN(cuda_strategy_chooser),
     .workspace = CUDA_PART(cuda_strategy_chooser_bytes)},
    {.run = NULL},
};
