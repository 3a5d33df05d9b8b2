/* Chapter 7's ladder: the same expert step by four strategies, and the one that picks between them. */
#include "strategies.h"

#include "../gemm.h"
#include "../rows.h"
#include "../vec.h"
#include "../../ref_cpu/check.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

static int64_t num_pairs(const fmoe_expert_args *a) {
    return a->T * a->K;
}

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* ---- Workspace --------------------------------------------------------------------------------------------------- */

/* Parts of a workspace, one behind the other on whole cache lines. Without memory it only adds up. */
typedef struct {
    char *memory;
    size_t used;
} space;

static void *take(space *s, size_t bytes) {
    void *part = s->memory ? s->memory + s->used : NULL;
    s->used += (bytes + 63) / 64 * 64;
    return part;
}

/* ---- Pairs by block of experts ----------------------------------------------------------------------------------- */

/* Experts in blocks of `width` neighbours, and the schedule of chapter 4 with blocks in the place of experts: a block's
 * pairs rise, so that a token's pairs in it lie together. */
typedef struct {
    int64_t width, count;
    int32_t *block_of; /* [T, K]; later the tokens, see find_groups */
    int32_t *offsets;  /* [count + 1] */
    int32_t *pairs;    /* [T·K] */
    int32_t *begins;   /* [T·K] */
    void *scratch;
    size_t scratch_bytes;
} blocks;

static fmoe_schedule_args schedule_of(const fmoe_expert_args *a, const blocks *b) {
    return (fmoe_schedule_args){a->T, a->K, b->count, b->block_of, b->offsets, b->pairs};
}

static void lay_out_blocks(const fmoe_expert_args *a, int64_t width, space *s, blocks *b) {
    b->width = width;
    b->count = (a->N + width - 1) / width;
    size_t bytes = (size_t)num_pairs(a) * sizeof(int32_t);
    b->block_of = take(s, bytes);
    b->offsets = take(s, (size_t)(b->count + 1) * sizeof(int32_t));
    b->pairs = take(s, bytes);
    b->begins = take(s, bytes);
    fmoe_schedule_args schedule = schedule_of(a, b);
    b->scratch_bytes = cpu_schedule_best_workspace(&schedule);
    b->scratch = take(s, b->scratch_bytes);
}

// [blocks]
static fmoe_status make_blocks(const fmoe_expert_args *a, const blocks *b) {
#pragma omp parallel for schedule(static)
    for (int64_t pair = 0; pair < num_pairs(a); pair++) {
        int32_t expert = a->indices[pair];
        b->block_of[pair] = expert < 0 || expert >= a->N ? -1 : expert / (int32_t)b->width;
    }
    fmoe_schedule_args schedule = schedule_of(a, b);
    return cpu_schedule_best(&schedule, b->scratch, b->scratch_bytes, NULL);
}
// [/blocks]

/* Without a call, so that loops over it vectorise. */
static inline float silu(float s) {
    return s / (1 + exp_f32(-s));
}

static gemm_operand table_rows(const fmoe_expert_args *a, const void *table, int64_t first) {
    const char *data = (const char *)table + first * a->d * (int64_t)fmoe_dtype_size(a->dtype);
    return (gemm_operand){.dtype = a->dtype, .data = data, .row_stride = a->d, .depth_stride = 1};
}

/* ---- Dense under a mask ------------------------------------------------------------------------------------------ */

/* What is in memory at a time is a tile of T tokens × a block of experts, about 1 MB, never T × N. */
enum { TILE_FLOATS = 1 << 18, MIN_WIDTH = 256 };

typedef struct {
    int shift;          /* a block is 1 << shift experts */
    int64_t count;      /* of blocks */
    int32_t *starts;    /* [T, count + 1]: where a token's pairs of each block begin in the next two arrays */
    int32_t *experts;   /* [T, K]: a token's experts, block by block */
    float *weights;     /* [T, K]: their routing weights; later their activations */
    float *tile;        /* [T, block]: pre-activations, then activations */
    float *y;           /* [T, d] */
    float *row_buffers; /* [threads, d] */
    void *gemm_scratch;
    size_t gemm_bytes;
} dense;

