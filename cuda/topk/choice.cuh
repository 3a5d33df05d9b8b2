// The last third of a warp's work: the kept candidates sorted, their scores and weights, and the kernel itself.
#ifndef FMOE_TOPK_CHOICE_CUH
#define FMOE_TOPK_CHOICE_CUH

#include "select.cuh"

// Register r's candidate of those that a lane sorts: of the kept ones, or, if all are sorted, of the whole list.
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
__device__ inline void sort_wide(const topk_task &a, const typename Shape::memory &m, int count, int lane,
                                 uint32_t *keys) {
    uint64_t key[P];
#pragma unroll
    for (int r = 0; r < P; r++) {
        int place = r * WARP + lane;
        key[r] = 0;
        if (Shape::select ? place < count : exists<Shape>(a, place, stairs.pair[place])) {
            typename Shape::candidate c = held_at<Shape>(a, m, place);
            key[r] = pack(c.sum, keys_of<Shape>(m, c.pair));
        }
    }
    Shape::choice_network::sort(key, lane);
#pragma unroll
    for (int r = 0; r < R; r++)
        keys[r] = index_of(key[r]) & Shape::pair_mask;
}
// [/sort-wide]

// Is every one of the first K followed by a smaller sum, or by an equal one with a larger pair?
template <typename Shape, int R>
__device__ inline bool in_order(const topk_task &a, const typename Shape::memory &m, int lane, const uint32_t *keys) {
    typedef typename Shape::choice_network network;
    int place = network::place(lane), next = network::lane_at((place + 1) % WARP);
    float sum[R + 1];
    uint32_t after[R + 1];
#pragma unroll
    for (int r = 0; r < R; r++) {
        sum[r] = m.value[0][keys[r] >> Shape::key_bits] + m.value[1][keys[r] & Shape::key_mask];
        after[r] = keys[r];
    }
    sum[R] = __shfl_sync(ALL_LANES, sum[0], next);
    after[R] = __shfl_sync(ALL_LANES, keys[0], next);
    bool ordered = true;
#pragma unroll
    for (int r = 0; r < R; r++)
        ordered &= sum[r] > sum[r + 1] || (sum[r] == sum[r + 1] && after[r] < after[r + 1]) || place * R + r + 1 >= a.K;
    return ordered;
}

// [sort-packed]
// Sorts 32-bit keys: how far a sum's bits lie above the threshold's, above what tells equal sums apart. If the pair
// itself fits there, because the distances end in zeros (sums of 16-bit numbers do), that decides everything. If not,
// the candidate's place among the held goes there, some low bits of the distance may have to go, and the order is
// checked. Returns whether it stands.
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
            typename Shape::candidate c = {0, found.least};
            if (r * WARP + lane < found.count)
                c = m.kept[r * WARP + lane];
            pair[r] = c.pair;
            sum = c.sum;
            there |= (uint32_t)(r * WARP + lane < found.count) << r;
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
    bool fits = bits - zeros + 2 * Shape::key_bits <= 32;
    int low_bits = fits ? 2 * Shape::key_bits : Shape::held_bits;
    int drop = fits ? zeros : max(0, bits + low_bits - 32);
#pragma unroll
    for (int r = 0; r < P; r++) {
        uint32_t low = fits ? Shape::pair_mask ^ keys_of<Shape>(m, pair[r]) : Shape::held - 1 - r * WARP - lane;
        key[r] = there >> r & 1 ? distance[r] >> drop << low_bits | low : 0;
    }
    network::sort(key, lane);
    if (fits) {
#pragma unroll
        for (int r = 0; r < R; r++)
            keys[r] = ~key[r] & Shape::pair_mask;
        return true;
    }
    int place = network::place(lane);
    uint32_t last = 0; // the K-th
#pragma unroll
    for (int r = 0; r < R; r++) {
        int slot = Shape::held - 1 - (key[r] & (Shape::held - 1));
        uint32_t chosen = 0;
        if (place * R + r < a.K) {
            if constexpr (Shape::select)
                chosen = m.kept[slot].pair;
            else
                chosen = stairs.pair[slot];
        }
        keys[r] = keys_of<Shape>(m, chosen);
        last = r == (a.K - 1) % R ? key[r] : last;
    }
    last = __shfl_sync(ALL_LANES, last, network::lane_at((a.K - 1) / R)) >> low_bits << drop; // its distance
    int reach = 0;
