// A warp works on one token or two. The rungs warp, packed, keep-best and pair are one kernel in four forms.
#ifndef FMOE_TOPK_WARP_CUH
#define FMOE_TOPK_WARP_CUH

#include "network.cuh"
#include "stairs.cuh"

typedef enum {
    FORM_WIDE,   // 64-bit keys, sides sorted whole
    FORM_PACKED, // 32-bit keys, 64 where they do not decide
    FORM_BEST,   // the same, and only the best K of a side are kept
    FORM_PAIR    // the same, and two tokens share a warp
} warp_form;

// What one instance of the kernel holds: S registers a lane for a side, half of the lanes of a token, any K up to MOST.
template <int S, int MOST, int FORM> struct warp_shape {
    static constexpr int lanes = FORM == FORM_PAIR ? WARP / 2 : WARP, half = lanes / 2, tokens = WARP / lanes;
    static constexpr int keys = half * S, key_bits = log2_of(keys), key_mask = keys - 1;
    static constexpr int registers_a_side = S, most = MOST, wanted = MOST > S ? MOST : S;
    static constexpr int ranks = FORM >= FORM_BEST && wanted < keys ? wanted : keys;
    typedef network<log2_of(half), S, ranks> side_network; // both sides at once
    static constexpr int candidates = count_stairs(MOST), chunks = (candidates + lanes - 1) / lanes;
    // Up to 128 candidates are sorted as they are, of more those that reach a threshold, up to twice as many as wanted.
    static constexpr bool select = candidates > 128;
    static constexpr int held = select ? 2 * MOST : candidates <= 64 ? 64 : 128, held_bits = log2_of(held);
    static constexpr int chosen = MOST < lanes ? lanes : MOST;
    typedef network<log2_of(lanes), held / lanes, chosen> choice_network;
    static constexpr bool in_registers = chunks <= 21;
    static constexpr uint32_t pair_mask = (1u << 2 * key_bits) - 1;

    struct candidate {
        uint32_t pair; // of ranks, as in the list
        float sum;
    };
    struct memory {
        alignas(16) float value[2][keys];   // by key
        alignas(16) float ranked[2][ranks]; // by rank
        alignas(16) uint16_t key[2][ranks];
        candidate kept[select ? held : chosen / 2]; // those that reach the threshold
        uint32_t other_banks[tokens > 1 ? 16 : 4];  // so that two tokens do not meet in the banks of one
    };
};

// ---- Sums over a warp, and over the lanes of one token ----

__device__ inline int warp_count(int count) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(ALL_LANES, count);
#else
    for (int step = WARP / 2; step; step /= 2)
        count += __shfl_xor_sync(ALL_LANES, count, step);
    return count;
#endif
}

__device__ inline uint32_t warp_or(uint32_t bits) {
#if __CUDA_ARCH__ >= 800
    return __reduce_or_sync(ALL_LANES, bits);
#else
    for (int step = WARP / 2; step; step /= 2)
        bits |= __shfl_xor_sync(ALL_LANES, bits, step);
    return bits;
#endif
}

template <int LANES> __device__ inline int token_count(int count) {
    if constexpr (LANES == WARP) {
        return warp_count(count);
    } else {
#pragma unroll
        for (int step = LANES / 2; step; step /= 2)
            count += __shfl_xor_sync(ALL_LANES, count, step);
        return count;
    }
}

