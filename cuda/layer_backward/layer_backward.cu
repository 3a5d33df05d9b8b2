// A training step of the layer without the optimiser, from the steps of every chapter: the public functions, and rung
// `in-turn`, which calls one after the other.
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
#include "../layer/layer.cuh"
#include "../mlp/mlp.h"
#include "../mlp_backward/mlp_backward.cuh"
#include "../router/backward.cuh"
#include "../topk/topk.cuh"

// A call of either function, with the sizes and pointers of both; what a function has not been given is NULL.
typedef struct {
    fmoe_layer_args f; // router_logits and indices are in `kept`
    fmoe_cuda_kept kept;
    const void *dy;
    fmoe_cuda_gradients to;
    fmoe_dtype gradient_dtype;
    fmoe_write write;
} layer_call;

static size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

// ---- What is kept

// Whether the way back wants the MLP's hidden units, and the way there can leave them.
static bool keeps_hidden(const fmoe_layer_args *f) {
    fmoe_mlp_backward_args mlp = {};
    mlp.T = f->T, mlp.d = f->d, mlp.I = f->I, mlp.dtype = f->dtype;
    return cuda_mlp_backward_16_bit(&mlp) && fmoe_cuda_level() >= LEVEL_HOPPER;
}

// [keep]
static size_t keep(const fmoe_layer_args *f, void *memory, fmoe_cuda_kept *kept) {
    size_t used = 0, T = (size_t)f->T, pairs = T * (size_t)f->K * sizeof(float);
    size_t hidden = T * (size_t)f->I * fmoe_dtype_size(f->dtype);
    kept->router_logits = (float *)carve(memory, &used, 2 * T * (size_t)f->n * sizeof(float));
    kept->indices = (int32_t *)carve(memory, &used, pairs);
    kept->weights = (float *)carve(memory, &used, pairs);
    kept->pre_activations = (float *)carve(memory, &used, pairs);
    kept->offsets = (int32_t *)carve(memory, &used, (size_t)(f->N + 1) * sizeof(int32_t));
    kept->pairs = (int32_t *)carve(memory, &used, pairs);
    kept->h = kept->h_by_p = kept->h_by_q = NULL;
    if (keeps_hidden(f)) {
        kept->h = carve(memory, &used, hidden);
        kept->h_by_p = carve(memory, &used, hidden);
        kept->h_by_q = carve(memory, &used, hidden);
    }
    return used;
}
// [/keep]

// ---- Tasks

static backward_task experts_of(const layer_call &c) {
    const fmoe_layer_args *f = &c.f;
    backward_task t = {};
    t.T = (int)f->T, t.d = (int)f->d, t.N = (int)f->N, t.K = (int)f->K, t.dtype = f->dtype;
    t.x = f->x, t.down = f->down_embed, t.up = f->up_embed, t.dy = c.dy;
    t.indices = c.kept.indices, t.weights = c.kept.weights;
    t.accumulate = c.write == FMOE_ACCUMULATE, t.wide = c.gradient_dtype != f->dtype;
    t.dx = c.to.dx, t.ddown = c.to.down_embed, t.dup = c.to.up_embed;
    return t;
}

static mlp_backward_task mlp_of(const layer_call &c) {
    const fmoe_layer_args *f = &c.f;
    mlp_backward_task t = {};
    t.T = f->T, t.d = f->d, t.I = f->I, t.dtype = f->dtype;
    t.x = f->x, t.gate = f->gate_proj, t.up = f->up_proj, t.down = f->down_proj, t.dy = c.dy;
    t.h = c.kept.h, t.h_by_p = c.kept.h_by_p, t.h_by_q = c.kept.h_by_q, t.made = !c.kept.h;
    t.accumulate = c.write == FMOE_ACCUMULATE, t.wide = c.gradient_dtype != f->dtype;
    t.dgate = c.to.gate_proj, t.dup = c.to.up_proj, t.ddown = c.to.down_proj;
    return t;
}

// ---- There

typedef struct {
    float *weights, *from_mlp; // [T, K], [T, d]: the MLP's part of y
    backward_task experts;     // with the pre-activations and, where ds is on the way back, the activations
    void *shared;              // of one step at a time
    size_t shared_bytes;
} plan_there;

