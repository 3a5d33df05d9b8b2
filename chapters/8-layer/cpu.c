/* Chapter 8 on the CPU: the whole layer, from the formula to two branches side by side. */
#include "../steps.h"
#include "../vec.h"
#include "../workspace.h"

#include <omp.h>
#include <string.h>

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t element(const fmoe_layer_args *a, int64_t count) {
    return count * (int64_t)fmoe_dtype_size(a->dtype);
}

/* True with the status to return where there is nothing to compute. */
static bool nothing_to_do(const fmoe_layer_args *a, fmoe_status *status) {
    *status = a->training && a->T == 1 ? FMOE_BATCH_OF_ONE : FMOE_OK;
    return a->T == 0 || *status != FMOE_OK;
}

/* ---- Definition -------------------------------------------------------------------------------------------------- */

typedef struct {
    const fmoe_layer_args *a;
    float *mean, *scale; /* [d]: x̂ = (x − mean) · scale */
    float *weights;      /* [T, K] */
    float *routed;       /* [T, d] */
    float *scratch;      /* [threads, scratch_floats] */
    int64_t scratch_floats;
} plain;

static int64_t plain_scratch(const fmoe_layer_args *a) {
    return 4 * larger(a->d, a->I);
}

static size_t plain_workspace(const fmoe_layer_args *a, int threads) {
    return sizeof(float) * (size_t)(2 * a->d + a->T * (a->K + a->d) + threads * plain_scratch(a));
}

static plain plain_new(const fmoe_layer_args *a, float *workspace) {
    plain p = {.a = a, .mean = workspace, .scale = workspace + a->d, .weights = workspace + 2 * a->d};
    p.routed = p.weights + a->T * a->K;
    p.scratch = p.routed + a->T * a->d;
    p.scratch_floats = plain_scratch(a);
    return p;
}

static float plain_dot(int64_t d, const float *a, const float *b) {
    float sum = 0;
    for (int64_t i = 0; i < d; i++)
        sum += a[i] * b[i];
    return sum;
}

/* One hidden unit's statistics over the tokens; training moves its running buffers. */
static void normalise_unit(const plain *p, int64_t h) {
    const fmoe_layer_args *a = p->a;
    double mean = a->running_mean[h], var = a->running_var[h];
    if (a->training) {
        double sum = 0, squares = 0;
        for (int64_t t = 0; t < a->T; t++)
            sum += load_one(a->dtype, a->x, t * a->d + h);
        mean = sum / (double)a->T;
        for (int64_t t = 0; t < a->T; t++) {
            double off = load_one(a->dtype, a->x, t * a->d + h) - mean;
            squares += off * off;
        }
        var = squares / (double)a->T;
        a->running_mean[h] += (float)(FMOE_NORM_MOMENTUM * (mean - a->running_mean[h]));
        a->running_var[h] += (float)(FMOE_NORM_MOMENTUM * (squares / (double)(a->T - 1) - a->running_var[h]));
    }
    p->mean[h] = (float)mean;
    p->scale[h] = (float)(1 / sqrt(var + FMOE_NORM_EPS));
}

/* Does a pair stand before another in the order of the top-k? */
static bool before(float sum, int64_t pair, float other_sum, int64_t other_pair) {
    if (isnan(sum) || isnan(other_sum))
        return isnan(other_sum) && (!isnan(sum) || pair < other_pair);
    return sum > other_sum || (sum == other_sum && pair < other_pair);
}

/* The best of all n² pairs that comes after the last one chosen (last < 0: none yet). */
static int64_t next_best(int64_t n, const float *x, const float *y, int64_t last) {
    float last_sum = last < 0 ? 0 : x[last / n] + y[last % n], best_sum = 0;
    int64_t best = -1;
    for (int64_t pair = 0; pair < n * n; pair++) {
        float sum = x[pair / n] + y[pair % n];
        if (last >= 0 && !before(last_sum, last, sum, pair))
            continue;
        if (best < 0 || before(sum, pair, best_sum, best)) {
            best = pair;
            best_sum = sum;
        }
    }
    return best;
}

/* log Σ exp z. */
static float log_sum_exp(int64_t n, const float *z) {
    float largest = z[0];
    for (int64_t i = 1; i < n; i++)
        largest = z[i] > largest ? z[i] : largest;
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += exp((double)z[i] - largest);
    return largest + (float)log(sum);
}

