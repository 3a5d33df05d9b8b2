// Rung: the staircase, for any n and K that the back end allows.
#include "block.cuh"

// [corners-gpu]
// The staircase as nested corners, a row and a column from each diagonal place (r, r): run 2r is the row, 2r + 1 the
// column below it. A warp takes every eighth run, its lanes the run's pairs.
__device__ static int run_length(const topk_task &a, int run) {
    int r = run / 2;
    return min(a.n, a.K / (r + 1)) - r - run % 2;
}

__device__ static uint64_t run_pair(const topk_task &a, const uint64_t *x, const uint64_t *y, int run, int i) {
    int r = run / 2;
    return run % 2 ? pair_of(x[r + 1 + i], y[r], a.n) : pair_of(x[r], y[r + i], a.n);
}
// [/corners-gpu]

// How many candidates are `least` or better. Sums are made again each time: 36,000 of them would not fit.
__device__ static int count_from(const topk_task &a, const uint64_t *x, const uint64_t *y, int runs, uint64_t least,
                                 int *total) {
    int found = 0;
    for (int run = threadIdx.x / WARP; run < runs; run += BLOCK_WARPS)
        for (int i = threadIdx.x % WARP, length = run_length(a, run); i < length; i += WARP)
            found += run_pair(a, x, y, run, i) >= least;
    __syncthreads();
    if (threadIdx.x == 0)
        *total = 0;
    __syncthreads();
    atomicAdd(total, found); // whole numbers: any order gives the same sum
    __syncthreads();
    return *total;
}

// [kth-best]
// The K-th best pair, bit by bit from the top: a bit stays set if K candidates still reach the number. Stops as soon as
// exactly K do; packed pairs all differ, so that happens at the last bit at the latest.
__device__ static uint64_t find_kth(const topk_task &a, const uint64_t *x, const uint64_t *y, int runs, int *total) {
    uint64_t least = 0;
    for (uint64_t bit = 1ull << 63; bit; bit >>= 1) {
        int found = count_from(a, x, y, runs, least | bit, total);
        if (found >= a.K)
            least |= bit;
        if (found == a.K)
            break;
    }
    return least;
}
// [/kth-best]

// A block of 256 a token; shared: 2n logits, both sides' keys and the K chosen, 8 bytes each and padded to powers of
// two, 56 KB at most. Traffic: logits once, results once. Work: the sorts, and some 20 passes over K·ln K candidates.
__global__ void __launch_bounds__(BLOCK_THREADS) staircase_kernel(topk_task a, int keys, int chosen) {
    extern __shared__ uint64_t ranked[];
    __shared__ int total;
    uint64_t *x = ranked, *y = ranked + keys, *best = y + keys;
    float *side = (float *)(best + chosen);
    int64_t t = blockIdx.x;
    load_token(a, t, side);
    rank_sides(a, side, keys, ranked);
    int runs = 0;
    for (int r = 0; r < a.n && (r + 1) * (r + 1) <= a.K; r++)
        runs += 2;
    uint64_t kth = find_kth(a, x, y, runs, &total);
    for (int c = threadIdx.x; c < chosen; c += BLOCK_THREADS)
        best[c] = 0;
    __syncthreads();
    if (threadIdx.x == 0)
        total = 0;
    __syncthreads();
    for (int run = threadIdx.x / WARP; run < runs; run += BLOCK_WARPS)
        for (int i = threadIdx.x % WARP, length = run_length(a, run); i < length; i += WARP) {
            uint64_t pair = run_pair(a, x, y, run, i);
            if (pair >= kth)
                best[atomicAdd(&total, 1)] = pair; // in any order: the sort follows
        }
    __syncthreads();
    sort_block(chosen, best);
    finish_block(a, t, side, best);
}

fmoe_status topk_run_staircase(const topk_task *task, cudaStream_t stream) {
    topk_task a = *task;
    if (a.T == 0)
        return FMOE_OK;
    int keys = power_of_two_from(a.n), chosen = power_of_two_from(a.K);
    size_t shared = (size_t)(2 * keys + chosen) * sizeof(uint64_t) + 2 * (size_t)a.n * sizeof(float);
    TRY(cuda_call("staircase_kernel",
                  cudaFuncSetAttribute(staircase_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared)));
    staircase_kernel<<<a.T, BLOCK_THREADS, shared, stream>>>(a, keys, chosen);
    return launched("staircase_kernel");
}

extern "C" fmoe_status cuda_topk_staircase(const void *args, void *workspace, size_t bytes, void *stream) {
    topk_task a;
    (void)workspace, (void)bytes;
    TRY(topk_from_args(args, &a));
    return topk_run_staircase(&a, (cudaStream_t)stream);
}
