// The two phases of the expert step for a block that has one token and one slice of the columns, several rows' loads in
// flight. Rungs in-flight, two-kernels and slices launch them.
#ifndef FMOE_EXPERT_PHASES_CUH
#define FMOE_EXPERT_PHASES_CUH

#include "expert.cuh"

// How a slice of a row is read: in loads of 16 bytes, where all rows start at multiples of 16 bytes, with or without a
// last slice that is not whole, or element by element.
typedef enum { WHOLE_SLICES, CUT_SLICES, ELEMENTS } slice_form;

// LANES lanes read a row, each LOADS times 16 bytes; with 16 lanes a warp reads two rows abreast. ROWS: how many loads
// of that kind before the first is used. WARPS at most share a token's pairs in a block, and registers are to be had
// for BLOCKS such blocks on a multiprocessor. KEPT: the L2 is asked to keep the table (from sm_80 on). TENSOR: tensor
// cores make the dot products (16-bit types from sm_80 on, whole slices, 32 lanes).
template <typename E, slice_form FORM_, int LANES_, int LOADS_, int ROWS_, int WARPS_, int BLOCKS_, bool KEPT_,
          bool TENSOR_ = false>
struct reading {
    typedef E element;
    static constexpr slice_form FORM = FORM_;
    static constexpr int LANES = LANES_, LOADS = LOADS_, ROWS = ROWS_, WARPS = WARPS_;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    static constexpr int BLOCKS = BLOCKS_ < 16 ? BLOCKS_ : 16; // sm_75 takes no more
#else
    static constexpr int BLOCKS = BLOCKS_;
#endif
    static constexpr bool VECTORS = FORM != ELEMENTS, KEPT = KEPT_, TENSOR = TENSOR_;
    static_assert(!TENSOR || (sizeof(E) == 2 && FORM == WHOLE_SLICES && LANES == WARP), "a load is a part of one row");
    static constexpr int EACH = pack16<E>::count;    // elements a load
    static constexpr int PARTS = LOADS * EACH;       // elements of a row that a lane has
    static constexpr int WIDTH = LANES * PARTS;      // columns a slice
    static constexpr int ABREAST = WARP / LANES;     // rows side by side
    static constexpr int AT_ONCE = ROWS * ABREAST;   // rows in flight
    static constexpr int LANES_A_ROW = LANES / ROWS; // once the sums are reduced
};

// The column, within the slice, of a lane's element i.
template <typename R> __device__ inline int column_of(int i, int lane) {
    int c = i / R::EACH, e = i % R::EACH;
    return R::VECTORS ? (c * R::LANES + lane % R::LANES) * R::EACH + e : i * R::LANES + lane % R::LANES;
}

// [load-row]
// 16 bytes of a table row, which few other rows of this multiprocessor will ask for: they leave the first-level cache
// to x. With KEPT they are the last that the L2 evicts, after what other kernels left there and what
// this one reads once.
template <bool KEPT> __device__ inline uint4 load_once(const void *from) {
    uint4 v;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if (KEPT) {
        uint64_t policy;
        asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
        asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
            : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
            : "l"(from), "l"(policy));
        return v;
    }
#endif
    asm("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(from));
    return v;
}
// [/load-row]

// What is read where there is no expert: a load from here costs less than a branch around it.
static __device__ const uint4 zeros[256] = {};

// Where an expert's slice begins; every lane makes the address of its own pair's, and shuffles hand it to the others.
template <typename R> __device__ inline uint64_t slice_of(const void *table, int d, int first_column, int32_t expert) {
    typedef typename R::element E;
    return (uint64_t)(expert >= 0 ? (const E *)table + (int64_t)expert * d + first_column : (const E *)zeros);
}

// A lane's part of the slice that lane `of` has the address of. columns: from the slice's first to the table's last.
template <typename R>
__device__ inline void load_row(uint64_t slice, int of, int columns, int lane,
                                pack16<typename R::element> (&part)[R::LOADS]) {
    typedef typename R::element E;
    const E *row = (const E *)__shfl_sync(ALL_LANES, slice, of) + column_of<R>(0, lane);
#pragma unroll
    for (int i = 0; i < R::PARTS; i += R::VECTORS ? R::EACH : 1) {
        bool inside = R::FORM == WHOLE_SLICES || column_of<R>(i, lane) < columns;
        const E *from = row + column_of<R>(i, 0);
        if (R::VECTORS)
            *(uint4 *)&part[i / R::EACH] = inside ? load_once<R::KEPT>(from) : make_uint4(0, 0, 0, 0);
        else
            part[i / R::EACH].at[i % R::EACH] = inside ? __ldg(from) : from_f32<E>(0);
    }
}

