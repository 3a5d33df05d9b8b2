// Rungs `in-flight`, `two-kernels` and `evict-last`: several rows on their way before the first is used, in one kernel;
// then phase by phase, so that one table at a time is gathered from; then with a word to the L2 about what to keep.
#include "expert.h"
#include "launch.cuh"

// Rows of 2 KB at once, two in flight a warp; wider ones in turns.
template <typename E, bool KEPT> using whole = reading<E, WHOLE_SLICES, 32, 4, 2, 4, 5, KEPT>;
template <typename E, bool KEPT> using cut = reading<E, CUT_SLICES, 32, 4, 2, 4, 5, KEPT>;
template <typename E, bool KEPT> using narrow = reading<E, CUT_SLICES, 32, 1, 8, 4, 5, KEPT>; // up to 512 bytes
template <typename E> using elements = reading<E, ELEMENTS, 32, 1, 2, 4, 5, false>;

// Launch: a block of 4 warps a token, each with a quarter of its pairs. Shared memory: 4 sums of 2 KB of columns (16 KB
// of 16-bit ones). Traffic: 2 rows a pair through the L2; x, indices, weights and y once.
// [in-flight]
template <typename R> __global__ void __launch_bounds__(R::WARPS *WARP, R::BLOCKS) in_flight_kernel(expert_task a) {
    extern __shared__ float shared[];
    pre_activations<R>(a, blockIdx.x, 0, a.d, NULL);
    __syncthreads();
    output<R>(a, blockIdx.x, 0, a.d, false, shared);
}
// [/in-flight]

template <typename R> static fmoe_status in_flight(const expert_task &a, cudaStream_t stream) {
    size_t shared = R::WARPS * R::WIDTH * sizeof(float);
    in_flight_kernel<R><<<(unsigned)a.T, R::WARPS * WARP, shared, stream>>>(a);
    return launched("in_flight_kernel");
}

template <typename R> static fmoe_status two_kernels(const expert_task &a, cudaStream_t stream) {
    return launch_phases<R>(a, R::WARPS, (int)ceil_div(a.d, R::WIDTH) * R::WIDTH, false, stream);
}

// in_flight or two_kernels, in the form for a row of d elements.
#define RUN_FORM(function, KEPT, a, stream)                                                                            \
    WITH_DTYPE((a).dtype, E, {                                                                                         \
        if ((a).d % whole<E, KEPT>::WIDTH == 0)                                                                        \
            return function<whole<E, KEPT>>(a, (cudaStream_t)(stream));                                                \
        if ((a).d % pack16<E>::count == 0 && (a).d <= narrow<E, KEPT>::WIDTH)                                          \
            return function<narrow<E, KEPT>>(a, (cudaStream_t)(stream));                                               \
        if ((a).d % pack16<E>::count == 0)                                                                             \
            return function<cut<E, KEPT>>(a, (cudaStream_t)(stream));                                                  \
        return function<elements<E>>(a, (cudaStream_t)(stream));                                                       \
    })

extern "C" fmoe_status cuda_expert_in_flight(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    expert_task a;
    TRY(expert_from_args(args, workspace, workspace_bytes, cuda_expert_bytes(args), &a));
    if (a.T == 0)
        return FMOE_OK;
    RUN_FORM(in_flight, false, a, stream);
}

extern "C" fmoe_status cuda_expert_two_kernels(const void *args, void *workspace, size_t workspace_bytes,
                                               void *stream) {
    expert_task a;
    TRY(expert_from_args(args, workspace, workspace_bytes, cuda_expert_bytes(args), &a));
    if (a.T == 0)
        return FMOE_OK;
    RUN_FORM(two_kernels, false, a, stream);
}

extern "C" fmoe_status cuda_expert_evict_last(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    expert_task a;
    TRY(expert_from_args(args, workspace, workspace_bytes, cuda_expert_bytes(args), &a));
    if (a.T == 0)
        return FMOE_OK;
    RUN_FORM(two_kernels, true, a, stream);
}
