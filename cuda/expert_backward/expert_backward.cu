// The expert step's way back: the entry point, the checks and the workspace of all rungs.
//
//   dA = ⟨dy_t, up[e]⟩     ds = dA · g · silu'(s)     dg = dA · silu(s)     at the pairs (t, e)
//   dx_t = Σ_k ds · down[e]     dup[e] = Σ silu(s) · g · dy_t     ddown[e] = Σ ds · x_t
//
// The last two are sums along an expert's pairs, which the schedule has side by side.
#include "expert_backward.h"
#include "expert_backward.cuh"

#include "../../chapters/workspace.h"

// ---- The workspace

#define FEW_LISTS   2048 // enough to fill any GPU
#define RANGE_LEAST 16
#define RANGE_MOST  64 // LIST_MOST of lists.cuh is three times as much
#define SLICES_KEPT 8  // as in launch.cuh of the forward step

// Pairs a list: enough lists where there are few pairs, but twice an expert's usual pairs, so that few experts are cut.
static int range_of(int64_t pairs, int64_t N) {
    int64_t range = RANGE_LEAST;
    while (range < RANGE_MOST && (range * FEW_LISTS < pairs || range * N < 2 * pairs))
        range *= 2;
    return (int)range;
}

size_t backward_lay_out(backward_task *a, backward_needs needs, void *workspace, void **schedule) {
    size_t used = 0, pairs = (size_t)a->T * a->K;
    a->note = carve(workspace, &used, cuda_note_workspace(a->T));
    a->ds = (float *)carve(workspace, &used, pairs * sizeof(float));
    a->range = range_of(pairs, a->N);
    if (needs.activations)
        a->activations = (float *)carve(workspace, &used, pairs * sizeof(float));
    if (needs.parts)
        a->parts = (float *)carve(workspace, &used, (size_t)backward_lists(*a) * 2 * a->d * sizeof(float));
    if (needs.pre_activations) {
        int slices = backward_slices(*a);
        a->pre_activations = (float *)carve(workspace, &used, pairs * sizeof(float));
        a->partials = (float *)carve(workspace, &used, (size_t)min(slices, SLICES_KEPT) * pairs * sizeof(float));
    }
    if (needs.schedule) {
        a->offsets = (int32_t *)carve(workspace, &used, (size_t)(a->N + 1) * sizeof(int32_t));
        a->pairs = (int32_t *)carve(workspace, &used, pairs * sizeof(int32_t));
        *schedule = carve(workspace, &used, fmoe_cuda_schedule_workspace(a->T, a->K, a->N));
    }
    return used;
}

// ---- Checks

static fmoe_status check_sizes(int64_t T, int64_t d, int64_t N, int64_t K) {
    TRY(fmoe_check_pairs(T, K));
    if (N > FMOE_CUDA_MAX_EXPERTS)
        return fmoe_fail(FMOE_UNSUPPORTED, "num_experts = %lld exceeds %d, the most in a schedule on the GPU",
                         (long long)N, FMOE_CUDA_MAX_EXPERTS);
    return fmoe_check_shape("tokens", T, "hidden_size", d);
}

static fmoe_status check(const fmoe_expert_backward_args *a) {
    // y has x's shape, and what is wrong with x is said of x first.
    TRY(expert_check(a->T, a->d, a->N, a->K, a->dtype, a->x, a->down, a->up, a->indices, a->weights, a->x));
    TRY(check_sizes(a->T, a->d, a->N, a->K));
    TRY(fmoe_check_pointer("dy", a->dy, a->T * a->d));
    if (!a->offsets != !a->pairs && a->T > 0)
        return fmoe_fail(FMOE_NULL_POINTER, "%s is NULL and %s is not", a->offsets ? "pairs" : "offsets",
                         a->offsets ? "offsets" : "pairs");
    return FMOE_OK;
}

static backward_task task_of(const fmoe_expert_backward_args *a) {
    backward_task task = {};
    task.T = (int)a->T, task.d = (int)a->d, task.N = (int)a->N, task.K = (int)a->K, task.dtype = a->dtype;
    task.x = a->x, task.down = a->down, task.up = a->up, task.dy = a->dy;
    task.indices = a->indices, task.weights = a->weights, task.pre_activations = a->pre_activations;
    task.offsets = a->offsets, task.pairs = a->pairs;
    task.dx = a->dx, task.ddown = a->ddown, task.dup = a->dup, task.dweights = a->dweights;
    return task;
}

