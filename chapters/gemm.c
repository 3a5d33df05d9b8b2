#include "gemm.h"

#include <omp.h>
#include <string.h>

enum {
    LINE = 64,            /* elements of a row that are packed at a time: their part of a panel stays in L1 */
    BLOCK_BYTES = 1 << 18 /* of packed B, per thread: stays in the second-level cache while A streams past */
};

/* A product cut into tasks: a block of B's panels times a run of A's panels. */
typedef struct {
    int64_t M, N, k;
    const gemm_operand *A, *B;
    gemm_epilogue *epilogue;
    void *context;
    int64_t width;              /* columns a panel of B stands for: GEMM_NR, or half of it with a pair */
    int64_t panels_a, panels_b; /* all of them */
    int64_t run, block;         /* panels a task takes */
    float *packed_a, *packed_b; /* all of A; a block of B a thread */
} product;

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// [micro-kernel]
typedef float vector __attribute__((vector_size(4 * GEMM_VECTOR), may_alias));

/* A tile of C, from start to end in registers: each step of k loads two vectors of B and GEMM_MR single elements of A,
 * and does 2 · GEMM_MR vector multiply-adds with them. */
static void micro_kernel(int64_t k, const float *a, const float *b, float (*values)[GEMM_NR]) {
    vector sum[GEMM_MR][2] = {{{0}}};
    for (int64_t p = 0; p < k; p++) {
        vector b0 = *(const vector *)(b + p * GEMM_NR);
        vector b1 = *(const vector *)(b + p * GEMM_NR + GEMM_VECTOR);
        for (int r = 0; r < GEMM_MR; r++) {
            sum[r][0] += a[p * GEMM_MR + r] * b0;
            sum[r][1] += a[p * GEMM_MR + r] * b1;
        }
    }
    memcpy(values, sum, sizeof sum);
}
// [/micro-kernel]

/* ---- Packing ----------------------------------------------------------------------------------------------------- */

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t four_places __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (four_places){__VA_ARGS__})
#endif

/* Four elements of each of four rows, turned: out[p · width + r] = rows[r][p]. */
static void transpose4(const float *const rows[4], float *out, int64_t width) {
    four a = *(const four *)rows[0], b = *(const four *)rows[1];
    four c = *(const four *)rows[2], d = *(const four *)rows[3];
    four ab01 = SHUFFLE(a, b, 0, 4, 1, 5), ab23 = SHUFFLE(a, b, 2, 6, 3, 7);
    four cd01 = SHUFFLE(c, d, 0, 4, 1, 5), cd23 = SHUFFLE(c, d, 2, 6, 3, 7);
    *(four *)out = SHUFFLE(ab01, cd01, 0, 1, 4, 5);
    *(four *)(out + width) = SHUFFLE(ab01, cd01, 2, 3, 6, 7);
    *(four *)(out + 2 * width) = SHUFFLE(ab23, cd23, 0, 1, 4, 5);
    *(four *)(out + 3 * width) = SHUFFLE(ab23, cd23, 2, 3, 6, 7);
}

static const void *element(const gemm_operand *x, const void *data, int64_t row, int64_t p) {
    int64_t r = x->gather ? x->gather[row] : row;
    return (const char *)data + (r * x->row_stride + p * x->depth_stride) * (int64_t)fmoe_dtype_size(x->dtype);
}

/* Up to four rows that lie along k, `length` elements of each from `first` on, as columns of a panel. */
static void pack_rows(const gemm_operand *x, const void *data, int64_t row, int64_t rows, int64_t first, int64_t length,
                      float *out, int64_t width) {
    float lines[4][LINE];
    const float *from[4];
    int64_t p = 0;
    for (int64_t r = 0; r < rows; r++) {
        from[r] = element(x, data, row + r, first);
        if (x->dtype != FMOE_F32) {
            fmoe_to_f32(x->dtype, length, from[r], lines[r]);
            from[r] = lines[r];
        }
    }
    for (; rows == 4 && p + 4 <= length; p += 4) {
        const float *here[4] = {from[0] + p, from[1] + p, from[2] + p, from[3] + p};
        transpose4(here, out + p * width, width);
    }
    for (; p < length; p++)
        for (int64_t r = 0; r < rows; r++)
            out[p * width + r] = from[r][p];
}

/* Rows `row` to `row + part` of one matrix into a panel whose rows are `width` floats apart; what lies beyond the
 * matrix becomes zero. */
static void pack(const gemm_operand *x, const void *data, int64_t rows, int64_t row, int64_t part, int64_t k,
                 float *out, int64_t width) {
    int64_t filled = smaller(part, rows - row);
    for (int64_t p = 0; filled < part && p < k; p++)
        memset(out + p * width + filled, 0, sizeof(float) * (size_t)(part - filled));
    if (x->depth_stride == 1)
        for (int64_t first = 0; first < k; first += LINE)
            for (int64_t r = 0; r < filled; r += 4)
                pack_rows(x, data, row + r, smaller(4, filled - r), first, smaller(LINE, k - first),
                          out + first * width + r, width);
    else
        for (int64_t p = 0; p < k; p++)
            fmoe_to_f32(x->dtype, filled, element(x, data, row, p), out + p * width);
}

static void pack_a(const product *c, int64_t i) {
    pack(c->A, c->A->data, c->M, i * GEMM_MR, GEMM_MR, c->k, c->packed_a + i * GEMM_MR * c->k, GEMM_MR);
}

