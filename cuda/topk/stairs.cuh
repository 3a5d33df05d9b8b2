// The staircase's pairs of ranks as one list, made by the compiler.
#ifndef FMOE_TOPK_STAIRS_CUH
#define FMOE_TOPK_STAIRS_CUH

#include "topk.cuh"

// Pairs of ranks with (a+1)(b+1) ≤ K.
__host__ __device__ constexpr int count_stairs(int K) {
    int count = 0;
    for (int a = 0; a < K; a++)
        count += K / (a + 1);
    return count;
}

struct stair_list {
    uint32_t pair[(count_stairs(TOPK_WARP_TOPK) + WARP - 1) / WARP *
                  WARP]; // a and b, each times 4, as bytes of float32: a·4 | b·4 << 16
};

// [stairs]
// By classes (a+1)(b+1) ≤ 1, 2, 4, 8, ..., so that the first part of the list is the staircase of a smaller K; in a
// class a row and a column from each diagonal place, so that neighbours in the list are neighbours in rank, and the
// lanes that read their values read neighbouring banks.
constexpr stair_list make_stairs() {
    stair_list list = {};
    int count = 0;
    for (int most = 1; most <= TOPK_WARP_TOPK; most *= 2)
        for (int r = 0; (r + 1) * (r + 1) <= most; r++) {
            int last = most / (r + 1), first = most / 2 / (r + 1); // ranks b with most/2 < (r+1)(b+1) ≤ most
            first = first > r ? first : r;
            for (int b = first; b < last; b++)
                list.pair[count++] = (uint32_t)(r * 4 | b * 4 << 16);
            for (int a = first > r ? first : r + 1; a < last; a++)
                list.pair[count++] = (uint32_t)(a * 4 | r * 4 << 16);
        }
    for (; count < (int)(sizeof list.pair / sizeof list.pair[0]); count++)
        list.pair[count] = (TOPK_WARP_TOPK - 1) * 4 * 0x10001u; // the worst of all pairs: it reaches what all reach
    return list;
}
// [/stairs]

__device__ const stair_list stairs = make_stairs();

#endif
