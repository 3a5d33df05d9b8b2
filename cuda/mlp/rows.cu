// Rung: for a token or a few, what counts is the reading of the weights: a warp a row, as much of it in flight as the
// registers hold.
#include "../ptx.cuh"
#include "mlp.cuh"

#define ROWS_WARPS   8
#define ROWS_THREADS (ROWS_WARPS * WARP)

// 16 bytes of a row, zeros beyond its end; what is read ONCE goes past the first-level cache. The compiler,
// which would rather save registers, leaves such loads above a __syncwarp().
template <bool ONCE, typename E> __device__ inline uint4 load(const E *row, int pack, int packs) {
    uint4 v = make_uint4(0, 0, 0, 0);
    const E *from = row + pack * pack16<E>::count;
    if (pack < packs && ONCE)
        asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(from)
                     : "memory");
    else if (pack < packs)
        asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(from)
                     : "memory");
    return v;
}

// [warp-dots]
// The dot products of ROWS rows of weights with one of x. BATCH loads of 16 bytes a row and lane are on their way
// before the first is used; with `wait` x is another kernel's, which may still run, and the weights do not wait for it.
template <typename E, int ROWS, int BATCH>
__device__ inline void warp_dots(const E *const (&rows)[ROWS], const E *x, int columns, bool wait,
                                 float (&sums)[ROWS]) {
    constexpr int each = pack16<E>::count;
    int lane = threadIdx.x % WARP, packs = columns / each;
    for (int first = lane; first < packs + lane; first += BATCH * WARP) {
        uint4 weights[ROWS][BATCH], token[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++)
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                weights[r][b] = load<true>(rows[r], first + b * WARP, packs);
        if (wait && first == lane)
            wait_for_kernel_before();
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            token[b] = load<false>(x, first + b * WARP, packs);
        __syncwarp();
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            float values[each], weight[each];
            unpack_f32<E>(token[b], values);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                unpack_f32<E>(weights[r][b], weight);
#pragma unroll
                for (int i = 0; i < each; i++)
                    sums[r] = fmaf(values[i], weight[i], sums[r]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        sums[r] = warp_sum(sums[r]);
}
// [/warp-dots]

// Launch: a warp a hidden unit of a token, 8 a block, the tokens of the same units one block behind the other. Shared
// memory: none. Traffic: gate and up once from memory, and once a token from the L2; x once a warp from the first-level
// cache.
template <typename E>
__global__ void __launch_bounds__(ROWS_THREADS, 4) hidden_rows_kernel(fmoe_mlp_args a, E *hidden) {
    int64_t unit = (int64_t)(blockIdx.x / a.T) * ROWS_WARPS + threadIdx.x / WARP, t = blockIdx.x % a.T;
    start_next_kernel();
    if (unit >= a.I)
        return;
    const E *const rows[2] = {(const E *)a.gate + unit * a.d, (const E *)a.up + unit * a.d};
    float sums[2] = {};
    warp_dots<E, 2, 4>(rows, (const E *)a.x + t * a.d, (int)a.d, false, sums);
    if (threadIdx.x % WARP == 0)
        hidden[t * a.I + unit] = from_f32<E>(swiglu(sums[0], sums[1]));
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

template <typename E>
static fmoe_status run(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, cudaStream_t stream) {
    int64_t units = ceil_div(args->I, ROWS_WARPS) * args->T, columns = ceil_div(args->d, ROWS_WARPS) * args->T;
    bool overlap;
    hidden_rows_kernel<E><<<(unsigned)units, ROWS_THREADS, 0, stream>>>(*args, (E *)workspace);
    TRY(launched("hidden_rows_kernel"));
    TRY(mlp_wait(join, stream, &overlap));
    return launch_overlapping("output_rows_kernel", overlap && fmoe_cuda_level() >= LEVEL_HOPPER, output_rows_kernel<E>,
                              (unsigned)columns, ROWS_THREADS, 0, stream, *args, (const E *)workspace,
                              mlp_target_of(args, join));
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
