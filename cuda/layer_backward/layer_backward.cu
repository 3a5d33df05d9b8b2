// Rung `in-turn`: a training step of the layer without the optimiser, from the steps of every chapter.
//
//   there: router, top-k, schedule, experts, MLP; kept: the choice with its weights, the pre-activations and the
//          schedule (16 bytes a pair), and of the MLP h and its derivatives by both pre-activations (6 bytes a hidden
//          unit in 16-bit types);
//   back:  MLP, the experts' tables, top-k, router, and the experts' part of x's gradient.
//
// Both y and dx end with a gather, which adds what the others left in float32 and rounds once.
#include "layer_backward.h"

#include "../../chapters/workspace.h"
#include "../expert_backward/expert_backward.cuh"
#include "../mlp/mlp.h"
#include "../mlp_backward/mlp_backward.cuh"

typedef fmoe_layer_backward_args layer_args;

// What lies in the workspace.
typedef struct {
    float *logits;         // [2, T, n], if the caller does not want them
    int32_t *indices;      // [T, K], likewise
    float *weights;        // [T, K]
    float *dweights;       // [T, K]
    float *dlogits;        // [2, T, n]
    float *from_mlp;       // [T, d] the MLP's part of y, and then of dx
    float *dx_router;      // [T, d]
    float *drouter_gate;   // [2n, d]
    backward_task experts; // with pre_activations and the schedule
    mlp_backward_task mlp; // with the hidden units, if they are kept
    void *shared, *kept_by_experts, *schedule;
    size_t shared_bytes; // of one step at a time
} layer_plan;

static size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

static bool keeps_hidden(const layer_args *a) {
    const fmoe_layer_args *f = &a->forward;
    fmoe_mlp_backward_args mlp = {};
    mlp.T = f->T, mlp.d = f->d, mlp.I = f->I, mlp.dtype = f->dtype;
    return cuda_mlp_backward_16_bit(&mlp) && fmoe_cuda_level() >= LEVEL_HOPPER;
}

// ---- The plan

static backward_task experts_of(const layer_args *a) {
    const fmoe_layer_args *f = &a->forward;
    backward_task t = {};
    t.T = (int)f->T, t.d = (int)f->d, t.N = (int)f->N, t.K = (int)f->K, t.dtype = f->dtype;
    t.x = f->x, t.down = f->down_embed, t.up = f->up_embed, t.dy = a->dy;
    t.ddown = a->ddown_embed, t.dup = a->dup_embed;
    return t;
}

static mlp_backward_task mlp_of(const layer_args *a) {
    const fmoe_layer_args *f = &a->forward;
    mlp_backward_task t = {};
    t.T = f->T, t.d = f->d, t.I = f->I, t.dtype = f->dtype;
    t.x = f->x, t.gate = f->gate_proj, t.up = f->up_proj, t.down = f->down_proj, t.dy = a->dy;
    t.dgate = a->dgate_proj, t.dup = a->dup_proj, t.ddown = a->ddown_proj;
    return t;
}

static size_t steps_bytes(const fmoe_layer_args *f, bool kept) {
    size_t router = fmoe_cuda_router_workspace(f->training, f->T, f->d, f->n, f->dtype);
    size_t topk = fmoe_cuda_topk_workspace(f->T, f->n, f->K, FMOE_F32);
    size_t mlp = kept ? 0 : fmoe_cuda_mlp_workspace(f->T, f->d, f->I, f->dtype);
    size_t mlp_backward = fmoe_cuda_mlp_backward_workspace(f->T, f->d, f->I, f->dtype, kept);
    size_t topk_backward = fmoe_cuda_topk_backward_workspace(f->T, f->n, f->K, FMOE_F32);
    size_t router_backward = fmoe_cuda_router_backward_workspace(f->training, f->T, f->d, f->n, f->dtype);
    return larger(larger(larger(router, topk), larger(mlp, mlp_backward)), larger(topk_backward, router_backward));
}

