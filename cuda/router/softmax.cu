// Log-softmax of rows: a warp a row.
#include "router.cuh"

#define ROWS_PER_BLOCK 8

// [log-softmax]
// Launch: a warp a row, 8 rows a block. Shared memory: none. Traffic: a row comes from memory once, again twice from a
// cache, and is written once. The largest logit is taken out before exp, so nothing overflows, and the logarithm of the
// sum is taken off after it, because a logit of 1e30 would swallow it.
__global__ void log_softmax_kernel(int64_t rows, int64_t n, const float *logits, float *log_probs) {
    int64_t row = (int64_t)blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= rows)
        return;
    const float *z = logits + row * n;
    float best = -INFINITY, sum = 0;
    for (int64_t i = lane; i < n; i += WARP)
        best = fmaxf(best, z[i]);
    best = warp_max(best);
    for (int64_t i = lane; i < n; i += WARP)
        sum += expf(z[i] - best);
    float log_sum = logf(warp_sum(sum));
    for (int64_t i = lane; i < n; i += WARP)
        log_probs[row * n + i] = z[i] - best - log_sum;
}
// [/log-softmax]

static fmoe_status log_softmax(int64_t rows, int64_t n, const float *logits, float *log_probs, cudaStream_t stream) {
    unsigned blocks = (unsigned)ceil_div(rows, ROWS_PER_BLOCK);
    log_softmax_kernel<<<blocks, ROWS_PER_BLOCK * WARP, 0, stream>>>(rows, n, logits, log_probs);
    return launched("log_softmax_kernel");
}

fmoe_status router_log_softmax(const fmoe_router_args *args, cudaStream_t stream) {
    return args->log_probs ? log_softmax(2 * args->T, args->n, args->logits, args->log_probs, stream) : FMOE_OK;
}

extern "C" fmoe_status fmoe_cuda_log_softmax(int64_t rows, int64_t n, const float *logits, float *log_probs,
                                             void *stream) {
    if (rows < 0)
        return fmoe_fail(FMOE_BAD_SIZE, "rows = %lld is below 0", (long long)rows);
    TRY(fmoe_check_size("num_keys", n));
    TRY(fmoe_check_shape("rows", rows, "num_keys", n));
    TRY(fmoe_check_pointer("logits", logits, rows * n));
    TRY(fmoe_check_pointer("log_probs", log_probs, rows * n));
    return rows == 0 ? FMOE_OK : log_softmax(rows, n, logits, log_probs, (cudaStream_t)stream);
}
