/* Chapter 6: the shared dense MLP, its tiles and its ladder. */
#include "cuda_values.h"

#include "../chapters/gemm.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

/* One MLP: sizes and inputs, all float32 and in memory of their own. */
typedef struct {
    int64_t T, d, I;
    float *x, *gate, *up, *down;
} mlp;

static mlp new_mlp(uint64_t seed, int64_t T, int64_t d, int64_t I) {
    mlp m = {.T = T, .d = d, .I = I};
    m.x = normals(seed, 1, 1, T * d);
    m.gate = normals(seed, 2, 1 / sqrt((double)d), I * d);
    m.up = normals(seed, 3, 1 / sqrt((double)d), I * d);
    m.down = normals(seed, 4, 1 / sqrt((double)I), d * I);
    return m;
}

static void free_mlp(mlp *m) {
    free(m->x);
    free(m->gate);
    free(m->up);
    free(m->down);
}
#define MLP FREED(free_mlp)

/* Runs the reference, with another output or other weights where these are not NULL. */
static float *run(const mlp *m, const float *gate, const float *up, const float *down) {
    float *y = floats(m->T * m->d);
    fmoe_status status =
        fmoe_mlp(m->T, m->d, m->I, m->x, gate ? gate : m->gate, up ? up : m->up, down ? down : m->down, y);
    cr_assert(status == FMOE_OK, "%s", fmoe_error_message());
    return y;
}

/* y = down · (silu(gate · x) ⊙ (up · x)) as written, in long double. */
static float *by_definition(const mlp *m) {
    float *y = floats(m->T * m->d);
    for (int64_t t = 0; t < m->T; t++)
        for (int64_t c = 0; c < m->d; c++) {
            long double sum = 0;
            for (int64_t i = 0; i < m->I; i++) {
                long double p = 0, q = 0;
                for (int64_t h = 0; h < m->d; h++) {
                    p += (long double)m->gate[i * m->d + h] * m->x[t * m->d + h];
                    q += (long double)m->up[i * m->d + h] * m->x[t * m->d + h];
                }
                sum += m->down[c * m->I + i] * (p / (1 + expl(-p)) * q);
            }
            y[t * m->d + c] = (float)sum;
        }
    return y;
}

/* HOLDS if out is within limit of ref. A single value may cancel, so the scale is given. */
static const char *close_to(const mlp *m, const float *out, const float *ref, double limit, const char *what) {
    double error = fmoe_relative_error(m->T * m->d, out, ref, 0.6 * sqrt((double)(m->T * m->d)));
    return error <= limit ? HOLDS : because("%s: error %.2g is over %.2g", what, error, limit);
}

/* ---- The reference ----------------------------------------------------------------------------------------------- */

static const char *reference_is_definition(const int64_t *size, uint64_t seed) {
    mlp m MLP = new_mlp(seed, size[0], size[1], size[2]);
    float *y OWNED = run(&m, NULL, NULL, NULL), *expected OWNED = by_definition(&m);
    return close_to(&m, y, expected, 1e-7, "y");
}

SENTENCE(6, 1, "The reference is down · (silu(gate · x) ⊙ (up · x)), rounded once.", "the definition",
         "nested loops in long double") {
    for_sizes("T d I", reference_is_definition,
              SIZES({1, 1, 1}, {3, 7, 2}, {2, 1, 9}, {5, 16, 33}, {4, 72, 100}, {29, 8, 1}));
}

SENTENCE(6, 2,
         "silu(s) − silu(−s) = s for every finite s, silu is s far above zero and 0 far below, and NaN stays NaN.",
         "the logistic function of s and of −s sum to 1", "closed form") {
    expect(fmoe_silu(0) == 0, "silu(0) = %g", fmoe_silu(0));
    for (int i = 0; i <= 340; i++) { /* from 1e-6 to 1e4 */
        double s = 1e-6 * pow(1.07, i);
        double difference = fmoe_silu(s) - fmoe_silu(-s);
        expect(fabs(difference - s) <= 1e-15 * s, "s = %g: the difference is %.17g", s, difference);
    }
    expect(fmoe_silu(1e4) == 1e4, "silu(1e4) = %g", fmoe_silu(1e4));
    expect(fmoe_silu(-1e4) == 0, "silu(-1e4) = %g", fmoe_silu(-1e4));
    expect(fmoe_silu(INFINITY) == INFINITY, "silu(inf) = %g", fmoe_silu(INFINITY));
    expect(isnan(fmoe_silu(NAN)), "silu(NaN) = %g", fmoe_silu(NAN));
    expect(fabs(fmoe_silu(1) - 0.73105857863000488) < 1e-15, "silu(1) = %.17g", fmoe_silu(1));
}

SENTENCE(6, 3, "silu's derivative is the slope of silu.", "its own code: a sign lost there would pass unseen",
         "central differences") {
    for (int i = -480; i <= 480; i++) {
        double s = i / 16.0, step = 1e-4;
        double slope = (fmoe_silu(s + step) - fmoe_silu(s - step)) / (2 * step);
        double error = fabs(fmoe_silu_derivative(s) - slope);
        expect(error < 3e-9, "s = %g: %.12g, the slope is %.12g", s, fmoe_silu_derivative(s), slope);
    }
    expect(fmoe_silu_derivative(1e4) == 1, "at 1e4: %g", fmoe_silu_derivative(1e4));
    expect(fmoe_silu_derivative(-1e4) == 0, "at -1e4: %g", fmoe_silu_derivative(-1e4));
}

