// A warp works on one token. The three rungs warp, packed and keep-best are this kernel in three forms.
#ifndef FMOE_TOPK_WARP_CUH
#define FMOE_TOPK_WARP_CUH

#include "network.cuh"
#include "stairs.cuh"

typedef enum {
    FORM_WIDE,   // 64-bit keys, sides sorted whole
    FORM_PACKED, // 32-bit keys, 64 where they do not decide
    FORM_BEST    // the same, and only the best K of a side are kept
} warp_form;

#define WARPS_A_BLOCK 4

// What one instance of the kernel holds: S registers a lane for a side of up to 16·S keys, any K up to MOST.
template <int S, int MOST, int FORM> struct warp_shape {
    static constexpr int keys = 16 * S, key_bits = log2_of(keys), key_mask = keys - 1;
    static constexpr int most = MOST, wanted = MOST > S ? MOST : S;
    static constexpr int ranks = FORM == FORM_BEST && wanted < keys ? wanted : keys;
    typedef network<4, S, ranks> side_network; // both sides at once: half a warp each
    static constexpr int candidates = count_stairs(MOST), chunks = (candidates + WARP - 1) / WARP;
    // Up to 128 candidates are sorted as they are, of more those that reach a threshold, up to twice as many as wanted.
    static constexpr bool select = candidates > 128;
    static constexpr int held = select ? 2 * MOST : chunks <= 2 ? 64 : 128, held_bits = log2_of(held);
    static constexpr int chosen = MOST < WARP ? WARP : MOST;
    typedef network<5, held / WARP, chosen> choice_network;
    static constexpr bool in_registers = chunks <= 21;
    static constexpr uint32_t pair_mask = (1u << 2 * key_bits) - 1;

    struct candidate {
        uint32_t pair; // of ranks: a | b << 16
        float sum;
    };
    struct memory {
        alignas(16) float value[2][keys];   // by key
        alignas(16) float ranked[2][ranks]; // by rank
        alignas(16) uint16_t key[2][ranks];
        candidate kept[select ? held : 1]; // those that reach the threshold
    };
};

// ---- Sums over a warp ----

__device__ inline int warp_count(int count) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(ALL_LANES, count);
#else
    for (int step = WARP / 2; step; step /= 2)
        count += __shfl_xor_sync(ALL_LANES, count, step);
    return count;
#endif
}

__device__ inline uint32_t warp_best(uint32_t bits) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(ALL_LANES, bits);
#else
    for (int step = WARP / 2; step; step /= 2)
        bits = max(bits, __shfl_xor_sync(ALL_LANES, bits, step));
    return bits;
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

// ---- Loading ----

// [load]
// Both sides to shared memory as float32, half a warp each, 16 bytes at a time where rows start at multiples of 16
// bytes; places without a key hold −∞, which adds nothing to a softmax.
template <int KEYS, typename E>
__device__ inline void load_sides(const topk_task &a, int64_t t, int lane, float (*value)[KEYS]) {
    constexpr int width = pack16<E>::count;
    int side = lane / 16, first = lane % 16;
    const E *from = side_of_token<E>(a, side, t);
    if (a.n % width == 0) {
#pragma unroll
        for (int c = 0; c < (KEYS / width + 15) / 16; c++) {
            int i = (c * 16 + first) * width;
            if (i < KEYS) {
                pack16<E> pack = {};
                if (i < a.n)
                    pack = *(const pack16<E> *)(from + i);
#pragma unroll
                for (int e = 0; e < width; e++)
                    value[side][i + e] = i < a.n ? to_f32(pack.at[e]) + 0.0f : -INFINITY; // −0 becomes +0
            }
        }
    } else {
#pragma unroll
        for (int c = 0; c < KEYS / 16; c++) {
            int i = c * 16 + first;
            value[side][i] = i < a.n ? to_f32(from[i]) + 0.0f : -INFINITY;
        }
    }
    __syncwarp();
}
// [/load]

// The key that register r of a half-warp's lane holds, and its side's values in that order: four keys at a time.
__device__ constexpr int key_of(int r, int lane) {
    return (r / 4) * 64 + (lane % 16) * 4 + r % 4;
}

