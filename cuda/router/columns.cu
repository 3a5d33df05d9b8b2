// Rung: the plain translation. A thread a hidden unit, a thread a logit, a thread a softmax row.
#include "router.cuh"

#define COLUMN_THREADS 32 // few a block, so that even 1,024 hidden units reach 32 multiprocessors
#define LOGIT_THREADS  256

// [three-passes]
// Down a column of x: the mean, then the variance around it, then x̂.
// Launch: a thread a hidden unit, 32 a block. Shared memory: none. Traffic: x three times in training, once in
// evaluation, a warp's 32 neighbours in one piece of 64 or 128 bytes; x̂ once. Only d threads ask for it.
template <typename E>
__global__ void columns_kernel(bool training, int64_t T, int64_t d, const E *x, float *running_mean, float *running_var,
                               router_norm norm, float *x_hat) {
    int64_t h = (int64_t)blockIdx.x * COLUMN_THREADS + threadIdx.x;
    if (h >= d)
        return;
    if (training) {
        double mean = 0, squares = 0, keep = 1 - FMOE_NORM_MOMENTUM;
        for (int64_t t = 0; t < T; t++)
            mean += to_f32(x[t * d + h]);
        mean /= (double)T;
        for (int64_t t = 0; t < T; t++) {
            double deviation = to_f32(x[t * d + h]) - mean;
            squares += deviation * deviation;
        }
        running_mean[h] = (float)(keep * running_mean[h] + FMOE_NORM_MOMENTUM * mean);
        running_var[h] = (float)(keep * running_var[h] + FMOE_NORM_MOMENTUM * squares / (double)(T - 1));
        set_norm(norm, h, mean, squares / (double)T);
    } else {
        set_norm(norm, h, running_mean[h], running_var[h]);
    }
    float center = norm.center[h], scale = norm.scale[h], offset = norm.offset[h];
    for (int64_t t = 0; t < T; t++)
        x_hat[t * d + h] = normalised(to_f32(x[t * d + h]), center, scale, offset);
}
// [/three-passes]

// [project]
// Launch: a thread a logit, 256 a block, the keys of a token side by side. Shared memory: none. Traffic: every thread
// reads a row of x̂, the same for the whole warp, and a row of the gate, another for each lane: 32 cache lines a load.
template <typename E>
__global__ void project_kernel(int64_t T, int64_t d, int64_t n, const float *x_hat, const E *gate, float *logits) {
    int64_t index = (int64_t)blockIdx.x * LOGIT_THREADS + threadIdx.x, t = index / (2 * n), key = index % (2 * n);
    if (t >= T)
        return;
    float sum = 0;
    for (int64_t h = 0; h < d; h++)
        sum = fmaf(x_hat[t * d + h], to_f32(gate[key * d + h]), sum);
    logits[(key / n * T + t) * n + key % n] = sum;
}
// [/project]

// Launch: a thread a row, 256 a block. Shared memory: none. Traffic: the logits three times, lanes n · 4 bytes apart.
__global__ void plain_log_softmax_kernel(int64_t rows, int64_t n, const float *logits, float *log_probs) {
    int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows)
        return;
    const float *z = logits + row * n;
    float best = -INFINITY, sum = 0;
    for (int64_t i = 0; i < n; i++)
        best = fmaxf(best, z[i]);
    for (int64_t i = 0; i < n; i++)
        sum += expf(z[i] - best);
    float log_sum = logf(sum);
    for (int64_t i = 0; i < n; i++)
        log_probs[row * n + i] = z[i] - best - log_sum;
}

fmoe_status router_project(const fmoe_router_args *args, const float *x_hat, cudaStream_t stream) {
    unsigned blocks = (unsigned)ceil_div(args->T * 2 * args->n, LOGIT_THREADS);
    WITH_DTYPE(args->dtype, E,
               project_kernel<E><<<blocks, LOGIT_THREADS, 0, stream>>>(args->T, args->d, args->n, x_hat,
                                                                       (const E *)args->gate, args->logits));
    return launched("project_kernel");
}

extern "C" fmoe_status cuda_router_columns(const void *arguments, void *workspace, size_t bytes, void *stream) {
    const fmoe_router_args *args = (const fmoe_router_args *)arguments;
    size_t used = 0;
    router_scratch s = router_carve(args, true, workspace, &used);
    TRY(router_check(args, workspace, bytes, used));
    if (args->T == 0)
        return FMOE_OK;
    unsigned blocks = (unsigned)ceil_div(args->d, COLUMN_THREADS);
    WITH_DTYPE(args->dtype, E,
               columns_kernel<E><<<blocks, COLUMN_THREADS, 0, (cudaStream_t)stream>>>(
                   args->training, args->T, args->d, (const E *)args->x, args->running_mean, args->running_var, s.norm,
                   s.x_hat));
    TRY(launched("columns_kernel"));
    TRY(router_project(args, s.x_hat, (cudaStream_t)stream));
    if (!args->log_probs)
        return FMOE_OK;
    plain_log_softmax_kernel<<<(unsigned)ceil_div(2 * args->T, 256), 256, 0, (cudaStream_t)stream>>>(
        2 * args->T, args->n, args->logits, args->log_probs);
    return launched("plain_log_softmax_kernel");
}
