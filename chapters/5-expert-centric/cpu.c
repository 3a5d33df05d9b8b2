/* Chapter 5's ladder: the expert step along an expert-major schedule.
 *
 * Every rung builds its own schedule: the pairs p = t·K + k in the order of their experts. Along it the rows of `down`
 * are walked from front to back, once each, and what is gathered are the rows of x, a table small enough to stay in
 * the second-level cache. */
#include "../rows.h"
#include "../steps.h"
#include "../vec.h"

#include <math.h>
#include <omp.h>
#include <string.h>

static float silu(float s) {
    return s / (1 + expf(-s));
}

/* ---- Workspace --------------------------------------------------------------------------------------------------- */

typedef struct {
    int32_t *offsets;  /* [N + 1] */
    int32_t *pairs;    /* [T·K] */
    float *activation; /* [T·K], token-major: first ⟨x, down⟩, then its silu times the routing weight */
    const float *x;    /* [T, d]: the tokens as float32 */
    float *scratch;    /* [threads, 1 + ROWS, d]: an output row, and rows of experts as float32 */
    float *tile;       /* [threads, T, width]: slices of y */
    int64_t width;     /* columns of a slice */
    size_t bytes;
} plan;

/* As many columns as let a slice of y stay in a second-level cache beside what streams past: 512 KB of floats. */
static int64_t slice_width(const fmoe_expert_args *a) {
    int64_t width = (1 << 17) / (a->T > 0 ? a->T : 1) / LANES * LANES;
    return width < LANES ? LANES : width > 128 ? 128 : width;
}

static int64_t num_slices(const fmoe_expert_args *a) {
    return (a->d + slice_width(a) - 1) / slice_width(a);
}

/* More threads than slices have nothing to do. */
static int slice_threads(const fmoe_expert_args *a) {
    int64_t slices = num_slices(a);
    return slices < omp_get_max_threads() ? (int)slices : omp_get_max_threads();
}

/* The next `count` elements of 4 bytes; NULL while only the size is asked for. */
static void *take(void *workspace, size_t *used, size_t count) {
    void *at = workspace ? (char *)workspace + *used : NULL;
    *used += count * 4;
    return at;
}

/* The one place that knows what lies where; workspace may be NULL to ask for the size alone. */
static plan lay_out(const fmoe_expert_args *a, void *workspace, bool tiles) {
    plan p = {.width = slice_width(a), .x = a->x};
    p.offsets = take(workspace, &p.bytes, padded(a->N + 1));
    p.pairs = take(workspace, &p.bytes, padded(a->T * a->K));
    p.activation = take(workspace, &p.bytes, padded(a->T * a->K));
    if (a->dtype != FMOE_F32)
        p.x = take(workspace, &p.bytes, padded(a->T * a->d));
    p.scratch = take(workspace, &p.bytes, (size_t)omp_get_max_threads() * (1 + ROWS) * padded(a->d));
    if (tiles)
        p.tile = take(workspace, &p.bytes, (size_t)slice_threads(a) * (size_t)(a->T * p.width));
    return p;
}

static float *scratch_row(const fmoe_expert_args *a, const plan *p, int row) {
    return p->scratch + (size_t)(omp_get_thread_num() * (1 + ROWS) + row) * padded(a->d);
}

static size_t two_phases_workspace(const void *args) {
    return lay_out(args, NULL, false).bytes;
}

static size_t slices_workspace(const void *args) {
    return lay_out(args, NULL, true).bytes;
}

/* ---- What every rung begins with --------------------------------------------------------------------------------- */

/* 16-bit tokens become float32 once, not once a pair. */
static void convert_tokens(const fmoe_expert_args *a, const plan *p) {
    if (a->dtype == FMOE_F32)
        return;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < a->T; t++)
        load_row(a->dtype, a->x, t, a->d, (float *)p->x + t * a->d);
}

