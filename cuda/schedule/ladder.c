/* The ladder of schedule on the GPU (chapter 4): from atomics and a sort to two kernels that any routing keeps busy. */
#include "../fmoe_cuda.h"
#include "../rungs.h"
#include "schedule.h"

static bool within_limits(const void *args) {
    const fmoe_schedule_args *a = args;
    return a->N <= FMOE_CUDA_MAX_EXPERTS;
}

const fmoe_rung cuda_schedule_rungs[] = {
    {.name = "atomics",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "A thread a pair races for its expert's next place; then a block an expert sorts what that left.",
     .run = CUDA_RUN(cuda_schedule_atomics),
     .workspace = CUDA_PART(cuda_schedule_atomics_workspace),
     .supports = within_limits},
    {.name = "radix-cub",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "The library's radix sort of (expert, pair), a digit a pass; the offsets by bisection.",
     .run = CUDA_RUN(cuda_schedule_radix_cub),
     .workspace = CUDA_PART(cuda_schedule_radix_cub_workspace),
     .supports = within_limits,
     .library = true},
    {.name = "slices",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "A slice of pairs a warp, with a histogram of its own: stable, no race, but slices · N counters to scan.",
     .run = CUDA_RUN(cuda_schedule_slices),
     .workspace = CUDA_PART(cuda_schedule_slices_workspace),
     .supports = within_limits},
    {.name = "two-levels",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "Chunks by bucket, then buckets by expert, in shared memory: two kernels and no scan over the grid.",
     .run = CUDA_RUN(cuda_schedule_two_levels),
     .workspace = CUDA_PART(cuda_schedule_levels_workspace),
     .supports = within_limits},
    {.name = "even",
     .level = LEVEL_CORE,
     .backend = BACKEND_CUDA,
     .idea = "A large bucket is shared by as many blocks as it needs: no routing makes one block wait for another.",
     .run = CUDA_RUN(cuda_schedule_even),
     .workspace = CUDA_PART(cuda_schedule_levels_workspace),
     .supports = within_limits},
    {.name = "overlap",
     .level = LEVEL_HOPPER,
     .backend = BACKEND_CUDA,
     .idea = "The second kernel starts while the first one runs and waits inside: a launch's latency less.",
     .run = CUDA_RUN(cuda_schedule_overlap),
     .workspace = CUDA_PART(cuda_schedule_levels_workspace),
     .supports = within_limits},
    {.name = "table",
     .level = LEVEL_HOPPER,
     .backend = BACKEND_CUDA,
     .idea = "Chunks fully by expert, and a table of their counts: a block fills 2,560 places of the result, whosever.",
     .run = CUDA_RUN(cuda_schedule_table),
     .workspace = CUDA_PART(cuda_schedule_table_workspace),
     .supports = CUDA_PART(cuda_schedule_table_fits)},
    {0},
};
