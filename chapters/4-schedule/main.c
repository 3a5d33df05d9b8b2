/* Chapter 4: expert-centric scheduling, building the order. */
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
static const fmoe_ladder ladders[] = {
    {.step = &fmoe_step_schedule, .rungs = chapter4_rungs, .cases = cases, .quick_cases = quick_cases},
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
