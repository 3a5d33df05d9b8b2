/* layer_forward_backward: one training step without the optimiser, from the rungs of every chapter. */
#include "../../ref_cpu/check.h"
#include "backward.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

typedef fmoe_layer_backward_args layer_args;
typedef fmoe_topk_backward_args topk_args;
typedef fmoe_expert_backward_args expert_args;
typedef fmoe_mlp_backward_args mlp_args;

/* ---- Router ------------------------------------------------------------------------------------------------------ */

/* What passes from step to step, forward and back. */
typedef struct {
    float *x_hat, *scale, *dx_hat, *dlogits;
    float *weights, *pre_activations, *dweights;
    int32_t *offsets, *pairs;
} between;

static between carve_between(const fmoe_layer_args *f, void *workspace, size_t *used) {
    between b;
    b.x_hat = carve_floats(workspace, used, f->T * f->d);
    b.scale = carve_floats(workspace, used, f->d);
    b.dx_hat = carve_floats(workspace, used, f->T * f->d);
    b.dlogits = carve_floats(workspace, used, 2 * f->T * f->n);
    b.weights = carve_floats(workspace, used, f->T * f->K);
    b.pre_activations = carve_floats(workspace, used, f->T * f->K);
    b.dweights = carve_floats(workspace, used, f->T * f->K);
    b.offsets = carve(workspace, used, (size_t)(f->N + 1) * sizeof *b.offsets);
    b.pairs = carve(workspace, used, (size_t)(f->T * f->K) * sizeof *b.pairs);
    return b;
}

static fmoe_router_args router_of(const fmoe_layer_args *f) {
    return (fmoe_router_args){.T = f->T,
                              .d = f->d,
                              .n = f->n,
                              .training = f->training,
                              .dtype = f->dtype,
                              .x = f->x,
                              .gate = f->router_gate,
                              .running_mean = f->running_mean,
                              .running_var = f->running_var,
                              .logits = f->router_logits};
}

static void norm(const fmoe_layer_args *f, bool move, const between *b) {
    fmoe_router_args router = router_of(f);
    router_norm(&router, move, b->x_hat, b->scale);
}

static fmoe_status router_logits(const fmoe_layer_args *f, const between *b, void *workspace, size_t bytes) {
    fmoe_router_args router = router_of(f);
    gemm_operand x_hat = by_rows(FMOE_F32, b->x_hat, f->d);
    for (int side = 0; side < 2; side++) {
        gemm_operand gate = by_rows(f->dtype, router_gate_side(&router, side), f->d);
        gemm_target logits = {FMOE_F32, f->router_logits + side * f->T * f->n, f->n};
        TRY(gemm(f->T, f->n, f->d, &x_hat, &gate, gemm_store, &logits, workspace, bytes));
    }
    return FMOE_OK;
}

static fmoe_status router_backward(const layer_args *a, const between *b, const float *others, void *workspace,
                                   size_t bytes) {
    fmoe_router_args router = router_of(&a->forward);
    router_buffers buffers = {b->x_hat, b->scale, b->dx_hat};
    return router_gradients(&router, &buffers, b->dlogits, others, a->dx, a->drouter_gate, workspace, bytes);
}

/* ---- The steps' arguments ---------------------------------------------------------------------------------------- */

static fmoe_topk_args topk_of(const fmoe_layer_args *f, const between *b) {
    return (fmoe_topk_args){f->T,       f->n,      f->K,      f->norm_topk_prob, FMOE_F32, f->router_logits,
                            f->indices, f->scores, b->weights};
}

static topk_args topk_backward_of(const fmoe_layer_args *f, const between *b) {
    return (topk_args){f->T,       f->n,        f->K,      f->norm_topk_prob, FMOE_F32, f->router_logits,
                       f->indices, b->dweights, b->dlogits};
}

static fmoe_schedule_args schedule_of(const fmoe_layer_args *f, const between *b) {
    return (fmoe_schedule_args){f->T, f->K, f->N, f->indices, b->offsets, b->pairs};
}

