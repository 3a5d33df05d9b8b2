// The router's way back: from the gradients of the logits to those of the gate and of x (chapter 9).
//
//   dgate = dzᵀ · x̂        dx̂ = dz · gate        dx = (dx̂ − mean(dx̂) − x̂ · mean(dx̂ · x̂)) · scale
//
// In training both means run over all tokens, but nobody has to wait for dx̂ to take them: dx̂ is linear in the gate, so
//
//   Σ_t dx̂[t, h] = Σ_j gate[j, h] · Σ_t dz[t, j]        Σ_t dx̂[t, h] · x̂[t, h] = Σ_j gate[j, h] · dgate[j, h]
//
// and dgate comes first anyway. What remains of the norm is the last line of the second product; dx̂ is never stored.
// backward_products.cu has the two products, backward_wgmma.cu has them for tensor cores.
#include "../tile.cuh"
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
        float sum = sum_slices(job.dgate_slices + j * job.d + h, job.slices, job.keys * job.d);
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
static fmoe_status join_gate_in(const router_backward_job &job, const void *gate, fmoe_write write, void *dgate,
                                cudaStream_t stream) {
    dim3 blocks((unsigned)ceil_div(job.d, JOIN_UNITS), (unsigned)job.key_groups), threads(JOIN_UNITS, JOIN_ROWS);
    join_gate_kernel<E, G><<<blocks, threads, 0, stream>>>(job, (const E *)gate, write, (G *)dgate);
    return launched("join_gate_kernel");
}

static fmoe_status join_gate(const router_backward_job &job, fmoe_dtype dtype, const void *gate, fmoe_write write,
                             fmoe_dtype dgate_dtype, void *dgate, cudaStream_t stream) {
    WITH_DTYPE(dtype, E, {
        if (dgate_dtype == FMOE_F32)
            return (join_gate_in<E, float>(job, gate, write, dgate, stream));
        return (join_gate_in<E, E>(job, gate, write, dgate, stream));
    });
}

// ---- The entry point

typedef struct {
    fmoe_router_args forward; // what the norm is made from
    router_scratch norm;
    router_backward_job job;
    bool by_warpgroups;
} router_backward_plan;

// Slices of the tokens: by T alone, so that the same input gives the same bits on every GPU. The tensor cores' product
// has up to eight parts, with two slices each.
static int64_t slices_of(int64_t T, bool by_warpgroups) {
    int64_t slices = by_warpgroups ? 2 * (ceil_div(T, TILE_DEPTH) / 2) : ceil_div(T, 256);
    return slices < 1 ? 1 : slices > MAX_SLICES ? MAX_SLICES : slices;
}

// What tensor cores take: see cuda_router_16_bit. A few tokens do not fill their tiles, and in training they may have
// gradients of which little is left: those are not made of halves.
#define LEAST_TOKENS 256

static fmoe_router_args forward_of(const fmoe_router_backward_args *a) {
    fmoe_router_args f = {};
    f.T = a->T, f.d = a->d, f.n = a->n, f.training = a->training, f.dtype = a->dtype;
    f.x = a->x, f.gate = a->gate;
    if (!a->training) // in training they have moved on the way forward, and stay NULL here
        f.running_mean = (float *)a->running_mean, f.running_var = (float *)a->running_var;
    return f;
}

extern "C" bool cuda_router_backward_16_bit(const void *args) {
    fmoe_router_args f = forward_of((const fmoe_router_backward_args *)args);
    return cuda_router_16_bit(&f) && f.T >= LEAST_TOKENS && f.T <= INT32_MAX / 4 && f.n <= INT32_MAX / 16;
}

static bool best_is_wgmma(const fmoe_router_backward_args *a) {
    return cuda_router_backward_16_bit(a) && fmoe_cuda_level() >= LEVEL_HOPPER;
}

