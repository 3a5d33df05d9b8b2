// Epilogues for product.cuh, which includes this: rounded and stored by the copy engine, or float32 sums of parts of
// the depth and their sum.
#ifndef FMOE_PRODUCT_ENDS_CUH
#define FMOE_PRODUCT_ENDS_CUH

#include "product.cuh"

// [store-panel]
// A warpgroup's 32 sums a thread, 64 rows by 64 columns, rounded into a swizzled panel of shared memory.
template <typename E> __device__ inline void put_panel(E *panel, const float (&sums)[32]) {
    int lane = threadIdx.x % WARP, row = threadIdx.x % PRODUCT_GROUP / WARP * 16 + lane % 16;
#pragma unroll
    for (int step = 0; step < 4; step++) {
        unsigned parts[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            parts[i] = round_pair<E>(sums[step * 8 + i * 2], sums[step * 8 + i * 2 + 1]);
        store_matrices(panel + tile_at(row, 2 * step + lane / 16), parts);
    }
}
// [/store-panel]

// ... and from there to C, at (at.row, column). Panels are taken in turns of two: the last but one may still be on its
// way out of this one.
template <typename E>
__device__ inline void store_panel(const product_place &at, const CUtensorMap *to, int column, const float (&sums)[32],
                                   E *panel) {
    if (at.thread == 0)
        store_box_wait_read<1>();
    barrier_sync(at.barrier, PRODUCT_GROUP);
    put_panel(panel, sums);
    shared_stores_done();
    barrier_sync(at.barrier, PRODUCT_GROUP);
    if (at.thread == 0) {
        store_box(to, column, at.row, panel);
        store_box_commit();
    }
}

// Several panels that lie beside each other, at once, and from there to C at (at.row, column). The last ones may still
// be on their way out.
template <typename E, int PANELS>
__device__ inline void store_panels(const product_place &at, const CUtensorMap *to, int column,
                                    const float (&sums)[PANELS][32], E *staging) {
    if (at.thread == 0)
        store_box_wait_read<0>();
    barrier_sync(at.barrier, PRODUCT_GROUP);
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++)
        put_panel(staging + panel * PRODUCT_PANEL, sums[panel]);
    shared_stores_done();
    barrier_sync(at.barrier, PRODUCT_GROUP);
    if (at.thread == 0) {
        for (int panel = 0; panel < PANELS; panel++)
            store_box(to, column + panel * 64, at.row, staging + panel * PRODUCT_PANEL);
        store_box_commit();
    }
}

// A value for y before it is rounded: float32 or of the storage type, [rows, columns] like y; NULL: none.
typedef struct {
    const void *values;
    bool is_f32;
} product_addend;

template <typename E> __device__ inline float addend_at(const product_addend &add, int64_t at) {
    return add.is_f32 ? ((const float *)add.values)[at] : to_f32(((const E *)add.values)[at]);
}

// Rounded once and stored by the copy engine. `to` is described with boxes of 64 rows. An addend has `pitch` elements
// from row to row.
template <typename E> struct store_rounded {
    static constexpr int STAGING = 2 * PRODUCT_PANEL * 2;
    CUtensorMap to;
    product_addend add;
    int rows, columns;

    // The addend's columns are in twos: columns is even where C's rows are multiples of 16 bytes.
    __device__ void add_panel(const product_place &at, int column, float (&part)[32]) const {
#pragma unroll
        for (int i = 0; i < 32; i += 2) {
            int r = at.row + sum_row(at, i), c = column + sum_column(at, i);
            if (r >= rows || c >= columns)
                continue;
            int64_t from = (int64_t)r * columns + c;
            part[i] += addend_at<E>(add, from), part[i + 1] += addend_at<E>(add, from + 1);
        }
    }

    template <int SUMS> __device__ void operator()(const product_place &at, float (&sums)[SUMS], char *staging) const {
#pragma unroll
        for (int first = 0; first < SUMS; first += 64) {
            int column = at.column + first * 2;
            float parts[2][32];
#pragma unroll
            for (int i = 0; i < 64; i++)
                parts[i / 32][i % 32] = sums[first + i];
            if (add.values) {
                add_panel(at, column, parts[0]);
                add_panel(at, column + 64, parts[1]);
            }
            store_panels(at, &to, column, parts, (E *)staging);
        }
    }
};

// The sums as they are, to [splits, rows, columns]; add_parts makes one matrix of them.
struct store_sums {
    static constexpr int STAGING = 1024;
    float *to;
    int rows, columns;

    template <int SUMS> __device__ void operator()(const product_place &at, float (&sums)[SUMS], char *) const {
#pragma unroll
        for (int i = 0; i < SUMS; i += 2) {
            int r = at.row + sum_row(at, i), c = at.column + sum_column(at, i);
            if (r >= rows || c >= columns)
                continue;
            float *place = to + ((int64_t)at.split * rows + r) * columns + c;
            if (columns % 2 == 0) {
                *(float2 *)place = make_float2(sums[i], sums[i + 1]);
            } else {
                place[0] = sums[i];
                if (c + 1 < columns)
                    place[1] = sums[i + 1];
            }
        }
    }
};

template <typename E> struct alignas(4 * sizeof(E)) four { E at[4]; };

template <typename E>
__device__ inline void add_parts_at(const float *parts, int splits, int64_t count, int64_t at,
                                    const product_addend &add, E *to) {
    float sum = 0;
    for (int split = 0; split < splits; split++)
        sum += parts[split * count + at];
    to[at] = from_f32<E>(add.values ? sum + addend_at<E>(add, at) : sum);
}

// Launch: blocks of 256 threads, a thread four elements of the [count] matrix. Traffic: 4 bytes a part read.
template <typename E>
__global__ void add_parts_kernel(const float *parts, int splits, int64_t count, product_addend add, E *to) {
    int64_t at = (blockIdx.x * (int64_t)blockDim.x + threadIdx.x) * 4;
    start_next_kernel();
    wait_for_kernel_before();
    if (count % 4 != 0) {
        for (int i = 0; i < 4 && at + i < count; i++)
            add_parts_at(parts, splits, count, at + i, add, to);
        return;
    }
    if (at >= count)
        return;
    float4 sum = {};
#pragma unroll 4
    for (int split = 0; split < splits; split++) {
        float4 part = *(const float4 *)(parts + split * count + at);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    float sums[4] = {sum.x, sum.y, sum.z, sum.w};
    four<E> result;
#pragma unroll
    for (int i = 0; i < 4; i++)
        result.at[i] = from_f32<E>(add.values ? sums[i] + addend_at<E>(add, at + i) : sums[i]);
    *(four<E> *)(to + at) = result;
}

template <typename E>
static inline fmoe_status add_parts(const float *parts, int splits, int64_t count, product_addend add, E *to,
                                    bool overlap, cudaStream_t stream) {
    return launch_overlapping("add_parts_kernel", overlap, add_parts_kernel<E>, (unsigned)ceil_div(count, 1024), 256, 0,
                              stream, parts, splits, count, add, to);
}

#endif
