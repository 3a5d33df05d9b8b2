// The layer's checks, its workspace, and its two branches, one after the other or side by side.
#include "../../chapters/workspace.h"
#include "../expert/expert.cuh"
#include "../mlp/mlp.cuh"
#include "../topk/topk.cuh"
#include "layer.cuh"

#include <new>

// ---- Workspace ----

layer_scratch layer_carve(const fmoe_layer_args *a, void *workspace, size_t *used) {
    layer_scratch s;
    size_t T = (size_t)a->T, K = (size_t)a->K, n = (size_t)a->n, d = (size_t)a->d;
    s.router_bytes = fmoe_cuda_router_workspace(a->training, a->T, a->d, a->n, a->dtype);
    s.topk_bytes = fmoe_cuda_topk_workspace(a->T, a->n, a->K, FMOE_F32);
    s.experts_bytes = routed_experts_bytes(a);
    s.mlp_bytes = fmoe_cuda_mlp_workspace(a->T, a->d, a->I, a->dtype);
    s.logits = (float *)carve(workspace, used, a->router_logits ? 0 : 2 * T * n * sizeof(float));
    s.indices = (int32_t *)carve(workspace, used, a->indices ? 0 : T * K * sizeof(int32_t));
    s.weights = (float *)carve(workspace, used, T * K * sizeof(float));
    s.routed = (float *)carve(workspace, used, T * d * sizeof(float));
    s.shared = (float *)carve(workspace, used, T * d * sizeof(float));
    s.router = carve(workspace, used, s.router_bytes);
    s.topk = carve(workspace, used, s.topk_bytes);
    s.experts = carve(workspace, used, s.experts_bytes);
    s.mlp = carve(workspace, used, s.mlp_bytes);
    if (a->router_logits)
        s.logits = a->router_logits;
    if (a->indices)
        s.indices = a->indices;
    return s;
}

// ---- Checks ----

static fmoe_status check_sizes(const fmoe_layer_args *a) {
    TRY(fmoe_check_tokens(a->T));
    TRY(fmoe_check_size("hidden_size", a->d));
    TRY(fmoe_check_size("intermediate_size", a->I));
    TRY(fmoe_check_experts(a->N));
    TRY(fmoe_check_topk(a->K, "n²", a->n * a->n));
    TRY(check_dtype(a->dtype));
    TRY(fmoe_check_shape("tokens", a->T, "hidden_size", a->d));
    TRY(fmoe_check_shape("tokens", a->T, "intermediate_size", a->I));
    TRY(fmoe_check_shape("tokens", a->T, "num_experts_per_tok", a->K));
    TRY(fmoe_check_shape("tokens", a->T, "num_keys", a->n));
    TRY(fmoe_check_shape("num_experts", a->N, "hidden_size", a->d));
    TRY(fmoe_check_shape("intermediate_size", a->I, "hidden_size", a->d));
    if (a->training && a->T == 1)
        return fmoe_fail(FMOE_BATCH_OF_ONE, "tokens = 1 is below 2, which the unbiased variance needs in training");
    return FMOE_OK;
}

static fmoe_status check_pointers(const fmoe_layer_args *a) {
    TRY(fmoe_check_pointer("router_gate.weight", a->router_gate, 2 * a->n * a->d));
    TRY(fmoe_check_pointer("down_embed.weight", a->down_embed, a->N * a->d));
    TRY(fmoe_check_pointer("up_embed.weight", a->up_embed, a->N * a->d));
    TRY(fmoe_check_pointer("gate_proj.weight", a->gate_proj, a->I * a->d));
    TRY(fmoe_check_pointer("up_proj.weight", a->up_proj, a->I * a->d));
    TRY(fmoe_check_pointer("down_proj.weight", a->down_proj, a->d * a->I));
    TRY(fmoe_check_pointer("router_norm.running_mean", a->running_mean, a->d));
    TRY(fmoe_check_pointer("router_norm.running_var", a->running_var, a->d));
    TRY(fmoe_check_pointer("x", a->x, a->T * a->d));
    return fmoe_check_pointer("y", a->y, a->T * a->d);
}

// The steps' own limits, before the first of them moves the running buffers.
static fmoe_status check_steps(const fmoe_layer_args *a, const layer_scratch &s) {
    topk_task task;
    TRY(topk_make(a->T, a->n, a->K, a->norm_topk_prob, FMOE_F32, s.logits, s.indices, a->scores, s.weights, &task));
    return expert_check(a->T, a->d, a->N, a->K, a->dtype, a->x, a->down_embed, a->up_embed, s.indices, s.weights,
                        s.routed);
}

