/* For compute-sanitizer: every CUDA rung and every public function once, on sizes that divide nothing. Each tensor is
 * an allocation of its own, of exactly its size, so that the tools see the first byte beyond it. Workspaces are fresh:
 * initcheck sees every value that nobody wrote. Outputs are poisoned instead, and a NaN that stays is an error of the
 * result: what the copy engine stores initcheck does not see, and it would report every byte of it.
 *
 * Each call is named when it has ended, so that what a tool reports stands above the name of the call that it is of.
 * `run STEP` runs one step's ladders alone. --plant TOOL runs a mistake instead, which that tool has to report. */
#include "../../chapters/device.h"
#include "../../chapters/program.h"
#include "../../cuda/expert_backward/expert_backward.h"
#include "../../cuda/fmoe_cuda.h"
#include "../../cuda/layer/layer.h"
#include "../../cuda/layer_backward/layer_backward.h"
#include "../../cuda/mlp_backward/mlp_backward.h"
#include "../../cuda/rungs.h"
#include "faults.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures, runs;

static void must(const char *what, const char *case_name, fmoe_status status) {
    runs++;
    printf("%s %s\n", what, case_name);
    fflush(stdout);
    if (status == FMOE_OK)
        return;
    printf("FAILED %s, %s: %s: %s\n", what, case_name, fmoe_status_name(status), fmoe_error_message());
    failures++;
}

/* ---- Memory ------------------------------------------------------------------------------------------------------ */

static void *allocations[64];
static int num_allocations;

static void *allocate(size_t bytes) {
    void *memory = fmoe_device_allocate(bytes);
    if (!memory) {
        printf("%s\n", fmoe_error_message());
        exit(1);
    }
    allocations[num_allocations++] = memory;
    return memory;
}

static void *upload(const void *host, size_t bytes) {
    void *memory = allocate(bytes);
    if (fmoe_device_upload(memory, host, bytes) != FMOE_OK)
        exit(1);
    return memory;
}

static void free_all(void) {
    while (num_allocations)
        fmoe_device_free(allocations[--num_allocations]);
}

/* ---- The ladders ------------------------------------------------------------------------------------------------- */

