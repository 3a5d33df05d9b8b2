/* Chapter 9 on the CPU: four ladders of gradients. Every row of a gradient has one owner, and its sums have one order.
 */
#include "../gemm.h"
#include "../rows.h"
#include "../steps.h"
#include "../vec.h"

#include "../../ref_cpu/check.h"

#include <math.h>
#include <omp.h>
#include <string.h>

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

static float sigmoid(float s) {
    return 1 / (1 + exp_f32(-s));
}

/* silu'(s) = σ(s) · (1 + s · (1 − σ(s))) */
static float silu_derivative(float s) {
    float sig = sigmoid(s);
    return sig * (1 + s * (1 - sig));
}

/* C may not reorder a sum, so each addition waits for the one before it. */
static float serial_dot(int64_t count, const float *a, const float *b) {
    float sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum += a[i] * b[i];
    return sum;
}

/* The next part of a workspace. Without a workspace it only adds up the sizes, so that one layout function says both
 * where things lie and how much room they need. */
static void *take(void *workspace, size_t *used, int64_t count, size_t size) {
    void *part = workspace ? (char *)workspace + *used : NULL;
    *used += ((size_t)count * size + 255) / 256 * 256;
    return part;
}

static float *take_floats(void *workspace, size_t *used, int64_t count) {
    return take(workspace, used, count, sizeof(float));
}

/* A tensor as float32: itself, or its copy. */
static const float *as_f32(fmoe_dtype dtype, const void *tensor, int64_t count, float *copy) {
    if (dtype == FMOE_F32)
        return tensor;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i += 4096)
        fmoe_to_f32(dtype, smaller(4096, count - i), (const char *)tensor + 2 * i, copy + i);
    return copy;
}

/* ---- topk_backward ----------------------------------------------------------------------------------------------- */

typedef fmoe_topk_backward_args topk_args;

/* Both sides of a token as float32, what has arrived at their log-probabilities, and the routing weights. Whole cache
 * lines a thread. */
static int64_t topk_floats(const topk_args *a) {
    return (6 * a->n + a->K + 15) / 16 * 16;
}

static float log_sum_exp(int64_t n, const float *z) {
    float largest = z[0], sum = 0;
    for (int64_t i = 1; i < n; i++)
        largest = z[i] > largest ? z[i] : largest;
    for (int64_t i = 0; i < n; i++)
        sum += expf(z[i] - largest);
    return largest + logf(sum);
}

/* From routing weights to the gradients of the scores, and on to the keys of both sides. */
// [collect]
static void collect(const topk_args *a, int64_t t, const float *g, float *dx, float *dy) {
    const float *dweights = a->dweights + t * a->K;
    const int32_t *chosen = a->indices + t * a->K;
    float mean = a->norm_topk_prob ? serial_dot(a->K, g, dweights) : 0;
    memset(dx, 0, (size_t)a->n * sizeof *dx);
    memset(dy, 0, (size_t)a->n * sizeof *dy);
    for (int64_t k = 0; k < a->K; k++) {
        float gradient = g[k] * (dweights[k] - mean);
        dx[chosen[k] / a->n] += gradient;
        dy[chosen[k] % a->n] += gradient;
    }
}
// [/collect]

// [topk-definition]
static void topk_token(const topk_args *a, int64_t t, float *scratch) {
    int64_t n = a->n, K = a->K;
    const float *x = load_row(a->dtype, a->logits, t, n, scratch);
    const float *y = load_row(a->dtype, a->logits, a->T + t, n, scratch + n);
    float *dx = scratch + 2 * n, *dy = dx + n, *g = scratch + 6 * n;
    float log_sum_x = log_sum_exp(n, x), log_sum_y = log_sum_exp(n, y);
    const int32_t *chosen = a->indices + t * K;

    float best = -INFINITY, sum = 0;
    for (int64_t k = 0; k < K; k++) {
        g[k] = (x[chosen[k] / n] - log_sum_x) + (y[chosen[k] % n] - log_sum_y);
        best = g[k] > best ? g[k] : best;
    }
    for (int64_t k = 0; k < K; k++) {
        g[k] = expf(a->norm_topk_prob ? g[k] - best : g[k]);
        sum += g[k];
    }
    for (int64_t k = 0; a->norm_topk_prob && k < K; k++)
        g[k] /= sum;
    collect(a, t, g, dx, dy);

    float total_x = 0, total_y = 0;
    for (int64_t i = 0; i < n; i++) {
        total_x += dx[i];
        total_y += dy[i];
    }
    for (int64_t i = 0; i < n; i++) {
        a->dlogits[t * n + i] = dx[i] - expf(x[i] - log_sum_x) * total_x;
        a->dlogits[(a->T + t) * n + i] = dy[i] - expf(y[i] - log_sum_y) * total_y;
    }
}
// [/topk-definition]

// [exponentials]
/* In lanes by hand: not every compiler vectorises the maximum of floats. */
static float largest(int64_t n, const float *z) {
    float lane[LANES], max = z[0];
    for (int l = 0; l < LANES; l++)
        lane[l] = max;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++)
            lane[l] = z[i + l] > lane[l] ? z[i + l] : lane[l];
    for (int l = 0; l < LANES; l++)
        max = lane[l] > max ? lane[l] : max;
    for (; i < n; i++)
        max = z[i] > max ? z[i] : max;
    return max;
}

/* p = exp(z − largest); returns their sum. */
static float exponentials(int64_t n, const float *z, float *p) {
    float max = largest(n, z), sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        p[i] = exp_f32(z[i] - max);
        sum += p[i];
    }
    return sum;
}

static void side_gradient(int64_t n, const float *p, float sum, const float *dlog_probs, float *dlogits) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++)
        total += dlog_probs[i];
    float scale = total / sum;
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        dlogits[i] = dlog_probs[i] - scale * p[i];
}
// [/exponentials]

// [topk-shared]
/* A chosen pair's weight is the product of two of the 2n exponentials that the softmax needs anyway. */
static void topk_token_shared(const topk_args *a, int64_t t, float *scratch) {
    int64_t n = a->n, K = a->K;
    const float *x = load_row(a->dtype, a->logits, t, n, scratch);
    const float *y = load_row(a->dtype, a->logits, a->T + t, n, scratch + n);
    float *dx = scratch + 2 * n, *dy = dx + n, *px = dy + n, *py = px + n, *g = scratch + 6 * n;
    float sum_x = exponentials(n, x, px), sum_y = exponentials(n, y, py), sum = 0;
    const int32_t *chosen = a->indices + t * K;
    for (int64_t k = 0; k < K; k++) {
        g[k] = px[chosen[k] / n] * py[chosen[k] % n];
        sum += g[k];
    }
    float scale = 1 / (a->norm_topk_prob ? sum : sum_x * sum_y);
    for (int64_t k = 0; k < K; k++)
        g[k] *= scale;
    collect(a, t, g, dx, dy);
    side_gradient(n, px, sum_x, dx, a->dlogits + t * n);
    side_gradient(n, py, sum_y, dy, a->dlogits + (a->T + t) * n);
}
// [/topk-shared]

static size_t topk_serial_workspace(const void *args) {
    return (size_t)topk_floats(args) * sizeof(float);
}

static size_t topk_workspace(const void *args) {
    return topk_serial_workspace(args) * (size_t)omp_get_max_threads();
}

static fmoe_status topk_definition(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const topk_args *a = args;
    for (int64_t t = 0; t < a->T; t++)
        topk_token(a, t, workspace);
    return FMOE_OK;
}

static fmoe_status topk_openmp(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const topk_args *a = args;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < a->T; t++)
        topk_token(a, t, (float *)workspace + omp_get_thread_num() * topk_floats(a));
    return FMOE_OK;
}