static expert_args expert_backward_of(const layer_args *a, const between *b, void *dx) {
    const fmoe_layer_args *f = &a->forward;
    return (expert_args){.T = f->T,
                         .d = f->d,
                         .N = f->N,
                         .K = f->K,
                         .dtype = f->dtype,
                         .x = f->x,
                         .down = f->down_embed,
                         .up = f->up_embed,
                         .indices = f->indices,
                         .weights = b->weights,
                         .pre_activations = b->pre_activations,
                         .offsets = b->offsets,
                         .pairs = b->pairs,
                         .dy = a->dy,
                         .dx = dx,
                         .ddown = a->ddown_embed,
                         .dup = a->dup_embed,
                         .dweights = b->dweights};
}

static mlp_args mlp_backward_of(const layer_args *a, void *dx) {
    const fmoe_layer_args *f = &a->forward;
    return (mlp_args){.T = f->T,
                      .d = f->d,
                      .I = f->I,
                      .dtype = f->dtype,
                      .x = f->x,
                      .gate = f->gate_proj,
                      .up = f->up_proj,
                      .down = f->down_proj,
                      .dy = a->dy,
                      .dx = dx,
                      .dgate = a->dgate_proj,
                      .dup = a->dup_proj,
                      .ddown = a->ddown_proj};
}

/* ---- Step by step ------------------------------------------------------------------------------------------------ */

/* In the order in which they run. */
enum { ROUTER, TOPK, SCHEDULE, EXPERT, MLP, MLP_BACKWARD, EXPERT_BACKWARD, TOPK_BACKWARD, NUM_STEPS };

typedef const fmoe_rung *const choice[NUM_STEPS];

static choice first_rungs = {
    [ROUTER] = chapter2_rungs,
    [TOPK] = chapter3_rungs,
    [SCHEDULE] = chapter4_rungs,
    [EXPERT] = chapter1_rungs,
    [MLP] = chapter6_rungs,
    [MLP_BACKWARD] = chapter9_mlp_rungs,
    [EXPERT_BACKWARD] = chapter9_expert_rungs,
    [TOPK_BACKWARD] = chapter9_topk_rungs,
};

static choice best_rungs = {
    [ROUTER] = &(const fmoe_rung){.run = cpu_router_best, .workspace = cpu_router_best_workspace},
    [TOPK] = &(const fmoe_rung){.run = cpu_topk_best, .workspace = cpu_topk_best_workspace},
    [SCHEDULE] = &(const fmoe_rung){.run = cpu_schedule_best, .workspace = cpu_schedule_best_workspace},
    [EXPERT] = &(const fmoe_rung){.run = cpu_expert_scheduled_best, .workspace = cpu_expert_scheduled_best_workspace},
    [MLP] = &(const fmoe_rung){.run = cpu_mlp_best, .workspace = cpu_mlp_best_workspace},
    [MLP_BACKWARD] = &(const fmoe_rung){.run = cpu_mlp_backward_best, .workspace = cpu_mlp_backward_best_workspace},
    [EXPERT_BACKWARD] =
        &(const fmoe_rung){.run = cpu_expert_backward_best, .workspace = cpu_expert_backward_best_workspace},
    [TOPK_BACKWARD] = &(const fmoe_rung){.run = cpu_topk_backward_best, .workspace = cpu_topk_backward_best_workspace},
};

typedef struct {
    fmoe_router_args router;
    fmoe_topk_args topk;
    fmoe_schedule_args schedule;
    fmoe_expert_args expert;
    fmoe_mlp_args mlp;
    mlp_args mlp_backward;
    expert_args expert_backward;
    topk_args topk_backward;
} steps;

static void list_steps(const steps *s, const void *list[NUM_STEPS]) {
    const void *all[NUM_STEPS] = {&s->router, &s->topk,         &s->schedule,        &s->expert,
                                  &s->mlp,    &s->mlp_backward, &s->expert_backward, &s->topk_backward};
    memcpy(list, all, sizeof all);
}

/* The layer with everything in float32 (copies of what is not), and what passes between its steps. */
typedef struct {
    layer_args a;
    between b;
    float *log_probs, *routed, *dx_expert;
    steps s;
    size_t bytes;
} by_steps;

/* A weight or a gradient as float32: where it is, or room for a copy. */
static void *carve_copy(const layer_args *a, const void *tensor, int64_t count, void *workspace, size_t *used) {
    void *copy = carve_floats(workspace, used, a->forward.dtype == FMOE_F32 ? 0 : count);
    return a->forward.dtype == FMOE_F32 ? (void *)tensor : copy;
}

/* Every tensor in the storage type, inputs first: where its pointer lies in the arguments, and its elements. */
typedef struct {
    size_t slot;
    int64_t count;
} stored_tensor;

