/* Calls on the device, graphs and streams: see cuda_values.h. */
#include "cuda_values.h"

#ifdef FMOE_WITH_CUDA

#include "../chapters/program.h"
#include "../ref_cpu/check.h"

#include <cuda_runtime_api.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- Values ------------------------------------------------------------------------------------------------------ */

void *stored(fmoe_dtype dtype, const float *values, int64_t count) {
    void *target = poisoned(count, fmoe_dtype_size(dtype));
    fmoe_from_f32(dtype, count, values, target);
    return target;
}

float *rounded_to(fmoe_dtype dtype, const float *values, int64_t count) {
    void *narrow OWNED = stored(dtype, values, count);
    float *wide = floats(count);
    fmoe_to_f32(dtype, count, narrow, wide);
    return wide;
}

/* ---- One call ---------------------------------------------------------------------------------------------------- */

/* The tensors as a problem's arguments: copied, guarded and poisoned as a rung's are. */
static fmoe_problem as_problem(const fmoe_step *step, const void *args, const tensor *tensors, int num_tensors) {
    fmoe_problem p = {.step = step, .num_arguments = num_tensors, .args = (void *)args};
    for (int i = 0; i < num_tensors; i++) {
        const tensor *t = &tensors[i];
        void *data;
        memcpy(&data, (const char *)args + t->slot, sizeof data);
        p.arguments[i] = (fmoe_argument){.name = t->name,
                                         .slot = t->slot,
                                         .dtype = t->dtype,
                                         .role = t->role,
                                         .count = t->count,
                                         .data = data,
                                         .pristine = data};
    }
    return p;
}

/* before_fetch: what is still to be asked of the workspace. */
static fmoe_status run_and_ask(fmoe_rung_fn *run, size_t workspace_bytes, const void *args, size_t args_size,
                               const tensor *tensors, int num_tensors,
                               fmoe_status (*before_fetch)(const void *workspace, void *stream)) {
    fmoe_step step = {.op = "test", .args_size = args_size};
    fmoe_problem p = as_problem(&step, args, tensors, num_tensors);
    fmoe_device_problem d;
    char why[256];
    TRY(fmoe_device_problem_new(&p, workspace_bytes, &d));
    fmoe_status noted = FMOE_OK, status = run(d.args, d.workspace, d.workspace_bytes, d.stream);
    if (status == FMOE_OK && before_fetch)
        noted = before_fetch(d.workspace, d.stream);
    if (status == FMOE_OK)
        status = fmoe_device_problem_fetch(&d, &p, why);
    fmoe_device_problem_free(&d);
    return status == FMOE_OK ? noted : status;
}

fmoe_status run_on_device(fmoe_rung_fn *run, size_t workspace_bytes, const void *args, size_t args_size,
                          const tensor *tensors, int num_tensors) {
    return run_and_ask(run, workspace_bytes, args, args_size, tensors, num_tensors, NULL);
}

fmoe_status run_and_check(fmoe_rung_fn *run, size_t workspace_bytes, const void *args, size_t args_size,
                          const tensor *tensors, int num_tensors) {
    return run_and_ask(run, workspace_bytes, args, args_size, tensors, num_tensors, fmoe_cuda_check);
}

#define COUNT(array) ((int)(sizeof(array) / sizeof(array)[0]))

/* ---- The public functions ---------------------------------------------------------------------------------------- */

typedef struct {
    int64_t rows, n;
    const float *logits, *dlog_probs;
    float *log_probs, *dlogits;
} softmax_args;

static fmoe_status run_log_softmax(const void *args, void *workspace, size_t bytes, void *stream) {
    const softmax_args *a = args;
    (void)workspace, (void)bytes;
    return fmoe_cuda_log_softmax(a->rows, a->n, a->logits, a->log_probs, stream);
}

fmoe_status gpu_log_softmax(int64_t rows, int64_t n, const float *logits, float *log_probs) {
    softmax_args args = {.rows = rows, .n = n, .logits = logits, .log_probs = log_probs};
    const tensor tensors[] = {TENSOR(softmax_args, logits, FMOE_F32, ROLE_INPUT, rows * n),
                              TENSOR(softmax_args, log_probs, FMOE_F32, ROLE_OUTPUT, rows * n)};
    return run_on_device(run_log_softmax, 0, &args, sizeof args, tensors, COUNT(tensors));
}

