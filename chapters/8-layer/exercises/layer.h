/* The layer's steps for a run of tokens, short and fast enough: a plugin is linked with no earlier chapter. The top-k
 * is chapter 3's last rung, the products are chapter 6's tiles, the experts go token by token as in chapter 1. */
#ifndef FMOE_EXERCISE_LAYER_H
#define FMOE_EXERCISE_LAYER_H

#include "plugin.h"
#include "rows.h"
#include "workspace.h"

#define carve carve_token_part // names that two files have
#include "3-topk/cpu.c"        // NOLINT(bugprone-suspicious-include): cpu_topk_best
#undef carve
#define pack    pack_of_gemm
#define smaller smaller_of_gemm
#define four    four_of_gemm
#include "gemm.c" // NOLINT(bugprone-suspicious-include): chapter 6's tiles
#undef pack
#undef smaller
#undef four

/* Tokens first to first + count − 1 of a layer, and where their intermediate results lie. */
typedef struct {
    const fmoe_layer_args *a;
    int64_t first, count;
    const float *mean, *scale; /* [d]: x̂ = (x − mean) · scale */
    float *x, *x_hat;          /* [count, d] */
    float *logits;             /* [2, count, n] */
    float *weights;            /* [count, K] */
    float *routed, *shared;    /* [count, d] */
    float *hidden;             /* [count, I] */
    float *rows;               /* [threads, K + ROWS · d]: activations, rows of experts */
    void *topk, *products;     /* workspaces */
    size_t topk_bytes, product_bytes;
} run_of_tokens;

static fmoe_topk_args topk_args(const run_of_tokens *r) {
    const fmoe_layer_args *a = r->a;
    return (fmoe_topk_args){.T = r->count,
                            .n = a->n,
                            .K = a->K,
                            .norm_topk_prob = a->norm_topk_prob,
                            .dtype = FMOE_F32,
                            .logits = r->logits,
                            .indices = a->indices + r->first * a->K,
                            .scores = a->scores + r->first * a->K,
                            .weights = r->weights};
}

static size_t product_bytes(const fmoe_layer_args *a, int64_t count) {
    size_t sizes[] = {gemm_workspace(count, a->n, a->d), gemm_workspace(count, a->I, a->d),
                      gemm_workspace(count, a->d, a->I)};
    size_t most = sizes[0] > sizes[1] ? sizes[0] : sizes[1];
    return most > sizes[2] ? most : sizes[2];
}

/* From memory[*used] on; without memory only *used grows. */
static run_of_tokens run_new(const fmoe_layer_args *a, int64_t first, int64_t count, const float *statistics,
                             void *memory, size_t *used) {
    run_of_tokens r = {
        .a = a, .first = first, .count = count, .mean = statistics, .scale = statistics ? statistics + a->d : NULL};
    size_t tokens = (size_t)count * sizeof(float), d = (size_t)a->d, K = (size_t)a->K;
    r.x = carve(memory, used, tokens * d);
    r.x_hat = carve(memory, used, tokens * d);
    r.logits = carve(memory, used, 2 * tokens * (size_t)a->n);
    r.weights = carve(memory, used, tokens * K);
    r.routed = carve(memory, used, tokens * d);
    r.shared = carve(memory, used, tokens * d);
    r.hidden = carve(memory, used, tokens * (size_t)a->I);
    r.rows = carve(memory, used, (size_t)omp_get_max_threads() * (K + ROWS * d) * sizeof(float));
    fmoe_topk_args topk = topk_args(&r);
    r.topk_bytes = cpu_topk_best_workspace(&topk);
    r.topk = carve(memory, used, r.topk_bytes);
    r.product_bytes = product_bytes(a, count);
    r.products = carve(memory, used, r.product_bytes);
    return r;
}

/* Mean and 1 / standard deviation of every hidden unit [2, d]: the batch's in training, which move the running buffers,
 * else the running ones. The whole batch before any token's logits: a batch norm is a barrier. */
