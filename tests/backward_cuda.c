/* Chapter 9 on the GPU: the gradients of the expert step and of the MLP. Those of router and top-k are in backward.c.
 */
#include "cuda_values.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const routings[] = {"uniform", "normal", "hot", "trained"};

static const char *expert_rungs(const int64_t *size, uint64_t seed) {
    int64_t N = size[2], K = size[3];
    if (K > N || (size[5] == 1 && K > fmoe_num_keys(N) * fmoe_num_keys(N)))
        return DOES_NOT_APPLY;
    return rungs_agree(&fmoe_step_expert_backward, cuda_expert_backward_rungs, seed, "T%d-d%d-N%d-K%d-%s-%s",
                       (int)size[0], (int)size[1], (int)N, (int)K, routings[size[5]],
                       fmoe_dtype_name((fmoe_dtype)size[4]));
}

CUDA_SENTENCE(9, 31,
              "Every GPU rung of expert_backward computes the four gradients: odd sizes, idle experts, hot ones.",
              "a long list is cut, a short one shares a warp, an empty one must still be zeroed",
              "fmoe_expert_backward; NaN in outputs and workspace before, guard bands after") {
    for_sizes("T d N K type routing", expert_rungs,
              SIZES({0, 7, 5, 2, 0, 0}, {1, 4, 9, 9, 0, 0}, {3, 1, 9, 9, 2, 2}, {3, 5, 4, 4, 0, 0},
                    {29, 72, 170, 6, 0, 1}, {29, 72, 170, 6, 1, 1}, {29, 72, 170, 6, 2, 0}, {257, 3, 7, 1, 0, 2},
                    {257, 17, 7, 2, 2, 2}, {1030, 9, 3, 1, 0, 2}, {40, 16, 600, 3, 0, 0}, {600, 33, 2, 2, 1, 0},
                    {7, 130, 1000, 20, 0, 0}, {700, 1024, 40, 3, 2, 2}, {33, 1024, 16384, 64, 2, 3},
                    {65, 264, 16384, 65, 1, 3}, {300, 1032, 600, 9, 2, 0}, {5, 2056, 20, 6, 2, 0},
                    {20, 1, 20, 20, 1, 0}, {1100, 256, 3000, 30, 2, 0}, {900, 136, 24600, 99, 2, 0}));
    for_random_sizes("T d N K type routing", expert_rungs, 40, (int64_t[]){1, 1, 1, 1, 0, 0},
                     (int64_t[]){100, 200, 100, 20, 2, 2});
}

static const char *mlp_rungs(const int64_t *size, uint64_t seed) {
    return rungs_agree(&fmoe_step_mlp_backward, cuda_mlp_backward_rungs, seed, "T%d-d%d-I%d-%s", (int)size[0],
                       (int)size[1], (int)size[2], fmoe_dtype_name((fmoe_dtype)size[3]));
}

CUDA_SENTENCE(9, 32, "Every GPU rung of mlp_backward computes the four gradients.",
              "operands are read either way round, and every edge of a tile is somebody's",
              "fmoe_mlp_backward; NaN in outputs and workspace before, guard bands after") {
    for_sizes("T d I type", mlp_rungs,
              SIZES({0, 5, 7, 0}, {1, 4, 17, 0}, {9, 2, 17, 0}, {3, 7, 5, 0}, {29, 22, 47, 1}, {33, 37, 25, 2},
                    {13, 40, 33, 0}, {65, 17, 100, 1}, {30, 66, 35, 2}, {100, 3, 50, 0}, {1, 136, 264, 2},
                    {64, 64, 64, 2}, {129, 136, 264, 1}, {200, 264, 520, 2}, {300, 128, 1032, 2}, {77, 1024, 200, 1},
                    {130, 257, 131, 0}));
    for_random_sizes("T d I type", mlp_rungs, 30, (int64_t[]){24, 24, 24, 0}, (int64_t[]){90, 150, 150, 2});
}

static const char *same_bits_again(const int64_t *size, uint64_t seed) {
    const char *type = fmoe_dtype_name((fmoe_dtype)size[0]);
    CHECK(rungs_repeat(&fmoe_step_expert_backward, cuda_expert_backward_rungs, seed, "T700-d136-N50-K3-hot-%s", type));
    CHECK(rungs_repeat(&fmoe_step_expert_backward, cuda_expert_backward_rungs, seed, "T300-d1024-N600-K8-normal-%s",
                       type));
    CHECK(rungs_repeat(&fmoe_step_mlp_backward, cuda_mlp_backward_rungs, seed, "T33-d40-I65-%s", type));
    return rungs_repeat(&fmoe_step_mlp_backward, cuda_mlp_backward_rungs, seed, "T300-d264-I520-%s", type);
}

CUDA_SENTENCE(9, 33,
              "Every GPU rung of expert_backward and mlp_backward but the one with atomic additions writes the same "
              "bits in every run, and depends on its arguments alone.",
              "a row of a gradient has one owner; parts of a cut list are added in order",
              "three runs; a graph replayed with new data; two streams that start together") {
    for_sizes("type", same_bits_again, SIZES({0}, {1}, {2}));
    static const struct {
        const fmoe_step *step;
        const fmoe_rung *rungs;
        const char *name;
    } calls[] = {{&fmoe_step_expert_backward, cuda_expert_backward_rungs, "T300-d256-N1024-K16-normal-bf16"},
                 {&fmoe_step_expert_backward, cuda_expert_backward_rungs, "T29-d72-N50-K9-hot-f32"},
                 {&fmoe_step_mlp_backward, cuda_mlp_backward_rungs, "T130-d264-I136-bf16"},
                 {&fmoe_step_mlp_backward, cuda_mlp_backward_rungs, "T37-d41-I33-f32"}};
    for (size_t i = 0; i < sizeof calls / sizeof calls[0]; i++) {
        const char *wrong = rungs_replay(calls[i].step, calls[i].rungs, fresh_seed(), calls[i].name);
        expect(wrong == HOLDS, "%s: %s", calls[i].name, wrong);
        wrong = rungs_side_by_side(calls[i].step, calls[i].rungs, fresh_seed(), calls[i].name);
        expect(wrong == HOLDS, "%s: %s", calls[i].name, wrong);
    }
}