static const char *zero_weights(const int64_t *size, uint64_t seed) {
    mlp m MLP = new_mlp(seed, size[0], size[1], size[2]);
    float *zero OWNED = filled(0, m.I * m.d);
    for (int r = 0; r < 3; r++) {
        static const char *const names[] = {"gate", "up", "down"};
        float *y OWNED = run(&m, r == 0 ? zero : NULL, r == 1 ? zero : NULL, r == 2 ? zero : NULL);
        for (int64_t i = 0; i < m.T * m.d; i++)
            if (y[i] != 0)
                return because("with a zero %s, y[%lld] = %g", names[r], (long long)i, y[i]);
    }
    return HOLDS;
}

SENTENCE(6, 4, "With a zero gate, a zero up or a zero down projection the output is exactly zero.",
         "silu(0) = 0, and the three are factors of one product", "zero") {
    for_sizes("T d I", zero_weights, SIZES({1, 1, 1}, {3, 7, 5}, {4, 72, 100}));
}

/* Scaling by a power of two is exact in binary, so these hold to the bit. */
static const char *linear_in_up_and_down(const int64_t *size, uint64_t seed) {
    mlp m MLP = new_mlp(seed, size[0], size[1], size[2]);
    float *up OWNED = floats(m.I * m.d), *other OWNED = normals(seed, 9, 1 / sqrt((double)m.I), m.d * m.I);
    float *down OWNED = floats(m.d * m.I);
    for (int64_t i = 0; i < m.I * m.d; i++) {
        up[i] = 4 * m.up[i];
        down[i] = m.down[i] + other[i];
    }
    float *y OWNED = run(&m, NULL, NULL, NULL), *y_up OWNED = run(&m, NULL, up, NULL);
    float *y_other OWNED = run(&m, NULL, NULL, other), *sum OWNED = run(&m, NULL, NULL, down);
    for (int64_t i = 0; i < m.T * m.d; i++) {
        if (y_up[i] != 4 * y[i])
            return because("4 · up gives y[%lld] = %g, 4 · y is %g", (long long)i, y_up[i], 4 * y[i]);
        y[i] += y_other[i];
    }
    return close_to(&m, sum, y, 1e-6, "down + another down");
}

SENTENCE(6, 5, "The output is linear in up and in down: four times up gives four times y, and downs add.",
         "only the gate path bends", "y of the parts") {
    for_sizes("T d I", linear_in_up_and_down, SIZES({1, 1, 1}, {3, 7, 5}, {4, 72, 100}, {16, 16, 64}));
}

static const char *neurons_permuted(const int64_t *size, uint64_t seed) {
    mlp m MLP = new_mlp(seed, size[0], size[1], size[2]);
    float *gate OWNED = floats(m.I * m.d), *up OWNED = floats(m.I * m.d), *down OWNED = floats(m.d * m.I);
    int64_t *to OWNED = poisoned(m.I, sizeof *to);
    for (int64_t i = 0; i < m.I; i++) { /* Fisher and Yates, from the inside out */
        int64_t j = (int64_t)(fmoe_random_bits(seed, 77, (uint64_t)i) % (uint64_t)(i + 1));
        to[i] = to[j];
        to[j] = i;
    }
    for (int64_t i = 0; i < m.I; i++) {
        memcpy(gate + to[i] * m.d, m.gate + i * m.d, (size_t)m.d * sizeof *gate);
        memcpy(up + to[i] * m.d, m.up + i * m.d, (size_t)m.d * sizeof *up);
        for (int64_t c = 0; c < m.d; c++)
            down[c * m.I + to[i]] = m.down[c * m.I + i];
    }
    float *y OWNED = run(&m, NULL, NULL, NULL), *permuted OWNED = run(&m, gate, up, down);
    return close_to(&m, permuted, y, 1e-7, "permuted neurons");
}

SENTENCE(6, 6, "The order of the I neurons does not matter beyond rounding.", "y is a sum over neurons",
         "the same neurons shuffled") {
    for_sizes("T d I", neurons_permuted, SIZES({1, 1, 2}, {3, 7, 5}, {4, 72, 100}, {2, 16, 257}));
}

/* Copies `part` into the rows × columns block of `whole` that starts at (row, column). */
static void place(float *whole, int64_t width, int64_t row, int64_t column, const float *part, int64_t rows,
                  int64_t columns) {
    for (int64_t r = 0; r < rows; r++)
        memcpy(whole + (row + r) * width + column, part + r * columns, (size_t)columns * sizeof *whole);
}

