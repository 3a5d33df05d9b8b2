// Rung `chooser`: the strategy that a cost model says is the fastest.
#include "../expert/expert.h"
#include "strategies.cuh"

#include <math.h>

// Measured on one H200; a rate is per microsecond.
// [constants]
#define US_TOKEN     7     // whatever there is to do: launches, the first loads' latency
#define US_DENSE     27    // the same: three kernels after the lists, tiles that are not whole
#define US_ROWS      20    // two
#define GATHER_BYTES 8.4e6 // of rows, from tables or slices of them in the L2
#define ALONE_BYTES  55e3  // of rows, by the one multiprocessor that has a token
#define MEMORY_BYTES 4.0e6 // of tables, read once
#define DENSE_FLOP   780e6 // of either dense product
#define DENSE_PAIRS  33e3  // sorted into lists and picked
#define ROWS_PAIRS   90e3  // sorted into lists; picking is in the next line
#define ROWS_BYTES   5.8e6 // of tiles of gathered tokens and of experts, from the L2
// [/constants]

// [rows-a-token]
// K pairs thrown at n rows leave n · (1 − exp(−K / n)) rows that are not empty. A router's pairs cluster: they behave
// like 1.1 · K^0.7 throws.
static double rows_a_token(const fmoe_expert_args *a) {
    double n = (double)fmoe_num_keys(a->N), throws = (double)a->K;
    if (a->from_router)
        throws = fmin(throws, 1.1 * pow(throws, 0.7));
    return n * (1 - exp(-throws / n));
}
// [/rows-a-token]

// [model]
// One phase of the token strategy: a row a pair through the L2, or each row that is used once from memory, or one
// token's rows through one multiprocessor, whichever takes longest.
static double phase_us(const fmoe_expert_args *a) {
    double row = (double)a->d * (double)fmoe_dtype_size(a->dtype), N = (double)a->N, pairs = (double)(a->T * a->K);
    double used = N * (1 - exp(-pairs / N));
    return fmax(fmax(pairs * row / GATHER_BYTES, used * row / MEMORY_BYTES), (double)a->K * row / ALONE_BYTES);
}

static double dense_us(const fmoe_expert_args *a) {
    double tokens = ceil((double)a->T / 128) * 128, N = (double)a->N, d = (double)a->d;
    double product = fmax(2 * tokens * N * d / DENSE_FLOP, 2 * N * d / MEMORY_BYTES);
    return US_DENSE + (double)(a->T * a->K) / DENSE_PAIRS + 2 * product;
}

static double rows_us(const fmoe_expert_args *a) {
    double n = (double)fmoe_num_keys(a->N), tokens = (double)a->T * rows_a_token(a) / n; // of a grid row
    double columns = (double)cuda_strategy_rows_columns(a->N), across = ceil(n / columns);
    double tiles = ceil(tokens / 128) * ceil((double)a->N / n) * across, bytes = (128 + columns) * (double)a->d * 2;
    return US_ROWS + (double)(a->T * a->K) / ROWS_PAIRS + tiles * bytes / ROWS_BYTES + phase_us(a);
}

extern "C" double cuda_strategy_cost_us(cuda_strategy s, const fmoe_expert_args *a) {
    if (s == CUDA_STRATEGY_TOKEN)
        return US_TOKEN + 2 * phase_us(a);
    if (fmoe_cuda_level() < 2)
        return INFINITY;
    if (s == CUDA_STRATEGY_DENSE)
        return cuda_strategy_dense_fits(a) ? dense_us(a) : INFINITY;
    return cuda_strategy_rows_fits(a) ? rows_us(a) : INFINITY;
}

extern "C" cuda_strategy cuda_strategy_choose(const fmoe_expert_args *a) {
    int best = CUDA_STRATEGY_TOKEN;
    for (int s = best + 1; s < CUDA_NUM_STRATEGIES; s++)
        if (cuda_strategy_cost_us((cuda_strategy)s, a) < cuda_strategy_cost_us((cuda_strategy)best, a))
            best = s;
    return (cuda_strategy)best;
}
// [/model]

extern "C" size_t cuda_strategy_chooser_bytes(const void *args) {
    switch (cuda_strategy_choose((const fmoe_expert_args *)args)) {
    case CUDA_STRATEGY_DENSE:
        return cuda_strategy_dense_bytes(args);
    case CUDA_STRATEGY_ROWS:
        return cuda_strategy_rows_bytes(args);
    default:
        return cuda_expert_slices_bytes(args);
    }
}

extern "C" fmoe_status cuda_strategy_run(const fmoe_expert_args *a, float *pre_activations, void *workspace,
                                         size_t workspace_bytes, void *stream) {
    switch (cuda_strategy_choose(a)) {
    case CUDA_STRATEGY_DENSE:
        return cuda_strategy_dense_run(a, pre_activations, workspace, workspace_bytes, stream);
    case CUDA_STRATEGY_ROWS:
        return cuda_strategy_rows_run(a, pre_activations, workspace, workspace_bytes, stream);
    default:
        break;
    }
    expert_task task;
    TRY(expert_from_args(a, workspace, workspace_bytes, cuda_expert_slices_bytes(a), &task));
    if (a->T == 0)
        return cuda_call("clearing the note", cudaMemsetAsync(workspace, 0, CUDA_NOTE_BYTES, (cudaStream_t)stream));
    task.pre_activations = pre_activations;
    return expert_slices(task, (cudaStream_t)stream);
}

extern "C" fmoe_status cuda_strategy_chooser(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    return cuda_strategy_run((const fmoe_expert_args *)args, NULL, workspace, workspace_bytes, stream);
}