/* ---- The public functions ---------------------------------------------------------------------------------------- */

/* How a gradient is asked for; bits of a size. */
enum { NARROW = 1, ACCUMULATE = 2, KEPT_NUMBERS = 4, KEPT_SCHEDULE = 8 };

/* A few numbers may all be near zero by chance: they are measured by what is usual for them. */
static const char *close_to(const char *name, fmoe_dtype stored_in, double limit, int64_t count, const void *out,
                            const float *ref, double usual) {
    float *values OWNED = floats(count);
    fmoe_to_f32(stored_in, count, out, values);
    double off = 0, norm = 0;
    for (int64_t i = 0; i < count; i++) {
        off += pow((double)values[i] - ref[i], 2);
        norm += (double)ref[i] * ref[i];
    }
    double least = count < 64 ? usual * usual * (double)count : 0, error = sqrt(off / fmax(fmax(norm, least), 1e-30));
    return error <= limit ? HOLDS : because("%s: error %.2g", name, error);
}

/* Gradients, the reference's beside them, and what they held before. */
enum { MOST_GRADIENTS = 4 };
typedef struct {
    int num;
    const char *name[MOST_GRADIENTS];
    int64_t count[MOST_GRADIENTS];
    fmoe_dtype dtype[MOST_GRADIENTS];
    bool accumulated[MOST_GRADIENTS];
    double usual[MOST_GRADIENTS], limit[MOST_GRADIENTS];
    float *before[MOST_GRADIENTS], *expected[MOST_GRADIENTS];
    void *out[MOST_GRADIENTS], *first[MOST_GRADIENTS];
} gradient_set;

static void add_gradient(gradient_set *g, uint64_t seed, const char *name, int64_t count, fmoe_dtype dtype,
                         bool accumulated, double usual, double limit) {
    int i = g->num++;
    float *values OWNED = normals(seed, 40 + (uint64_t)i, 2 * usual, count);
    g->name[i] = name, g->count[i] = count, g->dtype[i] = dtype, g->accumulated[i] = accumulated;
    g->usual[i] = usual, g->limit[i] = limit;
    g->before[i] = rounded_to(dtype, values, count);
    g->expected[i] = copy_of(g->before[i], count);
}

static void free_gradients(gradient_set *g) {
    for (int i = 0; i < g->num; i++) {
        free(g->before[i]);
        free(g->expected[i]);
        free(g->out[i]);
        free(g->first[i]);
    }
}

/* Each as it was before the call, those of `asked`, a bit each. */
static void begin_gradients(gradient_set *g, int asked) {
    for (int i = 0; i < g->num; i++) {
        free(g->out[i]);
        g->out[i] = NULL;
        if (asked >> i & 1)
            g->out[i] = g->accumulated[i] ? stored(g->dtype[i], g->before[i], g->count[i])
                                          : poisoned(g->count[i], fmoe_dtype_size(g->dtype[i]));
    }
}

static const char *gradients_close(const gradient_set *g) {
    for (int i = 0; i < g->num; i++)
        CHECK(close_to(g->name[i], g->dtype[i], g->limit[i], g->count[i], g->out[i], g->expected[i], g->usual[i]));
    return HOLDS;
}

static void keep_gradients(gradient_set *g) {
    for (int i = 0; i < g->num; i++) {
        g->first[i] = g->out[i];
        g->out[i] = NULL;
    }
}

static const char *gradients_as_first(const gradient_set *g) {
    for (int i = 0; i < g->num; i++)
        if (g->out[i] && memcmp(g->out[i], g->first[i], (size_t)g->count[i] * fmoe_dtype_size(g->dtype[i])) != 0)
            return because("%s without the other gradients has other bits", g->name[i]);
    return HOLDS;
}

/* ---- Experts ----------------------------------------------------------------------------------------------------- */

typedef struct {
    fmoe_expert_backward_args step;
    fmoe_write write;
    fmoe_dtype gradient_dtype;
} expert_call;

static fmoe_status run_expert_backward(const void *args, void *workspace, size_t bytes, void *stream) {
    const expert_call *c = args;
    const fmoe_expert_backward_args *a = &c->step;
    return fmoe_cuda_expert_backward(a->T, a->d, a->N, a->K, a->dtype, a->x, a->down, a->up, a->indices, a->weights,
                                     a->pre_activations, a->offsets, a->pairs, a->dy, c->write, c->gradient_dtype,
                                     a->dx, a->ddown, a->dup, a->dweights, workspace, bytes, stream);
}

