/* Chapter 8 on the GPU: the whole layer against the reference and the golden files, up its ladder. */
#include "../chapters/8-layer/golden_rungs.h"
#include "cuda_values.h"

#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PROBLEM FREED(fmoe_problem_free)

/* ---- The public function as two more rungs ------------------------------------------------------------------------
 */

static fmoe_status call_layer(const fmoe_layer_args *a, fmoe_cuda_side *side, void *workspace, size_t bytes,
                              void *stream) {
    const fmoe_config config = {a->d, a->I, a->N, a->K, a->norm_topk_prob};
    const fmoe_cuda_weights weights = {a->router_gate, a->down_embed, a->up_embed,     a->gate_proj,
                                       a->up_proj,     a->down_proj,  a->running_mean, a->running_var};
    const fmoe_cuda_outputs outputs = {a->y, a->router_logits, a->scores, a->indices};
    return fmoe_cuda_layer_forward(&config, &weights, a->training, a->T, a->dtype, a->x, &outputs, side, workspace,
                                   bytes, stream);
}

static fmoe_status run_alone(const void *args, void *workspace, size_t bytes, void *stream) {
    return call_layer(args, NULL, workspace, bytes, stream);
}

/* Of two calls at once each has a side of its own. */
static fmoe_status run_with_side(const void *args, void *workspace, size_t bytes, void *stream) {
    static fmoe_cuda_side *sides[2];
    static unsigned calls;
    fmoe_cuda_side **side = &sides[calls++ % 2];
    if (!*side) {
        fmoe_status status = fmoe_cuda_side_create(side);
        if (status != FMOE_OK)
            return status;
    }
    return call_layer(args, *side, workspace, bytes, stream);
}

static size_t layer_workspace(const void *args) {
    const fmoe_layer_args *a = args;
    const fmoe_config config = {a->d, a->I, a->N, a->K, a->norm_topk_prob};
    return fmoe_cuda_layer_workspace(&config, a->training, a->T, a->dtype);
}

static const fmoe_rung public_rungs[] = {
    {.name = "fmoe_cuda_layer_forward", .backend = BACKEND_CUDA, .run = run_alone, .workspace = layer_workspace},
    {.name = "fmoe_cuda_layer_forward with a side",
     .backend = BACKEND_CUDA,
     .run = run_with_side,
     .workspace = layer_workspace},
    {0},
};

static const fmoe_rung *all_rungs(void) {
    static fmoe_rung all[16];
    int count = 0;
    for (const fmoe_rung *rung = cuda_layer_rungs; rung->run; rung++)
        all[count++] = *rung;
    cr_assert(count < 13);
    all[count++] = public_rungs[0];
    all[count++] = public_rungs[1];
    all[count] = (fmoe_rung){0};
    return all;
}

/* ---- The ladder -------------------------------------------------------------------------------------------------- */

static const char *gpu_agrees(const int64_t *size, uint64_t seed) {
    int64_t n = fmoe_num_keys(size[3]);
    bool training = size[6] & 1, norm = size[6] & 2;
    if (size[4] > n * n || size[5] > FMOE_BF16 || (training && size[0] == 1))
        return DOES_NOT_APPLY;
    return rungs_agree(&fmoe_step_layer, all_rungs(), seed, "T%d-d%d-I%d-N%d-K%d-normal-%s%s%s", (int)size[0],
                       (int)size[1], (int)size[2], (int)size[3], (int)size[4], fmoe_dtype_name((fmoe_dtype)size[5]),
                       training ? "-train" : "", norm ? "-norm" : "");
}

