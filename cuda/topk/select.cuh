// The middle of a warp's work: candidates, a threshold that enough of them reach, and those moved together.
#ifndef FMOE_TOPK_SELECT_CUH
#define FMOE_TOPK_SELECT_CUH

#include "warp.cuh"

__device__ inline int rank_a(uint32_t pair) {
    return (pair & 0xffff) / 4;
}
__device__ inline int rank_b(uint32_t pair) {
    return pair >> 18;
}

// The list is made for powers of two of K and for more keys than K: is the pair at this place of it a candidate?
template <typename Shape> __device__ inline bool exists(const topk_task &a, int place, uint32_t pair) {
    int x = rank_a(pair), y = rank_b(pair);
    return place < Shape::candidates && (x + 1) * (y + 1) <= a.K && x < a.n && y < a.n;
}

// The same, where ranks without a key hold −∞ and need not be looked for. FILTER: K is smaller than the list's.
template <typename Shape, bool FILTER> __device__ inline bool may_count(const topk_task &a, int place, uint32_t pair) {
    if (Shape::in_registers && Shape::candidates % Shape::lanes && place >= Shape::candidates)
        return false;
    if (Shape::most > Shape::ranks) // more ranks in the list than there are
        return exists<Shape>(a, place, pair);
    return !FILTER || (rank_a(pair) + 1) * (rank_b(pair) + 1) <= a.K;
}

template <typename Shape> __device__ inline float sum_of(const typename Shape::memory &m, uint32_t pair) {
    const char *x = (const char *)m.ranked[0], *y = (const char *)m.ranked[1];
    return *(const float *)(x + (pair & 0xffff)) + *(const float *)(y + (pair >> 16));
}

template <typename Shape>
__device__ inline uint32_t keys_of(const typename Shape::memory &m, uint32_t pair) { // i above j: order of pair indices
    return (uint32_t)m.key[0][rank_a(pair)] << Shape::key_bits | m.key[1][rank_b(pair)];
}

// A lane's candidates: in registers where they are few, else added again on every visit. −∞ for what is none.
template <typename Shape> struct candidates {
    static constexpr int lanes = Shape::lanes;
    static constexpr int unroll = Shape::in_registers ? Shape::chunks : 4;
    uint32_t pairs[Shape::in_registers ? Shape::chunks : 1];
    float sums[Shape::in_registers ? Shape::chunks : 1];
    int lane; // of the token

    __device__ void list(int lane_) {
        lane = lane_ % lanes;
        if constexpr (Shape::in_registers)
#pragma unroll
            for (int c = 0; c < Shape::chunks; c++)
                pairs[c] = stairs.pair[c * Shape::lanes + lane];
    }
    template <bool FILTER> __device__ void add_all(const topk_task &a, const typename Shape::memory &m) {
#pragma unroll
        for (int c = 0; c < Shape::chunks; c++)
            sums[c] = may_count<Shape, FILTER>(a, c * lanes + lane, pairs[c]) ? sum_of<Shape>(m, pairs[c]) : -INFINITY;
    }
    __device__ void add(const topk_task &a, const typename Shape::memory &m) {
        if constexpr (Shape::in_registers) {
            if (a.K == Shape::most)
                add_all<false>(a, m);
            else
                add_all<true>(a, m);
        }
    }
    __device__ uint32_t pair(int c) const {
        if constexpr (Shape::in_registers)
            return pairs[c];
        return stairs.pair[c * Shape::lanes + lane];
    }
    template <bool FILTER> __device__ float sum(int c, const topk_task &a, const typename Shape::memory &m) const {
        if constexpr (Shape::in_registers)
            return sums[c];
        uint32_t p = stairs.pair[c * lanes + lane];
        return may_count<Shape, FILTER>(a, c * lanes + lane, p) ? sum_of<Shape>(m, p) : -INFINITY;
    }
};

