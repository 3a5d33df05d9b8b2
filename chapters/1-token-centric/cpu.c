/* Chapter 1's ladder: the expert step, token by token. */
#include "../rows.h"
#include "../steps.h"
#include "../vec.h"

#include <math.h>
#include <omp.h>
#include <string.h>

static float silu(float s) {
    return s / (1 + expf(-s));
}

/* ---- The definition ---------------------------------------------------------------------------------------------- */

// [definition]
static fmoe_status definition(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    float *activation = workspace; /* [K] */
    (void)workspace_bytes, (void)stream;
    for (int64_t t = 0; t < a->T; t++) {
        const int32_t *expert = a->indices + t * a->K;
        for (int64_t k = 0; k < a->K; k++) {
            float s = 0;
            for (int64_t i = 0; i < a->d; i++)
                s += load_one(a->dtype, a->x, t * a->d + i) * load_one(a->dtype, a->down, expert[k] * a->d + i);
            activation[k] = silu(s) * a->weights[t * a->K + k];
        }
        for (int64_t i = 0; i < a->d; i++) {
            float sum = 0;
            for (int64_t k = 0; k < a->K; k++)
                sum += activation[k] * load_one(a->dtype, a->up, expert[k] * a->d + i);
            store_one(a->dtype, a->y, t * a->d + i, sum);
        }
    }
    return FMOE_OK;
}
// [/definition]

static size_t definition_workspace(const void *args) {
    const fmoe_expert_args *a = args;
    return (size_t)a->K * sizeof(float);
}

/* ---- Scratch ----------------------------------------------------------------------------------------------------- */

/* What one thread needs: the token's activations, its output row, its input row, and rows of experts as float32. */
typedef struct {
    float *activation;   /* [K] */
    float *sum;          /* [d] */
    float *token;        /* [d] */
    float *buffer[ROWS]; /* [d] each; written for 16-bit storage only */
} scratch;

static size_t scratch_floats(const fmoe_expert_args *a) {
    return padded(a->K) + (2 + ROWS) * padded(a->d);
}

static scratch scratch_at(const fmoe_expert_args *a, float *at) {
    scratch s;
    s.activation = at;
    s.sum = at + padded(a->K);
    s.token = s.sum + padded(a->d);
    for (int j = 0; j < ROWS; j++)
        s.buffer[j] = s.token + (size_t)(1 + j) * padded(a->d);
    return s;
}

static size_t one_thread(const void *args) {
    return scratch_floats(args) * sizeof(float);
}

static size_t all_threads(const void *args) {
    return (size_t)omp_get_max_threads() * one_thread(args);
}

/* ---- Gather ------------------------------------------------------------------------------------------------------ */

// [gather]
/* rows[t, k] = table[indices[t, k]]: what NumPy's table[indices] does. */
static void gather(const fmoe_expert_args *a, const void *table, char *rows) {
    size_t bytes = (size_t)a->d * fmoe_dtype_size(a->dtype);
    for (int64_t i = 0; i < a->T * a->K; i++)
        memcpy(rows + (size_t)i * bytes, (const char *)table + (size_t)a->indices[i] * bytes, bytes);
}

static fmoe_status gathered(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    scratch s = scratch_at(a, workspace);
    float *activation = (float *)workspace + scratch_floats(a); /* [T, K] */
    char *rows = (char *)(activation + padded(a->T * a->K));    /* [T, K, d] in the storage type */
    (void)workspace_bytes, (void)stream;

    gather(a, a->down, rows);
    for (int64_t t = 0; t < a->T; t++) {
        const float *x = load_row(a->dtype, a->x, t, a->d, s.token);
        for (int64_t i = t * a->K; i < (t + 1) * a->K; i++)
            activation[i] = dot(a->d, x, load_row(a->dtype, rows, i, a->d, s.buffer[0]));
    }
    for (int64_t i = 0; i < a->T * a->K; i++)
        activation[i] = silu(activation[i]) * a->weights[i];
    gather(a, a->up, rows);
    for (int64_t t = 0; t < a->T; t++) {
        memset(s.sum, 0, (size_t)a->d * sizeof(float));
        for (int64_t i = t * a->K; i < (t + 1) * a->K; i++)
            add_scaled(a->d, activation[i], load_row(a->dtype, rows, i, a->d, s.buffer[0]), s.sum);
        store_row(a->dtype, a->y, t, a->d, s.sum);
    }
    return FMOE_OK;
}
// [/gather]