static void plain_route(const plain *p, int64_t t, float *scratch) {
    const fmoe_layer_args *a = p->a;
    int64_t d = a->d, n = a->n, K = a->K;
    float *x_hat = scratch, *row = x_hat + d, *buffer = row + d;
    const float *x = load_row(a->dtype, a->x, t, d, buffer);
    for (int64_t h = 0; h < d; h++)
        x_hat[h] = (x[h] - p->mean[h]) * p->scale[h];
    float *logits_x = a->router_logits + t * n, *logits_y = a->router_logits + (a->T + t) * n;
    for (int64_t j = 0; j < n; j++) {
        logits_x[j] = plain_dot(d, x_hat, load_row(a->dtype, a->router_gate, j, d, row));
        logits_y[j] = plain_dot(d, x_hat, load_row(a->dtype, a->router_gate, n + j, d, row));
    }

    float sums = log_sum_exp(n, logits_x) + log_sum_exp(n, logits_y), total = 0, *weights = p->weights + t * K;
    int64_t pair = -1;
    for (int64_t k = 0; k < K; k++) {
        pair = next_best(n, logits_x, logits_y, pair);
        a->indices[t * K + k] = (int32_t)pair;
        a->scores[t * K + k] = logits_x[pair / n] + logits_y[pair % n] - sums;
        weights[k] = expf(a->scores[t * K + k]);
        total += weights[k];
    }
    for (int64_t k = 0; k < K && a->norm_topk_prob; k++)
        weights[k] /= total;
}

static void plain_experts(const plain *p, int64_t t, float *scratch) {
    const fmoe_layer_args *a = p->a;
    int64_t d = a->d, K = a->K;
    float *row = scratch + d, *routed = p->routed + t * d;
    const float *x = load_row(a->dtype, a->x, t, d, scratch);
    memset(routed, 0, (size_t)d * sizeof *routed);
    for (int64_t k = 0; k < K; k++) {
        int64_t expert = a->indices[t * K + k];
        float s = plain_dot(d, x, load_row(a->dtype, a->down_embed, expert, d, row));
        float activation = s / (1 + expf(-s)) * p->weights[t * K + k];
        const float *up = load_row(a->dtype, a->up_embed, expert, d, row);
        for (int64_t h = 0; h < d; h++)
            routed[h] += activation * up[h];
    }
}

// [plain-mlp]
/* The shared branch, and the sum of both. */
static void plain_mlp(const plain *p, int64_t t, float *scratch) {
    const fmoe_layer_args *a = p->a;
    int64_t d = a->d, I = a->I, longest = larger(d, I);
    float *hidden = scratch, *row = hidden + longest, *buffer = row + longest, *y = p->routed + t * d;
    const float *x = load_row(a->dtype, a->x, t, d, buffer);
    for (int64_t i = 0; i < I; i++) {
        float gate = plain_dot(d, x, load_row(a->dtype, a->gate_proj, i, d, row));
        float up = plain_dot(d, x, load_row(a->dtype, a->up_proj, i, d, row));
        hidden[i] = gate / (1 + expf(-gate)) * up;
    }
    for (int64_t h = 0; h < d; h++)
        y[h] += plain_dot(I, hidden, load_row(a->dtype, a->down_proj, h, I, row));
    store_row(a->dtype, a->y, t, d, y);
}
// [/plain-mlp]

static size_t definition_workspace(const void *args) {
    return plain_workspace(args, 1);
}

static fmoe_status definition(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const fmoe_layer_args *a = args;
    fmoe_status status;
    if (nothing_to_do(a, &status))
        return status;
    plain p = plain_new(a, workspace);
    for (int64_t h = 0; h < a->d; h++)
        normalise_unit(&p, h);
    for (int64_t t = 0; t < a->T; t++)
        plain_route(&p, t, p.scratch);
    for (int64_t t = 0; t < a->T; t++)
        plain_experts(&p, t, p.scratch);
    for (int64_t t = 0; t < a->T; t++)
        plain_mlp(&p, t, p.scratch);
    return FMOE_OK;
}

static size_t openmp_workspace(const void *args) {
    return plain_workspace(args, omp_get_max_threads());
}