static fmoe_status run_log_softmax_backward(const void *args, void *workspace, size_t bytes, void *stream) {
    const softmax_args *a = args;
    (void)workspace, (void)bytes;
    return fmoe_cuda_log_softmax_backward(a->rows, a->n, a->logits, a->dlog_probs, a->dlogits, stream);
}

fmoe_status gpu_log_softmax_backward(int64_t rows, int64_t n, const float *logits, const float *dlog_probs,
                                     float *dlogits) {
    softmax_args args = {.rows = rows, .n = n, .logits = logits, .dlog_probs = dlog_probs, .dlogits = dlogits};
    const tensor tensors[] = {TENSOR(softmax_args, logits, FMOE_F32, ROLE_INPUT, rows * n),
                              TENSOR(softmax_args, dlog_probs, FMOE_F32, ROLE_INPUT, rows * n),
                              TENSOR(softmax_args, dlogits, FMOE_F32, ROLE_OUTPUT, rows * n)};
    return run_on_device(run_log_softmax_backward, 0, &args, sizeof args, tensors, COUNT(tensors));
}

static fmoe_status run_topk(const void *args, void *workspace, size_t bytes, void *stream) {
    const fmoe_topk_args *a = args;
    return fmoe_cuda_topk(a->T, a->n, a->K, a->norm_topk_prob, a->dtype, a->logits, a->indices, a->scores, a->weights,
                          workspace, bytes, stream);
}

fmoe_status gpu_topk(fmoe_dtype dtype, int64_t T, int64_t n, int64_t K, bool norm, const void *logits, int32_t *indices,
                     float *scores, float *weights) {
    fmoe_topk_args args = {T, n, K, norm, dtype, logits, indices, scores, weights};
    const tensor tensors[] = {TENSOR(fmoe_topk_args, logits, dtype, ROLE_INPUT, 2 * T * n),
                              TENSOR(fmoe_topk_args, indices, FMOE_I32, ROLE_OUTPUT, T * K),
                              TENSOR(fmoe_topk_args, scores, FMOE_F32, ROLE_OUTPUT, T * K),
                              TENSOR(fmoe_topk_args, weights, FMOE_F32, ROLE_OUTPUT, T * K)};
    size_t bytes = fmoe_cuda_topk_workspace(T, n, K, dtype);
    return run_on_device(run_topk, bytes, &args, sizeof args, tensors, COUNT(tensors));
}

typedef struct {
    int64_t T, n, K;
    bool norm;
    const float *logits, *dweights, *dscores;
    const int32_t *indices;
    float *dlogits;
} topk_backward_args;

static fmoe_status run_topk_backward(const void *args, void *workspace, size_t bytes, void *stream) {
    const topk_backward_args *a = args;
    return fmoe_cuda_topk_backward(a->T, a->n, a->K, a->norm, FMOE_F32, a->logits, a->indices, a->dweights, a->dscores,
                                   a->dlogits, workspace, bytes, stream);
}

fmoe_status gpu_topk_backward(int64_t T, int64_t n, int64_t K, bool norm, const float *logits, const int32_t *indices,
                              const float *dweights, const float *dscores, float *dlogits) {
    topk_backward_args args = {T, n, K, norm, logits, dweights, dscores, indices, dlogits};
    const tensor tensors[] = {TENSOR(topk_backward_args, logits, FMOE_F32, ROLE_INPUT, 2 * T * n),
                              TENSOR(topk_backward_args, indices, FMOE_I32, ROLE_INPUT, T * K),
                              TENSOR(topk_backward_args, dweights, FMOE_F32, ROLE_INPUT, T * K),
                              TENSOR(topk_backward_args, dscores, FMOE_F32, ROLE_INPUT, T * K),
                              TENSOR(topk_backward_args, dlogits, FMOE_F32, ROLE_OUTPUT, 2 * T * n)};
    size_t bytes = fmoe_cuda_topk_backward_workspace(T, n, K, FMOE_F32);
    return run_and_check(run_topk_backward, bytes, &args, sizeof args, tensors, COUNT(tensors));
}

