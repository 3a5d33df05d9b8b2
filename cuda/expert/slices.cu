// Rung `slices`, which fmoe_cuda_expert runs: two kernels whose shape follows the table. A table larger than the cache
// is walked slice by slice of its columns; a small case splits a token over more warps.
#include "expert.h"
#include "launch.cuh"

#define SLICE_IN_CACHE (36ll << 20) // bytes of a slice of the table that the L2 keeps
#define ENOUGH_REUSE   2            // pairs an expert, from which a slice in the cache pays

template <typename E, slice_form F> using slice_2048 = reading<E, F, 32, 4, 2, 4, 5>;
template <typename E, slice_form F> using slice_1024 = reading<E, F, 32, 2, 4, 4, 6>;
template <typename E, slice_form F> using slice_512 = reading<E, F, 32, 1, 8, 8, 4>;
template <typename E, slice_form F> using slice_256 = reading<E, F, 16, 1, 8, 8, 4>;
template <typename E> using elements = reading<E, ELEMENTS, 32, 1, 2, 4, 5>;

// The bytes of a row that a slice has: as many as keep the slice of the whole table in the cache.
// [slice-bytes]
static int slice_bytes(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype) {
    int64_t row = d * (int64_t)fmoe_dtype_size(dtype);
    int bytes = 2048;
    if (T * K < ENOUGH_REUSE * N)
        return bytes;
    while (bytes > 256 && N * (row < bytes ? row : bytes) > SLICE_IN_CACHE)
        bytes /= 2;
    return bytes;
}
// [/slice-bytes]

static bool in_vectors(int64_t d, fmoe_dtype dtype) {
    return d * fmoe_dtype_size(dtype) % 16 == 0;
}

// Columns a slice. Without reuse all columns are one.
static int64_t slice_columns(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype) {
    int64_t columns = slice_bytes(T, d, N, K, dtype) / (int64_t)fmoe_dtype_size(dtype);
    bool whole =
        !in_vectors(d, dtype) || T * K < ENOUGH_REUSE * N || N * d * (int64_t)fmoe_dtype_size(dtype) <= SLICE_IN_CACHE;
    return whole ? ceil_div(d, columns) * columns : columns;
}

int expert_slices_kept(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype) {
    int64_t slices = ceil_div(d, slice_columns(T, d, N, K, dtype));
    return slices == 1 ? 0 : (int)(slices < SLICES_KEPT ? slices : SLICES_KEPT);
}

// The more pairs a token has, the more warps share them; a warp has at least 8.
template <typename R> static fmoe_status phases(const expert_task &a, int width, bool overlap, cudaStream_t stream) {
    int warps = (int)ceil_div(a.K, 8);
    return launch_phases<R>(a, warps < R::WARPS ? warps : R::WARPS, width, overlap, stream);
}

template <typename E, slice_form F>
static fmoe_status slices(const expert_task &a, int bytes, int width, bool overlap, cudaStream_t stream) {
    switch (bytes) {
    case 256:
        return phases<slice_256<E, F>>(a, width, overlap, stream);
    case 512:
        return phases<slice_512<E, F>>(a, width, overlap, stream);
    case 1024:
        return phases<slice_1024<E, F>>(a, width, overlap, stream);
    default:
        return phases<slice_2048<E, F>>(a, width, overlap, stream);
    }
}

template <typename E> static fmoe_status any_row(const expert_task &a, bool overlap, cudaStream_t stream) {
    int width = (int)slice_columns(a.T, a.d, a.N, a.K, a.dtype), bytes = slice_bytes(a.T, a.d, a.N, a.K, a.dtype);
    if (!in_vectors(a.d, a.dtype))
        return phases<elements<E>>(a, width, overlap, stream);
    if (a.d * (int)sizeof(E) % bytes == 0)
        return slices<E, WHOLE_SLICES>(a, bytes, width, overlap, stream);
    return slices<E, CUT_SLICES>(a, bytes, width, overlap, stream);
}

fmoe_status expert_slices(const expert_task &a, cudaStream_t stream) {
    bool overlap = fmoe_cuda_level() >= 2;
    WITH_DTYPE(a.dtype, E, return any_row<E>(a, overlap, stream));
}

extern "C" size_t cuda_expert_slices_bytes(const void *args) {
    const fmoe_expert_args *a = (const fmoe_expert_args *)args;
    return expert_bytes(a->T, a->K, expert_slices_kept(a->T, a->d, a->N, a->K, a->dtype));
}

extern "C" fmoe_status cuda_expert_slices(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    expert_task a;
    TRY(expert_from_args(args, workspace, workspace_bytes, cuda_expert_slices_bytes(args), &a));
    return a.T == 0 ? FMOE_OK : expert_slices(a, (cudaStream_t)stream);
}
