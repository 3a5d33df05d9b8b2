// Rungs `in-flight` and `two-kernels`: several rows on their way before the first is used, in one kernel and then phase
// by phase, so that one table at a time is gathered from.
#include "expert.h"
#include "launch.cuh"

// Rows of 2 KB at once, two in flight a warp; wider ones in turns.
template <typename E> using whole = reading<E, WHOLE_SLICES, 32, 4, 2, 4, 5>;
template <typename E> using cut = reading<E, CUT_SLICES, 32, 4, 2, 4, 5>;
template <typename E> using elements = reading<E, ELEMENTS, 32, 1, 2, 4, 5>;

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

// The form for a row of d elements: of in_flight or of two_kernels.
#define RUN_FORM(function, a, stream)                                                                                  \
    WITH_DTYPE((a).dtype, E, {                                                                                         \
        if ((a).d % whole<E>::WIDTH == 0)                                                                              \
            return function<whole<E>>(a, (cudaStream_t)(stream));                                                      \
        if ((a).d % pack16<E>::count == 0)                                                                             \
            return function<cut<E>>(a, (cudaStream_t)(stream));                                                        \
        return function<elements<E>>(a, (cudaStream_t)(stream));                                                       \
    })

extern "C" fmoe_status cuda_expert_in_flight(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    expert_task a;
    TRY(expert_from_args(args, workspace, workspace_bytes, cuda_expert_bytes(args), &a));
    if (a.T == 0)
        return FMOE_OK;
    RUN_FORM(in_flight, a, stream);
}

extern "C" fmoe_status cuda_expert_two_kernels(const void *args, void *workspace, size_t workspace_bytes,
                                               void *stream) {
    expert_task a;
    TRY(expert_from_args(args, workspace, workspace_bytes, cuda_expert_bytes(args), &a));
    if (a.T == 0)
        return FMOE_OK;
    RUN_FORM(two_kernels, a, stream);
}