enum { MOST_CASES = 10 };
static const struct {
    const fmoe_step *step;
    const fmoe_rung *rungs;
    const char *cases[MOST_CASES];
} ladders[] = {
    {&fmoe_step_router,
     cuda_router_rungs,
     {"T67-d40-n13-f32-train", "T67-d41-n13-bf16-train", "T130-d136-n130-f16", "T5-d7-n3-f32", "T70-d840-n13-bf16"}},
    {&fmoe_step_topk,
     cuda_topk_rungs,
     {"T5-n7-K6-normal-f32", "T3-n128-K64-normal-bf16-norm", "T2-n70-K300-normal-f32", "T7-n40-K16-normal-f16"}},
    {&fmoe_step_schedule, cuda_schedule_rungs, {"T67-N50-K6-uniform", "T301-N1000-K7-hot", "T37-N9000-K9-uniform"}},
    {&fmoe_step_expert,
     cuda_expert_token_rungs,
     {"T5-d19-N50-K6-uniform-f32", "T7-d72-N49-K9-normal-bf16", "T3-d1032-N20-K5-hot-f16"}},
    {&fmoe_step_expert,
     cuda_expert_scheduled_rungs,
     {"T5-d19-N50-K6-uniform-f32", "T37-d72-N49-K9-normal-bf16", "T3-d1032-N20-K5-hot-f16", "T90-d16-N4-K1-hot-f32"}},
    {&fmoe_step_expert,
     cuda_strategies_rungs,
     {"T5-d19-N50-K6-uniform-f32", "T37-d72-N49-K9-normal-bf16", "T130-d136-N300-K20-uniform-f16",
      "T70-d64-N1024-K64-normal-bf16", "T70-d40-N1000-K900-uniform-bf16"}},
    {&fmoe_step_mlp,
     cuda_mlp_rungs,
     {"T5-d19-I33-f32", "T130-d72-I104-bf16", "T1-d264-I520-bf16", "T9-d136-I264-f16", "T50-d256-I520-bf16",
      "T37-d72-I104-bf16", "T3370-d520-I904-bf16", "T5700-d264-I136-bf16"}},
    {&fmoe_step_router_backward,
     cuda_router_backward_rungs,
     {"T67-d40-n13-f32-train", "T260-d136-n33-bf16-train", "T257-d72-n10-f16", "T9-d7-n3-bf16-train"}},
    {&fmoe_step_topk_backward,
     cuda_topk_backward_rungs,
     {"T5-n7-K6-normal-f32", "T3-n128-K64-normal-bf16-norm", "T2-n70-K300-normal-f32"}},
    {&fmoe_step_expert_backward,
     cuda_expert_backward_rungs,
     {"T5-d19-N50-K6-uniform-f32", "T37-d72-N49-K9-normal-bf16", "T3-d1032-N20-K5-hot-f16", "T700-d24-N4-K1-hot-f32"}},
    {&fmoe_step_mlp_backward,
     cuda_mlp_backward_rungs,
     {"T5-d19-I33-f32", "T130-d72-I104-bf16", "T9-d136-I264-f16", "T33-d264-I520-bf16"}},
    {&fmoe_step_layer,
     cuda_layer_rungs,
     {"T5-d19-I33-N50-K6-normal-f32-train", "T37-d72-I104-N170-K9-normal-bf16", "T3-d136-I40-N1024-K33-normal-f16-norm",
      "T70-d264-I136-N300-K8-normal-bf16-train", "T11-d136-I40-N300-K20-normal-bf16",
      "T1410-d40-I16-N30-K3-normal-bf16", "T1500-d256-I2600-N300-K8-normal-bf16", "T70-d512-I72-N300-K9-normal-f16",
      "T1-d136-I104-N300-K20-normal-bf16", "T5-d72-I52-N170-K9-normal-f32"}},
    {&fmoe_step_layer_backward,
     cuda_layer_backward_rungs,
     {"T5-d19-I33-N50-K6-normal-f32-train", "T37-d72-I104-N170-K9-normal-bf16",
      "T70-d264-I136-N300-K8-normal-bf16-train", "T260-d72-I40-N60-K5-normal-f16-train",
      "T257-d136-I72-N300-K8-normal-bf16"}},
};

static fmoe_status run_rung(const fmoe_rung *rung, fmoe_problem *p, double *error, char *why) {
    char args[512];
    memcpy(args, p->args, p->step->args_size);
    fmoe_problem_poison(p);
    void *copies[FMOE_MAX_ARGUMENTS] = {NULL};
    for (int i = 0; i < p->num_arguments; i++) {
        const fmoe_argument *a = &p->arguments[i];
        copies[i] = upload(a->data, (size_t)a->count * fmoe_dtype_size(a->dtype));
        memcpy(args + a->slot, &copies[i], sizeof copies[i]);
    }
    size_t bytes = rung_workspace(rung, p);
    fmoe_status status = rung->run(args, allocate(bytes), bytes, NULL);
    for (int i = 0; i < p->num_arguments && status == FMOE_OK; i++) {
        const fmoe_argument *a = &p->arguments[i];
        if (a->role != ROLE_INPUT)
            status = fmoe_device_download(a->data, copies[i], (size_t)a->count * fmoe_dtype_size(a->dtype));
    }
    if (status == FMOE_OK)
        *error = fmoe_problem_error(p, why);
    free_all();
    return status;
}

static void run_ladder(const fmoe_step *step, const fmoe_rung *rungs, const char *name) {
    fmoe_case c;
    fmoe_problem p;
    char why[256] = "", what[64];
    fmoe_status status = fmoe_case_parse(name, &c);
    if (status == FMOE_OK)
        status = fmoe_problem_new(step, &c, 1, &p);
    if (status != FMOE_OK) {
        must(step->op, name, status);
        return;
    }
    for (const fmoe_rung *rung = rungs; rung->run; rung++) {
        double error = 0;
        if (rung->library || rung_supports(rung, &p, why) != FMOE_OK)
            continue;
        snprintf(what, sizeof what, "%s %s", step->op, rung->name);
        must(what, name, run_rung(rung, &p, &error, why));
        if (!(error <= fmoe_error_limit(c.dtype))) {
            printf("FAILED %s, %s: error %g: %s\n", what, name, error, why);
            failures++;
        }
    }
    fmoe_problem_free(&p);
}

