// The first rungs of the expert step, token by token: a thread a token, a warp a token, 16 bytes a lane.
#include "expert.h"
#include "expert.cuh"

#define TOKENS_A_BLOCK 4 // of the rungs with a warp a token

// ---- Rung `thread-a-token`

// Launch: a thread a token, 32 a block. Shared memory: none. Traffic: two rows a pair, an element a time, of which a
// sector of 32 bytes is fetched; x and the activations again for every row and every column.
// [thread-a-token]
template <typename E> __global__ void __launch_bounds__(WARP) thread_a_token(expert_task a) {
    int t = blockIdx.x * blockDim.x + threadIdx.x, first_bad = a.K;
    if (t >= a.T)
        return;
    const E *x = (const E *)a.x + (int64_t)t * a.d;
    for (int k = 0; k < a.K; k++) {
        int64_t pair = (int64_t)t * a.K + k;
        int32_t e = expert_of_pair(a, pair);
        float s = 0;
        for (int i = 0; i < a.d && e != NO_EXPERT; i++)
            s = fmaf(to_f32(x[i]), to_f32(((const E *)a.down)[(int64_t)e * a.d + i]), s);
        store_pair(a, pair, e, s, a.weights[pair]);
        first_bad = e == NO_EXPERT ? min(first_bad, k) : first_bad;
    }
    for (int i = 0; i < a.d; i++) {
        float sum = 0;
        for (int k = 0; k < a.K; k++) {
            int64_t pair = (int64_t)t * a.K + k;
            int32_t e = expert_of_pair(a, pair);
            if (e != NO_EXPERT)
                sum = fmaf(a.activations[pair], to_f32(((const E *)a.up)[(int64_t)e * a.d + i]), sum);
        }
        ((E *)a.y)[(int64_t)t * a.d + i] = from_f32<E>(sum);
    }
    write_note(a, t, first_bad);
}
// [/thread-a-token]

// ---- Rungs `warp-a-token` and `vectors`

// Neighbouring elements of type E that a lane moves at once.
// [vectors]
template <typename E, int COUNT> struct alignas(COUNT * sizeof(E)) elements { E at[COUNT]; };
// [/vectors]

// Launch: a warp a token, 4 a block. Shared memory: none. Traffic: two rows a pair, neighbouring lanes reading
// neighbouring elements; x again for every row, from the first-level cache; the activations again for every column.
// [warp-a-token]
template <typename E, int COUNT> __global__ void __launch_bounds__(TOKENS_A_BLOCK *WARP) warp_a_token(expert_task a) {
    typedef elements<E, COUNT> load;
    int t = blockIdx.x * TOKENS_A_BLOCK + threadIdx.x / WARP, lane = threadIdx.x % WARP, loads = a.d / COUNT;
    int first_bad = a.K;
    if (t >= a.T)
        return;
    int64_t pairs = (int64_t)t * a.K;
    const load *x = (const load *)a.x + (int64_t)t * loads, *down = (const load *)a.down, *up = (const load *)a.up;
    // [warp-loops]
    for (int k = 0; k < a.K; k++) {
        int32_t e = expert_of_pair(a, pairs + k);
        float s = 0;
        for (int i = lane; i < loads && e != NO_EXPERT; i += WARP) {
            load in = x[i], row = down[(int64_t)e * loads + i];
            for (int j = 0; j < COUNT; j++)
                s = fmaf(to_f32(in.at[j]), to_f32(row.at[j]), s);
        }
        s = warp_sum(s);
        if (lane == 0)
            store_pair(a, pairs + k, e, s, a.weights[pairs + k]);
        first_bad = e == NO_EXPERT ? min(first_bad, k) : first_bad;
    }
    __syncwarp();
    for (int i = lane; i < loads; i += WARP) {
        float sum[COUNT] = {};
#pragma unroll 1
        for (int k = 0; k < a.K; k++) {
            int32_t e = expert_of_pair(a, pairs + k);
            if (e == NO_EXPERT)
                continue;
            load row = up[(int64_t)e * loads + i];
            for (int j = 0; j < COUNT; j++)
                sum[j] = fmaf(a.activations[pairs + k], to_f32(row.at[j]), sum[j]);
        }
        load out;
        for (int j = 0; j < COUNT; j++)
            out.at[j] = from_f32<E>(sum[j]);
        ((load *)a.y)[(int64_t)t * loads + i] = out;
    }
    // [/warp-loops]
    if (lane == 0)
        write_note(a, t, first_bad);
}
// [/warp-a-token]

// ---- Host

extern "C" fmoe_status cuda_expert_thread_a_token(const void *args, void *workspace, size_t workspace_bytes,
                                                  void *stream) {
    expert_task a;
    TRY(expert_from_args(args, workspace, workspace_bytes, cuda_expert_bytes(args), &a));
    if (a.T == 0)
        return FMOE_OK;
    unsigned blocks = (unsigned)ceil_div(a.T, WARP);
    WITH_DTYPE(a.dtype, E, thread_a_token<E><<<blocks, WARP, 0, (cudaStream_t)stream>>>(a));
    return launched("thread_a_token");
}

extern "C" fmoe_status cuda_expert_warp_a_token(const void *args, void *workspace, size_t workspace_bytes,
                                                void *stream) {
    expert_task a;
    TRY(expert_from_args(args, workspace, workspace_bytes, cuda_expert_bytes(args), &a));
    if (a.T == 0)
        return FMOE_OK;
    unsigned blocks = (unsigned)ceil_div(a.T, TOKENS_A_BLOCK), threads = TOKENS_A_BLOCK * WARP;
    WITH_DTYPE(a.dtype, E, warp_a_token<E, 1><<<blocks, threads, 0, (cudaStream_t)stream>>>(a));
    return launched("warp_a_token");
}

extern "C" fmoe_status cuda_expert_vectors(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    expert_task a;
    TRY(expert_from_args(args, workspace, workspace_bytes, cuda_expert_bytes(args), &a));
    if (!cuda_expert_16_byte_rows(args))
        return fmoe_fail(FMOE_UNSUPPORTED, "hidden_size = %d: a row is not a multiple of 16 bytes", a.d);
    if (a.T == 0)
        return FMOE_OK;
    unsigned blocks = (unsigned)ceil_div(a.T, TOKENS_A_BLOCK), threads = TOKENS_A_BLOCK * WARP;
    WITH_DTYPE(a.dtype, E, warp_a_token<E, pack16<E>::count><<<blocks, threads, 0, (cudaStream_t)stream>>>(a));
    return launched("warp_a_token");
}
