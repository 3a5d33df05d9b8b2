// Chapter 2: router norm and logits.
#include "../../cuda/rungs.h"
#include "../steps.h"

static const char *const cases[] = {"T4096-d256-n128-f32", "T4096-d256-n128-f32-train", "T1024-d1024-n128-bf16", NULL};
static const char *const quick_cases[] = {"T1024-d256-n128-f32", "T1024-d256-n128-f32-train", NULL};
static const char *const cuda_cases[] = {"T4096-d1024-n128-bf16", "T4096-d1024-n128-bf16-train", "T4096-d1024-n128-f32",
                                         "T16384-d1024-n128-bf16", NULL};

int main(int argc, char **argv) {
    static const fmoe_ladder ladders[] = {
        {&fmoe_step_router, chapter2_rungs, cases, quick_cases, cuda_router_rungs, cuda_cases}, {0}};
    static const fmoe_chapter chapter = {.number = 2, .title = "router norm and logits", .ladders = ladders};
    return fmoe_chapter_main(&chapter, argc, argv);
}
