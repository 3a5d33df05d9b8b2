// The last third of a warp's work: the kept candidates sorted, their scores and weights, and the kernel itself.
#ifndef FMOE_TOPK_CHOICE_CUH
#define FMOE_TOPK_CHOICE_CUH

#include "select.cuh"

// The candidate at a place among those that are sorted: the kept ones, or, if all are sorted, the whole list.
template <typename Shape>
__device__ inline typename Shape::candidate held_at(const topk_task &a, const typename Shape::memory &m, int place) {
    if constexpr (Shape::select)
        return m.kept[place];
    uint32_t pair = stairs.pair[place];
    return {pair, sum_of<Shape>(m, pair)};
}

// [sort-wide]
// Sorts 64-bit keys, the sum's bits above the complement of the pair's keys.
template <typename Shape, int P, int R>
__device__ inline void sort_wide(const topk_task &a, typename Shape::memory &m, int count, int lane) {
    uint64_t key[P];
#pragma unroll
    for (int r = 0; r < P; r++) {
        int place = r * Shape::lanes + lane % Shape::lanes;
        key[r] = 0;
        if (Shape::select ? place < count : exists<Shape>(a, place, stairs.pair[place])) {
            typename Shape::candidate c = held_at<Shape>(a, m, place);
            key[r] = pack(c.sum, keys_of<Shape>(m, c.pair));
        }
    }
    Shape::choice_network::sort(key, lane);
    __syncwarp();
#pragma unroll
    for (int r = 0; r < R; r++)
        ((uint32_t *)m.kept)[r * Shape::lanes + lane % Shape::lanes] = index_of(key[r]) & Shape::pair_mask;
}
// [/sort-wide]

// The way of any token that the fast one did not decide, kept out of its code: what is kept is sorted again, or chosen
// again (count is −1). Each lane leaves the keys of its R pairs in the memory of the kept ones.
template <typename Shape, int P, int R>
__device__ inline void choose_wide(const topk_task &a, typename Shape::memory &m, int lane, int count) {
    if constexpr (Shape::select)
        if (count < 0)
            count = select_wide<Shape>(a, m, lane);
    sort_wide<Shape, P, R>(a, m, count, lane);
}