enum { NUM_INPUTS = 8, NUM_STORED = 16 };

static void list_stored(const fmoe_layer_args *f, stored_tensor *list) {
    int64_t tokens = f->T * f->d, table = f->N * f->d, hidden_weights = f->I * f->d, gate = 2 * f->n * f->d;
    const stored_tensor all[NUM_STORED] = {
        {offsetof(layer_args, forward.x), tokens},
        {offsetof(layer_args, forward.router_gate), gate},
        {offsetof(layer_args, forward.down_embed), table},
        {offsetof(layer_args, forward.up_embed), table},
        {offsetof(layer_args, forward.gate_proj), hidden_weights},
        {offsetof(layer_args, forward.up_proj), hidden_weights},
        {offsetof(layer_args, forward.down_proj), hidden_weights},
        {offsetof(layer_args, dy), tokens},
        {offsetof(layer_args, forward.y), tokens},
        {offsetof(layer_args, dx), tokens},
        {offsetof(layer_args, drouter_gate), gate},
        {offsetof(layer_args, ddown_embed), table},
        {offsetof(layer_args, dup_embed), table},
        {offsetof(layer_args, dgate_proj), hidden_weights},
        {offsetof(layer_args, dup_proj), hidden_weights},
        {offsetof(layer_args, ddown_proj), hidden_weights},
    };
    memcpy(list, all, sizeof all);
}

static void *pointer_at(const layer_args *a, size_t slot) {
    void *pointer;
    memcpy(&pointer, (const char *)a + slot, sizeof pointer);
    return pointer;
}

static void set_steps(by_steps *l) {
    const fmoe_layer_args *f = &l->a.forward;
    int64_t T = f->T, d = f->d, I = f->I, N = f->N, K = f->K;
    l->s.router = (fmoe_router_args){.T = T,
                                     .d = d,
                                     .n = f->n,
                                     .training = f->training,
                                     .dtype = f->dtype,
                                     .x = f->x,
                                     .gate = f->router_gate,
                                     .running_mean = f->running_mean,
                                     .running_var = f->running_var,
                                     .logits = f->router_logits,
                                     .log_probs = l->log_probs};
    l->s.topk = topk_of(f, &l->b);
    l->s.schedule = schedule_of(f, &l->b);
    l->s.expert = (fmoe_expert_args){
        T, d, N, K, true, f->dtype, f->x, f->down_embed, f->up_embed, f->indices, l->b.weights, l->routed};
    l->s.mlp = (fmoe_mlp_args){T, d, I, f->dtype, f->x, f->gate_proj, f->up_proj, f->down_proj, f->y};
    l->s.mlp_backward = mlp_backward_of(&l->a, l->a.dx);
    l->s.expert_backward = expert_backward_of(&l->a, &l->b, l->dx_expert);
    l->s.topk_backward = topk_backward_of(f, &l->b);
}

static by_steps steps_layout(const layer_args *a, void *workspace) {
    by_steps l = {.a = *a};
    const fmoe_layer_args *f = &a->forward;
    stored_tensor stored[NUM_STORED];
    list_stored(f, stored);
    for (int i = 0; i < NUM_STORED; i++) {
        void *here = carve_copy(a, pointer_at(a, stored[i].slot), stored[i].count, workspace, &l.bytes);
        memcpy((char *)&l.a + stored[i].slot, &here, sizeof here);
    }
    l.a.forward.dtype = FMOE_F32;
    l.b = carve_between(f, workspace, &l.bytes);
    l.log_probs = carve_floats(workspace, &l.bytes, 2 * f->T * f->n);
    l.routed = carve_floats(workspace, &l.bytes, f->T * f->d);
    l.dx_expert = carve_floats(workspace, &l.bytes, f->T * f->d);
    set_steps(&l);
    return l;
}

static size_t steps_workspace(choice with, const layer_args *a) {
    by_steps l = steps_layout(a, NULL);
    const void *args[NUM_STEPS];
    list_steps(&l.s, args);
    size_t most = router_gemm_workspace(a->forward.T, a->forward.d, a->forward.n);
    for (int i = 0; i < NUM_STEPS; i++)
        if (with[i]->workspace)
            most = larger(most, with[i]->workspace(args[i]));
    return l.bytes + most;
}

