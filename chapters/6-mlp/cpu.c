/* Chapter 6 on the CPU: y = down · (silu(gate · x) ⊙ (up · x)), from three nested loops to tiles in registers. */
#include "../gemm.h"
#include "../openblas.h"
#include "../steps.h"
#include "../vec.h"

#include <omp.h>
#include <string.h>

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static float silu(float s) {
    return s / (1 + exp_f32(-s));
}

/* ---- One token after the other ----------------------------------------------------------------------------------- */

/* Floats of a thread that computes `tokens` tokens at a time: their inputs, hidden units and outputs, and two weight
 * rows. Rounded up to whole cache lines, so that threads do not share one. */
static int64_t scratch_floats(const fmoe_mlp_args *a, int64_t tokens) {
    return (tokens * (2 * a->d + a->I) + 2 * larger(a->d, a->I) + 15) / 16 * 16;
}

// [token]
static inline void one_token(const fmoe_mlp_args *a, int64_t t, float *scratch,
                             float (*product)(int64_t, const float *, const float *)) {
    float *x_buffer = scratch, *y = x_buffer + a->d, *hidden = y + a->d, *row = hidden + a->I;
    const float *x = load_row(a->dtype, a->x, t, a->d, x_buffer);
    for (int64_t i = 0; i < a->I; i++) {
        float gate = product(a->d, x, load_row(a->dtype, a->gate, i, a->d, row));
        float up = product(a->d, x, load_row(a->dtype, a->up, i, a->d, row));
        hidden[i] = silu(gate) * up;
    }
    for (int64_t c = 0; c < a->d; c++)
        y[c] = product(a->I, hidden, load_row(a->dtype, a->down, c, a->I, row));
    store_row(a->dtype, a->y, t, a->d, y);
}
// [/token]

static size_t definition_workspace(const void *args) {
    return sizeof(float) * (size_t)scratch_floats(args, 1);
}

static fmoe_status definition(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const fmoe_mlp_args *a = args;
    for (int64_t t = 0; t < a->T; t++)
        one_token(a, t, workspace, serial_dot);
    return FMOE_OK;
}

static size_t tokens_workspace(const void *args) {
    return (size_t)omp_get_max_threads() * definition_workspace(args);
}

static fmoe_status openmp(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const fmoe_mlp_args *a = args;
    int64_t floats = scratch_floats(a, 1);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < a->T; t++)
        one_token(a, t, (float *)workspace + omp_get_thread_num() * floats, serial_dot);
    return FMOE_OK;
}

static fmoe_status vectorised(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const fmoe_mlp_args *a = args;
    int64_t floats = scratch_floats(a, 1);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < a->T; t++)
        one_token(a, t, (float *)workspace + omp_get_thread_num() * floats, dot);
    return FMOE_OK;
}

/* Scalar sums take a second for some 2^29 multiply-adds, and a case has 3·T·d·I: small ones show all there is to see.
 */
static bool small_enough(const void *args) {
    const fmoe_mlp_args *a = args;
    return (double)a->T * (double)a->d * (double)a->I <= 0x1p27;
}

/* ---- A block of tokens ------------------------------------------------------------------------------------------- */

enum { BLOCK = 16 }; /* tokens: 16 KB of x at d = 256 */

// [dots]
/* ⟨row r, w⟩ for `count` rows, four at a time: w is loaded once for four sums, and the four sums do not wait for each
 * other. */
static inline void dots(int64_t count, int64_t k, const float *rows, const float *w, float *out) {
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) {
        const float *r0 = rows + r * k, *r1 = r0 + k, *r2 = r1 + k, *r3 = r2 + k;
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int64_t i = 0; i < k; i++) {
            s0 += r0[i] * w[i];
            s1 += r1[i] * w[i];
            s2 += r2[i] * w[i];
            s3 += r3[i] * w[i];
        }
        out[r] = s0, out[r + 1] = s1, out[r + 2] = s2, out[r + 3] = s3;
    }
    for (; r < count; r++)
        out[r] = dot(k, rows + r * k, w);
}
// [/dots]

