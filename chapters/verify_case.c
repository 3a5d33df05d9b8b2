/* A step at a case together with its gradients: two problems that share their inputs. */
#include "steps.h"
#include "verify.h"

#include "../ref_cpu/check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- Gradients at the same inputs -------------------------------------------------------------------------------- */

/* The layer's step of chapter 9 has its forward results too, so that its gradients need no second problem. */
static const fmoe_step *whole_step(const fmoe_step *step) {
    return step == &fmoe_step_layer ? &fmoe_step_layer_backward : step;
}

static const fmoe_step *gradient_step(const fmoe_step *step) {
    if (step == &fmoe_step_router)
        return &fmoe_step_router_backward;
    if (step == &fmoe_step_topk)
        return &fmoe_step_topk_backward;
    if (step == &fmoe_step_expert)
        return &fmoe_step_expert_backward;
    return step == &fmoe_step_mlp ? &fmoe_step_mlp_backward : NULL;
}

/* By the forward pass, for the way back. */
static bool is_kept(const fmoe_step *step, const char *name) {
    if (step == &fmoe_step_expert_backward)
        return !strcmp(name, "pre_activations") || !strcmp(name, "offsets") || !strcmp(name, "pairs");
    return step == &fmoe_step_mlp_backward && name[0] == 'h'; /* h and what dh is multiplied by */
}

/* What expert_backward keeps from the forward pass, at the inputs it has now. */
static fmoe_status keep_pre_activations(fmoe_problem *p) {
    const fmoe_expert_backward_args *a = p->args;
    float *x = fmoe_problem_f32(p, "x"), *down = fmoe_problem_f32(p, "down"), *up = fmoe_problem_f32(p, "up");
    float *y = fmoe_allocate(a->T * a->d, sizeof *y);
    fmoe_status status = FMOE_OUT_OF_MEMORY;
    if (x && down && up && y)
        status = fmoe_expert(a->T, a->d, a->N, a->K, x, down, up, a->indices, a->weights, y,
                             fmoe_problem_find(p, "pre_activations")->data);
    free(x);
    free(down);
    free(up);
    free(y);
    return status;
}

/* Inputs of the same name become the same, and what depends on them is computed again. */
static fmoe_status share_inputs(const fmoe_problem *from, fmoe_problem *to) {
    for (int i = 0; i < to->num_arguments; i++) {
        fmoe_argument *a = &to->arguments[i];
        const fmoe_argument *b = fmoe_problem_find(from, a->name);
        if (a->role == ROLE_INPUT && b && b->role == ROLE_INPUT)
            memcpy(a->data, b->data, (size_t)a->count * fmoe_dtype_size(a->dtype));
    }
    if (to->step == &fmoe_step_expert_backward)
        TRY(keep_pre_activations(to));
    return to->step->reference(to);
}

/* A reference that leaves tokens out, as the mlp's does for cases that would keep it busy for minutes, is none to hand
 * on. */
static fmoe_status check_complete(const fmoe_problem *p) {
    for (int i = 0; i < p->num_arguments; i++)
        if (p->arguments[i].rows_apart > 1)
            return fmoe_fail(FMOE_UNSUPPORTED, "case '%s' is too large: its reference is not computed in full",
                             p->c.name);
    return FMOE_OK;
}

fmoe_status verify_case_new(const fmoe_step *step, const fmoe_case *c, uint64_t seed, verify_case *v) {
    *v = (verify_case){.step = step};
    TRY(fmoe_problem_new(whole_step(step), c, seed, &v->parts[0]));
    v->count = 1;
    const fmoe_step *gradients = gradient_step(step);
    fmoe_status status = check_complete(&v->parts[0]);
    if (gradients && status == FMOE_OK) {
        status = fmoe_problem_new(gradients, c, seed, &v->parts[1]);
        v->count += status == FMOE_OK;
        if (status == FMOE_OK)
            status = share_inputs(&v->parts[0], &v->parts[1]);
    }
    if (status != FMOE_OK)
        verify_case_free(v);
    return status;
}

void verify_case_free(verify_case *v) {
    for (int i = 0; i < v->count; i++)
        fmoe_problem_free(&v->parts[i]);
    v->count = 0;
}

/* Of the second part only what the first has not: dy in, gradients out. */
static bool is_new(const verify_case *v, int part, const fmoe_argument *a) {
    return a->data && (part == 0 || !fmoe_problem_find(&v->parts[0], a->name));
}

bool verify_is_input(const verify_case *v, int part, const fmoe_argument *a) {
    return is_new(v, part, a) && a->role != ROLE_OUTPUT && !is_kept(v->parts[part].step, a->name);
}

const fmoe_argument *verify_find(const verify_case *v, const char *name, bool output, const fmoe_problem **part) {
    for (int i = 0; i < v->count; i++) {
        const fmoe_argument *a = fmoe_problem_find(&v->parts[i], name);
        if (!a || !(output ? is_new(v, i, a) && a->role != ROLE_INPUT : verify_is_input(v, i, a)))
            continue;
        *part = &v->parts[i];
        return a;
    }
    return NULL;
}