static size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

static size_t lay_out_dense(const fmoe_expert_args *a, void *workspace, dense *s) {
    space w = {workspace, 0};
    s->shift = 0;
    while (((int64_t)1 << s->shift) < MIN_WIDTH ||
           (a->T << (s->shift + 1) <= TILE_FLOATS && (int64_t)1 << s->shift < a->N))
        s->shift++;
    int64_t width = smaller((int64_t)1 << s->shift, a->N);
    s->count = (a->N - 1) / ((int64_t)1 << s->shift) + 1;
    s->starts = take(&w, (size_t)(a->T * (s->count + 1)) * sizeof(int32_t));
    s->experts = take(&w, (size_t)num_pairs(a) * sizeof(int32_t));
    s->weights = take(&w, (size_t)num_pairs(a) * sizeof(float));
    s->tile = take(&w, (size_t)(a->T * width) * sizeof(float));
    s->y = take(&w, (size_t)(a->T * a->d) * sizeof(float));
    s->row_buffers = take(&w, (size_t)omp_get_max_threads() * (size_t)a->d * sizeof(float));
    s->gemm_bytes = larger(gemm_workspace(a->T, width, a->d), gemm_workspace(a->T, a->d, width));
    s->gemm_scratch = take(&w, s->gemm_bytes);
    return w.used;
}

size_t dense_workspace(const void *args) {
    dense s;
    return lay_out_dense(args, NULL, &s);
}

// [token-sort]
/* A token's pairs by block: chapter 4's counting sort, once a token, in the first-level cache. False if an index is
 * none. */
static bool sort_token(const fmoe_expert_args *a, const dense *s, int64_t t) {
    int32_t *start = s->starts + t * (s->count + 1);
    memset(start, 0, (size_t)(s->count + 1) * sizeof *start);
    for (int64_t pair = t * a->K; pair < (t + 1) * a->K; pair++) {
        if (a->indices[pair] < 0 || a->indices[pair] >= a->N)
            return false;
        start[(a->indices[pair] >> s->shift) + 1]++;
    }
    for (int64_t block = 0; block < s->count; block++)
        start[block + 1] += start[block];
    for (int64_t pair = t * a->K; pair < (t + 1) * a->K; pair++) {
        int64_t to = t * a->K + start[a->indices[pair] >> s->shift]++;
        s->experts[to] = a->indices[pair];
        s->weights[to] = a->weights[pair];
    }
    memmove(start + 1, start, (size_t)s->count * sizeof *start);
    start[0] = 0;
    return true;
}
// [/token-sort]

typedef struct {
    int64_t begin, end;
} run;

/* A token's pairs of one block. */
static run run_of(const fmoe_expert_args *a, const dense *s, int64_t t, int64_t block) {
    const int32_t *start = s->starts + t * (s->count + 1) + block;
    return (run){t * a->K + start[0], t * a->K + start[1]};
}

// [mask]
/* Turns a tile of pre-activations into one of activations: first the chosen pairs are picked, then everything is set
 * to zero, then they come back. An expert that a token chose twice adds up. */
static void mask_tile(const fmoe_expert_args *a, const dense *s, int64_t block, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < a->T; t++) {
        float *row = s->tile + t * width;
        int64_t first = block << s->shift;
        run r = run_of(a, s, t, block);
#pragma omp simd
        for (int64_t i = r.begin; i < r.end; i++)
            s->weights[i] *= silu(row[s->experts[i] - first]);
        memset(row, 0, (size_t)width * sizeof *row);
        for (int64_t i = r.begin; i < r.end; i++)
            row[s->experts[i] - first] += s->weights[i];
    }
}
// [/mask]

/* x − x is zero for every finite number and NaN for the others. */
static bool all_finite(const fmoe_expert_args *a, int64_t first, int64_t rows, float *row_buffers) {
    bool finite = true;
#pragma omp parallel for schedule(static) reduction(&& : finite)
    for (int64_t e = first; e < first + rows; e++) {
        const float *row = load_row(a->dtype, a->up, e, a->d, row_buffers + omp_get_thread_num() * a->d);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < a->d; i++)
            sum += row[i] - row[i];
        finite = finite && sum == 0;
    }
    return finite;
}