// [schedule]
/* Chapter 4's counting sort. Counting one place up makes offsets[e] the start of e; placing moves it to the end of e,
 * which is the start of e + 1. */
static void build_schedule(const fmoe_expert_args *a, const plan *p) {
    memset(p->offsets, 0, (size_t)(a->N + 1) * sizeof *p->offsets);
    for (int64_t i = 0; i < a->T * a->K; i++)
        p->offsets[a->indices[i] + 1]++;
    for (int64_t e = 0; e < a->N; e++)
        p->offsets[e + 1] += p->offsets[e];
    for (int64_t i = 0; i < a->T * a->K; i++)
        p->pairs[p->offsets[a->indices[i]]++] = (int32_t)i;
    memmove(p->offsets + 1, p->offsets, (size_t)a->N * sizeof *p->offsets);
    p->offsets[0] = 0;
}
// [/schedule]

/* Positions and pairs are int32_t. */
static bool fits(const void *args) {
    const fmoe_expert_args *a = args;
    return a->T <= INT32_MAX / a->K;
}

static inline int64_t token_of(const fmoe_expert_args *a, const plan *p, int64_t position) {
    return p->pairs[position] / (int32_t)a->K;
}

/* ---- One thread, one phase --------------------------------------------------------------------------------------- */

// [grouped]
static fmoe_status grouped(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    plan p = lay_out(a, workspace, false);
    float *y = (float *)((char *)workspace + p.bytes); /* [T, d] */
    (void)workspace_bytes, (void)stream;
    build_schedule(a, &p);
    convert_tokens(a, &p);
    memset(y, 0, (size_t)(a->T * a->d) * sizeof *y);
    for (int64_t e = 0; e < a->N; e++) {
        if (p.offsets[e] == p.offsets[e + 1])
            continue;
        const float *down = load_row(a->dtype, a->down, e, a->d, scratch_row(a, &p, 1));
        const float *up = load_row(a->dtype, a->up, e, a->d, scratch_row(a, &p, 2));
        for (int64_t i = p.offsets[e]; i < p.offsets[e + 1]; i++) {
            int64_t pair = p.pairs[i], t = token_of(a, &p, i);
            float s = dot_row(a->d, down, p.x + t * a->d);
            add_row(a->d, silu(s) * a->weights[pair], up, y + t * a->d);
        }
    }
    fmoe_from_f32(a->dtype, a->T * a->d, y, a->y);
    return FMOE_OK;
}
// [/grouped]

static size_t grouped_workspace(const void *args) {
    const fmoe_expert_args *a = args;
    return two_phases_workspace(a) + (size_t)(a->T * a->d) * sizeof(float);
}

// [fetch]
enum { AHEAD = 32 };

/* Asks for columns first to first + width − 1 of a row, long before they are used. */
static inline void fetch_row(const fmoe_expert_args *a, const void *table, int64_t row, int64_t first, int64_t width) {
    int64_t size = (int64_t)fmoe_dtype_size(a->dtype);
    const char *at = (const char *)table + (row * a->d + first) * size;
    for (int64_t line = 0; line < width * size; line += 64)
        __builtin_prefetch(at + line);
}
// [/fetch]

/* ---- Two phases -------------------------------------------------------------------------------------------------- */

// [first-phase]
/* Pre-activations of the schedule's positions first to last − 1. A pair has one place in the schedule, so whoever has
 * the position is the only one to write the pair's pre-activation. */
static inline void pre_activations(const fmoe_expert_args *a, const plan *p, int64_t first, int64_t last, bool fetch) {
    for (int64_t i = first; i < last;) {
        int64_t e = a->indices[p->pairs[i]], end = p->offsets[e + 1] < last ? p->offsets[e + 1] : last;
        if (fetch && i + AHEAD < last)
            fetch_row(a, a->down, a->indices[p->pairs[i + AHEAD]], 0, a->d);
        const float *down = load_row(a->dtype, a->down, e, a->d, scratch_row(a, p, 1));
        for (; i < end; i++)
            p->activation[p->pairs[i]] = dot_row(a->d, down, p->x + token_of(a, p, i) * a->d);
    }
}
// [/first-phase]