// [openmp]
static fmoe_status openmp(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const fmoe_layer_args *a = args;
    fmoe_status status;
    if (nothing_to_do(a, &status))
        return status;
    plain p = plain_new(a, workspace);
#pragma omp parallel
    {
        float *scratch = p.scratch + omp_get_thread_num() * p.scratch_floats;
#pragma omp for
        for (int64_t h = 0; h < a->d; h++)
            normalise_unit(&p, h);
#pragma omp for
        for (int64_t t = 0; t < a->T; t++)
            plain_route(&p, t, scratch);
#pragma omp for
        for (int64_t t = 0; t < a->T; t++)
            plain_experts(&p, t, scratch);
#pragma omp for
        for (int64_t t = 0; t < a->T; t++)
            plain_mlp(&p, t, scratch);
    }
    return FMOE_OK;
}
// [/openmp]

/* ---- Composed of the earlier chapters' best rungs ---------------------------------------------------------------- */

/* The layer's steps for tokens [first, first + count), and where their intermediate results lie. */
typedef struct {
    const fmoe_layer_args *a;
    int64_t first, count;
    float *logits;    /* [2, count, n] */
    float *log_probs; /* [2, count, n]: the router's, nobody reads them here */
    float *weights;   /* [count, K] */
    float *routed;    /* [count, d] */
    float *shared;    /* [count, d]; where y is float32, its rows */
    void *inner;      /* the steps' own workspaces, one after the other */
    size_t inner_bytes;
} part;

static const void *rows_from(const fmoe_layer_args *a, const void *tensor, int64_t row) {
    return (const char *)tensor + element(a, row * a->d);
}

static fmoe_router_args router_args(const part *p) {
    const fmoe_layer_args *a = p->a;
    return (fmoe_router_args){.T = p->count,
                              .d = a->d,
                              .n = a->n,
                              .training = a->training,
                              .dtype = a->dtype,
                              .x = rows_from(a, a->x, p->first),
                              .gate = a->router_gate,
                              .running_mean = a->running_mean,
                              .running_var = a->running_var,
                              .logits = p->logits,
                              .log_probs = p->log_probs};
}

static fmoe_topk_args topk_args(const part *p) {
    const fmoe_layer_args *a = p->a;
    return (fmoe_topk_args){.T = p->count,
                            .n = a->n,
                            .K = a->K,
                            .norm_topk_prob = a->norm_topk_prob,
                            .dtype = FMOE_F32,
                            .logits = p->logits,
                            .indices = a->indices + p->first * a->K,
                            .scores = a->scores + p->first * a->K,
                            .weights = p->weights};
}

static fmoe_expert_args expert_args(const part *p) {
    const fmoe_layer_args *a = p->a;
    return (fmoe_expert_args){.T = p->count,
                              .d = a->d,
                              .N = a->N,
                              .K = a->K,
                              .from_router = true,
                              .dtype = a->dtype,
                              .x = rows_from(a, a->x, p->first),
                              .down = a->down_embed,
                              .up = a->up_embed,
                              .indices = a->indices + p->first * a->K,
                              .weights = p->weights,
                              .y = p->routed};
}

static fmoe_mlp_args mlp_args(const part *p) {
    const fmoe_layer_args *a = p->a;
    return (fmoe_mlp_args){.T = p->count,
                           .d = a->d,
                           .I = a->I,
                           .dtype = a->dtype,
                           .x = rows_from(a, a->x, p->first),
                           .gate = a->gate_proj,
                           .up = a->up_proj,
                           .down = a->down_proj,
                           .y = p->shared};
}

// [which-expert]
/* Grouping pays once an average expert is chosen by more than one token. */
static bool grouping_pays(const part *p) {
    return p->count * p->a->K > p->a->N;
}
// [/which-expert]

static size_t inner_bytes(const part *p) {
    fmoe_router_args router = router_args(p);
    fmoe_topk_args topk = topk_args(p);
    fmoe_expert_args expert = expert_args(p);
    fmoe_mlp_args mlp = mlp_args(p);
    size_t sizes[] = {
        cpu_router_best_workspace(&router),
        cpu_topk_best_workspace(&topk),
        cpu_mlp_best_workspace(&mlp),
        grouping_pays(p) ? cpu_expert_scheduled_best_workspace(&expert) : cpu_expert_token_best_workspace(&expert),
    };
    size_t most = 0;
    for (int i = 0; i < 4; i++)
        most = sizes[i] > most ? sizes[i] : most;
    return most;
}