static size_t plan_forward(const layer_call &c, void *workspace, plan_there *p) {
    const fmoe_layer_args *f = &c.f;
    size_t used = 0, T = (size_t)f->T, pairs = T * (size_t)f->K;
    size_t router = fmoe_cuda_router_workspace(f->training, f->T, f->d, f->n, f->dtype);
    size_t topk = fmoe_cuda_topk_workspace(f->T, f->n, f->K, FMOE_F32);
    size_t schedule = c.kept.pairs ? fmoe_cuda_schedule_workspace(f->T, f->K, f->N) : 0;
    size_t mlp = c.kept.h ? 0 : fmoe_cuda_mlp_workspace(f->T, f->d, f->I, f->dtype);
    *p = {};
    p->experts = experts_of(c);
    used += backward_lay_out(&p->experts, {false, false, true, false}, workspace, NULL);
    if (c.kept.pre_activations)
        p->experts.pre_activations = c.kept.pre_activations;
    float *weights = (float *)carve(workspace, &used, c.kept.weights ? 0 : pairs * sizeof(float));
    p->weights = c.kept.weights ? c.kept.weights : weights;
    p->experts.weights = p->weights;
    p->from_mlp = (float *)carve(workspace, &used, T * (size_t)f->d * sizeof(float));
    p->shared_bytes = larger(larger(router, topk), larger(schedule, mlp));
    p->shared = carve(workspace, &used, p->shared_bytes);
    return used;
}

static fmoe_status choose(const layer_call &c, const plan_there &p, cudaStream_t stream) {
    const fmoe_layer_args *f = &c.f;
    const fmoe_cuda_kept *k = &c.kept;
    TRY(fmoe_cuda_router(f->training, f->T, f->d, f->n, f->dtype, f->x, f->router_gate, f->running_mean, f->running_var,
                         k->router_logits, NULL, p.shared, p.shared_bytes, stream));
    TRY(fmoe_cuda_topk(f->T, f->n, f->K, f->norm_topk_prob, FMOE_F32, k->router_logits, k->indices, f->scores,
                       p.weights, p.shared, p.shared_bytes, stream));
    if (!k->pairs)
        return FMOE_OK;
    return fmoe_cuda_schedule(f->T, f->K, f->N, k->indices, k->offsets, k->pairs, p.shared, p.shared_bytes, stream);
}

static fmoe_status mlp_forward(const layer_call &c, const plan_there &p, cudaStream_t stream) {
    const fmoe_layer_args *f = &c.f;
    if (c.kept.h)
        return mlp_forward_keeping(mlp_of(c), p.from_mlp, stream);
    fmoe_mlp_args mlp = {f->T, f->d, f->I, f->dtype, f->x, f->gate_proj, f->up_proj, f->down_proj, f->y};
    mlp_join join = {};
    join.sum = p.from_mlp;
    return cuda_mlp_into(&mlp, &join, p.shared, p.shared_bytes, stream);
}

// The forward step's phases, its second as dx's: rows of `up` gathered with the activations, which lie where ds will.
static fmoe_status experts_forward(const layer_call &c, const plan_there &p, cudaStream_t stream) {
    backward_task gather = p.experts;
    TRY(backward_pre_activations(p.experts, (float *)p.experts.pre_activations, stream));
    gather.down = p.experts.up, gather.dx = c.f.y, gather.wide = false;
    return backward_dx(gather, true, {p.from_mlp, NULL}, fmoe_cuda_level() >= LEVEL_HOPPER, stream);
}

// ---- And back

typedef struct {
    backward_task experts;     // first in the workspace, where fmoe_cuda_check looks for the note
    float *weights, *dweights; // [T, K]
    float *dlogits;            // [2, T, n]
    float *from_mlp;           // [T, d] the MLP's part of dx
    float *from_router;        // [T, d] and the router's
    void *schedule, *shared;   // `shared` is of one step at a time
    size_t shared_bytes;
} plan_back;