static size_t gathered_workspace(const void *args) {
    const fmoe_expert_args *a = args;
    return one_thread(a) + padded(a->T * a->K) * sizeof(float) +
           (size_t)(a->T * a->K * a->d) * fmoe_dtype_size(a->dtype);
}

/* ---- Rows where they lie ----------------------------------------------------------------------------------------- */

// [rows]
/* One token's output, left in s.sum. */
static void token_rows(const fmoe_expert_args *a, int64_t t, scratch s) {
    const int32_t *expert = a->indices + t * a->K;
    const float *weight = a->weights + t * a->K;
    const float *x = load_row(a->dtype, a->x, t, a->d, s.token);
    for (int64_t k = 0; k < a->K; k++)
        s.activation[k] = silu(dot(a->d, x, load_row(a->dtype, a->down, expert[k], a->d, s.buffer[0]))) * weight[k];
    memset(s.sum, 0, (size_t)a->d * sizeof(float));
    for (int64_t k = 0; k < a->K; k++)
        add_scaled(a->d, s.activation[k], load_row(a->dtype, a->up, expert[k], a->d, s.buffer[0]), s.sum);
}
// [/rows]

static fmoe_status rows(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    scratch s = scratch_at(a, workspace);
    (void)workspace_bytes, (void)stream;
    for (int64_t t = 0; t < a->T; t++) {
        token_rows(a, t, s);
        store_row(a->dtype, a->y, t, a->d, s.sum);
    }
    return FMOE_OK;
}

/* ---- All threads ------------------------------------------------------------------------------------------------- */

typedef void token_fn(const fmoe_expert_args *a, int64_t t, scratch s);

// [tokens]
/* A token's output belongs to one thread, so nothing is shared and nothing depends on who does it. Sixteen tokens are
 * handed out at a time, because cores need not be equally fast. y_dtype is the storage type; only chapter 8, which adds
 * to y before it rounds, takes float32. */
static fmoe_status each_token(const fmoe_expert_args *a, token_fn *one_token, fmoe_dtype y_dtype, float *workspace) {
#pragma omp parallel
    {
        scratch s = scratch_at(a, workspace + (size_t)omp_get_thread_num() * scratch_floats(a));
#pragma omp for schedule(dynamic, 16)
        for (int64_t t = 0; t < a->T; t++) {
            one_token(a, t, s);
            store_row(y_dtype, a->y, t, a->d, s.sum);
        }
    }
    return FMOE_OK;
}
// [/tokens]

static fmoe_status tokens(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    (void)workspace_bytes, (void)stream;
    return each_token(a, token_rows, a->dtype, workspace);
}

/* ---- Four sums --------------------------------------------------------------------------------------------------- */

static void token_vectors(const fmoe_expert_args *a, int64_t t, scratch s) {
    const int32_t *expert = a->indices + t * a->K;
    const float *weight = a->weights + t * a->K;
    const float *x = load_row(a->dtype, a->x, t, a->d, s.token);
    for (int64_t k = 0; k < a->K; k++)
        s.activation[k] = silu(dot_row(a->d, x, load_row(a->dtype, a->down, expert[k], a->d, s.buffer[0]))) * weight[k];
    memset(s.sum, 0, (size_t)a->d * sizeof(float));
    for (int64_t k = 0; k < a->K; k++)
        add_row(a->d, s.activation[k], load_row(a->dtype, a->up, expert[k], a->d, s.buffer[0]), s.sum);
}

static fmoe_status vectors(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    (void)workspace_bytes, (void)stream;
    return each_token(a, token_vectors, a->dtype, workspace);
}

/* ---- Eight experts a pass ---------------------------------------------------------------------------------------- */

static void load_eight(const fmoe_expert_args *a, const void *table, const int32_t *expert, scratch s,
                       const float *row[ROWS]) {
    for (int j = 0; j < ROWS; j++)
        row[j] = load_row(a->dtype, table, expert[j], a->d, s.buffer[j]);
}

/* Asks for the rows of eight pairs to be brought closer, in the order in which a token walks them: its K down rows,
 * its K up rows, the next token's down rows. i counts them from the token's first. */
// [fetch]
static void fetch_eight(const fmoe_expert_args *a, int64_t t, int64_t i) {
    int64_t bytes = a->d * (int64_t)fmoe_dtype_size(a->dtype);
    for (int64_t end = i + ROWS; i < end; i++) {
        const char *table = i < a->K || i >= 2 * a->K ? a->down : a->up;
        int64_t pair = t * a->K + (i < a->K ? i : i - a->K);
        if (pair >= a->T * a->K)
            return;
        for (int64_t line = 0; line < bytes; line += 64)
            __builtin_prefetch(table + a->indices[pair] * bytes + line);
    }
}
// [/fetch]

