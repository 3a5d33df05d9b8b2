/* Chapter 9 on the GPU: the gradients of the router and of the whole layer, by their ladders and by the public
 * functions. */
#include "../cuda/layer_backward/layer_backward.h"
#include "cuda_values.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- The router's ladder ----------------------------------------------------------------------------------------- */

static const char *router_rungs_hold(const int64_t *size, uint64_t seed) {
    if (size[4] && size[0] == 1)
        return DOES_NOT_APPLY;
    return rungs_agree(&fmoe_step_router_backward, cuda_router_backward_rungs, seed, "T%d-d%d-n%d-%s%s", (int)size[0],
                       (int)size[1], (int)size[2], fmoe_dtype_name((fmoe_dtype)size[3]), size[4] ? "-train" : "");
}

CUDA_SENTENCE(9, 48,
              "Every GPU rung of router_backward computes the gradients of the gate and, through the norm, of x.",
              "tiles have edges in tokens, keys and hidden units, and sums of halves have keys that are not there",
              "the reference; NaN in outputs and workspace before, guard bands after") {
    for_sizes("T d n type training", router_rungs_hold,
              SIZES({0, 7, 3, 0, 1}, {1, 72, 33, 2, 0}, {65, 7, 13, 1, 1}, {130, 200, 2, 0, 1}, {256, 8, 1, 2, 0},
                    {256, 64, 128, 2, 1}, {257, 72, 3, 1, 1}, {300, 264, 33, 2, 1}, {511, 520, 20, 1, 0},
                    {1025, 136, 130, 2, 1}, {2051, 40, 7, 1, 1}, {700, 1032, 65, 2, 0}));
    for_random_sizes("T d n type training", router_rungs_hold, 20, (int64_t[]){2, 1, 1, 0, 0},
                     (int64_t[]){400, 150, 100, 2, 1});
}