static fmoe_status gpu_expert_backward(const expert_call *c) {
    const fmoe_expert_backward_args *a = &c->step;
    int64_t tokens = a->T * a->d, table = a->N * a->d, pairs = a->T * a->K;
    fmoe_role tables = c->write == FMOE_ACCUMULATE ? ROLE_INOUT : ROLE_OUTPUT;
    const tensor tensors[] = {
        TENSOR(expert_call, step.x, a->dtype, ROLE_INPUT, tokens),
        TENSOR(expert_call, step.down, a->dtype, ROLE_INPUT, table),
        TENSOR(expert_call, step.up, a->dtype, ROLE_INPUT, table),
        TENSOR(expert_call, step.indices, FMOE_I32, ROLE_INPUT, pairs),
        TENSOR(expert_call, step.weights, FMOE_F32, ROLE_INPUT, pairs),
        TENSOR(expert_call, step.pre_activations, FMOE_F32, ROLE_INPUT, pairs),
        TENSOR(expert_call, step.offsets, FMOE_I32, ROLE_INPUT, a->N + 1),
        TENSOR(expert_call, step.pairs, FMOE_I32, ROLE_INPUT, pairs),
        TENSOR(expert_call, step.dy, a->dtype, ROLE_INPUT, tokens),
        TENSOR(expert_call, step.dx, c->gradient_dtype, ROLE_OUTPUT, tokens),
        TENSOR(expert_call, step.ddown, c->gradient_dtype, tables, table),
        TENSOR(expert_call, step.dup, c->gradient_dtype, tables, table),
        TENSOR(expert_call, step.dweights, FMOE_F32, ROLE_OUTPUT, pairs),
    };
    bool kept = a->pre_activations && a->offsets;
    size_t bytes = fmoe_cuda_expert_backward_workspace(a->T, a->d, a->N, a->K, a->dtype, kept);
    return run_and_check(run_expert_backward, bytes, c, sizeof *c, tensors, (int)(sizeof tensors / sizeof tensors[0]));
}

/* The stored inputs as float32, and the call. */
typedef struct {
    expert_call call;
    float *x, *down, *up, *dy, *weights, *pre_activations;
    void *stored_x, *stored_down, *stored_up, *stored_dy;
    int32_t *indices, *offsets, *pairs;
    gradient_set g;
} expert_inputs;

static void free_expert_inputs(expert_inputs *in) {
    void *all[] = {in->x,        in->down,        in->up,        in->dy,        in->weights, in->pre_activations,
                   in->stored_x, in->stored_down, in->stored_up, in->stored_dy, in->indices, in->offsets,
                   in->pairs};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        free(all[i]);
    free_gradients(&in->g);
}

static float *both_ways(fmoe_dtype dtype, uint64_t seed, uint64_t stream, double scale, int64_t count, void **narrow) {
    float *values OWNED = normals(seed, stream, scale, count);
    *narrow = stored(dtype, values, count);
    return rounded_to(dtype, values, count);
}

static expert_inputs draw_experts(uint64_t seed, int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype,
                                  int64_t how) {
    expert_inputs in = {0};
    fmoe_expert_backward_args *a = &in.call.step;
    in.x = both_ways(dtype, seed, 0, 1, T * d, &in.stored_x);
    in.down = both_ways(dtype, seed, 1, 1 / sqrt((double)d), N * d, &in.stored_down);
    in.up = both_ways(dtype, seed, 2, 1, N * d, &in.stored_up);
    in.dy = both_ways(dtype, seed, 3, 1, T * d, &in.stored_dy);
    in.weights = normals(seed, 4, 1, T * K);
    in.indices = any_indices(seed, 5, N, T * K);
    in.pre_activations = floats(T * K);
    in.offsets = integers(N + 1);
    in.pairs = integers(T * K);
    *a = (fmoe_expert_backward_args){.T = T, .d = d, .N = N, .K = K, .dtype = dtype};
    a->x = in.stored_x, a->down = in.stored_down, a->up = in.stored_up, a->dy = in.stored_dy;
    a->indices = in.indices, a->weights = in.weights;
    in.call.write = how & ACCUMULATE ? FMOE_ACCUMULATE : FMOE_OVERWRITE;
    in.call.gradient_dtype = how & NARROW ? dtype : FMOE_F32;
    fmoe_dtype gradients = in.call.gradient_dtype;
    double limit = fmoe_error_limit(gradients), f32 = fmoe_error_limit(FMOE_F32);
    add_gradient(&in.g, seed, "dx", T * d, gradients, false, 0.5 * sqrt((double)K), limit);
    add_gradient(&in.g, seed, "ddown", N * d, gradients, how & ACCUMULATE, 0.5 * sqrt((double)d), limit);
    add_gradient(&in.g, seed, "dup", N * d, gradients, how & ACCUMULATE, 0.5, limit);
    add_gradient(&in.g, seed, "dweights", T * K, FMOE_F32, false, 0.5 * sqrt((double)d), f32);
    return in;
}

/* What the forward pass leaves, from the GPU's own; a bad index is noted there as well. */
static fmoe_status keep_of_forward(expert_inputs *in, int64_t how, bool bad) {
    fmoe_expert_backward_args *a = &in->call.step;
    fmoe_status expected = bad ? FMOE_BAD_INDEX : FMOE_OK, status = expected;
    if (how & KEPT_NUMBERS) {
        void *y OWNED = poisoned(a->T * a->d, fmoe_dtype_size(a->dtype));
        const fmoe_expert_args forward = {.T = a->T,
                                          .d = a->d,
                                          .N = a->N,
                                          .K = a->K,
                                          .dtype = a->dtype,
                                          .x = a->x,
                                          .down = a->down,
                                          .up = a->up,
                                          .indices = a->indices,
                                          .weights = a->weights,
                                          .y = y};
        status = gpu_expert(&forward, in->pre_activations);
        a->pre_activations = in->pre_activations;
    }
    if (status == expected && how & KEPT_SCHEDULE) {
        const fmoe_schedule_args schedule = {a->T, a->K, a->N, a->indices, in->offsets, in->pairs};
        status = gpu_schedule(&schedule);
        a->offsets = in->offsets, a->pairs = in->pairs;
    }
    return status == expected ? FMOE_OK : status == FMOE_OK ? FMOE_CUDA : status;
}