static const char *block_diagonal(const int64_t *size, uint64_t seed) {
    int64_t T = size[0];
    mlp a MLP = new_mlp(seed, T, size[1], size[2]), b MLP = new_mlp(seed + 1, T, size[2], size[1]);
    mlp both MLP = {.T = T, .d = a.d + b.d, .I = a.I + b.I};
    both.x = floats(T * both.d), both.gate = filled(0, both.I * both.d), both.up = filled(0, both.I * both.d);
    both.down = filled(0, both.d * both.I);
    float *y_a OWNED = run(&a, NULL, NULL, NULL), *y_b OWNED = run(&b, NULL, NULL, NULL);
    float *expected OWNED = floats(T * both.d);
    place(both.x, both.d, 0, 0, a.x, T, a.d);
    place(both.x, both.d, 0, a.d, b.x, T, b.d);
    place(both.gate, both.d, 0, 0, a.gate, a.I, a.d);
    place(both.gate, both.d, a.I, a.d, b.gate, b.I, b.d);
    place(both.up, both.d, 0, 0, a.up, a.I, a.d);
    place(both.up, both.d, a.I, a.d, b.up, b.I, b.d);
    place(both.down, both.I, 0, 0, a.down, a.d, a.I);
    place(both.down, both.I, a.d, a.I, b.down, b.d, b.I);
    place(expected, both.d, 0, 0, y_a, T, a.d);
    place(expected, both.d, 0, a.d, y_b, T, b.d);
    float *y OWNED = run(&both, NULL, NULL, NULL);
    return close_to(&both, y, expected, 1e-7, "two MLPs in one");
}

SENTENCE(6, 7, "Two MLPs in the diagonal blocks of one compute side by side.",
         "a row or a column taken from the wrong place would mix them", "the two on their own") {
    for_sizes("T d I", block_diagonal, SIZES({1, 1, 1}, {3, 7, 5}, {4, 17, 30}));
}

static const char *tokens_apart(const int64_t *size, uint64_t seed) {
    mlp m MLP = new_mlp(seed, size[0], size[1], size[2]);
    float *y OWNED = run(&m, NULL, NULL, NULL);
    for (int64_t t = 0; t < m.T; t++) {
        float *one OWNED = floats(m.d);
        CALL(fmoe_mlp(1, m.d, m.I, m.x + t * m.d, m.gate, m.up, m.down, one));
        if (!same_bits(one, y + t * m.d, m.d))
            return because("token %lld alone gives other bits", (long long)t);
    }
    return HOLDS;
}

SENTENCE(6, 8, "A token's output has the same bits alone and among others.", "no token sees another",
         "one call a token") {
    for_sizes("T d I", tokens_apart, SIZES({1, 1, 1}, {3, 7, 5}, {17, 33, 40}));
}

SENTENCE(6, 9, "No tokens is a legal batch: nothing is read and nothing is written.", "the contract", "the status") {
    float weights[12] = {0}, y = 7;
    expect(fmoe_mlp(0, 3, 4, NULL, weights, weights, weights, NULL) == FMOE_OK, "T = 0: %s", fmoe_error_message());
    expect(fmoe_mlp(0, 3, 4, weights, weights, weights, weights, &y) == FMOE_OK, "T = 0: %s", fmoe_error_message());
    expect(y == 7, "y became %g", y);
}

SENTENCE(6, 10, "Bad arguments are refused by name and value, before anything is computed.", "the contract",
         "status and message") {
    float m[4] = {1, 1, 1, 1}, y[4] = {7, 7, 7, 7};
    refused(fmoe_mlp(-1, 2, 2, m, m, m, m, y), FMOE_BAD_SIZE, "-1");
    refused(fmoe_mlp(1, 0, 2, m, m, m, m, y), FMOE_BAD_SIZE, "hidden_size = 0");
    refused(fmoe_mlp(1, 2, -5, m, m, m, m, y), FMOE_BAD_SIZE, "intermediate_size = -5");
    refused(fmoe_mlp(1, INT64_MAX / 2, 3, m, m, m, m, y), FMOE_OVERFLOW, "hidden_size");
    refused(fmoe_mlp(INT64_MAX / 2, 1, 16, m, m, m, m, y), FMOE_OVERFLOW, "tokens");
    refused(fmoe_mlp(2, 2, 2, NULL, m, m, m, y), FMOE_NULL_POINTER, "x");
    refused(fmoe_mlp(2, 2, 2, m, NULL, m, m, y), FMOE_NULL_POINTER, "gate_proj");
    refused(fmoe_mlp(2, 2, 2, m, m, NULL, m, y), FMOE_NULL_POINTER, "up_proj");
    refused(fmoe_mlp(2, 2, 2, m, m, m, NULL, y), FMOE_NULL_POINTER, "down_proj");
    refused(fmoe_mlp(2, 2, 2, m, m, m, m, NULL), FMOE_NULL_POINTER, "y");
    for (int i = 0; i < 4; i++)
        expect(y[i] == 7, "y[%d] became %g", i, y[i]);
}

/* ---- The tiles --------------------------------------------------------------------------------------------------- */

/* An operand in its storage type and in the float32 values that it really holds. */
typedef struct {
    gemm_operand operand;
    void *stored;
    float *values;
    bool turned;
    int64_t rows, k;
} matrix;

static void *stored_as(fmoe_dtype dtype, int64_t count, float *values) {
    void *memory = poisoned(count, fmoe_dtype_size(dtype));
    fmoe_from_f32(dtype, count, values, memory);
    fmoe_to_f32(dtype, count, memory, values);
    return memory;
}