// [blocked]
static inline void token_eights(const fmoe_expert_args *a, int64_t t, scratch s, bool fetch) {
    const int32_t *expert = a->indices + t * a->K;
    const float *weight = a->weights + t * a->K, *row[ROWS];
    const float *x = load_row(a->dtype, a->x, t, a->d, s.token);
    int64_t k = 0;
    for (; k + ROWS <= a->K; k += ROWS) {
        if (fetch)
            fetch_eight(a, t, k + ROWS);
        load_eight(a, a->down, expert + k, s, row);
        dot_rows(a->d, x, row, s.activation + k);
    }
    for (; k < a->K; k++)
        s.activation[k] = dot_row(a->d, x, load_row(a->dtype, a->down, expert[k], a->d, s.buffer[0]));
    for (k = 0; k < a->K; k++)
        s.activation[k] = silu(s.activation[k]) * weight[k];
    memset(s.sum, 0, (size_t)a->d * sizeof(float));
    for (k = 0; k + ROWS <= a->K; k += ROWS) {
        if (fetch)
            fetch_eight(a, t, a->K + k + ROWS);
        load_eight(a, a->up, expert + k, s, row);
        add_rows(a->d, s.activation + k, row, s.sum);
    }
    for (; k < a->K; k++)
        add_row(a->d, s.activation[k], load_row(a->dtype, a->up, expert[k], a->d, s.buffer[0]), s.sum);
}
// [/blocked]

static void token_blocked(const fmoe_expert_args *a, int64_t t, scratch s) {
    token_eights(a, t, s, false);
}

static fmoe_status blocked(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    (void)workspace_bytes, (void)stream;
    return each_token(a, token_blocked, a->dtype, workspace);
}

/* ---- Ahead of time ----------------------------------------------------------------------------------------------- */

static void token_prefetch(const fmoe_expert_args *a, int64_t t, scratch s) {
    token_eights(a, t, s, true);
}

fmoe_status cpu_expert_token_into(const fmoe_expert_args *a, fmoe_dtype y_dtype, void *workspace) {
    return each_token(a, token_prefetch, y_dtype, workspace);
}

fmoe_status cpu_expert_token_best(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    (void)workspace_bytes, (void)stream;
    return cpu_expert_token_into(a, a->dtype, workspace);
}

size_t cpu_expert_token_best_workspace(const void *args) {
    return all_threads(args);
}

const fmoe_rung chapter1_rungs[] = {
    {.name = "definition",
     .level = LEVEL_CORE,
     .backend = BACKEND_CPU,
     .idea = "The formula, one element at a time on one thread: every other rung computes this.",
     .run = definition,
     .workspace = definition_workspace},
    {.name = "gather",
     .level = LEVEL_CORE,
     .backend = BACKEND_CPU,
     .idea = "As written in NumPy: first copy every pair's row next to the others, then multiply; whole rows at a "
             "time, but "
             "each crosses memory three times and the copy is larger than the tables.",
     .run = gathered,
     .workspace = gathered_workspace},
    {.name = "rows",
     .level = LEVEL_CORE,
     .backend = BACKEND_CPU,
     .idea = "The rows are read where they lie: no copy, a third of the traffic, and no memory of its own.",
     .run = rows,
     .workspace = one_thread},
    {.name = "tokens",
     .level = LEVEL_CORE,
     .backend = BACKEND_CPU,
     .idea = "Tokens share nothing, so every thread takes its own: as many times faster as there are cores.",
     .run = tokens,
     .workspace = all_threads},
    {.name = "vectors",
     .level = LEVEL_CORE,
     .backend = BACKEND_CPU,
     .idea = "Four vector sums at a time and a tree at the end of each dot product, so that no addition waits for the "
             "last.",
     .run = vectors,
     .workspace = all_threads},
    {.name = "blocked",
     .level = LEVEL_CORE,
     .backend = BACKEND_CPU,
     .idea = "Eight experts a pass: the token's row is loaded once for eight, and eight rows are under way at once.",
     .run = blocked,
     .workspace = all_threads},
    {.name = "prefetch",
     .level = LEVEL_CORE,
     .backend = BACKEND_CPU,
     .idea = "The indices say which rows come next, so the next eight are asked for while these are multiplied.",
     .run = cpu_expert_token_best,
     .workspace = cpu_expert_token_best_workspace},
    {0},
};