// [block]
static void one_block(const fmoe_mlp_args *a, int64_t first, int64_t count, float *scratch) {
    int64_t d = a->d, I = a->I;
    float *x = scratch, *y = x + BLOCK * d, *hidden = y + BLOCK * d, *row = hidden + BLOCK * I;
    float *row2 = row + larger(d, I), gate[BLOCK], up[BLOCK];
    fmoe_to_f32(a->dtype, count * d, (const char *)a->x + first * d * (int64_t)fmoe_dtype_size(a->dtype), x);
    for (int64_t i = 0; i < I; i++) {
        dots(count, d, x, load_row(a->dtype, a->gate, i, d, row), gate);
        dots(count, d, x, load_row(a->dtype, a->up, i, d, row2), up);
        for (int64_t t = 0; t < count; t++)
            hidden[t * I + i] = silu(gate[t]) * up[t];
    }
    for (int64_t c = 0; c < d; c++) {
        float out[BLOCK];
        dots(count, I, hidden, load_row(a->dtype, a->down, c, I, row), out);
        for (int64_t t = 0; t < count; t++)
            y[t * d + c] = out[t];
    }
    fmoe_from_f32(a->dtype, count * d, y, (char *)a->y + first * d * (int64_t)fmoe_dtype_size(a->dtype));
}
// [/block]

static size_t blocked_workspace(const void *args) {
    return (size_t)omp_get_max_threads() * sizeof(float) * (size_t)scratch_floats(args, BLOCK);
}

static fmoe_status blocked(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const fmoe_mlp_args *a = args;
    int64_t floats = scratch_floats(a, BLOCK);
#pragma omp parallel for schedule(dynamic)
    for (int64_t t = 0; t < a->T; t += BLOCK)
        one_block(a, t, smaller(BLOCK, a->T - t), (float *)workspace + omp_get_thread_num() * floats);
    return FMOE_OK;
}

/* ---- Tiles ------------------------------------------------------------------------------------------------------- */

/* One [T, I] array of floats, in whole cache lines. */
static size_t hidden_bytes(const fmoe_mlp_args *a) {
    return ((size_t)(a->T * a->I) * sizeof(float) + 255) / 256 * 256;
}

/* What the larger of the two kinds of product needs. */
static size_t gemm_bytes(const fmoe_mlp_args *a) {
    size_t first = gemm_workspace(a->T, a->I, a->d), second = gemm_workspace(a->T, a->d, a->I);
    return first > second ? first : second;
}

static size_t packed_workspace(const void *args) {
    return 2 * hidden_bytes(args) + gemm_bytes(args);
}

// [packed]
static fmoe_status packed(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)stream;
    const fmoe_mlp_args *a = args;
    int64_t T = a->T, d = a->d, I = a->I;
    float *p = workspace, *q = (float *)((char *)workspace + hidden_bytes(a));
    char *rest = (char *)workspace + 2 * hidden_bytes(a);
    size_t rest_bytes = workspace_bytes - 2 * hidden_bytes(a);
    gemm_operand x = by_rows(a->dtype, a->x, d), gate = by_rows(a->dtype, a->gate, d);
    gemm_operand up = by_rows(a->dtype, a->up, d), down = by_rows(a->dtype, a->down, I);
    gemm_operand h = by_rows(FMOE_F32, p, I);
    gemm_target to_p = {FMOE_F32, p, I}, to_q = {FMOE_F32, q, I}, to_y = {a->dtype, a->y, d};

    fmoe_status status = gemm(T, I, d, &x, &gate, gemm_store, &to_p, rest, rest_bytes);
    if (status == FMOE_OK)
        status = gemm(T, I, d, &x, &up, gemm_store, &to_q, rest, rest_bytes);
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < T * I; i++)
        p[i] = silu(p[i]) * q[i];
    return status == FMOE_OK ? gemm(T, d, I, &h, &down, gemm_store, &to_y, rest, rest_bytes) : status;
}
// [/packed]

// [swiglu]
typedef struct {
    int64_t I;
    float *data; /* [T, I] */
} hidden_units;