static size_t plan_of(const layer_args *a, void *workspace, layer_plan *p) {
    const fmoe_layer_args *f = &a->forward;
    size_t used = 0, T = (size_t)f->T, pairs = T * (size_t)f->K, keys = T * 2 * (size_t)f->n, row = (size_t)f->d * 4;
    bool kept = keeps_hidden(a);
    *p = {};
    p->logits = f->router_logits ? f->router_logits : (float *)carve(workspace, &used, keys * sizeof(float));
    p->indices = f->indices ? f->indices : (int32_t *)carve(workspace, &used, pairs * sizeof(int32_t));
    p->weights = (float *)carve(workspace, &used, pairs * sizeof(float));
    p->dweights = (float *)carve(workspace, &used, pairs * sizeof(float));
    p->dlogits = (float *)carve(workspace, &used, keys * sizeof(float));
    p->from_mlp = (float *)carve(workspace, &used, T * row);
    p->dx_router = (float *)carve(workspace, &used, T * row);
    p->drouter_gate = (float *)carve(workspace, &used, 2 * (size_t)f->n * row);

    p->experts = experts_of(a);
    p->kept_by_experts = workspace ? (char *)workspace + used : NULL;
    used += backward_lay_out(&p->experts, {false, true, true, true}, p->kept_by_experts, &p->schedule);
    p->experts.indices = p->indices, p->experts.weights = p->weights;

    p->mlp = mlp_of(a);
    p->mlp.made = !kept;
    size_t hidden = kept ? T * (size_t)f->I * fmoe_dtype_size(f->dtype) : 0;
    p->mlp.h = carve(workspace, &used, hidden);
    p->mlp.h_by_p = carve(workspace, &used, hidden);
    p->mlp.h_by_q = carve(workspace, &used, hidden);
    p->shared_bytes = steps_bytes(f, kept);
    p->shared = carve(workspace, &used, p->shared_bytes);
    return used;
}

// ---- There

static fmoe_status choose(const fmoe_layer_args *f, const layer_plan &p, cudaStream_t stream) {
    TRY(fmoe_cuda_router(f->training, f->T, f->d, f->n, f->dtype, f->x, f->router_gate, f->running_mean, f->running_var,
                         p.logits, NULL, p.shared, p.shared_bytes, stream));
    TRY(fmoe_cuda_topk(f->T, f->n, f->K, f->norm_topk_prob, FMOE_F32, p.logits, p.indices, f->scores, p.weights,
                       p.shared, p.shared_bytes, stream));
    return fmoe_cuda_schedule(f->T, f->K, f->N, p.indices, (int32_t *)p.experts.offsets, (int32_t *)p.experts.pairs,
                              p.schedule, fmoe_cuda_schedule_workspace(f->T, f->K, f->N), stream);
}

static fmoe_status mlp_forward(const fmoe_layer_args *f, const layer_plan &p, cudaStream_t stream) {
    if (!p.mlp.made)
        return mlp_forward_keeping(p.mlp, p.from_mlp, stream);
    fmoe_mlp_args mlp = {f->T, f->d, f->I, f->dtype, f->x, f->gate_proj, f->up_proj, f->down_proj, f->y};
    mlp_join join = {};
    join.sum = p.from_mlp;
    return cuda_mlp_into(&mlp, &join, p.shared, p.shared_bytes, stream);
}

// The forward step's phases, its second as dx's: rows of `up` gathered with the activations, which lie where ds will.
static fmoe_status experts_forward(const layer_plan &p, void *y, bool overlap, cudaStream_t stream) {
    backward_task gather = p.experts;
    TRY(backward_pre_activations(p.experts, (float *)p.experts.pre_activations, stream));
    gather.down = p.experts.up, gather.dx = y;
    return backward_dx(gather, true, {p.from_mlp, NULL}, overlap, stream);
}

static fmoe_status forward(const layer_args *a, const layer_plan &p, bool overlap, cudaStream_t stream) {
    TRY(choose(&a->forward, p, stream));
    TRY(mlp_forward(&a->forward, p, stream));
    return experts_forward(p, a->forward.y, overlap, stream);
}

// ---- And back

static fmoe_status mlp_back(layer_plan *p, cudaStream_t stream) {
    mlp_backward_task t = p->mlp;
    t.dx = p->from_mlp;
    t.wide_dx = t.dtype != FMOE_F32;
    return t.made ? mlp_backward_tiles(&t, p->shared, p->shared_bytes, stream)
                  : mlp_backward_wgmma(&t, p->shared, p->shared_bytes, stream);
}