static matrix new_matrix(uint64_t seed, uint64_t stream, fmoe_dtype dtype, bool turned, int64_t rows, int64_t k) {
    matrix m = {.values = normals(seed, stream, 1, rows * k), .turned = turned, .rows = rows, .k = k};
    m.stored = stored_as(dtype, rows * k, m.values);
    m.operand = (gemm_operand){.dtype = dtype, .data = m.stored};
    m.operand.row_stride = turned ? 1 : k;
    m.operand.depth_stride = turned ? rows : 1;
    return m;
}

static void free_matrix(matrix *m) {
    free(m->stored);
    free(m->values);
}
#define MATRIX FREED(free_matrix)

static long double element(const matrix *m, int64_t row, int64_t p) {
    return m->values[m->turned ? p * m->rows + row : row * m->k + p];
}

/* Entry (i, j) of A·Bᵀ, and the error that float32 sums of its terms may have. */
static bool right(const matrix *A, const matrix *B, int64_t i, int64_t j, float value) {
    long double sum = 0, size = 0;
    for (int64_t p = 0; p < A->k; p++) {
        long double term = element(A, i, p) * element(B, j, p);
        sum += term;
        size += fabsl(term);
    }
    return fabsl(value - sum) <= 1.2e-7L * (long double)A->k * size / 2 + 1e-30L;
}

typedef fmoe_status gemm_function(int64_t M, int64_t N, int64_t k, const gemm_operand *A, const gemm_operand *B,
                                  gemm_epilogue *epilogue, void *context, void *workspace, size_t workspace_bytes);

/* Runs the product in a workspace of exactly `bytes`, followed by a guard that must stay as it was. */
static fmoe_status guarded(gemm_function *product, size_t bytes, int64_t M, int64_t N, int64_t k, const matrix *A,
                           const matrix *B, gemm_epilogue *epilogue, void *context, bool *overrun) {
    enum { GUARD = 256 };
    void *memory;
    cr_assert(posix_memalign(&memory, 64, bytes + GUARD) == 0);
    unsigned char *workspace = memory;
    memset(workspace, 0xff, bytes + GUARD); /* NaN: what is not packed must not be read */
    fmoe_status status = product(M, N, k, &A->operand, &B->operand, epilogue, context, workspace, bytes);
    *overrun = false;
    for (int i = 0; i < GUARD; i++)
        *overrun |= workspace[bytes + (size_t)i] != 0xff;
    free(memory);
    return status;
}

/* size: M, N, k, and a number that picks storage types and orientations. */
static const char *product_is_right(const int64_t *size, uint64_t seed) {
    omp_set_num_threads(3); /* more than this machine may have: runs and blocks are cut by their number */
    int64_t M = size[0], N = size[1], k = size[2], form = size[3];
    static const fmoe_dtype types[] = {FMOE_F32, FMOE_F16, FMOE_BF16};
    matrix A MATRIX = new_matrix(seed, 1, types[form % 3], form / 9 % 2, M, k);
    matrix B MATRIX = new_matrix(seed, 2, types[form / 3 % 3], form / 18 % 2, N, k);
    float *together OWNED = floats(M * N), *alone OWNED = floats(M * N);
    gemm_target target = {FMOE_F32, together, N}, target_alone = {FMOE_F32, alone, N};
    bool overrun, overrun_alone;
    if (guarded(gemm, gemm_workspace(M, N, k), M, N, k, &A, &B, gemm_store, &target, &overrun) != FMOE_OK ||
        guarded(gemm_serial, gemm_serial_workspace(M, N, k), M, N, k, &A, &B, gemm_store, &target_alone,
                &overrun_alone) != FMOE_OK)
        return because("the workspace asked for is refused");
    if (overrun || overrun_alone)
        return because("%s wrote beyond its workspace", overrun ? "gemm" : "gemm_serial");
    if (!same_bits(together, alone, M * N))
        return because("gemm and gemm_serial differ");
    for (int64_t i = 0; i < M; i++)
        for (int64_t j = 0; j < N; j++)
            if (!right(&A, &B, i, j, alone[i * N + j]))
                return because("C[%lld, %lld] = %g is wrong", (long long)i, (long long)j, alone[i * N + j]);
    return HOLDS;
}

SENTENCE(6, 11, "The tiled product is right for any sizes, storage types and orientations, in exactly its workspace.",
         "tile edges, packing and transposing are where such code goes wrong", "a long double sum an entry") {
    int64_t low[] = {1, 1, 1, 0}, high[] = {70, 70, 90, 35};
    for_sizes("M N k form", product_is_right,
              SIZES({1, 1, 1, 0}, {0, 5, 3, 0}, {5, 0, 3, 0}, {12, 32, 16, 0}, {13, 33, 17, 4}, {13, 33, 17, 31},
                    {25, 65, 256, 5}, {11, 31, 257, 8}, {6, 8, 513, 13}, {1, 300, 40, 22}, {290, 1, 40, 35},
                    {2, 3, 9000, 9}));
    for_random_sizes("M N k form", product_is_right, 150, low, high);
}

