/* The expert step's rungs on the GPU, for their ladders (ladder.c) and for fmoe_cuda_expert. */
#ifndef FMOE_CUDA_EXPERT_H
#define FMOE_CUDA_EXPERT_H

#include "../../chapters/steps.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Each takes fmoe_expert_args with device pointers and notes bad indices. */
fmoe_rung_fn cuda_expert_thread_a_token, cuda_expert_warp_a_token, cuda_expert_vectors, cuda_expert_in_flight,
    cuda_expert_two_kernels, cuda_expert_evict_last;
fmoe_rung_fn cuda_expert_block_an_expert, cuda_expert_balanced, cuda_expert_slices, cuda_expert_cusparse;
/* The workspace of the rungs that keep a number a pair, of those that build a schedule, and of the one that keeps a
 * number a pair and slice. */
fmoe_workspace_fn cuda_expert_bytes, cuda_expert_schedule_bytes, cuda_expert_slices_bytes;
/* Rows that start at multiples of 16 bytes; what a single thread a token can do in a tolerable time; what the schedule
 * can count. */
bool cuda_expert_16_byte_rows(const void *args), cuda_expert_small(const void *args),
    cuda_expert_can_schedule(const void *args);
/* The library's rung: its workspace, whether the library was found, and what it can count. */
fmoe_workspace_fn cuda_expert_cusparse_bytes;
bool cuda_expert_cusparse_available(void), cuda_expert_cusparse_supports(const void *args);

#ifdef __cplusplus
}
#endif
#endif
