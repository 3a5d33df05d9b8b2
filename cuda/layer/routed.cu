// The expert step of chapter 5 as the layer needs it: the sum over a token's experts stays in float32, so that y is
// rounded once, with the MLP's part. The first phase is chapter 5's; the second makes the activations on the way, may
// come in two kernels, and stores as it is asked to.
#include "../../chapters/workspace.h"
#include "../expert/launch.cuh"
#include "layer.cuh"

#define SLICE_IN_CACHE (12 << 20) // as in cuda/expert/slices.cu,
#define WIDE_SLICE     (24 << 20) // and where only a part of the multiprocessors gathers
#define CACHE          (40 << 20)
#define ENOUGH_REUSE   4
#define WARPS_AT_ONCE  2112

// Where the columns are sliced, a pair's activation is made of the slices' sums here, again for every slice of the up
// table: a few loads, and no kernel between the phases.
typedef struct {
    int slices;          // whose sums make an activation; 0: activations are there
    int first;           // item
    bool overlapped;     // the kernel before may still run
    const float *shared; // the MLP's sum, to which the last part adds its own for y; or NULL
} routed_part;

__device__ inline float activation_of(const expert_task &a, int slices, int32_t expert, int64_t pair, float weight) {
    if (expert == NO_EXPERT)
        return 0;
    if (slices == 0)
        return a.activations[pair];
    float s = 0;
    for (int i = 0; i < slices; i++)
        s += __ldcg(a.partials + (int64_t)i * a.T * a.K + pair);
    return silu(s) * weight;
}

// Launch, shared memory and traffic: as output_kernel's (cuda/expert/launch.cuh), and 4 bytes an element out, or 4 in
// and y out. The phase may be two kernels. The first waits for the first phase and then lets the second start, which so
// need not wait before it gathers (nor read a first-level cache); it does before it stores, so that both have ended
// with it, and the MLP too.

