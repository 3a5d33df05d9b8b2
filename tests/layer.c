/* Chapter 8: the whole layer against results computed elsewhere, against its own steps, and up its ladder. */
#include "values.h"

#include "../chapters/golden.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- A layer to try ---------------------------------------------------------------------------------------------- */

typedef struct {
    fmoe_config c;
    int64_t T, n;
    fmoe_weights w;
    float *x, *dy;
} layer;

static layer new_layer(uint64_t seed, int64_t T, int64_t d, int64_t I, int64_t N, int64_t K, bool norm) {
    layer l = {.c = {d, I, N, K, norm}, .T = T, .n = fmoe_num_keys(N)};
    double rows = 1 / sqrt((double)d);
    float *var = floats(d);
    for (int64_t h = 0; h < d; h++)
        var[h] = 0.5f + fmoe_random_uniform(seed, 9, (uint64_t)h);
    l.w = (fmoe_weights){.router_gate = normals(seed, 1, rows, 2 * l.n * d),
                         .down_embed = normals(seed, 2, rows, N * d),
                         .up_embed = normals(seed, 3, 3, N * d),
                         .gate_proj = normals(seed, 4, rows, I * d),
                         .up_proj = normals(seed, 5, rows, I * d),
                         .down_proj = normals(seed, 6, 1 / sqrt((double)I), d * I),
                         .running_mean = normals(seed, 7, 0.3, d),
                         .running_var = var};
    l.x = normals(seed, 8, 1, T * d);
    l.dy = normals(seed, 10, 1, T * d);
    for (int64_t i = 0; i < T * d; i++)
        l.x[i] += 0.5f * (float)(i % d % 3);
    return l;
}

static void free_layer(layer *l) {
    fmoe_weights_free(&l->w);
    free(l->x);
    free(l->dy);
}
#define LAYER FREED(free_layer)

/* What a pass leaves: its outputs, and the running buffers, which start as the layer's own. */
typedef struct {
    fmoe_status status;
    float *y, *logits, *scores, *mean, *var;
    int32_t *indices;
} results;

static results forward(const layer *l, bool training, const int32_t *chosen) {
    int64_t T = l->T, d = l->c.hidden_size, K = l->c.num_experts_per_tok;
    results r = {.y = floats(T * d), .logits = floats(2 * T * l->n), .scores = floats(T * K)};
    r.indices = integers(T * K);
    r.mean = copy_of(l->w.running_mean, d);
    r.var = copy_of(l->w.running_var, d);
    fmoe_weights w = l->w;
    w.running_mean = r.mean;
    w.running_var = r.var;
    fmoe_outputs outputs = {r.y, r.logits, r.scores, r.indices};
    r.status = fmoe_layer_forward(&l->c, &w, training, T, l->x, chosen, &outputs);
    return r;
}

static results run(const layer *l, bool training) {
    results r = forward(l, training, NULL);
    cr_assert(r.status == FMOE_OK, "%s", fmoe_error_message());
    return r;
}

static void free_results(results *r) {
    free(r->y);
    free(r->logits);
    free(r->scores);
    free(r->indices);
    free(r->mean);
    free(r->var);
}
#define RESULTS FREED(free_results)

enum { GRADIENTS = 7 };

typedef struct {
    float *g[GRADIENTS]; /* dx, then the weights in the order of fmoe_gradients */
    int64_t count[GRADIENTS];
} gradients;

static gradients new_gradients(const layer *l, float initial) {
    int64_t d = l->c.hidden_size, N = l->c.num_experts, I = l->c.intermediate_size;
    gradients all = {.count = {l->T * d, 2 * l->n * d, N * d, N * d, I * d, I * d, d * I}};
    for (int i = 0; i < GRADIENTS; i++)
        all.g[i] = filled(initial, all.count[i]);
    return all;
}

static void free_gradients(gradients *all) {
    for (int i = 0; i < GRADIENTS; i++)
        free(all->g[i]);
}
#define ALL_GRADIENTS FREED(free_gradients)

static fmoe_status backward(const layer *l, bool training, const int32_t *indices, fmoe_write write, gradients *all) {
    fmoe_gradients to = {all->g[0], all->g[1], all->g[2], all->g[3], all->g[4], all->g[5], all->g[6]};
    return fmoe_layer_backward(&l->c, &l->w, training, l->T, l->x, indices, l->dy, write, &to);
}

/* Sizes "T d I N K norm" to a layer, or NULL where K is out of reach. */
static bool layer_of(const int64_t *size, uint64_t seed, layer *l) {
    int64_t n = fmoe_num_keys(size[3]);
    if (size[4] > n * n || size[5] > 1)
        return false;
    *l = new_layer(seed, size[0], size[1], size[2], size[3], size[4], size[5]);
    return true;
}

#define LAYER_SIZES                                                                                                    \
    SIZES({2, 1, 1, 1, 1, 0}, {3, 2, 5, 9, 4, 1}, {5, 7, 3, 12, 9, 0}, {17, 12, 20, 50, 6, 1}, {33, 24, 9, 170, 13, 0})

