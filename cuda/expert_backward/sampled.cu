// A dot product a pair, token by token, with the forward step's first phase: s = ⟨x, down[e]⟩ where the forward pass
// did not keep it, and dA = ⟨dy, up[e]⟩ for the rungs that do not find it on the way.
#include "expert_backward.cuh"
#include "../expert/launch.cuh"

template <typename E> using cut = reading<E, CUT_SLICES, 32, 4, 4, 4, 4, true>;
template <typename E> using cut_512 = reading<E, CUT_SLICES, 32, 1, 4, 2, 16, true>;
template <typename E> using cut_256 = reading<E, CUT_SLICES, 16, 1, 4, 4, 8, true>;
template <typename E> using elements = reading<E, ELEMENTS, 32, 1, 2, 4, 5, false>;

template <typename R> static int whole_row(int d) {
    return (int)ceil_div(d, R::WIDTH) * R::WIDTH;
}

// ---- s

// The activations go where ds will be: the layer wants them, fmoe_cuda_expert_backward does not.
fmoe_status backward_pre_activations(const backward_task &b, float *pre_activations, cudaStream_t stream) {
    expert_task a = {b.T,    b.d,  b.N,       b.K,       b.dtype, b.x,
                     b.down, NULL, b.indices, b.weights, NULL,    pre_activations,
                     NULL,   b.ds, b.partials};
    int bytes = backward_slice_bytes(b);
    bool overlap = fmoe_cuda_level() >= 2;
    WITH_DTYPE(b.dtype, E, {
        if (b.d % pack16<E>::count != 0)
            return launch_activations<elements<E>>(a, elements<E>::WARPS, whole_row<elements<E>>(b.d), false, stream);
        if (bytes == 512)
            return launch_activations<cut_512<E>>(a, 1, cut_512<E>::WIDTH, overlap, stream);
        if (bytes == 256)
            return launch_activations<cut_256<E>>(a, cut_256<E>::WARPS, cut_256<E>::WIDTH, overlap, stream);
        return launch_activations<cut<E>>(a, cut<E>::WARPS, whole_row<cut<E>>(b.d), false, stream);
    });
}

// ---- dA

// Launch: a thread a pair, 256 a block. Shared memory: none. Traffic: 16 bytes a pair in, 12 out. dA comes where the
// activation goes.
// [numbers]
static __global__ void __launch_bounds__(256) numbers_kernel(backward_task a) {
    int64_t pair = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (pair >= (int64_t)a.T * a.K)
        return;
    bool good = expert_of_pair(a, pair) != NO_EXPERT;
    pair_scales scales = scales_of(a.pre_activations[pair], a.weights[pair]);
    float da = a.activations[pair];
    a.activations[pair] = scales.to_up;
    a.ds[pair] = da * scales.to_down;
    if (a.dweights)
        a.dweights[pair] = good ? da * scales.silu : 0;
}
// [/numbers]

template <typename R> static fmoe_status pair_numbers(const backward_task &b, cudaStream_t stream) {
    expert_task a = {b.T,       b.d,       b.N,  b.K,  b.dtype, b.dy, b.up,         NULL,
                     b.indices, b.weights, NULL, NULL, NULL,    NULL, b.activations};
    pre_activations_kernel<R><<<(unsigned)a.T, R::WARPS * WARP, 0, stream>>>(a, whole_row<R>(a.d), 0, false);
    TRY(launched("pre_activations_kernel"));
    numbers_kernel<<<(unsigned)ceil_div((int64_t)b.T * b.K, 256), 256, 0, stream>>>(b);
    return launched("numbers_kernel");
}

fmoe_status backward_pair_numbers(const backward_task &a, cudaStream_t stream) {
    WITH_DTYPE(a.dtype, E, {
        if (a.d % pack16<E>::count == 0)
            return pair_numbers<cut<E>>(a, stream);
        return pair_numbers<elements<E>>(a, stream);
    });
}