static void pack_b(const product *c, int64_t j, float *panel) {
    pack(c->B, c->B->data, c->N, j * c->width, c->width, c->k, panel, GEMM_NR);
    if (c->B->pair)
        pack(c->B, c->B->pair, c->N, j * c->width, c->width, c->k, panel + GEMM_VECTOR, GEMM_NR);
}

/* ---- The product ------------------------------------------------------------------------------------------------- */

static int64_t num_tasks(const product *c) {
    return divide_up(c->panels_a, c->run) * divide_up(c->panels_b, c->block);
}

// [task]
/* Packs its block of B once, then lets every panel of A in its run meet it. */
static void do_task(const product *c, int64_t task, float *packed_b) {
    int64_t runs = divide_up(c->panels_a, c->run), panel = GEMM_NR * c->k;
    int64_t i0 = task % runs * c->run, i1 = smaller(i0 + c->run, c->panels_a);
    int64_t j0 = task / runs * c->block, j1 = smaller(j0 + c->block, c->panels_b);
    float values[GEMM_MR][GEMM_NR] __attribute__((aligned(64)));
    for (int64_t j = j0; j < j1; j++)
        pack_b(c, j, packed_b + (j - j0) * panel);
    for (int64_t i = i0; i < i1; i++)
        for (int64_t j = j0; j < j1; j++) {
            int64_t row = i * GEMM_MR, column = j * c->width;
            micro_kernel(c->k, c->packed_a + row * c->k, packed_b + (j - j0) * panel, values);
            c->epilogue(c->context, row, column, smaller(GEMM_MR, c->M - row), smaller(c->width, c->N - column),
                        (const float(*)[GEMM_NR])values);
        }
}
// [/task]

/* Floats of packed A, rounded up so that B's panels start on a cache line. */
static int64_t floats_a(int64_t M, int64_t k) {
    return divide_up(divide_up(M, GEMM_MR) * GEMM_MR * k, 16) * 16;
}

/* The most panels of B a thread packs at a time; N columns give at most N / GEMM_VECTOR of them, rounded up. */
static int64_t most_panels(int64_t N, int64_t k) {
    int64_t fit = BLOCK_BYTES / (4 * GEMM_NR * (k > 0 ? k : 1));
    return smaller(fit > 1 ? fit : 1, divide_up(N, GEMM_VECTOR));
}

static size_t workspace_for(int threads, int64_t M, int64_t N, int64_t k) {
    return sizeof(float) * (size_t)(floats_a(M, k) + threads * most_panels(N, k) * GEMM_NR * k);
}

/* Four tasks a thread, so that a late thread costs little; runs of A are cut only where B has too few panels. */
static product cut(int threads, int64_t M, int64_t N, int64_t k, const gemm_operand *A, const gemm_operand *B,
                   gemm_epilogue *epilogue, void *context, float *workspace) {
    int64_t width = B->pair ? GEMM_VECTOR : GEMM_NR;
    product c = {.M = M, .N = N, .k = k, .A = A, .B = B, .epilogue = epilogue, .context = context, .width = width};
    c.panels_a = divide_up(M, GEMM_MR);
    c.panels_b = divide_up(N, width);
    c.block = threads == 1 ? most_panels(N, k) : smaller(most_panels(N, k), divide_up(c.panels_b, 4 * threads));
    c.block = c.block > 1 ? c.block : 1;
    c.run = c.panels_b < threads ? divide_up(c.panels_a * c.panels_b, threads) : c.panels_a;
    c.run = c.run > 1 ? c.run : 1;
    c.packed_a = workspace;
    c.packed_b = workspace + floats_a(M, k);
    return c;
}

size_t gemm_workspace(int64_t M, int64_t N, int64_t k) {
    return workspace_for(omp_get_max_threads(), M, N, k);
}

fmoe_status gemm(int64_t M, int64_t N, int64_t k, const gemm_operand *A, const gemm_operand *B, gemm_epilogue *epilogue,
                 void *context, void *workspace, size_t workspace_bytes) {
    int threads = omp_get_max_threads();
    if (workspace_bytes < workspace_for(threads, M, N, k))
        return FMOE_BAD_WORKSPACE;
    product c = cut(threads, M, N, k, A, B, epilogue, context, workspace);
    int64_t tasks = num_tasks(&c), block = most_panels(N, k) * GEMM_NR * k;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < c.panels_a; i++)
            pack_a(&c, i);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++)
            do_task(&c, task, c.packed_b + omp_get_thread_num() * block);
    }
    return FMOE_OK;
}

size_t gemm_serial_workspace(int64_t M, int64_t N, int64_t k) {
    return workspace_for(1, M, N, k);
}

fmoe_status gemm_serial(int64_t M, int64_t N, int64_t k, const gemm_operand *A, const gemm_operand *B,
                        gemm_epilogue *epilogue, void *context, void *workspace, size_t workspace_bytes) {
    if (workspace_bytes < workspace_for(1, M, N, k))
        return FMOE_BAD_WORKSPACE;
    product c = cut(1, M, N, k, A, B, epilogue, context, workspace);
    for (int64_t i = 0; i < c.panels_a; i++)
        pack_a(&c, i);
    for (int64_t task = 0; task < num_tasks(&c); task++)
        do_task(&c, task, c.packed_b);
    return FMOE_OK;
}

void gemm_store(void *context, int64_t row, int64_t column, int64_t rows, int64_t columns,
                const float (*values)[GEMM_NR]) {
    const gemm_target *target = context;
    int64_t size = (int64_t)fmoe_dtype_size(target->dtype);
    for (int64_t r = 0; r < rows; r++)
        fmoe_from_f32(target->dtype, columns, values[r],
                      (char *)target->data + ((row + r) * target->row_stride + column) * size);
}