static fmoe_status run_router(const void *args, void *workspace, size_t bytes, void *stream) {
    const gpu_router_args *a = args;
    return fmoe_cuda_router(a->training, a->T, a->d, a->n, a->dtype, a->x, a->gate, a->running_mean, a->running_var,
                            a->logits, a->log_probs, workspace, bytes, stream);
}

fmoe_status gpu_router(const gpu_router_args *args) {
    int64_t T = args->T, d = args->d, n = args->n;
    const tensor tensors[] = {TENSOR(gpu_router_args, x, args->dtype, ROLE_INPUT, T * d),
                              TENSOR(gpu_router_args, gate, args->dtype, ROLE_INPUT, 2 * n * d),
                              TENSOR(gpu_router_args, running_mean, FMOE_F32, ROLE_INOUT, d),
                              TENSOR(gpu_router_args, running_var, FMOE_F32, ROLE_INOUT, d),
                              TENSOR(gpu_router_args, logits, FMOE_F32, ROLE_OUTPUT, 2 * T * n),
                              TENSOR(gpu_router_args, log_probs, FMOE_F32, ROLE_OUTPUT, 2 * T * n)};
    size_t bytes = fmoe_cuda_router_workspace(args->training, T, d, n, args->dtype);
    return run_on_device(run_router, bytes, args, sizeof *args, tensors, COUNT(tensors));
}

static fmoe_status run_router_backward(const void *args, void *workspace, size_t bytes, void *stream) {
    const gpu_router_backward_args *a = args;
    return fmoe_cuda_router_backward(a->training, a->T, a->d, a->n, a->dtype, a->x, a->gate, a->running_mean,
                                     a->running_var, a->dlogits, a->write, a->gradient_dtype, a->dx, a->dgate,
                                     workspace, bytes, stream);
}

fmoe_status gpu_router_backward(const gpu_router_backward_args *args) {
    int64_t T = args->T, d = args->d, n = args->n;
    fmoe_role dgate_role = args->write == FMOE_ACCUMULATE ? ROLE_INOUT : ROLE_OUTPUT;
    const tensor tensors[] = {
        TENSOR(gpu_router_backward_args, x, args->dtype, ROLE_INPUT, T * d),
        TENSOR(gpu_router_backward_args, gate, args->dtype, ROLE_INPUT, 2 * n * d),
        TENSOR(gpu_router_backward_args, running_mean, FMOE_F32, ROLE_INPUT, d),
        TENSOR(gpu_router_backward_args, running_var, FMOE_F32, ROLE_INPUT, d),
        TENSOR(gpu_router_backward_args, dlogits, FMOE_F32, ROLE_INPUT, 2 * T * n),
        TENSOR(gpu_router_backward_args, dx, args->gradient_dtype, ROLE_OUTPUT, T * d),
        TENSOR(gpu_router_backward_args, dgate, args->gradient_dtype, dgate_role, 2 * n * d),
    };
    size_t bytes = fmoe_cuda_router_backward_workspace(args->training, T, d, n, args->dtype);
    return run_on_device(run_router_backward, bytes, args, sizeof *args, tensors, COUNT(tensors));
}

static fmoe_status run_schedule(const void *args, void *workspace, size_t bytes, void *stream) {
    const fmoe_schedule_args *a = args;
    return fmoe_cuda_schedule(a->T, a->K, a->N, a->indices, a->offsets, a->pairs, workspace, bytes, stream);
}

fmoe_status schedule_by(const fmoe_rung *rung, const fmoe_schedule_args *args) {
    const tensor tensors[] = {TENSOR(fmoe_schedule_args, indices, FMOE_I32, ROLE_INPUT, args->T * args->K),
                              TENSOR(fmoe_schedule_args, offsets, FMOE_I32, ROLE_OUTPUT, args->N + 1),
                              TENSOR(fmoe_schedule_args, pairs, FMOE_I32, ROLE_OUTPUT, args->T * args->K)};
    if (!rung->run)
        return run_and_check(run_schedule, fmoe_cuda_schedule_workspace(args->T, args->K, args->N), args, sizeof *args,
                             tensors, COUNT(tensors));
    if ((int)rung->level > fmoe_device_get()->level || (rung->supports && !rung->supports(args)))
        return FMOE_UNSUPPORTED;
    return run_and_check(rung->run, rung->workspace(args), args, sizeof *args, tensors, COUNT(tensors));
}

