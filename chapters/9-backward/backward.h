/* What the four ladders share: a few helpers, and the parts of the first three that the layer is made of. */
#ifndef FMOE_BACKWARD_H
#define FMOE_BACKWARD_H

#include "../gemm.h"
#include "../rows.h"
#include "../steps.h"
#include "../vec.h"
#include "../workspace.h"

#include <omp.h>

static inline int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static inline size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

static inline float sigmoid(float s) {
    return 1 / (1 + exp_f32(-s));
}

/* silu'(s) = σ(s) · (1 + s · (1 − σ(s))) */
static inline float silu_derivative(float s) {
    float sig = sigmoid(s);
    return sig * (1 + s * (1 - sig));
}

static inline float *carve_floats(void *workspace, size_t *used, int64_t count) {
    return carve(workspace, used, (size_t)count * sizeof(float));
}

/* A tensor as float32: itself, or its copy. */
static inline const float *as_f32(fmoe_dtype dtype, const void *tensor, int64_t count, float *copy) {
    if (dtype == FMOE_F32)
        return tensor;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i += 4096)
        fmoe_to_f32(dtype, smaller(4096, count - i), (const char *)tensor + 2 * i, copy + i);
    return copy;
}

/* The best rung of each of the first three ladders. */
fmoe_rung_fn cpu_topk_backward_best, cpu_expert_backward_best, cpu_mlp_backward_best;
fmoe_workspace_fn cpu_topk_backward_best_workspace, cpu_expert_backward_best_workspace, cpu_mlp_backward_best_workspace;

/* ---- expert.c ---------------------------------------------------------------------------------------------------- */

/* Of the ordered rungs: x and dy as float32 where they are not, ds by pair, rows for each thread, and what `balanced`
 * adds: its list of items and the sums of items that share an expert. */
typedef struct {
    float *x, *dy, *ds, *rows;
    struct item *items;
    float *parts;
} ordered;

ordered carve_ordered(const fmoe_expert_backward_args *a, void *workspace, size_t *used);

/* ROWS rows as loaded, and two more. */
static inline float *thread_rows(const fmoe_expert_backward_args *a, const ordered *o) {
    return o->rows + (size_t)omp_get_thread_num() * (ROWS + 2) * padded(a->d);
}

/* ddown, dup and dweights; ds stays in `o`. */
void expert_gradients(const fmoe_expert_backward_args *a, const ordered *o);

/* A table's rows, gathered token by token: T rows of sums in a type of their own. */
void gather_rows(const fmoe_expert_backward_args *a, const ordered *o, const void *table, const float *scale,
                 fmoe_dtype sums_dtype, void *sums);

/* ---- mlp.c ------------------------------------------------------------------------------------------------------- */

/* The hidden units and the gradients of both pre-activations, [T, I] each. */
typedef struct {
    float *h, *dp, *dq;
} hidden;

hidden carve_hidden(const fmoe_mlp_backward_args *a, void *workspace, size_t *used);
size_t mlp_gemm_workspace(int64_t T, int64_t d, int64_t I);

/* p and q where dp and dq will be, and h. */
fmoe_status mlp_pre_activations(const fmoe_mlp_backward_args *a, const hidden *l, void *workspace, size_t bytes);

/* All gradients from there. sums [T, d] holds what else dx is the sum of. */
fmoe_status mlp_gradients(const fmoe_mlp_backward_args *a, const hidden *l, float *sums, gemm_target dx,
                          void *workspace, size_t bytes);

/* An epilogue that adds a tile to float32 sums, and stores the result in any type. */
typedef struct {
    const float *sums;
    gemm_target target;
} gemm_addend;

gemm_epilogue add_and_store;

/* ---- router.c ---------------------------------------------------------------------------------------------------- */

/* x̂ [T, d] and the factor of every column; `move` says whether the running buffers follow a training batch. */
void router_norm(const fmoe_router_args *a, bool move, float *x_hat, float *scale);

typedef struct {
    float *x_hat, *scale, *dx_hat; /* [T, d], [d], [T, d]; the first two as router_norm left them */
} router_buffers;

/* dx and dgate, in the storage type; others [T, d] is added to dx before it is rounded, or NULL. */
fmoe_status router_gradients(const fmoe_router_args *a, const router_buffers *b, const float *dlogits,
                             const float *others, void *dx, void *dgate, void *workspace, size_t bytes);
size_t router_gemm_workspace(int64_t T, int64_t d, int64_t n);
const void *router_gate_side(const fmoe_router_args *a, int side); /* [n, d] */

#endif