/* Both branches stay float32 until their sum is rounded. */
static void carve_results(part *p, char *memory, size_t *used) {
    const fmoe_layer_args *a = p->a;
    int64_t bytes = p->count * a->d * (int64_t)sizeof(float);
    p->routed = carve(memory, used, bytes);
    p->shared = a->dtype == FMOE_F32 ? (float *)a->y + p->first * a->d : carve(memory, used, bytes);
}

/* Lays a part out from memory[*used] on. */
static part part_new(const fmoe_layer_args *a, int64_t first, int64_t count, char *memory, size_t *used) {
    part p = {.a = a, .first = first, .count = count};
    int64_t floats = (int64_t)sizeof(float);
    p.logits = carve(memory, used, 2 * count * a->n * floats);
    p.log_probs = carve(memory, used, 2 * count * a->n * floats);
    p.weights = carve(memory, used, count * a->K * floats);
    carve_results(&p, memory, used);
    p.inner_bytes = inner_bytes(&p);
    p.inner = carve(memory, used, (int64_t)p.inner_bytes);
    return p;
}

static fmoe_status run_router(const part *p) {
    fmoe_router_args args = router_args(p);
    return cpu_router_best(&args, p->inner, p->inner_bytes, NULL);
}

static fmoe_status run_topk(const part *p) {
    fmoe_topk_args args = topk_args(p);
    return cpu_topk_best(&args, p->inner, p->inner_bytes, NULL);
}

static fmoe_status run_experts(const part *p) {
    fmoe_expert_args args = expert_args(p);
    return (grouping_pays(p) ? cpu_expert_scheduled_into : cpu_expert_token_into)(&args, FMOE_F32, p->inner);
}

static fmoe_status run_mlp(const part *p) {
    fmoe_mlp_args args = mlp_args(p);
    return cpu_mlp_into(&args, FMOE_F32, p->inner, p->inner_bytes);
}

// [add]
/* y = shared + routed, rounded here and nowhere before. */
static void add_branches(const part *p) {
    const fmoe_layer_args *a = p->a;
#pragma omp parallel for
    for (int64_t t = 0; t < p->count; t++) {
        float *sum = p->routed + t * a->d;
        add_scaled(a->d, 1, p->shared + t * a->d, sum);
        store_row(a->dtype, a->y, p->first + t, a->d, sum);
    }
}
// [/add]

static size_t composed_workspace(const void *args) {
    const fmoe_layer_args *a = args;
    size_t bytes = 0;
    part_new(a, 0, a->T, NULL, &bytes);
    return bytes;
}

// [composed]
static fmoe_status composed(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const fmoe_layer_args *a = args;
    fmoe_status status;
    if (nothing_to_do(a, &status))
        return status;
    size_t used = 0;
    part all = part_new(a, 0, a->T, workspace, &used);
    all.logits = a->router_logits;
    status = run_router(&all);
    if (status == FMOE_OK)
        status = run_topk(&all);
    if (status == FMOE_OK)
        status = run_experts(&all);
    if (status == FMOE_OK)
        status = run_mlp(&all);
    if (status == FMOE_OK)
        add_branches(&all);
    return status;
}
// [/composed]

/* ---- Tokens in blocks -------------------------------------------------------------------------------------------- */

/* Large enough that a weight row, once read, meets many tokens; small enough that two threads find work at T = 128.
 * The same for any number of threads: which tokens share a block decides nothing about their bits' order of sums. */
enum { BLOCK = 64 };

/* The block's logits between [2, count, n] of its own and the layer's [2, T, n]. */
static void copy_logits(const part *p, bool to_layer) {
    const fmoe_layer_args *a = p->a;
    int64_t n = a->n;
    size_t bytes = (size_t)(p->count * n) * sizeof(float);
    for (int side = 0; side < 2; side++) {
        float *whole = a->router_logits + (side * a->T + p->first) * n, *own = p->logits + side * p->count * n;
        memcpy(to_layer ? whole : own, to_layer ? own : whole, bytes);
    }
}

/* Router, top-k, experts. In training the batch's statistics were needed first, so the logits are there already. */
static fmoe_status routed_branch(const part *p) {
    fmoe_status status = FMOE_OK;
    if (!p->a->training)
        status = run_router(p);
    if (status == FMOE_OK) {
        copy_logits(p, !p->a->training);
        status = run_topk(p);
    }
    return status == FMOE_OK ? run_experts(p) : status;
}

/* The first failure stays. */
static void keep(fmoe_status *first, fmoe_status status) {
    if (status != FMOE_OK) {
#pragma omp atomic write
        *first = status;
    }
}

