// Chapter 2 on the CPU: batch norm, projection onto the keys and log-softmax, from three passes down the columns to
// one sweep for the statistics and one for everything else.
#include "../gemm.h"
#include "../steps.h"
#include "../vec.h"
#include "../workspace.h"

#include <omp.h>

enum {
    STATISTICS_ROWS = 64, // tokens whose sums are taken together; fixed, so that the bits depend on no thread
    BLOCK_TOKENS = 512,   // tokens that are projected together: their logits stay in the second-level cache
    FEW_TOKENS = 8,       // up to so many, packing the gate for tiles costs more than it saves
};

// For sums inside a parallel loop. Where they are inlined the compiler may split or unroll that loop into several
// copies and fuse the multiply-adds of one copy otherwise than those of the next; which copy a row meets would then
// depend on where its thread's share begins.
#define ONE_COPY __attribute__((noinline))

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// ---- What normalises: the statistics, ready to use ----

// x̂ = (x − center − rest) · scale. center is the mean rounded to float32 and rest what the rounding lost: where the
// mean is large, x − center is exact and x − mean would not be.
typedef struct {
    float *center, *rest, *scale; // [d]
} norm;

static void set_norm(norm s, int64_t h, double mean, double var) {
    s.center[h] = (float)mean;
    s.rest[h] = (float)(mean - s.center[h]);
    s.scale[h] = (float)(1 / sqrt(var + FMOE_NORM_EPS));
}

// From a hidden unit's mean and sum of squared deviations over T tokens: what normalises, and the running buffers.
static void set_from_batch(const fmoe_router_args *args, norm s, int64_t h, double mean, double squares) {
    double unbiased = squares / (double)(args->T - 1), keep = 1 - FMOE_NORM_MOMENTUM;
    args->running_mean[h] = (float)(keep * args->running_mean[h] + FMOE_NORM_MOMENTUM * mean);
    args->running_var[h] = (float)(keep * args->running_var[h] + FMOE_NORM_MOMENTUM * unbiased);
    set_norm(s, h, mean, squares / (double)args->T);
}

static void set_from_running(const fmoe_router_args *args, norm s) {
    for (int64_t h = 0; h < args->d; h++)
        set_norm(s, h, args->running_mean[h], args->running_var[h]);
}

static inline float normalised(norm s, int64_t h, float x) {
    return (x - s.center[h] - s.rest[h]) * s.scale[h];
}

// ---- The workspace of the rungs that store x̂ ----

typedef struct {
    norm norm;
    float *x_hat;           // [T, d]
    float *gate;            // [2n, d] float32, folded or not
    float *bias;            // [2n]
    double *mean, *squares; // [blocks of tokens, d]
    float *rows;            // [threads, 4, d]
    void *gemm;
    size_t gemm_bytes;
} scratch;

static int64_t num_blocks(int64_t T) {
    return (T + STATISTICS_ROWS - 1) / STATISTICS_ROWS;
}

static void carve_statistics(const fmoe_router_args *args, scratch *s, char *workspace, size_t *used) {
    size_t row = (size_t)args->d * sizeof(float), blocks = args->training ? (size_t)num_blocks(args->T) : 0;
    s->norm.center = carve(workspace, used, row);
    s->norm.rest = carve(workspace, used, row);
    s->norm.scale = carve(workspace, used, row);
    s->mean = carve(workspace, used, 2 * row * blocks);
    s->squares = carve(workspace, used, 2 * row * blocks);
    s->rows = carve(workspace, used, 4 * row * (size_t)omp_get_max_threads());
}

static scratch carve_scratch(const fmoe_router_args *args, char *workspace, size_t *used) {
    scratch s;
    size_t row = (size_t)args->d * sizeof(float);
    carve_statistics(args, &s, workspace, used);
    s.x_hat = carve(workspace, used, row * (size_t)args->T);
    s.gate = carve(workspace, used, row * 2 * (size_t)args->n);
    s.bias = carve(workspace, used, 2 * (size_t)args->n * sizeof(float));
    s.gemm_bytes = gemm_workspace(args->T, 2 * args->n, args->d);
    s.gemm = carve(workspace, used, s.gemm_bytes);
    return s;
}