template <typename R> __device__ inline void clear_row(pack16<typename R::element> (&part)[R::LOADS]) {
#pragma unroll
    for (int c = 0; c < R::LOADS; c++)
        *(uint4 *)&part[c] = make_uint4(0, 0, 0, 0);
}

// 16 bytes as float32. A bfloat16 is the upper half of a float32: a shift or a mask.
template <typename E> __device__ inline void unpack(const pack16<E> &part, float (&values)[pack16<E>::count]) {
#pragma unroll
    for (int i = 0; i < pack16<E>::count; i++)
        values[i] = to_f32(part.at[i]);
}
template <> __device__ inline void unpack(const pack16<__nv_bfloat16> &part, float (&values)[8]) {
    const unsigned *twos = (const unsigned *)&part;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[2 * i] = __uint_as_float(twos[i] << 16);
        values[2 * i + 1] = __uint_as_float(twos[i] & 0xffff0000u);
    }
}

// ---- Phase 1

// [reduce-rows]
// Sums ROWS values over LANES lanes at once. In each of the first steps a lane gives half of its rows away and gets its
// partner's share of the other half: 1 + 2 + ... + ROWS/2 shuffles in all and then one for each further step, where row
// by row would take 5 · ROWS. Lane l of LANES ends with the sum of row l / (LANES / ROWS).
template <int ROWS, int LANES> __device__ inline float reduce_rows(float (&sum)[ROWS], int lane) {
    int step = LANES / 2;
#pragma unroll
    for (int half = ROWS / 2; half; half /= 2, step /= 2)
#pragma unroll
        for (int r = 0; r < half; r++) {
            bool upper = lane & step;
            float given = upper ? sum[r] : sum[r + half];
            sum[r] = (upper ? sum[r + half] : sum[r]) + __shfl_xor_sync(ALL_LANES, given, step);
        }
    for (; step; step /= 2)
        sum[0] += __shfl_xor_sync(ALL_LANES, sum[0], step);
    return sum[0];
}
// [/reduce-rows]

// A lane's part of a row that stays in registers, from its first column of `columns` on.
template <typename R>
__device__ inline void keep_row(const typename R::element *row, int columns, int lane, float (&kept)[R::PARTS]) {
    typedef typename R::element E;
#pragma unroll
    for (int c = 0; c < R::LOADS; c++) {
        pack16<E> part = {};
        if (R::VECTORS && column_of<R>(c * R::EACH, lane) < columns)
            part = *(const pack16<E> *)(row + column_of<R>(c * R::EACH, lane));
#pragma unroll
        for (int e = 0; e < R::EACH; e++) {
            int column = column_of<R>(c * R::EACH + e, lane);
            if (!R::VECTORS && column < columns)
                part.at[e] = row[column];
            kept[c * R::EACH + e] = to_f32(part.at[e]);
        }
    }
}

// [dots]
// The dot products, over a slice, of the row in registers with those whose addresses `count` lanes from `first` on
// have. Each such lane gets its own. SHORT: there are so few that even zeros are not to be read beyond the last.
template <typename R, bool SHORT>
__device__ inline float dots(const float (&kept)[R::PARTS], uint64_t slice, int first, int count, int columns,
                             int lane) {
    typedef typename R::element E;
    int side = lane / R::LANES, own = lane - first;
    // The lane that will have the sum of this lane's own row.
    int holder = own % R::ABREAST * R::LANES + own % R::AT_ONCE / R::ABREAST * R::LANES_A_ROW;
    float mine = 0;
    // [rows-in-flight]
#pragma unroll 1
    for (int j = 0; j < count; j += R::AT_ONCE) {
        pack16<E> row[R::ROWS][R::LOADS];
#pragma unroll
        for (int r = 0; r < R::ROWS; r++)
            if (!SHORT || r == 0 || j + r * R::ABREAST < count)
                load_row<R>(slice, first + j + r * R::ABREAST + side, columns, lane, row[r]);
            else
                clear_row<R>(row[r]);
        float sum[R::ROWS];
#pragma unroll
        for (int r = 0; r < R::ROWS; r++) {
            sum[r] = 0;
#pragma unroll
            for (int c = 0; c < R::LOADS; c++) {
                float values[R::EACH];
                unpack(row[r][c], values);
#pragma unroll
                for (int i = 0; i < R::EACH; i++)
                    sum[r] = fmaf(kept[c * R::EACH + i], values[i], sum[r]);
            }
        }
        float reduced = reduce_rows<R::ROWS, R::LANES>(sum, lane);
        reduced = __shfl_sync(ALL_LANES, reduced, holder);
        mine = own >= j && own < j + R::AT_ONCE ? reduced : mine;
    }
    // [/rows-in-flight]
    return mine;
}
// [/dots]