/* A block's part of y pair by pair, as the definition has it. */
static void add_pairs(const fmoe_expert_args *a, const dense *s, int64_t block) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < a->T; t++) {
        run r = run_of(a, s, t, block);
        for (int64_t i = r.begin; i < r.end; i++) {
            float *buffer = s->row_buffers + omp_get_thread_num() * a->d;
            add_row(a->d, s->weights[i], load_row(a->dtype, a->up, s->experts[i], a->d, buffer), s->y + t * a->d);
        }
    }
}

typedef struct {
    float *y;
    int64_t d;
} sum_target;

static void add_tile(void *context, int64_t row, int64_t column, int64_t rows, int64_t columns,
                     const float (*values)[GEMM_NR]) {
    const sum_target *target = context;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++)
            target->y[(row + r) * target->d + column + c] += values[r][c];
}

// [dense]
static fmoe_status dense_block(const fmoe_expert_args *a, const dense *s, int64_t block) {
    int64_t first = block << s->shift, width = smaller((int64_t)1 << s->shift, a->N - first);
    gemm_operand x = table_rows(a, a->x, 0), down = table_rows(a, a->down, first), up = table_rows(a, a->up, first);
    gemm_target target = {FMOE_F32, s->tile, width};
    TRY(gemm(a->T, width, a->d, &x, &down, gemm_store, &target, s->gemm_scratch, s->gemm_bytes));
    mask_tile(a, s, block, width);

    /* Zero times infinity is NaN: a block that holds such a row must not be multiplied by the mask's zeros. */
    if (!all_finite(a, first, width, s->row_buffers)) {
        add_pairs(a, s, block);
        return FMOE_OK;
    }
    gemm_operand tile = {.dtype = FMOE_F32, .data = s->tile, .row_stride = width, .depth_stride = 1};
    up.row_stride = 1; /* columns of up: y = tile · up */
    up.depth_stride = a->d;
    sum_target sum = {s->y, a->d};
    return gemm(a->T, a->d, width, &tile, &up, add_tile, &sum, s->gemm_scratch, s->gemm_bytes);
}
// [/dense]

fmoe_status dense_under_a_mask(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    (void)workspace_bytes, (void)stream;
    dense s;
    lay_out_dense(a, workspace, &s);
    bool in_range = true;
#pragma omp parallel for schedule(static) reduction(&& : in_range)
    for (int64_t t = 0; t < a->T; t++)
        in_range = sort_token(a, &s, t) && in_range;
    if (!in_range)
        return FMOE_BAD_INDEX;
    memset(s.y, 0, (size_t)(a->T * a->d) * sizeof(float));
    for (int64_t block = 0; block < s.count; block++)
        TRY(dense_block(a, &s, block));
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < a->T; t++)
        store_row(a->dtype, a->y, t, a->d, s.y + t * a->d);
    return FMOE_OK;
}

/* ---- Cartesian rows ---------------------------------------------------------------------------------------------- */

enum { RUN = 240 }; /* tokens a task takes: a multiple of GEMM_MR, many enough to pay for packing a row's experts */

typedef struct {
    blocks b;           /* of n experts: the rows of the Cartesian grid */
    int32_t *counts;    /* [b.count]: tokens that chose from each row */
    float *activations; /* [T, K]: first pre-activations */
    float *tiles;       /* [threads, RUN, n] */
    float *buffers;     /* [threads, (1 + ROWS) · d]: a token's sum, rows of experts */
    char *gemm_scratch; /* [threads, gemm_bytes] */
    size_t gemm_bytes;
} cartesian;

static size_t lay_out_rows(const fmoe_expert_args *a, void *workspace, cartesian *s) {
    space w = {workspace, 0};
    size_t threads = (size_t)omp_get_max_threads();
    lay_out_blocks(a, fmoe_num_keys(a->N), &w, &s->b);
    s->counts = take(&w, (size_t)s->b.count * sizeof(int32_t));
    s->activations = take(&w, (size_t)num_pairs(a) * sizeof(float));
    s->tiles = take(&w, threads * (size_t)(RUN * s->b.width) * sizeof(float));
    s->buffers = take(&w, threads * (size_t)((1 + ROWS) * a->d) * sizeof(float));
    s->gemm_bytes = (gemm_serial_workspace(smaller(RUN, a->T), s->b.width, a->d) + 63) / 64 * 64;
    s->gemm_scratch = take(&w, threads * s->gemm_bytes);
    return w.used;
}