static const char *gathered(const int64_t *size, uint64_t seed) {
    int64_t M = size[0], N = size[1], k = size[2], rows = 40;
    matrix A MATRIX = new_matrix(seed, 1, FMOE_F16, false, rows, k),
             B MATRIX = new_matrix(seed, 2, FMOE_F32, false, N, k);
    int32_t *gather OWNED = any_indices(seed, 3, rows, M);
    float *C OWNED = floats(M * N);
    A.operand.gather = gather;
    gemm_target target = {FMOE_F32, C, N};
    bool overrun;
    if (guarded(gemm, gemm_workspace(M, N, k), M, N, k, &A, &B, gemm_store, &target, &overrun) != FMOE_OK)
        return because("the workspace asked for is refused");
    if (overrun)
        return because("wrote beyond the workspace");
    for (int64_t i = 0; i < M; i++)
        for (int64_t j = 0; j < N; j++)
            if (!right(&A, &B, gather[i], j, C[i * N + j]))
                return because("row %lld should be row %d's product", (long long)i, gather[i]);
    return HOLDS;
}

SENTENCE(6, 12, "A gathered operand is the product of the rows that its list names, repeated ones included.",
         "chapter 7 multiplies the tokens that chose an expert", "a long double sum an entry") {
    for_sizes("M N k", gathered, SIZES({1, 1, 1}, {7, 9, 5}, {41, 33, 70}));
}

/* Epilogue of the next sentence: gate products into the first half of the columns, up products into the second. */
typedef struct {
    int64_t N;
    float *C;
} pair_target;

static void store_pair(void *context, int64_t row, int64_t column, int64_t rows, int64_t columns,
                       const float (*values)[GEMM_NR]) {
    const pair_target *target = context;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) {
            float *to = target->C + (row + r) * 2 * target->N + column + c;
            to[0] = values[r][c];
            to[target->N] = values[r][GEMM_VECTOR + c];
        }
}

static const char *paired(const int64_t *size, uint64_t seed) {
    int64_t M = size[0], N = size[1], k = size[2];
    bool turned = size[3];
    matrix A MATRIX = new_matrix(seed, 1, FMOE_F32, false, M, k),
             B MATRIX = new_matrix(seed, 2, FMOE_BF16, turned, N, k);
    matrix second MATRIX = new_matrix(seed, 3, FMOE_BF16, turned, N, k);
    float *C OWNED = floats(2 * M * N);
    B.operand.pair = second.stored;
    pair_target target = {N, C};
    bool overrun;
    if (guarded(gemm, gemm_workspace(M, N, k), M, N, k, &A, &B, store_pair, &target, &overrun) != FMOE_OK)
        return because("the workspace asked for is refused");
    if (overrun)
        return because("wrote beyond the workspace");
    for (int64_t i = 0; i < M; i++)
        for (int64_t j = 0; j < N; j++)
            if (!right(&A, &B, i, j, C[2 * i * N + j]) || !right(&A, &second, i, j, C[2 * i * N + N + j]))
                return because("column %lld of row %lld", (long long)j, (long long)i);
    return HOLDS;
}

SENTENCE(6, 13, "With a pair, one tile holds the products with both matrices.",
         "SwiGLU needs the gate and the up product of a neuron at once", "a long double sum an entry") {
    for_sizes("M N k turned", paired,
              SIZES({1, 1, 1, 0}, {5, 15, 9, 1}, {13, 16, 40, 0}, {7, 17, 40, 1}, {30, 100, 72, 0}));
}

SENTENCE(6, 14, "A workspace one byte too small is refused.", "the contract", "the status") {
    float C[64] = {0};
    matrix A MATRIX = new_matrix(1, 1, FMOE_F32, false, 8, 8), B MATRIX = new_matrix(1, 2, FMOE_F32, false, 8, 8);
    gemm_target target = {FMOE_F32, C, 8};
    bool overrun;
    fmoe_status together = guarded(gemm, gemm_workspace(8, 8, 8) - 1, 8, 8, 8, &A, &B, gemm_store, &target, &overrun);
    fmoe_status alone =
        guarded(gemm_serial, gemm_serial_workspace(8, 8, 8) - 1, 8, 8, 8, &A, &B, gemm_store, &target, &overrun);
    expect(together == FMOE_BAD_WORKSPACE, "gemm: %s", fmoe_status_name(together));
    expect(alone == FMOE_BAD_WORKSPACE, "gemm_serial: %s", fmoe_status_name(alone));
    expect(C[0] == 0, "C was written");
}

/* ---- The ladder -------------------------------------------------------------------------------------------------- */

static const char *rungs_match(const int64_t *size, uint64_t seed) {
    return rungs_agree(&fmoe_step_mlp, chapter6_rungs, seed, "T%lld-d%lld-I%lld-%s", (long long)size[0],
                       (long long)size[1], (long long)size[2], fmoe_dtype_name((fmoe_dtype)size[3]));
}

SENTENCE(6, 15, "Every rung computes the MLP, for sizes that fill no tile and for each storage type.",
         "a rung that is fast and wrong is worth nothing", "the reference, to 1e-5, 6e-4 and 4e-3") {
    for_sizes("T d I dtype", rungs_match,
              SIZES({0, 7, 5, 0}, {1, 1, 1, 0}, {1, 1, 1, 1}, {1, 1, 1, 2}, {3, 7, 72, 0}, {3, 7, 72, 1}, {7, 72, 7, 2},
                    {8, 257, 100, 1}, {16, 100, 33, 2}, {64, 72, 100, 0}, {65, 100, 257, 0}, {65, 257, 72, 1},
                    {65, 72, 257, 2}, {17, 1, 257, 0}, {17, 257, 1, 0}, {6, 300, 600, 2}));
}