// [sort-packed]
// Sorts 32-bit keys: how far a sum's bits lie above the threshold's, above what tells equal sums apart. If the pair
// itself fits there, because the distances end in zeros (sums of 16-bit numbers do), that decides everything. If not,
// the candidate's place among the held goes there, some low bits of the distance may have to go, and neighbours
// may have to be exchanged. Returns whether that decided everything.
template <typename Shape, int P, int R>
__device__ inline bool sort_packed(const candidates<Shape> &list, const topk_task &a, const typename Shape::memory &m,
                                   const level &found, float best, int lane, uint32_t *keys) {
    typedef typename Shape::choice_network network;
    uint32_t least = rising_plain(found.least), distance[P], pair[P], key[P], any = 0;
    uint32_t there = 0; // a bit for each register
#pragma unroll
    for (int r = 0; r < P; r++) {
        float sum;
        if constexpr (Shape::select) {
            bool kept = r * Shape::lanes + lane % Shape::lanes < found.count;
            typename Shape::candidate c = m.kept[r * Shape::lanes + lane % Shape::lanes];
            pair[r] = kept ? c.pair : 0;
            sum = kept ? c.sum : found.least;
            there |= (uint32_t)kept << r;
        } else {
            pair[r] = list.pairs[r];
            sum = fmaxf(list.sums[r], found.least);
            there |= (uint32_t)(list.sums[r] >= found.least) << r;
        }
        distance[r] = rising_plain(sum) - least;
        any |= distance[r];
    }
    any = warp_or(any);
    int bits = 32 - __clz(rising_plain(best) - least), zeros = any ? __ffs(any) - 1 : 0;
    bool fits = __all_sync(ALL_LANES, bits - zeros + 2 * Shape::key_bits <= 32);
    int low_bits = fits ? 2 * Shape::key_bits : Shape::held_bits;
    int drop = fits ? zeros : max(0, bits + low_bits - 32);
#pragma unroll
    for (int r = 0; r < P; r++) {
        uint32_t low = fits ? Shape::pair_mask ^ keys_of<Shape>(m, pair[r])
                            : Shape::held - 1 - r * Shape::lanes - lane % Shape::lanes;
        key[r] = there >> r & 1 ? distance[r] >> drop << low_bits | low : 0;
    }
    network::sort(key, lane);
    if (fits) {
#pragma unroll
        for (int r = 0; r < R; r++)
            keys[r] = ~key[r] & Shape::pair_mask;
        return true;
    }
    int place = network::place(lane), base = lane & ~(Shape::lanes - 1);
    int full = Shape::select ? found.count - 1 : Shape::held - 1;
    float sum[R];
    uint32_t last = 0; // the K-th
#pragma unroll
    for (int r = 0; r < R; r++) {
        int slot = min(full, (int)(Shape::held - 1 - (key[r] & (Shape::held - 1)))); // also of what holds nothing
        typename Shape::candidate c = held_at<Shape>(a, m, slot);
        bool wanted = place * R + r < a.K;
        keys[r] = wanted ? keys_of<Shape>(m, c.pair) : ~0u;
        sum[r] = wanted ? c.sum : -INFINITY;
        last = r == (a.K - 1) % R ? key[r] : last;
    }
    last = __shfl_sync(ALL_LANES, last, base | network::lane_at((a.K - 1) / R)) >> low_bits << drop; // its distance
    int reach = 0;
#pragma unroll
    for (int r = 0; r < P; r++) {
        uint32_t far = distance[r];
        if constexpr (P > 8) // too many to keep in registers
            far = rising_plain(r * Shape::lanes + lane % Shape::lanes < found.count
                                   ? m.kept[r * Shape::lanes + lane % Shape::lanes].sum
                                   : found.least) -
                  least;
        reach += (there >> r & 1) && far >= last;
    }
    bool decided =
        repair<R>(sum, keys, base | network::lane_at((place + Shape::lanes - 1) % Shape::lanes),
                  base | network::lane_at((place + 1) % Shape::lanes), place == 0, place == Shape::lanes - 1) &&
        warp_count(reach) == Shape::tokens * a.K;
#pragma unroll
    for (int r = 0; r < R; r++)
        keys[r] &= Shape::pair_mask;
    return decided;
}
// [/sort-packed]

// ---- Scores and weights ----