template <int S, int KEYS> __device__ inline void read_side(const float (*value)[KEYS], int lane, float *mine) {
#pragma unroll
    for (int r = 0; r < S; r += 4) {
        float4 four = *(const float4 *)&value[lane / 16][key_of(r, lane)];
        mine[r] = four.x, mine[r + 1] = four.y, mine[r + 2] = four.z, mine[r + 3] = four.w;
    }
}

// ---- Ranking both sides ----

// A lane's ranks to shared memory, together if there are four or more.
template <typename Shape, int R>
__device__ inline void store_ranks(typename Shape::memory &m, int side, int first, const float *value,
                                   const int *number) {
#pragma unroll
    for (int r = 0; r < R; r += 4)
        if constexpr (R >= 4) {
            *(float4 *)&m.ranked[side][first + r] = {value[r], value[r + 1], value[r + 2], value[r + 3]};
            *(uint2 *)&m.key[side][first + r] = {(uint32_t)number[r] | (uint32_t)number[r + 1] << 16,
                                                 (uint32_t)number[r + 2] | (uint32_t)number[r + 3] << 16};
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
    int side = lane / 16, number[R];
    float value[S];
    uint64_t key[S];
    read_side<S>(m.value, lane, value);
#pragma unroll
    for (int r = 0; r < S; r++)
        key[r] = key_of(r, lane) < a.n ? pack(value[r], key_of(r, lane)) : 0;
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

// [rank-packed]
// Sorts 32-bit keys: the low bits of the value give way to the complement of the key's number. Returns whether that
// decided everything: no value is followed by a better one, and what was dropped differs in the bits that were left.
// For 16-bit logits it always does. Logits that are NaN are left to rank_wide.
template <typename Shape, int S>
__device__ inline bool rank_packed(const topk_task &a, int lane, typename Shape::memory &m) {
    typedef typename Shape::side_network network;
    constexpr int R = network::registers;
    constexpr uint32_t low = Shape::key_mask;
    int side = lane / 16, place = network::place(lane), number[R];
    float value[S];
    uint32_t start[S], key[S];
    read_side<S>(m.value, lane, value);
#pragma unroll
    for (int r = 0; r < S; r++)
        start[r] = (rising_plain(value[r]) & ~low) | (low ^ key_of(r, lane));
    if (a.n < Shape::keys)
#pragma unroll
        for (int r = 0; r < S; r++)
            start[r] = key_of(r, lane) < a.n ? start[r] : 0;
#pragma unroll
    for (int r = 0; r < S; r++)
        key[r] = start[r];
    network::sort(key, lane);
#pragma unroll
    for (int r = 0; r < R; r++) {
        number[r] = low ^ (key[r] & low);
        value[r] = m.value[side][number[r]];
    }
    store_ranks<Shape, R>(m, side, place * R, value, number);
    if (a.dtype != FMOE_F32)
        return true;
    float next = place == 15 ? -INFINITY : m.ranked[side][place * R + R]; // the next lane's first
    bool decided = !(value[R - 1] < next);
#pragma unroll
    for (int r = 0; r + 1 < R; r++)
        decided &= !(value[r] < value[r + 1]);
    if (Shape::ranks < Shape::keys && a.n > Shape::ranks) {
        uint32_t last = __shfl_sync(ALL_LANES, key[R - 1], (lane & 16) | network::lane_at(15)) & ~low;
        int reach = 0;
#pragma unroll
        for (int r = 0; r < S; r++)
            reach += start[r] >= last;
        decided &= warp_count(reach) == 2 * Shape::ranks;
    }
    return __all_sync(ALL_LANES, decided);
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
    int side = lane / 16, best = m.key[side][0];
    float max = m.ranked[side][0], rest = max - max, value[S];
    if (lane % 16 == 0)
        m.value[side][best] = -INFINITY; // for a moment
    __syncwarp();
    read_side<S>(m.value, lane, value);
    __syncwarp();
    if (lane % 16 == 0)
        m.value[side][best] = max;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < S; r++)
        rest += exp2_fast((value[r] - max) * log2_e);
#pragma unroll
    for (int step = 8; step; step /= 2)
        rest += __shfl_xor_sync(ALL_LANES, rest, step);
    float other = __shfl_xor_sync(ALL_LANES, rest, 16);
    return log1pf(rest + other + rest * other);
}
// [/log-sum]

#endif
