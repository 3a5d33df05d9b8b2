// The gradients of both tables along the schedule, which is cut into lists of about the same number of pairs.
#ifndef FMOE_EXPERT_BACKWARD_LISTS_CUH
#define FMOE_EXPERT_BACKWARD_LISTS_CUH

#include "expert_backward.cuh"
#include "../expert/phases.cuh"

#define LIST_MOST   192 // three times the longest range
#define LIST_PADDED (LIST_MOST + 8)
#define CLEARED     64 // experts a block looks at for rows to clear

#define EVICT_LAST 0x14f0000000000000ull // the cache hint that createpolicy makes for all of the accesses

// A list of pairs, expert by expert. Behind the last pair it goes on with that pair, scaled by nothing, up to a
// multiple of what is loaded at once: no row has to be asked whether it is there.
template <int WARPS> struct alignas(16) list_memory {
    unsigned row[LIST_PADDED]; // the token's
    int expert[LIST_PADDED];
    float to_up[LIST_PADDED], to_down[LIST_PADDED]; // what the pair's rows of dy and x are scaled by
    float dots[WARPS][LIST_PADDED];                 // the warps' shares of dA
    float silu[LIST_MOST];
    int pair[LIST_MOST], cuts[2];
};

// [cut]
// Where list r begins: near r ranges, but an expert with no more pairs than a range is not cut. Where the place is in
// the middle of one, the list begins after it. A longer expert is cut at the place, unless its beginning is less than a
// range before: then the list begins there. So a list has fewer pairs than three ranges, and one that has a part of an
// expert's pairs has nothing else before it.
__device__ inline int cut(const backward_task &a, int r) {
    int good = a.offsets[a.N], place = (int)min((int64_t)r * a.range, (int64_t)good);
    if (place == good)
        return good;
    int e = a.indices[a.pairs[place]], start = a.offsets[e], end = a.offsets[e + 1];
    if (start == place || end - start > a.range)
        return start > place - a.range ? start : place;
    return end;
}
// [/cut]

// ---- A warp's columns of a gradient row

// Where sums go: to the gradient, or among the parts if they are of the expert that the list has a part of.
typedef struct {
    void *gradient;
    float *part;
    int part_expert;
} sums_to;

// Values of neighbouring columns in float32, EACH a lane.
template <int EACH> __device__ inline void store_floats(float *to, bool add, const float (&sum)[EACH]) {
#pragma unroll
    for (int i = 0; i < EACH; i += 4) {
        float4 v = make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
        if (add) {
            float4 before = *(const float4 *)(to + i);
            v = make_float4(before.x + v.x, before.y + v.y, before.z + v.z, before.w + v.w);
        }
        __stcs((float4 *)(to + i), v);
    }
}

template <typename E> __device__ inline void store_pack(E *to, bool add, const float (&sum)[pack16<E>::count]) {
    float before[pack16<E>::count] = {};
    pack16<E> v;
    if (add)
        unpack(*(const pack16<E> *)to, before);
#pragma unroll
    for (int i = 0; i < pack16<E>::count; i++)
        v.at[i] = from_f32<E>(before[i] + sum[i]);
    __stcs((uint4 *)to, *(const uint4 *)&v);
}

template <typename R>
__device__ inline void store_sums(const backward_task &a, const sums_to &to, int expert, int column, int lane,
                                  const float (&sum)[R::EACH]) {
    typedef typename R::element E;
    if (!to.gradient)
        return;
    bool part = expert == to.part_expert;
    if constexpr (R::VECTORS) {
        int64_t c = column + lane * R::EACH, at = (int64_t)expert * a.d + c;
        if (R::FORM != WHOLE_SLICES && c >= a.d)
            return;
        if (part || a.wide || sizeof(E) == sizeof(float))
            store_floats(part ? to.part + c : (float *)to.gradient + at, !part && a.accumulate, sum);
        else
            store_pack((E *)to.gradient + at, a.accumulate, sum);
    } else {
#pragma unroll
        for (int i = 0; i < R::EACH; i++) {
            int c = column + column_of<R>(i, lane);
            int64_t at = (int64_t)expert * a.d + c;
            if (c < a.d && part)
                to.part[c] = sum[i];
            else if (c < a.d)
                store_element<E>(a, to.gradient, at, sum[i] + (a.accumulate ? load_element<E>(a, to.gradient, at) : 0));
        }
    }
}

// How a row is named in a list: by its distance from row 0 in units of 16 bytes, so that its address takes one
// multiplication, or by its number.
template <typename R> __device__ inline unsigned row_name(const backward_task &a, int row) {
    return R::VECTORS ? (unsigned)row * (unsigned)(a.d / R::EACH) : (unsigned)row;
}

