// Chapter 3: the Cartesian-product top-k.
#include "../../cuda/rungs.h"
#include "../steps.h"

// K scans over all pairs take more than a second at the other sizes, so the first case is small.
static const char *const cases[] = {"T64-n128-K64-normal-f32", "T1024-n128-K64-normal-f32",
                                    "T4096-n128-K64-trained-bf16", "T1024-n320-K512-normal-f32", NULL};
static const char *const quick_cases[] = {"T64-n128-K64-normal-f32", "T1024-n128-K64-normal-f32", NULL};
static const char *const cuda_cases[] = {"T4096-n128-K64-normal-f32",   "T4096-n128-K64-normal-bf16",
                                         "T4096-n128-K64-trained-bf16", "T32768-n128-K16-normal-f32",
                                         "T1024-n256-K32-normal-bf16",  "T4096-n320-K512-normal-f32",
                                         "T1024-n320-K4096-normal-f32", NULL};

static const char *const backward_cases[] = {"T4096-n128-K64-normal-f32", "T4096-n320-K512-normal-f32", NULL};

int main(int argc, char **argv) {
    static const fmoe_ladder ladders[] = {
        {&fmoe_step_topk, chapter3_rungs, cases, quick_cases, cuda_topk_rungs, cuda_cases},
        {&fmoe_step_topk_backward, chapter9_topk_rungs, NULL, NULL, cuda_topk_backward_rungs, backward_cases},
        {0},
    };
    static const fmoe_chapter chapter = {.number = 3, .title = "the Cartesian-product top-k", .ladders = ladders};
    return fmoe_chapter_main(&chapter, argc, argv);
}