static size_t scratch_bytes(const void *args) {
    size_t used = 0;
    carve_scratch(args, NULL, &used);
    return used;
}

// Every rung starts so: T = 1 has no unbiased variance, and without tokens nothing moves.
static fmoe_status check(const fmoe_router_args *args, size_t needed, size_t bytes) {
    if (args->training && args->T == 1)
        return FMOE_BATCH_OF_ONE;
    return bytes < needed ? FMOE_BAD_WORKSPACE : FMOE_OK;
}

// ---- Rungs: the definition, serial and with OpenMP ----

// [three-passes]
// Down a column of x: the mean, then the variance around it, then x̂.
static void norm_by_columns(const fmoe_router_args *args, scratch s, bool parallel) {
    int64_t T = args->T, d = args->d;
#pragma omp parallel for schedule(static) if (parallel)
    for (int64_t h = 0; h < d; h++) {
        if (args->training) {
            double mean = 0, squares = 0;
            for (int64_t t = 0; t < T; t++)
                mean += load_one(args->dtype, args->x, t * d + h);
            mean /= (double)T;
            for (int64_t t = 0; t < T; t++) {
                double deviation = load_one(args->dtype, args->x, t * d + h) - mean;
                squares += deviation * deviation;
            }
            set_from_batch(args, s.norm, h, mean, squares);
        } else {
            set_norm(s.norm, h, args->running_mean[h], args->running_var[h]);
        }
        for (int64_t t = 0; t < T; t++)
            s.x_hat[t * d + h] = normalised(s.norm, h, load_one(args->dtype, args->x, t * d + h));
    }
}
// [/three-passes]

typedef float dot_fn(int64_t d, const float *a, const float *b);

ONE_COPY static float dot_in_order(int64_t d, const float *a, const float *b) {
    return serial_dot(d, a, b);
}

ONE_COPY static float dot_in_vectors(int64_t d, const float *a, const float *b) {
    return dot(d, a, b);
}

static float *logits_row(const fmoe_router_args *args, int64_t side, int64_t t) {
    return args->logits + (side * args->T + t) * args->n;
}

static void project(const fmoe_router_args *args, scratch s, bool parallel, dot_fn *dot_product) {
    int64_t T = args->T, d = args->d, n = args->n;
    fmoe_to_f32(args->dtype, 2 * n * d, args->gate, s.gate);
#pragma omp parallel for schedule(static) if (parallel)
    for (int64_t t = 0; t < T; t++)
        for (int64_t key = 0; key < 2 * n; key++)
            logits_row(args, key / n, t)[key % n] = dot_product(d, s.x_hat + t * d, s.gate + key * d);
}

static void log_softmax_plain(const fmoe_router_args *args, bool parallel) {
    int64_t n = args->n;
#pragma omp parallel for schedule(static) if (parallel)
    for (int64_t row = 0; row < 2 * args->T; row++) {
        const float *z = args->logits + row * n;
        double max = z[0], sum = 0;
        for (int64_t i = 1; i < n; i++)
            max = z[i] > max ? z[i] : max;
        for (int64_t i = 0; i < n; i++)
            sum += exp(z[i] - max);
        for (int64_t i = 0; i < n; i++)
            args->log_probs[row * n + i] = (float)(z[i] - max - log(sum));
    }
}

static fmoe_status run_by_columns(const fmoe_router_args *args, void *workspace, size_t bytes, bool parallel) {
    size_t used = 0;
    scratch s = carve_scratch(args, workspace, &used);
    fmoe_status status = check(args, used, bytes);
    if (status != FMOE_OK || args->T == 0)
        return status;
    norm_by_columns(args, s, parallel);
    project(args, s, parallel, dot_in_order);
    log_softmax_plain(args, parallel);
    return FMOE_OK;
}