size_t rows_workspace(const void *args) {
    cartesian s;
    return lay_out_rows(args, NULL, &s);
}

// [groups]
/* The distinct tokens among a row's pairs, and where each one's pairs begin. Tokens rise as pairs do, so one walk
 * finds them; they take the place of block_of, which the schedule has done with. */
static int32_t find_groups(const fmoe_expert_args *a, const blocks *b, int64_t row) {
    int32_t first = b->offsets[row], groups = 0;
    for (int32_t i = first; i < b->offsets[row + 1]; groups++) {
        int32_t token = (int32_t)(b->pairs[i] / a->K);
        b->block_of[first + groups] = token;
        b->begins[first + groups] = i;
        while (i < b->offsets[row + 1] && b->pairs[i] < (token + 1) * a->K)
            i++;
    }
    return groups;
}
// [/groups]

static fmoe_status group_rows(const fmoe_expert_args *a, const cartesian *s) {
    TRY(make_blocks(a, &s->b));
#pragma omp parallel for schedule(dynamic)
    for (int64_t row = 0; row < s->b.count; row++)
        s->counts[row] = find_groups(a, &s->b, row);
    return FMOE_OK;
}

fmoe_status count_rows(const fmoe_expert_args *a, void *workspace, row_counts *counts) {
    cartesian s;
    lay_out_rows(a, workspace, &s);
    TRY(group_rows(a, &s));
    *counts = (row_counts){0, 0};
    for (int64_t row = 0; row < s.b.count; row++) {
        counts->groups += s.counts[row];
        counts->products += s.counts[row] * smaller(s.b.width, a->N - row * s.b.width);
    }
    return FMOE_OK;
}

// [row-tile]
/* Up to RUN of a row's tokens, gathered, times all of the row's experts; the chosen pairs are picked from the tile. */
static fmoe_status row_run(const fmoe_expert_args *a, const cartesian *s, int64_t row, int64_t run, float *tile,
                           void *scratch) {
    int64_t begin = s->b.offsets[row] + run * RUN, first = row * s->b.width;
    int64_t tokens = smaller(RUN, s->counts[row] - run * RUN), width = smaller(s->b.width, a->N - first);
    if (tokens <= 0)
        return FMOE_OK;
    gemm_operand x = table_rows(a, a->x, 0), down = table_rows(a, a->down, first);
    x.gather = s->b.block_of + begin;
    gemm_target target = {FMOE_F32, tile, width};
    TRY(gemm_serial(tokens, width, a->d, &x, &down, gemm_store, &target, scratch, s->gemm_bytes));
    /* Selected, not multiplied by zero: whatever an unchosen expert holds, even NaN, stays behind. */
    for (int64_t g = 0; g < tokens; g++) {
        int64_t last = (x.gather[g] + (int64_t)1) * a->K;
        for (int64_t i = s->b.begins[begin + g]; i < s->b.offsets[row + 1] && s->b.pairs[i] < last; i++) {
            int64_t pair = s->b.pairs[i];
            s->activations[pair] = tile[g * width + a->indices[pair] - first];
        }
    }
    return FMOE_OK;
}
// [/row-tile]

/* Asks for a row of up to be brought closer. */
static void fetch_up(const fmoe_expert_args *a, int64_t pair) {
    int64_t bytes = a->d * (int64_t)fmoe_dtype_size(a->dtype);
    for (int64_t line = 0; pair < num_pairs(a) && line < bytes; line += 64)
        __builtin_prefetch((const char *)a->up + a->indices[pair] * bytes + line);
}