/* ---- Golden files ------------------------------------------------------------------------------------------------ */

static const char *const golden_files[] = {
    "tests/golden/tiny_f32_train.safetensors",       "tests/golden/tiny_f32_eval_norm.safetensors",
    "tests/golden/small_f32_train_norm.safetensors", "tests/golden/small_bf16_train.safetensors",
    "tests/golden/odd_f32_eval.safetensors",         "tests/golden/trained_bf16_eval.safetensors",
};
enum { GOLDEN_FILES = sizeof golden_files / sizeof *golden_files };

/* Every file's lines whose name is one of these (separated by blanks); each name stands in at least `least` files. */
static void expect_golden(const char *names, int least) {
    char copy[256];
    snprintf(copy, sizeof copy, "%s", names);
    for (char *rest, *name = strtok_r(copy, " ", &rest); name; name = strtok_r(NULL, " ", &rest)) {
        int files = 0;
        for (int f = 0; f < GOLDEN_FILES; f++) {
            golden_report report;
            fmoe_status status = golden_check(golden_files[f], &report);
            expect(status == FMOE_OK, "%s", fmoe_error_message());
            bool there = false;
            for (int i = 0; i < report.num_lines; i++) {
                const golden_line *line = &report.lines[i];
                if (strcmp(line->name, name) != 0)
                    continue;
                there = true;
                expect(line->ok, "%s: %s: error %.2g, limit %.2g %s", golden_files[f], name, line->error, line->limit,
                       line->note);
            }
            files += there;
        }
        expect(files >= least, "%s stands in %d files, %d are expected", name, files, least);
    }
}

SENTENCE(8, 1, "Logits, scores and outputs are those of the golden files.",
         "the contract, in both modes and both types", "an independent PyTorch layer in float64") {
    expect_golden("router_logits scores y", GOLDEN_FILES);
}

SENTENCE(8, 2, "The experts chosen are those of the golden files, and of a scan of all n² pairs on trained logits.",
         "one wrong choice changes everything after it", "PyTorch's top-k; an exhaustive scan") {
    expect_golden("indices", GOLDEN_FILES);
    golden_report report;
    fmoe_status status = golden_check("tests/golden/trained_logits_16384_layer0.safetensors", &report);
    expect(status == FMOE_OK, "%s", fmoe_error_message());
    expect(report.num_lines == 1 && golden_passed(&report), "trained logits: %s", report.lines[0].note);
    expect(strstr(report.lines[0].note, "7080 of 16384 experts chosen, the busiest by 828 tokens") != NULL,
           "trained logits: %s", report.lines[0].note);
}

SENTENCE(8, 3, "The running buffers move in training as in the golden files.",
         "biased variance normalises, unbiased variance is kept", "an independent PyTorch layer in float64") {
    expect_golden("router_norm.running_mean.after router_norm.running_var.after", GOLDEN_FILES - 1);
}

SENTENCE(8, 4, "All gradients, of x and of the six weights, are those of the golden files.",
         "the backward pass is a composition too", "PyTorch's autograd in float64") {
    expect_golden("dx grad.router_gate.weight grad.gate_proj.weight grad.up_proj.weight grad.down_proj.weight",
                  GOLDEN_FILES);
    expect_golden("grad.down_embed.weight grad.up_embed.weight", GOLDEN_FILES - 1);
}

/* ---- The formula, once more -------------------------------------------------------------------------------------- */

static double naive_dot(int64_t d, const double *a, const float *b) {
    double sum = 0;
    for (int64_t i = 0; i < d; i++)
        sum += a[i] * b[i];
    return sum;
}

/* A token's logits of one side, less their log-sum-exp. */
static void naive_log_probs(int64_t n, int64_t d, const double *x_hat, const float *gate, double *log_probs) {
    double sum = 0;
    for (int64_t j = 0; j < n; j++) {
        log_probs[j] = naive_dot(d, x_hat, gate + j * d);
        sum += exp(log_probs[j]);
    }
    for (int64_t j = 0; j < n; j++)
        log_probs[j] -= log(sum);
}

/* y and scores at the given choice, one token at a time, from mean and variance per hidden unit. */
static void naive_token(const layer *l, const double *mean, const double *var, int64_t t, const int32_t *indices,
                        double *scores, double *y) {
    int64_t d = l->c.hidden_size, I = l->c.intermediate_size, K = l->c.num_experts_per_tok, n = l->n;
    double x[64], x_hat[64], log_x[16], log_y[16], total = 0;
    for (int64_t h = 0; h < d; h++) {
        x[h] = l->x[t * d + h];
        x_hat[h] = (x[h] - mean[h]) / sqrt(var[h] + 1e-5);
        y[h] = 0;
    }
    naive_log_probs(n, d, x_hat, l->w.router_gate, log_x);
    naive_log_probs(n, d, x_hat, l->w.router_gate + n * d, log_y);
    for (int64_t k = 0; k < K; k++) {
        scores[k] = log_x[indices[k] / n] + log_y[indices[k] % n];
        total += exp(scores[k]);
    }
    for (int64_t k = 0; k < K; k++) {
        double s = naive_dot(d, x, l->w.down_embed + indices[k] * d);
        double a = s / (1 + exp(-s)) * exp(scores[k]) / (l->c.norm_topk_prob ? total : 1);
        for (int64_t h = 0; h < d; h++)
            y[h] += a * l->w.up_embed[indices[k] * d + h];
    }
    for (int64_t i = 0; i < I; i++) {
        double s = naive_dot(d, x, l->w.gate_proj + i * d), a = s / (1 + exp(-s));
        a *= naive_dot(d, x, l->w.up_proj + i * d);
        for (int64_t h = 0; h < d; h++)
            y[h] += a * l->w.down_proj[h * I + i];
    }
}