static fmoe_status run_definition(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    return run_by_columns(args, workspace, bytes, false);
}

static fmoe_status run_openmp(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    return run_by_columns(args, workspace, bytes, true);
}

// ---- Rung: statistics in one pass along the rows ----

// [one-pass]
// Mean and sum of squared deviations of one block of tokens, in one pass. Deviations are taken from the block's first
// token. It lies within a few standard deviations of the mean, so nothing cancels: Σ(x−s)² is at most 64 times Σ(x−m)²,
// and that only where s itself is the outlier.
static void block_statistics(const fmoe_router_args *args, int64_t block, float *rows, double *mean, double *squares) {
    int64_t d = args->d, first = block * STATISTICS_ROWS, count = smaller(STATISTICS_ROWS, args->T - first);
    float *sum = rows, *sum_squares = rows + d, *buffer = rows + 2 * d;
    const float *shift = load_row(args->dtype, args->x, first, d, rows + 3 * d);
    memset(rows, 0, (size_t)d * 2 * sizeof *rows);
    for (int64_t t = 1; t < count; t++) {
        const float *x = load_row(args->dtype, args->x, first + t, d, buffer);
#pragma omp simd
        for (int64_t h = 0; h < d; h++) {
            float deviation = x[h] - shift[h];
            sum[h] += deviation;
            sum_squares[h] += deviation * deviation;
        }
    }
    for (int64_t h = 0; h < d; h++) {
        mean[h] = shift[h] + (double)sum[h] / (double)count;
        squares[h] = sum_squares[h] - (double)sum[h] * sum[h] / (double)count;
    }
}

// Two groups' statistics make those of both (Chan, Golub and LeVeque 1979). Blocks are joined in order, whichever
// thread summed them.
ONE_COPY static void join_blocks(const fmoe_router_args *args, scratch s, int64_t h) {
    double mean = 0, squares = 0;
    for (int64_t block = 0; block < num_blocks(args->T); block++) {
        double before = (double)(block * STATISTICS_ROWS);
        double count = (double)smaller(STATISTICS_ROWS, args->T - block * STATISTICS_ROWS);
        double step = s.mean[block * args->d + h] - mean;
        mean += step * count / (before + count);
        squares += s.squares[block * args->d + h] + step * step * before * count / (before + count);
    }
    set_from_batch(args, s.norm, h, mean, squares);
}
// [/one-pass]

static void statistics_by_rows(const fmoe_router_args *args, scratch s) {
    int64_t d = args->d;
    if (!args->training) {
        set_from_running(args, s.norm);
        return;
    }
#pragma omp parallel
    {
        float *rows = s.rows + omp_get_thread_num() * 4 * d;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < num_blocks(args->T); block++)
            block_statistics(args, block, rows, s.mean + block * d, s.squares + block * d);
#pragma omp for schedule(static)
        for (int64_t h = 0; h < d; h++)
            join_blocks(args, s, h);
    }
}

static void normalise_row(const fmoe_router_args *args, norm s, int64_t t, float *x_hat) {
    const float *x = load_row(args->dtype, args->x, t, args->d, x_hat);
#pragma omp simd
    for (int64_t h = 0; h < args->d; h++)
        x_hat[h] = normalised(s, h, x[h]);
}

static void norm_by_rows(const fmoe_router_args *args, scratch s) {
    statistics_by_rows(args, s);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < args->T; t++)
        normalise_row(args, s.norm, t, s.x_hat + t * args->d);
}

static fmoe_status run_by_rows(const fmoe_router_args *args, void *workspace, size_t bytes, dot_fn *dot_product) {
    size_t used = 0;
    scratch s = carve_scratch(args, workspace, &used);
    fmoe_status status = check(args, used, bytes);
    if (status != FMOE_OK || args->T == 0)
        return status;
    norm_by_rows(args, s);
    project(args, s, true, dot_product);
    log_softmax_plain(args, true);
    return FMOE_OK;
}

