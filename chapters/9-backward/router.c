/* router_backward: from the gradients of the logits to those of the gate and of x. */
#include "../../ref_cpu/check.h"
#include "backward.h"

#include <math.h>
#include <string.h>

typedef fmoe_router_args router_args;
typedef fmoe_router_backward_args backward_args;

/* ---- The norm ---------------------------------------------------------------------------------------------------- */

/* Norm and its way back. A thread owns whole blocks of columns; statistics in double, tokens in order. */
enum { COLUMNS = 64 };

static const float *load_part(fmoe_dtype dtype, const void *tensor, int64_t first, int64_t width, float *buffer) {
    fmoe_to_f32(dtype, width, (const char *)tensor + first * (int64_t)fmoe_dtype_size(dtype), buffer);
    return buffer;
}

static void batch_statistics(const router_args *a, int64_t first, int64_t width, double *mean, double *var) {
    float row[COLUMNS];
    memset(mean, 0, COLUMNS * sizeof *mean);
    memset(var, 0, COLUMNS * sizeof *var);
    for (int64_t t = 0; t < a->T; t++) {
        load_part(a->dtype, a->x, t * a->d + first, width, row);
        for (int64_t c = 0; c < width; c++)
            mean[c] += row[c];
    }
    for (int64_t c = 0; c < width; c++)
        mean[c] /= (double)a->T;
    for (int64_t t = 0; t < a->T; t++) {
        load_part(a->dtype, a->x, t * a->d + first, width, row);
        for (int64_t c = 0; c < width; c++)
            var[c] += (row[c] - mean[c]) * (row[c] - mean[c]);
    }
    for (int64_t c = 0; c < width; c++)
        var[c] /= (double)a->T;
}

void router_norm(const router_args *a, bool move, float *x_hat, float *scale) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < a->d; first += COLUMNS) {
        int64_t width = smaller(COLUMNS, a->d - first);
        double mean[COLUMNS], var[COLUMNS], unbiased = (double)a->T / (double)(a->T - 1);
        if (a->training)
            batch_statistics(a, first, width, mean, var);
        for (int64_t c = 0; c < width; c++) {
            if (!a->training) {
                mean[c] = a->running_mean[first + c];
                var[c] = a->running_var[first + c];
            } else if (move && a->T > 0) {
                float *running_mean = a->running_mean + first + c, *running_var = a->running_var + first + c;
                *running_mean += (float)(FMOE_NORM_MOMENTUM * (mean[c] - *running_mean));
                *running_var += (float)(FMOE_NORM_MOMENTUM * (unbiased * var[c] - *running_var));
            }
            scale[first + c] = (float)(1 / sqrt(var[c] + FMOE_NORM_EPS));
        }
        for (int64_t t = 0; t < a->T; t++) {
            float row[COLUMNS];
            load_part(a->dtype, a->x, t * a->d + first, width, row);
            for (int64_t c = 0; c < width; c++)
                x_hat[t * a->d + first + c] = (float)(row[c] - mean[c]) * scale[first + c];
        }
    }
}

/* dx = (dx̂ − mean(dx̂) − x̂ · mean(dx̂ · x̂)) · scale in training, dx̂ · scale in evaluation; in the layer plus what the
 * other two branches sent back. */
static void norm_backward(const router_args *a, const float *x_hat, const float *scale, const float *dx_hat,
                          const float *others, void *dx) {
    int64_t d = a->d;
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < d; first += COLUMNS) {
        int64_t width = smaller(COLUMNS, d - first);
        double sum[COLUMNS] = {0}, with_x_hat[COLUMNS] = {0};
        for (int64_t t = 0; a->training && t < a->T; t++)
            for (int64_t c = 0; c < width; c++) {
                sum[c] += dx_hat[t * d + first + c];
                with_x_hat[c] += (double)dx_hat[t * d + first + c] * x_hat[t * d + first + c];
            }
        for (int64_t c = 0; c < width; c++) {
            sum[c] /= (double)a->T;
            with_x_hat[c] /= (double)a->T;
        }
        for (int64_t t = 0; t < a->T; t++) {
            float row[COLUMNS];
            for (int64_t c = 0; c < width; c++) {
                int64_t i = t * d + first + c;
                double through = dx_hat[i] - sum[c] - x_hat[i] * with_x_hat[c];
                row[c] = (others ? others[i] : 0) + (float)through * scale[first + c];
            }
            fmoe_from_f32(a->dtype, width, row, (char *)dx + (t * d + first) * (int64_t)fmoe_dtype_size(a->dtype));
        }
    }
}

/* ---- The products ------------------------------------------------------------------------------------------------ */

size_t router_gemm_workspace(int64_t T, int64_t d, int64_t n) {
    return larger(gemm_workspace(T, n, d), larger(gemm_workspace(T, d, n), gemm_workspace(n, d, T)));
}

const void *router_gate_side(const router_args *a, int side) {
    return (const char *)a->gate + side * a->n * a->d * (int64_t)fmoe_dtype_size(a->dtype);
}

