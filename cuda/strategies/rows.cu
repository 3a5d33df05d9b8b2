// Rung `rows`: pre-activations by rows of the Cartesian grid on tensor cores, then the output token by token.
#include "../expert/launch.cuh"
#include "rows.cuh"

#include "../../chapters/workspace.h"

#define LIST_THREADS   256
#define TOKENS_AT_ONCE 8192 // whose bits a block lists before it takes the next ones

// Launch: a block of 256 threads a row of the grid. Shared memory: 1 KB. Traffic: 4 bytes a token in for each row, 4
// bytes a token that chose from the row out.
// [row-tokens]
static __global__ void __launch_bounds__(LIST_THREADS) row_tokens_kernel(rows_task task) {
    __shared__ unsigned bits[TOKENS_AT_ONCE / 32];
    __shared__ int warp_sums[LIST_THREADS / WARP];
    int row = blockIdx.x, T = task.a.T, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, listed = 0;
    int32_t *list = task.tokens + (int64_t)row * T;
    const uint32_t *masks = task.lists.chosen_groups + (int64_t)(row / 32) * T;
    start_next_kernel();
    wait_for_kernel_before();
    for (int first = 0; first < T; first += TOKENS_AT_ONCE) {
#pragma unroll 8
        for (int i = threadIdx.x; i < TOKENS_AT_ONCE; i += LIST_THREADS) {
            bool has = first + i < T && masks[first + i] >> row % 32 & 1;
            unsigned of_warp = __ballot_sync(ALL_LANES, has);
            if (lane == 0)
                bits[i / 32] = of_warp;
        }
        __syncthreads();
        // A thread lists 32 tokens, behind those of the threads before it.
        unsigned mine = bits[threadIdx.x];
        int place = __popc(mine);
        for (int step = 1; step < WARP; step *= 2) {
            int other = __shfl_up_sync(ALL_LANES, place, step);
            place += lane >= step ? other : 0;
        }
        if (lane == WARP - 1)
            warp_sums[warp] = place;
        __syncthreads();
        int all = 0;
        place -= __popc(mine);
        for (int w = 0; w < LIST_THREADS / WARP; w++) {
            place += w < warp ? warp_sums[w] : 0;
            all += warp_sums[w];
        }
        for (place += listed; mine; mine &= mine - 1)
            list[place++] = first + (int)threadIdx.x * 32 + __ffs(mine) - 1;
        listed += all;
        __syncthreads();
    }
    if (threadIdx.x == 0)
        task.counts[row] = listed;
}
// [/row-tokens]

// ---- Host

static size_t rows_carve(rows_task *task, void *workspace) {
    expert_task *a = &task->a;
    size_t used = 0;
    a->note = carve(workspace, &used, cuda_note_workspace(a->T));
    a->activations = (float *)carve(workspace, &used, (size_t)a->T * a->K * sizeof(float));
    task->lists = lists_by(a->N, fmoe_num_keys(a->N));
    lists_carve(&task->lists, a->T, a->K, false, workspace, &used);
    task->rows = task->lists.groups;
    task->counts = (int *)carve(workspace, &used, (size_t)task->rows * sizeof(int));
    task->tokens = (int32_t *)carve(workspace, &used, (size_t)task->rows * a->T * sizeof(int32_t));
    task->many = (float *)carve(workspace, &used, many_bytes(cuda_strategy_rows_columns(a->N)));
    return used;
}

// Tiles as wide as a grid row if there are such, else the width that leaves less of the last one empty.
extern "C" int cuda_strategy_rows_columns(int64_t N) {
    int64_t n = fmoe_num_keys(N);
    return ceil_div(n, 320) * 320 < ceil_div(n, 128) * 128 ? 320 : 128;
}