CUDA_SENTENCE(8, 38,
              "Every GPU rung of the layer agrees with the reference: odd sizes, all storage types, both modes, with "
              "and without norm.",
              "one token, 64 of them and 65 go different ways, and each way has its edges",
              "the reference on the stored inputs, at the rung's own choice; NaN before, guard bands after") {
    for_sizes("T d I N K dtype mode", gpu_agrees,
              SIZES({0, 3, 2, 9, 2, 0, 0}, {0, 64, 64, 64, 8, 2, 3}, {1, 1, 1, 1, 1, 0, 0}, {1, 72, 104, 170, 6, 2, 0},
                    {1, 1024, 512, 16384, 64, 2, 0}, {2, 40, 33, 50, 6, 0, 2}, {2, 40, 33, 50, 6, 1, 1},
                    {23, 1032, 72, 16384, 64, 1, 2}, {63, 520, 40, 1024, 30, 0, 0}, {1500, 72, 136, 400, 6, 2, 1},
                    {4097, 136, 72, 100, 3, 1, 2}, {3, 7, 5, 12, 9, 0, 2}, {16, 1032, 72, 1024, 64, 2, 2},
                    {17, 136, 64, 300, 20, 2, 0}, {5, 2056, 16, 100, 7, 1, 0}, {64, 256, 264, 1024, 16, 2, 0},
                    {64, 24, 9, 64, 8, 0, 3}, {65, 256, 264, 1024, 16, 2, 0}, {65, 24, 9, 64, 8, 2, 1},
                    {9, 264, 40, 16900, 30, 2, 0}, {9, 264, 40, 1024, 65, 2, 2}, {130, 200, 136, 2000, 33, 1, 1},
                    {131, 16, 33, 36, 20, 1, 3}, {257, 72, 520, 1000, 9, 2, 3}, {300, 1024, 512, 16384, 64, 2, 0},
                    {520, 257, 131, 400, 5, 0, 1}, {700, 128, 264, 40, 3, 2, 1}, {2060, 1032, 40, 16384, 48, 2, 0},
                    {400, 1024, 64, 6241, 64, 2, 0}, {800, 512, 64, 12321, 64, 1, 0}, {130, 2048, 40, 1024, 33, 2, 2},
                    {1500, 1024, 64, 12321, 33, 2, 1}, {2900, 136, 1288, 64, 3, 2, 0}, {3000, 1032, 72, 64, 5, 1, 0}));
    for_random_sizes("T d I N K dtype mode", gpu_agrees, 30, (int64_t[]){1, 1, 1, 1, 1, 0, 0},
                     (int64_t[]){150, 60, 60, 400, 20, 2, 3});
}

static const char *gpu_aligned(const int64_t *size, uint64_t seed) {
    const int64_t aligned[] = {size[0], 8 * size[1], 8 * size[2], size[3], size[4], size[5], size[6]};
    return gpu_agrees(aligned, seed);
}

CUDA_SENTENCE(8, 39, "The same where rows are multiples of 16 bytes, which tensor cores and clusters of blocks take.",
              "what is fast has more edges than what is plain", "the reference") {
    for_random_sizes("T d/8 I/8 N K dtype mode", gpu_aligned, 30, (int64_t[]){1, 1, 1, 1, 1, 1, 0},
                     (int64_t[]){200, 40, 40, 1200, 40, 2, 3});
    for_random_sizes("T d/8 I/8 N K dtype mode", gpu_aligned, 30, (int64_t[]){1, 1, 1, 64, 1, 0, 0},
                     (int64_t[]){64, 140, 30, 1200, 64, 2, 0});
}