/* Epilogue of the first product: a tile holds the gate and the up product of the same tokens and neurons. */
static void swiglu(void *context, int64_t row, int64_t column, int64_t rows, int64_t columns,
                   const float (*values)[GEMM_NR]) {
    const hidden_units *hidden = context;
    for (int64_t r = 0; r < rows; r++) {
        float h[GEMM_VECTOR];
        for (int c = 0; c < GEMM_VECTOR; c++)
            h[c] = silu(values[r][c]) * values[r][GEMM_VECTOR + c];
        memcpy(hidden->data + (row + r) * hidden->I + column, h, sizeof(float) * (size_t)columns);
    }
}
// [/swiglu]

static size_t fused_workspace(const void *args) {
    return hidden_bytes(args) + gemm_bytes(args);
}

// [fused]
/* y in a type of its own: this rung's is the storage type; chapter 8 takes float32 and adds to it before it rounds. */
static fmoe_status fused_into(const fmoe_mlp_args *a, fmoe_dtype y_dtype, void *workspace, size_t workspace_bytes) {
    int64_t T = a->T, d = a->d, I = a->I;
    hidden_units hidden = {I, workspace};
    char *rest = (char *)workspace + hidden_bytes(a);
    size_t rest_bytes = workspace_bytes - hidden_bytes(a);
    gemm_operand x = by_rows(a->dtype, a->x, d), gate_and_up = by_rows(a->dtype, a->gate, d);
    gemm_operand h = by_rows(FMOE_F32, hidden.data, I), down = by_rows(a->dtype, a->down, I);
    gemm_target to_y = {y_dtype, a->y, d};
    gate_and_up.pair = a->up;

    fmoe_status status = gemm(T, I, d, &x, &gate_and_up, swiglu, &hidden, rest, rest_bytes);
    return status == FMOE_OK ? gemm(T, d, I, &h, &down, gemm_store, &to_y, rest, rest_bytes) : status;
}
// [/fused]

static fmoe_status fused(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_mlp_args *a = args;
    (void)stream;
    return fused_into(a, a->dtype, workspace, workspace_bytes);
}

/* ---- Few tokens -------------------------------------------------------------------------------------------------- */

enum { FEW = 8 }; /* tokens whose sums a thread keeps at a time; below this many the weights' bytes are the cost */

/* Every token in float32, all hidden units, and two weight rows a thread. */
static size_t streamed_workspace(const void *args) {
    const fmoe_mlp_args *a = args;
    int64_t rows = 2 * larger(a->d, a->I) * omp_get_max_threads();
    return sizeof(float) * (size_t)(a->T * (a->d + a->I) + rows);
}

// [streamed]
static fmoe_status streamed_into(const fmoe_mlp_args *a, fmoe_dtype y_dtype, void *workspace) {
    int64_t T = a->T, d = a->d, I = a->I, row_floats = larger(d, I);
    float *x = workspace, *hidden = x + T * d, *rows = hidden + T * I;
    fmoe_to_f32(a->dtype, T * d, a->x, x);
#pragma omp parallel
    {
        float *row = rows + 2 * row_floats * omp_get_thread_num(), *row2 = row + row_floats;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < I; i++) {
            const float *gate = load_row(a->dtype, a->gate, i, d, row), *up = load_row(a->dtype, a->up, i, d, row2);
            for (int64_t t = 0; t < T; t += FEW) {
                int64_t count = smaller(FEW, T - t);
                float p[FEW], q[FEW];
                dots(count, d, x + t * d, gate, p);
                dots(count, d, x + t * d, up, q);
                for (int64_t j = 0; j < count; j++)
                    hidden[(t + j) * I + i] = silu(p[j]) * q[j];
            }
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < d; c++) {
            const float *down = load_row(a->dtype, a->down, c, I, row);
            for (int64_t t = 0; t < T; t += FEW) {
                int64_t count = smaller(FEW, T - t);
                float out[FEW];
                dots(count, I, hidden + t * I, down, out);
                for (int64_t j = 0; j < count; j++)
                    store_one(y_dtype, a->y, (t + j) * d + c, out[j]);
            }
        }
    }
    return FMOE_OK;
}
// [/streamed]

static fmoe_status streamed(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_mlp_args *a = args;
    (void)workspace_bytes, (void)stream;
    return streamed_into(a, a->dtype, workspace);
}

// [chosen]
static bool few_tokens(const fmoe_mlp_args *a) {
    return a->T < FEW;
}