static void naive_statistics(const layer *l, bool training, double *mean, double *var) {
    int64_t d = l->c.hidden_size;
    for (int64_t h = 0; h < d; h++) {
        mean[h] = l->w.running_mean[h];
        var[h] = l->w.running_var[h];
        if (!training)
            continue;
        mean[h] = var[h] = 0;
        for (int64_t t = 0; t < l->T; t++)
            mean[h] += (double)l->x[t * d + h] / (double)l->T;
        for (int64_t t = 0; t < l->T; t++)
            var[h] += pow(l->x[t * d + h] - mean[h], 2) / (double)l->T;
    }
}

static const char *is_the_formula(const int64_t *size, uint64_t seed) {
    layer l LAYER = {0};
    bool training = size[6];
    if (size[6] > 1 || (training && size[0] < 2) || !layer_of(size, seed, &l))
        return DOES_NOT_APPLY;
    results r RESULTS = run(&l, training);
    int64_t d = l.c.hidden_size, K = l.c.num_experts_per_tok;
    double mean[64], var[64], scores[256], y[64], off = 0, norm = 0;
    naive_statistics(&l, training, mean, var);
    for (int64_t t = 0; t < l.T; t++) {
        naive_token(&l, mean, var, t, r.indices + t * K, scores, y);
        for (int64_t h = 0; h < d; h++) {
            off += pow(r.y[t * d + h] - y[h], 2);
            norm += y[h] * y[h];
        }
        for (int64_t k = 0; k < K; k++)
            if (!(fabs(r.scores[t * K + k] - scores[k]) < 1e-5))
                return because("token %lld, place %lld: score %.9g, the formula says %.9g", (long long)t, (long long)k,
                               (double)r.scores[t * K + k], scores[k]);
    }
    if (!(sqrt(off) <= 1e-6 * sqrt(norm) + 1e-6))
        return because("y is off by %.2g of its norm", sqrt(off / norm));
    return HOLDS;
}

SENTENCE(8, 5, "At sizes that divide nothing, in either mode, the layer is the formula.", "golden files are few",
         "the formula in double, token by token") {
    for_sizes("T d I N K norm training", is_the_formula,
              SIZES({1, 1, 1, 1, 1, 0, 0}, {3, 2, 5, 9, 4, 1, 0}, {3, 2, 5, 9, 4, 1, 1}, {5, 7, 3, 12, 9, 0, 1},
                    {17, 12, 20, 50, 6, 1, 1}, {33, 24, 9, 170, 13, 0, 0}, {9, 64, 40, 256, 1, 1, 0}));
    for_random_sizes("T d I N K norm training", is_the_formula, 20, (int64_t[]){1, 1, 1, 1, 1, 0, 0},
                     (int64_t[]){20, 40, 30, 200, 12, 1, 1});
}

/* ---- Steps ------------------------------------------------------------------------------------------------------- */

/* The steps called one after the other, at a choice made elsewhere or, with NULL, at the top-k's. */
static const char *same_as_steps(const layer *l, bool training, const int32_t *chosen) {
    int64_t T = l->T, d = l->c.hidden_size, I = l->c.intermediate_size, N = l->c.num_experts;
    int64_t K = l->c.num_experts_per_tok, n = l->n;
    results r RESULTS = forward(l, training, chosen);
    cr_assert(r.status == FMOE_OK, "%s", fmoe_error_message());
    float *x_hat OWNED = floats(T * d), *logits OWNED = floats(2 * T * n);
    float *scores OWNED = floats(T * K), *weights OWNED = floats(T * K);
    float *routed OWNED = floats(T * d), *y OWNED = floats(T * d), *mean OWNED = copy_of(l->w.running_mean, d);
    float *var OWNED = copy_of(l->w.running_var, d);
    int32_t *indices OWNED = integers(T * K);
    fmoe_router_norm(training, T, d, l->x, mean, var, x_hat);
    fmoe_router_logits(T, d, n, x_hat, l->w.router_gate, logits);
    if (chosen) {
        memcpy(indices, chosen, (size_t)(T * K) * sizeof *indices);
        fmoe_topk_at(T, n, K, l->c.norm_topk_prob, logits, indices, scores, weights);
    } else {
        fmoe_topk(T, n, K, l->c.norm_topk_prob, logits, indices, scores, weights);
    }
    fmoe_expert(T, d, N, K, l->x, l->w.down_embed, l->w.up_embed, indices, weights, routed, NULL);
    fmoe_mlp(T, d, I, l->x, l->w.gate_proj, l->w.up_proj, l->w.down_proj, y);
    for (int64_t i = 0; i < T * d; i++)
        y[i] += routed[i];
    if (!same_bits(r.y, y, T * d))
        return because("y is not the sum of the branches");
    if (!same_bits(r.logits, logits, 2 * T * n) || !same_bits(r.scores, scores, T * K))
        return because("logits or scores are not the steps'");
    if (!same_bits(r.indices, indices, T * K))
        return because("the indices returned are not the ones used");
    if (!same_bits(r.mean, mean, d) || !same_bits(r.var, var, d))
        return because("the running buffers are not as the norm leaves them");
    return HOLDS;
}