template <int LANES> __device__ inline float token_sum(float value) {
#pragma unroll
    for (int step = LANES / 2; step; step /= 2)
        value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

template <int LANES> __device__ inline float token_max(float value) {
#pragma unroll
    for (int step = LANES / 2; step; step /= 2)
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
    return value;
}

// ---- Loading ----

// [fetch]
// A side's row in pieces of 16 bytes, S / 4 for each of its lanes (half of them for 16-bit logits). What lies beyond
// the row is filled with −∞, which adds nothing to a softmax.
template <int S, int HALF> __device__ inline void fetch(const topk_task &a, uint32_t t, int lane, uint4 *piece) {
    uint32_t row = lane / HALF % 2 ? a.T + t : t, size = a.dtype == FMOE_F32 ? 4 : 2;
    uint32_t none = a.dtype == FMOE_F32 ? 0xff800000 : a.dtype == FMOE_F16 ? 0xfc00fc00 : 0xff80ff80;
    const char *from = (const char *)a.logits + (uint64_t)row * (a.n * size);
#pragma unroll
    for (int c = 0; c < S / 4; c++) {
        uint32_t at = (c * HALF + lane % HALF) * 16;
        piece[c] = {none, none, none, none};
        if (at < a.n * size)
            piece[c] = *(const uint4 *)(from + at);
    }
}

__device__ inline float unpack_16(uint32_t bits, bool half) {
    return half ? __half2float(__ushort_as_half((unsigned short)bits)) : __uint_as_float(bits << 16);
}

// To shared memory as float32; −0 becomes +0.
template <int S, int HALF, int KEYS>
__device__ inline void put(const topk_task &a, int lane, const uint4 *piece, float (*value)[KEYS]) {
    float *to = value[lane / HALF % 2];
    if (a.dtype == FMOE_F32) {
#pragma unroll
        for (int c = 0; c < S / 4; c++)
            *(float4 *)(to + (c * HALF + lane % HALF) *
                                 4) = {__uint_as_float(piece[c].x) + 0.0f, __uint_as_float(piece[c].y) + 0.0f,
                                       __uint_as_float(piece[c].z) + 0.0f, __uint_as_float(piece[c].w) + 0.0f};
    } else {
        bool half = a.dtype == FMOE_F16;
#pragma unroll
        for (int c = 0; c < S / 8; c++) {
            uint32_t word[4] = {piece[c].x, piece[c].y, piece[c].z, piece[c].w};
            float v[8];
#pragma unroll
            for (int e = 0; e < 8; e++)
                v[e] = unpack_16(e % 2 ? word[e / 2] >> 16 : word[e / 2] & 0xffff, half) + 0.0f;
            float4 *at = (float4 *)(to + (c * HALF + lane % HALF) * 8);
            at[0] = {v[0], v[1], v[2], v[3]};
            at[1] = {v[4], v[5], v[6], v[7]};
        }
    }
    __syncwarp();
}
// [/fetch]

// Rows that do not start at multiples of 16 bytes: an element at a time.
template <int HALF, int KEYS>
__device__ inline void load_unaligned(const topk_task &a, uint32_t t, int lane, float (*value)[KEYS]) {
#pragma unroll 1
    for (int i = lane % HALF; i < KEYS; i += HALF)
        value[lane / HALF % 2][i] = i < a.n ? load_logit(a, lane / HALF % 2, t, i) + 0.0f : -INFINITY;
    __syncwarp();
}

// The key that register r of a side's lane holds, and its side's values in that order: four keys at a time.
template <int HALF> __device__ constexpr int key_of(int r, int lane) {
    return (r / 4) * (HALF * 4) + (lane % HALF) * 4 + r % 4;
}

template <int S, int HALF, int KEYS>
__device__ inline void read_side(const float (*value)[KEYS], int lane, float *mine) {
#pragma unroll
    for (int r = 0; r < S; r += 4) {
        float4 four = *(const float4 *)&value[lane / HALF % 2][key_of<HALF>(r, lane)];
        mine[r] = four.x, mine[r + 1] = four.y, mine[r + 2] = four.z, mine[r + 3] = four.w;
    }
}

// ---- Ranking both sides ----

// A lane's ranks to shared memory, together if there are four or more.
template <typename Shape, int R>
__device__ inline void store_ranks(typename Shape::memory &m, int side, int first, const float *value,
                                   const uint32_t *number) {
#pragma unroll
    for (int r = 0; r < R; r += 4)
        if constexpr (R >= 4) {
            *(float4 *)&m.ranked[side][first + r] = {value[r], value[r + 1], value[r + 2], value[r + 3]};
            *(uint2 *)&m.key[side][first + r] = {number[r] | number[r + 1] << 16, number[r + 2] | number[r + 3] << 16};
        } else {
            for (int e = 0; e < R; e++) {
                m.ranked[side][first + e] = value[e];
                m.key[side][first + e] = number[e];
            }
        }
    __syncwarp();
}

// [rank-wide]
// Sorts 64-bit keys, the value's bits above the complement of the key's number.
template <typename Shape, int S>
__device__ inline void rank_wide(const topk_task &a, int lane, typename Shape::memory &m) {
    typedef typename Shape::side_network network;
    constexpr int R = network::registers;
    int side = lane / Shape::half % 2;
    float value[S];
    uint32_t number[R];
    uint64_t key[S];
    read_side<S, Shape::half>(m.value, lane, value);
#pragma unroll
    for (int r = 0; r < S; r++)
        key[r] = key_of<Shape::half>(r, lane) < a.n ? pack(value[r], key_of<Shape::half>(r, lane)) : 0;
    network::sort(key, lane);
#pragma unroll
    for (int r = 0; r < R; r++) {
        number[r] = index_of(key[r]) & Shape::key_mask;
        value[r] = m.value[side][number[r]];
    }
    __syncwarp();
    store_ranks<Shape, R>(m, side, network::place(lane) * R, value, number);
}
// [/rank-wide]

// [repair]
// The order of neighbours: the larger value, then the smaller number.
__device__ inline bool before(float a, uint32_t a_id, float b, uint32_t b_id) {
    return a > b || (a == b && a_id < b_id);
}

// Even places with the odd ones after them, then odd ones with the even ones after them.
template <int R>
__device__ inline void exchange_neighbours(float *value, uint32_t *id, int previous, int next, bool first, bool last) {
#pragma unroll
    for (int k = 0; k + 1 < R; k++) {
        int r = k < R / 2 ? 2 * k : 2 * (k - R / 2) + 1;
        if (before(value[r + 1], id[r + 1], value[r], id[r])) {
            float v = value[r];
            value[r] = value[r + 1], value[r + 1] = v;
            uint32_t i = id[r];
            id[r] = id[r + 1], id[r + 1] = i;
        }
    }
    float previous_value = __shfl_sync(ALL_LANES, value[R - 1], previous);
    float next_value = __shfl_sync(ALL_LANES, value[0], next);
    uint32_t previous_id = __shfl_sync(ALL_LANES, id[R - 1], previous), next_id = __shfl_sync(ALL_LANES, id[0], next);
    if (!last && before(next_value, next_id, value[R - 1], id[R - 1]))
        value[R - 1] = next_value, id[R - 1] = next_id;
    if (!first && before(value[0], id[0], previous_value, previous_id))
        value[0] = previous_value, id[0] = previous_id;
}

// [repair-loop]
// Ranks that are nearly sorted, R a lane from the lane `last` to the lane `next`: checked, and where neighbours stand
// in the wrong order (because the bits that were sorted did not tell them apart) exchanged, four rounds at most.
// Returns whether all are in order.
template <int R>
__device__ inline bool repair(float *value, uint32_t *id, int previous, int next, bool first, bool last) {
    for (int round = 0;; round++) {
        float next_value = __shfl_sync(ALL_LANES, value[0], next);
        uint32_t next_id = __shfl_sync(ALL_LANES, id[0], next);
        bool ordered = last || !before(next_value, next_id, value[R - 1], id[R - 1]);
#pragma unroll
        for (int r = 0; r + 1 < R; r++)
            ordered &= !before(value[r + 1], id[r + 1], value[r], id[r]);
        if (__all_sync(ALL_LANES, ordered))
            return true;
        if constexpr (R == 1) {
            return false;
        } else {
            if (round == 4)
                return false;
            exchange_neighbours<R>(value, id, previous, next, first, last);
        }
    }
}
// [/repair-loop]
// [/repair]

// [rank-packed]
// Sorts 32-bit keys: the low bits of the value give way to the complement of the key's number. For 16-bit logits that
// decides everything. For float32 neighbours may have to be exchanged, and what was dropped must differ from the last
// rank in the bits that were left. Returns whether all is decided. Logits that are NaN are left to rank_wide.
template <typename Shape, int S>
__device__ inline bool rank_packed(const topk_task &a, int lane, typename Shape::memory &m) {
    typedef typename Shape::side_network network;
    constexpr int R = network::registers;
    constexpr uint32_t low = Shape::key_mask;
    int side = lane / Shape::half % 2, place = network::place(lane), base = lane & ~(Shape::half - 1);
    float value[S];
    uint32_t start[S], key[S], number[R];
    read_side<S, Shape::half>(m.value, lane, value);
    // [packed-keys]
#pragma unroll
    for (int r = 0; r < S; r++)
        start[r] = (rising_plain(value[r]) & ~low) | (low ^ key_of<Shape::half>(r, lane));
    if (a.n < Shape::keys)
#pragma unroll
        for (int r = 0; r < S; r++)
            start[r] = key_of<Shape::half>(r, lane) < a.n ? start[r] : 0;
#pragma unroll
    for (int r = 0; r < S; r++)
        key[r] = start[r];
    network::sort(key, lane);
#pragma unroll
    for (int r = 0; r < R; r++) {
        number[r] = low ^ (key[r] & low);
        value[r] = m.value[side][number[r]];
    }
    // [/packed-keys]
    bool decided = true;
    if (a.dtype == FMOE_F32) {
        decided = repair<R>(value, number, base | network::lane_at((place + Shape::half - 1) % Shape::half),
                            base | network::lane_at((place + 1) % Shape::half), place == 0, place == Shape::half - 1);
        // [packed-check]
        if (Shape::ranks < Shape::keys && a.n > Shape::ranks) {
            uint32_t last = __shfl_sync(ALL_LANES, key[R - 1], base | network::lane_at(Shape::half - 1)) & ~low;
            int reach = 0;
#pragma unroll
            for (int r = 0; r < S; r++)
                reach += start[r] >= last;
            decided &= warp_count(reach) == 2 * Shape::tokens * Shape::ranks;
        }
        // [/packed-check]
    }
    store_ranks<Shape, R>(m, side, place * R, value, number);
    return decided;
}
// [/rank-packed]

// ---- log-softmax ----

__device__ inline float exp2_fast(float value) { // what underflows here is nothing beside the largest, which is 1
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// [log-sum]
// The sum of both sides' log Σ exp(z − max). A side's sum is 1, for its largest logit, and a rest that keeps its own
// digits; one logarithm does for both: (1 + x)(1 + y) = 1 + (x + y + x·y). NaN for a side with NaN or +∞.
template <typename Shape, int S> __device__ inline float log_sums(typename Shape::memory &m, int lane) {
    const float log2_e = 1.44269504f;
    int side = lane / Shape::half % 2, best = m.key[side][0];
    float max = m.ranked[side][0], rest = max - max, value[S];
    if (lane % Shape::half == 0)
        m.value[side][best] = -INFINITY; // for a moment
    __syncwarp();
    read_side<S, Shape::half>(m.value, lane, value);
    __syncwarp();
    if (lane % Shape::half == 0)
        m.value[side][best] = max;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < S; r++)
        rest += exp2_fast((value[r] - max) * log2_e);
#pragma unroll
    for (int step = Shape::half / 2; step; step /= 2)
        rest += __shfl_xor_sync(ALL_LANES, rest, step);
    float other = __shfl_xor_sync(ALL_LANES, rest, Shape::half);
    return log1pf(rest + other + rest * other);
}
// [/log-sum]

#endif