CUDA_SENTENCE(
    9, 49, "Every GPU rung of router_backward writes the same bits in every run, and depends on its arguments alone.",
    "slices of the tokens are cut by their number and added in order",
    "three runs; a graph replayed with new data; two calls that start together") {
    static const char *const cases[] = {"T700-d136-n33-bf16-train", "T300-d264-n20-f16", "T130-d41-n13-f32-train"};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *wrong =
            rungs_repeat(&fmoe_step_router_backward, cuda_router_backward_rungs, fresh_seed(), "%s", cases[i]);
        expect(wrong == HOLDS, "%s", wrong);
        wrong = rungs_replay(&fmoe_step_router_backward, cuda_router_backward_rungs, fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
        wrong = rungs_side_by_side(&fmoe_step_router_backward, cuda_router_backward_rungs, fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
    }
}

/* ---- A call of both functions ------------------------------------------------------------------------------------ */

/* What is kept, bits of a size: everything but what a bit names. BARE: what fmoe_cuda_layer_forward leaves. */
enum { NO_HIDDEN = 1, NO_SCHEDULE = 2, NO_NUMBERS = 4, NO_WEIGHTS = 8, BARE = 16, NARROW = 32, ACCUMULATE = 64 };
enum { NUM_GRADIENTS = 7 };

typedef struct {
    fmoe_layer_backward_args step; /* gradients of gradient_dtype */
    int64_t how;
    int32_t *bad; /* [T, K]: the choice for the way back, if it is not the forward pass's; its schedule is made again */
} layer_call;

static fmoe_config config_of(const fmoe_layer_args *f) {
    return (fmoe_config){f->d, f->I, f->N, f->K, f->norm_topk_prob};
}

static fmoe_dtype gradient_dtype(const layer_call *c) {
    return c->how & NARROW ? c->step.forward.dtype : FMOE_F32;
}

/* The call's kept tensors in a block of memory: the step's own logits and indices, and all or some of the rest. */
static size_t lay_out(const layer_call *c, void *memory, fmoe_cuda_kept *kept) {
    const fmoe_layer_args *f = &c->step.forward;
    const fmoe_config config = config_of(f);
    size_t bytes = fmoe_cuda_layer_keep(&config, f->T, f->dtype, memory, kept);
    kept->router_logits = f->router_logits, kept->indices = f->indices;
    if (c->how & (NO_HIDDEN | BARE))
        kept->h = kept->h_by_p = kept->h_by_q = NULL;
    if (c->how & (NO_SCHEDULE | BARE) || c->bad)
        kept->offsets = kept->pairs = NULL;
    if (c->how & (NO_NUMBERS | BARE))
        kept->pre_activations = NULL;
    if (c->how & (NO_WEIGHTS | BARE))
        kept->weights = NULL;
    return (bytes + 255) / 256 * 256;
}

static size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

/* The functions' workspace comes first: a note is looked for where it begins. */
static size_t functions_workspace(const layer_call *c) {
    const fmoe_layer_args *f = &c->step.forward;
    const fmoe_config config = config_of(f);
    fmoe_cuda_kept kept;
    char anywhere;
    lay_out(c, &anywhere, &kept);
    size_t there = c->how & BARE
                       ? fmoe_cuda_layer_workspace(&config, f->training, f->T, f->dtype)
                       : fmoe_cuda_layer_forward_keeping_workspace(&config, f->training, f->T, f->dtype, &kept);
    size_t back = fmoe_cuda_layer_backward_workspace(&config, f->training, f->T, f->dtype, &kept);
    return (larger(there, back) + 255) / 256 * 256;
}

static size_t call_workspace(const void *args) {
    const layer_call *c = args;
    fmoe_cuda_kept kept;
    return functions_workspace(c) + lay_out(c, NULL, &kept);
}

static fmoe_status run_call(const void *args, void *workspace, size_t bytes, void *stream) {
    const layer_call *c = args;
    const fmoe_layer_args *f = &c->step.forward;
    const fmoe_layer_backward_args *a = &c->step;
    const fmoe_config config = config_of(f);
    fmoe_cuda_weights weights = {f->router_gate, f->down_embed, f->up_embed,     f->gate_proj,
                                 f->up_proj,     f->down_proj,  f->running_mean, f->running_var};
    const fmoe_cuda_outputs outputs = {f->y, f->router_logits, f->scores, f->indices};
    const fmoe_cuda_gradients to = {a->dx,         a->drouter_gate, a->ddown_embed, a->dup_embed,
                                    a->dgate_proj, a->dup_proj,     a->ddown_proj};
    size_t shared = functions_workspace(c);
    fmoe_cuda_kept kept;
    lay_out(c, (char *)workspace + shared, &kept);
    (void)bytes;
    fmoe_status status = c->how & BARE
                             ? fmoe_cuda_layer_forward(&config, &weights, f->training, f->T, f->dtype, f->x, &outputs,
                                                       NULL, workspace, shared, stream)
                             : fmoe_cuda_layer_forward_keeping(&config, &weights, f->training, f->T, f->dtype, f->x,
                                                               f->y, f->scores, &kept, workspace, shared, stream);
    if (status != FMOE_OK)
        return status;
    if (f->training) /* they have moved */
        weights.running_mean = weights.running_var = NULL;
    if (c->bad)
        kept.indices = c->bad;
    return fmoe_cuda_layer_backward(&config, &weights, f->training, f->T, f->dtype, f->x, &kept, a->dy,
                                    c->how & ACCUMULATE ? FMOE_ACCUMULATE : FMOE_OVERWRITE, gradient_dtype(c), &to,
                                    workspace, shared, stream);
}

static void **gradient_of(layer_call *c, int i) {
    fmoe_layer_backward_args *a = &c->step;
    void **all[NUM_GRADIENTS] = {&a->dx,         &a->drouter_gate, &a->ddown_embed, &a->dup_embed,
                                 &a->dgate_proj, &a->dup_proj,     &a->ddown_proj};
    return all[i];
}

static const char *const names[NUM_GRADIENTS] = {"dx",         "drouter_gate", "ddown_embed", "dup_embed",
                                                 "dgate_proj", "dup_proj",     "ddown_proj"};

static int64_t gradient_count(const fmoe_layer_args *f, int i) {
    const int64_t rows[NUM_GRADIENTS] = {f->T, 2 * f->n, f->N, f->N, f->I, f->I, f->I};
    return rows[i] * f->d;
}

static fmoe_status gpu_call(const layer_call *c) {
    const fmoe_layer_args *f = &c->step.forward;
    fmoe_dtype dtype = f->dtype, gradients = gradient_dtype(c);
    fmoe_role role = c->how & ACCUMULATE ? ROLE_INOUT : ROLE_OUTPUT;
    int64_t tokens = f->T * f->d, pairs = f->T * f->K, hidden = f->I * f->d, keys = 2 * f->n * f->d;
    const tensor tensors[] = {
        TENSOR(layer_call, step.forward.x, dtype, ROLE_INPUT, tokens),
        TENSOR(layer_call, step.forward.router_gate, dtype, ROLE_INPUT, keys),
        TENSOR(layer_call, step.forward.down_embed, dtype, ROLE_INPUT, f->N * f->d),
        TENSOR(layer_call, step.forward.up_embed, dtype, ROLE_INPUT, f->N * f->d),
        TENSOR(layer_call, step.forward.gate_proj, dtype, ROLE_INPUT, hidden),
        TENSOR(layer_call, step.forward.up_proj, dtype, ROLE_INPUT, hidden),
        TENSOR(layer_call, step.forward.down_proj, dtype, ROLE_INPUT, hidden),
        TENSOR(layer_call, step.forward.running_mean, FMOE_F32, ROLE_INOUT, f->d),
        TENSOR(layer_call, step.forward.running_var, FMOE_F32, ROLE_INOUT, f->d),
        TENSOR(layer_call, step.forward.y, dtype, ROLE_OUTPUT, tokens),
        TENSOR(layer_call, step.forward.router_logits, FMOE_F32, ROLE_OUTPUT, 2 * f->T * f->n),
        TENSOR(layer_call, step.forward.scores, FMOE_F32, ROLE_OUTPUT, pairs),
        TENSOR(layer_call, step.forward.indices, FMOE_I32, ROLE_OUTPUT, pairs),
        TENSOR(layer_call, step.dy, dtype, ROLE_INPUT, tokens),
        TENSOR(layer_call, bad, FMOE_I32, ROLE_INPUT, pairs),
        TENSOR(layer_call, step.dx, gradients, ROLE_OUTPUT, tokens),
        TENSOR(layer_call, step.drouter_gate, gradients, role, keys),
        TENSOR(layer_call, step.ddown_embed, gradients, role, f->N * f->d),
        TENSOR(layer_call, step.dup_embed, gradients, role, f->N * f->d),
        TENSOR(layer_call, step.dgate_proj, gradients, role, hidden),
        TENSOR(layer_call, step.dup_proj, gradients, role, hidden),
        TENSOR(layer_call, step.ddown_proj, gradients, role, hidden),
    };
    return run_and_check(run_call, call_workspace(c), c, sizeof *c, tensors, (int)(sizeof tensors / sizeof tensors[0]));
}

/* ---- The ladder -------------------------------------------------------------------------------------------------- */

static layer_call as_rung(const void *args, int64_t how) {
    return (layer_call){.step = *(const fmoe_layer_backward_args *)args, .how = how | NARROW};
}

static fmoe_status run_bare(const void *args, void *workspace, size_t bytes, void *stream) {
    layer_call c = as_rung(args, BARE);
    return run_call(&c, workspace, bytes, stream);
}

static size_t bare_workspace(const void *args) {
    layer_call c = as_rung(args, BARE);
    return call_workspace(&c);
}

/* The ladder, which keeps everything, and a way back that has nothing but the forward pass's outputs. */
static const fmoe_rung *all_rungs(void) {
    static fmoe_rung all[8];
    int count = 0;
    for (const fmoe_rung *rung = cuda_layer_backward_rungs; rung->run; rung++)
        all[count++] = *rung;
    cr_assert(count < 7);
    all[count++] =
        (fmoe_rung){.name = "nothing kept", .backend = BACKEND_CUDA, .run = run_bare, .workspace = bare_workspace};
    all[count] = (fmoe_rung){0};
    return all;
}

static const char *rungs_hold(const int64_t *size, uint64_t seed) {
    int64_t n = fmoe_num_keys(size[3]);
    bool training = size[6] & 1, norm = size[6] & 2;
    if (size[4] > n * n || (training && size[0] == 1))
        return DOES_NOT_APPLY;
    return rungs_agree(&fmoe_step_layer_backward, all_rungs(), seed, "T%d-d%d-I%d-N%d-K%d-normal-%s%s%s", (int)size[0],
                       (int)size[1], (int)size[2], (int)size[3], (int)size[4], fmoe_dtype_name((fmoe_dtype)size[5]),
                       training ? "-train" : "", norm ? "-norm" : "");
}

static const char *aligned_rungs_hold(const int64_t *size, uint64_t seed) {
    const int64_t aligned[] = {size[0], 8 * size[1], 8 * size[2], size[3], size[4], size[5], size[6]};
    return rungs_hold(aligned, seed);
}

CUDA_SENTENCE(9, 39,
              "Every GPU rung of layer_forward_backward computes y, the routing, the buffers and seven gradients: odd "
              "sizes, all storage types, both modes, with and without norm_topk_prob, everything kept or nothing.",
              "what was kept must be what would be made again",
              "the reference, at the rung's own choice; NaN before, guard bands after") {
    for_sizes("T d I N K dtype mode", rungs_hold,
              SIZES({0, 3, 2, 9, 2, 0, 0}, {0, 64, 64, 64, 8, 2, 2}, {7, 19, 33, 50, 6, 0, 1},
                    {29, 72, 100, 170, 6, 0, 0}, {29, 72, 104, 170, 6, 2, 0}, {40, 40, 33, 50, 6, 1, 3},
                    {33, 17, 20, 100, 9, 0, 2}, {130, 136, 264, 400, 12, 2, 1}, {130, 136, 264, 400, 12, 1, 2},
                    {65, 256, 72, 1024, 64, 2, 3}, {300, 264, 520, 1024, 16, 2, 1}, {300, 264, 136, 300, 8, 1, 1},
                    {520, 129, 131, 400, 5, 0, 1}, {600, 1024, 256, 4096, 32, 2, 1}));
    for_random_sizes("T d/8 I/8 N K dtype mode", aligned_rungs_hold, 12, (int64_t[]){20, 2, 2, 16, 2, 0, 0},
                     (int64_t[]){400, 20, 30, 1000, 20, 2, 3});
}

CUDA_SENTENCE(
    9, 40,
    "Every GPU rung of layer_forward_backward writes the same bits in every run, and depends on its arguments "
    "alone.",
    "a gradient's sum has one order, whoever is first",
    "three runs; a graph replayed with new data; two steps that start together") {
    static const char *const cases[] = {"T300-d264-I136-N400-K8-normal-bf16-train",
                                        "T130-d136-I264-N1024-K16-normal-f16-norm",
                                        "T70-d41-I33-N100-K7-normal-f32-train-norm"};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *wrong = rungs_repeat(&fmoe_step_layer_backward, all_rungs(), fresh_seed(), "%s", cases[i]);
        expect(wrong == HOLDS, "%s", wrong);
        wrong = rungs_replay(&fmoe_step_layer_backward, all_rungs(), fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
        wrong = rungs_side_by_side(&fmoe_step_layer_backward, all_rungs(), fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
    }
}

/* ---- Golden files ------------------------------------------------------------------------------------------------ */

static const char *const golden_files[] = {
    "tests/golden/tiny_f32_train.safetensors",       "tests/golden/tiny_f32_eval_norm.safetensors",
    "tests/golden/small_f32_train_norm.safetensors", "tests/golden/small_bf16_train.safetensors",
    "tests/golden/odd_f32_eval.safetensors",         "tests/golden/trained_bf16_eval.safetensors",
};

static const char *const golden_names[NUM_GRADIENTS] = {
    "dx",
    "grad.router_gate.weight",
    "grad.down_embed.weight",
    "grad.up_embed.weight",
    "grad.gate_proj.weight",
    "grad.up_proj.weight",
    "grad.down_proj.weight",
};

/* A file's layer with its dy, stored in its type. */
typedef struct {
    fmoe_file *file;
    fmoe_config config;
    fmoe_weights weights;
    layer_call call;
    void *owned[16];
    int num_owned;
} golden_layer;

static void free_golden(golden_layer *g) {
    for (int i = 0; i < g->num_owned; i++)
        free(g->owned[i]);
    for (int i = 0; i < NUM_GRADIENTS; i++)
        free(*gradient_of(&g->call, i));
    fmoe_weights_free(&g->weights);
    fmoe_file_close(g->file);
}

static void *own(golden_layer *g, void *memory) {
    g->owned[g->num_owned++] = memory;
    return memory;
}

/* A tensor of the file as the layer stores it. */
static void *golden_tensor(golden_layer *g, fmoe_dtype dtype, const char *name) {
    const fmoe_tensor *t = fmoe_file_find(g->file, name);
    float *values = NULL;
    cr_assert(t && fmoe_file_read_f32(g->file, name, t->rank, t->shape, &values) == FMOE_OK, "%s", name);
    void *narrow = own(g, stored(dtype, values, t->count));
    free(values);
    return narrow;
}

static const char *open_golden(const char *path, golden_layer *g) {
    CALL(fmoe_file_open(path, &g->file));
    CALL(fmoe_weights_load(g->file, "", &g->config, &g->weights));
    const fmoe_config *c = &g->config;
    fmoe_layer_args *f = &g->call.step.forward;
    fmoe_dtype dtype = fmoe_file_find(g->file, "down_embed.weight")->dtype;
    int64_t T = fmoe_file_find(g->file, "x")->count / c->hidden_size, n = fmoe_num_keys(c->num_experts);
    *f = (fmoe_layer_args){.T = T,
                           .d = c->hidden_size,
                           .I = c->intermediate_size,
                           .N = c->num_experts,
                           .K = c->num_experts_per_tok,
                           .n = n,
                           .training = strcmp(fmoe_file_metadata(g->file, "training"), "1") == 0,
                           .norm_topk_prob = c->norm_topk_prob,
                           .dtype = dtype,
                           .x = golden_tensor(g, dtype, "x"),
                           .router_gate = golden_tensor(g, dtype, "router_gate.weight"),
                           .down_embed = golden_tensor(g, dtype, "down_embed.weight"),
                           .up_embed = golden_tensor(g, dtype, "up_embed.weight"),
                           .gate_proj = golden_tensor(g, dtype, "gate_proj.weight"),
                           .up_proj = golden_tensor(g, dtype, "up_proj.weight"),
                           .down_proj = golden_tensor(g, dtype, "down_proj.weight"),
                           .running_mean = own(g, copy_of(g->weights.running_mean, c->hidden_size)),
                           .running_var = own(g, copy_of(g->weights.running_var, c->hidden_size)),
                           .y = own(g, poisoned(T * c->hidden_size, fmoe_dtype_size(dtype))),
                           .router_logits = own(g, floats(2 * T * n)),
                           .scores = own(g, floats(T * c->num_experts_per_tok)),
                           .indices = own(g, integers(T * c->num_experts_per_tok))};
    g->call.step.dy = golden_tensor(g, dtype, "dy");
    for (int i = 0; i < NUM_GRADIENTS; i++)
        *gradient_of(&g->call, i) = poisoned(gradient_count(f, i), sizeof(float));
    return HOLDS;
}

static const char *golden_gradients(const char *path, int64_t how, int *compared) {
    golden_layer g FREED(free_golden) = {0};
    CHECK(open_golden(path, &g));
    const fmoe_layer_args *f = &g.call.step.forward;
    g.call.how = how;
    CALL(gpu_call(&g.call));
    for (int i = 0; i < NUM_GRADIENTS; i++) {
        const fmoe_tensor *t = fmoe_file_find(g.file, golden_names[i]);
        float *expected = NULL;
        if (!t)
            continue;
        CALL(fmoe_file_read_f32(g.file, golden_names[i], t->rank, t->shape, &expected));
        double error = fmoe_relative_error(t->count, *gradient_of(&g.call, i), expected, 0);
        free(expected);
        if (t->count != gradient_count(f, i) || !(error <= fmoe_error_limit(f->dtype)))
            return because("%s: error %.2g", golden_names[i], error);
        ++*compared;
    }
    return HOLDS;
}

CUDA_SENTENCE(9, 41, "On the GPU the seven gradients are those of the golden files, kept or made again.",
              "the contract, in both modes and both types", "an independent PyTorch layer in float64") {
    int compared = 0;
    for (size_t i = 0; i < sizeof golden_files / sizeof golden_files[0]; i++)
        for (int bare = 0; bare < 2; bare++) {
            const char *wrong = golden_gradients(golden_files[i], bare ? BARE : 0, &compared);
            expect(wrong == HOLDS, "%s%s: %s", golden_files[i], bare ? ", nothing kept" : "", wrong);
        }
    expect(compared >= 2 * (5 * NUM_GRADIENTS + 2), "%d gradients were found in the files", compared);
}

/* ---- The public function ----------------------------------------------------------------------------------------- */

/* A problem of the ladder's step, the call on it, and each gradient before the call and as the reference has it. */
typedef struct {
    fmoe_problem p;
    layer_call call;
    float *before[NUM_GRADIENTS], *expected[NUM_GRADIENTS];
    void *first[NUM_GRADIENTS];
} layer_inputs;

static void free_inputs(layer_inputs *in) {
    for (int i = 0; i < NUM_GRADIENTS; i++) {
        free(in->before[i]);
        free(in->expected[i]);
        free(in->first[i]);
        free(*gradient_of(&in->call, i));
    }
    fmoe_problem_free(&in->p);
}

static layer_inputs draw_layer(uint64_t seed, const int64_t *size, bool training, bool norm, int64_t how) {
    layer_inputs in = {0};
    in.p = new_problem(&fmoe_step_layer_backward, seed, "T%d-d%d-I%d-N%d-K%d-normal-%s%s%s", (int)size[0], (int)size[1],
                       (int)size[2], (int)size[3], (int)size[4], fmoe_dtype_name((fmoe_dtype)size[5]),
                       training ? "-train" : "", norm ? "-norm" : "");
    in.call = (layer_call){.step = *(const fmoe_layer_backward_args *)in.p.args, .how = how};
    for (int i = 0; i < NUM_GRADIENTS; i++) {
        int64_t count = gradient_count(&in.call.step.forward, i);
        float *values OWNED = normals(seed, 70 + (uint64_t)i, i ? 0.7 : 0, count);
        in.before[i] = rounded_to(gradient_dtype(&in.call), values, count);
        *gradient_of(&in.call, i) = NULL;
    }
    return in;
}

/* The outputs as they were, the gradients of `asked`, a bit each. dx is never added to: it starts as NaN. */
static fmoe_status call_layer(layer_inputs *in, int asked) {
    const fmoe_layer_args *f = &in->call.step.forward;
    fmoe_dtype dtype = gradient_dtype(&in->call);
    fmoe_problem_poison(&in->p);
    for (int i = 0; i < NUM_GRADIENTS; i++) {
        int64_t count = gradient_count(f, i);
        void **gradient = gradient_of(&in->call, i);
        free(*gradient);
        *gradient = NULL;
        if (asked >> i & 1)
            *gradient = i > 0 && in->call.how & ACCUMULATE ? stored(dtype, in->before[i], count)
                                                           : poisoned(count, fmoe_dtype_size(dtype));
    }
    return gpu_call(&in->call);
}

/* The reference's gradients at the GPU's own choice, added to what was there. */
static fmoe_status refer(layer_inputs *in, const int32_t *indices) {
    const fmoe_problem *p = &in->p;
    const fmoe_layer_args *f = &in->call.step.forward;
    const fmoe_config config = config_of(f);
    float *x OWNED = fmoe_problem_f32(p, "x"), *dy OWNED = fmoe_problem_f32(p, "dy");
    fmoe_weights weights FREED(fmoe_weights_free) = {
        .router_gate = fmoe_problem_f32(p, "router_gate"),
        .down_embed = fmoe_problem_f32(p, "down_embed"),
        .up_embed = fmoe_problem_f32(p, "up_embed"),
        .gate_proj = fmoe_problem_f32(p, "gate_proj"),
        .up_proj = fmoe_problem_f32(p, "up_proj"),
        .down_proj = fmoe_problem_f32(p, "down_proj"),
        .running_mean = copy_of(fmoe_problem_find(p, "running_mean")->pristine, f->d),
        .running_var = copy_of(fmoe_problem_find(p, "running_var")->pristine, f->d)};
    for (int i = 0; i < NUM_GRADIENTS; i++) {
        free(in->expected[i]);
        in->expected[i] = copy_of(in->before[i], gradient_count(f, i));
    }
    float **e = in->expected;
    fmoe_gradients g = {e[0], e[1], e[2], e[3], e[4], e[5], e[6]};
    return fmoe_layer_backward(&config, &weights, f->training, f->T, x, indices, dy,
                               in->call.how & ACCUMULATE ? FMOE_ACCUMULATE : FMOE_OVERWRITE, &g);
}

static const char *gradients_close(layer_inputs *in) {
    const fmoe_layer_args *f = &in->call.step.forward;
    for (int i = 0; i < NUM_GRADIENTS; i++) {
        int64_t count = gradient_count(f, i);
        float *values OWNED = floats(count);
        fmoe_to_f32(gradient_dtype(&in->call), count, *gradient_of(&in->call, i), values);
        double scale = fmoe_problem_find(&in->p, names[i])->natural_scale;
        double error = fmoe_relative_error(count, values, in->expected[i], scale);
        if (!(error <= fmoe_error_limit(f->dtype)))
            return because("%s: error %.2g", names[i], error);
    }
    return HOLDS;
}

static const char *public_layer(const int64_t *size, uint64_t seed) {
    int64_t n = fmoe_num_keys(size[3]);
    if (size[4] > n * n)
        return DOES_NOT_APPLY;
    layer_inputs in FREED(free_inputs) = draw_layer(seed, size, size[6] & 1, size[6] & 2, size[7]);
    const fmoe_layer_args *f = &in.call.step.forward;
    CALL(call_layer(&in, 127));
    CALL(refer(&in, f->indices));
    CHECK(gradients_close(&in));
    for (int i = 0; i < NUM_GRADIENTS; i++) {
        in.first[i] = *gradient_of(&in.call, i);
        *gradient_of(&in.call, i) = NULL;
    }
    for (int i = 0; i < NUM_GRADIENTS; i++) {
        CALL(call_layer(&in, 1 << i));
        size_t bytes = (size_t)gradient_count(f, i) * fmoe_dtype_size(gradient_dtype(&in.call));
        if (memcmp(*gradient_of(&in.call, i), in.first[i], bytes) != 0)
            return because("%s without the other gradients has other bits", names[i]);
    }
    return HOLDS;
}

static const char *no_tokens(const int64_t *size, uint64_t seed) {
    const int64_t sizes[] = {0, size[0], size[1], size[2], size[3], size[4]};
    layer_inputs in FREED(free_inputs) = draw_layer(seed, sizes, size[5] & 1, false, size[6]);
    CALL(call_layer(&in, 127));
    for (int i = 1; i < NUM_GRADIENTS; i++) {
        int64_t count = gradient_count(&in.call.step.forward, i);
        float *values OWNED = floats(count);
        fmoe_to_f32(gradient_dtype(&in.call), count, *gradient_of(&in.call, i), values);
        for (int64_t k = 0; k < count; k++)
            if (values[k] != (size[6] & ACCUMULATE ? in.before[i][k] : 0))
                return because("without tokens %s[%d] is %g", names[i], (int)k, values[k]);
    }
    return HOLDS;
}

CUDA_SENTENCE(
    9, 42,
    "fmoe_cuda_layer_backward: seven gradients, whatever was kept, overwritten or added to, in float32 or the "
    "storage type; each alone has the same bits; without tokens the weights' are zeroed, or kept.",
    "a caller keeps what it has room for, and trains what it wants to",
    "fmoe_layer_backward on the stored values, at the GPU's choice") {
    for_sizes("T d I N K dtype mode how", public_layer,
              SIZES({29, 72, 100, 170, 6, 0, 0, 0}, {29, 72, 100, 170, 6, 0, 3, ACCUMULATE},
                    {29, 72, 104, 170, 6, 2, 1, NARROW}, {29, 72, 104, 170, 6, 2, 2, ACCUMULATE | NARROW},
                    {40, 33, 20, 50, 6, 1, 1, NO_SCHEDULE | NARROW}, {40, 33, 20, 50, 6, 0, 2, NO_WEIGHTS | NO_NUMBERS},
                    {130, 136, 264, 400, 12, 2, 0, NO_HIDDEN}, {130, 136, 264, 400, 12, 1, 3, NO_NUMBERS | ACCUMULATE},
                    {300, 264, 136, 400, 8, 2, 1, NO_WEIGHTS}, {300, 264, 136, 400, 8, 2, 2, BARE | ACCUMULATE},
                    {300, 264, 136, 400, 8, 1, 1, BARE | NARROW}, {300, 40, 24, 60, 30, 0, 1, BARE}));
    for_sizes("d I N K dtype training how", no_tokens,
              SIZES({7, 5, 12, 4, 0, 0, 0}, {40, 24, 100, 6, 2, 1, NARROW}, {40, 24, 100, 6, 2, 0, NARROW | ACCUMULATE},
                    {7, 5, 12, 4, 1, 1, BARE}));
}

/* ---- Bad indices ------------------------------------------------------------------------------------------------- */

/* What fmoe_cuda_check says after a way back with indices that the forward pass did not choose; and an MLP's gradients,
 * which do not depend on them. */
static const char *bad_indices(const int64_t *size, uint64_t seed) {
    int64_t K = size[4], N = size[3], bad = size[6];
    layer_inputs in FREED(free_inputs) = draw_layer(seed, size, false, false, size[7]);
    const fmoe_layer_args *f = &in.call.step.forward;
    CALL(call_layer(&in, 127));
    CALL(refer(&in, f->indices));
    int32_t *indices OWNED = integers(f->T * K);
    memcpy(indices, f->indices, (size_t)(f->T * K) * sizeof *indices);
    const int32_t wrong[] = {-1, (int32_t)N, INT32_MIN, INT32_MAX};
    int64_t first = INT64_MAX;
    for (int64_t i = 0; i < bad; i++) {
        int64_t at = (int64_t)(fmoe_random_bits(seed, 30, (uint64_t)i) % (uint64_t)(f->T * K));
        indices[at] = wrong[i % 4];
        first = at < first ? at : first;
    }
    in.call.bad = indices;
    fmoe_status status = call_layer(&in, 127);
    char note[96] = "";
    if (bad > 0)
        snprintf(note, sizeof note, "indices[%d, %d] = %d is outside [0, num_experts = %d)", (int)(first / K),
                 (int)(first % K), indices[first], (int)N);
    if (status != (bad > 0 ? FMOE_BAD_INDEX : FMOE_OK) || (bad > 0 && strcmp(fmoe_error_message(), note) != 0))
        return because("%s, \"%s\", should be \"%s\"", fmoe_status_name(status), fmoe_error_message(), note);
    for (int i = 4; i < NUM_GRADIENTS; i++) {
        int64_t count = gradient_count(f, i);
        double error = fmoe_relative_error(count, *gradient_of(&in.call, i), in.expected[i], 0);
        if (!(error <= fmoe_error_limit(f->dtype)))
            return because("%s: error %.2g", names[i], error);
    }
    for (int i = 0; i < 4; i++) {
        const float *values = *gradient_of(&in.call, i);
        for (int64_t k = 0; k < gradient_count(f, i); k++)
            if (!isfinite(values[k]))
                return because("%s[%d] is %g", names[i], (int)k, values[k]);
    }
    return HOLDS;
}

CUDA_SENTENCE(9, 43,
              "On the way back through the layer a bad index is never followed, and fmoe_cuda_check names the first.",
              "the choice comes from memory, which anything may have overwritten",
              "the note; gradients that are finite, and the MLP's, which no choice changes") {
    for_sizes("T d I N K dtype bad how", bad_indices,
              SIZES({5, 16, 8, 17, 4, 0, 1, 0}, {29, 72, 104, 170, 6, 2, 3, 0}, {29, 72, 104, 170, 6, 2, 0, BARE},
                    {130, 136, 64, 300, 8, 1, 7, BARE}, {300, 264, 64, 400, 8, 2, 30, NO_SCHEDULE}));
}

/* ---- Slopes ------------------------------------------------------------------------------------------------------ */

/* A float32 layer in double: x, the weights and dy, the choice as the GPU made it. */
enum { X, GATE, DOWN_EMBED, UP_EMBED, GATE_PROJ, UP_PROJ, DOWN_PROJ };
typedef struct {
    const fmoe_layer_args *f;
    float *tensors[NUM_GRADIENTS], *dy, *mean, *var;
    const int32_t *indices;
} layer_values;

static double silu_of(double s) {
    return s / (1 + exp(-s));
}

static double dot_of(int64_t count, const float *a, const float *b) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum += (double)a[i] * b[i];
    return sum;
}

static void normalise(const layer_values *v, double *x_hat) {
    int64_t T = v->f->T, d = v->f->d;
    for (int64_t h = 0; h < d; h++) {
        double mean = 0, var = 0;
        for (int64_t t = 0; t < T; t++)
            mean += v->tensors[X][t * d + h] / (double)T;
        for (int64_t t = 0; t < T; t++)
            var += pow(v->tensors[X][t * d + h] - mean, 2) / (double)T;
        if (!v->f->training)
            mean = v->mean[h], var = v->var[h];
        for (int64_t t = 0; t < T; t++)
            x_hat[t * d + h] = (v->tensors[X][t * d + h] - mean) / sqrt(var + FMOE_NORM_EPS);
    }
}

/* A token's routing weights. */
static void weigh(const layer_values *v, int64_t t, const double *x_hat, double *weights) {
    int64_t d = v->f->d, n = v->f->n, K = v->f->K;
    double *z OWNED = zeros(2 * n, sizeof *z), all[2] = {0, 0}, total = 0;
    for (int64_t j = 0; j < 2 * n; j++) {
        for (int64_t h = 0; h < d; h++)
            z[j] += x_hat[t * d + h] * v->tensors[GATE][j * d + h];
        all[j / n] += exp(z[j]);
    }
    for (int64_t k = 0; k < K; k++) {
        int64_t pair = v->indices[t * K + k];
        weights[k] = exp(z[pair / n]) / all[0] * (exp(z[n + pair % n]) / all[1]);
        total += weights[k];
    }
    for (int64_t k = 0; v->f->norm_topk_prob && k < K; k++)
        weights[k] /= total;
}

/* L = Σ dy · y. */
static double layer_loss(const layer_values *v) {
    const fmoe_layer_args *f = v->f;
    int64_t T = f->T, d = f->d, K = f->K;
    double *x_hat OWNED = zeros(T * d, sizeof *x_hat), *weights OWNED = zeros(K, sizeof *weights), loss = 0;
    normalise(v, x_hat);
    for (int64_t t = 0; t < T; t++) {
        const float *x = v->tensors[X] + t * d, *dy = v->dy + t * d;
        weigh(v, t, x_hat, weights);
        for (int64_t k = 0; k < K; k++) {
            int64_t row = v->indices[t * K + k] * d;
            loss += silu_of(dot_of(d, x, v->tensors[DOWN_EMBED] + row)) * weights[k] *
                    dot_of(d, dy, v->tensors[UP_EMBED] + row);
        }
        for (int64_t i = 0; i < f->I; i++) {
            double dh = 0;
            for (int64_t h = 0; h < d; h++)
                dh += (double)dy[h] * v->tensors[DOWN_PROJ][h * f->I + i];
            loss +=
                silu_of(dot_of(d, x, v->tensors[GATE_PROJ] + i * d)) * dot_of(d, x, v->tensors[UP_PROJ] + i * d) * dh;
        }
    }
    return loss;
}

/* The slope by one number: two steps to either side, so that the error is the fourth power of the step, 1e-12. */
static double slope(const layer_values *v, float *w) {
    const float at = *w, step = 0x1p-10f;
    double rise[2], run[2];
    for (int far = 0; far < 2; far++) {
        float above = at + (float)(1 + far) * step, below = at - (float)(1 + far) * step;
        *w = above;
        rise[far] = layer_loss(v);
        *w = below;
        rise[far] -= layer_loss(v);
        run[far] = (double)above - below;
    }
    *w = at;
    return (4 * rise[0] / run[0] - rise[1] / run[1]) / 3;
}

static const char *layer_slopes(const int64_t *size, uint64_t seed) {
    const int64_t sizes[] = {size[0], size[1], size[2], size[3], size[4], FMOE_F32};
    layer_inputs in FREED(free_inputs) = draw_layer(seed, sizes, size[5] & 1, size[5] & 2, size[6]);
    const fmoe_layer_args *f = &in.call.step.forward;
    CALL(call_layer(&in, 127));
    layer_values v = {.f = f,
                      .tensors = {(float *)f->x, (float *)f->router_gate, (float *)f->down_embed, (float *)f->up_embed,
                                  (float *)f->gate_proj, (float *)f->up_proj, (float *)f->down_proj},
                      .dy = (float *)in.call.step.dy,
                      .mean = f->running_mean,
                      .var = f->running_var,
                      .indices = f->indices};
    for (int i = 0; i < NUM_GRADIENTS; i++) {
        int64_t count = gradient_count(f, i);
        float *slopes OWNED = floats(count);
        for (int64_t k = 0; k < count; k++)
            slopes[k] = (float)slope(&v, v.tensors[i] + k);
        double error = fmoe_relative_error(count, *gradient_of(&in.call, i), slopes, 0);
        if (!(error <= fmoe_error_limit(FMOE_F32)))
            return because("%s is no slope of the loss: error %.2g", names[i], error);
    }
    return HOLDS;
}

CUDA_SENTENCE(9, 44,
              "The GPU's gradients of the layer are slopes of its forward pass, in both modes, with and without norm.",
              "a check that does not share the reference's derivation", "finite differences in double") {
    for_sizes("T d I N K mode how", layer_slopes,
              SIZES({5, 6, 7, 16, 3, 0, 0}, {5, 6, 7, 16, 3, 2, BARE}, {9, 8, 5, 17, 4, 1, 0}, {12, 5, 9, 30, 6, 3, 0},
                    {12, 8, 8, 25, 5, 1, BARE}));
}

/* ---- A token that chooses an expert twice ------------------------------------------------------------------------ */

static fmoe_status run_experts(const void *args, void *workspace, size_t bytes, void *stream) {
    const fmoe_expert_backward_args *a = args;
    return fmoe_cuda_expert_backward(a->T, a->d, a->N, a->K, a->dtype, a->x, a->down, a->up, a->indices, a->weights,
                                     NULL, NULL, NULL, a->dy, FMOE_OVERWRITE, a->dtype, a->dx, a->ddown, a->dup,
                                     a->dweights, workspace, bytes, stream);
}

static fmoe_status gpu_experts(const fmoe_expert_backward_args *a) {
    int64_t tokens = a->T * a->d, table = a->N * a->d, pairs = a->T * a->K;
    const tensor tensors[] = {
        TENSOR(fmoe_expert_backward_args, x, a->dtype, ROLE_INPUT, tokens),
        TENSOR(fmoe_expert_backward_args, down, a->dtype, ROLE_INPUT, table),
        TENSOR(fmoe_expert_backward_args, up, a->dtype, ROLE_INPUT, table),
        TENSOR(fmoe_expert_backward_args, indices, FMOE_I32, ROLE_INPUT, pairs),
        TENSOR(fmoe_expert_backward_args, weights, FMOE_F32, ROLE_INPUT, pairs),
        TENSOR(fmoe_expert_backward_args, dy, a->dtype, ROLE_INPUT, tokens),
        TENSOR(fmoe_expert_backward_args, dx, a->dtype, ROLE_OUTPUT, tokens),
        TENSOR(fmoe_expert_backward_args, ddown, a->dtype, ROLE_OUTPUT, table),
        TENSOR(fmoe_expert_backward_args, dup, a->dtype, ROLE_OUTPUT, table),
        TENSOR(fmoe_expert_backward_args, dweights, FMOE_F32, ROLE_OUTPUT, pairs),
    };
    size_t bytes = fmoe_cuda_expert_backward_workspace(a->T, a->d, a->N, a->K, a->dtype, false);
    return run_and_check(run_experts, bytes, a, sizeof *a, tensors, (int)(sizeof tensors / sizeof tensors[0]));
}

/* Weights in eighths, so that the sum of two of them is exact. */
static const char *chosen_twice(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], N = size[2];
    float *x OWNED = normals(seed, 0, 1, T * d), *dy OWNED = normals(seed, 1, 1, T * d);
    float *down OWNED = normals(seed, 2, 1 / sqrt((double)d), N * d), *up OWNED = normals(seed, 3, 1, N * d);
    int32_t *once OWNED = any_indices(seed, 4, N, T), *twice OWNED = integers(2 * T);
    float *sums OWNED = floats(T), *weights OWNED = floats(2 * T);
    float *dx[2], *ddown[2], *dup[2], *dweights[2];
    for (int64_t t = 0; t < T; t++) {
        weights[2 * t] = (float)(fmoe_random_bits(seed, 5, (uint64_t)t) % 17) / 8 - 1;
        weights[2 * t + 1] = (float)(fmoe_random_bits(seed, 6, (uint64_t)t) % 17) / 8 - 1;
        sums[t] = weights[2 * t] + weights[2 * t + 1];
        twice[2 * t] = twice[2 * t + 1] = once[t];
    }
    const char *wrong = HOLDS;
    for (int K = 1; K <= 2; K++) {
        int i = K - 1;
        dx[i] = floats(T * d), ddown[i] = floats(N * d), dup[i] = floats(N * d), dweights[i] = floats(T * K);
        const fmoe_expert_backward_args a = {.T = T,
                                             .d = d,
                                             .N = N,
                                             .K = K,
                                             .x = x,
                                             .down = down,
                                             .up = up,
                                             .indices = K == 1 ? once : twice,
                                             .weights = K == 1 ? sums : weights,
                                             .dy = dy,
                                             .dx = dx[i],
                                             .ddown = ddown[i],
                                             .dup = dup[i],
                                             .dweights = dweights[i]};
        if (gpu_experts(&a) != FMOE_OK)
            wrong = because("%s", fmoe_error_message());
    }
    double scale = sqrt((double)(T * d)), worst = 0;
    worst = fmax(worst, fmoe_relative_error(T * d, dx[1], dx[0], scale));
    worst = fmax(worst, fmoe_relative_error(N * d, ddown[1], ddown[0], scale));
    worst = fmax(worst, fmoe_relative_error(N * d, dup[1], dup[0], scale));
    for (int second = 0; second < 2; second++) {
        float *half OWNED = floats(T);
        for (int64_t t = 0; t < T; t++)
            half[t] = dweights[1][2 * t + second];
        worst = fmax(worst, fmoe_relative_error(T, half, dweights[0], scale));
    }
    if (wrong == HOLDS && !(worst <= fmoe_error_limit(FMOE_F32)))
        wrong = because("the gradients differ by %.2g", worst);
    for (int i = 0; i < 2; i++) {
        free(dx[i]);
        free(ddown[i]);
        free(dup[i]);
        free(dweights[i]);
    }
    return wrong;
}