static fmoe_status router_back(const fmoe_layer_args *f, const layer_plan &p, cudaStream_t stream) {
    TRY(fmoe_cuda_topk_backward(f->T, f->n, f->K, f->norm_topk_prob, FMOE_F32, p.logits, p.indices, p.dweights, NULL,
                                p.dlogits, p.shared, p.shared_bytes, stream));
    return fmoe_cuda_router_backward(f->training, f->T, f->d, f->n, f->dtype, f->x, f->router_gate, f->running_mean,
                                     f->running_var, p.dlogits, FMOE_OVERWRITE, FMOE_F32, p.dx_router, p.drouter_gate,
                                     p.shared, p.shared_bytes, stream);
}

#define ROUND_THREADS 256

// Launch: a thread an element, 256 a block. Shared memory: none. Traffic: a float32 number in, a rounded one out.
template <typename E>
static __global__ void __launch_bounds__(ROUND_THREADS) round_kernel(int64_t count, const float *from, E *to) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count)
        to[i] = from_f32<E>(from[i]);
}

// [back]
// The tables' gradients come before the router's, whose way back begins with dweights; dx comes last.
static fmoe_status backward(const layer_args *a, layer_plan *p, bool overlap, cudaStream_t stream) {
    const fmoe_layer_args *f = &a->forward;
    int64_t of_gate = 2 * f->n * f->d;
    backward_task experts = p->experts;
    experts.dweights = p->dweights, experts.dx = a->dx;
    TRY(mlp_back(p, stream));
    TRY(backward_tables(experts, true, overlap, stream));
    TRY(router_back(f, *p, stream));
    WITH_DTYPE(f->dtype, E,
               round_kernel<E><<<(unsigned)ceil_div(of_gate, ROUND_THREADS), ROUND_THREADS, 0, stream>>>(
                   of_gate, p->drouter_gate, (E *)a->drouter_gate));
    TRY(launched("round_kernel"));
    return backward_dx(experts, true, {p->from_mlp, p->dx_router}, false, stream);
}
// [/back]

// ---- The rung

static fmoe_status check(const layer_args *a) {
    const fmoe_layer_args *f = &a->forward;
    TRY(fmoe_check_tokens(f->T));
    TRY(fmoe_check_size("intermediate_size", f->I));
    TRY(fmoe_check_pointer("y", f->y, f->T * f->d));
    TRY(fmoe_check_pointer("dx", a->dx, f->T * f->d));
    TRY(fmoe_check_pointer("drouter_gate", a->drouter_gate, 2 * f->n * f->d));
    return fmoe_check_pointer("dy", a->dy, f->T * f->d);
}

static fmoe_status no_tokens(const layer_args *a, cudaStream_t stream) {
    const fmoe_layer_args *f = &a->forward;
    size_t row = (size_t)f->d * fmoe_dtype_size(f->dtype);
    TRY(cuda_call("drouter_gate", cudaMemsetAsync(a->drouter_gate, 0, 2 * (size_t)f->n * row, stream)));
    void *tables[] = {a->ddown_embed, a->dup_embed}, *weights[] = {a->dgate_proj, a->dup_proj, a->ddown_proj};
    for (void *table : tables)
        TRY(cuda_call("clearing a table's gradient", cudaMemsetAsync(table, 0, (size_t)f->N * row, stream)));
    for (void *weight : weights)
        TRY(cuda_call("clearing a weight's gradient", cudaMemsetAsync(weight, 0, (size_t)f->I * row, stream)));
    return FMOE_OK;
}

extern "C" size_t cuda_layer_backward_bytes(const void *args) {
    layer_plan plan;
    return plan_of((const layer_args *)args, NULL, &plan);
}

extern "C" fmoe_status cuda_layer_backward_in_turn(const void *args, void *workspace, size_t workspace_bytes,
                                                   void *stream) {
    const layer_args *a = (const layer_args *)args;
    bool overlap = fmoe_cuda_level() >= LEVEL_HOPPER;
    layer_plan plan;
    TRY(check(a));
    if (a->forward.T == 0)
        return no_tokens(a, (cudaStream_t)stream);
    TRY(check_workspace(workspace, workspace_bytes, plan_of(a, workspace, &plan)));
    TRY(forward(a, plan, overlap, (cudaStream_t)stream));
    return backward(a, &plan, overlap, (cudaStream_t)stream);
}
