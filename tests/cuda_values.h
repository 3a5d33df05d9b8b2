/* What sentences about the GPU are made of: calls that take host pointers and run on copies of the data on the device,
 * each between guard bands, outputs and workspace poisoned; graphs and streams. */
#ifndef CUDA_VALUES_H
#define CUDA_VALUES_H

#include "../chapters/device.h"
#include "../cuda/expert_backward/expert_backward.h"
#include "../cuda/fmoe_cuda.h"
#include "../cuda/layer/layer.h"
#include "../cuda/mlp_backward/mlp_backward.h"
#include "../cuda/rungs.h"
#include "../cuda/strategies/strategies.h"
#include "values.h"

/* A pointer of an arguments' struct: where it stands, what it points at. NULL stays NULL. */
typedef struct {
    const char *name;
    size_t slot;
    fmoe_dtype dtype;
    fmoe_role role;
    int64_t count;
} tensor;
#define TENSOR(args_type, field, dtype, role, count) ((tensor){#field, offsetof(args_type, field), dtype, role, count})

/* The call, its `args` of host pointers replaced by device pointers, on a stream of its own; the outputs come back to
 * the host's places. FMOE_BAD_WORKSPACE if a guard band or an input was written to. */
fmoe_status run_on_device(fmoe_rung_fn *run, size_t workspace_bytes, const void *args, size_t args_size,
                          const tensor *tensors, int num_tensors);

/* The same for a call that notes bad indices: what fmoe_cuda_check says of its workspace, if nothing else failed. */
fmoe_status run_and_check(fmoe_rung_fn *run, size_t workspace_bytes, const void *args, size_t args_size,
                          const tensor *tensors, int num_tensors);

/* The public functions of fmoe_cuda.h with host pointers and a workspace of the size they ask for. Tensors of a dtype
 * are given in it. */
fmoe_status gpu_log_softmax(int64_t rows, int64_t n, const float *logits, float *log_probs);
fmoe_status gpu_log_softmax_backward(int64_t rows, int64_t n, const float *logits, const float *dlog_probs,
                                     float *dlogits);
fmoe_status gpu_topk(fmoe_dtype dtype, int64_t T, int64_t n, int64_t K, bool norm, const void *logits, int32_t *indices,
                     float *scores, float *weights);
/* In float32, as fmoe_topk_backward. What the call noted of bad indices is the status, if nothing else failed. */
fmoe_status gpu_topk_backward(int64_t T, int64_t n, int64_t K, bool norm, const float *logits, const int32_t *indices,
                              const float *dweights, const float *dscores, float *dlogits);

typedef struct {
    bool training;
    int64_t T, d, n;
    fmoe_dtype dtype;
    const void *x, *gate;
    float *running_mean, *running_var, *logits, *log_probs;
} gpu_router_args;
fmoe_status gpu_router(const gpu_router_args *args);

typedef struct {
    bool training;
    int64_t T, d, n;
    fmoe_dtype dtype, gradient_dtype;
    const void *x, *gate;
    const float *running_mean, *running_var, *dlogits;
    fmoe_write write;
    void *dx, *dgate;
} gpu_router_backward_args;
fmoe_status gpu_router_backward(const gpu_router_backward_args *args);

/* With pre_activations, which a rung's arguments have no place for. */
fmoe_status gpu_schedule(const fmoe_schedule_args *args);
fmoe_status gpu_expert(const fmoe_expert_args *args, float *pre_activations);
/* A rung in their place, if it has a run. Notes are checked too. */
fmoe_status schedule_by(const fmoe_rung *rung, const fmoe_schedule_args *args);
fmoe_status expert_by(const fmoe_rung *rung, const fmoe_expert_args *args, float *pre_activations);

/* Values as they are stored in a type; the caller frees. And the float32 values that these stand for. */
void *stored(fmoe_dtype dtype, const float *values, int64_t count);
float *rounded_to(fmoe_dtype dtype, const float *values, int64_t count);

/* Every rung that supports the case but a vendor's library, captured once in a CUDA graph and replayed twice with new
 * data in the same places: HOLDS if what it writes is right. And two calls with different data that start together on
 * two streams. */
const char *rungs_replay(const fmoe_step *step, const fmoe_rung *rungs, uint64_t seed, const char *case_name);
const char *rungs_side_by_side(const fmoe_step *step, const fmoe_rung *rungs, uint64_t seed, const char *case_name);

/* For rungs made up by a test: queued on the stream. A NULL source fills with the byte. */
fmoe_status queue_copy(void *to, const void *from, int byte, size_t bytes, void *stream);
fmoe_status queue_sleep(int microseconds, void *stream); /* the stream waits that long */

/* From the device's attributes: what its memory could move and its cores could multiply at most. */
double peak_memory_gbs(void);
double peak_fma_gflops(void);

/* Without CUDA nobody calls these, and nobody defines them: a weak name need not be found. */
#ifndef FMOE_WITH_CUDA
#pragma weak run_on_device
#pragma weak run_and_check
#pragma weak gpu_schedule
#pragma weak gpu_expert
#pragma weak schedule_by
#pragma weak expert_by
#pragma weak gpu_log_softmax
#pragma weak gpu_log_softmax_backward
#pragma weak gpu_topk
#pragma weak gpu_topk_backward
#pragma weak gpu_router
#pragma weak gpu_router_backward
#pragma weak stored
#pragma weak rounded_to
#pragma weak rungs_replay
#pragma weak rungs_side_by_side
#pragma weak queue_copy
#pragma weak queue_sleep
#pragma weak peak_memory_gbs
#pragma weak peak_fma_gflops
#pragma weak fmoe_cuda_check
#pragma weak fmoe_cuda_router
#pragma weak fmoe_cuda_router_workspace
#pragma weak fmoe_cuda_router_backward
#pragma weak fmoe_cuda_router_backward_workspace
#pragma weak fmoe_cuda_log_softmax
#pragma weak fmoe_cuda_log_softmax_backward
#pragma weak fmoe_cuda_schedule
#pragma weak fmoe_cuda_schedule_workspace
#pragma weak fmoe_cuda_expert
#pragma weak fmoe_cuda_expert_workspace
#pragma weak fmoe_cuda_topk
#pragma weak fmoe_cuda_topk_workspace
#pragma weak fmoe_cuda_topk_backward
#pragma weak fmoe_cuda_topk_backward_workspace
#pragma weak cuda_strategy_choose
#pragma weak cuda_strategy_cost_us
#pragma weak fmoe_cuda_mlp
#pragma weak fmoe_cuda_mlp_workspace
#pragma weak fmoe_cuda_layer_forward
#pragma weak fmoe_cuda_layer_workspace
#pragma weak fmoe_cuda_side_create
#pragma weak fmoe_cuda_side_destroy
#pragma weak fmoe_cuda_expert_backward
#pragma weak fmoe_cuda_expert_backward_workspace
#pragma weak fmoe_cuda_mlp_backward
#pragma weak fmoe_cuda_mlp_backward_workspace
#pragma weak fmoe_cuda_layer_keep
#pragma weak fmoe_cuda_layer_forward_keeping
#pragma weak fmoe_cuda_layer_forward_keeping_workspace
#pragma weak fmoe_cuda_layer_backward
#pragma weak fmoe_cuda_layer_backward_workspace
#endif

#endif