size_t cpu_mlp_best_workspace(const void *args) {
    return few_tokens(args) ? streamed_workspace(args) : fused_workspace(args);
}

fmoe_status cpu_mlp_into(const fmoe_mlp_args *a, fmoe_dtype y_dtype, void *workspace, size_t workspace_bytes) {
    return few_tokens(a) ? streamed_into(a, y_dtype, workspace) : fused_into(a, y_dtype, workspace, workspace_bytes);
}

fmoe_status cpu_mlp_best(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_mlp_args *a = args;
    (void)stream;
    return cpu_mlp_into(a, a->dtype, workspace, workspace_bytes);
}
// [/chosen]

/* ---- OpenBLAS ---------------------------------------------------------------------------------------------------- */

static bool is_f32(const void *args) {
    return ((const fmoe_mlp_args *)args)->dtype == FMOE_F32;
}

static size_t openblas_workspace(const void *args) {
    const fmoe_mlp_args *a = args;
    return 2 * sizeof(float) * (size_t)(a->T * a->I);
}

static fmoe_status openblas(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const fmoe_mlp_args *a = args;
    if (a->T == 0)
        return FMOE_OK;
    int T = (int)a->T, d = (int)a->d, I = (int)a->I;
    float *gate = workspace, *up = gate + a->T * a->I;
    openblas_sgemm_fn *sgemm = openblas_sgemm();
    sgemm(BLAS_ROW_MAJOR, BLAS_NO_TRANSPOSE, BLAS_TRANSPOSE, T, I, d, 1, a->x, d, a->gate, d, 0, gate, I);
    sgemm(BLAS_ROW_MAJOR, BLAS_NO_TRANSPOSE, BLAS_TRANSPOSE, T, I, d, 1, a->x, d, a->up, d, 0, up, I);
    /* By one thread: OpenMP's threads would still be spinning on the cores that OpenBLAS's own need next. */
    for (int64_t i = 0; i < a->T * a->I; i++)
        gate[i] = silu(gate[i]) * up[i];
    sgemm(BLAS_ROW_MAJOR, BLAS_NO_TRANSPOSE, BLAS_TRANSPOSE, T, d, I, 1, gate, I, a->down, I, 0, a->y, d);
    return FMOE_OK;
}

const fmoe_rung chapter6_rungs[] = {
    {"definition", LEVEL_CORE, BACKEND_CPU, "Three nested loops, one float32 sum at a time, one thread.", definition,
     .workspace = definition_workspace, .supports = small_enough},
    {"openmp", LEVEL_CORE, BACKEND_CPU, "Tokens are independent: with twice the cores, half the time.", openmp,
     .workspace = tokens_workspace, .supports = small_enough},
    {"vectorised", LEVEL_CORE, BACKEND_CPU,
     "A sum in as many parts as a register has lanes, so that no addition waits for its neighbour.", vectorised,
     .workspace = tokens_workspace},
    {"blocked", LEVEL_CORE, BACKEND_CPU,
     "Sixteen tokens meet a weight row while it is in the first-level cache, four at a time in registers.", blocked,
     .workspace = blocked_workspace},
    {"packed", LEVEL_CORE, BACKEND_CPU,
     "A tile of outputs stays in registers for the whole sum, and both operands lie in the order in which they are "
     "read.",
     packed, .workspace = packed_workspace},
    {"fused", LEVEL_CORE, BACKEND_CPU,
     "Gate and up rows share a tile, and SwiGLU is applied to it before it is stored: four passes over [T, I] less.",
     fused, .workspace = fused_workspace},
    {"streamed", LEVEL_CORE, BACKEND_CPU,
     "For few tokens: the threads share out the weight rows, and each row is read from memory once.", streamed,
     .workspace = streamed_workspace},
    {"chosen", LEVEL_CORE, BACKEND_CPU, "Streamed below 8 tokens, fused from there on: what the layer calls.",
     cpu_mlp_best, .workspace = cpu_mlp_best_workspace},
    {"openblas", LEVEL_CORE, BACKEND_CPU, "Three calls of OpenBLAS's sgemm and an elementwise pass between them.",
     openblas, .workspace = openblas_workspace, .supports = is_f32, .library = true, .available = openblas_available},
    {.run = NULL},
};