static fmoe_status run_one_pass(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    return run_by_rows(args, workspace, bytes, dot_in_order);
}

// ---- Rung: dot products in vectors ----

static fmoe_status run_vector_dot(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    return run_by_rows(args, workspace, bytes, dot_in_vectors);
}

// ---- Rung: tiles ----

// Where a product's columns go: key c of token t is logits[side][t][c − side · n], plus what folding left over.
typedef struct {
    const fmoe_router_args *args;
    const float *bias; // [2n]
    int64_t first;     // the token that row 0 of the product is
} target;

static void store_logits(void *context, int64_t row, int64_t column, int64_t rows, int64_t columns,
                         const float (*values)[GEMM_NR]) {
    const target *to = context;
    int64_t n = to->args->n;
    for (int64_t side = 0; side < 2; side++) {
        int64_t from = side == 0 ? 0 : n - column, end = side == 0 ? n - column : columns;
        from = from > 0 ? from : 0;
        end = smaller(end, columns);
        for (int64_t r = 0; r < rows; r++) {
            float *out = logits_row(to->args, side, to->first + row + r) + column - side * n;
            for (int64_t c = from; c < end; c++)
                out[c] = values[r][c] + to->bias[column + c];
        }
    }
}

static fmoe_status run_tiles(const void *arguments, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    const fmoe_router_args *args = arguments;
    size_t used = 0;
    scratch s = carve_scratch(args, workspace, &used);
    fmoe_status status = check(args, used, bytes);
    if (status != FMOE_OK || args->T == 0)
        return status;
    norm_by_rows(args, s);
    memset(s.bias, 0, (size_t)args->n * 2 * sizeof *s.bias);
    gemm_operand x_hat = by_rows(FMOE_F32, s.x_hat, args->d);
    gemm_operand gate = by_rows(args->dtype, args->gate, args->d);
    target to = {args, s.bias, 0};
    status = gemm(args->T, 2 * args->n, args->d, &x_hat, &gate, store_logits, &to, s.gemm, s.gemm_bytes);
    log_softmax_plain(args, true);
    return status;
}

// ---- Rung: the norm folded into the gate ----

// [fold]
// gate' = gate · scale and bias = −Σ mean · gate', so that x̂ · gateᵀ = x · gate'ᵀ + bias, for any x.
ONE_COPY static double fold_row(int64_t d, norm s, const float *row, float *out) {
    double bias = 0;
    for (int64_t h = 0; h < d; h++) {
        out[h] = row[h] * s.scale[h];
        bias -= ((double)s.center[h] + s.rest[h]) * out[h];
    }
    return bias;
}

static void fold(const fmoe_router_args *args, norm s, bool fold_mean, float *gate, float *bias) {
    int64_t d = args->d;
#pragma omp parallel for schedule(static)
    for (int64_t key = 0; key < 2 * args->n; key++) {
        float *out = gate + key * d;
        double sum = fold_row(d, s, load_row(args->dtype, args->gate, key, d, out), out);
        bias[key] = fold_mean ? (float)sum : 0;
    }
}

// Algebra says that any mean can be folded. In float32 x · gate' and the bias are both as large as the mean is, in
// standard deviations, and what they leave after cancelling has lost as many digits: beyond a length of 64, two
// millionths of a logit. Then the mean is subtracted from x first, where the subtraction is exact.
static bool mean_folds(const fmoe_router_args *args, norm s) {
    double length = 0;
    for (int64_t h = 0; h < args->d; h++)
        length += (double)s.center[h] * s.center[h] * s.scale[h] * s.scale[h];
    return length <= 64 * 64;
}
// [/fold]

