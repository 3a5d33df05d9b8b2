// The parts of experts that several lists share, added up.
#ifndef FMOE_EXPERT_BACKWARD_JOIN_CUH
#define FMOE_EXPERT_BACKWARD_JOIN_CUH

#include "expert_backward.cuh"

#define JOINED        32 // lists a block looks at for parts to add up: one a lane
#define JOIN_WARPS    8
#define JOIN_COLUMNS  4 // a lane
#define PARTS_AT_ONCE 8

// [join]
// Whether an expert that is cut begins with list l, which then is the first that has its pairs alone; its last list.
__device__ inline bool begins_cut(const backward_task &a, int l, int lists, int *expert, int *last) {
    if (l >= lists || l * a.range >= a.offsets[a.N])
        return false;
    int e = a.indices[a.pairs[l * a.range]], start = a.offsets[e], end = a.offsets[e + 1];
    *expert = e;
    *last = (end - 1) / a.range;
    return end - start > a.range && l == (start + a.range - 1) / a.range && *last > l;
}

// Parts in order, with several on their way at once.
__device__ inline void sum_parts(const backward_task &a, int first, int last, int column, float (&sum)[JOIN_COLUMNS]) {
    for (int l = first; l <= last; l += PARTS_AT_ONCE) {
        float part[PARTS_AT_ONCE][JOIN_COLUMNS];
#pragma unroll
        for (int i = 0; i < PARTS_AT_ONCE; i++)
#pragma unroll
            for (int c = 0; c < JOIN_COLUMNS; c++) {
                bool inside = l + i <= last && column + c * WARP < 2 * a.d;
                part[i][c] = inside ? a.parts[(int64_t)(l + i) * 2 * a.d + column + c * WARP] : 0;
            }
#pragma unroll
        for (int i = 0; i < PARTS_AT_ONCE; i++)
#pragma unroll
            for (int c = 0; c < JOIN_COLUMNS; c++)
                sum[c] += part[i][c];
    }
}

// Launch: a block of 8 warps for JOINED lists and 128 columns of both gradients side by side; the experts found there
// are dealt out to the warps. Shared memory: none. Traffic: the parts in once, the rows of the experts that they are of
// out. An expert's parts are added in the order of its lists.
template <typename E>
static __global__ void __launch_bounds__(JOIN_WARPS *WARP) join_kernel(backward_task a, int lists, int chunks) {
    int first = blockIdx.x / chunks * JOINED, lane = threadIdx.x % WARP, expert = 0, last = 0, turn = 0;
    int column = blockIdx.x % chunks * WARP * JOIN_COLUMNS + lane;
    start_next_kernel();
    bool begins = begins_cut(a, first + lane, lists, &expert, &last);
    wait_for_kernel_before();
    for (unsigned found = __ballot_sync(ALL_LANES, begins); found; found &= found - 1, turn++) {
        int l = __ffs(found) - 1, e = __shfl_sync(ALL_LANES, expert, l), end = __shfl_sync(ALL_LANES, last, l);
        float sum[JOIN_COLUMNS] = {};
        if (turn % JOIN_WARPS != (int)threadIdx.x / WARP)
            continue;
        sum_parts(a, first + l, end, column, sum);
        for (int c = 0; c < JOIN_COLUMNS; c++) {
            int at = column + c * WARP;
            void *gradient = at < a.d ? a.ddown : a.dup;
            int64_t to = (int64_t)e * a.d + (at < a.d ? at : at - a.d);
            if (at < 2 * a.d && gradient)
                store_element<E>(a, gradient, to, sum[c] + (a.accumulate ? load_element<E>(a, gradient, to) : 0));
        }
    }
}
// [/join]

#endif