static fmoe_status call_experts(expert_inputs *in, int asked) {
    begin_gradients(&in->g, asked);
    fmoe_expert_backward_args *a = &in->call.step;
    a->dx = in->g.out[0], a->ddown = in->g.out[1], a->dup = in->g.out[2], a->dweights = in->g.out[3];
    return gpu_expert_backward(&in->call);
}

static fmoe_status refer_experts(expert_inputs *in) {
    const fmoe_expert_backward_args *a = &in->call.step;
    float **to = in->g.expected;
    return fmoe_expert_backward(a->T, a->d, a->N, a->K, in->x, in->down, in->up, in->indices, in->weights, in->dy,
                                in->call.write, to[0], to[1], to[2], to[3]);
}

static const char *public_experts(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], N = size[2], K = size[3], how = size[5];
    if (K > N)
        return DOES_NOT_APPLY;
    expert_inputs in FREED(free_expert_inputs) = draw_experts(seed, T, d, N, K, (fmoe_dtype)size[4], how);
    CALL(keep_of_forward(&in, how, false));
    CALL(call_experts(&in, 15));
    CALL(refer_experts(&in));
    CHECK(gradients_close(&in.g));
    keep_gradients(&in.g);
    for (int i = 0; i < 4; i++) {
        CALL(call_experts(&in, 1 << i));
        CHECK(gradients_as_first(&in.g));
    }
    return HOLDS;
}

CUDA_SENTENCE(
    9, 34,
    "fmoe_cuda_expert_backward: four gradients, for any indices and weights, of what was kept or is made again, "
    "overwritten or added to, in float32 or the storage type; each of them alone has the same bits.",
    "a caller keeps what pays, and trains what it wants to", "fmoe_expert_backward on the stored values") {
    for_sizes("T d N K type how", public_experts,
              SIZES({1, 1, 1, 1, 0, 0}, {3, 5, 4, 4, 0, 15}, {3, 5, 4, 4, 2, 2}, {29, 72, 17, 9, 2, 1},
                    {29, 72, 170, 6, 1, 7}, {29, 72, 170, 6, 2, 10}, {40, 33, 3, 2, 2, 3}, {257, 17, 7, 2, 1, 12},
                    {600, 40, 2, 2, 2, 14}, {600, 40, 2, 1, 2, 5}, {33, 256, 2000, 20, 2, 13},
                    {33, 256, 2000, 20, 2, 8}, {130, 1024, 600, 9, 2, 2}, {130, 264, 600, 9, 0, 6},
                    {700, 136, 50, 3, 1, 9}, {300, 1032, 100, 20, 2, 15}));
    for_random_sizes("T d N K type how", public_experts, 40, (int64_t[]){1, 1, 1, 1, 0, 0},
                     (int64_t[]){90, 120, 80, 12, 2, 15});
}

/* The bad pairs count for the reference as legal ones whose weight is 0, and their own gradients are 0. */
static const char *bad_experts(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], N = size[2], K = size[3], bad = size[5], how = size[6], first = -1;
    if (K > N)
        return DOES_NOT_APPLY;
    expert_inputs in FREED(free_expert_inputs) = draw_experts(seed, T, d, N, K, (fmoe_dtype)size[4], how);
    const int32_t wrong[] = {-1, (int32_t)N, INT32_MIN, INT32_MAX};
    float *weights OWNED = copy_of(in.weights, T * K);
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t i = 0; i < bad; i++) {
            int64_t at = (int64_t)(fmoe_random_bits(seed, 30, (uint64_t)i) % (uint64_t)(T * K));
            in.weights[at] = pass ? weights[at] : 0;
            if (pass) {
                in.indices[at] = wrong[i % 4];
                in.g.expected[3][at] = 0;
            }
            first = first < 0 || at < first ? at : first;
        }
        if (pass == 0)
            CALL(refer_experts(&in));
    }
    CALL(keep_of_forward(&in, how, bad > 0));
    fmoe_status status = call_experts(&in, 15);
    char note[96] = "";
    if (bad > 0)
        snprintf(note, sizeof note, "indices[%d, %d] = %d is outside [0, num_experts = %d)", (int)(first / K),
                 (int)(first % K), in.indices[first], (int)N);
    if (status != (bad > 0 ? FMOE_BAD_INDEX : FMOE_OK) || (bad > 0 && strcmp(fmoe_error_message(), note) != 0))
        return because("%s, \"%s\", should be \"%s\"", fmoe_status_name(status), fmoe_error_message(), note);
    return gradients_close(&in.g);
}

static const char *no_tokens(gradient_set *g, int first_weight, fmoe_write write) {
    for (int i = first_weight; i < g->num; i++) {
        float *values OWNED = floats(g->count[i]);
        fmoe_to_f32(g->dtype[i], g->count[i], g->out[i], values);
        for (int64_t k = 0; k < g->count[i]; k++)
            if (values[k] != (write == FMOE_ACCUMULATE ? g->before[i][k] : 0))
                return because("without tokens %s[%d] is %g", g->name[i], (int)k, values[k]);
    }
    return HOLDS;
}

static const char *no_expert_tokens(const int64_t *size, uint64_t seed) {
    expert_inputs in FREED(free_expert_inputs) =
        draw_experts(seed, 0, size[0], size[1], 1, (fmoe_dtype)size[2], size[3]);
    CALL(call_experts(&in, 15));
    return no_tokens(&in.g, 1, in.call.write);
}

