/* The expert step's strategies on the GPU (chapter 7), for their ladder and for fmoe_cuda_expert. */
#ifndef FMOE_CUDA_STRATEGIES_H
#define FMOE_CUDA_STRATEGIES_H

#include "../../chapters/steps.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    CUDA_STRATEGY_TOKEN, /* a row of either table a pair: chapter 5's last rung */
    CUDA_STRATEGY_DENSE, /* every token with every expert, the chosen pairs kept */
    CUDA_STRATEGY_ROWS,  /* a token with all experts of each grid row that it chose from, then as by token */
    CUDA_NUM_STRATEGIES
} cuda_strategy;

/* Each takes fmoe_expert_args with device pointers and notes bad indices. */
fmoe_rung_fn cuda_strategy_dense, cuda_strategy_rows, cuda_strategy_chooser;
fmoe_workspace_fn cuda_strategy_dense_bytes, cuda_strategy_rows_bytes, cuda_strategy_chooser_bytes;
/* 16-bit storage, rows at multiples of 16 bytes, a K and an N that the lists can count. */
bool cuda_strategy_dense_fits(const void *args), cuda_strategy_rows_fits(const void *args);

/* What the model says a strategy takes on the GPU, in microseconds; infinity where it does not fit. */
double cuda_strategy_cost_us(cuda_strategy s, const fmoe_expert_args *a);
/* The cheapest by the model. It depends on T, N, K, d, dtype, from_router and on what this build and this GPU can run:
 * not on the indices. */
cuda_strategy cuda_strategy_choose(const fmoe_expert_args *a);

/* Columns of a tile of Cartesian rows for a table of N experts. */
int cuda_strategy_rows_columns(int64_t N);

/* The rungs with more: pre_activations [T, K] may be NULL. cuda_strategy_run is the chooser, with the chooser's
 * workspace, and what fmoe_cuda_expert can be. */
fmoe_status cuda_strategy_run(const fmoe_expert_args *a, float *pre_activations, void *workspace,
                              size_t workspace_bytes, void *stream);
fmoe_status cuda_strategy_dense_run(const fmoe_expert_args *a, float *pre_activations, void *workspace,
                                    size_t workspace_bytes, void *stream);
fmoe_status cuda_strategy_rows_run(const fmoe_expert_args *a, float *pre_activations, void *workspace,
                                   size_t workspace_bytes, void *stream);

#ifdef __cplusplus
}
#endif
#endif