static fmoe_status topk_shared(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const topk_args *a = args;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < a->T; t++)
        topk_token_shared(a, t, (float *)workspace + omp_get_thread_num() * topk_floats(a));
    return FMOE_OK;
}

const fmoe_rung chapter9_topk_rungs[] = {
    {"definition", LEVEL_CORE, BACKEND_CPU, "Token by token: every exponential where the formula asks for it.",
     topk_definition, .workspace = topk_serial_workspace},
    {"openmp", LEVEL_CORE, BACKEND_CPU, "Tokens share nothing: with twice the cores, half the time.", topk_openmp,
     .workspace = topk_workspace},
    {"shared", LEVEL_CORE, BACKEND_CPU,
     "2n exponentials a token in place of 4n + K, in vector registers: a weight is a product of two of them.",
     topk_shared, .workspace = topk_workspace},
    {.run = NULL},
};

/* ---- expert_backward --------------------------------------------------------------------------------------------- */

typedef fmoe_expert_backward_args expert_args;

// [pair]
/* What a pair contributes: its activation (to dup), ds (to ddown and dx), and the gradient of its routing weight, from
 * da = ⟨dy, up[e]⟩ and the pre-activation that the forward pass kept. */
static inline void pair_numbers(const expert_args *a, int64_t p, float da, float *activation, float *ds) {
    float s = a->pre_activations[p], g = a->weights[p], silu = s * sigmoid(s);
    *activation = silu * g;
    *ds = da * g * silu_derivative(s);
    a->dweights[p] = da * silu;
}
// [/pair]

/* Rows of one worker: four as loaded, one of dx. */
static float *take_rows(const expert_args *a, void *workspace, size_t *used, int64_t workers) {
    return take_floats(workspace, used, workers * 5 * (int64_t)((a->d + 15) / 16 * 16));
}

static float *worker_rows(const expert_args *a, float *rows, int64_t worker) {
    return rows + worker * 5 * ((a->d + 15) / 16 * 16);
}

// [scatter]
/* One token: its K pairs add to rows all over both tables, and to one row of dx. */
static void scatter_token(const expert_args *a, int64_t t, float *rows, float *ddown, float *dup) {
    int64_t d = a->d;
    float *dx = rows + 4 * d;
    const float *x = load_row(a->dtype, a->x, t, d, rows), *dy = load_row(a->dtype, a->dy, t, d, rows + d);
    memset(dx, 0, (size_t)d * sizeof *dx);
    for (int64_t p = t * a->K; p < (t + 1) * a->K; p++) {
        int64_t e = a->indices[p];
        const float *down = load_row(a->dtype, a->down, e, d, rows + 2 * d);
        const float *up = load_row(a->dtype, a->up, e, d, rows + 3 * d);
        float activation, ds;
        pair_numbers(a, p, serial_dot(d, dy, up), &activation, &ds);
        for (int64_t c = 0; c < d; c++) {
            dx[c] += ds * down[c];
            ddown[e * d + c] += ds * x[c];
            dup[e * d + c] += activation * dy[c];
        }
    }
    store_row(a->dtype, a->dx, t, d, dx);
}
// [/scatter]

/* Copies of both tables in float32, and rows for whoever fills them. */
typedef struct {
    float *ddown, *dup, *rows;
    size_t bytes;
} copies;

static copies copies_layout(const expert_args *a, void *workspace, int64_t count) {
    copies c = {.bytes = 0};
    c.ddown = take_floats(workspace, &c.bytes, count * a->N * a->d);
    c.dup = take_floats(workspace, &c.bytes, count * a->N * a->d);
    c.rows = take_rows(a, workspace, &c.bytes, count);
    return c;
}

static size_t scatter_workspace(const void *args) {
    return copies_layout(args, NULL, 1).bytes;
}

static fmoe_status scatter(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const expert_args *a = args;
    copies c = copies_layout(a, workspace, 1);
    bool in_place = a->dtype == FMOE_F32; /* 16-bit tables are too coarse to add up in */
    if (in_place) {
        c.ddown = a->ddown;
        c.dup = a->dup;
    }
    memset(c.ddown, 0, (size_t)(a->N * a->d) * sizeof(float));
    memset(c.dup, 0, (size_t)(a->N * a->d) * sizeof(float));
    for (int64_t t = 0; t < a->T; t++)
        scatter_token(a, t, c.rows, c.ddown, c.dup);
    if (!in_place) {
        fmoe_from_f32(a->dtype, a->N * a->d, c.ddown, a->ddown);
        fmoe_from_f32(a->dtype, a->N * a->d, c.dup, a->dup);
    }
    return FMOE_OK;
}

// [copies]
/* As many as four threads can use. Fixed: a copy for each thread would add up in groups that change with the number of
 * threads, and so would the bits. */
enum { COPIES = 4 };

static void add_copies(const expert_args *a, const float *tables, float *row, void *gradient) {
#pragma omp parallel for schedule(static)
    for (int64_t e = 0; e < a->N; e++) {
        float *sum = worker_rows(a, row, omp_get_thread_num());
        memcpy(sum, tables + e * a->d, (size_t)a->d * sizeof *sum);
        for (int64_t copy = 1; copy < COPIES; copy++)
            add_scaled(a->d, 1, tables + (copy * a->N + e) * a->d, sum);
        store_row(a->dtype, gradient, e, a->d, sum);
    }
}

static fmoe_status private_copies(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const expert_args *a = args;
    copies c = copies_layout(a, workspace, COPIES);
    size_t used = c.bytes;
    float *sums = take_rows(a, workspace, &used, omp_get_max_threads());
#pragma omp parallel for schedule(static, 1)
    for (int64_t copy = 0; copy < COPIES; copy++) {
        float *ddown = c.ddown + copy * a->N * a->d, *dup = c.dup + copy * a->N * a->d;
        memset(ddown, 0, (size_t)(a->N * a->d) * sizeof(float));
        memset(dup, 0, (size_t)(a->N * a->d) * sizeof(float));
        for (int64_t t = copy * a->T / COPIES; t < (copy + 1) * a->T / COPIES; t++)
            scatter_token(a, t, worker_rows(a, c.rows, copy), ddown, dup);
    }
    add_copies(a, c.ddown, sums, a->ddown);
    add_copies(a, c.dup, sums, a->dup);
    return FMOE_OK;
}
// [/copies]

static size_t private_copies_workspace(const void *args) {
    size_t used = copies_layout(args, NULL, COPIES).bytes;
    take_rows(args, NULL, &used, omp_get_max_threads());
    return used;
}

/* Of the ordered rungs: x and dy as float32 where they are not, ds by pair, five rows a thread, and what `balanced`
 * adds: its list of items and the sums of items that share an expert. */
typedef struct {
    float *x, *dy, *ds, *rows;
    struct item *items;
    float *parts;
    size_t bytes;
} ordered;

// [items]
/* What a thread takes at a time: at most RUN pairs, and at most RUN experts, since those without pairs must be zeroed
 * as well. An expert with more pairs is cut into several items, whose sums are parts to be added in order; RUN depends
 * on nothing, so the sums are the same whoever computes them. */
enum { RUN = 256 };

struct item {
    int32_t expert, end; /* experts from, and up to */
    int32_t first, last; /* of a part: positions in the schedule */
    int32_t part;        /* −1: whole experts, which write their gradients themselves */
};
// [/items]

/* An item ends an expert or is full. */
static int64_t max_items(const expert_args *a) {
    return a->N + a->T * a->K / RUN;
}

/* An expert of c > RUN pairs has at most 2c / RUN parts. */
static int64_t max_parts(const expert_args *a) {
    return 2 * a->T * a->K / RUN;
}