fmoe_status backward_from_args(const void *args, void *workspace, size_t workspace_bytes, backward_needs needs,
                               backward_task *task) {
    const fmoe_expert_backward_args *a = (const fmoe_expert_backward_args *)args;
    TRY(check(a));
    TRY(fmoe_check_pointer("pre_activations", a->pre_activations, a->T * a->K));
    TRY(fmoe_check_pointer("offsets", a->offsets, a->N + 1));
    *task = task_of(a);
    TRY(check_workspace(workspace, workspace_bytes, backward_lay_out(task, needs, workspace, NULL)));
    return FMOE_OK;
}

// ---- No tokens

static fmoe_status clear(const backward_task &a, void *table, cudaStream_t stream) {
    size_t bytes = (size_t)a.N * a.d * (a.wide ? sizeof(float) : fmoe_dtype_size(a.dtype));
    return table && !a.accumulate ? cuda_call("clearing a gradient", cudaMemsetAsync(table, 0, bytes, stream))
                                  : FMOE_OK;
}

fmoe_status backward_no_tokens(const backward_task &a, cudaStream_t stream) {
    TRY(cuda_call("clearing the note", cudaMemsetAsync(a.note, 0, CUDA_NOTE_BYTES, stream)));
    TRY(clear(a, a.ddown, stream));
    return clear(a, a.dup, stream);
}

// ---- The entry point

// What was not kept is made again.
static fmoe_status make_kept(const backward_task &a, backward_needs needs, void *schedule, cudaStream_t stream) {
    if (needs.schedule)
        TRY(fmoe_cuda_schedule(a.T, a.K, a.N, a.indices, (int32_t *)a.offsets, (int32_t *)a.pairs, schedule,
                               fmoe_cuda_schedule_workspace(a.T, a.K, a.N), stream));
    if (needs.pre_activations)
        TRY(backward_pre_activations(a, (float *)a.pre_activations, stream));
    return FMOE_OK;
}

extern "C" fmoe_status
fmoe_cuda_expert_backward(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype, const void *x, const void *down,
                          const void *up, const int32_t *indices, const float *weights, const float *pre_activations,
                          const int32_t *offsets, const int32_t *pairs, const void *dy, fmoe_write write,
                          fmoe_dtype gradient_dtype, void *dx, void *ddown, void *dup, float *dweights, void *workspace,
                          size_t workspace_bytes, void *stream) {
    fmoe_expert_backward_args args = {
        T,       d,     N,  K,  dtype, x,   down,    up, indices, weights, pre_activations,
        offsets, pairs, dy, dx, ddown, dup, dweights};
    TRY(check(&args));
    if (gradient_dtype != dtype && gradient_dtype != FMOE_F32)
        return fmoe_fail(FMOE_UNSUPPORTED, "gradient_dtype = %d is neither dtype = %s nor f32", (int)gradient_dtype,
                         fmoe_dtype_name(dtype));
    backward_task task = task_of(&args);
    task.accumulate = write == FMOE_ACCUMULATE, task.wide = gradient_dtype != dtype;
    backward_needs needs = {false, true, !pre_activations, !offsets};
    void *schedule = NULL;
    TRY(check_workspace(workspace, workspace_bytes, backward_lay_out(&task, needs, workspace, &schedule)));
    if (T == 0)
        return backward_no_tokens(task, (cudaStream_t)stream);
    bool overlap = fmoe_cuda_level() >= 2;
    TRY(make_kept(task, needs, schedule, (cudaStream_t)stream));
    TRY(backward_tables(task, true, overlap, (cudaStream_t)stream));
    return backward_dx(task, true, {}, overlap && dx, (cudaStream_t)stream);
}

extern "C" size_t fmoe_cuda_expert_backward_workspace(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype,
                                                      bool kept) {
    if (T < 0 || d < 1 || N < 1 || K < 1 || check_dtype(dtype) != FMOE_OK || check_sizes(T, d, N, K) != FMOE_OK)
        return 0; // fmoe_cuda_expert_backward says what is wrong
    backward_task task = {};
    task.T = (int)T, task.d = (int)d, task.N = (int)N, task.K = (int)K, task.dtype = dtype;
    backward_needs needs = {false, true, !kept, !kept};
    void *schedule;
    return backward_lay_out(&task, needs, NULL, &schedule);
}
