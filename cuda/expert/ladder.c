/* The expert step's ladders on the GPU: token by token (chapter 1), and what a schedule changes (chapter 5). */
#include "../rungs.h"
#include "expert.h"

const fmoe_rung cuda_expert_token_rungs[] = {
    {.name = "thread-a-token",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "The plain loop, a thread a token: neighbouring threads read rows far apart.",
     .run = CUDA_RUN(cuda_expert_thread_a_token),
     .workspace = CUDA_PART(cuda_expert_bytes),
     .supports = CUDA_PART(cuda_expert_small)},
    {.name = "warp-a-token",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "A warp a token: its 32 lanes read neighbouring elements of one row, so that nothing fetched is wasted.",
     .run = CUDA_RUN(cuda_expert_warp_a_token),
     .workspace = CUDA_PART(cuda_expert_bytes)},
    {.name = "vectors",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea =
         "16 bytes a lane and load: an eighth of the load instructions for 16-bit rows, eight times as much in flight.",
     .run = CUDA_RUN(cuda_expert_vectors),
     .workspace = CUDA_PART(cuda_expert_bytes),
     .supports = CUDA_PART(cuda_expert_16_byte_rows)},
    {.name = "in-flight",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "Four warps a token, x in registers, two rows of 2 KB on their way before the first is used.",
     .run = CUDA_RUN(cuda_expert_in_flight),
     .workspace = CUDA_PART(cuda_expert_bytes)},
    {.name = "two-kernels",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "All tokens' first phase before any token's second: one table at a time has the L2 to itself.",
     .run = CUDA_RUN(cuda_expert_two_kernels),
     .workspace = CUDA_PART(cuda_expert_bytes)},
    {.run = NULL},
};

const fmoe_rung cuda_expert_scheduled_rungs[] = {
    {.name = "slices",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "A table larger than the L2 is walked in slices of columns that fit it, all tokens a slice.",
     .run = CUDA_RUN(cuda_expert_slices),
     .workspace = CUDA_PART(cuda_expert_slices_bytes)},
    {.run = NULL},
};