static size_t plan_backward(const layer_call &c, void *workspace, plan_back *p) {
    const fmoe_layer_args *f = &c.f;
    const fmoe_cuda_kept *k = &c.kept;
    size_t used = 0, T = (size_t)f->T, pairs = T * (size_t)f->K * sizeof(float), rows = T * (size_t)f->d * 4;
    size_t mlp = fmoe_cuda_mlp_backward_workspace(f->T, f->d, f->I, f->dtype, k->h != NULL);
    size_t topk = fmoe_cuda_topk_backward_workspace(f->T, f->n, f->K, FMOE_F32);
    size_t router = fmoe_cuda_router_backward_workspace(f->training, f->T, f->d, f->n, f->dtype);
    *p = {};
    p->experts = experts_of(c);
    used += backward_lay_out(&p->experts, {false, true, !k->pre_activations, !k->pairs}, workspace, &p->schedule);
    if (k->pre_activations)
        p->experts.pre_activations = k->pre_activations;
    if (k->pairs)
        p->experts.offsets = k->offsets, p->experts.pairs = k->pairs;
    float *weights = (float *)carve(workspace, &used, k->weights ? 0 : pairs);
    p->weights = k->weights ? k->weights : weights;
    p->dweights = (float *)carve(workspace, &used, pairs);
    p->experts.weights = p->weights, p->experts.dweights = p->dweights;
    p->dlogits = (float *)carve(workspace, &used, T * 2 * (size_t)f->n * sizeof(float));
    p->from_mlp = (float *)carve(workspace, &used, rows);
    p->from_router = (float *)carve(workspace, &used, rows);
    p->shared_bytes = larger(mlp, larger(topk, router));
    p->shared = carve(workspace, &used, p->shared_bytes);
    return used;
}

// ---- What was not kept

#define WEIGHTS_TOKENS 8

// Σ exp(z − best) of a side, and its largest logit.
static __device__ float2 best_and_sum(int n, const float *z) {
    int lane = threadIdx.x % WARP;
    float best = -INFINITY, sum = 0;
    for (int i = lane; i < n; i += WARP)
        best = fmaxf(best, z[i]);
    best = warp_max(best);
    for (int i = lane; i < n; i += WARP)
        sum += expf(z[i] - best);
    return make_float2(best, warp_sum(sum));
}

// The routing weights of a choice: a product of two softmax probabilities a pair, divided by their sum if asked for.
// Launch: a warp a token, 8 a block. Shared memory: none. Traffic: a token's logits, the second time from a cache, and
// 8 bytes a pair. [weights]
static __global__ void __launch_bounds__(WEIGHTS_TOKENS *WARP)
    weights_kernel(int64_t T, int n, int K, bool norm, const float *logits, const int32_t *indices, float *weights) {
    int64_t t = (int64_t)blockIdx.x * WEIGHTS_TOKENS + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    if (t >= T)
        return;
    const float *x = logits + t * n, *y = logits + (T + t) * n;
    float2 of_x = best_and_sum(n, x), of_y = best_and_sum(n, y);
    float total = 0;
    for (int k = lane; k < K; k += WARP) {
        int32_t pair = indices[t * K + k];
        bool inside = (uint32_t)pair < (uint32_t)(n * n);
        float weight = inside ? expf(x[pair / n] - of_x.x + (y[pair % n] - of_y.x)) / (of_x.y * of_y.y) : 0;
        weights[t * K + k] = weight;
        total += weight;
    }
    total = warp_sum(total);
    for (int k = lane; k < K && norm; k += WARP)
        weights[t * K + k] /= total;
}
// [/weights]

static fmoe_status make_kept(const layer_call &c, const plan_back &p, cudaStream_t stream) {
    const fmoe_layer_args *f = &c.f;
    const fmoe_cuda_kept *k = &c.kept;
    if (!k->weights) {
        weights_kernel<<<(unsigned)ceil_div(f->T, WEIGHTS_TOKENS), WEIGHTS_TOKENS * WARP, 0, stream>>>(
            f->T, (int)f->n, (int)f->K, f->norm_topk_prob, k->router_logits, k->indices, p.weights);
        TRY(launched("weights_kernel"));
    }
    if (!k->pairs)
        TRY(fmoe_cuda_schedule(f->T, f->K, f->N, k->indices, (int32_t *)p.experts.offsets, (int32_t *)p.experts.pairs,
                               p.schedule, fmoe_cuda_schedule_workspace(f->T, f->K, f->N), stream));
    if (!k->pre_activations)
        TRY(backward_pre_activations(p.experts, (float *)p.experts.pre_activations, stream));
    return FMOE_OK;
}

// ---- The way back