/* The ladder without a vendor's library, which may cut its sums as it likes. */
static const fmoe_rung *own_rungs(void) {
    static fmoe_rung own[16];
    int count = 0;
    for (const fmoe_rung *rung = chapter6_rungs; rung->run; rung++)
        if (!rung->library) {
            cr_assert(count < 15);
            own[count++] = *rung;
        }
    return own;
}

static const char *rungs_repeat_own(const int64_t *size, uint64_t seed) {
    return rungs_repeat(&fmoe_step_mlp, own_rungs(), seed, "T%lld-d%lld-I%lld-%s", (long long)size[0],
                        (long long)size[1], (long long)size[2], fmoe_dtype_name((fmoe_dtype)size[3]));
}

SENTENCE(6, 16, "Every rung of ours writes the same bits with any number of threads.",
         "an output belongs to one thread, and its sum has one order", "1, 2, 3 and 7 threads") {
    for_sizes("T d I dtype", rungs_repeat_own,
              SIZES({1, 7, 5, 0}, {5, 72, 100, 0}, {33, 72, 100, 0}, {40, 33, 65, 1}, {65, 40, 130, 2}));
}

/* Every rung on a problem whose tokens were changed after drawing. */
static const char *rungs_on_changed(const int64_t *size, uint64_t seed,
                                    void (*change)(float *x, int64_t T, int64_t d)) {
    fmoe_problem p FREED(fmoe_problem_free) = new_problem(&fmoe_step_mlp, seed, "T%lld-d%lld-I%lld-f32",
                                                          (long long)size[0], (long long)size[1], (long long)size[2]);
    change(fmoe_problem_find(&p, "x")->data, p.c.T, p.c.d);
    CALL(p.step->reference(&p));
    return rungs_right(own_rungs(), &p);
}

static void enlarge(float *x, int64_t T, int64_t d) {
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < d; i++)
            x[t * d + i] *= t % 3 == 0 ? 1.0f : t % 3 == 1 ? 30.0f : 3000.0f;
}

static const char *extreme(const int64_t *size, uint64_t seed) {
    return rungs_on_changed(size, seed, enlarge);
}

SENTENCE(6, 17, "Pre-activations of thousands make no rung overflow: silu is s or 0 there.",
         "exp(−s) overflows float32 from s = −89 on", "the reference") {
    for_sizes("T d I", extreme, SIZES({3, 8, 5}, {20, 33, 70}));
}

/* The token in the middle gets a NaN, its neighbour an infinity. */
static void spoil(float *x, int64_t T, int64_t d) {
    x[T / 2 * d] = NAN;
    if (T > 1)
        x[(T / 2 - 1) * d + d - 1] = INFINITY;
}

static const char *spoiled(const int64_t *size, uint64_t seed) {
    return rungs_on_changed(size, seed, spoil);
}

SENTENCE(6, 18, "A NaN or an infinity in one token reaches no other token.", "a padded tile must not leak",
         "the reference") {
    for_sizes("T d I", spoiled, SIZES({1, 3, 2}, {5, 8, 5}, {20, 33, 70}, {65, 40, 100}));
}

/* A right rung's output, of which rows 0, 3, 6, ... are compared, with one element changed. */
static double sampled_error_with(fmoe_problem *p, int64_t at, float value) {
    fmoe_argument *y = fmoe_problem_find(p, "y");
    memcpy(y->data, y->expected, (size_t)y->count * sizeof(float));
    ((float *)y->data)[at] = value;
    return fmoe_problem_error(p, NULL);
}

SENTENCE(
    6, 24,
    "Where the reference computes some tokens only, an error in one of them shows, and so does a NaN in any other.",
    "all tokens of a large MLP would take the reference minutes", "planted errors") {
    fmoe_problem p FREED(fmoe_problem_free) = new_problem(&fmoe_step_mlp, fresh_seed(), "T8-d5-I9-f32");
    fmoe_problem_find(&p, "y")->rows_apart = 3;
    for (int64_t t = 0; t < 8; t++) {
        expect((sampled_error_with(&p, t * 5 + 2, 9) > 1e-2) == (t % 3 == 0), "a 9 in token %d", (int)t);
        expect(!(sampled_error_with(&p, t * 5 + 4, NAN) <= 1e-2), "a NaN in token %d is not seen", (int)t);
    }
    fmoe_mlp_reference_operations = 1e6;
    fmoe_problem large FREED(fmoe_problem_free) = new_problem(&fmoe_step_mlp, fresh_seed(), "T400-d24-I30-bf16");
    expect(fmoe_problem_find(&large, "y")->rows_apart == 7, "of 1.7 million operations a quarter million is left");
    const char *wrong = rungs_right(own_rungs(), &large);
    expect(wrong == HOLDS, "a right rung is refused: %s", wrong);
}

/* ---- On the GPU -------------------------------------------------------------------------------------------------- */