fmoe_status layer_check(const fmoe_layer_args *a, const void *workspace, size_t bytes, size_t needed) {
    TRY(check_sizes(a));
    TRY(check_pointers(a));
    return a->T == 0 ? FMOE_OK : check_workspace(workspace, bytes, needed);
}

// ---- In turn ----

// [choose]
// The steps of chapters 2 and 3. Logits stay float32, and the routing weights go from the top-k to the experts.
static fmoe_status find_logits(const fmoe_layer_args *a, const layer_scratch &s, cudaStream_t stream) {
    return fmoe_cuda_router(a->training, a->T, a->d, a->n, a->dtype, a->x, a->router_gate, a->running_mean,
                            a->running_var, s.logits, NULL, s.router, s.router_bytes, stream);
}

static fmoe_status find_best(const fmoe_layer_args *a, const layer_scratch &s, cudaStream_t stream) {
    return fmoe_cuda_topk(a->T, a->n, a->K, a->norm_topk_prob, FMOE_F32, s.logits, s.indices, a->scores, s.weights,
                          s.topk, s.topk_bytes, stream);
}

static fmoe_status choose_experts(const fmoe_layer_args *a, const layer_scratch &s, cudaStream_t stream) {
    TRY(find_logits(a, s, stream));
    return find_best(a, s, stream);
}
// [/choose]

// The same with the layer's own router.
static fmoe_status choose_for_few(const fmoe_layer_args *a, const layer_scratch &s, cudaStream_t stream) {
    TRY(few_logits(a, s, stream));
    return find_best(a, s, stream);
}

// All experts, on all multiprocessors.
static fmoe_status experts(const fmoe_layer_args *a, const layer_scratch &s, cudaStream_t stream) {
    int columns, items = routed_items(a, false, &columns);
    return routed_experts(a, s, {false, 0, 0, items, NULL}, stream);
}

static fmoe_mlp_args mlp_args_of(const fmoe_layer_args *a) {
    return {a->T, a->d, a->I, a->dtype, a->x, a->gate_proj, a->up_proj, a->down_proj, a->y};
}

static fmoe_status mlp(const fmoe_layer_args *a, const layer_scratch &s, mlp_join join, cudaStream_t stream) {
    fmoe_mlp_args args = mlp_args_of(a);
    return cuda_mlp_into(&args, &join, s.mlp, s.mlp_bytes, stream);
}

// [in-turn]
// The MLP's last store adds what the experts left.
static fmoe_status in_turn(const fmoe_layer_args *a, const layer_scratch &s, const fmoe_cuda_side *,
                           cudaStream_t stream) {
    TRY(choose_experts(a, s, stream));
    TRY(experts(a, s, stream));
    return mlp(a, s, {s.routed, NULL, 0, NULL}, stream);
}
// [/in-turn]

// ---- Side by side ----

struct fmoe_cuda_side {
    cudaStream_t stream;
    cudaEvent_t fork, join;
};

// The side stream starts where the caller's is now ...
static fmoe_status fork(const fmoe_cuda_side *side, cudaStream_t stream) {
    TRY(cuda_call("cudaEventRecord", cudaEventRecord(side->fork, stream)));
    return cuda_call("cudaStreamWaitEvent", cudaStreamWaitEvent(side->stream, side->fork, 0));
}

// ... and the caller's goes on when the side stream has got here. Two edges of the graph where the call is captured.
static fmoe_status join(const fmoe_cuda_side *side, cudaStream_t stream) {
    TRY(cuda_call("cudaEventRecord", cudaEventRecord(side->join, side->stream)));
    return cuda_call("cudaStreamWaitEvent", cudaStreamWaitEvent(stream, side->join, 0));
}

// [two-streams]
// The MLP's first product beside the whole routed branch; the second waits for its sum.
static fmoe_status two_streams(const fmoe_layer_args *a, const layer_scratch &s, const fmoe_cuda_side *side,
                               cudaStream_t stream) {
    TRY(fork(side, stream));
    TRY(choose_experts(a, s, side->stream));
    TRY(experts(a, s, side->stream));
    TRY(cuda_call("cudaEventRecord", cudaEventRecord(side->join, side->stream)));
    return mlp(a, s, {s.routed, side->join, 0, NULL}, stream);
}
// [/two-streams]

// Items as routed_items counts them.
typedef struct {
    int first, end, columns;
} add_items;