CUDA_SENTENCE(
    9, 45,
    "On the GPU too a token that chooses an expert twice trains it as if it had chosen it once with the sum of "
    "the weights.",
    "every pair counts, not every expert", "the same step with one choice") {
    for_sizes("T d N", chosen_twice,
              SIZES({1, 4, 2}, {3, 7, 5}, {40, 33, 3}, {257, 16, 2}, {130, 264, 600}, {700, 40, 5}));
}

/* ---- Refusals ---------------------------------------------------------------------------------------------------- */

static float m[64];
static int32_t chosen[16];

/* A call that is right but for one thing. */
typedef struct {
    fmoe_config config;
    fmoe_cuda_weights weights;
    fmoe_cuda_kept kept;
    fmoe_cuda_gradients to;
    bool training;
    int64_t T;
    fmoe_dtype dtype, gradient_dtype;
    const void *x, *dy;
    void *y;
} refusal;

static refusal good_call(void) {
    return (refusal){.config = {4, 3, 17, 5, false},
                     .weights = {m, m, m, m, m, m, m, m},
                     .kept = {.router_logits = m, .indices = chosen},
                     .to = {m, m, m, m, m, m, m},
                     .T = 2,
                     .x = m,
                     .dy = m,
                     .y = m};
}

static fmoe_status call_there(const refusal *r, void *workspace, size_t bytes) {
    return fmoe_cuda_layer_forward_keeping(&r->config, &r->weights, r->training, r->T, r->dtype, r->x, r->y, NULL,
                                           &r->kept, workspace, bytes, NULL);
}