CUDA_SENTENCE(9, 35,
              "On the way back a bad index adds nothing, has no gradient, and fmoe_cuda_check names the first; without "
              "tokens the tables' gradients are zeroed, or kept.",
              "the forward pass has told the caller already, but nothing may be followed",
              "fmoe_expert_backward without the bad pairs; the note") {
    for_sizes("T d N K type bad how", bad_experts,
              SIZES({1, 8, 1, 1, 0, 1, 0}, {5, 16, 4, 4, 2, 3, 15}, {29, 72, 17, 9, 1, 1, 2}, {29, 72, 17, 9, 1, 0, 8},
                    {130, 64, 300, 33, 2, 7, 12}, {257, 33, 520, 4, 0, 9, 5}, {300, 16, 2, 2, 2, 5, 0},
                    {600, 40, 2, 1, 2, 30, 8}, {65, 264, 1000, 30, 2, 60, 4}));
    for_sizes("d N type how", no_expert_tokens, SIZES({7, 5, 0, 0}, {40, 130, 2, 0}, {40, 130, 2, 3}, {7, 5, 1, 1}));
}

/* ---- The MLP ----------------------------------------------------------------------------------------------------- */

typedef struct {
    fmoe_mlp_backward_args step;
    fmoe_write write;
    fmoe_dtype gradient_dtype;
} mlp_call;

static fmoe_status run_mlp_backward(const void *args, void *workspace, size_t bytes, void *stream) {
    const mlp_call *c = args;
    const fmoe_mlp_backward_args *a = &c->step;
    return fmoe_cuda_mlp_backward(a->T, a->d, a->I, a->dtype, a->x, a->gate, a->up, a->down, a->h, a->h_by_p, a->h_by_q,
                                  a->dy, c->write, c->gradient_dtype, a->dx, a->dgate, a->dup, a->ddown, workspace,
                                  bytes, stream);
}

static fmoe_status gpu_mlp_backward(const mlp_call *c) {
    const fmoe_mlp_backward_args *a = &c->step;
    int64_t tokens = a->T * a->d, weights = a->I * a->d, hidden = a->T * a->I;
    fmoe_role role = c->write == FMOE_ACCUMULATE ? ROLE_INOUT : ROLE_OUTPUT;
    const tensor tensors[] = {
        TENSOR(mlp_call, step.x, a->dtype, ROLE_INPUT, tokens),
        TENSOR(mlp_call, step.gate, a->dtype, ROLE_INPUT, weights),
        TENSOR(mlp_call, step.up, a->dtype, ROLE_INPUT, weights),
        TENSOR(mlp_call, step.down, a->dtype, ROLE_INPUT, weights),
        TENSOR(mlp_call, step.h, a->dtype, ROLE_INPUT, hidden),
        TENSOR(mlp_call, step.h_by_p, a->dtype, ROLE_INPUT, hidden),
        TENSOR(mlp_call, step.h_by_q, a->dtype, ROLE_INPUT, hidden),
        TENSOR(mlp_call, step.dy, a->dtype, ROLE_INPUT, tokens),
        TENSOR(mlp_call, step.dx, c->gradient_dtype, ROLE_OUTPUT, tokens),
        TENSOR(mlp_call, step.dgate, c->gradient_dtype, role, weights),
        TENSOR(mlp_call, step.dup, c->gradient_dtype, role, weights),
        TENSOR(mlp_call, step.ddown, c->gradient_dtype, role, weights),
    };
    size_t bytes = fmoe_cuda_mlp_backward_workspace(a->T, a->d, a->I, a->dtype, a->h != NULL);
    return run_on_device(run_mlp_backward, bytes, c, sizeof *c, tensors, (int)(sizeof tensors / sizeof tensors[0]));
}

typedef struct {
    mlp_call call;
    float *x, *gate, *up, *down, *dy; /* the stored values */
    void *stored[5], *kept[3];
    gradient_set g;
} mlp_inputs;

static void free_mlp_inputs(mlp_inputs *in) {
    float *values[] = {in->x, in->gate, in->up, in->down, in->dy};
    for (int i = 0; i < 5; i++) {
        free(values[i]);
        free(in->stored[i]);
    }
    for (int i = 0; i < 3; i++)
        free(in->kept[i]);
    free_gradients(&in->g);
}

/* h and its derivatives of the stored inputs. */
static void keep_hidden(mlp_inputs *in, int64_t T, int64_t d, int64_t I, fmoe_dtype dtype) {
    float *h OWNED = floats(T * I), *by_p OWNED = floats(T * I), *by_q OWNED = floats(T * I);
    for (int64_t i = 0; i < T * I; i++) {
        double p = 0, q = 0;
        for (int64_t c = 0; c < d; c++) {
            p += (double)in->x[i / I * d + c] * in->gate[i % I * d + c];
            q += (double)in->x[i / I * d + c] * in->up[i % I * d + c];
        }
        double sigmoid = 1 / (1 + exp(-p));
        h[i] = (float)(p * sigmoid * q);
        by_p[i] = (float)(sigmoid * (1 + p * (1 - sigmoid)) * q);
        by_q[i] = (float)(p * sigmoid);
    }
    in->call.step.h = in->kept[0] = stored(dtype, h, T * I);
    in->call.step.h_by_p = in->kept[1] = stored(dtype, by_p, T * I);
    in->call.step.h_by_q = in->kept[2] = stored(dtype, by_q, T * I);
}