static void center_row(const fmoe_router_args *args, norm s, int64_t t, float *out) {
    const float *x = load_row(args->dtype, args->x, t, args->d, out);
#pragma omp simd
    for (int64_t h = 0; h < args->d; h++)
        out[h] = x[h] - s.center[h] - s.rest[h];
}

static fmoe_status run_folded(const void *arguments, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    const fmoe_router_args *args = arguments;
    size_t used = 0;
    scratch s = carve_scratch(args, workspace, &used);
    fmoe_status status = check(args, used, bytes);
    if (status != FMOE_OK || args->T == 0)
        return status;
    statistics_by_rows(args, s);
    bool fold_mean = mean_folds(args, s.norm);
    fold(args, s.norm, fold_mean, s.gate, s.bias);
#pragma omp parallel for schedule(static) if (!fold_mean)
    for (int64_t t = 0; t < (fold_mean ? 0 : args->T); t++)
        center_row(args, s.norm, t, s.x_hat + t * args->d);
    gemm_operand x = fold_mean ? by_rows(args->dtype, args->x, args->d) : by_rows(FMOE_F32, s.x_hat, args->d);
    gemm_operand gate = by_rows(FMOE_F32, s.gate, args->d);
    target to = {args, s.bias, 0};
    status = gemm(args->T, 2 * args->n, args->d, &x, &gate, store_logits, &to, s.gemm, s.gemm_bytes);
    log_softmax_plain(args, true);
    return status;
}

// ---- Rung: everything a block of tokens needs, while it is in the cache ----

// [log-softmax]
static void log_softmax_row(int64_t n, const float *z, float *log_probs) {
    float max = largest(n, z), sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += exp_f32(z[i] - max);
    float log_sum = logf(sum);
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        log_probs[i] = z[i] - max - log_sum;
}
// [/log-softmax]

static void log_softmax_rows(const fmoe_router_args *args, int64_t first, int64_t count) {
    for (int64_t side = 0; side < 2; side++)
        for (int64_t t = first; t < first + count; t++)
            log_softmax_row(args->n, logits_row(args, side, t), args->log_probs + (side * args->T + t) * args->n);
}

// A gate row is converted once and meets every token; the keys are shared out, there being no tokens to share.
static void project_few(const fmoe_router_args *args, scratch s) {
    int64_t T = args->T, d = args->d, n = args->n;
    for (int64_t t = 0; t < T; t++)
        normalise_row(args, s.norm, t, s.x_hat + t * d);
#pragma omp parallel for schedule(static)
    for (int64_t key = 0; key < 2 * n; key++) {
        const float *gate = load_row(args->dtype, args->gate, key, d, s.rows + omp_get_thread_num() * 4 * d);
        for (int64_t t = 0; t < T; t++)
            logits_row(args, key / n, t)[key % n] = dot_in_vectors(d, s.x_hat + t * d, gate);
    }
    log_softmax_rows(args, 0, T);
}

typedef struct {
    scratch shared;
    char *threads;     // a part for each thread
    size_t a_thread;   // bytes of it
    size_t gemm_bytes; // of those, for the product; the rest holds centred tokens
    int64_t tokens;    // a block's
} blocks;

static blocks carve_blocks(const fmoe_router_args *args, char *workspace, size_t *used) {
    blocks b = {0};
    int64_t threads = omp_get_max_threads(), share = (args->T + threads - 1) / threads;
    size_t row = (size_t)args->d * sizeof(float);
    carve_statistics(args, &b.shared, workspace, used);
    if (args->T <= FEW_TOKENS) {
        b.shared.x_hat = carve(workspace, used, row * (size_t)args->T);
        return b;
    }
    b.shared.gate = carve(workspace, used, row * 2 * (size_t)args->n);
    b.shared.bias = carve(workspace, used, 2 * (size_t)args->n * sizeof(float));
    b.tokens = smaller(BLOCK_TOKENS, share);
    b.gemm_bytes = (gemm_serial_workspace(b.tokens, 2 * args->n, args->d) + 255) / 256 * 256;
    b.a_thread = b.gemm_bytes + (row * (size_t)b.tokens + 255) / 256 * 256;
    b.threads = carve(workspace, used, b.a_thread * (size_t)threads);
    return b;
}

