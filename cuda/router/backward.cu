// The router's way back: from the gradients of the logits to those of the gate and of x (chapter 9).
//
//   dgate = dzᵀ · x̂        dx̂ = dz · gate        dx = (dx̂ − mean(dx̂) − x̂ · mean(dx̂ · x̂)) · scale
//
// In training both means run over all tokens, but nobody has to wait for dx̂ to take them: dx̂ is linear in the gate, so
//
//   Σ_t dx̂[t, h] = Σ_j gate[j, h] · Σ_t dz[t, j]        Σ_t dx̂[t, h] · x̂[t, h] = Σ_j gate[j, h] · dgate[j, h]
//
// and dgate comes first anyway. What remains of the norm is the last line of the second product; dx̂ is never stored.
// backward_products.cu has the two products.
#include "backward.cuh"

#include "../../chapters/workspace.h"

// ---- Log-softmax

#define ROWS_PER_BLOCK 8

// A warp a row, ROWS_PER_BLOCK a block; no shared memory. Reads both inputs once from memory (logits twice more from a
// cache), writes dlogits once.
// [log-softmax-backward]
static __global__ void log_softmax_backward_kernel(int64_t rows, int64_t n, const float *logits,
                                                   const float *dlog_probs, float *dlogits) {
    int64_t row = (int64_t)blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= rows)
        return;
    const float *z = logits + row * n, *dlog_p = dlog_probs + row * n;
    float best = -INFINITY, sum = 0, total = 0;
    for (int64_t i = lane; i < n; i += WARP)
        best = fmaxf(best, z[i]);
    best = warp_max(best);
    for (int64_t i = lane; i < n; i += WARP) {
        sum += expf(z[i] - best);
        total += dlog_p[i];
    }
    float share = warp_sum(total) / warp_sum(sum);
    for (int64_t i = lane; i < n; i += WARP)
        dlogits[row * n + i] = dlog_p[i] - expf(z[i] - best) * share;
}
// [/log-softmax-backward]

extern "C" fmoe_status fmoe_cuda_log_softmax_backward(int64_t rows, int64_t n, const float *logits,
                                                      const float *dlog_probs, float *dlogits, void *stream) {
    if (rows < 0)
        return fmoe_fail(FMOE_BAD_SIZE, "rows = %lld is below 0", (long long)rows);
    TRY(fmoe_check_size("num_keys", n));
    TRY(fmoe_check_shape("rows", rows, "num_keys", n));
    TRY(fmoe_check_pointer("logits", logits, rows * n));
    TRY(fmoe_check_pointer("dlog_probs", dlog_probs, rows * n));
    TRY(fmoe_check_pointer("dlogits", dlogits, rows * n));
    if (rows == 0)
        return FMOE_OK;
    log_softmax_backward_kernel<<<(unsigned)ceil_div(rows, ROWS_PER_BLOCK), ROWS_PER_BLOCK * WARP, 0,
                                  (cudaStream_t)stream>>>(rows, n, logits, dlog_probs, dlogits);
    return launched("log_softmax_backward_kernel");
}

// ---- The slices of dgate, put together

#define JOIN_UNITS 32 // hidden units a block
#define JOIN_ROWS  8  // threads that share a unit's keys
#define MAX_SLICES 16

// Σ over the slices, in their order, with all loads on their way at once.
__device__ inline float sum_slices(const float *slice, int64_t slices, int64_t stride) {
    float part[MAX_SLICES], sum = 0;
#pragma unroll
    for (int s = 0; s < MAX_SLICES; s++)
        part[s] = s < slices ? slice[s * stride] : 0;
#pragma unroll
    for (int s = 0; s < MAX_SLICES; s++)
        sum += part[s];
    return sum;
}