static const char *composition(const int64_t *size, uint64_t seed) {
    layer l LAYER = {0};
    if (!layer_of(size, seed, &l))
        return DOES_NOT_APPLY;
    CHECK(same_as_steps(&l, false, NULL));
    return l.T > 1 ? same_as_steps(&l, true, NULL) : HOLDS;
}

SENTENCE(8, 6, "The layer has the same bits as its steps called one after the other.",
         "each step was tested by itself in its own chapter", "the steps") {
    for_sizes("T d I N K norm", composition, LAYER_SIZES);
}

static const char *choice_elsewhere(const int64_t *size, uint64_t seed) {
    layer l LAYER = {0};
    if (!layer_of(size, seed, &l))
        return DOES_NOT_APPLY;
    int64_t count = l.T * l.c.num_experts_per_tok;
    int32_t *chosen OWNED = any_indices(seed, 20, l.n * l.n, count);
    return same_as_steps(&l, l.T > 1, chosen);
}

SENTENCE(8, 7, "A choice made elsewhere replaces the top-k and nothing else.",
         "implementations are compared at their own choice", "the steps, with scores and weights at that choice") {
    for_sizes("T d I N K norm", choice_elsewhere, LAYER_SIZES);
}

/* ---- Few tokens -------------------------------------------------------------------------------------------------- */

SENTENCE(8, 8, "Without tokens nothing is read or moved; weight gradients become zero, or stay when accumulated.",
         "T = 0 is legal", "the values before the call") {
    for (int training = 0; training < 2; training++) {
        layer l LAYER = new_layer(fresh_seed(), 0, 5, 3, 9, 2, false);
        results r RESULTS = run(&l, training);
        expect(same_bits(r.mean, l.w.running_mean, 5) && same_bits(r.var, l.w.running_var, 5),
               "a pass without tokens moved the running buffers");
        for (int write = 0; write < 2; write++) {
            gradients all ALL_GRADIENTS = new_gradients(&l, 7);
            fmoe_status status = backward(&l, training, r.indices, write ? FMOE_ACCUMULATE : FMOE_OVERWRITE, &all);
            expect(status == FMOE_OK, "backward: %s", fmoe_error_message());
            for (int i = 1; i < GRADIENTS; i++)
                for (int64_t k = 0; k < all.count[i]; k++)
                    expect(all.g[i][k] == (write ? 7.0f : 0.0f), "gradient %d holds %g", i, (double)all.g[i][k]);
        }
    }
}

static const char *alone_or_among(const int64_t *size, uint64_t seed) {
    layer l LAYER = {0};
    if (!layer_of(size, seed, &l))
        return DOES_NOT_APPLY;
    int64_t d = l.c.hidden_size, K = l.c.num_experts_per_tok, T = l.T;
    results all RESULTS = run(&l, false);
    for (int64_t t = 0; t < T; t++) {
        layer one = l;
        one.T = 1;
        one.x = l.x + t * d;
        results r RESULTS = run(&one, false);
        if (!same_bits(r.y, all.y + t * d, d) || !same_bits(r.indices, all.indices + t * K, K))
            return because("token %lld alone has other bits than among %lld", (long long)t, (long long)T);
    }
    return HOLDS;
}

SENTENCE(8, 9, "In evaluation a token alone has the same bits as among others.",
         "decoding one token at a time must not change a text", "the batch") {
    for_sizes("T d I N K norm", alone_or_among, LAYER_SIZES);
}

SENTENCE(8, 10, "One token in training is refused, forward and backward, before anything moves.",
         "the unbiased variance divides by T − 1", "the status, and the buffers before the call") {
    layer l LAYER = new_layer(fresh_seed(), 1, 5, 3, 9, 2, false);
    results r RESULTS = forward(&l, true, NULL);
    expect(r.status == FMOE_BATCH_OF_ONE, "forward: %s", fmoe_status_name(r.status));
    expect(strstr(fmoe_error_message(), "tokens = 1") != NULL, "the message is \"%s\"", fmoe_error_message());
    expect(same_bits(r.mean, l.w.running_mean, 5), "the running mean moved");
    expect(same_bits(r.var, l.w.running_var, 5), "the running variance moved");
    gradients all ALL_GRADIENTS = new_gradients(&l, 7);
    fmoe_status status = backward(&l, true, r.indices, FMOE_OVERWRITE, &all);
    expect(status == FMOE_BATCH_OF_ONE, "backward: %s", fmoe_status_name(status));
    expect(all.g[0][0] == 7, "dx was written");
}