size_t cpu_router_best_workspace(const void *args) {
    size_t used = 0;
    carve_blocks(args, NULL, &used);
    return used;
}

static fmoe_status project_block(const fmoe_router_args *args, const blocks *b, int64_t first, bool fold_mean,
                                 char *mine) {
    int64_t d = args->d, n = args->n, count = smaller(b->tokens, args->T - first);
    float *centred = (float *)(mine + b->gemm_bytes);
    for (int64_t t = 0; t < count && !fold_mean; t++)
        center_row(args, b->shared.norm, first + t, centred + t * d);
    const char *stored = (const char *)args->x + first * d * (int64_t)fmoe_dtype_size(args->dtype);
    gemm_operand x = fold_mean ? by_rows(args->dtype, stored, args->d) : by_rows(FMOE_F32, centred, args->d);
    gemm_operand gate = by_rows(FMOE_F32, b->shared.gate, args->d);
    target to = {args, b->shared.bias, first};
    fmoe_status status = gemm_serial(count, 2 * n, d, &x, &gate, store_logits, &to, mine, b->gemm_bytes);
    log_softmax_rows(args, first, count);
    return status;
}

fmoe_status cpu_router_best(const void *arguments, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    const fmoe_router_args *args = arguments;
    size_t used = 0;
    blocks b = carve_blocks(args, workspace, &used);
    fmoe_status status = check(args, used, bytes);
    if (status != FMOE_OK || args->T == 0)
        return status;
    statistics_by_rows(args, b.shared);
    if (args->T <= FEW_TOKENS) {
        project_few(args, b.shared);
        return FMOE_OK;
    }
    bool fold_mean = mean_folds(args, b.shared.norm);
    fold(args, b.shared.norm, fold_mean, b.shared.gate, b.shared.bias);
#pragma omp parallel for schedule(dynamic)
    for (int64_t first = 0; first < args->T; first += b.tokens)
        project_block(args, &b, first, fold_mean, b.threads + b.a_thread * (size_t)omp_get_thread_num());
    return FMOE_OK;
}

const fmoe_rung chapter2_rungs[] = {
    {.name = "definition",
     .backend = BACKEND_CPU,
     .idea = "Three passes down each column of x, then a dot product a logit, one sum after the other.",
     .run = run_definition,
     .workspace = scratch_bytes},
    {.name = "openmp",
     .backend = BACKEND_CPU,
     .idea = "Columns, then tokens, are shared out among the threads.",
     .run = run_openmp,
     .workspace = scratch_bytes},
    {.name = "one-pass",
     .backend = BACKEND_CPU,
     .idea = "Mean and variance in one pass along the rows: each cache line of x is used whole, and read once less.",
     .run = run_one_pass,
     .workspace = scratch_bytes},
    {.name = "vector-dot",
     .backend = BACKEND_CPU,
     .idea = "A dot product's sum in as many parts as a vector has lanes: no waiting for the last addition.",
     .run = run_vector_dot,
     .workspace = scratch_bytes},
    {.name = "tiles",
     .backend = BACKEND_CPU,
     .idea = "A tile of logits in registers: each loaded x̂ and gate element is used a dozen times or more.",
     .run = run_tiles,
     .workspace = scratch_bytes},
    {.name = "folded",
     .backend = BACKEND_CPU,
     .idea = "The norm moves into the gate, once a call: x̂ is neither written nor read.",
     .run = run_folded,
     .workspace = scratch_bytes},
    {.name = "fused",
     .backend = BACKEND_CPU,
     .idea = "Product and log-softmax a block of tokens at a time, in the cache, with an exp that fills the lanes.",
     .run = cpu_router_best,
     .workspace = cpu_router_best_workspace},
    {0},
};