// JOIN_UNITS hidden units by JOIN_KEYS keys a block of 256 threads; 2 KB of shared memory. Reads the slices and the
// gate once, writes dgate once and, in training, 8 bytes a hidden unit: what the block's keys add to the two means.
// [join-gate]
template <typename E, typename G>
static __global__ void __launch_bounds__(JOIN_UNITS *JOIN_ROWS)
    join_gate_kernel(router_backward_job job, const E *gate, fmoe_write write, G *dgate) {
    __shared__ float of_one[JOIN_ROWS][JOIN_UNITS], of_x_hat[JOIN_ROWS][JOIN_UNITS], dz_sums[JOIN_KEYS];
    int64_t h = (int64_t)blockIdx.x * JOIN_UNITS + threadIdx.x, first = (int64_t)blockIdx.y * JOIN_KEYS;
    int64_t keys = 2 * job.n, last = first + JOIN_KEYS < keys ? first + JOIN_KEYS : keys;
    if (threadIdx.y == 0 && first + threadIdx.x < last)
        dz_sums[threadIdx.x] = sum_slices(job.dz_sums + first + threadIdx.x, job.slices, keys);
    __syncthreads();
    float sum_one = 0, sum_x_hat = 0;
    for (int64_t j = first + threadIdx.y; j < last && h < job.d; j += JOIN_ROWS) {
        float weight = to_f32(gate[j * job.d + h]);
        float sum = sum_slices(job.dgate_slices + j * job.d + h, job.slices, keys * job.d);
        sum_one += weight * dz_sums[j - first];
        sum_x_hat += weight * sum;
        if (dgate)
            dgate[j * job.d + h] = from_f32<G>(write == FMOE_ACCUMULATE ? to_f32(dgate[j * job.d + h]) + sum : sum);
    }
    of_one[threadIdx.y][threadIdx.x] = sum_one;
    of_x_hat[threadIdx.y][threadIdx.x] = sum_x_hat;
    __syncthreads();
    if (threadIdx.y > 0 || h >= job.d)
        return;
    for (int y = 1; y < JOIN_ROWS; y++) {
        sum_one += of_one[y][threadIdx.x];
        sum_x_hat += of_x_hat[y][threadIdx.x];
    }
    job.means[(2 * blockIdx.y + 0) * job.d + h] = sum_one;
    job.means[(2 * blockIdx.y + 1) * job.d + h] = sum_x_hat;
}
// [/join-gate]

template <typename E, typename G>
static fmoe_status join_gate(const router_backward_job &job, const void *gate, fmoe_write write, void *dgate,
                             cudaStream_t stream) {
    dim3 blocks((unsigned)ceil_div(job.d, JOIN_UNITS), (unsigned)job.key_groups), threads(JOIN_UNITS, JOIN_ROWS);
    join_gate_kernel<E, G><<<blocks, threads, 0, stream>>>(job, (const E *)gate, write, (G *)dgate);
    return launched("join_gate_kernel");
}

// ---- The entry point

typedef struct {
    fmoe_router_args forward; // what the norm is made from
    router_scratch norm;
    router_backward_job job;
} router_backward_plan;

// Slices of the tokens: by T alone, so that the same input gives the same bits on every GPU.
static int64_t slices_of(int64_t T) {
    int64_t slices = ceil_div(T, 256);
    return slices < 1 ? 1 : slices > MAX_SLICES ? MAX_SLICES : slices;
}

static router_backward_plan plan(bool training, int64_t T, int64_t d, int64_t n, fmoe_dtype dtype, void *workspace,
                                 size_t *used) {
    router_backward_plan p = {};
    p.forward.T = T, p.forward.d = d, p.forward.n = n;
    p.forward.training = training, p.forward.dtype = dtype;
    p.norm = router_carve(&p.forward, false, workspace, used);
    router_backward_job *job = &p.job;
    *job = {T, d, n, training, slices_of(T), ceil_div(2 * n, JOIN_KEYS), p.norm.norm, NULL, NULL, NULL, NULL};
    size_t row = (size_t)d * sizeof(float), keys = 2 * (size_t)n;
    job->dgate_slices = (float *)carve(workspace, used, (size_t)job->slices * keys * row);
    job->dz_sums = (float *)carve(workspace, used, (size_t)job->slices * keys * sizeof(float));
    job->means = (float *)carve(workspace, used, (size_t)job->key_groups * 2 * row);
    return p;
}