#pragma unroll
    for (int r = 0; r < P; r++) {
        uint32_t far = distance[r];
        if constexpr (P > 8) // too many to keep in registers
            far = rising_plain(r * WARP + lane < found.count ? m.kept[r * WARP + lane].sum : found.least) - least;
        reach += (there >> r & 1) && far >= last;
    }
    return warp_count(reach) == a.K && __all_sync(ALL_LANES, in_order<Shape, R>(a, m, lane, keys));
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
__device__ inline void finish(const topk_task &a, int64_t t, const typename Shape::memory &m, int lane, float log_sum,
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
    float shift = a.norm_topk_prob ? warp_max(largest) : 0, sum = 0;
#pragma unroll
    for (int r = 0; r < R; r++) {
        weight[r] = expf(score[r] - shift);
        sum += first + r < a.K ? weight[r] : 0;
    }
    if (a.norm_topk_prob) {
        float scale = 1 / warp_sum(sum);
#pragma unroll
        for (int r = 0; r < R; r++)
            weight[r] *= scale;
    }
    int64_t at = t * a.K + first;
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
    return sizeof(typename Shape::memory) > 12000 ? 2 : 4;
}

// [warp-kernel]
// A warp a token, 2 or 4 warps a block that never wait for one another. Shared memory: a token's logits, its ranked
// values and keys, and the candidates kept; 1 to 14 KB a warp. Traffic: logits once, results once, and the list of
// pairs from the caches.
template <int S, int MOST, int FORM>
__global__ void __launch_bounds__(warps_a_block<warp_shape<S, MOST, FORM>>() * WARP) warp_kernel(topk_task a) {
    typedef warp_shape<S, MOST, FORM> Shape;
    constexpr int warps = warps_a_block<Shape>(), P = Shape::held / WARP, R = Shape::choice_network::registers;
    __shared__ typename Shape::memory memory[warps];
    typename Shape::memory &m = memory[threadIdx.x / WARP];
    int lane = threadIdx.x % WARP;
    int64_t t = (int64_t)blockIdx.x * warps + threadIdx.x / WARP;
    if (t >= a.T)
        return;
    candidates<Shape> list;
    list.list(lane);
    WITH_DTYPE(a.dtype, E, load_sides<Shape::keys, E>(a, t, lane, m.value));
    float log_sum = NAN;
    if (FORM != FORM_WIDE && rank_packed<Shape, S>(a, lane, m))
        log_sum = log_sums<Shape, S>(m, lane);
    if (isnan(log_sum)) {
        rank_wide<Shape, S>(a, lane, m);
        log_sum = log_sums<Shape, S>(m, lane);
    }
    uint32_t keys[R]; // of the chosen pairs, best first
    level found = {0, 0, 0};
    float least = lower_bound<Shape>(a, m, lane), best = m.ranked[0][0] + m.ranked[1][0];
    bool plain = !isnan(log_sum) && least > -INFINITY && best < INFINITY, sorted = false;
    if (FORM != FORM_WIDE && plain) {
        list.add(a, m);
        found.least = least;
        if constexpr (Shape::select) {
            plain = find_level<Shape>(list, a, m, least, best, &found);
            if (plain)
                compact<Shape>(list, a, m, lane, found);
        }
        sorted = plain && sort_packed<Shape, P, R>(list, a, m, found, best, lane, keys);
    }
    if (!sorted) {
        if constexpr (Shape::select)
            if (FORM == FORM_WIDE || !plain)
                found.count = select_wide<Shape>(a, m, lane);
        sort_wide<Shape, P, R>(a, m, found.count, lane, keys);
    }
    finish<Shape, R>(a, t, m, lane, log_sum, keys);
}
// [/warp-kernel]

template <int S, int MOST, int FORM> fmoe_status launch_shape(const topk_task &a, cudaStream_t stream) {
    constexpr int warps = warps_a_block<warp_shape<S, MOST, FORM>>();
    warp_kernel<S, MOST, FORM><<<(unsigned)ceil_div(a.T, warps), warps * WARP, 0, stream>>>(a);
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
