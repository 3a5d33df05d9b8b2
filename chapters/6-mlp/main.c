// Chapter 6: the shared dense MLP.
#include "../../cuda/rungs.h"
#include "../steps.h"

static const char *const cases[] = {"T256-d256-I1024-f32", "T1024-d512-I2048-f32", "T1024-d512-I2048-bf16",
                                    "T1-d1024-I4096-f32",  "T1-d1024-I4096-bf16",  NULL};
static const char *const quick_cases[] = {"T64-d256-I1024-f32", "T256-d256-I1024-bf16", "T1-d1024-I4096-f32", NULL};
static const char *const cuda_cases[] = {
    "T4096-d1024-I4096-bf16", "T1024-d4096-I16384-bf16", "T4096-d4096-I16384-bf16", "T1024-d1024-I4096-f16",
    "T1024-d1024-I4096-f32",  "T64-d1024-I4096-bf16",    "T8-d1024-I4096-bf16",     NULL};

int main(int argc, char **argv) {
    static const fmoe_ladder ladders[] = {
        {&fmoe_step_mlp, chapter6_rungs, cases, quick_cases, cuda_mlp_rungs, cuda_cases}, {0}};
    static const fmoe_chapter chapter = {.number = 6, .title = "the shared dense MLP", .ladders = ladders};
    return fmoe_chapter_main(&chapter, argc, argv);
}