static fmoe_status run_public(const void *args, void *workspace, size_t bytes, void *stream) {
    const fmoe_mlp_args *a = args;
    return fmoe_cuda_mlp(a->T, a->d, a->I, a->dtype, a->x, a->gate, a->up, a->down, a->y, workspace, bytes, stream);
}

static size_t public_workspace(const void *args) {
    const fmoe_mlp_args *a = args;
    return fmoe_cuda_mlp_workspace(a->T, a->d, a->I, a->dtype);
}

/* The ladder without the vendor's library, whose state is its own, and the public function behind it. */
static const fmoe_rung *gpu_rungs(void) {
    static fmoe_rung own[16];
    int count = 0;
    for (const fmoe_rung *rung = cuda_mlp_rungs; rung->run; rung++)
        if (!rung->library)
            own[count++] = *rung;
    cr_assert(count < 15);
    own[count++] =
        (fmoe_rung){.name = "fmoe_cuda_mlp", .backend = BACKEND_CUDA, .run = run_public, .workspace = public_workspace};
    own[count] = (fmoe_rung){0};
    return own;
}

static const char *gpu_matches(const int64_t *size, uint64_t seed) {
    return rungs_agree(&fmoe_step_mlp, gpu_rungs(), seed, "T%lld-d%lld-I%lld-%s", (long long)size[0],
                       (long long)size[1], (long long)size[2], fmoe_dtype_name((fmoe_dtype)size[3]));
}

static const char *library_matches(const int64_t *size, uint64_t seed) {
    return rungs_agree(&fmoe_step_mlp, cuda_mlp_rungs, seed, "T%lld-d%lld-I%lld-%s", (long long)size[0],
                       (long long)size[1], (long long)size[2], fmoe_dtype_name((fmoe_dtype)size[3]));
}

/* Around the edges of tiles of 64, 128 and 256, of loads of 16 bytes, and of the few tokens that have kernels of their
 * own; several tiles in each direction, and sums that are split. */
#define GPU_MLP_SIZES                                                                                                  \
    SIZES({0, 8, 8, 2}, {3, 7, 5, 0}, {3, 7, 5, 2}, {1, 8, 8, 1}, {1, 1024, 512, 2}, {2, 72, 104, 1}, {3, 128, 64, 2}, \
          {4, 136, 72, 0}, {5, 512, 264, 2}, {8, 64, 1024, 2}, {9, 64, 128, 1}, {17, 200, 96, 2}, {33, 256, 128, 1},   \
          {64, 1024, 1024, 2}, {64, 8, 8, 2}, {65, 64, 64, 2}, {127, 128, 256, 1}, {128, 256, 128, 2},                 \
          {129, 264, 136, 2}, {257, 72, 520, 1}, {300, 1000, 776, 2}, {520, 1024, 264, 2}, {700, 136, 2056, 1},        \
          {65, 100, 257, 0}, {129, 257, 131, 0}, {66, 131, 65, 1}, {130, 33, 260, 2}, {301, 8, 1, 0})

CUDA_SENTENCE(6, 19, "Every GPU rung computes the MLP, for sizes that fill no tile and for each storage type.",
              "a tile at an edge is half outside, a token alone has kernels of its own",
              "fmoe_mlp; NaN in outputs and workspace before, guard bands after") {
    for_sizes("T d I dtype", gpu_matches, GPU_MLP_SIZES);
    for_random_sizes("T d I dtype", gpu_matches, 40, (int64_t[]){1, 1, 1, 0}, (int64_t[]){90, 150, 150, 2});
    for_sizes("T d I dtype", library_matches, SIZES({129, 264, 136, 2}, {65, 100, 257, 0}, {300, 1000, 776, 1}));
}

static const char *gpu_multiples(const int64_t *size, uint64_t seed) {
    const int64_t aligned[] = {size[0], 8 * size[1], 8 * size[2], size[3]};
    return gpu_matches(aligned, seed);
}

CUDA_SENTENCE(6, 20, "Where rows are multiples of 16 bytes, tensor cores compute the MLP of any number of tokens.",
              "the copy engine wants such rows, and fills up what lies outside with zeros", "fmoe_mlp") {
    for_random_sizes("T d/8 I/8 dtype", gpu_multiples, 40, (int64_t[]){1, 1, 1, 1}, (int64_t[]){300, 40, 60, 2});
    /* Tiles in several bands; both products in one kernel, the second reading what the first has just stored, without
     * tiles that are cut and with them. */
    for_sizes("T d I dtype", gpu_matches, SIZES({2200, 72, 520, 1}, {5700, 264, 136, 2}, {3370, 520, 904, 1}));
}

static const char *gpu_repeats(const int64_t *size, uint64_t seed) {
    return rungs_repeat(&fmoe_step_mlp, gpu_rungs(), seed, "T%lld-d%lld-I%lld-%s", (long long)size[0],
                        (long long)size[1], (long long)size[2], fmoe_dtype_name((fmoe_dtype)size[3]));
}