/* ---- The public functions ---------------------------------------------------------------------------------------- */

enum { T = 37, D = 21, KEYS = 11, K = 9 };

static float *drawn(int64_t count) {
    static uint64_t stream;
    float *values = malloc((size_t)count * sizeof *values);
    if (!values)
        exit(1);
    fmoe_fill_normal(2, stream++, 1, count, values);
    void *memory = upload(values, (size_t)count * sizeof *values);
    free(values);
    return memory;
}

static float *room(int64_t count) {
    return allocate((size_t)count * sizeof(float));
}

static void run_softmax(void) {
    float *z = drawn(2 * T * KEYS), *log_p = room(2 * T * KEYS), *dz = room(2 * T * KEYS);
    must("log_softmax", "", fmoe_cuda_log_softmax(2 * T, KEYS, z, log_p, NULL));
    must("log_softmax_backward", "", fmoe_cuda_log_softmax_backward(2 * T, KEYS, z, log_p, dz, NULL));
    free_all();
}

static void run_router(bool training) {
    size_t bytes = fmoe_cuda_router_workspace(training, T, D, KEYS, FMOE_F32);
    float *x = drawn(T * D), *gate = drawn(2 * KEYS * D), *mean = drawn(D), ones[D], *logits = room(2 * T * KEYS);
    for (int i = 0; i < D; i++)
        ones[i] = 1;
    float *var = upload(ones, sizeof ones);
    must("router", "without log_probs",
         fmoe_cuda_router(training, T, D, KEYS, FMOE_F32, x, gate, mean, var, logits, NULL, allocate(bytes), bytes,
                          NULL));
    bytes = fmoe_cuda_router_backward_workspace(training, T, D, KEYS, FMOE_F32);
    float *dx = room(T * D), *dgate = room(2 * KEYS * D);
    for (fmoe_write write = FMOE_OVERWRITE; write <= FMOE_ACCUMULATE; write++)
        must("router_backward", training ? "training" : "evaluation",
             fmoe_cuda_router_backward(training, T, D, KEYS, FMOE_F32, x, gate, mean, var, logits, write, FMOE_F32, dx,
                                       dgate, allocate(bytes), bytes, NULL));
    free_all();
}

static void run_topk(bool norm) {
    size_t bytes = fmoe_cuda_topk_workspace(T, KEYS, K, FMOE_F32);
    float *logits = drawn(2 * T * KEYS), *weights = room(T * K), *dlogits = room(2 * T * KEYS);
    int32_t *indices = allocate(T * K * sizeof *indices), bad = KEYS * KEYS;
    must("topk", "without scores",
         fmoe_cuda_topk(T, KEYS, K, norm, FMOE_F32, logits, indices, NULL, weights, allocate(bytes), bytes, NULL));
    must("topk_backward", "a bad index", fmoe_device_upload(indices + 3, &bad, sizeof bad));
    bytes = fmoe_cuda_topk_backward_workspace(T, KEYS, K, FMOE_F32);
    void *workspace = allocate(bytes);
    must("topk_backward", "both gradients",
         fmoe_cuda_topk_backward(T, KEYS, K, norm, FMOE_F32, logits, indices, weights, weights, dlogits, workspace,
                                 bytes, NULL));
    fmoe_status noted = fmoe_cuda_check(workspace, NULL);
    must("check", "a bad index", noted == FMOE_BAD_INDEX ? FMOE_OK : noted ? noted : FMOE_BAD_INDEX);
    free_all();
}

