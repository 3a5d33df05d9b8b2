/* The hybrid layer: the steps in order, forward and backward. */
#include "check.h"

#include <stdlib.h>
#include <string.h>

static fmoe_status check_layer(const fmoe_config *config, const fmoe_weights *weights, bool training, int64_t T) {
    TRY(fmoe_check_pointer("config", config, 1));
    TRY(fmoe_check_pointer("weights", weights, 1));
    int64_t d = config->hidden_size, I = config->intermediate_size, N = config->num_experts;
    int64_t K = config->num_experts_per_tok;
    TRY(fmoe_check_tokens(T));
    TRY(fmoe_check_size("hidden_size", d));
    TRY(fmoe_check_size("intermediate_size", I));
    TRY(fmoe_check_experts(N));
    int64_t n = fmoe_num_keys(N);
    TRY(fmoe_check_topk(K, "n²", n * n));
    TRY(fmoe_check_shape("tokens", T, "hidden_size", d));
    TRY(fmoe_check_shape("tokens", T, "intermediate_size", I));
    TRY(fmoe_check_shape("tokens", T, "num_experts_per_tok", K));
    TRY(fmoe_check_shape("tokens", T, "num_keys", n));
    TRY(fmoe_check_shape("num_experts", N, "hidden_size", d));
    TRY(fmoe_check_shape("intermediate_size", I, "hidden_size", d));
    if (training && T == 1)
        return fmoe_fail(FMOE_BATCH_OF_ONE, "tokens = 1 is below 2, which the unbiased variance needs in training");
    TRY(fmoe_check_pointer("router_gate.weight", weights->router_gate, 2 * n * d));
    TRY(fmoe_check_pointer("down_embed.weight", weights->down_embed, N * d));
    TRY(fmoe_check_pointer("up_embed.weight", weights->up_embed, N * d));
    TRY(fmoe_check_pointer("gate_proj.weight", weights->gate_proj, I * d));
    TRY(fmoe_check_pointer("up_proj.weight", weights->up_proj, I * d));
    TRY(fmoe_check_pointer("down_proj.weight", weights->down_proj, d * I));
    TRY(fmoe_check_pointer("router_norm.running_mean", weights->running_mean, d));
    return fmoe_check_pointer("router_norm.running_var", weights->running_var, d);
}

// [route]
/* The routed branch up to the routing weights. The choice is read from `chosen`, or made and written to `indices`. */
static fmoe_status route(const fmoe_config *config, const float *router_gate, float *running_mean, float *running_var,
                         bool training, int64_t T, const float *x, const int32_t *chosen, float *x_hat, float *logits,
                         int32_t *indices, float *scores, float *routing_weights) {
    int64_t d = config->hidden_size, n = fmoe_num_keys(config->num_experts), K = config->num_experts_per_tok;
    TRY(fmoe_router_norm(training, T, d, x, running_mean, running_var, x_hat));
    TRY(fmoe_router_logits(T, d, n, x_hat, router_gate, logits));
    if (chosen)
        return fmoe_topk_at(T, n, K, config->norm_topk_prob, logits, chosen, scores, routing_weights);
    return fmoe_topk(T, n, K, config->norm_topk_prob, logits, indices, scores, routing_weights);
}
// [/route]

// [layer]
static fmoe_status forward(const fmoe_config *config, const fmoe_weights *w, bool training, int64_t T, const float *x,
                           const int32_t *chosen, fmoe_outputs *outputs, float *scratch, int32_t *indices) {
    int64_t d = config->hidden_size, I = config->intermediate_size, N = config->num_experts;
    int64_t K = config->num_experts_per_tok;
    float *x_hat = scratch, *routing_weights = x_hat + T * d, *routed = routing_weights + T * K;
    float *logits = outputs->router_logits ? outputs->router_logits : routed + T * d;

    TRY(route(config, w->router_gate, w->running_mean, w->running_var, training, T, x, chosen, x_hat, logits, indices,
              outputs->scores, routing_weights));
    if (chosen)
        memcpy(indices, chosen, (size_t)(T * K) * sizeof *indices);
    TRY(fmoe_expert(T, d, N, K, x, w->down_embed, w->up_embed, indices, routing_weights, routed, NULL));
    TRY(fmoe_mlp(T, d, I, x, w->gate_proj, w->up_proj, w->down_proj, outputs->y));
    for (int64_t i = 0; i < T * d; i++)
        outputs->y[i] += routed[i];
    if (outputs->indices)
        memcpy(outputs->indices, indices, (size_t)(T * K) * sizeof *indices);
    return FMOE_OK;
}
// [/layer]

