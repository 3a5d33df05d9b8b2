/* Chapter 4: expert-centric scheduling, building the order. */
#include "../../cuda/rungs.h"
#include "../steps.h"

static const char *const cases[] = {
    "T4096-N16384-K64-normal-f32",    "T4096-N16384-K64-trained-f32",    "T4096-N16384-K64-hot-f32",
    "T4096-N102400-K512-uniform-f32", "T65536-N1048576-K64-uniform-f32", NULL,
};
static const char *const quick_cases[] = {
    "T1024-N16384-K64-normal-f32",
    "T1024-N16384-K64-hot-f32",
    "T16384-N1048576-K64-uniform-f32",
    NULL,
};
static const char *const cuda_cases[] = {"T4096-N16384-K64-uniform-f32", "T16384-N102400-K512-uniform-f32", NULL};
static const fmoe_ladder ladders[] = {
    {&fmoe_step_schedule, chapter4_rungs, cases, quick_cases, cuda_schedule_rungs, cuda_cases},
    {0},
};
static const fmoe_chapter chapter = {
    .number = 4,
    .title = "expert-centric scheduling: building the order",
    .ladders = ladders,
};

int main(int argc, char **argv) {
    return fmoe_chapter_main(&chapter, argc, argv);
}
