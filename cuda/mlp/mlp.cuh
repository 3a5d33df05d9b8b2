// What the MLP's rungs share: checks, the activation, what the second product does with its sums.
#ifndef FMOE_MLP_CUH
#define FMOE_MLP_CUH

#include "../device.cuh"
#include "mlp.h"

#define MLP_FEW_ROWS        8  // tokens at most of the rows rung
#define MLP_FRAGMENT_TOKENS 8  // of fragments
#define MLP_FEW_TOKENS      64 // and of few-tokens

// Everything the host can see; every rung starts so. needed: bytes of workspace.
fmoe_status mlp_check(const fmoe_mlp_args *args, const void *workspace, size_t bytes, size_t needed);
// FMOE_UNSUPPORTED where a rung does not take the case; limits says which ones it takes.
fmoe_status mlp_check_rows(const fmoe_mlp_args *args, bool supported, const char *limits);
fmoe_status mlp_check_16_bit(const fmoe_mlp_args *args); // of the tensor-core rungs

// A rung with what the layer asks besides, or NULL. Pointers are the device's.
typedef fmoe_status mlp_into(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, size_t bytes,
                             cudaStream_t stream);
mlp_into mlp_naive_into, mlp_rows_into, mlp_tiles_into, mlp_mma_sync_into, mlp_fragments_into, mlp_few_tokens_into,
    mlp_wgmma_into;

bool mlp_by_rows(const fmoe_mlp_args *args); // whether cuda_mlp_into takes the rung rows. mlp.cu

static inline const float *mlp_add(const mlp_join *join) {
    return join ? join->add : NULL;
}

// Between the launches of the two products. overlap: whether the second may start while the first ends.
static inline fmoe_status mlp_wait(const mlp_join *join, cudaStream_t stream, bool *overlap) {
    *overlap = !join || !join->ready;
    return *overlap ? FMOE_OK
                    : cuda_call("cudaStreamWaitEvent", cudaStreamWaitEvent(stream, (cudaEvent_t)join->ready, 0));
}

// silu(p) · q. The fast exponential and division are off by some 1e-7 of the result.
__device__ inline float swiglu(float p, float q) {
    return __fdividef(p, 1 + __expf(-p)) * q;
}

// Where a product's results go: rounded to `to`, with `add` added before if there is one, or as they are to `sum`.
typedef struct {
    void *to;
    const float *add;
    float *sum;
} mlp_target;

static inline mlp_target mlp_target_of(const fmoe_mlp_args *args, const mlp_join *join) {
    mlp_target target = {args->y, mlp_add(join), join ? join->sum : NULL};
    return target;
}

// COUNT results in a row, whose place is a multiple of COUNT.
template <typename E, int COUNT>
__device__ inline void store_results(const mlp_target &target, int64_t place, const float (&results)[COUNT]) {
    struct alignas(COUNT * sizeof(E)) {
        E at[COUNT];
    } rounded;
    struct alignas(COUNT * sizeof(float)) {
        float at[COUNT];
    } whole;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        whole.at[i] = target.add ? results[i] + target.add[place + i] : results[i];
        rounded.at[i] = from_f32<E>(whole.at[i]);
    }
    if (target.sum)
        *(decltype(whole) *)(target.sum + place) = whole;
    else
        *(decltype(rounded) *)((E *)target.to + place) = rounded;
}

template <typename E> __device__ inline void store_result(const mlp_target &target, int64_t place, float result) {
    float one[1] = {result};
    store_results<E>(target, place, one);
}

// 16 bytes as float32. A bfloat16 is the upper half of a float32: a shift or a mask.
template <typename E> __device__ inline void unpack_f32(uint4 raw, float (&values)[pack16<E>::count]) {
    pack16<E> pack = *(pack16<E> *)&raw;
#pragma unroll
    for (int i = 0; i < pack.count; i++)
        values[i] = to_f32(pack.at[i]);
}
template <> __device__ inline void unpack_f32<__nv_bfloat16>(uint4 raw, float (&values)[8]) {
    const unsigned twos[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[2 * i] = __uint_as_float(twos[i] << 16);
        values[2 * i + 1] = __uint_as_float(twos[i] & 0xffff0000u);
    }
}

#endif
