// Rung: a thread a hidden unit of a token, then a thread an output.
#include "mlp.cuh"

#define NAIVE_THREADS 256

template <typename E> __device__ inline float dot(const E *a, const E *b, int64_t count) {
    float sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum = fmaf(to_f32(a[i]), to_f32(b[i]), sum);
    return sum;
}

// Launch: 256 threads a block, a thread a hidden unit of a token. Shared memory: none. Traffic: two rows of weights and
// one of x a thread, element by element; neighbours read different rows of weights.
// [naive]
template <typename E> __global__ void hidden_kernel(fmoe_mlp_args a, E *hidden) {
    int64_t i = (int64_t)blockIdx.x * NAIVE_THREADS + threadIdx.x, t = i / a.I, unit = i % a.I;
    if (t >= a.T)
        return;
    const E *x = (const E *)a.x + t * a.d;
    float p = dot(x, (const E *)a.gate + unit * a.d, a.d), q = dot(x, (const E *)a.up + unit * a.d, a.d);
    hidden[i] = from_f32<E>(swiglu(p, q));
}

// Launch: 256 threads a block, a thread an output. Shared memory: none. Traffic: a row of down and one of the hidden
// units a thread.
template <typename E> __global__ void output_kernel(fmoe_mlp_args a, const E *hidden, mlp_target y) {
    int64_t i = (int64_t)blockIdx.x * NAIVE_THREADS + threadIdx.x, t = i / a.d, column = i % a.d;
    if (t >= a.T)
        return;
    store_result<E>(y, i, dot(hidden + t * a.I, (const E *)a.down + column * a.I, a.I));
}
// [/naive]

template <typename E>
static fmoe_status run(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, cudaStream_t stream) {
    unsigned hidden = (unsigned)ceil_div(args->T * args->I, NAIVE_THREADS);
    unsigned outputs = (unsigned)ceil_div(args->T * args->d, NAIVE_THREADS);
    hidden_kernel<E><<<hidden, NAIVE_THREADS, 0, stream>>>(*args, (E *)workspace);
    TRY(launched("hidden_kernel"));
    bool overlap;
    TRY(mlp_wait(join, stream, &overlap));
    output_kernel<E><<<outputs, NAIVE_THREADS, 0, stream>>>(*args, (const E *)workspace, mlp_target_of(args, join));
    return launched("output_kernel");
}

fmoe_status mlp_naive_into(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, size_t bytes,
                           cudaStream_t stream) {
    TRY(mlp_check(args, workspace, bytes, cuda_mlp_hidden_bytes(args)));
    TRY(mlp_check_rows(args, cuda_mlp_is_small(args), "more than a naive kernel is for"));
    if (args->T == 0)
        return FMOE_OK;
    WITH_DTYPE(args->dtype, E, TRY(run<E>(args, join, workspace, stream)));
    return FMOE_OK;
}

extern "C" fmoe_status cuda_mlp_naive(const void *args, void *workspace, size_t bytes, void *stream) {
    return mlp_naive_into((const fmoe_mlp_args *)args, NULL, workspace, bytes, (cudaStream_t)stream);
}
