// topk_backward, the rung that fmoe_cuda_topk_backward runs. A warp a token, as before; what changes is the waiting.
// All of a token's loads are on their way before the first is used; a routing weight is the product of two of the 2n
// exponentials that the softmax needs anyway; and two rounds of shuffles give every sum the token needs:
//
//   round 1   the largest logit of each side
//   round 2   Σ p_x, Σ p_y, Σ r, Σ r · dg, Σ r · |dg| over keys and pairs, with p = exp(z − largest), r = p_x · p_y
//
// What a pair passes on is r · (dg − mean) / Σ, so the last sum bounds the integers of rung `fixed-point`; and both
// sides of log-softmax lose the same total, the sum over the pairs, which is known before any key has collected.
#include "backward_token.cuh"

#define WARPS     4     // a block
#define TOO_SMALL 1e-4f // Σ r below which products of exponentials have lost too much: only for indices no top-k chose

// ---- The kernel

// The token's line of the note, and with the first token its head. first_bad is K where a lane found nothing.
__device__ inline void write_note(const backward_task &a, uint32_t t, int lane, int first_bad) {
    bool bad = __any_sync(ALL_LANES, first_bad < a.K);
    if (bad)
        first_bad = -(int)warp_max((float)-first_bad);
    if (lane == 0)
        cuda_note_lines(a.workspace)[t] = {bad ? first_bad : -1, bad ? a.indices[row_at(t, a.K) + first_bad] : 0};
    if (t == 0 && lane == 0)
        *(cuda_note *)a.workspace = {CUDA_NOTE_MARK, a.T, (long long)a.n * a.n, LIMIT_PAIRS};
}

// Round 1: the largest logit of each side.
template <int ROUNDS> __device__ void largest_of_sides(const float z[2][ROUNDS][PACK], float max[2]) {
#pragma unroll
    for (int side = 0; side < 2; side++) {
        max[side] = -INFINITY;
#pragma unroll
        for (int r = 0; r < ROUNDS; r++)
#pragma unroll
            for (int i = 0; i < PACK; i++)
                max[side] = fmaxf(max[side], z[side][r][i]);
    }
#pragma unroll
    for (int step = WARP / 2; step; step /= 2)
#pragma unroll
        for (int side = 0; side < 2; side++)
            max[side] = fmaxf(max[side], __shfl_xor_sync(ALL_LANES, max[side], step));
}

// z becomes p, here and in shared memory, where the sums of the keys begin at zero; a lane's part of Σ p.
template <int ROUNDS>
__device__ void exponentials(int lane, const float max[2], float z[2][ROUNDS][PACK], float *p, int *sums,
                             float *sum_p) {
#pragma unroll
    for (int side = 0; side < 2; side++) {
        sum_p[side] = 0;
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            float *e = z[side][r];
#pragma unroll
            for (int i = 0; i < PACK; i++) {
                e[i] = expf(e[i] - max[side]);
                sum_p[side] += e[i];
            }
            int at = (side * ROUNDS + r) * WARP + lane;
            ((float4 *)p)[at] = {e[0], e[1], e[2], e[3]};
            ((int4 *)sums)[at] = {0, 0, 0, 0};
        }
    }
}

// From the sums of round 2 to what a pair passes on, and the bound of its absolute values' sum.
// [registers-settle]
__device__ inline token_sums settle(const backward_task &a, const float max[2], const float *sum_p, const pair_sums &r,
                                    float *size) {
    token_sums s = {max[0], max[1], sum_p[0], sum_p[1], 0, 0, r.scores};
    *size = r.scores_size;
    if (a.dweights && a.norm_topk_prob) {
        s.scale = __fdividef(1, r.weights);
        s.mean = r.with_dweights * s.scale;
        s.total += (r.with_dweights - s.mean * r.weights) * s.scale;
        *size += 2 * r.with_size * s.scale; // |dg − mean| is |dg| + |mean| at most
    } else if (a.dweights) {
        s.scale = __fdividef(1, s.sum_x * s.sum_y);
        s.total += r.with_dweights * s.scale;
        *size += r.with_size * s.scale;
    }
    return s;
}
// [/registers-settle]

