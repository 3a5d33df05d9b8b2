// Rung: for a token or a few, what counts is the reading of the weights: a warp a row, as much of it in flight as the
// registers hold.
#include "rows.cuh"

// Launch: a warp a hidden unit of a token, 8 a block, the tokens of the same units one block behind the other. Shared
// memory: none. Traffic: gate and up once from memory, and once a token from the L2; x once a warp from the first-level
// cache.
template <typename E>
__global__ void __launch_bounds__(ROWS_THREADS, 4) hidden_rows_kernel(fmoe_mlp_args a, E *hidden) {
    int64_t unit = (int64_t)(blockIdx.x / a.T) * ROWS_WARPS + threadIdx.x / WARP, t = blockIdx.x % a.T;
    start_next_kernel();
    if (unit < a.I)
        hidden_unit<E>(a, hidden, unit, t);
}

// Launch: a warp an output, 8 a block, while hidden_rows_kernel ends. Shared memory: none. Traffic: down as gate above,
// the hidden units once a warp.
template <typename E>
__global__ void __launch_bounds__(ROWS_THREADS, 1) output_rows_kernel(fmoe_mlp_args a, const E *hidden, mlp_target y) {
    int64_t column = (int64_t)(blockIdx.x / a.T) * ROWS_WARPS + threadIdx.x / WARP, t = blockIdx.x % a.T;
    if (column >= a.d)
        return;
    const E *const rows[1] = {(const E *)a.down + column * a.I};
    float sums[1] = {};
    warp_dots<E, 1, 16>(rows, hidden + t * a.I, (int)a.I, true, sums);
    if (threadIdx.x % WARP == 0)
        store_result<E>(y, t * a.d + column, sums[0]);
}

fmoe_status mlp_rows_output(const fmoe_mlp_args *args, const mlp_join *join, bool overlap, const void *hidden,
                            cudaStream_t stream) {
    unsigned blocks = (unsigned)(ceil_div(args->d, ROWS_WARPS) * args->T);
    WITH_DTYPE(args->dtype, E,
               TRY(launch_overlapping("output_rows_kernel", overlap && fmoe_cuda_level() >= LEVEL_HOPPER,
                                      output_rows_kernel<E>, blocks, ROWS_THREADS, 0, stream, *args, (const E *)hidden,
                                      mlp_target_of(args, join))));
    return FMOE_OK;
}

template <typename E>
static fmoe_status run(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, cudaStream_t stream) {
    bool overlap;
    hidden_rows_kernel<E>
        <<<(unsigned)(ceil_div(args->I, ROWS_WARPS) * args->T), ROWS_THREADS, 0, stream>>>(*args, (E *)workspace);
    TRY(launched("hidden_rows_kernel"));
    TRY(mlp_wait(join, stream, &overlap));
    return mlp_rows_output(args, join, overlap, workspace, stream);
}

fmoe_status mlp_rows_into(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, size_t bytes,
                          cudaStream_t stream) {
    TRY(mlp_check(args, workspace, bytes, cuda_mlp_hidden_bytes(args)));
    TRY(mlp_check_rows(args, cuda_mlp_few_rows(args), "at most 8 tokens, and rows of multiples of 16 bytes"));
    if (args->T == 0)
        return FMOE_OK;
    WITH_DTYPE(args->dtype, E, TRY(run<E>(args, join, workspace, stream)));
    return FMOE_OK;
}

extern "C" fmoe_status cuda_mlp_rows(const void *args, void *workspace, size_t bytes, void *stream) {
    return mlp_rows_into((const fmoe_mlp_args *)args, NULL, workspace, bytes, (cudaStream_t)stream);
}