static int64_t block_tokens(const fmoe_layer_args *a, int64_t first) {
    return smaller(BLOCK, a->T - first);
}

/* What any block needs: the last, shorter one may take other ways and need more. */
static size_t block_bytes(const fmoe_layer_args *a) {
    size_t whole = 0, rest = 0;
    part_new(a, 0, block_tokens(a, 0), NULL, &whole);
    if (a->T % BLOCK > 0)
        part_new(a, 0, a->T % BLOCK, NULL, &rest);
    return whole > rest ? whole : rest;
}

/* In training: the router on the whole batch, with its workspace after everything else's. */
static fmoe_status route_batch(const fmoe_layer_args *a, char *memory, size_t *used) {
    part all = {.a = a, .count = a->T, .logits = a->router_logits};
    all.log_probs = carve(memory, used, 2 * a->T * a->n * (int64_t)sizeof(float));
    fmoe_router_args args = router_args(&all);
    all.inner_bytes = cpu_router_best_workspace(&args);
    all.inner = carve(memory, used, (int64_t)all.inner_bytes);
    return memory ? run_router(&all) : FMOE_OK;
}

static size_t blocks_workspace(const void *args) {
    const fmoe_layer_args *a = args;
    size_t bytes = block_bytes(a) * (size_t)omp_get_max_threads();
    if (a->training)
        route_batch(a, NULL, &bytes);
    return bytes;
}

// [blocks]
static fmoe_status blocks(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const fmoe_layer_args *a = args;
    fmoe_status status;
    if (nothing_to_do(a, &status))
        return status;
    size_t each = block_bytes(a), used = each * (size_t)omp_get_max_threads();
    if (a->training)
        status = route_batch(a, workspace, &used);
    if (status != FMOE_OK)
        return status;
#pragma omp parallel for schedule(dynamic)
    for (int64_t first = 0; first < a->T; first += BLOCK) {
        size_t at = each * (size_t)omp_get_thread_num();
        part p = part_new(a, first, block_tokens(a, first), workspace, &at);
        keep(&status, routed_branch(&p));
        keep(&status, run_mlp(&p));
        add_branches(&p);
    }
    return status;
}
// [/blocks]

/* ---- Branches side by side --------------------------------------------------------------------------------------- */

/* As for blocks, and both branches' results of every token: the first to be there waits for the other. */
static size_t branches_workspace(const void *args) {
    const fmoe_layer_args *a = args;
    part all = {.a = a, .count = a->T};
    size_t bytes = blocks_workspace(a);
    carve_results(&all, NULL, &bytes);
    return bytes;
}

// [branches]
/* One task goes through the routed branch and leaves the shared one to another, which whoever is free may take: so one
 * thread gathers rows while another multiplies tiles. A thread that takes both in turn uses its memory twice, hence
 * the results lie elsewhere, with those of all tokens. */
static void both_branches(const part *all, int64_t first, char *memory, size_t each, fmoe_status *status) {
    const fmoe_layer_args *a = all->a;
    size_t at = each * (size_t)omp_get_thread_num();
    part p = part_new(a, first, block_tokens(a, first), memory, &at);
    p.routed = all->routed + first * a->d;
    p.shared = all->shared + first * a->d;
#pragma omp task
    {
        size_t task_at = each * (size_t)omp_get_thread_num();
        part shared_part = part_new(a, first, block_tokens(a, first), memory, &task_at);
        shared_part.shared = all->shared + first * a->d;
        keep(status, run_mlp(&shared_part));
    }
    keep(status, routed_branch(&p));
#pragma omp taskwait
    add_branches(&p);
}
// [/branches]

static fmoe_status branches(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const fmoe_layer_args *a = args;
    fmoe_status status;
    if (nothing_to_do(a, &status))
        return status;
    size_t each = block_bytes(a), used = each * (size_t)omp_get_max_threads();
    part all = {.a = a, .count = a->T};
    carve_results(&all, workspace, &used);
    if (a->training)
        status = route_batch(a, workspace, &used);
    if (status != FMOE_OK)
        return status;
#pragma omp parallel
#pragma omp single
    for (int64_t first = 0; first < a->T; first += BLOCK) {
#pragma omp task shared(status)
        both_branches(&all, first, workspace, each, &status);
    }
    return status;
}