// Launch: a thread for 4 elements, 256 threads a block at most; blocks across an item in y. Shared memory: none.
// Traffic: 8 bytes an element in, mostly from the L2, and y out.
// [add]
template <typename E>
__global__ void __launch_bounds__(256) add_kernel(int T, int d, add_items items, layer_scratch s, E *y) {
    int item = items.first + blockIdx.x, begin = item / T * items.columns, end = min(d, begin + items.columns);
    int column = begin + (blockIdx.y * blockDim.x + threadIdx.x) * 4;
    int64_t at = (int64_t)(item % T) * d + column;
    if (d % 4 == 0 && column < end) { // and then slices are multiples of four too
        struct alignas(4 * sizeof(E)) {
            E at[4];
        } out;
        float4 shared = __ldcs((const float4 *)(s.shared + at)), routed = __ldcs((const float4 *)(s.routed + at));
        out.at[0] = from_f32<E>(shared.x + routed.x), out.at[1] = from_f32<E>(shared.y + routed.y);
        out.at[2] = from_f32<E>(shared.z + routed.z), out.at[3] = from_f32<E>(shared.w + routed.w);
        *(decltype(out) *)(y + at) = out;
    } else {
        for (int i = 0; i < 4 && column + i < end; i++)
            y[at + i] = from_f32<E>(s.shared[at + i] + s.routed[at + i]);
    }
}
// [/add]

static fmoe_status add_some(const fmoe_layer_args *a, const layer_scratch &s, const add_items &items,
                            cudaStream_t stream) {
    int fours = (int)ceil_div(items.columns, 4), threads = min(256, (fours + WARP - 1) / WARP * WARP);
    dim3 blocks((unsigned)(items.end - items.first), (unsigned)ceil_div(fours, threads));
    WITH_DTYPE(a->dtype, E, add_kernel<E><<<blocks, threads, 0, stream>>>((int)a->T, (int)a->d, items, s, (E *)a->y));
    return launched("add_kernel");
}

static fmoe_status add_branches(const fmoe_layer_args *a, const layer_scratch &s, cudaStream_t stream) {
    return add_some(a, s, {0, (int)a->T, (int)a->d}, stream);
}

