// Phase 1 by ranges of experts: whole rows, from a part of the table that the L2 keeps.
#ifndef FMOE_EXPERT_RANGES_CUH
#define FMOE_EXPERT_RANGES_CUH

#include "launch.cuh"

#define LISTED 1024 // pairs that a block looks through at a time

// The pairs base to base + LISTED of token t whose experts lie in [first_expert, first_expert + span), in order, into
// list; their number. A bad index belongs to the first range.
// [list-range]
static __device__ inline int list_range(const expert_task &a, int t, int base, int first_expert, int span, int *list,
                                        int *counts) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int chunks = (min(LISTED, a.K - base) + WARP - 1) / WARP, each = (chunks + warps - 1) / warps;
    int from = base + warp * each * WARP, to = min(min(a.K, base + LISTED), from + each * WARP);
    unsigned mine = 0; // a bit a chunk: at most 32 of them
    int found = 0;
    for (int c = 0; c < each; c++) {
        int k = from + c * WARP + lane;
        int32_t e = k < to ? expert_of_pair(a, (int64_t)t * a.K + k) : 0;
        bool in = k < to && (e == NO_EXPERT ? first_expert == 0 : (unsigned)(e - first_expert) < (unsigned)span);
        mine |= (unsigned)in << c;
        found += __popc(__ballot_sync(ALL_LANES, in));
    }
    if (lane == 0)
        counts[warp] = found;
    __syncthreads();
    int at = 0, all = 0;
    for (int w = 0; w < warps; w++) {
        at += w < warp ? counts[w] : 0;
        all += counts[w];
    }
    for (int c = 0; c < each; c++) {
        bool in = mine >> c & 1;
        unsigned both = __ballot_sync(ALL_LANES, in);
        if (in)
            list[at + __popc(both & ((1u << lane) - 1))] = from + c * WARP + lane;
        at += __popc(both);
    }
    __syncthreads();
    return all;
}
// [/list-range]

// Launch: a block of up to R::WARPS warps a token and range, all tokens of a range before the next. Shared memory: the
// numbers of up to 1,024 pairs. after: what is read once all ranges are done, or nothing. Traffic: a row a pair through
// the L2, each row of the table once from memory; indices and x once a range; 4 bytes a pair out. [ranges]
template <typename R>
__global__ void __launch_bounds__(R::WARPS *WARP, R::BLOCKS) ranges_kernel(expert_task a, int span, table_part after) {
    __shared__ int list[LISTED], counts[WARP];
    int range = blockIdx.x / a.T, t = blockIdx.x % a.T, lane = threadIdx.x % WARP;
    start_next_kernel();
    if (after.table) {
        int first = (range + 1) * span, row_bytes = a.d * (int)sizeof(typename R::element);
        table_part next = {a.down, first, min(span, a.N - first), 0, row_bytes};
        prefetch(next.rows > 0 ? next : after, row_bytes, t, a.T);
    }
    for (int base = 0; base < a.K; base += LISTED) {
        int listed = list_range(a, t, base, range * span, span, list, counts), begin, end;
        share_of_warp(listed, &begin, &end);
        for (int first = begin; first < end; first += WARP) {
            bool has = first + lane < end;
            int64_t pair = (int64_t)t * a.K + (has ? list[first + lane] : 0);
            int32_t expert = has ? expert_of_pair(a, pair) : NO_EXPERT;
            float weight = has ? a.weights[pair] : 0;
            float s = dots_of_columns<R>(a, t, 0, a.d, expert, min(WARP, end - first), lane);
            if (has)
                store_pair(a, pair, expert, s, weight);
        }
        __syncthreads();
    }
}
// [/ranges]

#endif