// [gather-up]
/* The second phase, token by token: y is added up in the first-level cache and stored once. */
static void token_output(const fmoe_expert_args *a, int64_t t, float *activation, float *buffers) {
    const int32_t *expert = a->indices + t * a->K;
    const float *weight = a->weights + t * a->K, *row[ROWS];
#pragma omp simd
    for (int64_t k = 0; k < a->K; k++)
        activation[k] = silu(activation[k]) * weight[k];
    float *sum = buffers;
    memset(sum, 0, (size_t)a->d * sizeof *sum);
    int64_t k = 0;
    for (; k + ROWS <= a->K; k += ROWS) {
        for (int64_t j = 0; j < ROWS; j++) {
            fetch_up(a, t * a->K + k + ROWS + j);
            row[j] = load_row(a->dtype, a->up, expert[k + j], a->d, buffers + (1 + j) * a->d);
        }
        add_rows(a->d, activation + k, row, sum);
    }
    for (; k < a->K; k++)
        add_row(a->d, activation[k], load_row(a->dtype, a->up, expert[k], a->d, buffers + a->d), sum);
    store_row(a->dtype, a->y, t, a->d, sum);
}
// [/gather-up]

fmoe_status cartesian_rows(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    (void)workspace_bytes, (void)stream;
    cartesian s;
    lay_out_rows(a, workspace, &s);
    TRY(group_rows(a, &s));
    int64_t runs = (a->T + RUN - 1) / RUN;
    bool failed = false;
#pragma omp parallel reduction(|| : failed)
    {
        int64_t me = omp_get_thread_num();
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t row = 0; row < s.b.count; row++)
            for (int64_t run = 0; run < runs; run++)
                failed |= row_run(a, &s, row, run, s.tiles + me * RUN * s.b.width,
                                  s.gemm_scratch + me * (int64_t)s.gemm_bytes) != FMOE_OK;
#pragma omp for schedule(dynamic, 8)
        for (int64_t t = 0; t < a->T; t++)
            token_output(a, t, s.activations + t * a->K, s.buffers + me * (1 + ROWS) * a->d);
    }
    return failed ? FMOE_BAD_WORKSPACE : FMOE_OK;
}

/* ---- The chooser ------------------------------------------------------------------------------------------------- */

const char *const strategy_names[NUM_STRATEGIES] = {"token", "expert", "dense", "cartesian rows"};

/* Nanoseconds of one core of the machine that this was written on, found by fitting. */
// [constants]
#define NS_F32         0.035 /* an element of a row that lies in the second-level cache, multiplied and added */
#define NS_F16         0.045 /* the same for 16-bit storage: it is converted as well */
#define NS_L3_BYTE     0.009 /* more, a byte, where it comes from the third-level cache */
#define NS_RAM_BYTE    0.03  /* more, a byte, where it comes from memory */
#define NS_FLOP        0.005 /* of a dense tile */
#define NS_PACK        0.5   /* an element of a table brought into a tile's order */
#define NS_SLOT        0.4   /* an expert's counter in the schedule */
#define NS_TOKEN_PAIR  6     /* whatever d is: silu, the loop around a row */
#define NS_EXPERT_PAIR 9     /* the same, and a place in the schedule */
#define NS_DENSE_PAIR  6     /* into a block's list, out of its tile and back */
#define NS_ROWS_PAIR   15    /* into a row's list, out of its tile, silu */
#define L2_BYTES       1e6
#define L3_BYTES       12e6 /* what is left of it for one of two tables */
// [/constants]

static double least(double a, double b) {
    return a < b ? a : b;
}

// [gathered]
/* d elements of a row of a table, all rows equally likely: the share of the table that a cache can hold is the share of
 * the reads that it serves. */
static double row_ns(const fmoe_expert_args *a, double table_rows) {
    double d = (double)a->d, size = (double)fmoe_dtype_size(a->dtype), table = table_rows * d * size;
    double in_l2 = least(1, L2_BYTES / table), in_caches = least(1, L3_BYTES / table);
    double fetch = (in_caches - in_l2) * NS_L3_BYTE + (1 - in_caches) * NS_RAM_BYTE;
    return d * ((a->dtype == FMOE_F32 ? NS_F32 : NS_F16) + size * fetch);
}
// [/gathered]