// A warp a token, WARPS a block; KEYS = 128 · ROUNDS keys a side at most. Shared memory a warp: p and the integer sums
// of both sides, 16 bytes a key of KEYS. Reads logits, indices and dweights once (pairs beyond the 64th once more, from
// a cache); writes dlogits once, and 8 bytes of notes a token.
template <typename E, int ROUNDS>
__global__ void __launch_bounds__(WARPS *WARP) registers(const __grid_constant__ backward_task a) {
    constexpr int KEYS = ROUNDS * WARP * PACK;
    extern __shared__ float4 shared[];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    uint32_t t = blockIdx.x * WARPS + warp;
    if (t >= (uint32_t)a.T)
        return;
    float *p = (float *)shared + warp * 4 * KEYS;
    int *sums = (int *)p + 2 * KEYS;

    // [registers-loads]
    chosen held[HELD], tail[TAIL];
    float z[2][ROUNDS][PACK], max[2];
    load_pairs<HELD>(a, t, lane, held);
    load_token<E, ROUNDS>(a, t, lane, z);
    // [/registers-loads]
    largest_of_sides<ROUNDS>(z, max);

    struct {
        float p[2];
        pair_sums r;
    } over = {};
    int first_bad = a.K;
    exponentials<ROUNDS>(lane, max, z, p, sums, over.p);
    __syncwarp();
    add_pairs<HELD>(a, p, KEYS, lane, held, &over.r, &first_bad);
    for (int k = lane + HELD * WARP; k < a.K; k += TAIL * WARP) {
        load_pairs<TAIL>(a, t, k, tail);
        add_pairs<TAIL>(a, p, KEYS, k, tail, &over.r, &first_bad);
    }
    if (a.dscores)
        warp_sums<7>((float *)&over);
    else
        warp_sums<5>((float *)&over);
    write_note(a, t, lane, first_bad);

    float size, scale, unscale;
    token_sums s = settle(a, max, over.p, over.r, &size);
    bool usual = fixed_point(size, &scale, &unscale) &&
                 (!a.dweights || s.sum_x * s.sum_y > 0) && // not with NaN in a logit
                 (!a.dweights || !a.norm_topk_prob || over.r.weights > TOO_SMALL);
    if (usual) {
        scatter_pairs<HELD>(a, p, KEYS, held, s, scale, sums);
        for (int k = lane + HELD * WARP; k < a.K; k += TAIL * WARP) {
            load_pairs<TAIL>(a, t, k, tail);
            scatter_pairs<TAIL>(a, p, KEYS, tail, s, scale, sums);
        }
    } else {
        s.total = walk_in_order<E>(a, t, lane, s, KEYS, (float *)sums);
    }
    __syncwarp();

#pragma unroll
    for (int side = 0; side < 2; side++) {
        float share = __fdividef(s.total, side ? s.sum_y : s.sum_x);
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            int4 at = ((const int4 *)sums)[(side * ROUNDS + r) * WARP + lane];
            int sum[PACK] = {at.x, at.y, at.z, at.w};
            float *dz = z[side][r];
#pragma unroll
            for (int i = 0; i < PACK; i++)
                dz[i] = (usual ? (float)sum[i] * unscale : __int_as_float(sum[i])) - dz[i] * share;
            store_keys(a.dlogits + side * a.side_count + row_at(t, a.n), a.n, (r * WARP + lane) * PACK, dz);
        }
    }
}

template <typename E, int ROUNDS> static fmoe_status launch(const backward_task &a, cudaStream_t stream) {
    size_t bytes = WARPS * ROUNDS * WARP * PACK * 4 * sizeof(float);
    if (bytes > 48 * 1024)
        TRY(cuda_call("registers", cudaFuncSetAttribute(registers<E, ROUNDS>,
                                                        cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes)));
    registers<E, ROUNDS><<<(unsigned)ceil_div(a.T, WARPS), WARPS * WARP, bytes, stream>>>(a);
    return launched("registers");
}

template <typename E> static fmoe_status launch_for_keys(const backward_task &a, cudaStream_t stream) {
    if (a.n <= 128)
        return launch<E, 1>(a, stream);
    if (a.n <= 256)
        return launch<E, 2>(a, stream);
    if (a.n <= 384)
        return launch<E, 3>(a, stream);
    if (a.n <= 512)
        return launch<E, 4>(a, stream);
    return launch<E, 8>(a, stream);
}

static fmoe_status run(const backward_task &a, cudaStream_t stream) {
    if (a.T == 0 && !a.workspace)
        return FMOE_OK;
    if (a.T == 0) // no token's warp writes the note
        return cuda_call("cudaMemsetAsync", cudaMemsetAsync(a.workspace, 0, CUDA_NOTE_BYTES, stream));
    WITH_DTYPE(a.dtype, E, return launch_for_keys<E>(a, stream));
}

extern "C" size_t cuda_topk_backward_registers_workspace(const void *args) {
    return cuda_note_workspace(((const fmoe_topk_backward_args *)args)->T);
}

extern "C" fmoe_status cuda_topk_backward_registers(const void *args, void *workspace, size_t workspace_bytes,
                                                    void *stream) {
    backward_task a;
    TRY(backward_from_args(args, workspace, workspace_bytes, cuda_topk_backward_registers_workspace(args), &a));
    return run(a, (cudaStream_t)stream);
}

extern "C" size_t fmoe_cuda_topk_backward_workspace(int64_t T, int64_t n, int64_t K, fmoe_dtype dtype) {
    (void)n, (void)K, (void)dtype;
    return cuda_note_workspace(T);
}

extern "C" fmoe_status fmoe_cuda_topk_backward(int64_t T, int64_t n, int64_t K, bool norm_topk_prob, fmoe_dtype dtype,
                                               const void *logits, const int32_t *indices, const float *dweights,
                                               const float *dscores, float *dlogits, void *workspace,
                                               size_t workspace_bytes, void *stream) {
    TRY(backward_check(T, n, K, dtype, logits, indices, dlogits));
    if (T > 0 || workspace)
        TRY(check_workspace(workspace, workspace_bytes, cuda_note_workspace(T)));
    backward_task a = {(int)T,  (int)n,  (int)K,    norm_topk_prob,   dtype, logits, indices, dweights,
                       dscores, dlogits, workspace, reciprocal_of(n), T * n};
    return run(a, (cudaStream_t)stream);
}
