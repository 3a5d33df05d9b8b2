// Rung: K scans over all pairs.
#include "block.cuh"

// The best of the block's numbers, for every thread.
__device__ static uint64_t block_best(uint64_t best, uint64_t *scratch) {
    for (int step = WARP / 2; step; step /= 2) {
        uint64_t other = __shfl_xor_sync(ALL_LANES, best, step);
        best = other > best ? other : best;
    }
    __syncthreads();
    if (threadIdx.x % WARP == 0)
        scratch[threadIdx.x / WARP] = best;
    __syncthreads();
    for (int w = 0; w < BLOCK_WARPS; w++)
        best = scratch[w] > best ? scratch[w] : best;
    return best;
}

// [scans]
// A block of 256 a token; shared: 2n logits and the K chosen. Traffic: each logit read once, each result written once.
// Work: K·n² visits a token.
__global__ void __launch_bounds__(BLOCK_THREADS) scans_kernel(topk_task a) {
    extern __shared__ uint64_t best[];
    __shared__ uint64_t scratch[BLOCK_WARPS];
    float *x = (float *)(best + a.K), *y = x + a.n;
    int64_t t = blockIdx.x;
    load_token(a, t, x);
    uint64_t last = UINT64_MAX;
    for (int k = 0; k < a.K; k++) {
        uint64_t mine = 0;
        for (int i = threadIdx.x / WARP; i < a.n; i += BLOCK_WARPS)
            for (int j = threadIdx.x % WARP; j < a.n; j += WARP) {
                uint64_t pair = pack(x[i] + y[j], i * a.n + j);
                if (pair < last && pair > mine)
                    mine = pair;
            }
        last = block_best(mine, scratch);
        if (threadIdx.x == 0)
            best[k] = last;
    }
    __syncthreads();
    finish_block(a, t, x, best);
}
// [/scans]

extern "C" fmoe_status cuda_topk_scans(const void *args, void *workspace, size_t bytes, void *stream) {
    topk_task a;
    (void)workspace, (void)bytes;
    TRY(topk_from_args(args, &a));
    if (a.T == 0)
        return FMOE_OK;
    size_t shared = (size_t)a.K * sizeof(uint64_t) + 2 * (size_t)a.n * sizeof(float);
    scans_kernel<<<a.T, BLOCK_THREADS, shared, (cudaStream_t)stream>>>(a);
    return launched("scans_kernel");
}
