// The expert step of chapter 5 as the layer needs it: the sum over a token's experts stays in float32, so that y is
// rounded once, after the MLP's part was added. The first phase is chapter 5's; of the second only the store differs.
#include "../../chapters/workspace.h"
#include "../expert/launch.cuh"
#include "layer.cuh"

#define SLICE_IN_CACHE (12 << 20) // as in cuda/expert/slices.cu,
#define WIDE_SLICE     (24 << 20) // and where only a part of the multiprocessors gathers
#define CACHE          (40 << 20)
#define ENOUGH_REUSE   4
#define WARPS_AT_ONCE  2112

// Launch, shared memory and traffic: as output_kernel's (cuda/expert/launch.cuh), and 4 bytes an element out.
// [routed]
template <typename R>
__global__ void __launch_bounds__(R::WARPS *WARP, R::BLOCKS)
    routed_kernel(expert_task a, float *routed, int width, bool overlapped) {
    extern __shared__ float shared[];
    int slice = blockIdx.x / a.T, t = blockIdx.x % a.T, first_column = slice * width, warps = blockDim.x / WARP;
    int last_column = min(a.d, first_column + width), lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, begin, end;
    share_of_warp<R>(a.K, &begin, &end);
    for (int column = first_column; column < last_column; column += R::WIDTH) {
        float sum[R::PARTS] = {};
        for (int first = begin; first < end; first += WARP) {
            int64_t pair = (int64_t)t * a.K + first + lane;
            int32_t expert = first + lane < end ? expert_of_pair(a, pair) : NO_EXPERT;
            add_rows<R>(a, column, expert, pair, min(WARP, end - first), overlapped, lane, sum);
        }
#pragma unroll
        for (int i = 0; i < R::PARTS; i++) {
#pragma unroll
            for (int step = R::LANES; step < WARP; step *= 2)
                sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], step);
            if (lane < R::LANES)
                shared[warp * R::WIDTH + column_of<R>(i, lane)] = sum[i];
        }
        __syncthreads();
        for (int c = threadIdx.x; c < min(R::WIDTH, a.d - column); c += blockDim.x) {
            float all = 0;
            for (int w = 0; w < warps; w++)
                all += shared[w * R::WIDTH + c];
            routed[(int64_t)t * a.d + column + c] = all;
        }
        __syncthreads();
    }
}
// [/routed]

// Chapter 5's first phase by so many blocks as some of the multiprocessors have room for, each with several tokens and
// slices: what the MLP's first product leaves is then free for its second one.
// Launch: persistent; threads and traffic as pre_activations_kernel's. Shared memory: none.
// [kept-back]
template <typename R>
__global__ void __launch_bounds__(R::WARPS *WARP, R::BLOCKS)
    kept_back_kernel(expert_task a, int width, int items, bool whole) {
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        int slice = item / a.T, t = item % a.T, first = slice * width;
        float *partials = whole ? NULL : a.partials + (int64_t)slice * a.T * a.K;
        pre_activations<R>(a, t, first, min(a.d, first + width), partials);
    }
}
// [/kept-back]

template <typename R>
static fmoe_status keep_back(const expert_task &a, int warps, int width, int multiprocessors, bool overlap,
                             cudaStream_t stream) {
    int slices = (int)ceil_div(a.d, width), items = a.T * slices, fit = 1;
    bool whole = slices == 1;
    TRY(cuda_call("kept_back_kernel",
                  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kept_back_kernel<R>, warps * WARP, 0)));
    unsigned blocks = (unsigned)min(items, max(1, fit * multiprocessors));
    kept_back_kernel<R><<<blocks, warps * WARP, 0, stream>>>(a, width, items, whole);
    TRY(launched("kept_back_kernel"));
    return whole
               ? FMOE_OK
               : launch_overlapping("activations_kernel", overlap, activations_kernel,
                                    (unsigned)ceil_div((int64_t)a.T * a.K, 256), 256, 0, stream, a, slices, true, true);
}

// Where the sum goes, and how many multiprocessors the first phase keeps to; 0: all.
typedef struct {
    float *to;
    int multiprocessors;
} routed_way;

typedef struct {
    int bytes; // of a row that a slice has, or that a turn has where the row is not sliced
    bool sliced;
} plan;