static fmoe_status call_back(const refusal *r, void *workspace, size_t bytes) {
    return fmoe_cuda_layer_backward(&r->config, &r->weights, r->training, r->T, r->dtype, r->x, &r->kept, r->dy,
                                    FMOE_OVERWRITE, r->gradient_dtype, &r->to, workspace, bytes, NULL);
}

static const size_t plenty = (size_t)1 << 40;

static void both_refuse(const refusal *r, fmoe_status status, const char *words) {
    refused(call_there(r, m, plenty), status, words);
    refused(call_back(r, m, plenty), status, words);
}

static void refused_sizes(void) {
    refusal r;
    const struct {
        int64_t *size, value;
        fmoe_status status;
        const char *words;
    } sizes[] = {
        {&r.T, -1, FMOE_BAD_SIZE, "tokens = -1"},
        {&r.config.hidden_size, 0, FMOE_BAD_SIZE, "hidden_size = 0"},
        {&r.config.intermediate_size, -3, FMOE_BAD_SIZE, "intermediate_size = -3"},
        {&r.config.num_experts, 0, FMOE_BAD_SIZE, "num_experts = 0"},
        {&r.config.num_experts_per_tok, 0, FMOE_BAD_TOPK, "num_experts_per_tok = 0"},
        {&r.config.num_experts_per_tok, 17, FMOE_BAD_TOPK, "n² = 16"},
        {&r.config.num_experts, 1025 * 1025, FMOE_UNSUPPORTED, "num_keys = 1025"},
        {&r.T, INT64_MAX / 2, FMOE_OVERFLOW, "tokens"},
        {&r.config.hidden_size, INT64_MAX / 3, FMOE_OVERFLOW, "hidden_size"},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        r = good_call();
        *sizes[i].size = sizes[i].value;
        both_refuse(&r, sizes[i].status, sizes[i].words);
        if (sizes[i].status != FMOE_UNSUPPORTED) /* whether a function has a limit it says when it is called */
            expect(fmoe_cuda_layer_keep(&r.config, r.T, r.dtype, NULL, NULL) == 0, "%s: room is laid out",
                   sizes[i].words);
    }
    r = good_call();
    r.dtype = FMOE_I32;
    both_refuse(&r, FMOE_UNSUPPORTED, "dtype = 3");
    r = good_call();
    r.T = 1, r.training = true;
    both_refuse(&r, FMOE_BATCH_OF_ONE, "tokens = 1");
    r = good_call();
    r.dtype = FMOE_F16, r.gradient_dtype = FMOE_BF16;
    refused(call_back(&r, m, plenty), FMOE_UNSUPPORTED, "gradient_dtype");
}

