/* Exercise 9.2, starter, not done: the forward pass is here, and you write the way back. */
#include "plugin.h"
#include "vec.h"
#include "workspace.h"

#include "../ref_cpu/check.h"

#include <omp.h>

/* What a token needs. */
typedef struct {
    float *logits[2];    /* [n] a side */
    float *prob[2];      /* [n]: softmax of the side */
    float *weight;       /* [K]: the routing weights */
    float *dlog_prob[2]; /* [n]: the gradients of the log-probabilities */
    size_t bytes;
} token;

static token lay_out(const fmoe_topk_backward_args *a, void *memory) {
    token k = {.bytes = 0};
    for (int side = 0; side < 2; side++) {
        k.logits[side] = carve(memory, &k.bytes, (size_t)a->n * sizeof(float));
        k.prob[side] = carve(memory, &k.bytes, (size_t)a->n * sizeof(float));
        k.dlog_prob[side] = carve(memory, &k.bytes, (size_t)a->n * sizeof(float));
    }
    k.weight = carve(memory, &k.bytes, (size_t)a->K * sizeof(float));
    return k;
}

static size_t needed(const void *args) {
    return lay_out(args, NULL).bytes * (size_t)omp_get_max_threads();
}

static void softmax(int64_t n, const float *z, float *prob) {
    float most = largest(n, z), sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += prob[i] = expf(z[i] - most);
    for (int64_t i = 0; i < n; i++)
        prob[i] /= sum;
}

/* What the forward pass did with this token: a pair's weight is the product of two probabilities, over the sum of the K
 * where norm_topk_prob asks for it. */
static void forward(const fmoe_topk_backward_args *a, int64_t t, const token *k) {
    const int32_t *pair = a->indices + t * a->K;
    float sum = 0;
    for (int64_t side = 0; side < 2; side++) {
        fmoe_to_f32(a->dtype, a->n,
                    (const char *)a->logits + (side * a->T + t) * a->n * (int64_t)fmoe_dtype_size(a->dtype),
                    k->logits[side]);
        softmax(a->n, k->logits[side], k->prob[side]);
    }
    for (int64_t i = 0; i < a->K; i++)
        sum += k->weight[i] = k->prob[0][pair[i] / a->n] * k->prob[1][pair[i] % a->n];
    for (int64_t i = 0; a->norm_topk_prob && i < a->K; i++)
        k->weight[i] /= sum;
}

/* From dweights [K], the gradients of the routing weights, to dlogits. Derive it on paper first:
 *   1. the gradient of a pair's log-probability from dweights, with and without norm_topk_prob;
 *   2. the gradients of the keys' log-probabilities, dlog_prob: a key collects those of all its chosen pairs;
 *   3. the gradients of the logits, through the log-softmax of each side. */
static void backward(const fmoe_topk_backward_args *a, int64_t t, const token *k) {
    (void)a, (void)t, (void)k;
}

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_topk_backward_args *a = args;
    size_t each = lay_out(a, NULL).bytes;
    (void)workspace_bytes, (void)stream;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < a->T; t++) {
        token k = lay_out(a, (char *)workspace + each * (size_t)omp_get_thread_num());
        forward(a, t, &k);
        backward(a, t, &k);
    }
    return fmoe_fail(FMOE_UNSUPPORTED, "not done yet");
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "topk_backward", .name = "my gradient", .run = run, .workspace = needed};