fmoe_status gpu_schedule(const fmoe_schedule_args *args) {
    const fmoe_rung none = {.run = NULL};
    return schedule_by(&none, args);
}

typedef struct {
    fmoe_expert_args step;
    float *pre_activations;
} expert_args;

static fmoe_status run_expert(const void *args, void *workspace, size_t bytes, void *stream) {
    const expert_args *e = args;
    const fmoe_expert_args *a = &e->step;
    return fmoe_cuda_expert(a->T, a->d, a->N, a->K, a->dtype, a->x, a->down, a->up, a->indices, a->weights, a->y,
                            e->pre_activations, workspace, bytes, stream);
}

fmoe_status expert_by(const fmoe_rung *rung, const fmoe_expert_args *a, float *pre_activations) {
    expert_args args = {*a, pre_activations};
    int64_t pairs = a->T * a->K;
    const tensor tensors[] = {TENSOR(expert_args, step.x, a->dtype, ROLE_INPUT, a->T * a->d),
                              TENSOR(expert_args, step.down, a->dtype, ROLE_INPUT, a->N * a->d),
                              TENSOR(expert_args, step.up, a->dtype, ROLE_INPUT, a->N * a->d),
                              TENSOR(expert_args, step.indices, FMOE_I32, ROLE_INPUT, pairs),
                              TENSOR(expert_args, step.weights, FMOE_F32, ROLE_INPUT, pairs),
                              TENSOR(expert_args, step.y, a->dtype, ROLE_OUTPUT, a->T * a->d),
                              TENSOR(expert_args, pre_activations, FMOE_F32, ROLE_OUTPUT, pairs)};
    if (!rung->run)
        return run_and_check(run_expert, fmoe_cuda_expert_workspace(a->T, a->d, a->N, a->K, a->dtype), &args,
                             sizeof args, tensors, COUNT(tensors));
    if ((int)rung->level > fmoe_device_get()->level || (rung->supports && !rung->supports(a)))
        return FMOE_UNSUPPORTED;
    /* A rung sees the step's arguments, which come first; it writes no pre-activations. */
    return run_and_check(rung->run, rung->workspace(a), &args, sizeof args, tensors, COUNT(tensors) - 1);
}

fmoe_status gpu_expert(const fmoe_expert_args *args, float *pre_activations) {
    const fmoe_rung none = {.run = NULL};
    return expert_by(&none, args, pre_activations);
}

/* ---- Queued work ------------------------------------------------------------------------------------------------- */

static fmoe_status check_cuda(cudaError_t error) {
    return error == cudaSuccess ? FMOE_OK : fmoe_fail(FMOE_CUDA, "%s", cudaGetErrorString(error));
}

fmoe_status queue_copy(void *to, const void *from, int byte, size_t bytes, void *stream) {
    return check_cuda(from ? cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream)
                           : cudaMemsetAsync(to, byte, bytes, stream));
}

static void sleep_for(void *microseconds) {
    usleep((useconds_t)(intptr_t)microseconds);
}

fmoe_status queue_sleep(int microseconds, void *stream) {
    return check_cuda(cudaLaunchHostFunc(stream, sleep_for, (void *)(intptr_t)microseconds));
}

static atomic_int released;

static void wait_for_release(void *unused) {
    (void)unused;
    while (!atomic_load(&released))
        usleep(10);
}

/* ---- Graphs and streams ------------------------------------------------------------------------------------------ */

/* Two problems of one case with different data, each on the device, and one rung. */
typedef struct {
    const fmoe_rung *rung;
    fmoe_problem p[2];
    fmoe_device_problem d[2];
    void *graph;
} pair_of_calls;

