// dx = Σ_k ds · down[e], token by token: the forward step's second phase with other numbers. With it go the notes.
#include "expert_backward.cuh"
#include "../expert/phases.cuh"

// As the forward step's readings of slices.cu, by the bytes of a slice.
template <typename E, slice_form F> using dx_2048 = reading<E, F, 32, 4, 4, 8, 2, true>;
template <typename E, slice_form F> using dx_512 = reading<E, F, 32, 1, 4, 2, 16, true>;
template <typename E, slice_form F> using dx_256 = reading<E, F, 16, 1, 4, 4, 8, true>;
template <typename E> using dx_elements = reading<E, ELEMENTS, 32, 1, 2, 4, 5, false>;

// An element of dx, rounded once, to float32 if `wide`.
template <typename E>
__device__ inline void store_dx(const expert_task &a, const dx_addends &add, bool wide, int64_t at, float sum) {
    sum += add.first ? add.first[at] : 0;
    sum += add.second ? add.second[at] : 0;
    if (wide)
        ((float *)a.y)[at] = sum;
    else
        ((E *)a.y)[at] = from_f32<E>(sum);
}

// The forward step's second phase gathers a.up with a.activations into a.y: here that is down with ds into dx, and
// a.pre_activations is dweights, of which only those of bad indices are written.
// Launch: a block a token and slice of `width` columns, a warp for each part of the token's pairs. Shared memory: a
// float32 sum of the slice a warp. Traffic: the slice of a row of `down` a pair through the L2, 8 bytes a pair and
// slice in, dx out once.
// [dx]
template <typename R>
static __global__ void __launch_bounds__(R::WARPS *WARP, R::BLOCKS)
    dx_kernel(expert_task a, dx_addends add, bool wide, int width, bool overlapped) {
    extern __shared__ float shared[];
    __shared__ int first_bad;
    int slice = blockIdx.x / a.T, t = blockIdx.x % a.T, lane = threadIdx.x % WARP, begin, end;
    share_of_warp<R>(a.K, &begin, &end);
    if (threadIdx.x == 0)
        first_bad = a.K;
    __syncthreads();
    for (int column = slice * width; column < min(a.d, (slice + 1) * width); column += R::WIDTH) {
        float sum[R::PARTS] = {};
        for (int first = begin; first < end; first += WARP) {
            bool has = first + lane < end;
            int64_t pair = (int64_t)t * a.K + first + lane;
            int32_t expert = has ? expert_of_pair(a, pair) : NO_EXPERT;
            if (has && expert == NO_EXPERT) {
                atomicMin(&first_bad, first + lane);
                if (a.pre_activations)
                    a.pre_activations[pair] = 0;
            }
            if (a.y)
                add_rows<R>(a, column, expert, pair, min(WARP, end - first), overlapped, lane, sum);
        }
        int64_t row = (int64_t)t * a.d + column;
        if (a.y)
            join_warps<R>(a.d - column, sum, shared,
                          [&](int c, float all) { store_dx<typename R::element>(a, add, wide, row + c, all); });
    }
    __syncthreads();
    if (slice == 0 && threadIdx.x == 0)
        write_note(a, t, first_bad);
}
// [/dx]

#define SLICE_IN_CACHE (12 << 20) // bytes of a slice of the table that the L2 keeps without losses, ...
#define CACHE          (40 << 20) // ... and with some
#define ENOUGH_REUSE   4          // pairs an expert, from which a slice in the cache pays

int backward_slice_bytes(const backward_task &a) {
    int64_t row = a.d * (int64_t)fmoe_dtype_size(a.dtype), N = a.N, pairs = (int64_t)a.T * a.K;
    int bytes = N * 512 > SLICE_IN_CACHE ? 256 : 512;
    if (N * 2048 <= SLICE_IN_CACHE || pairs < ENOUGH_REUSE * N || row % 16 != 0)
        return 2048;
    return row > bytes && N * bytes <= CACHE && a.T <= INT32_MAX / ceil_div(row, bytes) ? bytes : 2048;
}

int backward_slices(const backward_task &a) {
    int bytes = backward_slice_bytes(a);
    return bytes == 2048 ? 0 : (int)ceil_div(a.d * (int64_t)fmoe_dtype_size(a.dtype), bytes);
}

typedef struct {
    dx_addends add;
    bool wide, overlap;
    cudaStream_t stream;
} dx_how;

template <typename R> static fmoe_status launch(const expert_task &a, const dx_how &how, int warps, bool sliced) {
    int most = max(1, min(R::WARPS, (int)ceil_div(a.K, 4))), whole = (int)ceil_div(a.d, R::WIDTH) * R::WIDTH;
    int width = sliced ? R::WIDTH : whole, slices = (int)ceil_div(a.d, width);
    warps = min(warps, most);
    return launch_overlapping("dx_kernel", how.overlap, dx_kernel<R>, (unsigned)a.T * slices, warps * WARP,
                              warps * R::WIDTH * sizeof(float), how.stream, a, how.add, how.wide, width, how.overlap);
}

template <typename E, slice_form F> static fmoe_status dx_of(const expert_task &a, const dx_how &how, int bytes) {
    if (bytes == 512)
        return launch<dx_512<E, F>>(a, how, 1, true);
    if (bytes == 256)
        return launch<dx_256<E, F>>(a, how, 4, true);
    return launch<dx_2048<E, F>>(a, how, max(2, 2112 / a.T), false);
}

fmoe_status backward_dx(const backward_task &b, bool sliced, dx_addends add, bool overlap, cudaStream_t stream) {
    expert_task a = {b.T,       b.d,       b.N,  b.K,        b.dtype, NULL, NULL, b.down,
                     b.indices, b.weights, b.dx, b.dweights, b.note,  b.ds, NULL};
    dx_how how = {add, b.wide, overlap, stream};
    int bytes = sliced ? backward_slice_bytes(b) : 2048;
    WITH_DTYPE(b.dtype, E, {
        if (b.d % pack16<E>::count != 0)
            return launch<dx_elements<E>>(a, how, 4, false);
        if (b.d % dx_2048<E, WHOLE_SLICES>::WIDTH == 0)
            return dx_of<E, WHOLE_SLICES>(a, how, bytes);
        return dx_of<E, CUT_SLICES>(a, how, bytes);
    });
}
