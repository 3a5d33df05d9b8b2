// Rung: all pairs of the best keys of each side.
#include "block.cuh"

// [key-lists]
// A block of 256 a token; shared: 2n logits, both sides' keys and the pairs of the m = min(K, n) best, 8 bytes each and
// padded to powers of two, 56 KB at most. Traffic: logits once, results once. Work: a bitonic sort of m² pairs, log²
// steps of m² / 2 comparisons.
__global__ void __launch_bounds__(BLOCK_THREADS) key_lists_kernel(topk_task a, int keys, int pairs) {
    extern __shared__ uint64_t ranked[];
    uint64_t *pair = ranked + 2 * keys;
    float *side = (float *)(pair + pairs);
    int64_t t = blockIdx.x;
    load_token(a, t, side);
    rank_sides(a, side, keys, ranked);
    int m = min(a.K, a.n);
    for (int c = threadIdx.x; c < pairs; c += BLOCK_THREADS)
        pair[c] = c < m * m ? pair_of(ranked[c / m], ranked[keys + c % m], a.n) : 0;
    __syncthreads();
    sort_block(pairs, pair);
    finish_block(a, t, side, pair);
}
// [/key-lists]

extern "C" fmoe_status cuda_topk_key_lists(const void *args, void *workspace, size_t bytes, void *stream) {
    topk_task a;
    (void)workspace, (void)bytes;
    TRY(topk_from_args(args, &a));
    int m = a.K < a.n ? a.K : a.n, keys = power_of_two_from(a.n), pairs = power_of_two_from(m * m);
    if (pairs > TOPK_LIST_PAIRS)
        return fmoe_fail(FMOE_UNSUPPORTED, "the pairs of %d keys a side exceed %d", m, TOPK_LIST_PAIRS);
    if (a.T == 0)
        return FMOE_OK;
    size_t shared = (size_t)(2 * keys + pairs) * sizeof(uint64_t) + 2 * (size_t)a.n * sizeof(float);
    TRY(cuda_call("key_lists_kernel",
                  cudaFuncSetAttribute(key_lists_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared)));
    key_lists_kernel<<<a.T, BLOCK_THREADS, shared, (cudaStream_t)stream>>>(a, keys, pairs);
    return launched("key_lists_kernel");
}