static ordered ordered_layout(const expert_args *a, void *workspace) {
    ordered o = {.bytes = 0};
    int64_t copied = a->dtype == FMOE_F32 ? 0 : a->T * a->d;
    o.x = take_floats(workspace, &o.bytes, copied);
    o.dy = take_floats(workspace, &o.bytes, copied);
    o.ds = take_floats(workspace, &o.bytes, a->T * a->K);
    o.rows = take_floats(workspace, &o.bytes, omp_get_max_threads() * (ROWS + 2) * ((a->d + 15) / 16 * 16));
    o.items = take(workspace, &o.bytes, max_items(a), sizeof *o.items);
    o.parts = take_floats(workspace, &o.bytes, 2 * a->d * max_parts(a));
    return o;
}

static size_t ordered_workspace(const void *args) {
    return ordered_layout(args, NULL).bytes;
}

static float *thread_rows(const expert_args *a, const ordered *o) {
    return o->rows + omp_get_thread_num() * (ROWS + 2) * ((a->d + 15) / 16 * 16);
}

typedef void add_pairs_fn(const expert_args *a, const float *x, const float *dy, const float *up, int64_t first,
                          int64_t last, float *ds, float *ddown, float *dup);

// [transposed]
/* Positions first to last of the schedule, all of one expert: its row of up is at hand, its two rows of gradients grow
 * in the first-level cache. */
static void add_pairs(const expert_args *a, const float *x, const float *dy, const float *up, int64_t first,
                      int64_t last, float *ds, float *ddown, float *dup) {
    int64_t d = a->d;
    for (int64_t i = first; i < last; i++) {
        int64_t p = a->pairs[i], t = p / a->K;
        float activation;
        pair_numbers(a, p, serial_dot(d, dy + t * d, up), &activation, &ds[p]);
        for (int64_t c = 0; c < d; c++) {
            ddown[c] += ds[p] * x[t * d + c];
            dup[c] += activation * dy[t * d + c];
        }
    }
}
// [/transposed]

// [eight-pairs]
/* Eight pairs at a time: eight dot products against one row of up, then each row of gradients is loaded and stored once
 * for eight multiples. */
static void add_eight_pairs(const expert_args *a, const float *x, const float *dy, const float *up, int64_t first,
                            int64_t last, float *ds, float *ddown, float *dup) {
    int64_t d = a->d, i = first;
    for (; i + ROWS <= last; i += ROWS) {
        const float *x_rows[ROWS], *dy_rows[ROWS];
        float da[ROWS], activations[ROWS], scales[ROWS];
        for (int j = 0; j < ROWS; j++) {
            x_rows[j] = x + a->pairs[i + j] / a->K * d;
            dy_rows[j] = dy + a->pairs[i + j] / a->K * d;
        }
        dot_rows(d, up, dy_rows, da);
        for (int j = 0; j < ROWS; j++) {
            pair_numbers(a, a->pairs[i + j], da[j], &activations[j], &scales[j]);
            ds[a->pairs[i + j]] = scales[j];
        }
        add_rows(d, scales, x_rows, ddown);
        add_rows(d, activations, dy_rows, dup);
    }
    for (; i < last; i++) {
        int64_t p = a->pairs[i], t = p / a->K;
        float activation;
        pair_numbers(a, p, dot_row(d, dy + t * d, up), &activation, &ds[p]);
        add_row(d, ds[p], x + t * d, ddown);
        add_row(d, activation, dy + t * d, dup);
    }
}
// [/eight-pairs]

// [one-expert]
/* Both gradient rows of an expert, zero if no token chose it, each rounded once. */
static void one_expert(const expert_args *a, const ordered *o, const float *x, const float *dy, int64_t e,
                       add_pairs_fn *add) {
    int64_t d = a->d;
    float *rows = thread_rows(a, o), *ddown = rows + d, *dup = rows + 2 * d;
    memset(ddown, 0, 2 * (size_t)d * sizeof *ddown);
    if (a->offsets[e] < a->offsets[e + 1])
        add(a, x, dy, load_row(a->dtype, a->up, e, d, rows), a->offsets[e], a->offsets[e + 1], o->ds, ddown, dup);
    store_row(a->dtype, a->ddown, e, d, ddown);
    store_row(a->dtype, a->dup, e, d, dup);
}
// [/one-expert]

// [gather-rows]
/* sums[t] = Σ_k scale · table[e_k]: dx from ds and down, and the forward pass's y from activations and up. */
static void gather_rows(int64_t T, int64_t d, int64_t K, fmoe_dtype dtype, const void *table, const int32_t *indices,
                        const float *scale, float *rows, int64_t rows_stride, fmoe_dtype sums_dtype, void *sums) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++) {
        float *buffers = rows + omp_get_thread_num() * rows_stride, *sum = buffers + ROWS * d;
        int64_t p = t * K, end = p + K;
        memset(sum, 0, (size_t)d * sizeof *sum);
        for (; p + ROWS <= end; p += ROWS) {
            const float *eight[ROWS];
            for (int j = 0; j < ROWS; j++)
                eight[j] = load_row(dtype, table, indices[p + j], d, buffers + j * d);
            add_rows(d, scale + p, eight, sum);
        }
        for (; p < end; p++)
            add_row(d, scale[p], load_row(dtype, table, indices[p], d, buffers), sum);
        store_row(sums_dtype, sums, t, d, sum);
    }
}
// [/gather-rows]

static void gather_dx(const expert_args *a, const ordered *o) {
    gather_rows(a->T, a->d, a->K, a->dtype, a->down, a->indices, o->ds, o->rows, (ROWS + 2) * ((a->d + 15) / 16 * 16),
                a->dtype, a->dx);
}

static fmoe_status transposed(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const expert_args *a = args;
    ordered o = ordered_layout(a, workspace);
    const float *x = as_f32(a->dtype, a->x, a->T * a->d, o.x), *dy = as_f32(a->dtype, a->dy, a->T * a->d, o.dy);
#pragma omp parallel for schedule(static)
    for (int64_t e = 0; e < a->N; e++)
        one_expert(a, &o, x, dy, e, add_pairs);
    gather_dx(a, &o);
    return FMOE_OK;
}

static fmoe_status vectorised(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const expert_args *a = args;
    ordered o = ordered_layout(a, workspace);
    const float *x = as_f32(a->dtype, a->x, a->T * a->d, o.x), *dy = as_f32(a->dtype, a->dy, a->T * a->d, o.dy);
#pragma omp parallel for schedule(static)
    for (int64_t e = 0; e < a->N; e++)
        one_expert(a, &o, x, dy, e, add_eight_pairs);
    gather_dx(a, &o);
    return FMOE_OK;
}

// [list-items]
static int64_t list_items(const expert_args *a, struct item *items) {
    const int32_t *offsets = a->offsets;
    int64_t count = 0;
    int32_t parts = 0;
    for (int32_t e = 0, end; e < a->N; e = end) {
        for (end = e + 1; end < a->N && end - e < RUN && offsets[end + 1] - offsets[e] <= RUN;)
            end++;
        if (offsets[end] - offsets[e] <= RUN) {
            items[count++] = (struct item){e, end, 0, 0, -1};
            continue;
        }
        for (int32_t first = offsets[e]; first < offsets[end]; first += RUN)
            items[count++] = (struct item){e, end, first, (int32_t)smaller(first + RUN, offsets[end]), parts++};
    }
    return count;
}
// [/list-items]

// [balanced]
static void one_item(const expert_args *a, const ordered *o, const float *x, const float *dy, struct item item) {
    int64_t d = a->d;
    if (item.part < 0) {
        for (int64_t e = item.expert; e < item.end; e++)
            one_expert(a, o, x, dy, e, add_eight_pairs);
        return;
    }
    float *part = o->parts + item.part * 2 * d;
    memset(part, 0, 2 * (size_t)d * sizeof *part);
    add_eight_pairs(a, x, dy, load_row(a->dtype, a->up, item.expert, d, thread_rows(a, o)), item.first, item.last,
                    o->ds, part, part + d);
}

