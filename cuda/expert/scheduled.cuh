// Phase 1 along the schedule: an expert's row stays in registers, the rows of its tokens are gathered.
#ifndef FMOE_EXPERT_SCHEDULED_CUH
#define FMOE_EXPERT_SCHEDULED_CUH

#include "launch.cuh"

typedef struct {
    const int32_t *offsets; // [N + 1]
    const int32_t *pairs;   // [T·K], experts rising; the ones with a bad index are -1, at the end
} expert_order;

// [expert-pairs]
// The pairs of one expert that `count` lanes from `first` on have: their sums, to the lanes.
template <typename R>
__device__ inline float dots_of_expert(const expert_task &a, int32_t expert, int32_t pair, int first, int count,
                                       int lane) {
    typedef typename R::element E;
    bool has = lane >= first && lane < first + count;
    int32_t token = has ? pair / a.K : NO_EXPERT;
    float s = 0;
    for (int column = 0; column < a.d; column += R::WIDTH) {
        float down[R::PARTS];
        keep_row<R>((const E *)a.down + (int64_t)expert * a.d + column, a.d - column, lane, down);
        s += dots<R, true>(down, slice_of<R>(a.x, a.d, column, token), first, count, a.d - column, lane);
    }
    return s;
}
// [/expert-pairs]

// Launch: a block of R::WARPS warps an expert. Shared memory: none. Traffic: the expert's row from memory, a row of x a
// pair through the L2, 16 bytes a pair for its place, weight and activation, each in a sector of its own.
// [block-an-expert]
template <typename R>
__global__ void __launch_bounds__(R::WARPS *WARP, R::BLOCKS) expert_kernel(expert_task a, expert_order order) {
    int e = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int end = order.offsets[e + 1];
    start_next_kernel();
    for (int at = order.offsets[e] + warp * WARP; at < end; at += R::WARPS * WARP) {
        int32_t pair = at + lane < end ? order.pairs[at + lane] : -1;
        float s = dots_of_expert<R>(a, e, pair, 0, min(WARP, end - at), lane);
        if (pair >= 0)
            store_pair(a, pair, e, s, a.weights[pair]);
    }
}
// [/block-an-expert]

// Launch: a warp for every 32 pairs of the order, R::WARPS a block: no warp has more than another, whatever the
// routing. Shared memory: none. Traffic: as expert_kernel's, and the index of a pair; an expert's row once a warp that
// has some of its pairs.
// [balanced]
template <typename R>
__global__ void __launch_bounds__(R::WARPS *WARP, R::BLOCKS) balanced_kernel(expert_task a, expert_order order) {
    int lane = threadIdx.x % WARP, warp = blockIdx.x * R::WARPS + threadIdx.x / WARP;
    int64_t at = (int64_t)warp * WARP + lane;
    int32_t pair = at < (int64_t)a.T * a.K ? order.pairs[at] : -1;
    int32_t expert = pair >= 0 ? a.indices[pair] : NO_EXPERT;
    float weight = pair >= 0 ? a.weights[pair] : 0, mine = 0;
    start_next_kernel();
    for (int first = 0; first < WARP;) {
        int32_t e = __shfl_sync(ALL_LANES, expert, first);
        if (e == NO_EXPERT)
            break;
        int count = __popc(__ballot_sync(ALL_LANES, expert == e));
        float s = dots_of_expert<R>(a, e, pair, first, count, lane);
        mine = lane >= first && lane < first + count ? s : mine;
        first += count;
    }
    if (pair >= 0)
        store_pair(a, pair, expert, mine, weight);
}
// [/balanced]

#endif
