/* The rungs of topk on the GPU, for their ladder (ladder.c) and for fmoe_cuda_topk. */
#ifndef FMOE_CUDA_TOPK_H
#define FMOE_CUDA_TOPK_H

#include "../../chapters/steps.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Each takes fmoe_topk_args with device pointers; scores and weights may be NULL. None needs a workspace. */
fmoe_rung_fn cuda_topk_scans, cuda_topk_key_lists, cuda_topk_staircase, cuda_topk_warp, cuda_topk_packed,
    cuda_topk_keep_best, cuda_topk_pair;

#ifdef __cplusplus
}
#endif

/* The sizes that a warp's registers and share of shared memory hold. */
#define TOPK_WARP_KEYS 512
#define TOPK_WARP_TOPK 512
/* The same for two tokens in a warp. */
#define TOPK_PAIR_KEYS 128
#define TOPK_PAIR_TOPK 64
/* key-lists: so many pairs of best keys fit shared memory. */
#define TOPK_LIST_PAIRS 4096

#endif