/* The parts of one expert, which follow each other, added to the first of them. */
static void add_parts(const expert_args *a, const ordered *o, const struct item *items, int64_t i, int64_t count) {
    int64_t d = a->d;
    int32_t e = items[i].expert;
    float *sum = o->parts + items[i].part * 2 * d;
    for (int64_t j = i + 1; j < count && items[j].expert == e; j++)
        add_row(2 * d, 1, o->parts + items[j].part * 2 * d, sum);
    store_row(a->dtype, a->ddown, e, d, sum);
    store_row(a->dtype, a->dup, e, d, sum + d);
}

static void expert_gradients(const expert_args *a, const ordered *o) {
    const float *x = as_f32(a->dtype, a->x, a->T * a->d, o->x), *dy = as_f32(a->dtype, a->dy, a->T * a->d, o->dy);
    int64_t count = list_items(a, o->items);
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < count; i++)
        one_item(a, o, x, dy, o->items[i]);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++)
        if (o->items[i].part >= 0 && (i == 0 || o->items[i - 1].expert != o->items[i].expert))
            add_parts(a, o, o->items, i, count);
}
// [/balanced]

static fmoe_status balanced(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const expert_args *a = args;
    ordered o = ordered_layout(a, workspace);
    expert_gradients(a, &o);
    gather_dx(a, &o);
    return FMOE_OK;
}

const fmoe_rung chapter9_expert_rungs[] = {
    {"scatter", LEVEL_CORE, BACKEND_CPU,
     "Token by token, one thread: a pair fetches two rows and adds to three, two of them somewhere in the tables.",
     scatter, .workspace = scatter_workspace},
    {"copies", LEVEL_CORE, BACKEND_CPU,
     "Four private copies of both tables, added in order at the end: parallel and repeatable, paid for in memory.",
     private_copies, .workspace = private_copies_workspace},
    {"transposed", LEVEL_CORE, BACKEND_CPU,
     "Expert by expert along the kept schedule: one owner a row, no copies, each gradient row written once.",
     transposed, .workspace = ordered_workspace},
    {"vectorised", LEVEL_CORE, BACKEND_CPU,
     "Eight pairs of an expert at a time in vector registers: a gradient row is loaded and stored once for eight.",
     vectorised, .workspace = ordered_workspace},
    {"balanced", LEVEL_CORE, BACKEND_CPU,
     "Runs of at most 256 pairs, handed out as threads become free: one hot expert no longer holds up the rest.",
     balanced, .workspace = ordered_workspace},
    {.run = NULL},
};

/* ---- mlp_backward ------------------------------------------------------------------------------------------------ */

typedef fmoe_mlp_backward_args mlp_args;

/* The hidden units and the gradients of both pre-activations, [T, I] each; rows a thread, or the packed operands. */
typedef struct {
    float *h, *dp, *dq, *rows;
    size_t bytes;
} hidden;

static int64_t mlp_row_floats(const mlp_args *a) {
    return (int64_t)larger((size_t)a->d, (size_t)a->I) / 16 * 16 + 16;
}

static hidden hidden_layout(const mlp_args *a, void *workspace) {
    hidden l = {.bytes = 0};
    l.h = take_floats(workspace, &l.bytes, a->T * a->I);
    l.dp = take_floats(workspace, &l.bytes, a->T * a->I);
    l.dq = take_floats(workspace, &l.bytes, a->T * a->I);
    l.rows = take_floats(workspace, &l.bytes, omp_get_max_threads() * 5 * mlp_row_floats(a));
    return l;
}

// [mlp-token]
static inline void mlp_token(const mlp_args *a, int64_t t, const hidden *l, float *rows,
                             float (*product)(int64_t, const float *, const float *)) {
    int64_t d = a->d, I = a->I, stride = mlp_row_floats(a);
    const float *x = load_row(a->dtype, a->x, t, d, rows), *dy = load_row(a->dtype, a->dy, t, d, rows + stride);
    float *weight = rows + 2 * stride, *weight2 = rows + 3 * stride, *dx = rows + 4 * stride;
    float *h = l->h + t * I, *dp = l->dp + t * I, *dq = l->dq + t * I;

    /* dh = downᵀ · dy, kept in dp for a moment. */
    memset(dp, 0, (size_t)I * sizeof *dp);
    for (int64_t c = 0; c < d; c++)
        add_scaled(I, dy[c], load_row(a->dtype, a->down, c, I, weight), dp);
    memset(dx, 0, (size_t)d * sizeof *dx);
    for (int64_t i = 0; i < I; i++) {
        const float *gate = load_row(a->dtype, a->gate, i, d, weight);
        const float *up = load_row(a->dtype, a->up, i, d, weight2);
        float p = product(d, x, gate), q = product(d, x, up), dh = dp[i];
        h[i] = p * sigmoid(p) * q;
        dp[i] = dh * q * silu_derivative(p);
        dq[i] = dh * p * sigmoid(p);
        add_scaled(d, dp[i], gate, dx);
        add_scaled(d, dq[i], up, dx);
    }
    store_row(a->dtype, a->dx, t, d, dx);
}
// [/mlp-token]

// [mlp-rows]
/* Row r of a weight's gradient, Σ_t scale[t, r] · rows[t]: one owner a row, tokens in order. */
static void weight_row(int64_t T, int64_t r, const float *scale, int64_t scale_stride, const float *rows, int64_t width,
                       fmoe_dtype dtype, void *gradient, float *sum) {
    memset(sum, 0, (size_t)width * sizeof *sum);
    for (int64_t t = 0; t < T; t++)
        add_scaled(width, scale[t * scale_stride + r], rows + t * width, sum);
    store_row(dtype, gradient, r, width, sum);
}
// [/mlp-rows]

/* x and dy as float32 for the weights' gradients, where they are not. */
static size_t mlp_plain_workspace(const void *args) {
    const mlp_args *a = args;
    size_t used = hidden_layout(a, NULL).bytes;
    for (int i = 0; i < 2 && a->dtype != FMOE_F32; i++)
        take_floats(NULL, &used, a->T * a->d);
    return used;
}

static fmoe_status mlp_plain(const mlp_args *a, void *workspace, bool parallel,
                             float (*product)(int64_t, const float *, const float *)) {
    int64_t T = a->T, d = a->d, I = a->I;
    hidden l = hidden_layout(a, workspace);
    size_t used = l.bytes;
    int64_t copied = a->dtype == FMOE_F32 ? 0 : T * d;
    const float *x = as_f32(a->dtype, a->x, T * d, take_floats(workspace, &used, copied));
    const float *dy = as_f32(a->dtype, a->dy, T * d, take_floats(workspace, &used, copied));
#pragma omp parallel if (parallel)
    {
        float *rows = l.rows + omp_get_thread_num() * 5 * mlp_row_floats(a);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; t++)
            mlp_token(a, t, &l, rows, product);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < I; i++) {
            weight_row(T, i, l.dp, I, x, d, a->dtype, a->dgate, rows);
            weight_row(T, i, l.dq, I, x, d, a->dtype, a->dup, rows);
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < d; c++)
            weight_row(T, c, dy, d, l.h, I, a->dtype, a->ddown, rows);
    }
    return FMOE_OK;
}

static fmoe_status mlp_definition(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    return mlp_plain(args, workspace, false, serial_dot);
}

static fmoe_status mlp_openmp(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    return mlp_plain(args, workspace, true, dot);
}

/* A second or two for some 2^30 plain multiply-adds, and a case has 8·T·d·I. */
static bool mlp_small_enough(const void *args) {
    const mlp_args *a = args;
    return (double)a->T * (double)a->d * (double)a->I <= 0x1p27;
}

/* A matrix [rows, columns] as an operand: its rows, or its columns, become rows of the product. */
static gemm_operand by_rows(fmoe_dtype dtype, const void *data, int64_t columns) {
    return (gemm_operand){.dtype = dtype, .data = data, .row_stride = columns, .depth_stride = 1};
}

