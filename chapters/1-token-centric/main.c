/* Chapter 1: one expert is one neuron. The token-centric step. */
#include "../../cuda/rungs.h"
#include "../steps.h"

static const char *const cases[] = {"T1024-d256-N16384-K64-normal-f32", "T1024-d256-N16384-K64-normal-bf16",
                                    "T1024-d256-N1024-K64-uniform-f32", NULL};
static const char *const quick_cases[] = {"T1024-d256-N16384-K64-normal-f32", "T512-d256-N1024-K64-uniform-f32", NULL};

static const char *const cuda_cases[] = {"T4096-d1024-N16384-K64-normal-bf16",
                                         "T4096-d1024-N16384-K64-trained-bf16",
                                         "T1024-d1024-N1024-K32-uniform-bf16",
                                         "T1024-d1024-N4096-K32-uniform-bf16",
                                         "T1024-d1024-N16384-K32-uniform-bf16",
                                         "T1024-d1024-N65536-K32-uniform-bf16",
                                         NULL};

static const fmoe_ladder ladders[] = {
    {&fmoe_step_expert, chapter1_rungs, cases, quick_cases, cuda_expert_token_rungs, cuda_cases}, {0}};

static const fmoe_chapter chapter = {
    .number = 1, .title = "one expert is one neuron: the token-centric step", .ladders = ladders};

int main(int argc, char **argv) {
    return fmoe_chapter_main(&chapter, argc, argv);
}
