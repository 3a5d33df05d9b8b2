// Dot products of rows of weights with a token, a warp a row or some: for the rung rows, and for the layer's kernel for
// few tokens.
#ifndef FMOE_MLP_ROWS_CUH
#define FMOE_MLP_ROWS_CUH

#include "../ptx.cuh"
#include "mlp.cuh"

#define ROWS_WARPS   8
#define ROWS_THREADS (ROWS_WARPS * WARP)

// 16 bytes of a row, zeros beyond its end; what is read ONCE goes past the first-level cache. The compiler,
// which would rather save registers, leaves such loads above a __syncwarp().
template <bool ONCE, typename E> __device__ inline uint4 load_pack(const E *row, int pack, int packs) {
    uint4 v = make_uint4(0, 0, 0, 0);
    const E *from = row + pack * pack16<E>::count;
    if (pack < packs && ONCE)
        asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(from)
                     : "memory");
    else if (pack < packs)
        asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(from)
                     : "memory");
    return v;
}

// [warp-dots]
// The dot products of ROWS rows of weights with one of x. BATCH loads of 16 bytes a row and lane are on their way
// before the first is used; with `wait` x is another kernel's, which may still run, and the weights do not wait for it.
template <typename E, int ROWS, int BATCH>
__device__ inline void warp_dots(const E *const (&rows)[ROWS], const E *x, int columns, bool wait,
                                 float (&sums)[ROWS]) {
    constexpr int each = pack16<E>::count;
    int lane = threadIdx.x % WARP, packs = columns / each;
    for (int first = lane; first < packs + lane; first += BATCH * WARP) {
        uint4 weights[ROWS][BATCH], token[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++)
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                weights[r][b] = load_pack<true>(rows[r], first + b * WARP, packs);
        if (wait && first == lane)
            wait_for_kernel_before();
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            token[b] = load_pack<false>(x, first + b * WARP, packs);
        __syncwarp();
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            float values[each], weight[each];
            unpack_f32<E>(token[b], values);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                unpack_f32<E>(weights[r][b], weight);
#pragma unroll
                for (int i = 0; i < each; i++)
                    sums[r] = fmaf(values[i], weight[i], sums[r]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        sums[r] = warp_sum(sums[r]);
}
// [/warp-dots]

// A warp's hidden unit of token t.
template <typename E> __device__ inline void hidden_unit(const fmoe_mlp_args &a, E *hidden, int64_t unit, int64_t t) {
    const E *const rows[2] = {(const E *)a.gate + unit * a.d, (const E *)a.up + unit * a.d};
    float sums[2] = {};
    warp_dots<E, 2, 4>(rows, (const E *)a.x + t * a.d, (int)a.d, false, sums);
    if (threadIdx.x % WARP == 0)
        hidden[t * a.I + unit] = from_f32<E>(swiglu(sums[0], sums[1]));
}

// The second product of the rung rows, while the kernel before, which makes the hidden units, still runs. rows.cu
fmoe_status mlp_rows_output(const fmoe_mlp_args *args, const mlp_join *join, bool overlap, const void *hidden,
                            cudaStream_t stream);

#endif
