/* Chapter 5: the fused expert step. Running the schedule. */
#include "../steps.h"

static const char *const cases[] = {"T1024-d256-N16384-K64-normal-f32",  "T1024-d256-N16384-K64-uniform-f32",
                                    "T1024-d256-N16384-K64-trained-f32", "T1024-d256-N16384-K64-hot-f32",
                                    "T16384-d256-N4096-K2-hot-f32",      NULL};
static const char *const quick_cases[] = {"T1024-d256-N16384-K64-normal-f32", "T16384-d256-N4096-K2-hot-f32", NULL};

static const fmoe_ladder ladders[] = {{&fmoe_step_expert, chapter5_rungs, cases, quick_cases}, {0}};

static const fmoe_chapter chapter = {
    .number = 5, .title = "the fused expert step: running the schedule", .ladders = ladders};

int main(int argc, char **argv) {
    return fmoe_chapter_main(&chapter, argc, argv);
}