CUDA_SENTENCE(8, 40,
              "Every GPU rung of the layer writes the same bits in every run, and depends on its arguments alone.",
              "branches that run side by side must not meet before both are done",
              "three runs; a graph replayed with new data; two layers that start together") {
    static const char *const cases[] = {
        "T1-d1024-I512-N1024-K64-normal-bf16",       "T33-d264-I136-N1024-K16-normal-f16-norm",
        "T20-d264-I40-N300-K9-normal-f32",           "T1500-d136-I264-N1024-K16-normal-bf16",
        "T300-d512-I1024-N1024-K32-normal-bf16",     "T300-d256-I264-N1024-K32-normal-bf16-train",
        "T130-d41-I33-N100-K7-normal-f32-train-norm"};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *wrong = rungs_repeat(&fmoe_step_layer, all_rungs(), fresh_seed(), "%s", cases[i]);
        expect(wrong == HOLDS, "%s", wrong);
        wrong = rungs_replay(&fmoe_step_layer, all_rungs(), fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
        wrong = rungs_side_by_side(&fmoe_step_layer, all_rungs(), fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
    }
}

/* ---- The public function by itself ------------------------------------------------------------------------------- */

static fmoe_status gpu_layer(const fmoe_rung *rung, const fmoe_layer_args *a) {
    int64_t tokens = a->T * a->d, hidden = a->I * a->d, table = a->N * a->d, pairs = a->T * a->K;
    const tensor tensors[] = {
        TENSOR(fmoe_layer_args, x, a->dtype, ROLE_INPUT, tokens),
        TENSOR(fmoe_layer_args, router_gate, a->dtype, ROLE_INPUT, 2 * a->n * a->d),
        TENSOR(fmoe_layer_args, down_embed, a->dtype, ROLE_INPUT, table),
        TENSOR(fmoe_layer_args, up_embed, a->dtype, ROLE_INPUT, table),
        TENSOR(fmoe_layer_args, gate_proj, a->dtype, ROLE_INPUT, hidden),
        TENSOR(fmoe_layer_args, up_proj, a->dtype, ROLE_INPUT, hidden),
        TENSOR(fmoe_layer_args, down_proj, a->dtype, ROLE_INPUT, hidden),
        TENSOR(fmoe_layer_args, running_mean, FMOE_F32, ROLE_INOUT, a->d),
        TENSOR(fmoe_layer_args, running_var, FMOE_F32, ROLE_INOUT, a->d),
        TENSOR(fmoe_layer_args, y, a->dtype, ROLE_OUTPUT, tokens),
        TENSOR(fmoe_layer_args, router_logits, FMOE_F32, ROLE_OUTPUT, 2 * a->T * a->n),
        TENSOR(fmoe_layer_args, scores, FMOE_F32, ROLE_OUTPUT, pairs),
        TENSOR(fmoe_layer_args, indices, FMOE_I32, ROLE_OUTPUT, pairs),
    };
    return run_on_device(rung->run, rung->workspace(a), a, sizeof *a, tensors,
                         (int)(sizeof tensors / sizeof tensors[0]));
}

/* y alone, and every other output without one of the rest. */
static const char *optional_outputs(const int64_t *size, uint64_t seed) {
    fmoe_problem p PROBLEM =
        new_problem(&fmoe_step_layer, seed, "T%d-d%d-I%d-N%d-K%d-normal-%s", (int)size[0], (int)size[1], (int)size[2],
                    (int)size[3], (int)size[4], fmoe_dtype_name((fmoe_dtype)size[5]));
    const fmoe_layer_args *a = p.args;
    size_t bytes[] = {(size_t)(a->T * a->d) * fmoe_dtype_size(a->dtype), (size_t)(2 * a->T * a->n) * 4,
                      (size_t)(a->T * a->K) * 4, (size_t)(a->T * a->K) * 4};
    static const char *const names[] = {"y", "router_logits", "scores", "indices"};
    for (const fmoe_rung *rung = public_rungs; rung->run; rung++) {
        void *first[4] = {0};
        const char *wrong = HOLDS;
        for (int asked = 7; asked >= 0 && wrong == HOLDS; asked--) {
            fmoe_layer_args some = *a;
            some.router_logits = asked & 1 ? a->router_logits : NULL;
            some.scores = asked & 2 ? a->scores : NULL;
            some.indices = asked & 4 ? a->indices : NULL;
            const void *out[] = {some.y, some.router_logits, some.scores, some.indices};
            fmoe_problem_poison(&p);
            if (gpu_layer(rung, &some) != FMOE_OK)
                wrong = because("%s: %s", rung->name, fmoe_error_message());
            for (int i = 0; i < 4 && wrong == HOLDS; i++) {
                if (asked == 7)
                    first[i] = memcpy(poisoned((int64_t)bytes[i], 1), out[i], bytes[i]);
                else if (out[i] && memcmp(out[i], first[i], bytes[i]) != 0)
                    wrong = because("%s: %s has other bits where not everything is asked for", rung->name, names[i]);
            }
        }
        for (int i = 0; i < 4; i++)
            free(first[i]);
        CHECK(wrong);
    }
    return HOLDS;
}

CUDA_SENTENCE(8, 41, "On the GPU router_logits, scores and indices are optional, and y is the same without them.",
              "what nobody asked for lies in the workspace", "the call with all of them, bit by bit") {
    for_sizes("T d I N K dtype", optional_outputs,
              SIZES({1, 72, 104, 170, 6, 2}, {33, 136, 64, 1024, 16, 2}, {130, 64, 72, 256, 9, 1}, {9, 7, 5, 12, 4, 0},
                    {70, 33, 20, 100, 12, 0}));
}

/* ---- Golden files ------------------------------------------------------------------------------------------------ */

static const char *const golden_files[] = {
    "tests/golden/tiny_f32_train.safetensors",       "tests/golden/tiny_f32_eval_norm.safetensors",
    "tests/golden/small_f32_train_norm.safetensors", "tests/golden/small_bf16_train.safetensors",
    "tests/golden/odd_f32_eval.safetensors",         "tests/golden/trained_bf16_eval.safetensors",
};

/* A file's layer, stored in its type, and what the GPU makes of it. */
typedef struct {
    fmoe_file *file;
    fmoe_config config;
    fmoe_weights weights;
    fmoe_layer_args args;
    float *x;
    void *stored[7], *y;
} golden_layer;

static void free_golden(golden_layer *g) {
    for (int i = 0; i < 7; i++)
        free(g->stored[i]);
    void *outputs[] = {g->x,           g->y,           g->args.running_mean, g->args.running_var, g->args.router_logits,
                       g->args.scores, g->args.indices};
    for (size_t i = 0; i < sizeof outputs / sizeof outputs[0]; i++)
        free(outputs[i]);
    fmoe_weights_free(&g->weights);
    fmoe_file_close(g->file);
}

static const char *open_golden(const char *path, golden_layer *g) {
    CALL(fmoe_file_open(path, &g->file));
    CALL(fmoe_weights_load(g->file, "", &g->config, &g->weights));
    const fmoe_config *c = &g->config;
    const fmoe_weights *w = &g->weights;
    const fmoe_tensor *x = fmoe_file_find(g->file, "x");
    CALL(fmoe_file_read_f32(g->file, "x", x->rank, x->shape, &g->x));
    int64_t d = c->hidden_size, I = c->intermediate_size, N = c->num_experts, K = c->num_experts_per_tok;
    int64_t T = x->count / d, n = fmoe_num_keys(N), counts[] = {T * d, 2 * n * d, N * d, N * d, I * d, I * d, d * I};
    const float *values[] = {g->x, w->router_gate, w->down_embed, w->up_embed, w->gate_proj, w->up_proj, w->down_proj};
    fmoe_dtype dtype = fmoe_file_find(g->file, "down_embed.weight")->dtype;
    for (int i = 0; i < 7; i++)
        g->stored[i] = stored(dtype, values[i], counts[i]);
    g->y = poisoned(T * d, fmoe_dtype_size(dtype));
    g->args = (fmoe_layer_args){.T = T,
                                .d = d,
                                .I = I,
                                .N = N,
                                .K = K,
                                .n = n,
                                .training = strcmp(fmoe_file_metadata(g->file, "training"), "1") == 0,
                                .norm_topk_prob = c->norm_topk_prob,
                                .dtype = dtype,
                                .x = g->stored[0],
                                .router_gate = g->stored[1],
                                .down_embed = g->stored[2],
                                .up_embed = g->stored[3],
                                .gate_proj = g->stored[4],
                                .up_proj = g->stored[5],
                                .down_proj = g->stored[6],
                                .running_mean = copy_of(w->running_mean, d),
                                .running_var = copy_of(w->running_var, d),
                                .y = g->y,
                                .router_logits = floats(2 * T * n),
                                .scores = floats(T * K),
                                .indices = integers(T * K)};
    return HOLDS;
}

/* The file's tensor as float32; NULL if there is none. */
static float *golden_values(const golden_layer *g, const char *name) {
    const fmoe_tensor *t = fmoe_file_find(g->file, name);
    float *values = NULL;
    if (t)
        cr_assert(fmoe_file_read_f32(g->file, name, t->rank, t->shape, &values) == FMOE_OK, "%s", fmoe_error_message());
    return values;
}

static const char *as_in_file(const golden_layer *g, const char *name, int64_t count, const float *out, double limit) {
    float *expected OWNED = golden_values(g, name);
    if (!expected)
        return HOLDS;
    double error = fmoe_relative_error(count, out, expected, 0);
    return error <= limit ? HOLDS : because("%s: error %.2g", name, error);
}

static const char *golden_choice(const golden_layer *g) {
    const fmoe_layer_args *a = &g->args;
    const fmoe_tensor *t = fmoe_file_find(g->file, "indices");
    float *logits OWNED = golden_values(g, "router_logits");
    if (!logits || !t || t->dtype != FMOE_I32 || t->count != a->T * a->K)
        return because("the file holds no choice");
    double largest = 1;
    for (int64_t i = 0; i < 2 * a->T * a->n; i++)
        largest = fmax(largest, fabs((double)logits[i]));
    for (int64_t i = 0; i < 2 * a->T * a->n; i++)
        if (!(fabs((double)a->router_logits[i] - logits[i]) <= 2e-5 * largest))
            return because("logit %d is %.8g, in the file %.8g", (int)i, a->router_logits[i], logits[i]);
    int32_t *indices OWNED = integers(t->count);
    memcpy(indices, t->data, (size_t)t->count * sizeof *indices);
    int64_t token = fmoe_compare_indices(a->T, a->n, a->K, logits, a->indices, indices);
    return token < 0 ? HOLDS : because("token %d chose other experts", (int)token);
}

static const char *golden_by(const fmoe_rung *rung, const char *path) {
    golden_layer g FREED(free_golden) = {0};
    CHECK(open_golden(path, &g));
    const fmoe_layer_args *a = &g.args;
    CALL(gpu_layer(rung, a));
    CHECK(golden_choice(&g));
    float *y OWNED = floats(a->T * a->d);
    fmoe_to_f32(a->dtype, a->T * a->d, a->y, y);
    double f32 = fmoe_error_limit(FMOE_F32);
    CHECK(as_in_file(&g, "y", a->T * a->d, y, fmoe_error_limit(a->dtype)));
    CHECK(as_in_file(&g, "scores", a->T * a->K, a->scores, f32));
    CHECK(as_in_file(&g, "router_norm.running_mean.after", a->d, a->running_mean, f32));
    return as_in_file(&g, "router_norm.running_var.after", a->d, a->running_var, f32);
}

CUDA_SENTENCE(8, 42, "On the GPU logits, choice, scores, y and running buffers are those of the golden files.",
              "the contract, in both modes and both types", "an independent PyTorch layer in float64") {
    for (size_t f = 0; f < sizeof golden_files / sizeof golden_files[0]; f++)
        for (const fmoe_rung *rung = public_rungs; rung->run; rung++) {
            const char *wrong = golden_by(rung, golden_files[f]);
            expect(wrong == HOLDS, "%s, %s: %s", golden_files[f], rung->name, wrong);
        }
}

/* The file at `to`, with the first value of a tensor changed by something that is no rounding. */
static fmoe_status spoil(const char *from, const char *name, const char *to) {
    static const char *const keys[] = {"training", "norm_topk_prob", "num_experts_per_tok"};
    fmoe_tensor tensors[32];
    fmoe_metadata metadata[3];
    char *values = NULL;
    fmoe_file *file;
    fmoe_status status = fmoe_file_open(from, &file);
    if (status != FMOE_OK)
        return status;
    int64_t count = fmoe_file_count(file);
    cr_assert(count <= 32);
    for (int i = 0; i < 3; i++)
        metadata[i] = (fmoe_metadata){keys[i], fmoe_file_metadata(file, keys[i])};
    for (int64_t i = 0; i < count; i++) {
        tensors[i] = *fmoe_file_tensor(file, i);
        if (strcmp(tensors[i].name, name) != 0)
            continue;
        size_t bytes = (size_t)tensors[i].count * fmoe_dtype_size(tensors[i].dtype);
        tensors[i].data = values = memcpy(poisoned((int64_t)bytes, 1), tensors[i].data, bytes);
        if (tensors[i].dtype == FMOE_I32)
            memcpy(values, values + 4, 4); /* the same expert twice */
        else
            *(float *)(void *)values += 100; /* results are float32 */
    }
    status = fmoe_file_write(to, count, tensors, 3, metadata);
    free(values);
    fmoe_file_close(file);
    return status;
}

/* The program's exit status, and nothing of what it prints. */
static int quiet_golden_rungs(const char *path) {
    fflush(stdout);
    int out = dup(1), nowhere = open("/dev/null", O_WRONLY);
    dup2(nowhere, 1);
    int status = golden_rungs(path);
    fflush(stdout);
    dup2(out, 1);
    close(out);
    close(nowhere);
    return status;
}

CUDA_SENTENCE(8, 46,
              "--golden FILE --backend cuda passes for every golden file, and for none of which a result is off.",
              "a check that cannot fail checks nothing", "the files, and copies with one value spoilt") {
    static const char *const spoilt[] = {
        "y", "router_logits", "scores", "indices", "router_norm.running_mean.after", "router_norm.running_var.after"};
    for (size_t f = 0; f < sizeof golden_files / sizeof golden_files[0]; f++)
        expect(quiet_golden_rungs(golden_files[f]) == 0, "%s", golden_files[f]);
    expect(quiet_golden_rungs("tests/golden/trained_logits_16384_layer0.safetensors") == 0, "router logits alone");
    char path[] = "/tmp/flashmoe-golden-XXXXXX";
    int descriptor = mkstemp(path);
    cr_assert(descriptor >= 0);
    close(descriptor);
    for (size_t i = 0; i < sizeof spoilt / sizeof spoilt[0]; i++) {
        fmoe_status status = spoil("tests/golden/small_bf16_train.safetensors", spoilt[i], path);
        cr_assert(status == FMOE_OK, "%s", fmoe_error_message());
        expect(quiet_golden_rungs(path) == 1, "%s spoilt: passed", spoilt[i]);
    }
    unlink(path);
}

/* ---- Steps in a row ---------------------------------------------------------------------------------------------- */

/* The batches of a training run, and then one in evaluation, by rung and by the reference's norm. */
static const char *train(const fmoe_rung *rung, const int64_t *size, uint64_t seed) {
    fmoe_problem p PROBLEM =
        new_problem(&fmoe_step_layer, seed, "T%d-d%d-I%d-N%d-K%d-normal-%s-train", (int)size[0], (int)size[1],
                    (int)size[2], (int)size[3], (int)size[4], fmoe_dtype_name((fmoe_dtype)size[5]));
    fmoe_layer_args a = *(const fmoe_layer_args *)p.args;
    int64_t T = a.T, d = a.d;
    float *mean OWNED = copy_of(a.running_mean, d), *var OWNED = copy_of(a.running_var, d);
    float *x_hat OWNED = floats(T * d), *before OWNED = floats(2 * d);
    for (uint64_t step = 0; step < 4; step++) {
        float *drawn OWNED = normals(seed, 60 + step, 2, T * d), *x OWNED = rounded_to(a.dtype, drawn, T * d);
        fmoe_from_f32(a.dtype, T * d, drawn, (void *)a.x);
        CALL(gpu_layer(rung, &a));
        CALL(fmoe_router_norm(true, T, d, x, mean, var, x_hat));
        double off =
            fmax(fmoe_relative_error(d, a.running_mean, mean, 0), fmoe_relative_error(d, a.running_var, var, 0));
        if (!(off <= fmoe_error_limit(FMOE_F32)))
            return because("%s: after %d steps the running buffers are off by %.2g", rung->name, (int)step + 1, off);
    }
    memcpy(before, a.running_mean, (size_t)d * sizeof *before);
    memcpy(before + d, a.running_var, (size_t)d * sizeof *before);
    a.training = false;
    CALL(gpu_layer(rung, &a));
    if (!same_bits(before, a.running_mean, d) || !same_bits(before + d, a.running_var, d))
        return because("%s: evaluation moved a running buffer", rung->name);
    return HOLDS;
}

static const char *training_steps(const int64_t *size, uint64_t seed) {
    for (const fmoe_rung *rung = all_rungs(); rung->run; rung++) {
        if ((int)rung->level <= fmoe_device_get()->level && !rung->supports)
            CHECK(train(rung, size, seed));
    }
    return HOLDS;
}

CUDA_SENTENCE(8, 43, "On the GPU training moves the running buffers once a step, and evaluation leaves them alone.",
              "a buffer moved twice is a bug that no output shows", "fmoe_router_norm, batch after batch") {
    for_sizes("T d I N K dtype", training_steps,
              SIZES({2, 7, 5, 12, 4, 0}, {33, 64, 72, 256, 9, 2}, {130, 136, 40, 100, 6, 1}, {300, 33, 20, 50, 3, 2}));
}

/* In evaluation, the bits of a batch with and without one broken token. */
static const char *broken_token(const int64_t *size, uint64_t seed) {
    fmoe_problem p PROBLEM =
        new_problem(&fmoe_step_layer, seed, "T%d-d%d-I%d-N%d-K%d-normal-%s", (int)size[0], (int)size[1], (int)size[2],
                    (int)size[3], (int)size[4], fmoe_dtype_name((fmoe_dtype)size[5]));
    const fmoe_layer_args *a = p.args;
    int64_t T = a->T, d = a->d, K = a->K, broken = (int64_t)(seed % (uint64_t)T);
    size_t row = (size_t)d * fmoe_dtype_size(a->dtype);
    float *sound OWNED = fmoe_problem_f32(&p, "x"), *x OWNED = copy_of(sound, T * d), *y OWNED = floats(d);
    char *before OWNED = poisoned(T, row);
    int32_t *chosen OWNED = integers(T * K);
    x[broken * d + d / 2] = size[6] ? INFINITY : NAN;
    for (const fmoe_rung *rung = public_rungs; rung->run; rung++) {
        fmoe_from_f32(a->dtype, T * d, sound, (void *)a->x);
        CALL(gpu_layer(rung, a));
        memcpy(before, a->y, (size_t)T * row);
        memcpy(chosen, a->indices, (size_t)(T * K) * sizeof *chosen);
        fmoe_from_f32(a->dtype, T * d, x, (void *)a->x);
        CALL(gpu_layer(rung, a));
        fmoe_to_f32(a->dtype, d, (const char *)a->y + (size_t)broken * row, y);
        for (int64_t c = 0; c < d; c++)
            if (isfinite(y[c]))
                return because("%s: the broken token's y[%d] is %g", rung->name, (int)c, y[c]);
        for (int64_t t = 0; t < T; t++)
            if (t != broken && (memcmp(before + (size_t)t * row, (const char *)a->y + (size_t)t * row, row) != 0 ||
                                !same_bits(chosen + t * K, a->indices + t * K, K)))
                return because("%s: token %d has other bits", rung->name, (int)t);
        for (int64_t k = 0; k < K; k++)
            if (a->indices[broken * K + k] < 0 || a->indices[broken * K + k] >= a->n * a->n)
                return because("%s: the broken token chose expert %d", rung->name, a->indices[broken * K + k]);
    }
    return HOLDS;
}

CUDA_SENTENCE(8, 44,
              "On the GPU a NaN or an infinity in one token reaches no other token in evaluation, and no index is out "
              "of range.",
              "tokens share tiles, clusters and caches", "the batch without it, bit by bit") {
    for_sizes("T d I N K dtype kind", broken_token,
              SIZES({1, 72, 104, 170, 6, 2, 0}, {33, 136, 64, 1024, 16, 2, 0}, {33, 136, 64, 1024, 16, 2, 1},
                    {130, 64, 72, 256, 9, 1, 0}, {9, 7, 5, 12, 4, 0, 1}, {257, 136, 264, 400, 12, 2, 1},
                    {20, 72, 40, 300, 9, 0, 0}));
}

/* ---- Refusals ---------------------------------------------------------------------------------------------------- */

CUDA_HOST_SENTENCE(8, 45, "fmoe_cuda_layer_forward names bad arguments and limits before it launches anything.",
                   "a step's limit must not show after another step has moved the running buffers", "the contract") {
    float m[64] = {0};
    const size_t plenty = (size_t)1 << 40;
    const fmoe_layer_args good = {.T = 2,
                                  .d = 4,
                                  .I = 3,
                                  .N = 17,
                                  .K = 5,
                                  .x = m,
                                  .router_gate = m,
                                  .down_embed = m,
                                  .up_embed = m,
                                  .gate_proj = m,
                                  .up_proj = m,
                                  .down_proj = m,
                                  .running_mean = m,
                                  .running_var = m,
                                  .y = m};
    fmoe_layer_args a = good;
    const struct {
        int64_t *size, value;
        fmoe_status status;
        const char *words;
    } sizes[] = {
        {&a.T, -1, FMOE_BAD_SIZE, "tokens = -1"},
        {&a.d, 0, FMOE_BAD_SIZE, "hidden_size = 0"},
        {&a.I, -3, FMOE_BAD_SIZE, "intermediate_size = -3"},
        {&a.N, 0, FMOE_BAD_SIZE, "num_experts = 0"},
        {&a.K, 0, FMOE_BAD_TOPK, "num_experts_per_tok = 0"},
        {&a.K, 17, FMOE_BAD_TOPK, "n² = 16"},
        {&a.N, 1025 * 1025, FMOE_UNSUPPORTED, "num_keys = 1025"},
        {&a.T, INT64_MAX / 2, FMOE_OVERFLOW, "tokens"},
        {&a.d, INT64_MAX / 3, FMOE_OVERFLOW, "hidden_size"},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        a = good;
        *sizes[i].size = sizes[i].value;
        refused(call_layer(&a, NULL, m, plenty, NULL), sizes[i].status, sizes[i].words);
    }
    const struct {
        void *pointer; /* to the one that is NULL */
        const char *words;
    } pointers[] = {{&a.x, "x"},
                    {&a.router_gate, "router_gate"},
                    {&a.down_embed, "down_embed"},
                    {&a.up_embed, "up_embed"},
                    {&a.gate_proj, "gate_proj"},
                    {&a.up_proj, "up_proj"},
                    {&a.down_proj, "down_proj"},
                    {&a.running_mean, "running_mean"},
                    {&a.running_var, "running_var"},
                    {&a.y, "y"}};
    for (size_t i = 0; i < sizeof pointers / sizeof pointers[0]; i++) {
        a = good;
        memset(pointers[i].pointer, 0, sizeof(void *));
        refused(call_layer(&a, NULL, m, plenty, NULL), FMOE_NULL_POINTER, pointers[i].words);
    }
    a = good;
    a.dtype = FMOE_I32;
    refused(call_layer(&a, NULL, m, plenty, NULL), FMOE_UNSUPPORTED, "dtype = 3");
    a = good;
    a.T = 1, a.training = true;
    refused(call_layer(&a, NULL, m, plenty, NULL), FMOE_BATCH_OF_ONE, "tokens = 1");
    const fmoe_config config = {4, 3, 17, 5, false};
    const fmoe_cuda_weights weights = {m, m, m, m, m, m, m, m};
    const fmoe_cuda_outputs outputs = {.y = m};
#define CALLED(config, weights, outputs, workspace, bytes)                                                             \
    fmoe_cuda_layer_forward(config, weights, false, 2, FMOE_F32, m, outputs, NULL, workspace, bytes, NULL)
    size_t needed = fmoe_cuda_layer_workspace(&config, false, 2, FMOE_F32);
    expect(needed > 0, "the layer needs no workspace");
    refused(CALLED(NULL, &weights, &outputs, m, plenty), FMOE_NULL_POINTER, "config");
    refused(CALLED(&config, NULL, &outputs, m, plenty), FMOE_NULL_POINTER, "weights");
    refused(CALLED(&config, &weights, NULL, m, plenty), FMOE_NULL_POINTER, "outputs");
    refused(CALLED(&config, &weights, &outputs, m, needed - 1), FMOE_BAD_WORKSPACE, "workspace_bytes");
    refused(CALLED(&config, &weights, &outputs, NULL, needed), FMOE_NULL_POINTER, "workspace");
#undef CALLED
}