static mlp_inputs draw_mlp(uint64_t seed, int64_t T, int64_t d, int64_t I, fmoe_dtype dtype, int64_t how) {
    mlp_inputs in = {0};
    fmoe_mlp_backward_args *a = &in.call.step;
    double width = sqrt((double)d / (double)I), tokens = sqrt((double)T);
    *a = (fmoe_mlp_backward_args){.T = T, .d = d, .I = I, .dtype = dtype};
    in.x = both_ways(dtype, seed, 0, 1, T * d, &in.stored[0]);
    in.gate = both_ways(dtype, seed, 1, 1 / sqrt((double)d), I * d, &in.stored[1]);
    in.up = both_ways(dtype, seed, 2, 1 / sqrt((double)d), I * d, &in.stored[2]);
    in.down = both_ways(dtype, seed, 3, 1 / sqrt((double)I), d * I, &in.stored[3]);
    in.dy = both_ways(dtype, seed, 4, 1, T * d, &in.stored[4]);
    a->x = in.stored[0], a->gate = in.stored[1], a->up = in.stored[2], a->down = in.stored[3], a->dy = in.stored[4];
    if (how & KEPT_NUMBERS)
        keep_hidden(&in, T, d, I, dtype);
    in.call.write = how & ACCUMULATE ? FMOE_ACCUMULATE : FMOE_OVERWRITE;
    in.call.gradient_dtype = how & NARROW ? dtype : FMOE_F32;
    /* The hidden units between the products may be rounded to dtype, whatever the gradients are stored in. */
    fmoe_dtype gradients = in.call.gradient_dtype;
    double limit = fmoe_error_limit(dtype);
    add_gradient(&in.g, seed, "dx", T * d, gradients, false, 0.5, limit);
    add_gradient(&in.g, seed, "dgate", I * d, gradients, how & ACCUMULATE, 0.3 * width * tokens, limit);
    add_gradient(&in.g, seed, "dup", I * d, gradients, how & ACCUMULATE, 0.3 * width * tokens, limit);
    add_gradient(&in.g, seed, "ddown", d * I, gradients, how & ACCUMULATE, 0.3 * tokens, limit);
    return in;
}

static fmoe_status call_mlp(mlp_inputs *in, int asked) {
    begin_gradients(&in->g, asked);
    fmoe_mlp_backward_args *a = &in->call.step;
    a->dx = in->g.out[0], a->dgate = in->g.out[1], a->dup = in->g.out[2], a->ddown = in->g.out[3];
    return gpu_mlp_backward(&in->call);
}

static const char *public_mlp(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], I = size[2];
    mlp_inputs in FREED(free_mlp_inputs) = draw_mlp(seed, T, d, I, (fmoe_dtype)size[3], size[4]);
    float **to = in.g.expected;
    CALL(call_mlp(&in, 15));
    CALL(fmoe_mlp_backward(T, d, I, in.x, in.gate, in.up, in.down, in.dy, in.call.write, to[0], to[1], to[2], to[3]));
    CHECK(gradients_close(&in.g));
    keep_gradients(&in.g);
    for (int i = 0; i < 4; i++) {
        CALL(call_mlp(&in, 1 << i));
        CHECK(gradients_as_first(&in.g));
    }
    return HOLDS;
}

static const char *public_aligned(const int64_t *size, uint64_t seed) {
    const int64_t aligned[] = {size[0], 8 * size[1], 8 * size[2], size[3], size[4]};
    return public_mlp(aligned, seed);
}

static const char *no_mlp_tokens(const int64_t *size, uint64_t seed) {
    mlp_inputs in FREED(free_mlp_inputs) = draw_mlp(seed, 0, size[0], size[1], (fmoe_dtype)size[2], size[3]);
    CALL(call_mlp(&in, 15));
    return no_tokens(&in.g, 1, in.call.write);
}

CUDA_SENTENCE(
    9, 36,
    "fmoe_cuda_mlp_backward: four gradients, of what was kept or is made again, overwritten or added to, in float32 or "
    "the storage type; each of them alone has the same bits; without tokens they are zeroed, or kept.",
    "six products, each with its own way of reading its operands", "fmoe_mlp_backward on the stored values") {
    for_sizes("T d I type how", public_mlp,
              SIZES({1, 4, 8, 0, 0}, {3, 7, 5, 0, 2}, {33, 7, 5, 2, 5}, {9, 16, 24, 2, 0}, {65, 17, 100, 1, 7},
                    {65, 17, 100, 0, 6}, {64, 64, 64, 2, 1}, {64, 64, 64, 2, 2}, {129, 136, 264, 1, 3},
                    {200, 264, 520, 2, 4}, {300, 1032, 128, 2, 6}, {300, 128, 1032, 2, 7}, {77, 1024, 200, 1, 2},
                    {130, 257, 131, 2, 2}, {40, 72, 8, 2, 5}, {900, 64, 264, 2, 3}));
    for_random_sizes("T d/8 I/8 type how", public_aligned, 24, (int64_t[]){1, 1, 1, 1, 0},
                     (int64_t[]){300, 30, 40, 2, 7});
    for_sizes("d I type how", no_mlp_tokens, SIZES({7, 5, 0, 0}, {40, 136, 2, 0}, {40, 136, 2, 3}, {7, 5, 1, 1}));
}

/* ---- Slopes ------------------------------------------------------------------------------------------------------ */

typedef double loss_fn(const void *inputs);

/* Each slope of the loss, which is computed in double, by a step to either side. */
static const char *slopes(const char *name, float *values, int64_t count, const float *gradient, double usual,
                          loss_fn *loss, const void *inputs) {
    float *slope OWNED = floats(count);
    for (int64_t i = 0; i < count; i++) {
        float at = values[i], above = at + 0x1p-11f, below = at - 0x1p-11f;
        values[i] = above;
        double rise = loss(inputs);
        values[i] = below;
        rise -= loss(inputs);
        values[i] = at;
        slope[i] = (float)(rise / ((double)above - below));
    }
    return close_to(name, FMOE_F32, fmoe_error_limit(FMOE_F32), count, gradient, slope, usual);
}

