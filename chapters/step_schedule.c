/* The step of chapter 4: how its problem is drawn, what its reference is, what it must move. */
#include "steps.h"

#include "../ref_cpu/check.h"

#include <stdlib.h>

static fmoe_status draw(fmoe_problem *p) {
    fmoe_schedule_args *a = p->args;
    if (!p->c.N)
        p->c.N = p->c.n * p->c.n;
    TRY(fmoe_check_experts(p->c.N));
    TRY(fmoe_check_topk(p->c.K, "N", p->c.N));
    a->T = p->c.T;
    a->K = p->c.K;
    a->N = p->c.N;
    fmoe_argument *indices = fmoe_problem_add(p, "indices", offsetof(fmoe_schedule_args, indices), FMOE_I32, ROLE_INPUT,
                                              2, (int64_t[]){a->T, a->K});
    fmoe_argument *offsets = fmoe_problem_add(p, "offsets", offsetof(fmoe_schedule_args, offsets), FMOE_I32,
                                              ROLE_OUTPUT, 1, (int64_t[]){a->N + 1});
    fmoe_argument *pairs = fmoe_problem_add(p, "pairs", offsetof(fmoe_schedule_args, pairs), FMOE_I32, ROLE_OUTPUT, 1,
                                            (int64_t[]){a->T * a->K});
    if (!indices || !offsets || !pairs)
        return FMOE_OUT_OF_MEMORY;
    // The routing comes with weights, which a schedule has no use for.
    float *weights = malloc((size_t)(a->T * a->K) * sizeof *weights + 1);
    if (!weights)
        return FMOE_OUT_OF_MEMORY;
    fmoe_status status = fmoe_case_route(&p->c, p->seed, indices->data, weights);
    free(weights);
    return status;
}

static fmoe_status reference(fmoe_problem *p) {
    const fmoe_schedule_args *a = p->args;
    return fmoe_schedule(a->T, a->K, a->N, a->indices, fmoe_problem_find(p, "offsets")->expected,
                         fmoe_problem_find(p, "pairs")->expected);
}

/* Nothing is computed: the floor is the indices read once, the pairs and the offsets written once. */
static fmoe_work work(const fmoe_problem *p, const fmoe_ceilings *ceilings) {
    const fmoe_schedule_args *a = p->args;
    fmoe_work w = {.floor_why = "indices in, pairs and offsets out, at the copy rate"};
    w.bytes = 4.0 * (double)(2 * a->T * a->K + a->N + 1);
    w.floor_ms = w.bytes / ceilings->copy_gbs * 1e-6;
    return w;
}

const fmoe_step fmoe_step_schedule = {
    .op = "schedule",
    .args_size = sizeof(fmoe_schedule_args),
    .draw = draw,
    .reference = reference,
    .work = work,
};