// [router-gradients]
/* dx̂ = dz · gate and dgate = dzᵀ · x̂, a side at a time; then through the norm. */
fmoe_status router_gradients(const router_args *a, const router_buffers *b, const float *dlogits, const float *others,
                             void *dx, void *dgate, void *workspace, size_t bytes) {
    int64_t T = a->T, d = a->d, n = a->n;
    gemm_operand x_hat_t = by_columns(FMOE_F32, b->x_hat, d);
    gemm_target first = {FMOE_F32, b->dx_hat, d};
    gemm_addend second = {b->dx_hat, first};
    for (int side = 0; side < 2; side++) {
        const float *dz = dlogits + side * T * n;
        gemm_operand dz_rows = by_rows(FMOE_F32, dz, n), dz_t = by_columns(FMOE_F32, dz, n);
        gemm_operand gate_t = by_columns(a->dtype, router_gate_side(a, side), d);
        gemm_target of_side = {a->dtype, (char *)dgate + side * n * d * (int64_t)fmoe_dtype_size(a->dtype), d};
        TRY(gemm(T, d, n, &dz_rows, &gate_t, side ? add_and_store : gemm_store, side ? (void *)&second : &first,
                 workspace, bytes));
        TRY(gemm(n, d, T, &dz_t, &x_hat_t, gemm_store, &of_side, workspace, bytes));
    }
    norm_backward(a, b->x_hat, b->scale, b->dx_hat, others, dx);
    return FMOE_OK;
}
// [/router-gradients]

/* ---- The ladder -------------------------------------------------------------------------------------------------- */

static router_args forward_of(const backward_args *a) {
    return (router_args){.T = a->T,
                         .d = a->d,
                         .n = a->n,
                         .training = a->training,
                         .dtype = a->dtype,
                         .x = a->x,
                         .gate = a->gate,
                         .running_mean = (float *)a->running_mean,
                         .running_var = (float *)a->running_var};
}

static router_buffers carve_buffers(const backward_args *a, void *workspace, size_t *used) {
    router_buffers b;
    b.x_hat = carve_floats(workspace, used, a->T * a->d);
    b.scale = carve_floats(workspace, used, a->d);
    b.dx_hat = carve_floats(workspace, used, a->T * a->d);
    return b;
}

static size_t rows_workspace(const void *args) {
    size_t used = 0;
    carve_buffers(args, NULL, &used);
    return used;
}

static size_t packed_workspace(const void *args) {
    const backward_args *a = args;
    return rows_workspace(args) + router_gemm_workspace(a->T, a->d, a->n);
}

/* A token's dz, which has the sides one after the other. */
static float dz_of(const backward_args *a, int64_t t, int64_t j) {
    int64_t side = j / a->n;
    return a->dlogits[(side * a->T + t) * a->n + j - side * a->n];
}

// [router-rows]
/* Every row of dx̂ and of dgate is a sum of rows, and has one owner. */
static fmoe_status rows(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace_bytes, (void)stream;
    const backward_args *a = args;
    const router_args forward = forward_of(a);
    int64_t T = a->T, d = a->d, keys = 2 * a->n;
    size_t used = 0;
    router_buffers b = carve_buffers(a, workspace, &used);
    router_norm(&forward, false, b.x_hat, b.scale);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++)
        for (int64_t first = 0; first < d; first += COLUMNS) {
            float sum[COLUMNS] = {0}, gate[COLUMNS];
            int64_t width = smaller(COLUMNS, d - first);
            for (int64_t j = 0; j < keys; j++) {
                load_part(a->dtype, a->gate, j * d + first, width, gate);
                for (int64_t c = 0; c < width; c++)
                    sum[c] += dz_of(a, t, j) * gate[c];
            }
            memcpy(b.dx_hat + t * d + first, sum, (size_t)width * sizeof *sum);
        }
#pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < keys; j++)
        for (int64_t first = 0; first < d; first += COLUMNS) {
            float sum[COLUMNS] = {0};
            int64_t width = smaller(COLUMNS, d - first);
            for (int64_t t = 0; t < T; t++)
                for (int64_t c = 0; c < width; c++)
                    sum[c] += dz_of(a, t, j) * b.x_hat[t * d + first + c];
            fmoe_from_f32(a->dtype, width, sum,
                          (char *)a->dgate + (j * d + first) * (int64_t)fmoe_dtype_size(a->dtype));
        }
    norm_backward(&forward, b.x_hat, b.scale, b.dx_hat, NULL, a->dx);
    return FMOE_OK;
}
// [/router-rows]

static fmoe_status packed(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)stream;
    const backward_args *a = args;
    const router_args forward = forward_of(a);
    size_t used = 0;
    router_buffers b = carve_buffers(a, workspace, &used);
    router_norm(&forward, false, b.x_hat, b.scale);
    return router_gradients(&forward, &b, a->dlogits, NULL, a->dx, a->dgate, (char *)workspace + used,
                            workspace_bytes - used);
}

const fmoe_rung chapter9_router_rungs[] = {
    {"rows", LEVEL_CORE, BACKEND_CPU, "A row of dx̂ a token and a row of dgate a key, each a sum of rows.", rows,
     .workspace = rows_workspace},
    {"packed", LEVEL_CORE, BACKEND_CPU, "Two products a side in chapter 6's tiles: packing does the transposing.",
     packed, .workspace = packed_workspace},
    {.run = NULL},
};