static gemm_operand by_columns(fmoe_dtype dtype, const void *data, int64_t columns) {
    return (gemm_operand){.dtype = dtype, .data = data, .row_stride = 1, .depth_stride = columns};
}

/* First product: p and q of the same tile, side by side, where dp and dq will be; and h. */
static void keep_pre_activations(void *context, int64_t row, int64_t column, int64_t rows, int64_t columns,
                                 const float (*values)[GEMM_NR]) {
    const gemm_target *at = context; /* three: p, q, h */
    for (int64_t r = 0; r < rows; r++) {
        int64_t place = (row + r) * at[0].row_stride + column;
        float *p = (float *)at[0].data + place, *q = (float *)at[1].data + place, *h = (float *)at[2].data + place;
        for (int64_t c = 0; c < columns; c++) {
            p[c] = values[r][c];
            q[c] = values[r][GEMM_VECTOR + c];
            h[c] = p[c] * sigmoid(p[c]) * q[c];
        }
    }
}

// [differentiate]
/* Second product: a tile of dh turns p and q into their gradients on the spot. */
static void differentiate(void *context, int64_t row, int64_t column, int64_t rows, int64_t columns,
                          const float (*values)[GEMM_NR]) {
    const gemm_target *at = context;
    for (int64_t r = 0; r < rows; r++) {
        int64_t place = (row + r) * at[0].row_stride + column;
        float *p = (float *)at[0].data + place, *q = (float *)at[1].data + place;
        for (int64_t c = 0; c < columns; c++) {
            float dh = values[r][c], dp = dh * q[c] * silu_derivative(p[c]);
            q[c] = dh * p[c] * sigmoid(p[c]);
            p[c] = dp;
        }
    }
}
// [/differentiate]

/* Adds a tile to float32 sums, and stores the result in any type. */
typedef struct {
    const float *sums;
    gemm_target target;
} gemm_addend;

static void add_and_store(void *context, int64_t row, int64_t column, int64_t rows, int64_t columns,
                          const float (*values)[GEMM_NR]) {
    const gemm_addend *at = context;
    for (int64_t r = 0; r < rows; r++) {
        int64_t place = (row + r) * at->target.row_stride + column;
        float sum[GEMM_NR];
        for (int64_t c = 0; c < columns; c++)
            sum[c] = at->sums[place + c] + values[r][c];
        fmoe_from_f32(at->target.dtype, columns, sum,
                      (char *)at->target.data + place * (int64_t)fmoe_dtype_size(at->target.dtype));
    }
}

static size_t mlp_gemm_workspace(int64_t T, int64_t d, int64_t I) {
    size_t wide = larger(gemm_workspace(T, I, d), gemm_workspace(T, d, I));
    return larger(wide, larger(gemm_workspace(I, d, T), gemm_workspace(d, I, T)));
}

// [mlp-kept]
/* Six products, when p, q (in dp, dq) and h were kept. sums [T, d] holds what else dx is the sum of. */
static fmoe_status mlp_gradients(const mlp_args *a, const hidden *l, float *sums, gemm_target dx, void *workspace,
                                 size_t bytes) {
    int64_t T = a->T, d = a->d, I = a->I;
    gemm_target kept[] = {{FMOE_F32, l->dp, I}, {FMOE_F32, l->dq, I}, {FMOE_F32, l->h, I}};
    gemm_operand dy = by_rows(a->dtype, a->dy, d), down = by_columns(a->dtype, a->down, I);
    TRY(gemm(T, I, d, &dy, &down, differentiate, kept, workspace, bytes)); /* dh = dy · down */

    gemm_operand dp = by_rows(FMOE_F32, l->dp, I), dq = by_rows(FMOE_F32, l->dq, I);
    gemm_operand gate = by_columns(a->dtype, a->gate, d), up = by_columns(a->dtype, a->up, d);
    gemm_addend first = {sums, {FMOE_F32, sums, d}}, second = {sums, dx};
    TRY(gemm(T, d, I, &dp, &gate, add_and_store, &first, workspace, bytes)); /* dx = dp · gate + dq · up */
    TRY(gemm(T, d, I, &dq, &up, add_and_store, &second, workspace, bytes));

    gemm_operand dp_t = by_columns(FMOE_F32, l->dp, I), dq_t = by_columns(FMOE_F32, l->dq, I);
    gemm_operand x_t = by_columns(a->dtype, a->x, d), dy_t = by_columns(a->dtype, a->dy, d);
    gemm_operand h_t = by_columns(FMOE_F32, l->h, I);
    gemm_target dgate = {a->dtype, a->dgate, d}, dup = {a->dtype, a->dup, d}, ddown = {a->dtype, a->ddown, I};
    TRY(gemm(I, d, T, &dp_t, &x_t, gemm_store, &dgate, workspace, bytes)); /* dgate = dpᵀ · x */
    TRY(gemm(I, d, T, &dq_t, &x_t, gemm_store, &dup, workspace, bytes));
    return gemm(d, I, T, &dy_t, &h_t, gemm_store, &ddown, workspace, bytes); /* ddown = dyᵀ · h */
}
// [/mlp-kept]

static fmoe_status mlp_pre_activations(int64_t T, int64_t d, int64_t I, fmoe_dtype dtype, const void *x,
                                       const void *gate, const void *up, const hidden *l, void *workspace,
                                       size_t bytes) {
    gemm_target kept[] = {{FMOE_F32, l->dp, I}, {FMOE_F32, l->dq, I}, {FMOE_F32, l->h, I}};
    gemm_operand tokens = by_rows(dtype, x, d), both = by_rows(dtype, gate, d);
    both.pair = up;
    return gemm(T, I, d, &tokens, &both, keep_pre_activations, kept, workspace, bytes);
}

static size_t mlp_packed_workspace(const void *args) {
    const mlp_args *a = args;
    size_t used = hidden_layout(a, NULL).bytes;
    take_floats(NULL, &used, a->T * a->d);
    return used + mlp_gemm_workspace(a->T, a->d, a->I);
}

static fmoe_status mlp_packed(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)stream;
    const mlp_args *a = args;
    hidden l = hidden_layout(a, workspace);
    size_t used = l.bytes;
    float *sums = take_floats(workspace, &used, a->T * a->d);
    char *rest = (char *)workspace + used;
    memset(sums, 0, (size_t)(a->T * a->d) * sizeof *sums);
    TRY(mlp_pre_activations(a->T, a->d, a->I, a->dtype, a->x, a->gate, a->up, &l, rest, workspace_bytes - used));
    return mlp_gradients(a, &l, sums, (gemm_target){a->dtype, a->dx, a->d}, rest, workspace_bytes - used);
}

const fmoe_rung chapter9_mlp_rungs[] = {
    {"definition", LEVEL_CORE, BACKEND_CPU, "Token by token, then row by row of each weight, one thread.",
     mlp_definition, .workspace = mlp_plain_workspace, .supports = mlp_small_enough},
    {"openmp", LEVEL_CORE, BACKEND_CPU,
     "Tokens first, then weight rows: either way one owner a row, in vector registers and with every core.", mlp_openmp,
     .workspace = mlp_plain_workspace, .supports = mlp_small_enough},
    {"packed", LEVEL_CORE, BACKEND_CPU,
     "Eight matrix products in chapter 6's tiles: packing does the transposing, an epilogue differentiates.",
     mlp_packed, .workspace = mlp_packed_workspace},
    {.run = NULL},
};

/* ---- layer_forward_backward -------------------------------------------------------------------------------------- */

typedef fmoe_layer_backward_args layer_args;

/* Router norm and its way back. A thread owns whole blocks of columns; statistics in double, tokens in order. */
enum { COLUMNS = 64 };