static void refused_pointers(void) {
    refusal r;
    const struct {
        void *pointer; /* to the one that is NULL */
        const char *words;
    } pointers[] = {{&r.x, "x is NULL"},
                    {&r.weights.router_gate, "router_gate"},
                    {&r.weights.down_embed, "down_embed"},
                    {&r.weights.up_embed, "up_embed"},
                    {&r.weights.gate_proj, "gate_proj"},
                    {&r.weights.up_proj, "up_proj"},
                    {&r.weights.down_proj, "down_proj"},
                    {&r.weights.running_mean, "running_mean"},
                    {&r.weights.running_var, "running_var"},
                    {&r.kept.router_logits, "router_logits"},
                    {&r.kept.indices, "indices"}};
    for (size_t i = 0; i < sizeof pointers / sizeof pointers[0]; i++) {
        r = good_call();
        memset(pointers[i].pointer, 0, sizeof(void *));
        both_refuse(&r, FMOE_NULL_POINTER, pointers[i].words);
    }
    r = good_call();
    r.y = NULL;
    refused(call_there(&r, m, plenty), FMOE_NULL_POINTER, "y is NULL");
    r = good_call();
    r.dy = NULL;
    refused(call_back(&r, m, plenty), FMOE_NULL_POINTER, "dy is NULL");
    r = good_call();
    r.kept.offsets = chosen;
    both_refuse(&r, FMOE_NULL_POINTER, "pairs is NULL");
    r = good_call();
    r.kept.h = m, r.kept.h_by_p = m;
    both_refuse(&r, FMOE_NULL_POINTER, "h_by_q");
    r.kept.h_by_q = m; /* in float32 the forward pass has no h to keep */
    refused(call_there(&r, m, plenty), FMOE_UNSUPPORTED, "h is not kept");
}

