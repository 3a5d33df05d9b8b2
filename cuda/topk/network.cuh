// Sorting in the registers of a warp: a bitonic network over R registers a lane, and a merge that keeps the best half.
//
// Keys are sorted best (largest) first, and register r of the lane at place q holds rank q·R + r. At first a lane's
// place in its group is its number; after a merge it is not, but place and lane number stay linear over bits: lanes
// whose places differ by d (exclusive or) have numbers that differ by lane_mask(d).
#ifndef FMOE_TOPK_NETWORK_CUH
#define FMOE_TOPK_NETWORK_CUH

#include "../device.cuh"

// [places]
// After a merge the lanes of the first group are the even places in order, those of the second the odd ones in reverse.
template <int BITS, int MERGES> __device__ constexpr int lane_mask(int d) {
    if constexpr (MERGES == 0) {
        return d;
    } else {
        int second = d & 1;
        d ^= second ? (1 << BITS) - 1 : 0;
        return second << (BITS - 1) | lane_mask<BITS - 1, MERGES - 1>(d >> 1);
    }
}

template <int BITS, int MERGES> __device__ constexpr int place_of(int lane) {
    if constexpr (MERGES == 0) {
        return lane & ((1 << BITS) - 1);
    } else {
        int place = place_of<BITS - 1, MERGES - 1>(lane) << 1;
        return lane >> (BITS - 1) & 1 ? place ^ ((1 << BITS) - 1) : place;
    }
}
// [/places]

template <typename Key> __device__ inline void exchange(Key &better, Key &worse) {
    Key a = better, b = worse;
    better = a > b ? a : b;
    worse = a > b ? b : a;
}

__device__ inline void exchange(uint32_t &better, uint32_t &worse) {
    uint32_t a = better, b = worse;
    better = max(a, b);
    worse = min(a, b);
}

template <typename Key> __device__ inline Key keep(bool better, Key mine, Key other) {
    return (mine > other) == better ? mine : other;
}

__device__ inline uint32_t keep(bool better, uint32_t mine, uint32_t other) {
    return better ? max(mine, other) : min(mine, other);
}

// [in-lane]
// A bitonic run of R registers becomes a sorted one.
template <int R, typename Key> __device__ inline void clean_registers(Key *key) {
#pragma unroll
    for (int half = R / 2; half > 0; half /= 2)
#pragma unroll
        for (int r = 0; r < R; r++)
            if (!(r & half))
                exchange(key[r], key[r + half]);
}

// Two sorted runs, one after the other, become one: Batcher's odd-even merge, 63 comparisons for a sort of 16 registers
// where a bitonic one takes 80. (Across lanes it gains nothing: lanes that have nothing to compare wait all the same.)
template <int R, int STRIDE, typename Key> __device__ inline void merge_registers(Key *key) {
    if constexpr (R == 2) {
        exchange(key[0], key[STRIDE]);
    } else {
        merge_registers<R / 2, 2 * STRIDE>(key);
        merge_registers<R / 2, 2 * STRIDE>(key + STRIDE);
#pragma unroll
        for (int r = 1; r + 1 < R; r += 2)
            exchange(key[r * STRIDE], key[(r + 1) * STRIDE]);
    }
}

template <int R, typename Key> __device__ inline void sort_registers(Key *key) {
    if constexpr (R > 1) {
        sort_registers<R / 2>(key);
        sort_registers<R / 2>(key + R / 2);
        merge_registers<R, 1>(key);
    }
}
// [/in-lane]

// [across-lanes]
// A bitonic run over places that differ below SPAN, and within their lanes, becomes a sorted one. After a merge the
// registers of odd places are in reverse: so, in the last step across lanes, a register meets its mirror image.
template <int R, int SPAN, int BITS, int MERGES, typename Key> __device__ inline void clean_lanes(Key *key, int place) {
#pragma unroll
    for (int d = SPAN / 2; d > 0; d /= 2) {
        Key other[R];
#pragma unroll
        for (int r = 0; r < R; r++)
            other[r] =
                __shfl_xor_sync(ALL_LANES, key[MERGES > 0 && d == 1 ? R - 1 - r : r], lane_mask<BITS, MERGES>(d));
#pragma unroll
        for (int r = 0; r < R; r++)
            key[r] = keep(!(place & d), key[r], other[r]);
    }
    clean_registers<R>(key);
}

// Groups of 2^BITS lanes sort their R registers. With 32 registers the steps stay loops: as straight
// code they would not fit the instruction cache.
template <int R, int BITS, typename Key> __device__ inline void sort_lanes(Key *key, int lane) {
    sort_registers<R>(key);
#pragma unroll(R < 32 ? 8 : 1)
    for (int b = 1; b <= BITS; b++) {
        Key other[R];
#pragma unroll
        for (int r = 0; r < R; r++)
            other[r] = __shfl_xor_sync(ALL_LANES, key[R - 1 - r], (1 << b) - 1);
#pragma unroll
        for (int r = 0; r < R; r++)
            key[r] = keep(!(lane >> (b - 1) & 1), key[r], other[r]);
#pragma unroll(R < 32 ? 8 : 1)
        for (int d = 1 << b >> 2; d > 0; d /= 2)
#pragma unroll
            for (int r = 0; r < R; r++)
                key[r] = keep(!(lane & d), key[r], __shfl_xor_sync(ALL_LANES, key[r], d));
        clean_registers<R>(key);
    }
}
// [/across-lanes]

// [keep-best]
// Two sorted groups become one of the same number of keys over twice the lanes, each with half the registers: the
// better of every key and its mirror image in the other group. Each lane of such a pair makes half the comparisons.
template <int R, int BITS, int MERGES, int LEFT, typename Key> __device__ inline void keep_best(Key *key, int lane) {
    if constexpr (LEFT > 0) {
        constexpr int partner = 1 << BITS | lane_mask<BITS, MERGES>((1 << BITS) - 1);
#pragma unroll
        for (int r = 0; r < R / 2; r++)
            key[r] = keep(true, key[r], __shfl_xor_sync(ALL_LANES, key[R - 1 - r], partner));
        clean_lanes<R / 2, 1 << (BITS + 1), BITS + 1, MERGES + 1>(key, place_of<BITS + 1, MERGES + 1>(lane));
        keep_best<R / 2, BITS + 1, MERGES + 1, LEFT - 1>(key, lane);
    }
}
// [/keep-best]

__host__ __device__ constexpr int log2_of(int power) {
    return power > 1 ? 1 + log2_of(power / 2) : 0;
}

// The layout of a network over 2^bits lanes of `from` registers each, of which the best `keep` keys are kept.
template <int BITS, int FROM, int KEEP> struct network {
    static constexpr int merges = BITS + log2_of(FROM) - log2_of(KEEP); // each halves the registers
    static constexpr int registers = FROM >> merges;                    // what is left in each lane
    static_assert(merges >= 0 && merges <= BITS && registers >= 1, "keep fits between a lane's keys and all of them");

    __device__ static int place(int lane) {
        return place_of<BITS, merges>(lane);
    }
    __device__ static int lane_at(int place) {
        return lane_mask<BITS, merges>(place);
    }
    template <typename Key> __device__ static void sort(Key *key, int lane) {
        sort_lanes<FROM, BITS - merges>(key, lane);
        keep_best<FROM, BITS - merges, 0, merges>(key, lane);
    }
};

#endif