static const float *load_part(fmoe_dtype dtype, const void *tensor, int64_t first, int64_t width, float *buffer) {
    fmoe_to_f32(dtype, width, (const char *)tensor + first * (int64_t)fmoe_dtype_size(dtype), buffer);
    return buffer;
}

static void batch_statistics(const fmoe_layer_args *f, int64_t first, int64_t width, double *mean, double *var) {
    float row[COLUMNS];
    memset(mean, 0, COLUMNS * sizeof *mean);
    memset(var, 0, COLUMNS * sizeof *var);
    for (int64_t t = 0; t < f->T; t++) {
        load_part(f->dtype, f->x, t * f->d + first, width, row);
        for (int64_t c = 0; c < width; c++)
            mean[c] += row[c];
    }
    for (int64_t c = 0; c < width; c++)
        mean[c] /= (double)f->T;
    for (int64_t t = 0; t < f->T; t++) {
        load_part(f->dtype, f->x, t * f->d + first, width, row);
        for (int64_t c = 0; c < width; c++)
            var[c] += (row[c] - mean[c]) * (row[c] - mean[c]);
    }
    for (int64_t c = 0; c < width; c++)
        var[c] /= (double)f->T;
}

/* x̂ [T, d] and the factor of every column; `move` says whether the running buffers follow a training batch. */
static void norm(const fmoe_layer_args *f, bool move, float *x_hat, float *scale) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < f->d; first += COLUMNS) {
        int64_t width = smaller(COLUMNS, f->d - first);
        double mean[COLUMNS], var[COLUMNS], unbiased = (double)f->T / (double)(f->T - 1);
        if (f->training)
            batch_statistics(f, first, width, mean, var);
        for (int64_t c = 0; c < width; c++) {
            float *running_mean = f->running_mean + first + c, *running_var = f->running_var + first + c;
            if (!f->training) {
                mean[c] = *running_mean;
                var[c] = *running_var;
            } else if (move && f->T > 0) {
                *running_mean += (float)(FMOE_NORM_MOMENTUM * (mean[c] - *running_mean));
                *running_var += (float)(FMOE_NORM_MOMENTUM * (unbiased * var[c] - *running_var));
            }
            scale[first + c] = (float)(1 / sqrt(var[c] + FMOE_NORM_EPS));
        }
        for (int64_t t = 0; t < f->T; t++) {
            float row[COLUMNS];
            load_part(f->dtype, f->x, t * f->d + first, width, row);
            for (int64_t c = 0; c < width; c++)
                x_hat[t * f->d + first + c] = (float)(row[c] - mean[c]) * scale[first + c];
        }
    }
}

/* dx = (dx̂ − mean(dx̂) − x̂ · mean(dx̂ · x̂)) · scale in training, dx̂ · scale in evaluation; plus what the other two
 * branches sent back. */
static void norm_backward(const fmoe_layer_args *f, const float *x_hat, const float *scale, const float *dx_hat,
                          const float *others, void *dx) {
    int64_t d = f->d;
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < d; first += COLUMNS) {
        int64_t width = smaller(COLUMNS, d - first);
        double sum[COLUMNS] = {0}, with_x_hat[COLUMNS] = {0};
        for (int64_t t = 0; f->training && t < f->T; t++)
            for (int64_t c = 0; c < width; c++) {
                sum[c] += dx_hat[t * d + first + c];
                with_x_hat[c] += (double)dx_hat[t * d + first + c] * x_hat[t * d + first + c];
            }
        for (int64_t c = 0; c < width; c++) {
            sum[c] /= (double)f->T;
            with_x_hat[c] /= (double)f->T;
        }
        for (int64_t t = 0; t < f->T; t++) {
            float row[COLUMNS];
            for (int64_t c = 0; c < width; c++) {
                int64_t i = t * d + first + c;
                double through = dx_hat[i] - sum[c] - x_hat[i] * with_x_hat[c];
                row[c] = others[i] + (float)through * scale[first + c];
            }
            fmoe_from_f32(f->dtype, width, row, (char *)dx + (t * d + first) * (int64_t)fmoe_dtype_size(f->dtype));
        }
    }
}

/* The router's own buffers. */
typedef struct {
    float *x_hat, *dx_hat, *scale, *dlogits, *weights, *dweights, *topk_rows;
} router;

static router take_router(const fmoe_layer_args *f, void *workspace, size_t *used) {
    router r;
    topk_args topk = {.n = f->n, .K = f->K};
    r.x_hat = take_floats(workspace, used, f->T * f->d);
    r.dx_hat = take_floats(workspace, used, f->T * f->d);
    r.scale = take_floats(workspace, used, f->d);
    r.dlogits = take_floats(workspace, used, 2 * f->T * f->n);
    r.weights = take_floats(workspace, used, f->T * f->K);
    r.dweights = take_floats(workspace, used, f->T * f->K);
    r.topk_rows = take_floats(workspace, used, topk_floats(&topk) * omp_get_max_threads());
    return r;
}

static size_t router_gemm_workspace(const fmoe_layer_args *f) {
    return larger(gemm_workspace(f->T, f->n, f->d),
                  larger(gemm_workspace(f->T, f->d, f->n), gemm_workspace(f->n, f->d, f->T)));
}

static const void *gate_of(const fmoe_layer_args *f, int side) {
    return (const char *)f->router_gate + side * f->n * f->d * (int64_t)fmoe_dtype_size(f->dtype);
}

static fmoe_status router_logits(const fmoe_layer_args *f, const router *r, void *workspace, size_t bytes) {
    gemm_operand x_hat = by_rows(FMOE_F32, r->x_hat, f->d);
    for (int side = 0; side < 2; side++) {
        gemm_operand gate = by_rows(f->dtype, gate_of(f, side), f->d);
        gemm_target logits = {FMOE_F32, f->router_logits + side * f->T * f->n, f->n};
        TRY(gemm(f->T, f->n, f->d, &x_hat, &gate, gemm_store, &logits, workspace, bytes));
    }
    return FMOE_OK;
}

// [router-backward]
/* dx̂ = dz · gate and dgate = dzᵀ · x̂, a side at a time; then through the norm. */
static fmoe_status router_backward(const layer_args *a, const router *r, const float *others, void *workspace,
                                   size_t bytes) {
    const fmoe_layer_args *f = &a->forward;
    int64_t T = f->T, d = f->d, n = f->n;
    gemm_operand x_hat_t = by_columns(FMOE_F32, r->x_hat, d);
    gemm_target first = {FMOE_F32, r->dx_hat, d};
    gemm_addend second = {r->dx_hat, first};
    for (int side = 0; side < 2; side++) {
        float *dz = r->dlogits + side * T * n;
        gemm_operand dz_rows = by_rows(FMOE_F32, dz, n), dz_t = by_columns(FMOE_F32, dz, n);
        gemm_operand gate_t = by_columns(f->dtype, gate_of(f, side), d);
        gemm_target dgate = {f->dtype, (char *)a->drouter_gate + side * n * d * (int64_t)fmoe_dtype_size(f->dtype), d};
        TRY(gemm(T, d, n, &dz_rows, &gate_t, side ? add_and_store : gemm_store, side ? (void *)&second : &first,
                 workspace, bytes));
        TRY(gemm(n, d, T, &dz_t, &x_hat_t, gemm_store, &dgate, workspace, bytes));
    }
    norm_backward(f, r->x_hat, r->scale, r->dx_hat, others, a->dx);
    return FMOE_OK;
}
// [/router-backward]

/* ---- The layer, step by step */

/* One rung for every step, run in order on float32. */
typedef struct {
    fmoe_rung router, topk, schedule, expert, mlp, topk_backward, expert_backward, mlp_backward;
} pieces;

