#include "../steps.h"
static const char *const t_cases[] = {"T4096-n128-K64-normal-f32", NULL};
static const char *const e_cases[] = {"T1024-d256-N16384-K64-uniform-f32", "T1024-d256-N16384-K64-trained-f32","T1024-d256-N16384-K64-trained-bf16","T4096-d256-N1024-K2-hot-f32", NULL};
static const char *const m_cases[] = {"T256-d256-I1024-f32","T1024-d512-I2048-f32", NULL};
static const char *const l_cases[] = {"T256-d256-I1024-N4096-K32-normal-f32-train","T1024-d256-I1024-N16384-K64-normal-f32-train", NULL};
static const fmoe_ladder ladders[] = {{&fmoe_step_topk_backward, chapter9_topk_rungs, t_cases, t_cases},
{&fmoe_step_expert_backward, chapter9_expert_rungs, e_cases, e_cases},
{&fmoe_step_mlp_backward, chapter9_mlp_rungs, m_cases, m_cases},
{&fmoe_step_layer_backward, chapter9_layer_rungs, l_cases, l_cases},{.step = NULL}};
int main(int argc, char **argv) {
    fmoe_chapter chapter = {.number = 9, .title = "the backward pass", .ladders = ladders};
    return fmoe_chapter_main(&chapter, argc, argv);
}