// [routed]
template <typename R>
__global__ void __launch_bounds__(R::WARPS *WARP, R::BLOCKS)
    routed_kernel(expert_task a, float *routed, int width, routed_part part) {
    typedef typename R::element E;
    extern __shared__ float shared[];
    bool second = part.first > 0;
    int item = part.first + blockIdx.x, slice = item / a.T, t = item % a.T, first_column = slice * width;
    int last_column = min(a.d, first_column + width), lane = threadIdx.x % WARP, begin, end;
    share_of_warp<R>(a.K, &begin, &end);
    for (int column = first_column; column < last_column; column += R::WIDTH) {
        float sum[R::PARTS] = {};
        for (int first = begin; first < end; first += WARP) {
            bool has = first + lane < end;
            int64_t pair = (int64_t)t * a.K + first + lane;
            int32_t expert = has ? expert_of_pair(a, pair) : NO_EXPERT;
            float weight = has && part.slices > 0 ? a.weights[pair] : 0;
            auto activation_of_pair = [&] {
                if (part.overlapped && !second) {
                    wait_for_kernel_before();
                    start_next_kernel();
                }
                return activation_of(a, part.slices, expert, pair, weight);
            };
            add_rows_times<R>(a, column, expert, min(WARP, end - first), lane, activation_of_pair, sum);
        }
        if (part.overlapped && second)
            wait_for_kernel_before();
        int64_t at = (int64_t)t * a.d + column;
        join_warps<R>(a.d - column, sum, shared, [&](int c, float all) {
            if (part.shared)
                ((E *)a.y)[at + c] = from_f32<E>(part.shared[at + c] + all);
            else
                routed[at + c] = all;
        });
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
static fmoe_status keep_back(const expert_task &a, int warps, int width, int multiprocessors, cudaStream_t stream) {
    int slices = (int)ceil_div(a.d, width), items = a.T * slices, fit = 1;
    TRY(cuda_call("kept_back_kernel",
                  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kept_back_kernel<R>, warps * WARP, 0)));
    unsigned blocks = (unsigned)min(items, max(1, fit * multiprocessors));
    kept_back_kernel<R><<<blocks, warps * WARP, 0, stream>>>(a, width, items, slices == 1);
    return launched("kept_back_kernel");
}

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

// A slice's columns, a multiple of what is read at once: the last slice may have fewer, or the only one.
static int columns_of(plan p, const fmoe_layer_args *args) {
    int64_t columns = p.bytes / (int64_t)fmoe_dtype_size(args->dtype);
    return (int)(p.sliced ? columns : ceil_div(args->d, columns) * columns);
}

static plan plan_of(const fmoe_layer_args *args, bool wide) {
    return make_plan(args->T, args->d, args->N, args->K, args->dtype, wide ? WIDE_SLICE : SLICE_IN_CACHE);
}

template <typename R>
static fmoe_status first_phase(const expert_task &a, const routed_share &share, int warps, int width,
                               cudaStream_t stream) {
    int slices = (int)ceil_div(a.d, width);
    bool beside = wants_room(a.T);
    if (share.multiprocessors > 0 && !beside && slices <= SLICES_KEPT)
        return keep_back<R>(a, warps, width, share.multiprocessors, stream);
    if (slices <= SLICES_KEPT)
        return launch_beside("pre_activations_kernel", beside, false, pre_activations_kernel<R>, (unsigned)a.T * slices,
                             warps * WARP, 0, stream, a, width, 0, slices == 1);
    return launch_activations<R>(a, warps, width, fmoe_cuda_level() >= LEVEL_HOPPER, stream);
}

// At least 4 pairs a warp, at most R::WARPS warps a token.
template <typename R> static int warps_of(const expert_task &a, int64_t warps) {
    int64_t most = ceil_div(a.K, 4) < R::WARPS ? ceil_div(a.K, 4) : R::WARPS;
    return (int)(warps < most ? warps : most);
}

// DOWN: how the first phase reads its table, R: how the second does.
template <typename DOWN, typename R>
static fmoe_status phases(const expert_task &a, const routed_share &share, float *to, int width, int64_t warps,
                          cudaStream_t stream) {
    bool overlap = fmoe_cuda_level() >= LEVEL_HOPPER;
    int now = warps_of<R>(a, warps), slices = (int)ceil_div(a.d, width);
    routed_part part = {slices > 1 && slices <= SLICES_KEPT ? slices : 0, share.first, overlap, share.shared};
    if (share.first == 0)
        TRY(first_phase<DOWN>(a, share, warps_of<DOWN>(a, warps), width, stream));
    return launch_beside("routed_kernel", wants_room(a.T), overlap, routed_kernel<R>,
                         (unsigned)(share.end - share.first), now * WARP, now * R::WIDTH * sizeof(float), stream, a, to,
                         width, part);
}

// [readings]
// Tensor cores make the first phase's dot products: with fewer instructions, fewer multiprocessors are enough for it,
// and a warp a token. (All of them together wait for the L2 either way.)
template <typename E, slice_form F, bool TENSOR>
static fmoe_status slices(const expert_task &a, const routed_share &share, float *to, int bytes, int width,
                          cudaStream_t stream) {
    typedef reading<E, F, 16, 1, 4, 4, 8, true> of_256;
    typedef reading<E, F, 32, 1, 4, 2, 16, true> of_512;
    typedef reading<E, F, 32, 2, 4, 2, 12, true> of_1024;
    typedef reading<E, F, 32, 4, 4, 8, 2, true> of_2048;
    int64_t warps = WARPS_AT_ONCE / a.T > 2 ? WARPS_AT_ONCE / a.T : 2;
    if constexpr (TENSOR) {
        if (bytes == 512)
            return phases<reading<E, F, 32, 1, 4, 1, 28, true, true>, of_512>(a, share, to, width, 1, stream);
        if (bytes == 1024)
            return phases<reading<E, F, 32, 2, 4, 1, 28, true, true>, of_1024>(a, share, to, width, 2, stream);
        if (bytes == 2048)
            return phases<reading<E, F, 32, 4, 4, 8, 2, true, true>, of_2048>(a, share, to, width, warps, stream);
    }
    switch (bytes) {
    case 256:
        return phases<of_256, of_256>(a, share, to, width, 4, stream);
    case 512:
        return phases<of_512, of_512>(a, share, to, width, 1, stream);
    case 1024:
        return phases<of_1024, of_1024>(a, share, to, width, 2, stream);
    default:
        return phases<of_2048, of_2048>(a, share, to, width, warps, stream);
    }
}
// [/readings]

// 16-bit rows that are whole slices, of at least what a warp reads at once.
static bool on_tensor_cores(plan p, int64_t d, fmoe_dtype dtype) {
    return dtype != FMOE_F32 && fmoe_cuda_level() >= LEVEL_ADVANCED && p.bytes >= 512 && d * 2 % p.bytes == 0;
}

bool routed_on_tensor_cores(const fmoe_layer_args *args) {
    return on_tensor_cores(plan_of(args, true), args->d, args->dtype);
}

template <typename E>
static fmoe_status any_row(const expert_task &a, const routed_share &share, float *to, plan p, int width,
                           cudaStream_t stream) {
    typedef reading<E, ELEMENTS, 32, 1, 2, 4, 5, false> elements;
    int row = a.d * (int)sizeof(E);
    if (row % 16 != 0)
        return phases<elements, elements>(a, share, to, (int)ceil_div(a.d, elements::WIDTH) * elements::WIDTH, 4,
                                          stream);
    if (row % p.bytes != 0)
        return slices<E, CUT_SLICES, false>(a, share, to, p.bytes, width, stream);
    if constexpr (sizeof(E) == 2)
        if (on_tensor_cores(p, a.d, a.dtype))
            return slices<E, WHOLE_SLICES, true>(a, share, to, p.bytes, width, stream);
    return slices<E, WHOLE_SLICES, false>(a, share, to, p.bytes, width, stream);
}

size_t routed_experts_bytes(const fmoe_layer_args *args) {
    int64_t slices = ceil_div(args->d, columns_of(plan_of(args, false), args)); // wide ones are fewer
    return expert_bytes(args->T, args->K, slices == 1 ? 0 : slices < SLICES_KEPT ? slices : SLICES_KEPT);
}

int routed_items(const fmoe_layer_args *args, bool wide, int *columns) {
    int width = columns_of(plan_of(args, wide), args);
    *columns = width < args->d ? width : (int)args->d;
    return (int)(args->T * ceil_div(args->d, width));
}

fmoe_status routed_experts(const fmoe_layer_args *args, const layer_scratch &s, const routed_share &share,
                           cudaStream_t stream) {
    plan p = plan_of(args, share.wide);
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
                     args->y,
                     NULL,
                     NULL,
                     NULL,
                     NULL};
    expert_lay_out(&a, s.experts);
    WITH_DTYPE(args->dtype, E, return any_row<E>(a, share, s.routed, p, columns_of(p, args), stream));
}