static void activate(const fmoe_expert_args *a, const plan *p, int64_t t) {
    for (int64_t i = t * a->K; i < (t + 1) * a->K; i++)
        p->activation[i] = silu(p->activation[i]) * a->weights[i];
}

// [second-phase]
/* Token t's output: added up in one row that never leaves the first-level cache, rounded and stored once
 * (chapter 8, which adds to it before it rounds, has it stored as float32). */
static inline void output(const fmoe_expert_args *a, const plan *p, int64_t t, fmoe_dtype y_dtype, bool fetch) {
    float *sum = scratch_row(a, p, 0);
    const float *row[ROWS];
    activate(a, p, t);
    memset(sum, 0, (size_t)a->d * sizeof *sum);
    int64_t i = t * a->K, end = i + a->K;
    for (; i + ROWS <= end; i += ROWS) {
        for (int j = 0; j < ROWS; j++) {
            if (fetch && i + ROWS + j < a->T * a->K)
                fetch_row(a, a->up, a->indices[i + ROWS + j], 0, a->d);
            row[j] = load_row(a->dtype, a->up, a->indices[i + j], a->d, scratch_row(a, p, 1 + j));
        }
        add_rows(a->d, p->activation + i, row, sum);
    }
    for (; i < end; i++)
        add_row(a->d, p->activation[i], load_row(a->dtype, a->up, a->indices[i], a->d, scratch_row(a, p, 1)), sum);
    store_row(y_dtype, a->y, t, a->d, sum);
}
// [/second-phase]

static inline void outputs(const fmoe_expert_args *a, const plan *p, fmoe_dtype y_dtype, bool fetch) {
#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t t = 0; t < a->T; t++)
        output(a, p, t, y_dtype, fetch);
}

// [by-expert]
static fmoe_status by_expert(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    plan p = lay_out(a, workspace, false);
    (void)workspace_bytes, (void)stream;
    build_schedule(a, &p);
    convert_tokens(a, &p);
#pragma omp parallel
    {
        int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        pre_activations(a, &p, p.offsets[a->N * me / threads], p.offsets[a->N * (me + 1) / threads], false);
    }
    outputs(a, &p, a->dtype, false);
    return FMOE_OK;
}
// [/by-expert]

/* ---- Balance ----------------------------------------------------------------------------------------------------- */

// [balanced]
enum { CHUNK = 512 };

/* Chunks of as many pairs each, whatever experts they belong to: a busy expert is shared by many chunks, a chunk holds
 * many idle ones. */
static inline void balanced_pre_activations(const fmoe_expert_args *a, const plan *p, bool fetch) {
    int64_t count = a->T * a->K;
#pragma omp parallel for schedule(dynamic)
    for (int64_t first = 0; first < count; first += CHUNK)
        pre_activations(a, p, first, first + CHUNK < count ? first + CHUNK : count, fetch);
}
// [/balanced]

static fmoe_status balanced(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    plan p = lay_out(a, workspace, false);
    (void)workspace_bytes, (void)stream;
    build_schedule(a, &p);
    convert_tokens(a, &p);
    balanced_pre_activations(a, &p, false);
    outputs(a, &p, a->dtype, false);
    return FMOE_OK;
}

/* ---- Nobody waits ------------------------------------------------------------------------------------------------ */

fmoe_status cpu_expert_scheduled_into(const fmoe_expert_args *a, fmoe_dtype y_dtype, void *workspace) {
    plan p = lay_out(a, workspace, false);
    build_schedule(a, &p);
    convert_tokens(a, &p);
    balanced_pre_activations(a, &p, true);
    outputs(a, &p, y_dtype, true);
    return FMOE_OK;
}