// [rows-a-token]
/* K pairs thrown at n rows leave n · (1 − exp(−K / n)) rows that are not empty. A router's pairs cluster: they behave
 * like 1.1 · K^0.7 throws. */
double strategy_rows_a_token(const fmoe_expert_args *a) {
    double n = (double)fmoe_num_keys(a->N), throws = (double)a->K;
    if (a->from_router)
        throws = least(throws, 1.1 * pow(throws, 0.7));
    return n * (1 - exp(-throws / n));
}
// [/rows-a-token]

// [model]
double strategy_cost_us(strategy s, const fmoe_expert_args *a) {
    double T = (double)a->T, N = (double)a->N, d = (double)a->d, pairs = T * (double)a->K;
    double size = (double)fmoe_dtype_size(a->dtype), n = (double)fmoe_num_keys(a->N), ns = 0;
    double tiles = T * strategy_rows_a_token(a) * n; /* products of a token with an expert in Cartesian rows */
    switch (s) {
    case STRATEGY_TOKEN:
        ns = pairs * (NS_TOKEN_PAIR + 2 * row_ns(a, N));
        break;
    case STRATEGY_EXPERT: /* down streams past once; what is gathered are rows of x, then rows of up */
        ns = N * NS_SLOT + least(N, pairs) * d * size * NS_RAM_BYTE +
             pairs * (NS_EXPERT_PAIR + row_ns(a, T) + row_ns(a, N));
        break;
    case STRATEGY_DENSE:
        ns = 4 * T * N * d * NS_FLOP + 2 * N * d * NS_PACK + pairs * NS_DENSE_PAIR;
        break;
    case STRATEGY_ROWS:
        ns = 2 * tiles * d * NS_FLOP + least(N, tiles) * d * NS_PACK + pairs * (NS_ROWS_PAIR + row_ns(a, N));
        break;
    default:
        break;
    }
    return ns * 1e-3;
}

strategy strategy_choose(const fmoe_expert_args *a) {
    strategy best = STRATEGY_TOKEN;
    for (strategy s = STRATEGY_TOKEN + 1; s < NUM_STRATEGIES; s++)
        if (strategy_cost_us(s, a) < strategy_cost_us(best, a))
            best = s;
    return best;
}
// [/model]

static const struct {
    fmoe_rung_fn *run;
    fmoe_workspace_fn *workspace;
} strategies[NUM_STRATEGIES] = {
    [STRATEGY_TOKEN] = {cpu_expert_token_best, cpu_expert_token_best_workspace},
    [STRATEGY_EXPERT] = {cpu_expert_scheduled_best, cpu_expert_scheduled_best_workspace},
    [STRATEGY_DENSE] = {dense_under_a_mask, dense_workspace},
    [STRATEGY_ROWS] = {cartesian_rows, rows_workspace},
};

fmoe_status chooser(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    return strategies[strategy_choose(args)].run(args, workspace, workspace_bytes, stream);
}

size_t chooser_workspace(const void *args) {
    return strategies[strategy_choose(args)].workspace(args);
}

const fmoe_rung chapter7_rungs[] = {
    {.name = "token",
     .idea = "Chapter 1's best: two rows a pair, fetched token by token. 4·T·K·d operations, none wasted.",
     .run = cpu_expert_token_best,
     .workspace = cpu_expert_token_best_workspace},
    {.name = "expert",
     .idea = "Chapter 5's best: the same operations along the schedule, so that `down` is read in order, once.",
     .run = cpu_expert_scheduled_best,
     .workspace = cpu_expert_scheduled_best_workspace},
    {.name = "dense",
     .idea =
         "All T·N products in tiles, the chosen ones kept: N / K times the arithmetic, at the rate of a dense product.",
     .run = dense_under_a_mask,
     .workspace = dense_workspace},
    {.name = "cartesian rows",
     .idea = "A token meets only the grid rows it chose from, but all n experts of each: dense tiles with less waste.",
     .run = cartesian_rows,
     .workspace = rows_workspace},
    {.name = "chooser",
     .idea =
         "Whichever of the four a cost model of T, N, K, d, the storage type and the caller's hint says is cheapest.",
     .run = chooser,
     .workspace = chooser_workspace},
    {0},
};