// 16 bytes of a row that others will ask for as well: last to leave the L2, and not to stay in the first-level cache.
__device__ inline uint4 load_shared_row(const void *from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(from), "l"(EVICT_LAST));
    return v;
#else
    return __ldg((const uint4 *)from);
#endif
}

// A lane's 16 bytes of a row's columns from `column` on. start: the lane's part of row 0.
template <typename R>
__device__ inline pack16<typename R::element> load_part(const backward_task &a, const typename R::element *start,
                                                        unsigned row, int column, int lane) {
    typedef typename R::element E;
    pack16<E> part = {};
    if constexpr (R::VECTORS) {
        if (R::FORM == WHOLE_SLICES || column + column_of<R>(0, lane) < a.d)
            *(uint4 *)&part = load_shared_row((const char *)start + (uint64_t)row * 16);
    } else {
#pragma unroll
        for (int i = 0; i < R::EACH; i++)
            if (column + column_of<R>(i, lane) < a.d)
                part.at[i] = __ldg(start + (int64_t)row * a.d + column_of<R>(i, 0));
    }
    return part;
}

// sum += scale · row; returns ⟨up, row⟩ if DOTS.
template <typename E, bool DOTS>
__device__ inline float add_row(const pack16<E> &row, const float (&up)[pack16<E>::count], float scale,
                                float (&sum)[pack16<E>::count]) {
    float values[pack16<E>::count], dot = 0;
    unpack(row, values);
#pragma unroll
    for (int i = 0; i < pack16<E>::count; i++) {
        sum[i] = fmaf(scale, values[i], sum[i]);
        dot = DOTS ? fmaf(up[i], values[i], dot) : 0;
    }
    return dot;
}