static int device_multiprocessors(void) {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

// [many]
// With many tokens, router and top-k have all multiprocessors first. Then the gathers keep a third of them, or a little
// more than a quarter where tensor cores make their dot products. The MLP's second product is launched while the first
// one ends, so that its blocks sit down where those of the first get up, before a gather does. The experts' second
// phase comes in two parts: the second, which ends after the MLP, adds the MLP's sum by itself; the first is added
// meanwhile. (With fewer tokens the MLP ends last.)
#define PARTS_TOKENS 2048

static fmoe_status divided_many(const fmoe_layer_args *a, const layer_scratch &s, int all, const fmoe_cuda_side *side,
                                cudaStream_t stream) {
    int products = all * (routed_on_tensor_cores(a) ? 73 : 67) / 100 & ~3; // their blocks come in fours
    int columns, items = routed_items(a, true, &columns);
    int first = a->T >= PARTS_TOKENS ? (int)((int64_t)items * 10 / 16) : items;
    TRY(choose_experts(a, s, stream));
    TRY(fork(side, stream));
    TRY(mlp(a, s, {NULL, NULL, products, s.shared}, side->stream));
    TRY(cuda_call("cudaEventRecord", cudaEventRecord(side->join, side->stream)));
    TRY(routed_experts(a, s, {true, 0, 0, first, NULL}, stream));
    TRY(fork(side, stream));
    TRY(add_some(a, s, {0, first, columns}, side->stream));
    if (first < items) {
        TRY(cuda_call("cudaStreamWaitEvent", cudaStreamWaitEvent(stream, side->join, 0)));
        TRY(routed_experts(a, s, {true, 0, first, items, s.shared}, stream));
    }
    return join(side, stream);
}
// [/many]

// [divided]
// Two kernels that fill a multiprocessor each do not run side by side by themselves. So the MLP's products, on a stream
// of higher priority, get two thirds of the multiprocessors or more, and the routed branch what is left, and then
// whatever the products leave. Neither branch waits for the other: both sums are float32, and a last kernel adds and
// rounds them. With some hundreds of tokens the second product would sit down too early, on the third that is left to
// the gathers: an event that has long come makes it an ordinary launch, and the gathers keep to their third.
#define ROUTER_TOKENS 64 // a pair of blocks of the router, which fill a multiprocessor each

static fmoe_status divided(const fmoe_layer_args *a, const layer_scratch &s, const fmoe_cuda_side *side,
                           cudaStream_t stream) {
    int all = device_multiprocessors(), products = all * 2 / 3 & ~1; // blocks in pairs, or in fours
    if (2 * ceil_div(a->T, ROUTER_TOKENS) > all - products)          // the router would need more than its third
        return divided_many(a, s, all, side, stream);
    bool few = a->T <= TILE_TOKENS;
    int columns, items = routed_items(a, false, &columns);
    TRY(fork(side, stream));
    TRY(few_logits_fit(a) ? choose_for_few(a, s, stream) : choose_experts(a, s, stream));
    TRY(mlp(a, s, {NULL, few ? NULL : side->fork, products, s.shared}, side->stream));
    TRY(routed_experts(a, s, {false, few ? 0 : all - products, 0, items, NULL}, stream));
    TRY(join(side, stream));
    return add_branches(a, s, stream);
}
// [/divided]

// [few-tokens]
static fmoe_status few_tokens(const fmoe_layer_args *a, const layer_scratch &s, const fmoe_cuda_side *side,
                              cudaStream_t stream) {
    const fmoe_mlp_args args = mlp_args_of(a);
    if (mlp_by_rows(&args))
        return few_layer(a, &args, s, stream);
    TRY(fork(side, stream));
    TRY(few_routed(a, s, stream));
    TRY(mlp(a, s, {NULL, NULL, 0, s.shared}, side->stream));
    TRY(join(side, stream));
    return add_branches(a, s, stream);
}
// [/few-tokens]

typedef fmoe_status layer_order(const fmoe_layer_args *a, const layer_scratch &s, const fmoe_cuda_side *side,
                                cudaStream_t stream);

static layer_order *best_order(const fmoe_layer_args *a, const fmoe_cuda_side *side) {
    return !side ? in_turn : few_fit(a) ? few_tokens : divided;
}

static fmoe_status forward(const fmoe_layer_args *a, layer_order *order, const fmoe_cuda_side *side, void *workspace,
                           size_t bytes, cudaStream_t stream) {
    size_t used = 0;
    TRY(check_sizes(a));
    layer_scratch s = layer_carve(a, workspace, &used);
    TRY(layer_check(a, workspace, bytes, used));
    if (a->T == 0)
        return FMOE_OK;
    TRY(check_steps(a, s));
    return order(a, s, side, stream);
}

// ---- The side stream ----

extern "C" fmoe_status fmoe_cuda_side_create(fmoe_cuda_side **side) {
    fmoe_cuda_side *made = new (std::nothrow) fmoe_cuda_side{};
    if (!made)
        return fmoe_no_memory(1, sizeof *made);
    int least, greatest;
    fmoe_status status =
        cuda_call("cudaDeviceGetStreamPriorityRange", cudaDeviceGetStreamPriorityRange(&least, &greatest));
    if (status == FMOE_OK)
        status =
            cuda_call("cudaStreamCreate", cudaStreamCreateWithPriority(&made->stream, cudaStreamNonBlocking, greatest));
    if (status == FMOE_OK)
        status = cuda_call("cudaEventCreate", cudaEventCreateWithFlags(&made->fork, cudaEventDisableTiming));
    if (status == FMOE_OK)
        status = cuda_call("cudaEventCreate", cudaEventCreateWithFlags(&made->join, cudaEventDisableTiming));
    if (status != FMOE_OK) {
        fmoe_cuda_side_destroy(made);
        made = NULL;
    }
    *side = made;
    return status;
}

extern "C" void fmoe_cuda_side_destroy(fmoe_cuda_side *side) {
    if (!side)
        return;
    if (side->fork)
        cudaEventDestroy(side->fork);
    if (side->join)
        cudaEventDestroy(side->join);
    if (side->stream)
        cudaStreamDestroy(side->stream);
    delete side;
}

// ---- Rungs and entry point ----

// A rung has no argument for it: the side stream of all rungs is made when the first asks for it.
static fmoe_status rungs_side(fmoe_cuda_side **side) {
    static fmoe_cuda_side *made;
    fmoe_status status = made ? FMOE_OK : fmoe_cuda_side_create(&made);
    *side = made;
    return status;
}

extern "C" size_t cuda_layer_bytes(const void *args) {
    size_t used = 0;
    layer_carve((const fmoe_layer_args *)args, NULL, &used);
    return used;
}

static fmoe_status run(const void *args, layer_order *order, void *workspace, size_t bytes, void *stream) {
    fmoe_cuda_side *side;
    TRY(rungs_side(&side));
    return forward((const fmoe_layer_args *)args, order, side, workspace, bytes, (cudaStream_t)stream);
}

extern "C" fmoe_status cuda_layer_in_turn(const void *args, void *workspace, size_t bytes, void *stream) {
    return run(args, in_turn, workspace, bytes, stream);
}

static fmoe_status until_router(const fmoe_layer_args *a, const layer_scratch &s, const fmoe_cuda_side *,
                                cudaStream_t stream) {
    return find_logits(a, s, stream);
}

static fmoe_status until_topk(const fmoe_layer_args *a, const layer_scratch &s, const fmoe_cuda_side *,
                              cudaStream_t stream) {
    return choose_experts(a, s, stream);
}

static fmoe_status until_experts(const fmoe_layer_args *a, const layer_scratch &s, const fmoe_cuda_side *,
                                 cudaStream_t stream) {
    TRY(choose_experts(a, s, stream));
    return experts(a, s, stream);
}

extern "C" fmoe_status cuda_layer_until_router(const void *args, void *workspace, size_t bytes, void *stream) {
    return run(args, until_router, workspace, bytes, stream);
}

extern "C" fmoe_status cuda_layer_until_topk(const void *args, void *workspace, size_t bytes, void *stream) {
    return run(args, until_topk, workspace, bytes, stream);
}

extern "C" fmoe_status cuda_layer_until_experts(const void *args, void *workspace, size_t bytes, void *stream) {
    return run(args, until_experts, workspace, bytes, stream);
}

extern "C" fmoe_status cuda_layer_two_streams(const void *args, void *workspace, size_t bytes, void *stream) {
    return run(args, two_streams, workspace, bytes, stream);
}

extern "C" fmoe_status cuda_layer_divided(const void *args, void *workspace, size_t bytes, void *stream) {
    return run(args, divided, workspace, bytes, stream);
}

extern "C" bool cuda_layer_is_few(const void *args) {
    return few_fit((const fmoe_layer_args *)args);
}

extern "C" fmoe_status cuda_layer_few(const void *args, void *workspace, size_t bytes, void *stream) {
    return run(args, few_tokens, workspace, bytes, stream);
}

static fmoe_layer_args args_of(const fmoe_config *config, bool training, int64_t T, fmoe_dtype dtype) {
    fmoe_layer_args a = {};
    a.T = T, a.d = config->hidden_size, a.I = config->intermediate_size, a.N = config->num_experts;
    a.K = config->num_experts_per_tok, a.n = a.N > 0 ? fmoe_num_keys(a.N) : 0;
    a.training = training, a.norm_topk_prob = config->norm_topk_prob, a.dtype = dtype;
    return a;
}

extern "C" fmoe_status fmoe_cuda_layer_forward(const fmoe_config *config, const fmoe_cuda_weights *weights,
                                               bool training, int64_t T, fmoe_dtype dtype, const void *x,
                                               const fmoe_cuda_outputs *outputs, fmoe_cuda_side *side, void *workspace,
                                               size_t workspace_bytes, void *stream) {
    TRY(fmoe_check_pointer("config", config, 1));
    TRY(fmoe_check_pointer("weights", weights, 1));
    TRY(fmoe_check_pointer("outputs", outputs, 1));
    fmoe_layer_args a = args_of(config, training, T, dtype);
    a.x = x, a.y = outputs->y, a.router_logits = outputs->router_logits;
    a.scores = outputs->scores, a.indices = outputs->indices;
    a.router_gate = weights->router_gate, a.down_embed = weights->down_embed, a.up_embed = weights->up_embed;
    a.gate_proj = weights->gate_proj, a.up_proj = weights->up_proj, a.down_proj = weights->down_proj;
    a.running_mean = weights->running_mean, a.running_var = weights->running_var;
    return forward(&a, best_order(&a, side), side, workspace, workspace_bytes, (cudaStream_t)stream);
}

extern "C" size_t fmoe_cuda_layer_workspace(const fmoe_config *config, bool training, int64_t T, fmoe_dtype dtype) {
    if (!config)
        return 0;
    fmoe_layer_args a = args_of(config, training, T, dtype);
    size_t used = 0;
    if (check_sizes(&a) == FMOE_OK)
        layer_carve(&a, NULL, &used);
    return used;
}
