/* The ladder of topk on the GPU (chapter 3): from K scans over all pairs to a warp that holds a token in registers. */
#include "../fmoe_cuda.h"
#include "../rungs.h"
#include "topk.h"

static bool within_limits(const void *args) {
    const fmoe_topk_args *a = args;
    return a->n <= FMOE_CUDA_MAX_KEYS && a->K <= FMOE_CUDA_MAX_TOPK;
}

/* K scans over n² pairs a token: up to 20 ms are enough to wait. */
static bool few_visits(const void *args) {
    const fmoe_topk_args *a = args;
    return within_limits(args) && (double)a->T * (double)a->K * (double)a->n * (double)a->n < 1.2e10;
}

static bool lists_fit(const void *args) {
    const fmoe_topk_args *a = args;
    int64_t best = a->K < a->n ? a->K : a->n;
    return within_limits(args) && best * best <= TOPK_LIST_PAIRS;
}

static bool warp_fits(const void *args) {
    const fmoe_topk_args *a = args;
    return a->n <= TOPK_WARP_KEYS && a->K <= TOPK_WARP_TOPK;
}

static bool pair_fits(const void *args) {
    const fmoe_topk_args *a = args;
    return a->n <= TOPK_PAIR_KEYS && a->K <= TOPK_PAIR_TOPK;
}

const fmoe_rung cuda_topk_rungs[] = {
    {.name = "scans-gpu",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "A block a token: K scans over all n² pairs, as the definition says and as the Triton routers do.",
     .run = CUDA_RUN(cuda_topk_scans),
     .supports = few_visits},
    {.name = "key-lists-gpu",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "The best min(K, n) keys of each side, all their pairs, one bitonic sort in shared memory.",
     .run = CUDA_RUN(cuda_topk_key_lists),
     .supports = lists_fit},
    {.name = "staircase-gpu",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "Only the staircase's pairs; the K-th best by counting, bit by bit, and a sort of K: any n and K.",
     .run = CUDA_RUN(cuda_topk_staircase),
     .supports = within_limits},
    {.name = "warp",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "A warp a token: registers and shuffles, half a warp for each side, no barrier of a block.",
     .run = CUDA_RUN(cuda_topk_warp),
     .supports = warp_fits},
    {.name = "packed",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "Value and key share 32 bits: a third of the sorts' instructions; a check says who needs all 64.",
     .run = CUDA_RUN(cuda_topk_packed),
     .supports = warp_fits},
    {.name = "keep-best",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "A merge that keeps only the best K halves the registers each time, and so the work that follows.",
     .run = CUDA_RUN(cuda_topk_keep_best),
     .supports = warp_fits},
    {.name = "pair",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "Two tokens a warp: more registers a lane and fewer shuffles, and what a warp does once serves two.",
     .run = CUDA_RUN(cuda_topk_pair),
     .supports = pair_fits},
    {0},
};