static void free_pair(pair_of_calls *c) {
    fmoe_device_graph_free(c->graph);
    for (int i = 0; i < 2; i++) {
        if (c->d[i].problem)
            fmoe_device_problem_free(&c->d[i]);
        fmoe_problem_free(&c->p[i]);
    }
}

static const char *outputs_right(pair_of_calls *c, fmoe_device_problem *d, fmoe_problem *p, const char *when) {
    char why[256] = "";
    fmoe_problem_poison(p);
    if (fmoe_device_problem_fetch(d, p, why) != FMOE_OK)
        return because("%s, %s: %s", c->rung->name, when, fmoe_error_message());
    double error = fmoe_problem_error(p, why);
    if (!(error <= fmoe_error_limit(p->c.dtype)))
        return because("%s, %s: error %.2g: %s", c->rung->name, when, error, why);
    return HOLDS;
}

static const char *replay(pair_of_calls *c) {
    fmoe_device_problem *d = &c->d[0];
    CALL(fmoe_device_capture(c->rung, d, &c->graph));
    for (int i = 1; i >= 0; i--) { /* first data that the capture has not seen */
        d->problem = &c->p[i];
        CALL(fmoe_device_problem_reset(d));
        CALL(fmoe_device_replay(c->graph, d->stream));
        CHECK(outputs_right(c, d, &c->p[i], "replayed in a graph"));
    }
    return HOLDS;
}

/* Neither stream starts before both calls are queued. */
static const char *side_by_side(pair_of_calls *c) {
    atomic_store(&released, 0);
    fmoe_status status = FMOE_OK;
    for (int i = 0; i < 2 && status == FMOE_OK; i++)
        status = check_cuda(cudaLaunchHostFunc(c->d[i].stream, wait_for_release, NULL));
    for (int i = 0; i < 2 && status == FMOE_OK; i++)
        status = c->rung->run(c->d[i].args, c->d[i].workspace, c->d[i].workspace_bytes, c->d[i].stream);
    atomic_store(&released, 1);
    CALL(status);
    for (int i = 0; i < 2; i++)
        CHECK(outputs_right(c, &c->d[i], &c->p[i], "beside another call"));
    return HOLDS;
}

static const char *each_pair(const fmoe_step *step, const fmoe_rung *rungs, uint64_t seed, const char *name,
                             const char *(*check)(pair_of_calls *c)) {
    const char *result = DOES_NOT_APPLY;
    for (const fmoe_rung *rung = rungs; rung->run; rung++) {
        pair_of_calls c FREED(free_pair) = {.rung = rung};
        char why[256];
        for (int i = 0; i < 2; i++)
            c.p[i] = new_problem(step, seed + (uint64_t)i, "%s", name);
        if (rung->library || rung_supports(rung, &c.p[0], why) != FMOE_OK) /* a library has state of its own */
            continue;
        for (int i = 0; i < 2; i++)
            CALL(fmoe_device_problem_new(&c.p[i], rung_workspace(rung, &c.p[i]), &c.d[i]));
        result = check(&c);
        if (result != HOLDS)
            break;
    }
    return result;
}

const char *rungs_replay(const fmoe_step *step, const fmoe_rung *rungs, uint64_t seed, const char *case_name) {
    return each_pair(step, rungs, seed, case_name, replay);
}

const char *rungs_side_by_side(const fmoe_step *step, const fmoe_rung *rungs, uint64_t seed, const char *case_name) {
    return each_pair(step, rungs, seed, case_name, side_by_side);
}

/* ---- What the device could do at most ---------------------------------------------------------------------------- */

static double attribute(enum cudaDeviceAttr which) {
    int value = 0;
    cr_assert(cudaDeviceGetAttribute(&value, which, 0) == cudaSuccess, "no device attribute %d", (int)which);
    return value;
}

double peak_memory_gbs(void) {
    return 2 * attribute(cudaDevAttrMemoryClockRate) * attribute(cudaDevAttrGlobalMemoryBusWidth) / 8 * 1e-6;
}

double peak_fma_gflops(void) {
    const double most_cores = 128; /* of a multiprocessor */
    return 2 * most_cores * attribute(cudaDevAttrMultiProcessorCount) * attribute(cudaDevAttrClockRate) * 1e-6;
}

#endif