static fmoe_status find_statistics(const fmoe_layer_args *a, float *statistics) {
    if (a->training && a->T == 1)
        return FMOE_BATCH_OF_ONE;
#pragma omp parallel for schedule(static)
    for (int64_t h = 0; h < a->d; h++) {
        double mean = a->running_mean[h], var = a->running_var[h];
        if (a->training && a->T > 0) {
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
        statistics[h] = (float)mean;
        statistics[a->d + h] = (float)(1 / sqrt(var + FMOE_NORM_EPS));
    }
    return FMOE_OK;
}

/* Norm, logits, top-k. */
static fmoe_status route(const run_of_tokens *r) {
    const fmoe_layer_args *a = r->a;
    int64_t d = a->d, n = a->n, count = r->count;
    fmoe_to_f32(a->dtype, count * d, (const char *)a->x + r->first * d * (int64_t)fmoe_dtype_size(a->dtype), r->x);
    for (int64_t t = 0; t < count; t++)
        for (int64_t h = 0; h < d; h++)
            r->x_hat[t * d + h] = (r->x[t * d + h] - r->mean[h]) * r->scale[h];
    for (int64_t side = 0; side < 2; side++) {
        const char *gate = (const char *)a->router_gate + side * n * d * (int64_t)fmoe_dtype_size(a->dtype);
        gemm_operand tokens = by_rows(FMOE_F32, r->x_hat, d), keys = by_rows(a->dtype, gate, d);
        gemm_target to = {FMOE_F32, r->logits + side * count * n, n};
        fmoe_status status = gemm(count, n, d, &tokens, &keys, gemm_store, &to, r->products, r->product_bytes);
        if (status != FMOE_OK)
            return status;
        memcpy(a->router_logits + (side * a->T + r->first) * n, to.data, (size_t)(count * n) * sizeof(float));
    }
    fmoe_topk_args topk = topk_args(r);
    return cpu_topk_best(&topk, r->topk, r->topk_bytes, NULL);
}

/* One token's experts, eight rows a pass. */
static void token_experts(const run_of_tokens *r, int64_t t, float *activation, float *buffers) {
    const fmoe_layer_args *a = r->a;
    const int32_t *expert = a->indices + (r->first + t) * a->K;
    const float *row[ROWS], *weight = r->weights + t * a->K;
    float *sum = r->routed + t * a->d;
    for (int64_t k = 0; k < a->K; k += ROWS) {
        float dots[ROWS];
        for (int64_t j = 0; j < ROWS; j++)
            row[j] = load_row(a->dtype, a->down_embed, expert[smaller(k + j, a->K - 1)], a->d, buffers + j * a->d);
        dot_rows(a->d, r->x + t * a->d, row, dots);
        for (int64_t j = 0; j < ROWS && k + j < a->K; j++)
            activation[k + j] = dots[j] / (1 + exp_f32(-dots[j])) * weight[k + j];
    }
    memset(sum, 0, (size_t)a->d * sizeof *sum);
    int64_t k = 0;
    for (; k + ROWS <= a->K; k += ROWS) {
        for (int64_t j = 0; j < ROWS; j++)
            row[j] = load_row(a->dtype, a->up_embed, expert[k + j], a->d, buffers + j * a->d);
        add_rows(a->d, activation + k, row, sum);
    }
    for (; k < a->K; k++)
        add_row(a->d, activation[k], load_row(a->dtype, a->up_embed, expert[k], a->d, buffers), sum);
}

static void experts(const run_of_tokens *r) {
#pragma omp parallel for schedule(dynamic, 8)
    for (int64_t t = 0; t < r->count; t++) {
        float *activation = r->rows + omp_get_thread_num() * (r->a->K + ROWS * r->a->d);
        token_experts(r, t, activation, activation + r->a->K);
    }
}

/* silu(gate) ⊙ up for the tile that holds both. */
static void swiglu(void *context, int64_t row, int64_t column, int64_t rows, int64_t columns,
                   const float (*values)[GEMM_NR]) {
    const run_of_tokens *r = context;
    for (int64_t t = 0; t < rows; t++)
        for (int64_t c = 0; c < columns; c++)
            r->hidden[(row + t) * r->a->I + column + c] =
                values[t][c] / (1 + exp_f32(-values[t][c])) * values[t][GEMM_VECTOR + c];
}

/* The MLP; what becomes of a tile of its result is the epilogue's business. */
static fmoe_status shared_branch(const run_of_tokens *r, gemm_epilogue *epilogue, void *context) {
    const fmoe_layer_args *a = r->a;
    gemm_operand tokens = by_rows(FMOE_F32, r->x, a->d), gate_and_up = by_rows(a->dtype, a->gate_proj, a->d);
    gemm_operand hidden = by_rows(FMOE_F32, r->hidden, a->I), down = by_rows(a->dtype, a->down_proj, a->I);
    gate_and_up.pair = a->up_proj;
    fmoe_status status =
        gemm(r->count, a->I, a->d, &tokens, &gate_and_up, swiglu, (void *)r, r->products, r->product_bytes);
    return status == FMOE_OK
               ? gemm(r->count, a->d, a->I, &hidden, &down, epilogue, context, r->products, r->product_bytes)
               : status;
}

/* y = shared + routed, rounded here and nowhere before. */
static inline void add_branches(const run_of_tokens *r) {
    const fmoe_layer_args *a = r->a;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < r->count; t++) {
        add_row(a->d, 1, r->shared + t * a->d, r->routed + t * a->d);
        store_row(a->dtype, a->y, r->first + t, a->d, r->routed + t * a->d);
    }
}

#endif