static fmoe_status check_sizes(bool training, int64_t T, int64_t d, int64_t n, fmoe_dtype dtype) {
    TRY(fmoe_check_tokens(T));
    TRY(fmoe_check_size("hidden_size", d));
    TRY(fmoe_check_size("num_keys", n));
    TRY(check_dtype(dtype));
    TRY(fmoe_check_shape("tokens", T, "hidden_size", d));
    TRY(fmoe_check_shape("num_keys", n, "hidden_size", d));
    TRY(fmoe_check_shape("tokens", T, "num_keys", n));
    if (training && T == 1)
        return fmoe_fail(FMOE_BATCH_OF_ONE, "tokens = 1 is below 2, which the unbiased variance needs in training");
    return FMOE_OK;
}

extern "C" size_t fmoe_cuda_router_backward_workspace(bool training, int64_t T, int64_t d, int64_t n,
                                                      fmoe_dtype dtype) {
    size_t used = 0;
    if (check_sizes(training, T, d, n, dtype) == FMOE_OK)
        plan(training, T, d, n, dtype, NULL, &used);
    return used;
}

template <typename E, typename G>
static fmoe_status run(const router_backward_plan &p, fmoe_write write, void *dx, void *dgate, cudaStream_t stream) {
    const router_backward_job &job = p.job;
    TRY(router_set_norm(&p.forward, p.norm, false, stream));
    if (dgate || job.training) {
        TRY(router_gate_product(job, p.forward.dtype, p.forward.x, stream));
        TRY((join_gate<E, G>(job, p.forward.gate, write, dgate, stream)));
    }
    fmoe_dtype gradient_dtype = sizeof(G) == sizeof(float) ? FMOE_F32 : p.forward.dtype;
    return dx ? router_x_product(job, p.forward.dtype, p.forward.x, p.forward.gate, gradient_dtype, dx, stream)
              : FMOE_OK;
}

extern "C" fmoe_status fmoe_cuda_router_backward(bool training, int64_t T, int64_t d, int64_t n, fmoe_dtype dtype,
                                                 const void *x, const void *gate, const float *running_mean,
                                                 const float *running_var, const float *dlogits, fmoe_write write,
                                                 fmoe_dtype gradient_dtype, void *dx, void *dgate, void *workspace,
                                                 size_t workspace_bytes, void *stream) {
    TRY(check_sizes(training, T, d, n, dtype));
    if (gradient_dtype != dtype && gradient_dtype != FMOE_F32)
        return fmoe_fail(FMOE_UNSUPPORTED, "gradient_dtype = %d is neither dtype = %s nor f32", (int)gradient_dtype,
                         fmoe_dtype_name(dtype));
    TRY(fmoe_check_pointer("x", x, T * d));
    TRY(fmoe_check_pointer("router_gate.weight", gate, 2 * n * d));
    if (!training) {
        TRY(fmoe_check_pointer("router_norm.running_mean", running_mean, d));
        TRY(fmoe_check_pointer("router_norm.running_var", running_var, d));
    }
    TRY(fmoe_check_pointer("dlogits", dlogits, 2 * T * n));
    cudaStream_t s = (cudaStream_t)stream;
    if (T == 0) {
        size_t bytes = 2 * (size_t)n * (size_t)d * fmoe_dtype_size(gradient_dtype);
        return dgate && write == FMOE_OVERWRITE ? cuda_call("dgate", cudaMemsetAsync(dgate, 0, bytes, s)) : FMOE_OK;
    }
    size_t used = 0;
    router_backward_plan p = plan(training, T, d, n, dtype, workspace, &used);
    TRY(check_workspace(workspace, workspace_bytes, used));
    p.forward.x = x, p.forward.gate = gate, p.job.dlogits = dlogits;
    if (!training) // in training they have moved on the way forward, and stay NULL here
        p.forward.running_mean = (float *)running_mean, p.forward.running_var = (float *)running_var;
    if (!dx && !dgate)
        return FMOE_OK;
    WITH_DTYPE(dtype, E, {
        if (gradient_dtype == FMOE_F32)
            return run<E, float>(p, write, dx, dgate, s);
        return run<E, E>(p, write, dx, dgate, s);
    });
}