// R results of a lane, of which the first `count` exist: together where all do and the row allows it.
template <int R, typename V> __device__ inline void store_results(V *to, const V *from, int count, bool aligned) {
    if constexpr (R > 1) {
        constexpr int width = R < 4 ? R : 4;
        struct alignas(width * sizeof(V)) group {
            V at[width];
        };
        if (aligned) {
#pragma unroll
            for (int r = 0; r < R; r += width) {
                group g;
#pragma unroll
                for (int e = 0; e < width; e++)
                    g.at[e] = from[r + e];
                if (r + width <= count)
                    *(group *)(to + r) = g;
            }
            return;
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++)
        if (r < count)
            to[r] = from[r];
}

// [finish-warp]
template <typename Shape, int R>
__device__ inline void finish(const topk_task &a, uint32_t t, const typename Shape::memory &m, int lane, float log_sum,
                              const uint32_t *keys) {
    int first = Shape::choice_network::place(lane) * R;
    float x_max = m.ranked[0][0], y_max = m.ranked[1][0], score[R], weight[R], largest = -INFINITY;
    int32_t index[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        int i = keys[r] >> Shape::key_bits, j = keys[r] & Shape::key_mask;
        index[r] = i * a.n + j;
        score[r] = (m.value[0][i] - x_max) + (m.value[1][j] - y_max) - log_sum;
        if (first + r < a.K)
            largest = fmaxf(largest, score[r]);
    }
    // A common factor cancels when the weights are normalised, and without it they could all underflow.
    float shift = a.norm_topk_prob ? token_max<Shape::lanes>(largest) : 0, sum = 0;
#pragma unroll
    for (int r = 0; r < R; r++) {
        weight[r] = expf(score[r] - shift);
        sum += first + r < a.K ? weight[r] : 0;
    }
    if (a.norm_topk_prob) {
        float scale = 1 / token_sum<Shape::lanes>(sum);
#pragma unroll
        for (int r = 0; r < R; r++)
            weight[r] *= scale;
    }
    if (t >= (uint32_t)a.T) // the second token of the last pair
        return;
    uint64_t at = (uint64_t)t * a.K + first;
    constexpr int width = R < 4 ? R : 4;
    bool aligned = a.K % width == 0;
    store_results<R>(a.indices + at, index, a.K - first, aligned);
    if (a.scores)
        store_results<R>(a.scores + at, score, a.K - first, aligned);
    if (a.weights)
        store_results<R>(a.weights + at, weight, a.K - first, aligned);
}
// [/finish-warp]

template <typename Shape> __host__ __device__ constexpr int warps_a_block() {
    return sizeof(typename Shape::memory) * Shape::tokens > 12000 ? 2 : 4;
}

// [one-token]
// From the logits in shared memory to the keys of the chosen pairs, best first, R a lane. Returns the log-sum.
template <typename Shape, int S, int FORM, int P, int R>
__device__ inline float choose(const topk_task &a, typename Shape::memory &m, candidates<Shape> &list, int lane,
                               uint32_t *keys) {
    float log_sum = NAN;
    if (FORM != FORM_WIDE && rank_packed<Shape, S>(a, lane, m))
        log_sum = log_sums<Shape, S>(m, lane);
    if (__builtin_expect(__any_sync(ALL_LANES, isnan(log_sum)), FORM == FORM_WIDE)) {
        rank_wide<Shape, S>(a, lane, m);
        log_sum = log_sums<Shape, S>(m, lane);
    }
    level found = {lower_bound<Shape>(a, m, lane), 0, -1};
    float best = m.ranked[0][0] + m.ranked[1][0];
    bool decided = false;
    if (FORM != FORM_WIDE &&
        __builtin_expect(__all_sync(ALL_LANES, !isnan(log_sum) && found.least > -INFINITY && best < INFINITY), 1)) {
        list.add(a, m);
        if constexpr (Shape::select)
            decided = find_level<Shape>(list, a, m, found.least, best, &found);
        else
            decided = true;
        if (__builtin_expect(decided, 1)) {
            if constexpr (Shape::select)
                compact<Shape>(list, a, m, found);
            decided = sort_packed<Shape, P, R>(list, a, m, found, best, lane, keys);
        } else {
            found.count = -1;
        }
    }
    if (__builtin_expect(!decided, FORM == FORM_WIDE)) {
        choose_wide<Shape, P, R>(a, m, lane, found.count);
#pragma unroll
        for (int r = 0; r < R; r++)
            keys[r] = ((uint32_t *)m.kept)[r * Shape::lanes + lane % Shape::lanes];
    }
    return log_sum;
}
// [/one-token]

// Registers for a thread are held down so that enough warps hide each other's waiting: so many blocks must fit.
template <typename Shape> constexpr int blocks_a_multiprocessor() {
    int registers = Shape::most > 128                                 ? 168
                    : Shape::registers_a_side > 16                    ? 128
                    : Shape::registers_a_side > 8 && Shape::most > 16 ? 96
                    : Shape::most > 32                                ? 64
                                                                      : 48;
    int blocks = 65536 / (warps_a_block<Shape>() * WARP * registers);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    int most = 1024 / (warps_a_block<Shape>() * WARP); // threads of a multiprocessor on sm_75
    blocks = blocks < most ? blocks : most;
#endif
    return blocks;
}

// [warp-kernel]
// A warp a token or a pair of tokens, 2 or 4 warps a block that never wait for one another. Shared memory: a token's
// logits, its ranked values and keys, and the candidates kept; 1 to 18 KB a token. Traffic: logits once, results once,
// and the list of pairs from the caches.
template <int S, int MOST, int FORM>
__global__ void __launch_bounds__(warps_a_block<warp_shape<S, MOST, FORM>>() * WARP,
                                  blocks_a_multiprocessor<warp_shape<S, MOST, FORM>>())
    warp_kernel(const __grid_constant__ topk_task a) {
    typedef warp_shape<S, MOST, FORM> Shape;
    constexpr int warps = warps_a_block<Shape>(), P = Shape::held / Shape::lanes, R = Shape::choice_network::registers;
    __shared__ typename Shape::memory memory[warps * Shape::tokens];
    typename Shape::memory &m = memory[threadIdx.x / Shape::lanes];
    int lane = threadIdx.x % WARP;
    uint32_t t = blockIdx.x * warps * Shape::tokens + threadIdx.x / Shape::lanes, tokens = a.T;
    if (t - lane / Shape::lanes >= tokens)
        return;
    uint32_t from = min(t, tokens - 1); // an odd last token is worked on twice and stored once
    if (__builtin_expect((a.n & (a.dtype == FMOE_F32 ? 3 : 7)) == 0, 1)) {
        uint4 piece[S / 4];
        fetch<S, Shape::half>(a, from, lane, piece);
        put<S, Shape::half>(a, lane, piece, m.value);
    } else {
        load_unaligned<Shape::half>(a, from, lane, m.value);
    }
    candidates<Shape> list;
    list.list(lane);
    uint32_t keys[R];
    float log_sum = choose<Shape, S, FORM, P, R>(a, m, list, lane, keys);
    finish<Shape, R>(a, t, m, lane, log_sum, keys);
}
// [/warp-kernel]

template <int S, int MOST, int FORM> fmoe_status launch_shape(const topk_task &a, cudaStream_t stream) {
    typedef warp_shape<S, MOST, FORM> Shape;
    constexpr int warps = warps_a_block<Shape>();
    warp_kernel<S, MOST, FORM><<<(unsigned)ceil_div(a.T, warps * Shape::tokens), warps * WARP, 0, stream>>>(a);
    return launched("warp_kernel");
}

template <int S, int FORM> fmoe_status launch_keys(const topk_task &a, cudaStream_t stream) {
    if (a.K <= 16)
        return launch_shape<S, 16, FORM>(a, stream);
    if (a.K <= 32)
        return launch_shape<S, 32, FORM>(a, stream);
    if (a.K <= 64)
        return launch_shape<S, 64, FORM>(a, stream);
    if (a.K <= 128)
        return launch_shape<S, 128, FORM>(a, stream);
    return launch_shape<S, TOPK_WARP_TOPK, FORM>(a, stream);
}

// Two tokens a warp.
template <int S> fmoe_status launch_pairs(const topk_task &a, cudaStream_t stream) {
    if (a.K <= 16)
        return launch_shape<S, 16, FORM_PAIR>(a, stream);
    if (a.K <= 32)
        return launch_shape<S, 32, FORM_PAIR>(a, stream);
    return launch_shape<S, TOPK_PAIR_TOPK, FORM_PAIR>(a, stream);
}

// The instance that fits n and K.
template <int FORM> fmoe_status launch_warps(const topk_task &a, cudaStream_t stream) {
    if (a.n > TOPK_WARP_KEYS || a.K > TOPK_WARP_TOPK)
        return fmoe_fail(FMOE_UNSUPPORTED, "num_keys = %d or num_experts_per_tok = %d exceeds %d", a.n, a.K,
                         TOPK_WARP_TOPK);
    if (a.T == 0)
        return FMOE_OK;
    if (a.n <= 128)
        return launch_keys<8, FORM>(a, stream);
    if (a.n <= 256)
        return launch_keys<16, FORM>(a, stream);
    return launch_keys<TOPK_WARP_KEYS / 16, FORM>(a, stream);
}

#endif
