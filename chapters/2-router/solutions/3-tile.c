/* Exercise 2.3, solution: four tokens by 64 keys at a time (by 16 with 16 registers). A vector's lanes are keys, for
 * which the gate is transposed once, so no sum lies across lanes. */
#include "plugin.h"

/* The chapter's rungs and the product that they use, so that only what changes stands here. */
#include "2-router/cpu.c" // NOLINT(bugprone-suspicious-include)
#define smaller smaller_of_gemm
#include "gemm.c" // NOLINT(bugprone-suspicious-include)
#undef smaller
#include "rows.h"

enum { VECTORS = 2, KEYS = VECTORS * LANES, TOKENS = LANES == 16 ? 8 : 4 };

static int64_t width_of(const fmoe_router_args *args) {
    return (2 * args->n + KEYS - 1) / KEYS * KEYS;
}

/* [tiles, d, KEYS] float32: a tile's keys lie in the order in which they are read, 32 KB at d 256. The keys that fill
 * the last tile are zeros. */
static void pack_gate(const fmoe_router_args *args, float *row, float *packed) {
    int64_t d = args->d;
    memset(packed, 0, (size_t)(d * width_of(args)) * sizeof *packed);
    for (int64_t key = 0; key < 2 * args->n; key++) {
        const float *from = load_row(args->dtype, args->gate, key, d, row);
        for (int64_t h = 0; h < d; h++)
            packed[(key / KEYS * d + h) * KEYS + key % KEYS] = from[h];
    }
}

// [logits]
/* TOKENS · KEYS logits: for each hidden unit VECTORS loads of the gate and TOKENS numbers of x̂ make TOKENS · VECTORS
 * multiply-adds. Tokens beyond the last are the last once more, and not stored. */
static void tile(const fmoe_router_args *args, const float *x_hat, const float *gate, int64_t t, int64_t key) {
    int64_t d = args->d, n = args->n;
    lanes sum[TOKENS][VECTORS] = {{{0}}};
    const float *x[TOKENS] = {NULL};
    for (int r = 0; r < TOKENS; r++)
        x[r] = x_hat + smaller(t + r, args->T - 1) * d;
    for (int64_t h = 0; h < d; h++) {
        for (int c = 0; c < VECTORS; c++) {
            lanes g;
            memcpy(&g, gate + h * KEYS + (ptrdiff_t)c * LANES, sizeof g);
            for (int r = 0; r < TOKENS; r++)
                sum[r][c] += x[r][h] * g;
        }
    }
    /* Registers have no addresses: sums that a variable chooses from would be stored in every step of the loop above.
     */
    float values[TOKENS][KEYS];
    for (int r = 0; r < TOKENS; r++)
        for (int c = 0; c < VECTORS; c++)
            memcpy(&values[r][c * LANES], &sum[r][c], sizeof sum[r][c]);
    for (int64_t r = 0; r < smaller(TOKENS, args->T - t); r++)
        for (int64_t c = 0; c < smaller(KEYS, 2 * n - key); c++)
            logits_row(args, (key + c) / n, t + r)[(key + c) % n] = values[r][c];
}

/* All tokens of a thread for a tile of keys, which stays in the first-level cache, then the next tile. Every logit is
 * one chain of sums over h, whoever computes it: the bits do not depend on the number of threads. */
static void logits_of(const fmoe_router_args *args, const float *x_hat, const float *packed) {
#pragma omp parallel
    for (int64_t key = 0; key < 2 * args->n; key += KEYS)
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < args->T; t += TOKENS)
            tile(args, x_hat, packed + key * args->d, t, key);
}
// [/logits]

static size_t needed(const void *args) {
    const fmoe_router_args *a = args;
    return scratch_bytes(args) + 256 + (size_t)(a->d * width_of(a)) * sizeof(float);
}

static fmoe_status run(const void *arguments, void *workspace, size_t bytes, void *stream) {
    const fmoe_router_args *args = arguments;
    size_t used = 0;
    scratch s = carve_scratch(args, workspace, &used);
    fmoe_status status = check(args, used, bytes);
    float *gate = carve(workspace, &used, (size_t)(args->d * width_of(args)) * sizeof *gate);
    (void)stream;
    if (status != FMOE_OK || args->T == 0)
        return status;
    norm_by_rows(args, s);
    pack_gate(args, s.rows, gate);
    logits_of(args, s.x_hat, gate);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < args->T; t++)
        log_softmax_rows(args, t, 1);
    return FMOE_OK;
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "router", .name = "my tile", .run = run, .workspace = needed};