CUDA_HOST_SENTENCE(9, 46,
                   "fmoe_cuda_layer_forward_keeping and fmoe_cuda_layer_backward name bad arguments and limits before "
                   "they launch anything.",
                   "a step's limit must not show after another step has moved the running buffers", "the contract") {
    refused_sizes();
    refused_pointers();
    refusal r = good_call();
    size_t there = fmoe_cuda_layer_forward_keeping_workspace(&r.config, false, 2, FMOE_F32, &r.kept);
    size_t back = fmoe_cuda_layer_backward_workspace(&r.config, false, 2, FMOE_F32, &r.kept);
    refused(call_there(&r, m, there - 1), FMOE_BAD_WORKSPACE, "workspace_bytes");
    refused(call_there(&r, NULL, there), FMOE_NULL_POINTER, "workspace");
    refused(call_back(&r, m, back - 1), FMOE_BAD_WORKSPACE, "workspace_bytes");
    refused(call_back(&r, NULL, back), FMOE_NULL_POINTER, "workspace");
#define BACK(config, weights, kept, to)                                                                                \
    fmoe_cuda_layer_backward(config, weights, false, 2, FMOE_F32, m, kept, m, FMOE_OVERWRITE, FMOE_F32, to, m, plenty, \
                             NULL)
    refused(BACK(NULL, &r.weights, &r.kept, &r.to), FMOE_NULL_POINTER, "config");
    refused(BACK(&r.config, NULL, &r.kept, &r.to), FMOE_NULL_POINTER, "weights");
    refused(BACK(&r.config, &r.weights, NULL, &r.to), FMOE_NULL_POINTER, "kept");
    refused(BACK(&r.config, &r.weights, &r.kept, NULL), FMOE_NULL_POINTER, "gradients");
#undef BACK
    fmoe_cuda_kept kept;
    size_t bytes = fmoe_cuda_layer_keep(&r.config, 2, FMOE_F32, m, &kept);
    expect(kept.router_logits && kept.indices && kept.weights && kept.pre_activations && kept.offsets && kept.pairs &&
               !kept.h,
           "not everything is kept");
    expect(bytes == fmoe_cuda_layer_keep(&r.config, 2, FMOE_F32, NULL, NULL), "the size depends on the memory");
    expect(back > fmoe_cuda_layer_backward_workspace(&r.config, false, 2, FMOE_F32, &kept),
           "what is kept saves no workspace");
}