template <typename E, int COLUMNS> static fmoe_status first_product(const rows_task &task, cudaStream_t stream) {
    const expert_task &a = task.a;
    CUtensorMap down;
    size_t shared = sizeof(rows_shared<E, COLUMNS>) + 1024;
    TRY(describe_matrix("down_embed.weight", &down, a.dtype, a.down, a.N, a.d, COLUMNS == 320 ? 160 : COLUMNS));
    TRY(cuda_call("rows_kernel", cudaFuncSetAttribute(rows_kernel<E, COLUMNS>,
                                                      cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared)));
    return launch_overlapping("rows_kernel", true, rows_kernel<E, COLUMNS>, (unsigned)multiprocessors(),
                              PRODUCT_THREADS, shared, stream, task, down);
}

// The second phase of chapter 5's last rung, in slices of 256 bytes where the table is large.
template <typename E, slice_form F>
static fmoe_status output_of(const expert_task &a, bool large, cudaStream_t stream) {
    typedef reading<E, F, 16, 1, 4, 4, 8, true> narrow;
    typedef reading<E, F, 32, 1, 4, 2, 16, true> wide;
    return large ? launch_output<narrow>(a, 4, narrow::WIDTH, true, stream)
                 : launch_output<wide>(a, 1, wide::WIDTH, true, stream);
}

// [rows]
template <typename E> static fmoe_status rows(const rows_task &task, cudaStream_t stream) {
    const expert_task &a = task.a;
    TRY(sort_pairs(a, task.lists, false, stream));
    TRY(launch_overlapping("row_tokens_kernel", true, row_tokens_kernel, (unsigned)task.rows, LIST_THREADS, 0, stream,
                           task));
    if (cuda_strategy_rows_columns(a.N) == 320)
        TRY((first_product<E, 320>(task, stream)));
    else
        TRY((first_product<E, 128>(task, stream)));
    bool large = (int64_t)a.N * 512 > 12 << 20;
    return a.d % 256 == 0 ? output_of<E, WHOLE_SLICES>(a, large, stream) : output_of<E, CUT_SLICES>(a, large, stream);
}
// [/rows]

extern "C" bool cuda_strategy_rows_fits(const void *args) {
    const fmoe_expert_args *a = (const fmoe_expert_args *)args;
    token_lists lists = lists_by(a->N, fmoe_num_keys(a->N));
    return a->dtype != FMOE_F32 && a->d % 8 == 0 && a->K <= MOST_CHOSEN && lists.groups <= MOST_ROWS;
}

extern "C" size_t cuda_strategy_rows_bytes(const void *args) {
    rows_task task = {};
    task.a = strategy_task((const fmoe_expert_args *)args, NULL);
    return task.a.T > 0 ? rows_carve(&task, NULL) : CUDA_NOTE_BYTES;
}

extern "C" fmoe_status cuda_strategy_rows_run(const fmoe_expert_args *a, float *pre_activations, void *workspace,
                                              size_t workspace_bytes, void *stream) {
    TRY(expert_check(a->T, a->d, a->N, a->K, a->dtype, a->x, a->down, a->up, a->indices, a->weights, a->y));
    if (!cuda_strategy_rows_fits(a))
        return fmoe_fail(FMOE_UNSUPPORTED,
                         "rows: wants 16-bit storage, a hidden_size that is a multiple of 8, "
                         "num_experts_per_tok <= %d and num_experts <= %d",
                         MOST_CHOSEN, (MOST_ROWS - 1) * (MOST_ROWS - 1));
    TRY(check_workspace(workspace, workspace_bytes, cuda_strategy_rows_bytes(a)));
    if (a->T == 0)
        return cuda_call("clearing the note", cudaMemsetAsync(workspace, 0, CUDA_NOTE_BYTES, (cudaStream_t)stream));
    rows_task task = {};
    task.a = strategy_task(a, pre_activations);
    rows_carve(&task, workspace);
    if (a->dtype == FMOE_F16)
        return rows<__half>(task, (cudaStream_t)stream);
    return rows<__nv_bfloat16>(task, (cudaStream_t)stream);
}

extern "C" fmoe_status cuda_strategy_rows(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    return cuda_strategy_rows_run((const fmoe_expert_args *)args, NULL, workspace, workspace_bytes, stream);
}