static double silu_of(double s) {
    return s / (1 + exp(-s));
}

/* The stored values are the ones that the call is given: float32. */
static double expert_loss(const void *inputs) {
    const expert_inputs *in = inputs;
    const fmoe_expert_backward_args *a = &in->call.step;
    double loss = 0;
    for (int64_t p = 0; p < a->T * a->K; p++) {
        int64_t t = p / a->K, e = in->indices[p];
        double s = 0, da = 0;
        for (int64_t c = 0; c < a->d; c++) {
            s += (double)in->x[t * a->d + c] * in->down[e * a->d + c];
            da += (double)in->dy[t * a->d + c] * in->up[e * a->d + c];
        }
        loss += silu_of(s) * in->weights[p] * da;
    }
    return loss;
}

static const char *expert_slopes(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], N = size[2], K = size[3];
    if (K > N)
        return DOES_NOT_APPLY;
    expert_inputs in FREED(free_expert_inputs) = draw_experts(seed, T, d, N, K, FMOE_F32, 0);
    gradient_set *g = &in.g;
    CALL(call_experts(&in, 15));
    CHECK(slopes("x", in.x, T * d, g->out[0], g->usual[0], expert_loss, &in));
    CHECK(slopes("down", in.down, N * d, g->out[1], g->usual[1], expert_loss, &in));
    CHECK(slopes("up", in.up, N * d, g->out[2], g->usual[2], expert_loss, &in));
    return slopes("weights", in.weights, T * K, g->out[3], g->usual[3], expert_loss, &in);
}

static double mlp_loss(const void *inputs) {
    const mlp_inputs *in = inputs;
    const fmoe_mlp_backward_args *a = &in->call.step;
    double loss = 0;
    for (int64_t t = 0; t < a->T; t++)
        for (int64_t i = 0; i < a->I; i++) {
            double p = 0, q = 0, dh = 0;
            for (int64_t c = 0; c < a->d; c++) {
                p += (double)in->x[t * a->d + c] * in->gate[i * a->d + c];
                q += (double)in->x[t * a->d + c] * in->up[i * a->d + c];
                dh += (double)in->dy[t * a->d + c] * in->down[c * a->I + i];
            }
            loss += silu_of(p) * q * dh;
        }
    return loss;
}

static const char *mlp_slopes(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], I = size[2];
    mlp_inputs in FREED(free_mlp_inputs) = draw_mlp(seed, T, d, I, FMOE_F32, 0);
    gradient_set *g = &in.g;
    CALL(call_mlp(&in, 15));
    CHECK(slopes("x", in.x, T * d, g->out[0], g->usual[0], mlp_loss, &in));
    CHECK(slopes("gate", in.gate, I * d, g->out[1], g->usual[1], mlp_loss, &in));
    CHECK(slopes("up", in.up, I * d, g->out[2], g->usual[2], mlp_loss, &in));
    return slopes("down", in.down, d * I, g->out[3], g->usual[3], mlp_loss, &in);
}

CUDA_SENTENCE(9, 37, "The GPU's gradients of experts and MLP are slopes of the forward pass.",
              "a check that does not share the reference's derivation", "finite differences in double") {
    for_sizes("T d N K", expert_slopes,
              SIZES({1, 1, 1, 1}, {2, 3, 1, 1}, {3, 5, 4, 2}, {2, 4, 3, 3}, {5, 2, 9, 4}, {9, 36, 5, 3}));
    for_sizes("T d I", mlp_slopes, SIZES({1, 1, 1}, {3, 2, 5}, {2, 5, 3}, {4, 3, 34}, {2, 34, 2}, {17, 8, 9}));
}

/* ---- Refusals ---------------------------------------------------------------------------------------------------- */

