// The two phases as kernels: a block a token and slice of the columns, all tokens of a slice before the next slice.
#ifndef FMOE_EXPERT_LAUNCH_CUH
#define FMOE_EXPERT_LAUNCH_CUH

#include "phases.cuh"

#define SLICES_KEPT 8 // sums a pair that the workspace has room for

// Launch: `threads` threads a block, a warp for each part of the token's pairs; T blocks a slice. Shared memory: none.
// Traffic: the slice of a row a pair through the L2; x, indices and weights once a slice; 4 bytes a pair and slice out.
// [first-kernel]
template <typename R>
__global__ void __launch_bounds__(R::WARPS *WARP, R::BLOCKS)
    pre_activations_kernel(expert_task a, int width, int first_slice, bool whole) {
    int slice = blockIdx.x / a.T, t = blockIdx.x % a.T, first = (first_slice + slice) * width;
    start_next_kernel();
    pre_activations<R>(a, t, first, min(a.d, first + width), whole ? NULL : a.partials + (int64_t)slice * a.T * a.K);
}
// [/first-kernel]

// Launch: a thread a pair, 256 a block. Shared memory: none. Traffic: 4 bytes a pair and slice in, and as many as 16
// for a pair's index, weight, activation and pre-activation. The sum so far waits among the activations while there are
// slices to come.
// [join-slices]
static __global__ void __launch_bounds__(256) activations_kernel(expert_task a, int slices, bool first, bool last) {
    int64_t pairs = (int64_t)a.T * a.K, pair = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    start_next_kernel();
    if (pair >= pairs)
        return;
    int32_t expert = expert_of_pair(a, pair);
    float weight = last ? a.weights[pair] : 0;
    wait_for_kernel_before();
    float s = first ? 0 : a.activations[pair];
    for (int i = 0; i < slices; i++)
        s += __ldcs(a.partials + i * pairs + pair);
    if (last)
        store_pair(a, pair, expert, s, weight);
    else
        a.activations[pair] = s;
}
// [/join-slices]

// Launch: as pre_activations_kernel. Shared memory: a float32 sum of the slice a warp. Traffic: the slice of a row a
// pair through the L2, 8 bytes a pair and slice in, y out once.
template <typename R>
__global__ void __launch_bounds__(R::WARPS *WARP, R::BLOCKS) output_kernel(expert_task a, int width, bool overlapped) {
    extern __shared__ float shared[];
    int slice = blockIdx.x / a.T, t = blockIdx.x % a.T, first = slice * width;
    output<R>(a, t, first, min(a.d, first + width), overlapped, shared);
}

// y, after the activations, for slices of `width` columns, a multiple of the reading's.
template <typename R>
static fmoe_status launch_output(const expert_task &a, int warps, int width, bool overlap, cudaStream_t stream) {
    int slices = (int)ceil_div(a.d, width);
    return launch_overlapping("output_kernel", overlap, output_kernel<R>, (unsigned)a.T * slices, warps * WARP,
                              warps * R::WIDTH * sizeof(float), stream, a, width, overlap);
}

// The activations. With one slice the first kernel finishes them itself.
template <typename R>
static fmoe_status launch_activations(const expert_task &a, int warps, int width, bool overlap, cudaStream_t stream) {
    int slices = (int)ceil_div(a.d, width);
    bool whole = slices == 1;
    for (int first = 0; first < slices; first += SLICES_KEPT) {
        int now = min(SLICES_KEPT, slices - first);
        pre_activations_kernel<R><<<(unsigned)a.T * now, warps * WARP, 0, stream>>>(a, width, first, whole);
        TRY(launched("pre_activations_kernel"));
        if (!whole)
            TRY(launch_overlapping("activations_kernel", overlap, activations_kernel,
                                   (unsigned)ceil_div((int64_t)a.T * a.K, 256), 256, 0, stream, a, now, first == 0,
                                   first + now == slices));
    }
    return FMOE_OK;
}

// [launch-phases]
template <typename R>
static fmoe_status launch_phases(const expert_task &a, int warps, int width, bool overlap, cudaStream_t stream) {
    TRY(launch_activations<R>(a, warps, width, overlap, stream));
    return launch_output<R>(a, warps, width, overlap, stream);
}
// [/launch-phases]

#endif