static router_backward_plan plan(const fmoe_router_backward_args *a, bool by_warpgroups, void *workspace,
                                 size_t *used) {
    router_backward_plan p = {};
    int64_t T = a->T, d = a->d, n = a->n;
    p.forward = forward_of(a);
    p.norm = router_carve(&p.forward, false, workspace, used);
    p.by_warpgroups = by_warpgroups;
    router_backward_job *job = &p.job;
    size_t row = (size_t)d * sizeof(float), keys = 2 * (size_t)n;
    job->T = T, job->d = d, job->n = n, job->training = a->training, job->norm = p.norm.norm;
    job->dlogits = a->dlogits;
    job->slices = slices_of(T, by_warpgroups), job->key_groups = ceil_div(2 * n, JOIN_KEYS);
    job->keys = by_warpgroups ? ceil_div(2 * n, 8) * 8 : 2 * n; // 16 bytes
    job->dgate_slices = (float *)carve(workspace, used, (size_t)(job->slices * job->keys) * row);
    job->dz_sums = (float *)carve(workspace, used, (size_t)job->slices * keys * sizeof(float));
    job->means = (float *)carve(workspace, used, (size_t)job->key_groups * 2 * row);
    if (by_warpgroups) {
        size_t tokens = (size_t)T * row / 2, gate = a->dtype == FMOE_F16 ? (size_t)job->keys * row : 0;
        job->halves.dz = (__nv_bfloat16 *)carve(workspace, used, (size_t)(T * job->keys) * sizeof(float));
        job->halves.x_hi = (__nv_bfloat16 *)carve(workspace, used, tokens);
        job->halves.x_lo = (__nv_bfloat16 *)carve(workspace, used, tokens);
        job->halves.gate = gate > 0 ? (__nv_bfloat16 *)carve(workspace, used, gate) : NULL;
    }
    return p;
}

static fmoe_status check_sizes(const fmoe_router_backward_args *a) {
    TRY(fmoe_check_tokens(a->T));
    TRY(fmoe_check_size("hidden_size", a->d));
    TRY(fmoe_check_size("num_keys", a->n));
    TRY(check_dtype(a->dtype));
    TRY(fmoe_check_shape("tokens", a->T, "hidden_size", a->d));
    TRY(fmoe_check_shape("num_keys", a->n, "hidden_size", a->d));
    TRY(fmoe_check_shape("tokens", a->T, "num_keys", a->n));
    if (a->training && a->T == 1)
        return fmoe_fail(FMOE_BATCH_OF_ONE, "tokens = 1 is below 2, which the unbiased variance needs in training");
    return FMOE_OK;
}

static size_t bytes_of(const fmoe_router_backward_args *a, bool by_warpgroups) {
    size_t used = 0;
    if (check_sizes(a) == FMOE_OK)
        plan(a, by_warpgroups, NULL, &used);
    return used;
}

// [router-backward]
static fmoe_status run(const router_backward_plan &p, fmoe_dtype dx_dtype, void *dx, fmoe_write write,
                       fmoe_dtype dgate_dtype, void *dgate, cudaStream_t stream) {
    const router_backward_job &job = p.job;
    const void *x = p.forward.x, *gate = p.forward.gate;
    fmoe_dtype dtype = p.forward.dtype;
    TRY(router_set_norm(&p.forward, p.norm, p.by_warpgroups, stream));
    if (p.by_warpgroups)
        TRY(router_split(job, dtype, x, gate, stream));
    if (dgate || job.training) {
        TRY(p.by_warpgroups ? router_gate_product_wgmma(job, stream) : router_gate_product(job, dtype, x, stream));
        TRY(join_gate(job, dtype, gate, write, dgate_dtype, dgate, stream));
    }
    if (!dx)
        return FMOE_OK;
    return (p.by_warpgroups ? router_x_product_wgmma : router_x_product)(job, dtype, x, gate, dx_dtype, dx, stream);
}
// [/router-backward]