/* ---- Bad input --------------------------------------------------------------------------------------------------- */

enum { REFUSED_D = 4 }; /* hidden_size of the layer that bad input is tried on */

/* In training, where a check that comes too late shows in the running buffers. */
static void expect_refused(const layer *l, fmoe_status expected, const char *part_of_message) {
    float y[64], *mean OWNED = l->w.running_mean ? copy_of(l->w.running_mean, REFUSED_D) : NULL;
    fmoe_outputs outputs = {.y = y};
    fmoe_status status = fmoe_layer_forward(&l->c, &l->w, true, l->T, l->x, NULL, &outputs);
    expect(status == expected, "%s: status %s, expected %s", part_of_message, fmoe_status_name(status),
           fmoe_status_name(expected));
    expect(strstr(fmoe_error_message(), part_of_message) != NULL, "the message is \"%s\", not about %s",
           fmoe_error_message(), part_of_message);
    expect(!mean || same_bits(mean, l->w.running_mean, REFUSED_D), "%s: a buffer moved", part_of_message);
    int32_t indices[64] = {0};
    fmoe_gradients none = {0};
    status = fmoe_layer_backward(&l->c, &l->w, true, l->T, l->x, indices, l->x, FMOE_OVERWRITE, &none);
    expect(status == expected, "%s, backward: status %s", part_of_message, fmoe_status_name(status));
}