static fmoe_status mlp_back(const layer_call &c, const plan_back &p, cudaStream_t stream) {
    const fmoe_layer_args *f = &c.f;
    mlp_backward_task t = mlp_of(c);
    t.dx = c.to.dx ? p.from_mlp : NULL;
    t.wide_dx = t.dtype != FMOE_F32;
    if (!t.dx && !t.dgate && !t.dup && !t.ddown)
        return FMOE_OK;
    return keeps_hidden(f) ? mlp_backward_wgmma(&t, p.shared, p.shared_bytes, stream)
                           : mlp_backward_tiles(&t, p.shared, p.shared_bytes, stream);
}

static fmoe_status router_back(const layer_call &c, const plan_back &p, cudaStream_t stream) {
    const fmoe_layer_args *f = &c.f;
    if (!c.to.dx && !c.to.router_gate)
        return FMOE_OK;
    TRY(fmoe_cuda_topk_backward(f->T, f->n, f->K, f->norm_topk_prob, FMOE_F32, c.kept.router_logits, c.kept.indices,
                                p.dweights, NULL, p.dlogits, p.shared, p.shared_bytes, stream));
    fmoe_router_backward_args router = {};
    router.T = f->T, router.d = f->d, router.n = f->n, router.training = f->training, router.dtype = f->dtype;
    router.x = f->x, router.gate = f->router_gate, router.dlogits = p.dlogits;
    router.running_mean = f->running_mean, router.running_var = f->running_var;
    router.dx = c.to.dx ? p.from_router : NULL, router.dgate = c.to.router_gate;
    return router_backward(&router, FMOE_F32, c.write, c.gradient_dtype, p.shared, p.shared_bytes, stream);
}

// [back]
// The tables' gradients come before the router's, whose way back begins with dweights; dx, and the note, come last.
static fmoe_status backward(const layer_call &c, const plan_back &p, cudaStream_t stream) {
    TRY(mlp_back(c, p, stream));
    if (c.to.dx || c.to.router_gate || c.to.down_embed || c.to.up_embed) {
        TRY(make_kept(c, p, stream));
        TRY(backward_tables(p.experts, true, fmoe_cuda_level() >= LEVEL_HOPPER, stream));
        TRY(router_back(c, p, stream));
    }
    return backward_dx(p.experts, true, {p.from_mlp, p.from_router}, false, stream);
}
// [/back]

// ---- Checks

static layer_call call_of(const fmoe_config *config, const fmoe_cuda_weights *w, bool training, int64_t T,
                          fmoe_dtype dtype, const void *x, const fmoe_cuda_kept *kept) {
    layer_call c = {};
    fmoe_layer_args *f = &c.f;
    f->T = T, f->d = config->hidden_size, f->I = config->intermediate_size, f->N = config->num_experts;
    f->K = config->num_experts_per_tok, f->n = f->N > 0 ? fmoe_num_keys(f->N) : 0;
    f->training = training, f->norm_topk_prob = config->norm_topk_prob, f->dtype = dtype, f->x = x;
    c.gradient_dtype = dtype;
    if (w) {
        f->router_gate = w->router_gate, f->down_embed = w->down_embed, f->up_embed = w->up_embed;
        f->gate_proj = w->gate_proj, f->up_proj = w->up_proj, f->down_proj = w->down_proj;
        f->running_mean = w->running_mean, f->running_var = w->running_var;
    }
    if (kept)
        c.kept = *kept;
    return c;
}

static fmoe_status check_kept(const layer_call &c) {
    const fmoe_layer_args *f = &c.f;
    const fmoe_cuda_kept *k = &c.kept;
    TRY(fmoe_check_pointer("router_logits", k->router_logits, 2 * f->T * f->n));
    TRY(fmoe_check_pointer("indices", k->indices, f->T * f->K));
    if (f->T == 0)
        return FMOE_OK;
    if (!k->offsets != !k->pairs)
        return fmoe_fail(FMOE_NULL_POINTER, "%s is NULL and %s is not", k->offsets ? "pairs" : "offsets",
                         k->offsets ? "offsets" : "pairs");
    if (!k->h != !k->h_by_p || !k->h != !k->h_by_q)
        return fmoe_fail(FMOE_NULL_POINTER, "of h, h_by_p and h_by_q some are NULL and some are not");
    return FMOE_OK;
}