static void find_pre_activations(const fmoe_expert_args *e, float *pre_activations) {
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < e->T * e->K; p++)
        pre_activations[p] =
            dot(e->d, (const float *)e->x + p / e->K * e->d, (const float *)e->down + e->indices[p] * e->d);
}

// [by-steps]
static fmoe_status run_steps(choice with, by_steps *l, void *rest, size_t bytes) {
    const fmoe_layer_args *f = &l->a.forward;
    const void *args[NUM_STEPS];
    list_steps(&l->s, args);
    for (int i = ROUTER; i <= MLP; i++)
        TRY(with[i]->run(args[i], rest, bytes, NULL));
    add_scaled(f->T * f->d, 1, l->routed, f->y);

    /* And back. What the steps did not keep is computed again. */
    find_pre_activations(&l->s.expert, l->b.pre_activations);
    for (int i = MLP_BACKWARD; i <= TOPK_BACKWARD; i++)
        TRY(with[i]->run(args[i], rest, bytes, NULL));
    add_scaled(f->T * f->d, 1, l->a.dx, l->dx_expert);
    norm(f, false, &l->b);
    return router_backward(&l->a, &l->b, l->dx_expert, rest, bytes);
}
// [/by-steps]

/* Copies in, the steps, copies out. */
static fmoe_status step_by_step(choice with, const layer_args *a, void *workspace, size_t bytes) {
    by_steps l = steps_layout(a, workspace);
    stored_tensor stored[NUM_STORED];
    list_stored(&a->forward, stored);
    bool copied = a->forward.dtype != FMOE_F32;
    for (int i = 0; copied && i < NUM_INPUTS; i++)
        as_f32(a->forward.dtype, pointer_at(a, stored[i].slot), stored[i].count, pointer_at(&l.a, stored[i].slot));
    TRY(run_steps(with, &l, (char *)workspace + l.bytes, bytes - l.bytes));
    for (int i = NUM_INPUTS; copied && i < NUM_STORED; i++)
        fmoe_from_f32(a->forward.dtype, stored[i].count, pointer_at(&l.a, stored[i].slot),
                      pointer_at(a, stored[i].slot));
    return FMOE_OK;
}

static size_t first_workspace(const void *args) {
    return steps_workspace(first_rungs, args);
}

static fmoe_status with_first_rungs(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)stream;
    return step_by_step(first_rungs, args, workspace, workspace_bytes);
}

static size_t best_workspace(const void *args) {
    return steps_workspace(best_rungs, args);
}

static fmoe_status with_best_rungs(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)stream;
    return step_by_step(best_rungs, args, workspace, workspace_bytes);
}

static bool small_enough(const void *args) {
    const fmoe_layer_args *f = args;
    return (double)f->T * (double)f->d * (double)f->I <= 0x1p26;
}

/* ---- With everything kept ---------------------------------------------------------------------------------------- */

typedef struct {
    between b;
    hidden h;
    ordered o;
    expert_args experts;
    mlp_args mlp;
    float *activations, *sums;
    size_t bytes;
} kept;

static kept kept_layout(const layer_args *a, void *workspace) {
    kept k = {.bytes = 0};
    const fmoe_layer_args *f = &a->forward;
    k.b = carve_between(f, workspace, &k.bytes);
    k.experts = expert_backward_of(a, &k.b, NULL);
    k.mlp = mlp_backward_of(a, NULL);
    k.h = carve_hidden(&k.mlp, workspace, &k.bytes);
    k.o = carve_ordered(&k.experts, workspace, &k.bytes);
    k.activations = carve_floats(workspace, &k.bytes, f->T * f->K);
    k.sums = carve_floats(workspace, &k.bytes, f->T * f->d);
    return k;
}

static size_t kept_workspace(const void *args) {
    const layer_args *a = args;
    const fmoe_layer_args *f = &a->forward;
    kept k = kept_layout(a, NULL);
    fmoe_topk_args topk = topk_of(f, &k.b);
    topk_args topk_backward = topk_backward_of(f, &k.b);
    fmoe_schedule_args schedule = schedule_of(f, &k.b);
    size_t most = larger(router_gemm_workspace(f->T, f->d, f->n), mlp_gemm_workspace(f->T, f->d, f->I));
    most = larger(most, larger(cpu_topk_best_workspace(&topk), cpu_topk_backward_best_workspace(&topk_backward)));
    return k.bytes + larger(most, cpu_schedule_best_workspace(&schedule));
}