/* ---- Decode ------------------------------------------------------------------------------------------------------ */

/* Up to this many tokens every weight is read for a handful of products: the bytes are the cost, and there are too few
 * tokens to share out among threads. */
enum { FEW = 4 };

typedef struct {
    const fmoe_layer_args *a;
    float *x, *x_hat; /* [T, d] */
    float *hidden;    /* [T, I] */
    float *routed;    /* [T, d] */
    float *logits;    /* [T, 2, 1, n]: as the top-k of one token reads them */
    float *weights;   /* [T, K] */
    char *topk;       /* [threads, topk_bytes] */
    size_t topk_bytes;
    float *rows; /* [threads, 2, the longest row] */
} decoding;

static fmoe_topk_args decode_topk_args(const decoding *p, int64_t t) {
    const fmoe_layer_args *a = p->a;
    return (fmoe_topk_args){.T = 1,
                            .n = a->n,
                            .K = a->K,
                            .norm_topk_prob = a->norm_topk_prob,
                            .dtype = FMOE_F32,
                            .logits = p->logits + t * 2 * a->n,
                            .indices = a->indices + t * a->K,
                            .scores = a->scores + t * a->K,
                            .weights = p->weights + t * a->K};
}

static decoding decode_new(const fmoe_layer_args *a, char *memory, size_t *used) {
    decoding p = {.a = a};
    int64_t T = a->T, floats = (int64_t)sizeof(float), threads = omp_get_max_threads();
    p.x = carve(memory, used, T * a->d * floats);
    p.x_hat = carve(memory, used, T * a->d * floats);
    p.hidden = carve(memory, used, T * a->I * floats);
    p.routed = carve(memory, used, T * a->d * floats);
    p.logits = carve(memory, used, T * 2 * a->n * floats);
    p.weights = carve(memory, used, T * a->K * floats);
    fmoe_topk_args topk = decode_topk_args(&p, 0);
    p.topk_bytes = (cpu_topk_best_workspace(&topk) + 255) / 256 * 256;
    p.topk = carve(memory, used, threads * (int64_t)p.topk_bytes);
    p.rows = carve(memory, used, threads * 2 * larger(a->d, a->I) * floats);
    return p;
}

static size_t decode_workspace(const void *args) {
    size_t bytes = 0;
    decode_new(args, NULL, &bytes);
    return bytes;
}

static bool decodes(const void *args) {
    const fmoe_layer_args *a = args;
    return a->T <= FEW && !a->training;
}

static void decode_normalise(const decoding *p) {
    const fmoe_layer_args *a = p->a;
    fmoe_to_f32(a->dtype, a->T * a->d, a->x, p->x);
    for (int64_t h = 0; h < a->d; h++) {
        float scale = (float)(1 / sqrt((double)a->running_var[h] + FMOE_NORM_EPS));
        for (int64_t t = 0; t < a->T; t++)
            p->x_hat[t * a->d + h] = (p->x[t * a->d + h] - a->running_mean[h]) * scale;
    }
}

/* Not inlined: inside a parallel region gcc 12 leaves `omp simd` sums of an inlined function as scalar code. */
#define ROW_FUNCTION __attribute__((noinline)) static void

/* One row of the router's gate with every token. */
ROW_FUNCTION decode_key(const decoding *p, int64_t key, float *buffer) {
    const fmoe_layer_args *a = p->a;
    int64_t side = key / a->n, j = key % a->n;
    const float *gate = load_row(a->dtype, a->router_gate, key, a->d, buffer);
    for (int64_t t = 0; t < a->T; t++) {
        float z = dot(a->d, p->x_hat + t * a->d, gate);
        p->logits[(t * 2 + side) * a->n + j] = z;
        a->router_logits[(side * a->T + t) * a->n + j] = z;
    }
}

/* One hidden unit of the MLP with every token. */
ROW_FUNCTION decode_hidden(const decoding *p, int64_t i, float *buffers) {
    const fmoe_layer_args *a = p->a;
    const float *gate = load_row(a->dtype, a->gate_proj, i, a->d, buffers);
    const float *up = load_row(a->dtype, a->up_proj, i, a->d, buffers + a->d);
    for (int64_t t = 0; t < a->T; t++) {
        float s = dot(a->d, p->x + t * a->d, gate);
        p->hidden[t * a->I + i] = s / (1 + expf(-s)) * dot(a->d, p->x + t * a->d, up);
    }
}

