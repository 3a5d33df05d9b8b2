// Rung `slices`, which fmoe_cuda_expert runs: the two phases in a shape that follows the table. One that is larger than
// the L2 keeps is walked slice by slice of its columns; few tokens are split over more warps each.
#include "expert.h"
#include "launch.cuh"

#define SLICE_IN_CACHE (12 << 20) // bytes of a slice of the table that the L2 keeps without losses, ...
#define CACHE          (40 << 20) // ... and with some
#define ENOUGH_REUSE   4          // pairs an expert, from which a slice in the cache pays
#define WARPS_AT_ONCE  2112       // 16 on each of 132 multiprocessors; twice as many that hold rows of 512 bytes

// The readings that were fastest, by the bytes of a slice. The first and the third take more warps where there are few
// tokens.
// [readings]
template <typename E, slice_form F> using slice_2048 = reading<E, F, 32, 4, 4, 8, 2, true>;
template <typename E, slice_form F> using slice_1024 = reading<E, F, 32, 2, 4, 2, 12, true>;
template <typename E, slice_form F> using slice_512 = reading<E, F, 32, 1, 4, 4, 8, true>;
template <typename E, slice_form F> using slice_256 = reading<E, F, 16, 1, 4, 4, 8, true>;
// [/readings]
template <typename E> using elements = reading<E, ELEMENTS, 32, 1, 2, 4, 5, false>;

typedef struct {
    int bytes; // of a row that a slice has; of a wider row, if it is not sliced, a turn has
    bool sliced;
} plan;

// [plan]
// The widest slices that fit, of 16 lanes' loads at least. No slices where most rows are read only once, where the
// whole table fits, or where not even the narrowest does.
static plan make_plan(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype) {
    int64_t row = d * (int64_t)fmoe_dtype_size(dtype);
    plan p = {2048, true};
    while (p.bytes > 256 && (p.bytes / 2 >= row || N * p.bytes > SLICE_IN_CACHE))
        p.bytes /= 2;
    if (row % 16 == 0 && row > p.bytes && T * K >= ENOUGH_REUSE * N && N * p.bytes <= CACHE &&
        T <= INT32_MAX / ceil_div(row, p.bytes)) // a block a token and slice
        return p;
    p = {2048, false};
    while (p.bytes > 256 && p.bytes / 2 >= row)
        p.bytes /= 2;
    return p;
}
// [/plan]

static int columns_of(plan p, int64_t d, fmoe_dtype dtype) {
    int64_t columns = p.bytes / (int64_t)fmoe_dtype_size(dtype);
    return (int)(p.sliced ? columns : ceil_div(d, columns) * columns);
}

int expert_slices_kept(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype) {
    plan p = make_plan(T, d, N, K, dtype);
    int64_t slices = ceil_div(d, columns_of(p, d, dtype));
    return slices == 1 ? 0 : (int)(slices < SLICES_KEPT ? slices : SLICES_KEPT);
}

// At least 4 pairs a warp, at most R::WARPS warps a token.
template <typename R>
static fmoe_status phases(const expert_task &a, int width, int64_t warps, bool overlap, cudaStream_t stream) {
    int64_t most = ceil_div(a.K, 4) < R::WARPS ? ceil_div(a.K, 4) : R::WARPS;
    return launch_phases<R>(a, (int)(warps < most ? warps : most), width, overlap, stream);
}

template <typename E, slice_form F>
static fmoe_status slices(const expert_task &a, int bytes, int width, bool overlap, cudaStream_t stream) {
    int64_t warps = WARPS_AT_ONCE / a.T > 2 ? WARPS_AT_ONCE / a.T : 2;
    int64_t narrow = 2 * WARPS_AT_ONCE / (a.T * ceil_div(a.d, width));
    switch (bytes) {
    case 256:
        return phases<slice_256<E, F>>(a, width, 4, overlap, stream);
    case 512:
        return phases<slice_512<E, F>>(a, width, narrow > 1 ? narrow : 1, overlap, stream);
    case 1024:
        return phases<slice_1024<E, F>>(a, width, 2, overlap, stream);
    default:
        return phases<slice_2048<E, F>>(a, width, warps, overlap, stream);
    }
}

template <typename E> static fmoe_status any_row(const expert_task &a, bool overlap, cudaStream_t stream) {
    plan p = make_plan(a.T, a.d, a.N, a.K, a.dtype);
    int width = columns_of(p, a.d, a.dtype), row = a.d * (int)sizeof(E);
    if (row % 16 != 0)
        return phases<elements<E>>(a, (int)ceil_div(a.d, elements<E>::WIDTH) * elements<E>::WIDTH, 4, overlap, stream);
    if (row % p.bytes == 0)
        return slices<E, WHOLE_SLICES>(a, p.bytes, width, overlap, stream);
    return slices<E, CUT_SLICES>(a, p.bytes, width, overlap, stream);
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