static plan make_plan(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype, int64_t in_cache) {
    int64_t row = d * (int64_t)fmoe_dtype_size(dtype);
    plan p = {2048, true};
    while (p.bytes > 256 && (p.bytes / 2 >= row || N * p.bytes > in_cache))
        p.bytes /= 2;
    if (row % 16 == 0 && row > p.bytes && T * K >= ENOUGH_REUSE * N && N * p.bytes <= CACHE &&
        T <= INT32_MAX / ceil_div(row, p.bytes))
        return p;
    p = {2048, false};
    while (p.bytes > 256 && p.bytes / 2 >= row)
        p.bytes /= 2;
    return p;
}

static int columns_of(plan p, const fmoe_layer_args *args) {
    int64_t columns = p.bytes / (int64_t)fmoe_dtype_size(args->dtype);
    return (int)(p.sliced ? columns : ceil_div(args->d, columns) * columns);
}

static plan plan_of(const fmoe_layer_args *args, bool wide) {
    return make_plan(args->T, args->d, args->N, args->K, args->dtype, wide ? WIDE_SLICE : SLICE_IN_CACHE);
}

template <typename R>
static fmoe_status phases(const expert_task &a, const routed_way &way, int width, int64_t warps, cudaStream_t stream) {
    bool overlap = fmoe_cuda_level() >= LEVEL_HOPPER;
    int64_t most = ceil_div(a.K, 4) < R::WARPS ? ceil_div(a.K, 4) : R::WARPS;
    int now = (int)(warps < most ? warps : most), slices = (int)ceil_div(a.d, width);
    bool beside = wants_room(a.T);
    if (beside && slices == 1)
        TRY(launch_beside("pre_activations_kernel", true, false, pre_activations_kernel<R>, (unsigned)a.T, now * WARP,
                          0, stream, a, width, 0, true));
    else if (way.multiprocessors > 0 && slices <= SLICES_KEPT)
        TRY(keep_back<R>(a, now, width, way.multiprocessors, overlap, stream));
    else
        TRY(launch_activations<R>(a, now, width, overlap, stream));
    return launch_beside("routed_kernel", beside, overlap, routed_kernel<R>, (unsigned)a.T * slices, now * WARP,
                         now * R::WIDTH * sizeof(float), stream, a, way.to, width, overlap);
}

template <typename E, slice_form F>
static fmoe_status slices(const expert_task &a, const routed_way &way, int bytes, int width, cudaStream_t stream) {
    switch (bytes) {
    case 256:
        return phases<reading<E, F, 16, 1, 4, 4, 8, true>>(a, way, width, 4, stream);
    case 512:
        return phases<reading<E, F, 32, 1, 4, 2, 16, true>>(a, way, width, 1, stream);
    case 1024:
        return phases<reading<E, F, 32, 2, 4, 2, 12, true>>(a, way, width, 2, stream);
    default:
        return phases<reading<E, F, 32, 4, 4, 8, 2, true>>(a, way, width,
                                                           WARPS_AT_ONCE / a.T > 2 ? WARPS_AT_ONCE / a.T : 2, stream);
    }
}

template <typename E>
static fmoe_status any_row(const expert_task &a, const routed_way &way, plan p, int width, cudaStream_t stream) {
    typedef reading<E, ELEMENTS, 32, 1, 2, 4, 5, false> elements;
    int row = a.d * (int)sizeof(E);
    if (row % 16 != 0)
        return phases<elements>(a, way, (int)ceil_div(a.d, elements::WIDTH) * elements::WIDTH, 4, stream);
    if (row % p.bytes == 0)
        return slices<E, WHOLE_SLICES>(a, way, p.bytes, width, stream);
    return slices<E, CUT_SLICES>(a, way, p.bytes, width, stream);
}

size_t routed_experts_bytes(const fmoe_layer_args *args) {
    int64_t slices = ceil_div(args->d, columns_of(plan_of(args, false), args)); // wide ones are fewer
    return expert_bytes(args->T, args->K, slices == 1 ? 0 : slices < SLICES_KEPT ? slices : SLICES_KEPT);
}

fmoe_status routed_experts(const fmoe_layer_args *args, const layer_scratch &s, bool wide, int multiprocessors,
                           cudaStream_t stream) {
    plan p = plan_of(args, wide);
    expert_task a = {(int)args->T,
                     (int)args->d,
                     (int)args->N,
                     (int)args->K,
                     args->dtype,
                     args->x,
                     args->down_embed,
                     args->up_embed,
                     s.indices,
                     s.weights,
                     NULL,
                     NULL,
                     NULL,
                     NULL,
                     NULL};
    expert_lay_out(&a, s.experts);
    WITH_DTYPE(args->dtype, E, return any_row<E>(a, {s.routed, multiprocessors}, p, columns_of(p, args), stream));
}