// In the order of the layer's own checks. On the way back x, which has y's shape, is given for y.
static fmoe_status check(const layer_call &c, const void *y, bool reads_running) {
    fmoe_layer_args f = c.f;
    topk_task task = {};
    f.y = (void *)y;
    if (!reads_running) // any pointers will do
        f.running_mean = f.running_var = (float *)&task;
    TRY(layer_check(&f, &task, 0, 0));
    TRY(check_kept(c));
    if (f.T == 0)
        return FMOE_OK;
    TRY(topk_make(f.T, f.n, f.K, f.norm_topk_prob, FMOE_F32, c.kept.router_logits, c.kept.indices, NULL, NULL, &task));
    return fmoe_check_pairs(f.T, f.K);
}

static fmoe_status check_backward(const layer_call &c) {
    TRY(check(c, c.f.x, !c.f.training && c.f.T > 0));
    TRY(fmoe_check_pointer("dy", c.dy, c.f.T * c.f.d));
    if (c.gradient_dtype != c.f.dtype && c.gradient_dtype != FMOE_F32)
        return fmoe_fail(FMOE_UNSUPPORTED, "gradient_dtype = %d is neither dtype = %s nor f32", (int)c.gradient_dtype,
                         fmoe_dtype_name(c.f.dtype));
    return FMOE_OK;
}

static fmoe_status no_tokens(const layer_call &c, cudaStream_t stream) {
    size_t row = (size_t)c.f.d * fmoe_dtype_size(c.gradient_dtype);
    const struct {
        void *gradient;
        int64_t rows;
    } all[] = {{c.to.router_gate, 2 * c.f.n}, {c.to.down_embed, c.f.N}, {c.to.up_embed, c.f.N},
               {c.to.gate_proj, c.f.I},       {c.to.up_proj, c.f.I},    {c.to.down_proj, c.f.I}};
    for (auto &one : all)
        if (one.gradient && c.write == FMOE_OVERWRITE)
            TRY(cuda_call("clearing a gradient", cudaMemsetAsync(one.gradient, 0, (size_t)one.rows * row, stream)));
    return FMOE_OK;
}

// ---- The functions

static fmoe_status run_forward(const layer_call &c, void *workspace, size_t bytes, cudaStream_t stream) {
    plan_there p;
    TRY(check(c, c.f.y, true));
    if (c.kept.h && !keeps_hidden(&c.f))
        return fmoe_fail(FMOE_UNSUPPORTED, "h is not kept for dtype = %s, hidden_size = %lld, intermediate_size = %lld",
                         fmoe_dtype_name(c.f.dtype), (long long)c.f.d, (long long)c.f.I);
    if (c.f.T == 0)
        return FMOE_OK;
    TRY(check_workspace(workspace, bytes, plan_forward(c, workspace, &p)));
    TRY(choose(c, p, stream));
    TRY(mlp_forward(c, p, stream));
    return experts_forward(c, p, stream);
}

static fmoe_status run_backward(const layer_call &c, void *workspace, size_t bytes, cudaStream_t stream) {
    plan_back p;
    TRY(check_backward(c));
    TRY(check_workspace(workspace, bytes, plan_backward(c, workspace, &p)));
    if (c.f.T > 0)
        return backward(c, p, stream);
    TRY(cuda_call("clearing the note", cudaMemsetAsync(p.experts.note, 0, CUDA_NOTE_BYTES, stream)));
    return no_tokens(c, stream);
}

extern "C" size_t fmoe_cuda_layer_keep(const fmoe_config *config, int64_t T, fmoe_dtype dtype, void *memory,
                                       fmoe_cuda_kept *kept) {
    fmoe_cuda_kept unwanted;
    if (!config || !kept)
        kept = &unwanted;
    *kept = {};
    if (fmoe_cuda_layer_workspace(config, false, T, dtype) == 0) // sizes that the calls refuse
        return 0;
    layer_call c = call_of(config, NULL, false, T, dtype, NULL, NULL);
    return keep(&c.f, memory, kept);
}