/* Their arguments. */
typedef struct {
    fmoe_router_args router;
    fmoe_topk_args topk;
    fmoe_schedule_args schedule;
    fmoe_expert_args expert;
    fmoe_mlp_args mlp;
    topk_args topk_backward;
    expert_args expert_backward;
    mlp_args mlp_backward;
} steps;

/* The layer with everything in float32 (copies of what is not), and what passes between its steps. */
typedef struct {
    layer_args a;
    router r;
    float *log_probs, *routed, *pre_activations, *dx_expert;
    int32_t *offsets, *pairs;
    steps s;
    size_t bytes;
} by_steps;

/* A weight or a gradient as float32: where it is, or room for a copy. */
static void *take_copy(const layer_args *a, const void *tensor, int64_t count, void *workspace, size_t *used) {
    void *copy = take_floats(workspace, used, a->forward.dtype == FMOE_F32 ? 0 : count);
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
    const layer_args *a = &l->a;
    const fmoe_layer_args *f = &a->forward;
    int64_t T = f->T, d = f->d, I = f->I, N = f->N, K = f->K, n = f->n;
    l->s.router = (fmoe_router_args){T,
                                     d,
                                     n,
                                     f->training,
                                     FMOE_F32,
                                     f->x,
                                     f->router_gate,
                                     f->running_mean,
                                     f->running_var,
                                     f->router_logits,
                                     l->log_probs};
    l->s.topk =
        (fmoe_topk_args){T, n, K, f->norm_topk_prob, FMOE_F32, f->router_logits, f->indices, f->scores, l->r.weights};
    l->s.schedule = (fmoe_schedule_args){T, K, N, f->indices, l->offsets, l->pairs};
    l->s.expert = (fmoe_expert_args){
        T, d, N, K, true, FMOE_F32, f->x, f->down_embed, f->up_embed, f->indices, l->r.weights, l->routed};
    l->s.mlp = (fmoe_mlp_args){T, d, I, FMOE_F32, f->x, f->gate_proj, f->up_proj, f->down_proj, f->y};
    l->s.topk_backward =
        (topk_args){T, n, K, f->norm_topk_prob, FMOE_F32, f->router_logits, f->indices, l->r.dweights, l->r.dlogits};
    l->s.expert_backward = (expert_args){T,
                                         d,
                                         N,
                                         K,
                                         FMOE_F32,
                                         f->x,
                                         f->down_embed,
                                         f->up_embed,
                                         f->indices,
                                         l->r.weights,
                                         l->pre_activations,
                                         l->offsets,
                                         l->pairs,
                                         a->dy,
                                         l->dx_expert,
                                         a->ddown_embed,
                                         a->dup_embed,
                                         l->r.dweights};
    l->s.mlp_backward = (mlp_args){T,
                                   d,
                                   I,
                                   FMOE_F32,
                                   f->x,
                                   f->gate_proj,
                                   f->up_proj,
                                   f->down_proj,
                                   a->dy,
                                   a->dx,
                                   a->dgate_proj,
                                   a->dup_proj,
                                   a->ddown_proj};
}

static by_steps steps_layout(const layer_args *a, void *workspace) {
    by_steps l = {.a = *a};
    const fmoe_layer_args *f = &a->forward;
    stored_tensor stored[NUM_STORED];
    list_stored(f, stored);
    for (int i = 0; i < NUM_STORED; i++) {
        void *here = take_copy(a, pointer_at(a, stored[i].slot), stored[i].count, workspace, &l.bytes);
        memcpy((char *)&l.a + stored[i].slot, &here, sizeof here);
    }
    l.a.forward.dtype = FMOE_F32;
    l.r = take_router(f, workspace, &l.bytes);
    l.log_probs = take_floats(workspace, &l.bytes, 2 * f->T * f->n);
    l.routed = take_floats(workspace, &l.bytes, f->T * f->d);
    l.pre_activations = take_floats(workspace, &l.bytes, f->T * f->K);
    l.dx_expert = take_floats(workspace, &l.bytes, f->T * f->d);
    l.offsets = take(workspace, &l.bytes, f->N + 1, sizeof *l.offsets);
    l.pairs = take(workspace, &l.bytes, f->T * f->K, sizeof *l.pairs);
    set_steps(&l);
    return l;
}

static size_t rung_workspace(const fmoe_rung *rung, const void *args) {
    return rung->workspace ? rung->workspace(args) : 0;
}

static size_t pieces_workspace(const pieces *with, const layer_args *a) {
    by_steps l = steps_layout(a, NULL);
    const steps *s = &l.s;
    size_t most = router_gemm_workspace(&a->forward);
    most = larger(most, larger(rung_workspace(&with->router, &s->router), rung_workspace(&with->topk, &s->topk)));
    most =
        larger(most, larger(rung_workspace(&with->schedule, &s->schedule), rung_workspace(&with->expert, &s->expert)));
    most = larger(most,
                  larger(rung_workspace(&with->mlp, &s->mlp), rung_workspace(&with->topk_backward, &s->topk_backward)));
    most = larger(most, larger(rung_workspace(&with->expert_backward, &s->expert_backward),
                               rung_workspace(&with->mlp_backward, &s->mlp_backward)));
    return l.bytes + most;
}

static void find_pre_activations(const fmoe_expert_args *e, float *pre_activations) {
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < e->T * e->K; p++)
        pre_activations[p] =
            dot(e->d, (const float *)e->x + p / e->K * e->d, (const float *)e->down + e->indices[p] * e->d);
}

// [by-steps]
static fmoe_status run_steps(const pieces *with, by_steps *l, void *rest, size_t bytes) {
    const fmoe_layer_args *f = &l->a.forward;
    steps *s = &l->s;
    TRY(with->router.run(&s->router, rest, bytes, NULL));
    TRY(with->topk.run(&s->topk, rest, bytes, NULL));
    TRY(with->schedule.run(&s->schedule, rest, bytes, NULL));
    TRY(with->expert.run(&s->expert, rest, bytes, NULL));
    TRY(with->mlp.run(&s->mlp, rest, bytes, NULL));
    add_scaled(f->T * f->d, 1, l->routed, f->y);

    /* And back. What the steps did not keep is computed again. */
    find_pre_activations(&s->expert, l->pre_activations);
    TRY(with->mlp_backward.run(&s->mlp_backward, rest, bytes, NULL));
    TRY(with->expert_backward.run(&s->expert_backward, rest, bytes, NULL));
    TRY(with->topk_backward.run(&s->topk_backward, rest, bytes, NULL));
    add_scaled(f->T * f->d, 1, l->a.dx, l->dx_expert);
    norm(f, false, l->r.x_hat, l->r.scale);
    return router_backward(&l->a, &l->r, l->dx_expert, rest, bytes);
}
// [/by-steps]

static fmoe_status run_pieces(const pieces *with, const layer_args *a, void *workspace, size_t bytes) {
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

static pieces first_rungs(void) {
    return (pieces){chapter2_rungs[0], chapter3_rungs[0],      chapter4_rungs[0],        chapter1_rungs[0],
                    chapter6_rungs[0], chapter9_topk_rungs[0], chapter9_expert_rungs[0], chapter9_mlp_rungs[0]};
}

static pieces best_rungs(void) {
    return (pieces){
        {.run = cpu_router_best, .workspace = cpu_router_best_workspace},
        {.run = cpu_topk_best, .workspace = cpu_topk_best_workspace},
        {.run = cpu_schedule_best, .workspace = cpu_schedule_best_workspace},
        {.run = cpu_expert_scheduled_best, .workspace = cpu_expert_scheduled_best_workspace},
        {.run = cpu_mlp_best, .workspace = cpu_mlp_best_workspace},
        {.run = topk_shared, .workspace = topk_workspace},
        {.run = balanced, .workspace = ordered_workspace},
        {.run = mlp_packed, .workspace = mlp_packed_workspace},
    };
}

static size_t first_workspace(const void *args) {
    pieces with = first_rungs();
    return pieces_workspace(&with, args);
}

static fmoe_status layer_first(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)stream;
    pieces with = first_rungs();
    return run_pieces(&with, args, workspace, workspace_bytes);
}

