/* mlp_backward: from dy to dx and three weights, by sums of rows and by tiles. */
#include "../../ref_cpu/check.h"
#include "backward.h"

#include <string.h>

typedef fmoe_mlp_backward_args mlp_args;

hidden carve_hidden(const mlp_args *a, void *workspace, size_t *used) {
    hidden l;
    l.h = carve_floats(workspace, used, a->T * a->I);
    l.dp = carve_floats(workspace, used, a->T * a->I);
    l.dq = carve_floats(workspace, used, a->T * a->I);
    return l;
}

/* ---- Sums of rows ------------------------------------------------------------------------------------------------ */

/* Long enough for a row of any weight. */
static int64_t row_floats(const mlp_args *a) {
    return (int64_t)padded(a->d > a->I ? a->d : a->I);
}

static inline void one_token(const mlp_args *a, int64_t t, const hidden *l, float *rows,
                             float (*product)(int64_t, const float *, const float *)) {
    int64_t d = a->d, I = a->I, stride = row_floats(a);
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

/* Besides the hidden units: x and dy as float32 where they are not, and five rows a thread. */
typedef struct {
    hidden hidden;
    float *x, *dy, *rows;
} plain;

static plain carve_plain(const mlp_args *a, void *workspace, size_t *used) {
    plain s = {.hidden = carve_hidden(a, workspace, used)};
    int64_t copied = a->dtype == FMOE_F32 ? 0 : a->T * a->d;
    s.x = carve_floats(workspace, used, copied);
    s.dy = carve_floats(workspace, used, copied);
    s.rows = carve_floats(workspace, used, omp_get_max_threads() * 5 * row_floats(a));
    return s;
}

static size_t plain_workspace(const void *args) {
    size_t used = 0;
    carve_plain(args, NULL, &used);
    return used;
}

static fmoe_status sums_of_rows(const mlp_args *a, void *workspace, bool parallel,
                                float (*product)(int64_t, const float *, const float *)) {
    int64_t T = a->T, d = a->d, I = a->I;
    size_t used = 0;
    plain s = carve_plain(a, workspace, &used);
    const float *x = as_f32(a->dtype, a->x, T * d, s.x), *dy = as_f32(a->dtype, a->dy, T * d, s.dy);
#pragma omp parallel if (parallel)
    {
        float *rows = s.rows + omp_get_thread_num() * 5 * row_floats(a);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; t++)
            one_token(a, t, &s.hidden, rows, product);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < I; i++) {
            weight_row(T, i, s.hidden.dp, I, x, d, a->dtype, a->dgate, rows);
            weight_row(T, i, s.hidden.dq, I, x, d, a->dtype, a->dup, rows);
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < d; c++)
            weight_row(T, c, dy, d, s.hidden.h, I, a->dtype, a->ddown, rows);
    }
    return FMOE_OK;
}

static fmoe_status definition(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    return sums_of_rows(args, workspace, false, serial_dot);
}

static fmoe_status openmp(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    return sums_of_rows(args, workspace, true, dot);
}

/* A second or two for some 2^30 plain multiply-adds, and a case has 8·T·d·I. */
static bool small_enough(const void *args) {
    const mlp_args *a = args;
    return (double)a->T * (double)a->d * (double)a->I <= 0x1p27;
}

/* ---- Tiles ------------------------------------------------------------------------------------------------------- */

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

fmoe_status mlp_pre_activations(const mlp_args *a, const hidden *l, void *workspace, size_t bytes) {
    gemm_target kept[] = {{FMOE_F32, l->dp, a->I}, {FMOE_F32, l->dq, a->I}, {FMOE_F32, l->h, a->I}};
    gemm_operand tokens = by_rows(a->dtype, a->x, a->d), gate_and_up = by_rows(a->dtype, a->gate, a->d);
    gate_and_up.pair = a->up;
    return gemm(a->T, a->I, a->d, &tokens, &gate_and_up, keep_pre_activations, kept, workspace, bytes);
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

void add_and_store(void *context, int64_t row, int64_t column, int64_t rows, int64_t columns,
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

size_t mlp_gemm_workspace(int64_t T, int64_t d, int64_t I) {
    size_t wide = larger(gemm_workspace(T, I, d), gemm_workspace(T, d, I));
    return larger(wide, larger(gemm_workspace(I, d, T), gemm_workspace(d, I, T)));
}

// [mlp-kept]
/* Six products, when p, q (in dp, dq) and h were kept. sums [T, d] holds what else dx is the sum of. */
fmoe_status mlp_gradients(const mlp_args *a, const hidden *l, float *sums, gemm_target dx, void *workspace,
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

size_t cpu_mlp_backward_best_workspace(const void *args) {
    const mlp_args *a = args;
    size_t used = 0;
    carve_hidden(a, NULL, &used);
    carve_floats(NULL, &used, a->T * a->d);
    return used + mlp_gemm_workspace(a->T, a->d, a->I);
}

fmoe_status cpu_mlp_backward_best(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)stream;
    const mlp_args *a = args;
    size_t used = 0;
    hidden l = carve_hidden(a, workspace, &used);
    float *sums = carve_floats(workspace, &used, a->T * a->d);
    char *rest = (char *)workspace + used;
    memset(sums, 0, (size_t)(a->T * a->d) * sizeof *sums);
    TRY(mlp_pre_activations(a, &l, rest, workspace_bytes - used));
    return mlp_gradients(a, &l, sums, (gemm_target){a->dtype, a->dx, a->d}, rest, workspace_bytes - used);
}

const fmoe_rung chapter9_mlp_rungs[] = {
    {"definition", LEVEL_CORE, BACKEND_CPU, "Token by token, then row by row of each weight, one thread.", definition,
     .workspace = plain_workspace, .supports = small_enough},
    {"openmp", LEVEL_CORE, BACKEND_CPU,
     "Tokens first, then weight rows: either way one owner a row, in vector registers and with every core.", openmp,
     .workspace = plain_workspace, .supports = small_enough},
    {"packed", LEVEL_CORE, BACKEND_CPU,
     "Eight matrix products in chapter 6's tiles: packing does the transposing, an epilogue differentiates.",
     cpu_mlp_backward_best, .workspace = cpu_mlp_backward_best_workspace},
    {.run = NULL},
};