// [diagonal]
// The same with less to do for each load, on tensor cores: a warp's load is 512 bytes of one row, 16 bytes a lane, and
// those are an operand of mma_16x8x16 as they are. Its lanes 4i to 4i + 3 have row i of the operand a: piece i of this
// row of the table, 64 bytes; and row 8 + i: piece i of another. x is loaded in the same way, and makes column i of b
// of its piece i. So the product is every piece times every piece of x, and what is wanted, piece i times piece i, is
// its diagonal. Seven eighths of the work are for nothing, on a unit that nobody else wants. Two instructions do what
// takes 32 to unpack, multiply and add.
template <typename R>
__device__ inline float dots_on_diagonal(const uint4 (&x)[R::LOADS], uint64_t slice, int count, int lane) {
    float mine = 0;
#if HAS_MMA_SYNC
    typedef typename R::element E;
    bool diagonal = lane % 4 == lane / 8, odd = lane / 4 % 2;
    int holder = lane % R::ROWS * R::LANES_A_ROW;
#pragma unroll 1
    for (int j = 0; j < count; j += R::ROWS) {
        uint4 row[R::ROWS][R::LOADS];
#pragma unroll
        for (int r = 0; r < R::ROWS; r++) {
            const uint4 *from = (const uint4 *)__shfl_sync(ALL_LANES, slice, j + r) + lane;
#pragma unroll
            for (int c = 0; c < R::LOADS; c++)
                row[r][c] = load_once<R::KEPT>(from + c * WARP);
        }
        float sum[R::ROWS];
#pragma unroll
        for (int r = 0; r < R::ROWS; r += 2) {
            float product[4] = {};
#pragma unroll
            for (int c = 0; c < R::LOADS; c++) {
                const uint4 &one = row[r][c], &two = row[r + 1][c];
                mma_16x8x16<E>(product, {one.x, two.x, one.y, two.y}, x[c].x, x[c].y);
                mma_16x8x16<E>(product, {one.z, two.z, one.w, two.w}, x[c].z, x[c].w);
            }
            sum[r] = !diagonal ? 0.0f : odd ? product[1] : product[0];
            sum[r + 1] = !diagonal ? 0.0f : odd ? product[3] : product[2];
        }
        float reduced = __shfl_sync(ALL_LANES, reduce_rows<R::ROWS, WARP>(sum, lane), holder);
        mine = lane >= j && lane < j + R::ROWS ? reduced : mine;
    }
#endif
    return mine;
}
// [/diagonal]

// The pairs of a token that a warp has: begin to end, as many as it reads at once or a multiple of that, up to the
// last.
template <typename R> __device__ inline void share_of_warp(int K, int *begin, int *end) {
    int warps = blockDim.x / WARP, share = ((K + warps - 1) / warps + R::AT_ONCE - 1) / R::AT_ONCE * R::AT_ONCE;
    *begin = min(K, (int)threadIdx.x / WARP * share);
    *end = min(K, *begin + share);
}

// The row of x that the pairs share, a lane's part of some columns, as what multiplies wants it.
template <typename R> struct kept_columns {
    uint4 packs[R::TENSOR ? R::LOADS : 1];
    float values[R::TENSOR ? 1 : R::PARTS];

    __device__ void load(const typename R::element *row, int columns, int lane) {
        if constexpr (R::TENSOR) {
#pragma unroll
            for (int c = 0; c < R::LOADS; c++)
                packs[c] = ((const uint4 *)row)[c * WARP + lane];
        } else {
            keep_row<R>(row, columns, lane, values);
        }
    }
    __device__ float times(uint64_t slice, int count, int columns, int lane) const {
        if constexpr (R::TENSOR)
            return dots_on_diagonal<R>(packs, slice, count, lane);
        else
            return dots<R, false>(values, slice, 0, count, columns, lane);
    }
};

// [phase-1]
// A block's sums: the pairs of token t, the columns from first_column to last_column. partial: where the sums go if
// these are not all columns, or NULL.
template <typename R>
__device__ inline void pre_activations(const expert_task &a, int t, int first_column, int last_column, float *partial) {
    typedef typename R::element E;
    int lane = threadIdx.x % WARP, begin, end, kept = first_column;
    const E *row = (const E *)a.x + (int64_t)t * a.d;
    const int64_t pairs = (int64_t)t * a.K;
    kept_columns<R> x;
    share_of_warp<R>(a.K, &begin, &end);
    x.load(row + kept, a.d - kept, lane);
    int32_t next = begin + lane < end ? expert_of_pair(a, pairs + begin + lane) : NO_EXPERT;
    for (int first = begin; first < end; first += WARP) {
        int own = first + lane;
        int32_t expert = next;
        next = own + WARP < end ? expert_of_pair(a, pairs + own + WARP) : NO_EXPERT; // asked for before it is needed
        float weight = own < end && !partial ? a.weights[pairs + own] : 0, s = 0;
        for (int column = first_column; column < last_column; column += R::WIDTH) {
            if (column != kept)
                x.load(row + column, a.d - column, lane);
            kept = column;
            uint64_t slice = slice_of<R>(a.down, a.d, column, expert);
            s += x.times(slice, min(WARP, end - first), a.d - column, lane);
        }
        if (own < end && partial)
            __stcs(partial + pairs + own, s);
        else if (own < end)
            store_pair(a, pairs + own, expert, s, weight);
    }
}
// [/phase-1]