static void refused_experts(void) {
    float m[64] = {0};
    int32_t i[16] = {0};
    const size_t plenty = (size_t)1 << 40;
#define RUN(T, d, N, K, dtype, x, down, up, indices, weights, offsets, pairs, dy, gradients, workspace, bytes)         \
    fmoe_cuda_expert_backward(T, d, N, K, dtype, x, down, up, indices, weights, NULL, offsets, pairs, dy,              \
                              FMOE_OVERWRITE, gradients, m, m, m, m, workspace, bytes, NULL)
#define SIZED(T, d, N, K, dtype) RUN(T, d, N, K, dtype, m, m, m, i, m, NULL, NULL, m, FMOE_F32, m, plenty)
#define WITH(x, down, up, indices, weights, dy)                                                                        \
    RUN(2, 2, 4, 2, FMOE_F32, x, down, up, indices, weights, NULL, NULL, dy, FMOE_F32, m, plenty)
    refused(SIZED(-1, 2, 4, 2, FMOE_F32), FMOE_BAD_SIZE, "tokens = -1");
    refused(SIZED(2, 0, 4, 2, FMOE_F32), FMOE_BAD_SIZE, "hidden_size = 0");
    refused(SIZED(2, 2, 0, 2, FMOE_F32), FMOE_BAD_SIZE, "num_experts = 0");
    refused(SIZED(2, 2, 4, 5, FMOE_F32), FMOE_BAD_TOPK, "5 exceeds num_experts = 4");
    refused(SIZED(2, 2, 4, 2, FMOE_I32), FMOE_UNSUPPORTED, "dtype = 3");
    refused(SIZED(2, 2, FMOE_CUDA_MAX_EXPERTS + 1, 2, FMOE_F32), FMOE_UNSUPPORTED, "num_experts");
    refused(SIZED(INT64_MAX / 8, 1000, 4, 2, FMOE_F32), FMOE_OVERFLOW, "tokens");
    refused(WITH(NULL, m, m, i, m, m), FMOE_NULL_POINTER, "x");
    refused(WITH(m, NULL, m, i, m, m), FMOE_NULL_POINTER, "down_embed");
    refused(WITH(m, m, NULL, i, m, m), FMOE_NULL_POINTER, "up_embed");
    refused(WITH(m, m, m, NULL, m, m), FMOE_NULL_POINTER, "indices");
    refused(WITH(m, m, m, i, NULL, m), FMOE_NULL_POINTER, "weights");
    refused(WITH(m, m, m, i, m, NULL), FMOE_NULL_POINTER, "dy");
    refused(RUN(2, 2, 4, 2, FMOE_F32, m, m, m, i, m, i, NULL, m, FMOE_F32, m, plenty), FMOE_NULL_POINTER,
            "pairs is NULL");
    refused(RUN(2, 2, 4, 2, FMOE_F32, m, m, m, i, m, NULL, i, m, FMOE_F32, m, plenty), FMOE_NULL_POINTER,
            "offsets is NULL");
    refused(RUN(2, 2, 4, 2, FMOE_F16, m, m, m, i, m, NULL, NULL, m, FMOE_BF16, m, plenty), FMOE_UNSUPPORTED,
            "gradient_dtype");
    size_t needed = fmoe_cuda_expert_backward_workspace(2, 2, 4, 2, FMOE_F32, false);
    expect(needed > fmoe_cuda_expert_backward_workspace(2, 2, 4, 2, FMOE_F32, true), "what is kept saves no workspace");
    refused(RUN(2, 2, 4, 2, FMOE_F32, m, m, m, i, m, NULL, NULL, m, FMOE_F32, m, needed - 1), FMOE_BAD_WORKSPACE,
            "workspace_bytes");
    refused(RUN(2, 2, 4, 2, FMOE_F32, m, m, m, i, m, NULL, NULL, m, FMOE_F32, NULL, needed), FMOE_NULL_POINTER,
            "workspace");
#undef WITH
#undef SIZED
#undef RUN
}

static void refused_mlp(void) {
    float m[64] = {0};
    const size_t plenty = (size_t)1 << 40;
#define RUN(T, d, I, dtype, x, gate, up, down, h, by_p, by_q, dy, gradients, workspace, bytes)                         \
    fmoe_cuda_mlp_backward(T, d, I, dtype, x, gate, up, down, h, by_p, by_q, dy, FMOE_OVERWRITE, gradients, m, m, m,   \
                           m, workspace, bytes, NULL)
#define SIZED(T, d, I, dtype)       RUN(T, d, I, dtype, m, m, m, m, NULL, NULL, NULL, m, FMOE_F32, m, plenty)
#define WITH(x, gate, up, down, dy) RUN(2, 2, 4, FMOE_F32, x, gate, up, down, NULL, NULL, NULL, dy, FMOE_F32, m, plenty)
#define KEPT(h, by_p, by_q)         RUN(2, 2, 4, FMOE_F32, m, m, m, m, h, by_p, by_q, m, FMOE_F32, m, plenty)
    refused(SIZED(-1, 2, 4, FMOE_F32), FMOE_BAD_SIZE, "tokens = -1");
    refused(SIZED(2, 0, 4, FMOE_F32), FMOE_BAD_SIZE, "hidden_size = 0");
    refused(SIZED(2, 2, -4, FMOE_F32), FMOE_BAD_SIZE, "intermediate_size = -4");
    refused(SIZED(2, 2, 4, FMOE_I32), FMOE_UNSUPPORTED, "dtype = 3");
    refused(SIZED(INT64_MAX / 8, 1000, 4, FMOE_F32), FMOE_OVERFLOW, "tokens");
    refused(WITH(NULL, m, m, m, m), FMOE_NULL_POINTER, "x");
    refused(WITH(m, NULL, m, m, m), FMOE_NULL_POINTER, "gate_proj");
    refused(WITH(m, m, NULL, m, m), FMOE_NULL_POINTER, "up_proj");
    refused(WITH(m, m, m, NULL, m), FMOE_NULL_POINTER, "down_proj");
    refused(WITH(m, m, m, m, NULL), FMOE_NULL_POINTER, "dy");
    refused(KEPT(m, m, NULL), FMOE_NULL_POINTER, "h_by_q");
    refused(KEPT(NULL, m, m), FMOE_NULL_POINTER, "h");
    refused(RUN(2, 2, 4, FMOE_F16, m, m, m, m, NULL, NULL, NULL, m, FMOE_BF16, m, plenty), FMOE_UNSUPPORTED,
            "gradient_dtype");
    size_t needed = fmoe_cuda_mlp_backward_workspace(2, 2, 4, FMOE_F32, false);
    expect(needed > fmoe_cuda_mlp_backward_workspace(2, 2, 4, FMOE_F32, true), "what is kept saves no workspace");
    refused(RUN(2, 2, 4, FMOE_F32, m, m, m, m, NULL, NULL, NULL, m, FMOE_F32, m, needed - 1), FMOE_BAD_WORKSPACE,
            "workspace_bytes");
    refused(RUN(2, 2, 4, FMOE_F32, m, m, m, m, NULL, NULL, NULL, m, FMOE_F32, NULL, needed), FMOE_NULL_POINTER,
            "workspace");
#undef KEPT
#undef WITH
#undef SIZED
#undef RUN
}

CUDA_HOST_SENTENCE(9, 38,
                   "fmoe_cuda_expert_backward and fmoe_cuda_mlp_backward name bad arguments before they launch "
                   "anything.",
                   "what the host can see it says at once", "the contract") {
    refused_experts();
    refused_mlp();
}