SENTENCE(8, 11,
         "A bad size, a K out of reach, an overflowing product and a NULL pointer have each its status, before "
         "anything moves.",
         "a library returns, it does not crash", "the list of statuses; the name and value in the message") {
    layer good LAYER = new_layer(fresh_seed(), 2, REFUSED_D, 3, 17, 5, false), l = good;
    const struct {
        int64_t *size;
        int64_t value;
        fmoe_status status;
        const char *message;
    } bad[] = {
        {&l.T, -1, FMOE_BAD_SIZE, "-1"},
        {&l.c.hidden_size, 0, FMOE_BAD_SIZE, "hidden_size = 0"},
        {&l.c.intermediate_size, -3, FMOE_BAD_SIZE, "intermediate_size = -3"},
        {&l.c.num_experts, 0, FMOE_BAD_SIZE, "num_experts = 0"},
        {&l.c.num_experts_per_tok, 0, FMOE_BAD_TOPK, "num_experts_per_tok = 0"},
        {&l.c.num_experts_per_tok, 17, FMOE_BAD_TOPK, "n² = 16"},
        {&l.c.hidden_size, INT64_MAX / 3, FMOE_OVERFLOW, "hidden_size"},
        {&l.c.intermediate_size, INT64_MAX / 3, FMOE_OVERFLOW, "intermediate_size"},
        {&l.T, INT64_MAX / 2, FMOE_OVERFLOW, "tokens"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        l = good;
        *bad[i].size = bad[i].value;
        expect_refused(&l, bad[i].status, bad[i].message);
    }
    const float **const pointers[] = {&l.w.router_gate, &l.w.down_embed, &l.w.up_embed,
                                      &l.w.gate_proj,   &l.w.up_proj,    &l.w.down_proj};
    static const char *const names[] = {"router_gate", "down_embed", "up_embed", "gate_proj", "up_proj", "down_proj"};
    for (int i = 0; i < 6; i++) {
        l = good;
        *pointers[i] = NULL;
        expect_refused(&l, FMOE_NULL_POINTER, names[i]);
    }
    l = good;
    l.w.running_mean = NULL;
    expect_refused(&l, FMOE_NULL_POINTER, "running_mean");
    l = good;
    l.w.running_var = NULL;
    expect_refused(&l, FMOE_NULL_POINTER, "running_var");
    l = good;
    l.x = NULL;
    expect_refused(&l, FMOE_NULL_POINTER, "x");
}

SENTENCE(8, 12, "A chosen index outside [0, n²) is refused, forward and backward, and no buffer has moved by then.",
         "it would be read as an address", "the status; the buffers before the call") {
    layer l LAYER = new_layer(fresh_seed(), 3, 4, 3, 17, 2, false);
    for (int bad = 0; bad < 2; bad++) {
        int32_t chosen[6] = {0, 1, 2, 3, 4, bad ? 16 : -1};
        results r RESULTS = forward(&l, true, chosen);
        expect(r.status == FMOE_BAD_INDEX, "forward with index %d: %s", chosen[5], fmoe_status_name(r.status));
        expect(same_bits(r.mean, l.w.running_mean, 4), "the running mean moved");
        gradients all ALL_GRADIENTS = new_gradients(&l, 0);
        fmoe_status status = backward(&l, true, chosen, FMOE_OVERWRITE, &all);
        expect(status == FMOE_BAD_INDEX, "backward with index %d: %s", chosen[5], fmoe_status_name(status));
    }
}

/* ---- Symmetries -------------------------------------------------------------------------------------------------- */

static const char *any_threads(const int64_t *size, uint64_t seed) {
    layer l LAYER = {0};
    if (!layer_of(size, seed, &l))
        return DOES_NOT_APPLY;
    results first RESULTS = run(&l, true);
    gradients first_all ALL_GRADIENTS = new_gradients(&l, NAN);
    FOR_THREADS(turn) {
        results r RESULTS = run(&l, true);
        gradients all ALL_GRADIENTS = new_gradients(&l, NAN);
        CALL(backward(&l, true, r.indices, FMOE_OVERWRITE, turn.turn ? &all : &first_all));
        if (!same_bits(r.y, first.y, l.T * l.c.hidden_size) || !same_bits(r.var, first.var, l.c.hidden_size))
            return because("y or the running buffers differ with %d threads", turn.threads);
        for (int g = 0; turn.turn && g < GRADIENTS; g++)
            if (!same_bits(all.g[g], first_all.g[g], all.count[g]))
                return because("gradient %d differs with %d threads", g, turn.threads);
    }
    return HOLDS;
}

SENTENCE(8, 13, "Forward and backward have the same bits for 1, 2, 3 and 7 threads.",
         "a result that depends on the machine cannot be checked", "the bits with one thread") {
    for_sizes("T d I N K norm", any_threads, LAYER_SIZES);
}

static const char *buffers(const int64_t *size, uint64_t seed) {
    layer l LAYER = {0};
    if (!layer_of(size, seed, &l))
        return DOES_NOT_APPLY;
    int64_t T = l.T, d = l.c.hidden_size;
    double mean[64], var[64];
    results evaluation RESULTS = run(&l, false), training RESULTS = run(&l, true);
    if (!same_bits(evaluation.mean, l.w.running_mean, d) || !same_bits(evaluation.var, l.w.running_var, d))
        return because("evaluation moved a running buffer");
    naive_statistics(&l, true, mean, var);
    for (int64_t h = 0; h < d; h++) {
        double m = 0.9 * l.w.running_mean[h] + 0.1 * mean[h];
        double v = 0.9 * l.w.running_var[h] + 0.1 * var[h] * (double)T / (double)(T - 1);
        if (!(fabs(training.mean[h] - m) <= 1e-6 && fabs(training.var[h] - v) <= 1e-6 * (1 + v)))
            return because("unit %lld: the buffers are %g and %g, should be %g and %g", (long long)h,
                           (double)training.mean[h], (double)training.var[h], m, v);
    }
    gradients all ALL_GRADIENTS = new_gradients(&l, 0);
    float *mean_before OWNED = copy_of(l.w.running_mean, d);
    CALL(backward(&l, true, training.indices, FMOE_OVERWRITE, &all));
    if (!same_bits(mean_before, l.w.running_mean, d))
        return because("the backward pass moved a running buffer");
    return HOLDS;
}

SENTENCE(8, 14,
         "Training moves the running buffers a tenth of the way, once; evaluation and backward leave them alone.",
         "a buffer moved twice is a bug that no output shows", "mean and unbiased variance in double") {
    for_sizes("T d I N K norm", buffers, LAYER_SIZES);
}

static const char *permuted(const int64_t *size, uint64_t seed) {
    layer l LAYER = {0};
    if (!layer_of(size, seed, &l))
        return DOES_NOT_APPLY;
    int64_t T = l.T, d = l.c.hidden_size, K = l.c.num_experts_per_tok;
    layer reversed = l;
    float *x OWNED = reversed.x = floats(T * d);
    for (int64_t t = 0; t < T; t++)
        memcpy(x + t * d, l.x + (T - 1 - t) * d, (size_t)d * sizeof(float));
    results r RESULTS = run(&l, false), s RESULTS = run(&reversed, false);
    for (int64_t t = 0; t < T; t++)
        if (!same_bits(r.y + t * d, s.y + (T - 1 - t) * d, d) ||
            !same_bits(r.scores + t * K, s.scores + (T - 1 - t) * K, K))
            return because("token %lld has other bits in another place", (long long)t);
    return HOLDS;
}

SENTENCE(8, 15, "Tokens in another order have the same results in that order.", "tokens do not know their neighbours",
         "the batch in reverse") {
    for_sizes("T d I N K norm", permuted, LAYER_SIZES);
}

static float *doubled(const float *values, int64_t count) {
    float *twice = floats(count);
    for (int64_t i = 0; i < count; i++)
        twice[i] = 2 * values[i];
    return twice;
}

static const char *scaling(const int64_t *size, uint64_t seed) {
    layer l LAYER = {0};
    if (!layer_of(size, seed, &l))
        return DOES_NOT_APPLY;
    int64_t d = l.c.hidden_size, count = l.T * d;
    layer twice = l, shared = l, routed = l;
    float *up OWNED = doubled(l.w.up_embed, l.c.num_experts * d);
    float *down OWNED = doubled(l.w.down_proj, d * l.c.intermediate_size);
    twice.w.up_embed = shared.w.up_embed = up;
    twice.w.down_proj = routed.w.down_proj = down;
    results r RESULTS = run(&l, false), both RESULTS = run(&twice, false);
    results only_up RESULTS = run(&shared, false), only_down RESULTS = run(&routed, false);
    for (int64_t i = 0; i < count; i++) {
        if (both.y[i] != 2 * r.y[i])
            return because("y[%lld] = %g, twice it is %g", (long long)i, (double)r.y[i], (double)both.y[i]);
        double sum = (double)only_up.y[i] + only_down.y[i], size_of = fabsf(only_up.y[i]) + fabsf(only_down.y[i]);
        if (!(fabs(sum - 3.0 * r.y[i]) <= 1e-6 * (size_of + fabsf(r.y[i]))))
            return because("y[%lld]: one branch doubled and the other doubled sum to %g, not 3 · %g", (long long)i, sum,
                           (double)r.y[i]);
    }
    return HOLDS;
}

SENTENCE(8, 16, "Doubling both output tables doubles y exactly, and each table scales its own branch alone.",
         "y is the sum of two branches, linear in their tables", "closed form") {
    for_sizes("T d I N K norm", scaling, LAYER_SIZES);
}

/* ---- The ladder -------------------------------------------------------------------------------------------------- */

static const char *rungs_at(const int64_t *size, uint64_t seed) {
    static const char *const types[] = {"f32", "f16", "bf16"};
    int64_t n = fmoe_num_keys(size[3]), dtype = size[5];
    bool training = size[6] & 1, norm = size[6] & 2;
    if (size[4] > n * n || dtype > 2 || (training && size[0] == 1))
        return DOES_NOT_APPLY;
    return rungs_agree(&fmoe_step_layer, chapter8_rungs, seed, "T%lld-d%lld-I%lld-N%lld-K%lld-normal-%s%s%s",
                       (long long)size[0], (long long)size[1], (long long)size[2], (long long)size[3],
                       (long long)size[4], types[dtype], training ? "-train" : "", norm ? "-norm" : "");
}

SENTENCE(8, 17,
         "Every rung agrees with the reference: odd sizes, all storage types, both modes, with and without norm.",
         "a ladder of wrong rungs teaches nothing", "the reference on the stored inputs, at the rung's own choice") {
    for_sizes("T d I N K dtype mode", rungs_at,
              SIZES({0, 3, 2, 9, 2, 0, 0}, {1, 1, 1, 1, 1, 0, 0}, {2, 1, 3, 2, 1, 0, 1}, {3, 7, 5, 12, 9, 0, 2},
                    {4, 33, 17, 50, 6, 0, 0}, {4, 33, 17, 50, 49, 1, 2}, {1, 72, 100, 170, 6, 0, 0},
                    {2, 72, 100, 170, 6, 2, 2}, {64, 24, 9, 64, 8, 0, 3}, {65, 24, 9, 64, 8, 2, 1},
                    {67, 31, 40, 300, 5, 0, 1}, {131, 16, 33, 36, 20, 0, 0}, {131, 16, 33, 36, 20, 1, 3}));
    for_random_sizes("T d I N K dtype mode", rungs_at, 20, (int64_t[]){1, 1, 1, 1, 1, 0, 0},
                     (int64_t[]){150, 40, 50, 200, 12, 2, 3});
}

SENTENCE(8, 18, "Every rung has the same bits for any number of threads and on a second run.",
         "tasks and dynamic schedules change who computes, not what", "the bits with one thread") {
    const char *const names[] = {"T3-d40-I50-N170-K6-normal-f32", "T150-d40-I50-N170-K6-normal-bf16",
                                 "T150-d24-I30-N64-K9-normal-f32-train-norm"};
    for (int i = 0; i < 3; i++) {
        const char *wrong = rungs_repeat(&fmoe_step_layer, chapter8_rungs, fresh_seed(), "%s", names[i]);
        expect(wrong == HOLDS, "%s", wrong ? wrong : "");
    }
}

#define PROBLEM FREED(fmoe_problem_free)

/* The first element of y that is not the reference's value rounded to the storage type; −1 if there is none. Both ends
 * of what the float32 sums may be off by are rounded: y lies between. */
static int64_t rounded_again(const fmoe_problem *p, const float *y) {
    const fmoe_layer_args *a = p->args;
    const fmoe_argument *out = fmoe_problem_find(p, "y");
    const float *expected = out->expected;
    const int32_t *chosen = fmoe_problem_find(p, "indices")->expected;
    float largest = 0;
    for (int64_t i = 0; i < out->count; i++)
        largest = fmaxf(largest, fabsf(expected[i]));
    for (int64_t i = 0; i < out->count; i++) {
        int64_t t = i / a->d;
        float ends[2] = {expected[i] - 1e-5f * largest, expected[i] + 1e-5f * largest};
        uint16_t stored[2];
        fmoe_from_f32(a->dtype, 2, ends, stored);
        fmoe_to_f32(a->dtype, 2, stored, ends);
        /* A token that chose otherwise, as it may where scores nearly tie, has another y. */
        bool same_choice = same_bits(a->indices + t * a->K, chosen + t * a->K, a->K);
        if (same_choice && !(y[i] >= ends[0] && y[i] <= ends[1]))
            return i;
    }
    return -1;
}

static const char *rounds_once(const int64_t *size, uint64_t seed) {
    if (size[4] > fmoe_num_keys(size[3]) * fmoe_num_keys(size[3]) || size[5] > 1)
        return DOES_NOT_APPLY;
    fmoe_problem p PROBLEM = new_problem(&fmoe_step_layer, seed, "T%lld-d%lld-I%lld-N%lld-K%lld-normal-%s",
                                         (long long)size[0], (long long)size[1], (long long)size[2], (long long)size[3],
                                         (long long)size[4], size[5] ? "bf16" : "f16");
    for (const fmoe_rung *rung = chapter8_rungs; rung->run; rung++) {
        double error;
        char why[200] = "";
        fmoe_status status = fmoe_rung_check(rung, &p, &error, why);
        if (status == FMOE_UNSUPPORTED)
            continue;
        float *y OWNED = status == FMOE_OK ? fmoe_problem_f32(&p, "y") : NULL;
        if (!y)
            return because("%s, %s: %s", rung->name, p.c.name, why);
        int64_t i = rounded_again(&p, y);
        if (i >= 0)
            return because("%s, %s: y[%lld] is %.9g, and %.9g is to be rounded", rung->name, p.c.name, (long long)i,
                           (double)y[i], (double)((float *)fmoe_problem_find(&p, "y")->expected)[i]);
    }
    return HOLDS;
}

SENTENCE(8, 37, "In 16-bit storage every rung rounds each element of y once, the sum of both branches.",
         "a branch rounded before the sum costs most where the branches nearly cancel",
         "the reference's y, rounded, element by element") {
    for_sizes("T d I N K dtype", rounds_once,
              SIZES({1, 72, 100, 170, 6, 0}, {3, 72, 100, 170, 6, 1}, {67, 31, 40, 300, 5, 0}, {67, 31, 40, 300, 5, 1},
                    {131, 16, 33, 36, 20, 1}));
}

/* A problem whose outputs are the reference's own, in float32. */
static fmoe_problem judged(uint64_t seed, const char *name) {
    fmoe_problem p = new_problem(&fmoe_step_layer, seed, "%s", name);
    for (int i = 0; i < p.num_arguments; i++)
        if (p.arguments[i].role != ROLE_INPUT)
            memcpy(p.arguments[i].data, p.arguments[i].expected, (size_t)p.arguments[i].count * 4);
    return p;
}

static void nudge(fmoe_problem *p, const char *name, double amount) {
    char why[200] = "";
    float *value = fmoe_problem_find(p, name)->data, kept = *value;
    *value += (float)amount;
    double error = fmoe_problem_error(p, why);
    expect(error > 1e-5, "%s off by %g passed: error %g", name, amount, error);
    *value = kept;
}

SENTENCE(8, 19, "The judge of the rungs takes the reference's results and refuses each of them when it is off.",
         "a judge that lets everything pass would make every other sentence about rungs worthless",
         "results spoilt on purpose") {
    for (int training = 0; training < 2; training++) {
        fmoe_problem p PROBLEM =
            judged(fresh_seed(), training ? "T9-d8-I12-N64-K5-normal-f32-train" : "T9-d8-I12-N64-K5-f32");
        char why[200] = "";
        double error = fmoe_problem_error(&p, why);
        expect(error == 0, "the reference itself: error %g, %s", error, why);
        nudge(&p, "router_logits", 1e-3);
        nudge(&p, "scores", 1e-2);
        nudge(&p, "y", 1);
        nudge(&p, "running_mean", 1e-2);
        nudge(&p, "running_var", 1e-2);
        int32_t *indices = fmoe_problem_find(&p, "indices")->data, kept = indices[0];
        indices[0] = kept == 63 ? 0 : 63;
        for (int k = 1; k < 5; k++)
            indices[0] = indices[k] == indices[0] ? 32 : indices[0];
        error = fmoe_problem_error(&p, why);
        expect(isinf(error) && strstr(why, "indices: token"), "another expert: error %g, %s", error, why);
        /* The same set in another order is the rung's own choice: scores and y belong to it. */
        indices[0] = indices[1];
        indices[1] = kept;
        error = fmoe_problem_error(&p, why);
        expect(isinf(error) && strstr(why, "scores"), "two places exchanged, scores not: error %g, %s", error, why);
        float *scores = fmoe_problem_find(&p, "scores")->data, score = scores[0];
        scores[0] = scores[1];
        scores[1] = score;
        error = fmoe_problem_error(&p, why);
        expect(error < 1e-6, "two places exchanged with their scores: error %g, %s", error, why);
    }
}