extern "C" fmoe_status fmoe_cuda_layer_forward_keeping(const fmoe_config *config, const fmoe_cuda_weights *weights,
                                                       bool training, int64_t T, fmoe_dtype dtype, const void *x,
                                                       void *y, float *scores, const fmoe_cuda_kept *kept,
                                                       void *workspace, size_t workspace_bytes, void *stream) {
    TRY(fmoe_check_pointer("config", config, 1));
    TRY(fmoe_check_pointer("weights", weights, 1));
    TRY(fmoe_check_pointer("kept", kept, 1));
    layer_call c = call_of(config, weights, training, T, dtype, x, kept);
    c.f.y = y, c.f.scores = scores;
    return run_forward(c, workspace, workspace_bytes, (cudaStream_t)stream);
}

extern "C" size_t fmoe_cuda_layer_forward_keeping_workspace(const fmoe_config *config, bool training, int64_t T,
                                                            fmoe_dtype dtype, const fmoe_cuda_kept *kept) {
    plan_there p;
    if (!kept || fmoe_cuda_layer_workspace(config, training, T, dtype) == 0)
        return 0;
    return plan_forward(call_of(config, NULL, training, T, dtype, NULL, kept), NULL, &p);
}

extern "C" fmoe_status fmoe_cuda_layer_backward(const fmoe_config *config, const fmoe_cuda_weights *weights,
                                                bool training, int64_t T, fmoe_dtype dtype, const void *x,
                                                const fmoe_cuda_kept *kept, const void *dy, fmoe_write write,
                                                fmoe_dtype gradient_dtype, const fmoe_cuda_gradients *gradients,
                                                void *workspace, size_t workspace_bytes, void *stream) {
    TRY(fmoe_check_pointer("config", config, 1));
    TRY(fmoe_check_pointer("weights", weights, 1));
    TRY(fmoe_check_pointer("kept", kept, 1));
    TRY(fmoe_check_pointer("gradients", gradients, 1));
    layer_call c = call_of(config, weights, training, T, dtype, x, kept);
    c.dy = dy, c.write = write, c.gradient_dtype = gradient_dtype, c.to = *gradients;
    return run_backward(c, workspace, workspace_bytes, (cudaStream_t)stream);
}

extern "C" size_t fmoe_cuda_layer_backward_workspace(const fmoe_config *config, bool training, int64_t T,
                                                     fmoe_dtype dtype, const fmoe_cuda_kept *kept) {
    plan_back p;
    if (!kept || fmoe_cuda_layer_workspace(config, training, T, dtype) == 0)
        return 0;
    return plan_backward(call_of(config, NULL, training, T, dtype, NULL, kept), NULL, &p);
}

// ---- The rung

// What is kept, and behind it the workspace of either function.
static layer_call step_of(const fmoe_layer_backward_args *a, void *workspace, size_t *kept_bytes) {
    layer_call c = {};
    c.f = a->forward;
    *kept_bytes = keep(&c.f, workspace, &c.kept);
    if (c.f.router_logits)
        c.kept.router_logits = c.f.router_logits;
    if (c.f.indices)
        c.kept.indices = c.f.indices;
    c.dy = a->dy, c.gradient_dtype = c.f.dtype, c.write = FMOE_OVERWRITE;
    c.to = {a->dx, a->drouter_gate, a->ddown_embed, a->dup_embed, a->dgate_proj, a->dup_proj, a->ddown_proj};
    return c;
}

extern "C" size_t cuda_layer_backward_bytes(const void *args) {
    size_t kept;
    plan_there there;
    plan_back back;
    fmoe_layer_backward_args a = *(const fmoe_layer_backward_args *)args;
    layer_call c = step_of(&a, (void *)256, &kept); // which members are NULL counts, not where they point
    return kept + larger(plan_forward(c, NULL, &there), plan_backward(c, NULL, &back));
}

extern "C" fmoe_status cuda_layer_backward_in_turn(const void *args, void *workspace, size_t workspace_bytes,
                                                   void *stream) {
    size_t kept, needed = cuda_layer_backward_bytes(args);
    layer_call c = step_of((const fmoe_layer_backward_args *)args, workspace, &kept);
    TRY(check_workspace(workspace, workspace_bytes, needed));
    TRY(run_forward(c, (char *)workspace + kept, workspace_bytes - kept, (cudaStream_t)stream));
    return run_backward(c, (char *)workspace + kept, workspace_bytes - kept, (cudaStream_t)stream);
}