fmoe_status fmoe_layer_forward(const fmoe_config *config, const fmoe_weights *weights, bool training, int64_t T,
                               const float *x, const int32_t *chosen, fmoe_outputs *outputs) {
    TRY(check_layer(config, weights, training, T));
    TRY(fmoe_check_pointer("outputs", outputs, 1));
    int64_t d = config->hidden_size, K = config->num_experts_per_tok, n = fmoe_num_keys(config->num_experts);
    TRY(fmoe_check_pointer("x", x, T * d));
    TRY(fmoe_check_pointer("y", outputs->y, T * d));
    if (T == 0)
        return FMOE_OK;
    if (chosen) /* now, before the running buffers move */
        TRY(fmoe_check_indices(T, K, chosen, "n²", n * n));

    int64_t count = T * (2 * d + K + 2 * n);
    float *scratch = fmoe_allocate(count, sizeof *scratch);
    int32_t *indices = fmoe_allocate(T * K, sizeof *indices);
    fmoe_status status = scratch && indices
                             ? forward(config, weights, training, T, x, chosen, outputs, scratch, indices)
                             : fmoe_no_memory(count, sizeof *scratch);
    free(scratch);
    free(indices);
    return status;
}

// [layer-backward]
/* Scratch: x̂, logits, routing weights and their gradients, the three branches' dx, and copies of the running buffers
 * (routing again in training would move them a second time). */
static int64_t backward_scratch(int64_t T, int64_t d, int64_t K, int64_t n) {
    return T * (2 * K + 4 * n + 4 * d) + 2 * d;
}

static fmoe_status backward(const fmoe_config *config, const fmoe_weights *w, bool training, int64_t T, const float *x,
                            const int32_t *indices, const float *dy, fmoe_write write, fmoe_gradients *gradients,
                            float *scratch) {
    int64_t d = config->hidden_size, I = config->intermediate_size, N = config->num_experts;
    int64_t K = config->num_experts_per_tok, n = fmoe_num_keys(N);
    float *x_hat = scratch, *dx_hat = x_hat + T * d, *dx_expert = dx_hat + T * d, *dx_mlp = dx_expert + T * d;
    float *routing_weights = dx_mlp + T * d, *dweights = routing_weights + T * K;
    float *logits = dweights + T * K, *dlogits = logits + 2 * T * n;
    float *mean = dlogits + 2 * T * n, *var = mean + d;
    memcpy(mean, w->running_mean, (size_t)d * sizeof *mean);
    memcpy(var, w->running_var, (size_t)d * sizeof *var);
    TRY(route(config, w->router_gate, mean, var, training, T, x, indices, x_hat, logits, NULL, NULL, routing_weights));

    /* y = shared + routed: both branches receive dy. */
    TRY(fmoe_mlp_backward(T, d, I, x, w->gate_proj, w->up_proj, w->down_proj, dy, write, dx_mlp, gradients->gate_proj,
                          gradients->up_proj, gradients->down_proj));
    TRY(fmoe_expert_backward(T, d, N, K, x, w->down_embed, w->up_embed, indices, routing_weights, dy, write, dx_expert,
                             gradients->down_embed, gradients->up_embed, dweights));
    /* The routing weights lead back through the router. */
    TRY(fmoe_topk_backward(T, n, K, config->norm_topk_prob, logits, indices, dweights, NULL, dlogits));
    TRY(fmoe_router_logits_backward(T, d, n, x_hat, w->router_gate, dlogits, write, dx_hat, gradients->router_gate));
    if (!gradients->dx)
        return FMOE_OK;
    /* x feeds three: the router's norm, the experts, the MLP. */
    TRY(fmoe_router_norm_backward(training, T, d, x, w->running_mean, w->running_var, dx_hat, gradients->dx));
    for (int64_t i = 0; i < T * d; i++)
        gradients->dx[i] = (float)((double)gradients->dx[i] + dx_expert[i] + dx_mlp[i]);
    return FMOE_OK;
}
// [/layer-backward]

fmoe_status fmoe_layer_backward(const fmoe_config *config, const fmoe_weights *weights, bool training, int64_t T,
                                const float *x, const int32_t *indices, const float *dy, fmoe_write write,
                                fmoe_gradients *gradients) {
    TRY(check_layer(config, weights, training, T));
    TRY(fmoe_check_pointer("gradients", gradients, 1));
    int64_t d = config->hidden_size, K = config->num_experts_per_tok, n = fmoe_num_keys(config->num_experts);
    TRY(fmoe_check_pointer("x", x, T * d));
    TRY(fmoe_check_pointer("indices", indices, T * K));
    TRY(fmoe_check_pointer("dy", dy, T * d));

    int64_t count = backward_scratch(T, d, K, n);
    float *scratch = fmoe_allocate(count, sizeof *scratch);
    fmoe_status status = scratch ? backward(config, weights, training, T, x, indices, dy, write, gradients, scratch)
                                 : fmoe_no_memory(count, sizeof *scratch);
    free(scratch);
    return status;
}