fmoe_status cpu_expert_scheduled_best(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    (void)workspace_bytes, (void)stream;
    return cpu_expert_scheduled_into(a, a->dtype, workspace);
}

size_t cpu_expert_scheduled_best_workspace(const void *args) {
    return two_phases_workspace(args);
}

/* ---- Column slices ----------------------------------------------------------------------------------------------- */

// [slice]
/* Columns first to first + width − 1 of y: the same columns of `up` stream past from front to back, once, and the
 * slice of y that they are added to stays in the cache. */
static void slice(const fmoe_expert_args *a, const plan *p, int64_t first, float *tile) {
    int64_t width = a->d - first < p->width ? a->d - first : p->width, size = (int64_t)fmoe_dtype_size(a->dtype);
    int64_t count = a->T * a->K;
    memset(tile, 0, (size_t)(a->T * width) * sizeof *tile);
    for (int64_t i = 0; i < count;) {
        int64_t e = a->indices[p->pairs[i]], end = p->offsets[e + 1];
        if (i + AHEAD < count)
            fetch_row(a, a->up, a->indices[p->pairs[i + AHEAD]], first, width);
        const char *stored = (const char *)a->up + (e * a->d + first) * size;
        const float *up = load_row(a->dtype, stored, 0, width, scratch_row(a, p, 1));
        for (; i < end; i++)
            add_row(width, p->activation[p->pairs[i]], up, tile + token_of(a, p, i) * width);
    }
    for (int64_t t = 0; t < a->T; t++)
        store_row(a->dtype, (char *)a->y + (t * a->d + first) * size, 0, width, tile + t * width);
}
// [/slice]

static fmoe_status slices(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    plan p = lay_out(a, workspace, true);
    (void)workspace_bytes, (void)stream;
    build_schedule(a, &p);
    convert_tokens(a, &p);
    balanced_pre_activations(a, &p, true);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < a->T; t++)
        activate(a, &p, t);
#pragma omp parallel for schedule(dynamic) num_threads(slice_threads(a))
    for (int64_t first = 0; first < a->d; first += p.width)
        slice(a, &p, first, p.tile + (size_t)omp_get_thread_num() * (size_t)(a->T * p.width));
    return FMOE_OK;
}

/* ---- The ladder -------------------------------------------------------------------------------------------------- */

const fmoe_rung chapter5_rungs[] = {
    {.name = "token-centric",
     .idea = "Where chapter 1 ended: token by token, rows asked for ahead of time, no schedule.",
     .run = cpu_expert_token_best,
     .workspace = cpu_expert_token_best_workspace},
    {.name = "grouped",
     .idea = "Expert by expert on one thread: each row of the tables is read once, in order, and y is added to in "
             "memory.",
     .run = grouped,
     .workspace = grouped_workspace,
     .supports = fits},
    {.name = "by expert",
     .idea = "Two phases, so that nobody adds to another's row: threads own equal ranges of experts, then tokens; "
             "skew leaves one thread with most of the pairs.",
     .run = by_expert,
     .workspace = two_phases_workspace,
     .supports = fits},
    {.name = "balanced",
     .idea = "The first phase is cut into equal numbers of pairs in place of equal numbers of experts.",
     .run = balanced,
     .workspace = two_phases_workspace,
     .supports = fits},
    {.name = "prefetch",
     .idea = "Both phases know which rows come next and ask for them ahead of time.",
     .run = cpu_expert_scheduled_best,
     .workspace = cpu_expert_scheduled_best_workspace,
     .supports = fits},
    {.name = "slices",
     .idea = "The second phase expert by expert too, a slice of columns at a time: each row of `up` is read once and "
             "stays close while all its tokens pass, but y is loaded and stored a pair.",
     .run = slices,
     .workspace = slices_workspace,
     .supports = fits},
    {0},
};