// ---- Phase 2

// [add-rows]
// sum += Σ activation · up[e] over the slice for up to 32 pairs, whose experts the lanes have. Their activations are
// asked for after the first rows are on their way.
template <typename R, typename Activation>
__device__ inline void add_rows_times(const expert_task &a, int first_column, int32_t expert, int pairs, int lane,
                                      const Activation &activation_of_pair, float (&sum)[R::PARTS]) {
    typedef typename R::element E;
    uint64_t slice = slice_of<R>(a.up, a.d, first_column, expert);
    int side = lane / R::LANES, columns = a.d - first_column;
    float activation = 0;
#pragma unroll 1
    for (int j = 0; j < pairs; j += R::AT_ONCE) {
        pack16<E> row[R::ROWS][R::LOADS];
#pragma unroll
        for (int r = 0; r < R::ROWS; r++)
            load_row<R>(slice, j + r * R::ABREAST + side, columns, lane, row[r]);
        if (j == 0)
            activation = activation_of_pair();
#pragma unroll
        for (int r = 0; r < R::ROWS; r++) {
            float scale = __shfl_sync(ALL_LANES, activation, j + r * R::ABREAST + side);
#pragma unroll
            for (int c = 0; c < R::LOADS; c++) {
                float values[R::EACH];
                unpack(row[r][c], values);
#pragma unroll
                for (int i = 0; i < R::EACH; i++)
                    sum[c * R::EACH + i] = fmaf(scale, values[i], sum[c * R::EACH + i]);
            }
        }
    }
}
// [/add-rows]

// With `wait` the activations are another kernel's, which may still run.
template <typename R>
__device__ inline void add_rows(const expert_task &a, int first_column, int32_t expert, int64_t pair, int pairs,
                                bool wait, int lane, float (&sum)[R::PARTS]) {
    auto activation_of_pair = [&] {
        if (wait)
            wait_for_kernel_before();
        return expert >= 0 ? a.activations[pair] : 0.0f;
    };
    add_rows_times<R>(a, first_column, expert, pairs, lane, activation_of_pair, sum);
}

// Adds up the warps' sums in the order of the warps: store(column, sum) for each of `columns` columns.
template <typename R, typename Store>
__device__ inline void join_warps(int columns, float (&sum)[R::PARTS], float *shared, const Store &store) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
#pragma unroll
    for (int i = 0; i < R::PARTS; i++) {
#pragma unroll
        for (int step = R::LANES; step < WARP; step *= 2)
            sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], step);
        if (lane < R::LANES)
            shared[warp * R::WIDTH + column_of<R>(i, lane)] = sum[i];
    }
    __syncthreads();
    for (int column = threadIdx.x; column < min(R::WIDTH, columns); column += blockDim.x) {
        float all = 0;
        for (int w = 0; w < warps; w++)
            all += shared[w * R::WIDTH + column];
        store(column, all);
    }
    __syncthreads();
}

// [phase-2]
// A block's part of y: token t, the columns from first_column to last_column. With the first column comes the note.
template <typename R>
__device__ inline void output(const expert_task &a, int t, int first_column, int last_column, bool wait,
                              float *shared) {
    typedef typename R::element E;
    __shared__ int first_bad;
    int lane = threadIdx.x % WARP, begin, end;
    share_of_warp<R>(a.K, &begin, &end);
    if (threadIdx.x == 0)
        first_bad = a.K;
    __syncthreads();
    for (int column = first_column; column < last_column; column += R::WIDTH) {
        float sum[R::PARTS] = {};
        for (int first = begin; first < end; first += WARP) {
            bool has = first + lane < end;
            int64_t pair = (int64_t)t * a.K + first + lane;
            int32_t expert = has ? expert_of_pair(a, pair) : NO_EXPERT;
            if (has && expert == NO_EXPERT)
                atomicMin(&first_bad, first + lane);
            if (has && expert == NO_EXPERT && a.pre_activations)
                a.pre_activations[pair] = 0;
            add_rows<R>(a, column, expert, pair, min(WARP, end - first), wait, lane, sum);
        }
        E *y = (E *)a.y + (int64_t)t * a.d + column;
        join_warps<R>(a.d - column, sum, shared, [&](int c, float all) { y[c] = from_f32<E>(all); });
    }
    if (first_column == 0 && threadIdx.x == 0)
        write_note(a, t, first_bad);
}
// [/phase-2]

#endif
