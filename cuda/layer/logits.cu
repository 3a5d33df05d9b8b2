// The router for some tens of tokens in evaluation. Chapter 2's last rung has two blocks for 64 tokens, and most of the
// GPU looks on; here a block has 8 tokens and 16 rows of the gate.
#include "few.cuh"

#define TOKENS 8 // a block
#define ROWS   2 // of the gate a warp
static_assert(TOKENS * ROWS <= WARP, "a lane a logit");

// Launch: a block of 8 warps for 8 tokens and 16 rows of the gate. Shared memory: x̂ of the tokens, 32 KB (16-bit) or 16
// KB. Traffic: x once for 16 rows, the gate once for 8 tokens, mostly from the L2; 4 bytes a logit out.
// [tile-logits]
template <typename E> __global__ void __launch_bounds__(THREADS) few_logits_kernel(const __grid_constant__ few_task a) {
    constexpr int EACH = pack16<E>::count;
    __shared__ __align__(16) float x_hat[TOKENS][few_columns<E>];
    __shared__ float logit[WARPS][TOKENS][ROWS];
    int across = (a.choice.T + TOKENS - 1) / TOKENS, t = blockIdx.x % across * TOKENS, n = a.choice.n;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, row = (blockIdx.x / across * WARPS + warp) * ROWS;
    for (int first = 0; first < a.d; first += few_columns<E>) {
        pack16<E> gate[ROWS][LOADS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int j = 0; j < LOADS; j++)
                gate[r][j] = as_pack<E>(
                    read_part<E>(a.gate, row + r, row + r < 2 * n ? a.d : 0, first + (j * WARP + lane) * EACH));
        __syncthreads();
        normalise<E, TOKENS>(a, t, first, x_hat);
        __syncthreads();
#pragma unroll 2 // unrolled whole it is as fast, and four times the code
        for (int i = 0; i < TOKENS; i++) {
            float z[ROWS] = {};
#pragma unroll
            for (int j = 0; j < LOADS; j++)
#pragma unroll
                for (int e = 0; e < EACH; e += 4) {
                    float4 four = *(const float4 *)&x_hat[i][(j * WARP + lane) * EACH + e];
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        z[r] = fmaf(four.x, to_f32(gate[r][j].at[e]), z[r]);
                        z[r] = fmaf(four.y, to_f32(gate[r][j].at[e + 1]), z[r]);
                        z[r] = fmaf(four.z, to_f32(gate[r][j].at[e + 2]), z[r]);
                        z[r] = fmaf(four.w, to_f32(gate[r][j].at[e + 3]), z[r]);
                    }
                }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                z[r] = warp_sum(z[r]);
                if (lane == 0)
                    logit[warp][i][r] = first > 0 ? logit[warp][i][r] + z[r] : z[r];
            }
        }
    }
    __syncwarp();
    int i = lane / ROWS, own = row + lane % ROWS, side = own >= n;
    if (i < TOKENS && own < 2 * n && t + i < a.choice.T)
        a.logits[((int64_t)side * a.choice.T + t + i) * n + own - side * n] = logit[warp][i][lane % ROWS];
}
// [/tile-logits]

bool few_logits_fit(const fmoe_layer_args *args) {
    return !args->training && args->T <= TILE_TOKENS && args->d <= INT32_MAX && args->n <= INT32_MAX / 2 &&
           args->d * (int64_t)fmoe_dtype_size(args->dtype) % 16 == 0;
}

fmoe_status few_logits(const fmoe_layer_args *args, const layer_scratch &s, cudaStream_t stream) {
    int64_t blocks = ceil_div(args->T, TOKENS) * ceil_div(2 * args->n, WARPS * ROWS);
    WITH_DTYPE(args->dtype, E,
               return launch_beside("few_logits_kernel", wants_room(args->T), false, few_logits_kernel<E>,
                                    (unsigned)blocks, THREADS, 0, stream, few_task_of(args, s)));
}