/* Forward, and what the way back wants of it: pre-activations expert by expert, then y token by token. */
static void experts_forward(const kept *k) {
    const expert_args *a = &k->experts;
    const float *x = as_f32(a->dtype, a->x, a->T * a->d, k->o.x);
    float *pre_activations = k->b.pre_activations;
#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t e = 0; e < a->N; e++) {
        int64_t i = a->offsets[e], end = a->offsets[e + 1];
        const float *down = i < end ? load_row(a->dtype, a->down, e, a->d, thread_rows(a, &k->o)) : NULL;
        for (; i + ROWS <= end; i += ROWS) {
            const float *rows[ROWS];
            float dots[ROWS];
            for (int j = 0; j < ROWS; j++)
                rows[j] = x + a->pairs[i + j] / a->K * a->d;
            dot_rows(a->d, down, rows, dots);
            for (int j = 0; j < ROWS; j++)
                pre_activations[a->pairs[i + j]] = dots[j];
        }
        for (; i < end; i++)
            pre_activations[a->pairs[i]] = dot_row(a->d, down, x + a->pairs[i] / a->K * a->d);
    }
#pragma omp parallel for simd schedule(static)
    for (int64_t p = 0; p < a->T * a->K; p++)
        k->activations[p] = pre_activations[p] * sigmoid(pre_activations[p]) * a->weights[p];
    gather_rows(a, &k->o, a->up, k->activations, FMOE_F32, k->sums);
}

static fmoe_status kept_forward(const layer_args *a, const kept *k, void *rest, size_t bytes) {
    const fmoe_layer_args *f = &a->forward;
    norm(f, true, &k->b);
    TRY(router_logits(f, &k->b, rest, bytes));
    fmoe_topk_args topk = topk_of(f, &k->b);
    TRY(cpu_topk_best(&topk, rest, bytes, NULL));
    fmoe_schedule_args schedule = schedule_of(f, &k->b);
    TRY(cpu_schedule_best(&schedule, rest, bytes, NULL));
    experts_forward(k);
    TRY(mlp_pre_activations(&k->mlp, &k->h, rest, bytes));
    gemm_operand h = by_rows(FMOE_F32, k->h.h, f->I), down = by_rows(f->dtype, f->down_proj, f->I);
    gemm_addend y = {k->sums, {f->dtype, f->y, f->d}};
    return gemm(f->T, f->d, f->I, &h, &down, add_and_store, &y, rest, bytes);
}

// [kept]
static fmoe_status everything_kept(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)stream;
    const layer_args *a = args;
    const fmoe_layer_args *f = &a->forward;
    if (f->training && f->T == 1)
        return fmoe_fail(FMOE_BATCH_OF_ONE, "tokens = 1 is below 2, which the unbiased variance needs in training");
    kept k = kept_layout(a, workspace);
    char *rest = (char *)workspace + k.bytes;
    size_t bytes = workspace_bytes - k.bytes;
    TRY(kept_forward(a, &k, rest, bytes));

    /* dx grows in k.sums: the experts' part, the MLP's, and at the end the router's. */
    expert_gradients(&k.experts, &k.o);
    gather_rows(&k.experts, &k.o, f->down_embed, k.o.ds, FMOE_F32, k.sums);
    TRY(mlp_gradients(&k.mlp, &k.h, k.sums, (gemm_target){FMOE_F32, k.sums, f->d}, rest, bytes));
    topk_args topk = topk_backward_of(f, &k.b);
    TRY(cpu_topk_backward_best(&topk, rest, bytes, NULL));
    return router_backward(a, &k.b, k.sums, rest, bytes);
}
// [/kept]

const fmoe_rung chapter9_layer_rungs[] = {
    {"first-rungs", LEVEL_CORE, BACKEND_CPU,
     "The first rung of every step, forward and back, in float32; only the router's way back is in tiles already.",
     with_first_rungs, .workspace = first_workspace, .supports = small_enough},
    {"best-rungs", LEVEL_CORE, BACKEND_CPU, "The best rung of every step in their places.", with_best_rungs,
     .workspace = best_workspace},
    {"kept", LEVEL_CORE, BACKEND_CPU,
     "The forward pass keeps x̂, both kinds of pre-activations and the schedule: eleven products become nine, the "
     "experts' first phase and the norm run once.",
     everything_kept, .workspace = kept_workspace},
    {.run = NULL},
};
