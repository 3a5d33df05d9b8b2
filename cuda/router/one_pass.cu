// Rung: everything about the norm along the rows, by all multiprocessors. The product is still a thread a logit.
#include "router.cuh"

#define NORMALISE_THREADS 256

// [normalise]
// Launch: a thread for 16 bytes of x, 256 a block. Shared memory: none. Traffic: x once, x̂ once, neighbours side by
// side.
template <typename E, bool WIDE>
__global__ void normalise_kernel(int64_t T, int64_t d, const E *x, router_norm norm, float *x_hat) {
    constexpr int wide = pack16<E>::count;
    int64_t packs = (d + wide - 1) / wide, index = (int64_t)blockIdx.x * NORMALISE_THREADS + threadIdx.x;
    int64_t t = index / packs, column = index % packs * wide;
    if (t >= T)
        return;
    pack16<E> in = unpack<E>(load_pack<E, WIDE>(x + t * d, column, d));
    for (int i = 0; i < wide; i++)
        if (column + i < d)
            x_hat[t * d + column + i] =
                normalised(to_f32(in.at[i]), norm.center[column + i], norm.scale[column + i], norm.offset[column + i]);
}
// [/normalise]

template <typename E, bool WIDE>
static fmoe_status normalise(const fmoe_router_args *args, router_scratch s, cudaStream_t stream) {
    int64_t packs = ceil_div(args->d, (int64_t)pack16<E>::count);
    unsigned blocks = (unsigned)ceil_div(args->T * packs, NORMALISE_THREADS);
    normalise_kernel<E, WIDE>
        <<<blocks, NORMALISE_THREADS, 0, stream>>>(args->T, args->d, (const E *)args->x, s.norm, s.x_hat);
    return launched("normalise_kernel");
}

fmoe_status router_normalise(const fmoe_router_args *args, router_scratch s, cudaStream_t stream) {
    WITH_DTYPE(args->dtype, E,
               return (rows_are_wide<E>(args->d) ? normalise<E, true> : normalise<E, false>)(args, s, stream));
}

extern "C" fmoe_status cuda_router_one_pass(const void *arguments, void *workspace, size_t bytes, void *stream) {
    const fmoe_router_args *args = (const fmoe_router_args *)arguments;
    size_t used = 0;
    router_scratch s = router_carve(args, true, workspace, &used);
    TRY(router_check(args, workspace, bytes, used));
    if (args->T == 0)
        return FMOE_OK;
    TRY(router_set_norm(args, s, false, (cudaStream_t)stream));
    TRY(router_normalise(args, s, (cudaStream_t)stream));
    TRY(router_project(args, s.x_hat, (cudaStream_t)stream));
    return router_log_softmax(args, (cudaStream_t)stream);
}