/* A schedule, and the expert step with its pre-activations, of indices one of which is bad. */
static void run_experts(void) {
    enum { N = 13, PAIRS = T * K };
    int32_t indices[PAIRS];
    for (int i = 0; i < PAIRS; i++)
        indices[i] = i == 5 ? N : i * 7 % N;
    int32_t *chosen = upload(indices, sizeof indices), *offsets = allocate((N + 1) * sizeof *offsets);
    int32_t *pairs = allocate(sizeof indices);
    size_t bytes = fmoe_cuda_schedule_workspace(T, K, N);
    void *workspace = allocate(bytes);
    must("schedule", "a bad index", fmoe_cuda_schedule(T, K, N, chosen, offsets, pairs, workspace, bytes, NULL));
    must("schedule", "its note", fmoe_cuda_check(workspace, NULL) == FMOE_BAD_INDEX ? FMOE_OK : FMOE_CUDA);
    float *x = drawn(T * D), *down = drawn(N * D), *up = drawn(N * D), *weights = drawn(PAIRS);
    bytes = fmoe_cuda_expert_workspace(T, D, N, K, FMOE_F32);
    workspace = allocate(bytes);
    must("expert", "a bad index",
         fmoe_cuda_expert(T, D, N, K, FMOE_F32, x, down, up, chosen, weights, room(T * D), room(PAIRS), workspace,
                          bytes, NULL));
    must("expert", "its note", fmoe_cuda_check(workspace, NULL) == FMOE_BAD_INDEX ? FMOE_OK : FMOE_CUDA);
    free_all();
}

/* Back, of what was kept or is made again, of indices one of which is bad; without the gradients that may be left out.
 */
static void run_backward(fmoe_write write) {
    enum { N = 13, I = 29, PAIRS = T * K };
    int32_t indices[PAIRS];
    for (int i = 0; i < PAIRS; i++)
        indices[i] = i == 5 ? N : i * 7 % N;
    int32_t *chosen = upload(indices, sizeof indices);
    float *x = drawn(T * D), *down = drawn(N * D), *up = drawn(N * D), *weights = drawn(PAIRS), *dy = drawn(T * D);
    float *ddown = drawn(N * D), *dup = drawn(N * D), *dweights = room(PAIRS);
    size_t bytes = fmoe_cuda_expert_backward_workspace(T, D, N, K, FMOE_F32, false);
    void *workspace = allocate(bytes);
    must("expert_backward", "a bad index",
         fmoe_cuda_expert_backward(T, D, N, K, FMOE_F32, x, down, up, chosen, weights, NULL, NULL, NULL, dy, write,
                                   FMOE_F32, room(T * D), ddown, dup, dweights, workspace, bytes, NULL));
    must("expert_backward", "its note", fmoe_cuda_check(workspace, NULL) == FMOE_BAD_INDEX ? FMOE_OK : FMOE_CUDA);
    must("expert_backward", "one gradient",
         fmoe_cuda_expert_backward(T, D, N, K, FMOE_F32, x, down, up, chosen, weights, NULL, NULL, NULL, dy, write,
                                   FMOE_F32, NULL, ddown, NULL, NULL, workspace, bytes, NULL));
    float *gate = drawn(I * D), *dgate = drawn(I * D), *up_proj = drawn(I * D), *down_proj = drawn(D * I);
    bytes = fmoe_cuda_mlp_backward_workspace(T, D, I, FMOE_F32, false);
    must("mlp_backward", "two gradients",
         fmoe_cuda_mlp_backward(T, D, I, FMOE_F32, x, gate, up_proj, down_proj, NULL, NULL, NULL, dy, write, FMOE_F32,
                                room(T * D), dgate, NULL, NULL, allocate(bytes), bytes, NULL));
    free_all();
}

