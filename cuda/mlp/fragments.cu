// Rung: up to 8 tokens on tensor cores. Weights go from memory straight into the registers that a product takes its
// operand from, a warp's whole share at once.
#include "../ptx.cuh"
#include "mlp.cuh"

#define HIDDEN_WARPS 8 // that share a row's k
#define HIDDEN_STEPS 4 // products of 32 k that a warp has in flight
#define OUTPUT_WARPS 8
#define OUTPUT_STEPS 16
#define UNITS        8 // hidden units, or outputs, a block
#define TOKENS       8

typedef struct {
    int T, rows, columns;  // tokens; outputs; k
    const void *x, *a, *b; // [T, columns]; weights [rows, columns]: gate and up, or down
    mlp_target out;        // [T, rows]
} fragment_job;

// 16 bytes that are read once: past the first-level cache.
__device__ inline uint4 load_weights(const void *from, bool inside) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (inside)
        asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(from)
                     : "memory");
    return v;
}

// [permuted-k]
// A sum may take its k in any order if both operands take the same. Of 32 k, lane q of four has elements 8q to 8q + 7
// of its row, 16 bytes, where the instruction's own order would be four times four bytes: two products take them half
// each. Rows 0 to 7 of the left operand are gate's and 8 to 15 up's of the same hidden units, so that a thread ends
// with both; down has rows 0 to 7 only, and half of the product is nothing.
template <typename E>
__device__ inline void multiply(float (&sums)[4], const uint4 &a, const uint4 &b, const uint4 &x) {
    unsigned first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
    mma_16x8x16<E>(sums, first, x.x, x.y);
    mma_16x8x16<E>(sums, second, x.z, x.w);
}

template <typename E, bool PAIR, int STEPS>
__device__ inline void multiply_share(const fragment_job &job, int first_row, int first_k, bool wait,
                                      float (&sums)[4]) {
    int lane = threadIdx.x % WARP, row = min(first_row + lane / 4, job.rows - 1), k = first_k + lane % 4 * 8;
    const E *a_row = (const E *)job.a + (int64_t)row * job.columns,
            *b_row = (const E *)job.b + (int64_t)row * job.columns;
    const E *x_row = (const E *)job.x + (int64_t)min(lane / 4, job.T - 1) * job.columns;
    uint4 a[STEPS], b[STEPS], x[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        bool inside = k + 32 * s < job.columns;
        a[s] = load_weights(a_row + k + 32 * s, inside);
        b[s] = load_weights(b_row + k + 32 * s, PAIR && inside);
    }
    if (wait)
        wait_for_kernel_before();
#pragma unroll
    for (int s = 0; s < STEPS; s++)
        x[s] = k + 32 * s < job.columns ? *(const uint4 *)(x_row + k + 32 * s) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int s = 0; s < STEPS; s++)
        multiply<E>(sums, a[s], b[s], x[s]);
}
// [/permuted-k]

// Launch: a block of WARPS warps for 8 hidden units or outputs; the warps share k. Shared memory: 512 bytes a warp.
// Traffic: each weight once; the tokens once a block, from the L2.
template <typename E, bool PAIR, int WARPS, int STEPS>
__global__ void __launch_bounds__(WARPS *WARP, PAIR ? 4 : 1) fragment_kernel(fragment_job job) {
#if HAS_MMA_SYNC
    __shared__ float parts[WARPS][2][TOKENS][UNITS]; // of gate and up, or only the first
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, first_row = blockIdx.x * UNITS;
    float sums[4] = {};
    if (PAIR)
        start_next_kernel();
    for (int k = warp * STEPS * 32; k < job.columns; k += WARPS * STEPS * 32)
        multiply_share<E, PAIR, STEPS>(job, first_row, k, !PAIR && k < WARPS * STEPS * 32, sums);
    for (int i = 0; i < 4; i++)
        parts[warp][i / 2][lane % 4 * 2 + i % 2][lane / 4] = sums[i];
    __syncthreads();
    int t = threadIdx.x / UNITS, unit = threadIdx.x % UNITS;
    if (t >= job.T || first_row + unit >= job.rows)
        return;
    float p = 0, q = 0;
    for (int w = 0; w < WARPS; w++) {
        p += parts[w][0][t][unit];
        q += parts[w][1][t][unit];
    }
    store_result<E>(job.out, (int64_t)t * job.rows + first_row + unit, PAIR ? swiglu(p, q) : p);
#endif
}

template <typename E>
static fmoe_status run(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, cudaStream_t stream) {
    int T = (int)args->T, d = (int)args->d, I = (int)args->I;
    fragment_job hidden = {T, I, d, args->x, args->gate, args->up, {workspace, NULL, NULL}};
    fragment_job output = {T, d, I, workspace, args->down, args->down, mlp_target_of(args, join)};
    bool overlap;
    fragment_kernel<E, true, HIDDEN_WARPS, HIDDEN_STEPS>
        <<<(unsigned)ceil_div(I, UNITS), HIDDEN_WARPS * WARP, 0, stream>>>(hidden);
    TRY(launched("fragment_kernel"));
    TRY(mlp_wait(join, stream, &overlap));
    return launch_overlapping("fragment_kernel", overlap && fmoe_cuda_level() >= LEVEL_HOPPER,
                              fragment_kernel<E, false, OUTPUT_WARPS, OUTPUT_STEPS>, (unsigned)ceil_div(d, UNITS),
                              OUTPUT_WARPS * WARP, 0, stream, output);
}

fmoe_status mlp_fragments_into(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, size_t bytes,
                               cudaStream_t stream) {
    TRY(mlp_check(args, workspace, bytes, cuda_mlp_hidden_bytes(args)));
    TRY(mlp_check_rows(args, cuda_mlp_fragments_take(args), "at most 8 tokens, 16-bit types, multiples of 32"));
    if (args->T == 0)
        return FMOE_OK;
    return (args->dtype == FMOE_F16 ? run<__half> : run<__nv_bfloat16>)(args, join, workspace, stream);
}

extern "C" fmoe_status cuda_mlp_fragments(const void *args, void *workspace, size_t bytes, void *stream) {
    return mlp_fragments_into((const fmoe_mlp_args *)args, NULL, workspace, bytes, (cudaStream_t)stream);
}