/* One unit of the MLP's output with every token. x̂ has been used up: shared lies in its place. */
ROW_FUNCTION decode_down(const decoding *p, int64_t h, float *buffer) {
    const fmoe_layer_args *a = p->a;
    const float *down = load_row(a->dtype, a->down_proj, h, a->I, buffer);
    for (int64_t t = 0; t < a->T; t++)
        p->x_hat[t * a->d + h] = dot(a->I, p->hidden + t * a->I, down);
}

/* A token's top-k and its experts. */
static fmoe_status decode_routed(const decoding *p, int64_t t, float *buffer) {
    const fmoe_layer_args *a = p->a;
    float *routed = p->routed + t * a->d;
    fmoe_topk_args topk = decode_topk_args(p, t);
    fmoe_status status =
        cpu_topk_best(&topk, p->topk + p->topk_bytes * (size_t)omp_get_thread_num(), p->topk_bytes, NULL);
    memset(routed, 0, (size_t)a->d * sizeof *routed);
    for (int64_t k = 0; k < a->K && status == FMOE_OK; k++) {
        float s = dot(a->d, p->x + t * a->d, load_row(a->dtype, a->down_embed, topk.indices[k], a->d, buffer));
        float activation = s / (1 + expf(-s)) * topk.weights[k];
        add_scaled(a->d, activation, load_row(a->dtype, a->up_embed, topk.indices[k], a->d, buffer), routed);
    }
    return status;
}

// [decode]
/* Two phases and one barrier between them. First everything that reads x: the router's rows and two thirds of the MLP.
 * Then a token's top-k and experts are one piece of work among the rows of the MLP's last product. */
static fmoe_status decode(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const fmoe_layer_args *a = args;
    size_t used = 0;
    decoding p = decode_new(a, workspace, &used);
    fmoe_status status = FMOE_OK;
    int64_t d = a->d, I = a->I;
    decode_normalise(&p);
#pragma omp parallel
    {
        float *buffers = p.rows + omp_get_thread_num() * 2 * larger(d, I);
#pragma omp for schedule(static) nowait
        for (int64_t key = 0; key < 2 * a->n; key++)
            decode_key(&p, key, buffers);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < I; i++)
            decode_hidden(&p, i, buffers);

#pragma omp for schedule(dynamic) nowait
        for (int64_t t = 0; t < a->T; t++)
            keep(&status, decode_routed(&p, t, buffers));
#pragma omp for schedule(dynamic, 16)
        for (int64_t h = 0; h < d; h++)
            decode_down(&p, h, buffers);
    }
    for (int64_t i = 0; i < a->T * d; i++)
        p.x_hat[i] += p.routed[i];
    fmoe_from_f32(a->dtype, a->T * d, p.x_hat, a->y);
    return status;
}
// [/decode]

/* ---- The ladder -------------------------------------------------------------------------------------------------- */

const fmoe_rung chapter8_rungs[] = {
    {.name = "definition",
     .backend = BACKEND_CPU,
     .run = definition,
     .workspace = definition_workspace,
     .idea = "The formula on one thread: every sum in order, every one of the n² pairs looked at for each of the K."},
    {.name = "openmp",
     .backend = BACKEND_CPU,
     .run = openmp,
     .workspace = openmp_workspace,
     .idea = "The same loops, each step's tokens shared out: with twice the cores, half the time."},
    {.name = "composed",
     .backend = BACKEND_CPU,
     .run = composed,
     .workspace = composed_workspace,
     .idea = "The best rung of every earlier chapter, one step after the other: this is where the speed comes from."},
    {.name = "blocks",
     .backend = BACKEND_CPU,
     .run = blocks,
     .workspace = blocks_workspace,
     .idea = "A thread takes 64 tokens through all steps: one barrier in all, and what a step leaves the next finds in "
             "the second-level cache."},
    {.name = "branches",
     .backend = BACKEND_CPU,
     .run = branches,
     .workspace = branches_workspace,
     .idea = "The two branches of a block are tasks of their own, so that one thread's gather runs beside another's "
             "products, and a single block keeps two threads busy."},
    {.name = "decode",
     .backend = BACKEND_CPU,
     .run = decode,
     .workspace = decode_workspace,
     .supports = decodes,
     .idea = "For a handful of tokens the threads share out weight rows instead, and the top-k and its experts run "
             "beside the last product."},
    {.run = NULL},
};