/* On one stream and on two, y alone. */
static void run_layer(void) {
    enum { N = 50, I = 29, SIDE = 7 };
    const fmoe_config config = {D, I, N, K, true};
    float ones[D];
    for (int i = 0; i < D; i++)
        ones[i] = 1;
    const fmoe_cuda_weights weights = {drawn(2 * SIDE * D), drawn(N * D), drawn(N * D), drawn(I * D),
                                       drawn(I * D),        drawn(D * I), drawn(D),     upload(ones, sizeof ones)};
    float *x = drawn(T * D);
    fmoe_cuda_side *side = NULL;
    must("side_create", "", fmoe_cuda_side_create(&side));
    for (int both = 0; both < 2; both++) {
        const fmoe_cuda_outputs outputs = {.y = room(T * D)};
        size_t bytes = fmoe_cuda_layer_workspace(&config, both, T, FMOE_F32);
        must("layer_forward", both ? "two streams" : "one stream",
             fmoe_cuda_layer_forward(&config, &weights, both, T, FMOE_F32, x, &outputs, both ? side : NULL,
                                     allocate(bytes), bytes, NULL));
    }
    free_all();
    fmoe_cuda_side_destroy(side);
}

/* There and back, with nothing kept but what has to be; all gradients, and then one. */
static void run_layer_backward(fmoe_write write) {
    enum { N = 50, I = 29, SIDE = 7 };
    const fmoe_config config = {D, I, N, K, true};
    const fmoe_cuda_weights weights = {drawn(2 * SIDE * D), drawn(N * D), drawn(N * D), drawn(I * D),
                                       drawn(I * D),        drawn(D * I), drawn(D),     drawn(D)};
    const fmoe_cuda_kept kept = {.router_logits = room(2 * T * SIDE), .indices = allocate(T * K * sizeof(int32_t))};
    const fmoe_cuda_gradients all = {room(T * D),  drawn(2 * SIDE * D), drawn(N * D), drawn(N * D),
                                     drawn(I * D), drawn(I * D),        drawn(D * I)},
                              one = {.router_gate = all.router_gate};
    float *x = drawn(T * D), *dy = drawn(T * D);
    size_t bytes = fmoe_cuda_layer_forward_keeping_workspace(&config, true, T, FMOE_F32, &kept);
    must("layer_forward_keeping", "little",
         fmoe_cuda_layer_forward_keeping(&config, &weights, true, T, FMOE_F32, x, room(T * D), NULL, &kept,
                                         allocate(bytes), bytes, NULL));
    bytes = fmoe_cuda_layer_backward_workspace(&config, true, T, FMOE_F32, &kept);
    must("layer_backward", "all gradients",
         fmoe_cuda_layer_backward(&config, &weights, true, T, FMOE_F32, x, &kept, dy, write, FMOE_F32, &all,
                                  allocate(bytes), bytes, NULL));
    must("layer_backward", "one gradient",
         fmoe_cuda_layer_backward(&config, &weights, true, T, FMOE_F32, x, &kept, dy, write, FMOE_F32, &one,
                                  allocate(bytes), bytes, NULL));
    free_all();
}

int main(int argc, char **argv) {
    const fmoe_device *gpu = fmoe_device_get();
    if (argc == 2 && strcmp(argv[1], "--device") == 0) { /* is there one? */
        printf("%s\n", gpu->present ? gpu->name : gpu->why_not);
        return !gpu->present;
    }
    if (argc == 3 && strcmp(argv[1], "--plant") == 0)
        return run_fault(argv[2]);
    const char *only = argc == 2 ? argv[1] : NULL;
    for (size_t i = 0; i < sizeof ladders / sizeof ladders[0]; i++)
        for (int c = 0; c < MOST_CASES && ladders[i].cases[c]; c++)
            if (!only || strcmp(only, ladders[i].step->op) == 0)
                run_ladder(ladders[i].step, ladders[i].rungs, ladders[i].cases[c]);
    if (only)
        return failures != 0 || runs == 0;
    run_softmax();
    run_experts();
    run_backward(FMOE_OVERWRITE);
    run_backward(FMOE_ACCUMULATE);
    run_layer();
    run_layer_backward(FMOE_OVERWRITE);
    run_layer_backward(FMOE_ACCUMULATE);
    for (int flag = 0; flag < 2; flag++) {
        run_router(flag);
        run_topk(flag);
    }
    printf("%d calls\n", runs);
    return failures != 0;
}