CUDA_SENTENCE(6, 21, "Every GPU rung of the MLP writes the same bits in every run, and depends on its arguments alone.",
              "parts of a sum are added in one order, whoever is ready first",
              "three runs; a graph replayed with new data; two streams that start together") {
    for_sizes("T d I dtype", gpu_repeats,
              SIZES({1, 1024, 512, 2}, {3, 7, 5, 0}, {20, 256, 520, 1}, {64, 1024, 1024, 2}, {200, 1024, 2048, 2},
                    {300, 72, 104, 0}, {3370, 520, 904, 2}));
    static const char *const cases[] = {"T1-d1024-I512-bf16", "T40-d256-I512-f16", "T300-d512-I1024-bf16",
                                        "T67-d33-I70-f32", "T3370-d520-I904-bf16"};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *wrong = rungs_replay(&fmoe_step_mlp, gpu_rungs(), fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
        wrong = rungs_side_by_side(&fmoe_step_mlp, gpu_rungs(), fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
    }
}

/* Every GPU rung on a problem whose tokens were changed after drawing. */
static const char *gpu_on_changed(const int64_t *size, uint64_t seed, void (*change)(float *x, int64_t T, int64_t d)) {
    fmoe_problem p FREED(fmoe_problem_free) =
        new_problem(&fmoe_step_mlp, seed, "T%lld-d%lld-I%lld-%s", (long long)size[0], (long long)size[1],
                    (long long)size[2], fmoe_dtype_name((fmoe_dtype)size[3]));
    float *x OWNED = fmoe_problem_f32(&p, "x");
    cr_assert(x != NULL);
    change(x, p.c.T, p.c.d);
    fmoe_from_f32(p.c.dtype, p.c.T * p.c.d, x, fmoe_problem_find(&p, "x")->data);
    CALL(p.step->reference(&p));
    return rungs_right(gpu_rungs(), &p);
}

static const char *gpu_extreme(const int64_t *size, uint64_t seed) {
    return gpu_on_changed(size, seed, enlarge);
}

static const char *gpu_spoiled(const int64_t *size, uint64_t seed) {
    return gpu_on_changed(size, seed, spoil);
}

CUDA_SENTENCE(6, 22,
              "On the GPU too pre-activations of thousands overflow nowhere, and a NaN or an infinity stays with its "
              "token.",
              "exp(−s) overflows float32 from s = −89 on; a padded tile must not leak", "fmoe_mlp") {
    for_sizes("T d I dtype", gpu_extreme, SIZES({3, 8, 5, 0}, {20, 64, 72, 2}, {70, 136, 264, 2}, {150, 33, 70, 0}));
    for_sizes(
        "T d I dtype", gpu_spoiled,
        SIZES({1, 8, 8, 2}, {5, 8, 5, 0}, {20, 64, 72, 1}, {65, 40, 104, 2}, {150, 136, 264, 2}, {150, 33, 70, 0}));
}

CUDA_HOST_SENTENCE(6, 23, "fmoe_cuda_mlp names bad arguments before it launches anything.",
                   "what the host can see it says at once", "the contract") {
    float m[16] = {0};
    const size_t plenty = (size_t)1 << 40;
#define RUN(T, d, I, dtype, x, gate, up, down, y, workspace, bytes)                                                    \
    fmoe_cuda_mlp(T, d, I, dtype, x, gate, up, down, y, workspace, bytes, NULL)
    refused(RUN(-1, 2, 4, FMOE_F32, m, m, m, m, m, m, plenty), FMOE_BAD_SIZE, "tokens = -1");
    refused(RUN(2, 0, 4, FMOE_F32, m, m, m, m, m, m, plenty), FMOE_BAD_SIZE, "hidden_size = 0");
    refused(RUN(2, 2, -4, FMOE_F32, m, m, m, m, m, m, plenty), FMOE_BAD_SIZE, "intermediate_size = -4");
    refused(RUN(2, 2, 4, FMOE_I32, m, m, m, m, m, m, plenty), FMOE_UNSUPPORTED, "dtype = 3");
    refused(RUN(INT64_MAX / 8, 1000, 4, FMOE_F32, m, m, m, m, m, m, plenty), FMOE_OVERFLOW, "tokens");
    refused(RUN(2, 2, 4, FMOE_F32, NULL, m, m, m, m, m, plenty), FMOE_NULL_POINTER, "x");
    refused(RUN(2, 2, 4, FMOE_F32, m, NULL, m, m, m, m, plenty), FMOE_NULL_POINTER, "gate_proj");
    refused(RUN(2, 2, 4, FMOE_F32, m, m, NULL, m, m, m, plenty), FMOE_NULL_POINTER, "up_proj");
    refused(RUN(2, 2, 4, FMOE_F32, m, m, m, NULL, m, m, plenty), FMOE_NULL_POINTER, "down_proj");
    refused(RUN(2, 2, 4, FMOE_F32, m, m, m, m, NULL, m, plenty), FMOE_NULL_POINTER, "y");
    size_t needed = fmoe_cuda_mlp_workspace(2, 2, 4, FMOE_F32);
    refused(RUN(2, 2, 4, FMOE_F32, m, m, m, m, m, m, needed - 1), FMOE_BAD_WORKSPACE, "workspace_bytes");
    refused(RUN(2, 2, 4, FMOE_F32, m, m, m, m, m, NULL, needed), FMOE_NULL_POINTER, "workspace");
    expect(RUN(0, 2, 4, FMOE_BF16, NULL, m, m, m, NULL, NULL, 0) == FMOE_OK, "T = 0: %s", fmoe_error_message());
#undef RUN
}
