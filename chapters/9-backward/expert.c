/* expert_backward: from dy to dx, both tables and the routing weights. Every row of a gradient has one owner, and its
 * sum has one order. */
#include "backward.h"

#include <string.h>

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
static float *carve_rows(const expert_args *a, void *workspace, size_t *used, int64_t workers) {
    return carve_floats(workspace, used, workers * 5 * (int64_t)padded(a->d));
}

static float *worker_rows(const expert_args *a, float *rows, int64_t worker) {
    return rows + (size_t)worker * 5 * padded(a->d);
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
    c.ddown = carve_floats(workspace, &c.bytes, count * a->N * a->d);
    c.dup = carve_floats(workspace, &c.bytes, count * a->N * a->d);
    c.rows = carve_rows(a, workspace, &c.bytes, count);
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
    float *sums = carve_rows(a, workspace, &used, omp_get_max_threads());
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
    carve_rows(args, NULL, &used, omp_get_max_threads());
    return used;
}

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

ordered carve_ordered(const expert_args *a, void *workspace, size_t *used) {
    ordered o;
    int64_t copied = a->dtype == FMOE_F32 ? 0 : a->T * a->d;
    o.x = carve_floats(workspace, used, copied);
    o.dy = carve_floats(workspace, used, copied);
    o.ds = carve_floats(workspace, used, a->T * a->K);
    o.rows = carve_floats(workspace, used, omp_get_max_threads() * (ROWS + 2) * (int64_t)padded(a->d));
    o.items = carve(workspace, used, (size_t)max_items(a) * sizeof *o.items);
    o.parts = carve_floats(workspace, used, 2 * a->d * max_parts(a));
    return o;
}

size_t cpu_expert_backward_best_workspace(const void *args) {
    size_t used = 0;
    carve_ordered(args, NULL, &used);
    return used;
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
void gather_rows(const expert_args *a, const ordered *o, const void *table, const float *scale, fmoe_dtype sums_dtype,
                 void *sums) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < a->T; t++) {
        float *rows = thread_rows(a, o), *sum = rows + ROWS * a->d;
        int64_t p = t * a->K, end = p + a->K;
        memset(sum, 0, (size_t)a->d * sizeof *sum);
        for (; p + ROWS <= end; p += ROWS) {
            const float *eight[ROWS];
            for (int j = 0; j < ROWS; j++)
                eight[j] = load_row(a->dtype, table, a->indices[p + j], a->d, rows + j * a->d);
            add_rows(a->d, scale + p, eight, sum);
        }
        for (; p < end; p++)
            add_row(a->d, scale[p], load_row(a->dtype, table, a->indices[p], a->d, rows), sum);
        store_row(sums_dtype, sums, t, a->d, sum);
    }
}
// [/gather-rows]

static fmoe_status every_expert(const expert_args *a, void *workspace, add_pairs_fn *add) {
    size_t used = 0;
    ordered o = carve_ordered(a, workspace, &used);
    const float *x = as_f32(a->dtype, a->x, a->T * a->d, o.x), *dy = as_f32(a->dtype, a->dy, a->T * a->d, o.dy);
#pragma omp parallel for schedule(static)
    for (int64_t e = 0; e < a->N; e++)
        one_expert(a, &o, x, dy, e, add);
    gather_rows(a, &o, a->down, o.ds, a->dtype, a->dx);
    return FMOE_OK;
}

static fmoe_status transposed(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    return every_expert(args, workspace, add_pairs);
}

static fmoe_status vectorised(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    return every_expert(args, workspace, add_eight_pairs);
}

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

void expert_gradients(const expert_args *a, const ordered *o) {
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

fmoe_status cpu_expert_backward_best(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const expert_args *a = args;
    size_t used = 0;
    ordered o = carve_ordered(a, workspace, &used);
    expert_gradients(a, &o);
    gather_rows(a, &o, a->down, o.ds, a->dtype, a->dx);
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
     transposed, .workspace = cpu_expert_backward_best_workspace},
    {"vectorised", LEVEL_CORE, BACKEND_CPU,
     "Eight pairs of an expert at a time in vector registers: a gradient row is loaded and stored once for eight.",
     vectorised, .workspace = cpu_expert_backward_best_workspace},
    {"balanced", LEVEL_CORE, BACKEND_CPU,
     "Runs of at most 256 pairs, handed out as threads become free: one hot expert no longer holds up the rest.",
     cpu_expert_backward_best, .workspace = cpu_expert_backward_best_workspace},
    {.run = NULL},
};