static fmoe_status run_by(const fmoe_router_backward_args *a, bool by_warpgroups, fmoe_dtype dx_dtype, fmoe_write write,
                          fmoe_dtype dgate_dtype, void *workspace, size_t workspace_bytes, cudaStream_t stream) {
    TRY(check_sizes(a));
    TRY(fmoe_check_pointer("x", a->x, a->T * a->d));
    TRY(fmoe_check_pointer("router_gate.weight", a->gate, 2 * a->n * a->d));
    if (!a->training) {
        TRY(fmoe_check_pointer("router_norm.running_mean", a->running_mean, a->d));
        TRY(fmoe_check_pointer("router_norm.running_var", a->running_var, a->d));
    }
    TRY(fmoe_check_pointer("dlogits", a->dlogits, 2 * a->T * a->n));
    if (a->T == 0) {
        size_t bytes = 2 * (size_t)a->n * (size_t)a->d * fmoe_dtype_size(dgate_dtype);
        bool clears = a->dgate && write == FMOE_OVERWRITE;
        return clears ? cuda_call("dgate", cudaMemsetAsync(a->dgate, 0, bytes, stream)) : FMOE_OK;
    }
    size_t used = 0;
    router_backward_plan p = plan(a, by_warpgroups, workspace, &used);
    TRY(check_workspace(workspace, workspace_bytes, used));
    return a->dx || a->dgate ? run(p, dx_dtype, a->dx, write, dgate_dtype, a->dgate, stream) : FMOE_OK;
}

fmoe_status router_backward(const fmoe_router_backward_args *a, fmoe_dtype dx_dtype, fmoe_write write,
                            fmoe_dtype dgate_dtype, void *workspace, size_t workspace_bytes, cudaStream_t stream) {
    return run_by(a, best_is_wgmma(a), dx_dtype, write, dgate_dtype, workspace, workspace_bytes, stream);
}

extern "C" fmoe_status fmoe_cuda_router_backward(bool training, int64_t T, int64_t d, int64_t n, fmoe_dtype dtype,
                                                 const void *x, const void *gate, const float *running_mean,
                                                 const float *running_var, const float *dlogits, fmoe_write write,
                                                 fmoe_dtype gradient_dtype, void *dx, void *dgate, void *workspace,
                                                 size_t workspace_bytes, void *stream) {
    fmoe_router_backward_args args = {T, d, n, training, dtype, x, gate, running_mean, running_var, dlogits, dx, dgate};
    TRY(check_sizes(&args));
    if (gradient_dtype != dtype && gradient_dtype != FMOE_F32)
        return fmoe_fail(FMOE_UNSUPPORTED, "gradient_dtype = %d is neither dtype = %s nor f32", (int)gradient_dtype,
                         fmoe_dtype_name(dtype));
    return router_backward(&args, gradient_dtype, write, gradient_dtype, workspace, workspace_bytes,
                           (cudaStream_t)stream);
}

extern "C" size_t fmoe_cuda_router_backward_workspace(bool training, int64_t T, int64_t d, int64_t n,
                                                      fmoe_dtype dtype) {
    fmoe_router_backward_args args = {};
    args.T = T, args.d = d, args.n = n, args.training = training, args.dtype = dtype;
    return bytes_of(&args, best_is_wgmma(&args));
}

// ---- The rungs

static fmoe_status run_rung(const void *args, bool by_warpgroups, void *workspace, size_t workspace_bytes,
                            void *stream) {
    const fmoe_router_backward_args *a = (const fmoe_router_backward_args *)args;
    TRY(fmoe_check_pointer("dx", a->dx, a->T * a->d));
    TRY(fmoe_check_pointer("dgate", a->dgate, 2 * a->n * a->d));
    return run_by(a, by_warpgroups, a->dtype, FMOE_OVERWRITE, a->dtype, workspace, workspace_bytes,
                  (cudaStream_t)stream);
}

extern "C" size_t cuda_router_backward_tiles_bytes(const void *args) {
    return bytes_of((const fmoe_router_backward_args *)args, false);
}

extern "C" size_t cuda_router_backward_wgmma_bytes(const void *args) {
    return bytes_of((const fmoe_router_backward_args *)args, true);
}

extern "C" fmoe_status cuda_router_backward_tiles(const void *args, void *workspace, size_t bytes, void *stream) {
    return run_rung(args, false, workspace, bytes, stream);
}

extern "C" fmoe_status cuda_router_backward_wgmma(const void *args, void *workspace, size_t bytes, void *stream) {
    if (!cuda_router_backward_16_bit(args))
        return fmoe_fail(FMOE_UNSUPPORTED,
                         "tensor cores take 16-bit types in rows of multiples of 16 bytes, from %d tokens",
                         LEAST_TOKENS);
    return run_rung(args, true, workspace, bytes, stream);
}