static size_t best_workspace(const void *args) {
    pieces with = best_rungs();
    return pieces_workspace(&with, args);
}

static fmoe_status layer_best(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)stream;
    pieces with = best_rungs();
    return run_pieces(&with, args, workspace, workspace_bytes);
}

static bool layer_small_enough(const void *args) {
    const fmoe_layer_args *f = args;
    return (double)f->T * (double)f->d * (double)f->I <= 0x1p26;
}

/* ---- The layer with everything kept */

typedef struct {
    router r;
    hidden h;
    ordered o;
    float *pre_activations, *activations, *sums;
    int32_t *offsets, *pairs;
    size_t bytes;
} kept;

static expert_args experts_of(const layer_args *a, const kept *k) {
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
                         .weights = k->r.weights,
                         .pre_activations = k->pre_activations,
                         .offsets = k->offsets,
                         .pairs = k->pairs,
                         .dy = a->dy,
                         .ddown = a->ddown_embed,
                         .dup = a->dup_embed,
                         .dweights = k->r.dweights};
}

static mlp_args mlp_of(const layer_args *a) {
    const fmoe_layer_args *f = &a->forward;
    return (mlp_args){f->T,         f->d,  f->I, f->dtype,      f->x,        f->gate_proj, f->up_proj,
                      f->down_proj, a->dy, NULL, a->dgate_proj, a->dup_proj, a->ddown_proj};
}

static kept kept_layout(const layer_args *a, void *workspace) {
    kept k = {.bytes = 0};
    const fmoe_layer_args *f = &a->forward;
    mlp_args mlp = mlp_of(a);
    k.r = take_router(f, workspace, &k.bytes);
    k.pre_activations = take_floats(workspace, &k.bytes, f->T * f->K);
    k.activations = take_floats(workspace, &k.bytes, f->T * f->K);
    k.sums = take_floats(workspace, &k.bytes, f->T * f->d);
    k.offsets = take(workspace, &k.bytes, f->N + 1, sizeof *k.offsets);
    k.pairs = take(workspace, &k.bytes, f->T * f->K, sizeof *k.pairs);
    expert_args experts = experts_of(a, &k);
    k.h = hidden_layout(&mlp, workspace ? (char *)workspace + k.bytes : NULL);
    k.bytes += k.h.bytes;
    k.o = ordered_layout(&experts, workspace ? (char *)workspace + k.bytes : NULL);
    k.bytes += k.o.bytes;
    return k;
}

static size_t kept_workspace(const void *args) {
    const layer_args *a = args;
    const fmoe_layer_args *f = &a->forward;
    fmoe_topk_args topk = {.T = f->T, .n = f->n, .K = f->K, .norm_topk_prob = f->norm_topk_prob, .dtype = FMOE_F32};
    fmoe_schedule_args schedule = {.T = f->T, .K = f->K, .N = f->N};
    size_t products = larger(router_gemm_workspace(f), mlp_gemm_workspace(f->T, f->d, f->I));
    return kept_layout(a, NULL).bytes +
           larger(products, larger(cpu_topk_best_workspace(&topk), cpu_schedule_best_workspace(&schedule)));
}

// [kept-experts]
/* Forward, and what the way back wants of it: pre-activations expert by expert, then y token by token. */
static void experts_forward(const expert_args *a, const kept *k) {
    const float *x = as_f32(a->dtype, a->x, a->T * a->d, k->o.x);
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
                k->pre_activations[a->pairs[i + j]] = dots[j];
        }
        for (; i < end; i++)
            k->pre_activations[a->pairs[i]] = dot_row(a->d, down, x + a->pairs[i] / a->K * a->d);
    }
#pragma omp parallel for simd schedule(static)
    for (int64_t p = 0; p < a->T * a->K; p++)
        k->activations[p] = k->pre_activations[p] * sigmoid(k->pre_activations[p]) * a->weights[p];
    gather_rows(a->T, a->d, a->K, a->dtype, a->up, a->indices, k->activations, k->o.rows,
                (ROWS + 2) * ((a->d + 15) / 16 * 16), FMOE_F32, k->sums);
}
// [/kept-experts]

static fmoe_status kept_forward(const layer_args *a, const kept *k, const expert_args *experts, const mlp_args *mlp,
                                void *rest, size_t bytes) {
    const fmoe_layer_args *f = &a->forward;
    norm(f, true, k->r.x_hat, k->r.scale);
    TRY(router_logits(f, &k->r, rest, bytes));
    fmoe_topk_args topk = {f->T,       f->n,      f->K,        f->norm_topk_prob, FMOE_F32, f->router_logits,
                           f->indices, f->scores, k->r.weights};
    TRY(cpu_topk_best(&topk, rest, bytes, NULL));
    fmoe_schedule_args schedule = {f->T, f->K, f->N, f->indices, k->offsets, k->pairs};
    TRY(cpu_schedule_best(&schedule, rest, bytes, NULL));
    experts_forward(experts, k);
    TRY(mlp_pre_activations(f->T, f->d, f->I, f->dtype, mlp->x, mlp->gate, mlp->up, &k->h, rest, bytes));
    gemm_operand h = by_rows(FMOE_F32, k->h.h, f->I), down = by_rows(f->dtype, mlp->down, f->I);
    gemm_addend y = {k->sums, {f->dtype, f->y, f->d}};
    return gemm(f->T, f->d, f->I, &h, &down, add_and_store, &y, rest, bytes);
}

// [kept]
static fmoe_status layer_kept(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)stream;
    const layer_args *a = args;
    const fmoe_layer_args *f = &a->forward;
    if (f->training && f->T == 1)
        return fmoe_fail(FMOE_BATCH_OF_ONE, "tokens = 1 is below 2, which the unbiased variance needs in training");
    kept k = kept_layout(a, workspace);
    char *rest = (char *)workspace + k.bytes;
    size_t bytes = workspace_bytes - k.bytes;
    expert_args experts = experts_of(a, &k);
    mlp_args mlp = mlp_of(a);
    TRY(kept_forward(a, &k, &experts, &mlp, rest, bytes));

    /* dx grows in k.sums: the experts' part, the MLP's, and at the end the router's. */
    expert_gradients(&experts, &k.o);
    gather_rows(f->T, f->d, f->K, f->dtype, f->down_embed, f->indices, k.o.ds, k.o.rows,
                (ROWS + 2) * ((f->d + 15) / 16 * 16), FMOE_F32, k.sums);
    TRY(mlp_gradients(&mlp, &k.h, k.sums, (gemm_target){FMOE_F32, k.sums, f->d}, rest, bytes));
    topk_args topk = {f->T,       f->n,         f->K,       f->norm_topk_prob, FMOE_F32, f->router_logits,
                      f->indices, k.r.dweights, k.r.dlogits};
    TRY(topk_shared(&topk, k.r.topk_rows, 0, NULL));
    return router_backward(a, &k.r, k.sums, rest, bytes);
}
// [/kept]

const fmoe_rung chapter9_layer_rungs[] = {
    {"first-rungs", LEVEL_CORE, BACKEND_CPU,
     "The first rung of every step, forward and back, in float32; only the router's way back is in tiles already.",
     layer_first, .workspace = first_workspace, .supports = layer_small_enough},
    {"best-rungs", LEVEL_CORE, BACKEND_CPU, "The best rung of every step in their places.", layer_best,
     .workspace = best_workspace},
    {"kept", LEVEL_CORE, BACKEND_CPU,
     "The forward pass keeps x̂, both kinds of pre-activations and the schedule: eleven products become nine, the "
     "experts' first phase and the norm run once.",
     layer_kept, .workspace = kept_workspace},
    {.run = NULL},
};