// [bound]
// A sum that K candidates reach: every pair of ranks up to (x, y) does, and there are (x+1)(y+1) ≥ K of them. Rounding
// keeps that true.
template <typename Shape>
__device__ inline float lower_bound(const topk_task &a, const typename Shape::memory &m, int lane) {
    float best = -INFINITY;
    int most = min(a.K, a.n);
#pragma unroll
    for (int c = 0; c < (Shape::most + Shape::lanes - 1) / Shape::lanes && c < 64 / Shape::lanes; c++) {
        int x = c * Shape::lanes + lane % Shape::lanes;
        int y = (int)__fdividef(a.K - 0.5f, x + 1.0f); // ⌈K / (x+1)⌉ − 1: K − ½ is no multiple of x + 1
        if (x < most && y < a.n)
            best = fmaxf(best, m.ranked[0][x] + m.ranked[1][y]);
    }
    return token_max<Shape::lanes>(best);
}
// [/bound]

// ---- The threshold, where every sum is a number ----

typedef struct {
    float least; // at least this
    int mine;    // so many of the lane's candidates,
    int count;   // so many of the token's
} level;

// [count]
// How many of the lane's candidates reach two thresholds, the second count in the upper half.
template <typename Shape, bool FILTER>
__device__ inline int count_filtered(const candidates<Shape> &list, const topk_task &a, const typename Shape::memory &m,
                                     float low, float high) {
    float found = 0; // additions of floats keep out of the way of the comparisons: another pipe
#pragma unroll(candidates <Shape>::unroll)
    for (int c = 0; c < Shape::chunks; c++) {
        float sum = list.template sum<FILTER>(c, a, m);
        if (sum >= low)
            found += 1.0f;
        if (sum >= high)
            found += 65536.0f;
    }
    return (int)found;
}

template <typename Shape>
__device__ inline int count_two(const candidates<Shape> &list, const topk_task &a, const typename Shape::memory &m,
                                float low, float high) {
    if (Shape::in_registers || a.K == Shape::most)
        return count_filtered<Shape, false>(list, a, m, low, high);
    return count_filtered<Shape, true>(list, a, m, low, high);
}
// [/count]

// [select]
// A threshold that between K and `held` candidates reach, or none (false: ties). Above the bound their number falls
// about exponentially, so guesses are made on a line through its logarithm. Some 2.2·K reach the bound on normal
// logits, so the first guess, counted together with the bound itself, lies a tenth of the way to the best sum.
template <typename Shape>
__device__ inline bool find_level(const candidates<Shape> &list, const topk_task &a, const typename Shape::memory &m,
                                  float low, float high, level *found) {
    float guess = low + 0.1f * (high - low), aim = __log2f(1.4f * a.K);
    int mine = count_two(list, a, m, low, guess), count = token_count<Shape::lanes>(mine), mine_low = mine & 0xffff;
    int count_low = count & 0xffff, count_high = 1;
    mine >>= 16, count >>= 16;
    for (int tries = 0;; tries++) {
        if (count >= a.K) {
            low = guess;
            mine_low = mine;
            count_low = count;
        } else {
            high = guess;
            count_high = max(count, 1);
        }
        *found = {low, mine_low, count_low};
        bool done = count_low <= Shape::held;
        if (__all_sync(ALL_LANES, done))
            return true;
        float from = __log2f((float)count_low), to = __log2f((float)count_high);
        guess = low + (high - low) * __fdividef(from - aim, from - to);
        if (done) // the warp's other token goes on: nothing reaches this guess
            guess = INFINITY;
        if (__any_sync(ALL_LANES, !(guess > low && (done || guess < high))) || tries == 8)
            return false;
        mine = count_two(list, a, m, guess, INFINITY);
        count = token_count<Shape::lanes>(mine);
    }
}
// [/select]

