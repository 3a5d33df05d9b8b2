/* The rungs of schedule on the GPU, for their ladder (ladder.c) and for fmoe_cuda_schedule. */
#ifndef FMOE_CUDA_SCHEDULE_H
#define FMOE_CUDA_SCHEDULE_H

#include "../../chapters/steps.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Each takes fmoe_schedule_args with device pointers and notes bad indices in its workspace. */
fmoe_rung_fn cuda_schedule_atomics, cuda_schedule_radix_cub, cuda_schedule_slices, cuda_schedule_two_levels,
    cuda_schedule_even, cuda_schedule_overlap, cuda_schedule_table;
fmoe_workspace_fn cuda_schedule_atomics_workspace, cuda_schedule_radix_cub_workspace, cuda_schedule_slices_workspace,
    cuda_schedule_levels_workspace, cuda_schedule_table_workspace;
bool cuda_schedule_table_fits(const void *args);

#ifdef __cplusplus
}
#endif
#endif