// [add-list]
// A warp's columns of a list: for each expert the sum of its pairs' rows, each times its scale. ROWS of them are on
// their way at once, whoever's they are; most times they are all of the expert at hand. With DOTS also ⟨row, up[e]⟩ for
// each pair, over the warp's columns: added to `dots`, or the first there.
template <typename R, int ROWS, bool DOTS>
__device__ inline void add_list(const backward_task &a, const list_memory<R::WARPS> &m, int count, const float *scales,
                                const sums_to &to, const void *rows, int column, float *dots, bool first_dots,
                                int lane) {
    typedef typename R::element E;
    const E *start = (const E *)rows + column + column_of<R>(0, lane);
    const E *up = (const E *)a.up + column + column_of<R>(0, lane);
    asm volatile("" : "+l"(start)); // the compiler would take it apart again, for three instructions a row
    int expert = m.expert[0];
    float sum[R::EACH] = {}, own[R::EACH] = {};
    if (DOTS)
        unpack(load_part<R>(a, up, row_name<R>(a, expert), column, lane), own);
#pragma unroll 1
    for (int j = 0; j < count; j += ROWS) {
        pack16<E> row[ROWS];
        float dot[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            row[r] = load_part<R>(a, start, m.row[j + r], column, lane);
        if (m.expert[j + ROWS - 1] == expert) {
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                dot[r] = add_row<E, DOTS>(row[r], own, scales[j + r], sum);
        } else {
            pack16<E> next[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                if (DOTS && m.expert[j + r] != (r == 0 ? expert : m.expert[j + r - 1]))
                    next[r] = load_part<R>(a, up, row_name<R>(a, m.expert[j + r]), column, lane);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                if (m.expert[j + r] != expert) {
                    store_sums<R>(a, to, expert, column, lane, sum);
                    expert = m.expert[j + r];
                    if (DOTS)
                        unpack(next[r], own);
#pragma unroll
                    for (int i = 0; i < R::EACH; i++)
                        sum[i] = 0;
                }
                dot[r] = add_row<E, DOTS>(row[r], own, scales[j + r], sum);
            }
        }
        if (DOTS) {
            float reduced = reduce_rows<ROWS, WARP>(dot, lane), *place = dots + j + lane / (WARP / ROWS);
            if (lane % (WARP / ROWS) == 0)
                *place = reduced + (first_dots ? 0 : *place);
        }
    }
    store_sums<R>(a, to, expert, column, lane, sum);
}
// [/add-list]

// ---- A block's list

template <typename R, bool ON_THE_WAY>
__device__ inline void load_list(const backward_task &a, int first, int count, list_memory<R::WARPS> &m) {
    for (int i = threadIdx.x; i < (count + 7) / 8 * 8; i += R::WARPS * WARP) {
        int pair = a.pairs[first + min(i, count - 1)];
        m.row[i] = row_name<R>(a, pair / a.K);
        m.expert[i] = a.indices[pair];
        if (i >= count) {
            m.to_up[i] = m.to_down[i] = 0;
        } else if (ON_THE_WAY) {
            pair_scales scales = scales_of(a.pre_activations[pair], a.weights[pair]);
            m.to_up[i] = scales.to_up;
            m.to_down[i] = scales.to_down;
            m.silu[i] = scales.silu;
            m.pair[i] = pair;
        } else {
            m.to_up[i] = a.activations[pair];
            m.to_down[i] = a.ds[pair];
        }
    }
}

// The warps' shares of dA, in the order of the warps, and what follows from them.
template <typename R> __device__ inline void finish_pairs(const backward_task &a, int count, list_memory<R::WARPS> &m) {
    for (int i = threadIdx.x; i < count; i += R::WARPS * WARP) {
        float da = 0;
        for (int w = 0; w < R::WARPS && w * R::WIDTH < a.d; w++)
            da += m.dots[w][i];
        float ds = da * m.to_down[i];
        m.to_down[i] = ds;
        a.ds[m.pair[i]] = ds;
        if (a.dweights)
            a.dweights[m.pair[i]] = da * m.silu[i];
    }
}

// Rows of experts that nobody chose.
template <typename R> __device__ inline void clear_rows(const backward_task &a, int first) {
    typedef typename R::element E;
    for (int e = first; e < min(a.N, first + CLEARED); e++) {
        if (a.offsets[e] != a.offsets[e + 1])
            continue;
        for (int column = threadIdx.x / WARP * R::WIDTH; column < a.d; column += R::WARPS * R::WIDTH) {
            float zero[R::EACH] = {};
            store_sums<R>(a, {a.ddown, NULL, NO_EXPERT}, e, column, threadIdx.x % WARP, zero);
            store_sums<R>(a, {a.dup, NULL, NO_EXPERT}, e, column, threadIdx.x % WARP, zero);
        }
    }
}

// Launch: a block of R::WARPS warps a list, each warp with WIDTH columns of every R::WARPS * WIDTH, and among them a
// block for every CLEARED experts: what only writes goes beside what mostly reads. Shared memory: 24 bytes for each
// pair that a list can have, and 4 for each warp. Traffic: a row of x and one of dy a pair through the L2; ON_THE_WAY a
// row of `up` an expert from memory; 20 bytes a pair in, each in a sector of its own, and 8 out; the gradients out
// once, parts of cut experts in float32.
// [lists]
template <typename R, bool ON_THE_WAY>
static __global__ void __launch_bounds__(R::WARPS *WARP, R::BLOCKS) lists_kernel(backward_task a, int lists) {
    __shared__ list_memory<R::WARPS> m;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, clearing = gridDim.x - lists;
    int cleared = (int)((int64_t)blockIdx.x * clearing / gridDim.x), l = blockIdx.x - cleared;
    start_next_kernel();
    if ((int)((int64_t)(blockIdx.x + 1) * clearing / gridDim.x) > cleared) {
        clear_rows<R>(a, cleared * CLEARED);
        return;
    }
    if (threadIdx.x < 2)
        m.cuts[threadIdx.x] = cut(a, l + threadIdx.x);
    __syncthreads();
    int first = m.cuts[0], count = m.cuts[1] - first;
    if (count == 0)
        return;
    load_list<R, ON_THE_WAY>(a, first, count, m);
    __syncthreads();
    int e = m.expert[0], step = R::WARPS * R::WIDTH;
    bool whole = a.offsets[e] == first && a.offsets[e + 1] <= first + count;
    float *part = a.parts + (int64_t)l * 2 * a.d;
    sums_to ddown = {a.ddown, part, whole ? NO_EXPERT : e}, dup = {a.dup, part + a.d, whole ? NO_EXPERT : e};
    for (int column = warp * R::WIDTH; column < a.d; column += step)
        add_list<R, ON_THE_WAY ? 4 : R::ROWS, ON_THE_WAY>(a, m, count, m.to_up, dup, a.dy, column, m.dots[warp],
                                                          column < step, lane);
    if (ON_THE_WAY) {
        __syncthreads();
        finish_pairs<R>(a, count, m);
        __syncthreads();
    }
    for (int column = warp * R::WIDTH; column < a.d; column += step)
        add_list<R, R::ROWS, false>(a, m, count, m.to_down, ddown, a.x, column, NULL, false, lane);
}
// [/lists]

#endif