// [compact]
// Moves what reaches the threshold to the front of shared memory: a prefix sum over the lanes' counts says where.
template <typename Shape, bool FILTER>
__device__ inline void move_filtered(const candidates<Shape> &list, const topk_task &a, typename Shape::memory &m,
                                     float least, typename Shape::candidate *to) {
#pragma unroll(candidates <Shape>::unroll)
    for (int c = 0; c < Shape::chunks; c++) {
        float sum = list.template sum<FILTER>(c, a, m);
        if (sum >= least)
            *to++ = {list.pair(c), sum};
    }
}

template <typename Shape>
__device__ inline void compact(const candidates<Shape> &list, const topk_task &a, typename Shape::memory &m,
                               const level &found) {
    int place = found.mine;
#pragma unroll
    for (int step = 1; step < Shape::lanes; step *= 2) {
        int before = __shfl_up_sync(ALL_LANES, place, step, Shape::lanes);
        place += list.lane >= step ? before : 0;
    }
    if (Shape::in_registers || a.K == Shape::most)
        move_filtered<Shape, false>(list, a, m, found.least, m.kept + place - found.mine);
    else
        move_filtered<Shape, true>(list, a, m, found.least, m.kept + place - found.mine);
    __syncwarp();
}
// [/compact]

// ---- The threshold of any token: NaN, infinities, any number of equal sums ----

// What is kept: sums whose rising bits exceed `least`, or equal it with a pair not below `tie` (complemented).
typedef struct {
    uint32_t least, tie;
} wide_level;

template <typename Shape>
__device__ inline bool reaches(const topk_task &a, const typename Shape::memory &m, int place,
                               const wide_level &level) {
    uint32_t pair = stairs.pair[place];
    if (!exists<Shape>(a, place, pair))
        return false;
    uint32_t bits = rising_bits(sum_of<Shape>(m, pair));
    return bits > level.least || (bits == level.least && (Shape::pair_mask ^ keys_of<Shape>(m, pair)) >= level.tie);
}

template <typename Shape>
__device__ inline int count_wide(const topk_task &a, const typename Shape::memory &m, int lane,
                                 const wide_level &level) {
    int found = 0;
#pragma unroll 1
    for (int c = 0; c < Shape::chunks; c++)
        found += reaches<Shape>(a, m, c * Shape::lanes + lane % Shape::lanes, level);
    return token_count<Shape::lanes>(found);
}

// [select-wide]
// Bit by bit from the top, first of the sum, then of the complemented pair: a bit stays set if K candidates still reach
// the number. Ends as soon as no more than can be held do. Returns how many.
template <typename Shape> __device__ inline int select_wide(const topk_task &a, typename Shape::memory &m, int lane) {
    wide_level level = {0, 0};
    int count = count_wide<Shape>(a, m, lane, level), place = 0;
#pragma unroll 1
    for (int bit = 31 + 2 * Shape::key_bits; bit >= 0 && __any_sync(ALL_LANES, count > Shape::held); bit--) {
        wide_level trial = level;
        if (bit >= 2 * Shape::key_bits)
            trial.least |= 1u << (bit - 2 * Shape::key_bits);
        else
            trial.tie |= 1u << bit;
        int reach = count_wide<Shape>(a, m, lane, trial);
        if (reach >= a.K && count > Shape::held) {
            level = trial;
            count = reach;
        }
    }
#pragma unroll 1
    for (int c = 0; c < Shape::chunks; c++) {
        int at = c * Shape::lanes + lane % Shape::lanes;
        bool kept = reaches<Shape>(a, m, at, level);
        uint32_t vote = __ballot_sync(ALL_LANES, kept) >> (lane & ~(Shape::lanes - 1)); // the token's lanes
        vote &= ALL_LANES >> (WARP - Shape::lanes);
        if (kept)
            m.kept[place + __popc(vote & ((1u << lane % Shape::lanes) - 1))] = {stairs.pair[at],
                                                                                sum_of<Shape>(m, stairs.pair[at])};
        place += __popc(vote);
    }
    __syncwarp();
    return count;
}
// [/select-wide]

#endif
