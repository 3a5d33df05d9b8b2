/* flashmoe.c: the reference, and the contract every other implementation in this repository is held to.
 *
 * FlashMoE is a mixture-of-experts layer whose experts are single neurons. A Cartesian-product router picks K of N
 * experts for each token with 2·sqrt(N) logits; a shared dense SwiGLU MLP runs beside them:
 *
 *     x ──► batch norm ──► router gate ──► top-k over n × n pairs ──► expert step ──► + ──► y
 *     │                                                                 ▲             ▲
 *     └─────────────────────────────────────────────────────────────────┴──► MLP ─────┘
 *
 * Everything below takes and returns float32 arrays, row-major and dense, and accumulates in double, so a result is
 * the true value rounded once or twice. 16-bit storage is handled at the edge with fmoe_to_f32 and fmoe_from_f32.
 * A function gives the same bits for any number of OpenMP threads.
 *
 * Letters, the same in every file and chapter:
 *     T  tokens (batch × seq_len)            d  hidden_size           I  intermediate_size
 *     N  num_experts                         K  num_experts_per_tok   n  num_keys = floor(sqrt(N))
 *
 * Every function returns a status and never prints, exits or aborts. After a failure fmoe_error_message() says which
 * argument, its value and the limit. T = 0 is legal: outputs are empty, weight gradients become zero when overwriting.
 * Outputs may not overlap inputs. A comment "[T, d]" gives a shape; "optional" says that NULL is allowed.
 */
#ifndef FMOE_H
#define FMOE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "fmoe_version.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Statuses ---------------------------------------------------------------------------------------------------- */

typedef enum {
    FMOE_OK = 0,
    FMOE_NULL_POINTER,  /* a required pointer is NULL */
    FMOE_BAD_SIZE,      /* a size is zero or negative (T may be zero) */
    FMOE_BAD_TOPK,      /* K is below 1 or above what there is to choose from */
    FMOE_OVERFLOW,      /* a product of sizes does not fit its type */
    FMOE_BATCH_OF_ONE,  /* T = 1 in training: the unbiased variance divides by T - 1 */
    FMOE_BAD_INDEX,     /* an expert index lies outside [0, N) */
    FMOE_UNSUPPORTED,   /* legal, but this back end does not do it */
    FMOE_OUT_OF_MEMORY, /* a temporary could not be allocated */
    FMOE_BAD_WORKSPACE, /* the caller's workspace is smaller than asked for */
    FMOE_IO,            /* a file could not be opened, read or written */
    FMOE_BAD_FILE,      /* a file's contents are not what they should be */
    FMOE_CUDA,          /* the CUDA runtime reported an error */
} fmoe_status;

/* A short name such as "bad index". Never NULL. */
const char *fmoe_status_name(fmoe_status status);

/* What went wrong in this thread's last failed call, e.g. "num_experts_per_tok = 300 exceeds n² = 256". Valid until
 * this thread's next failure; "" before the first. */
const char *fmoe_error_message(void);

/* ---- Storage types ----------------------------------------------------------------------------------------------- */

typedef enum { FMOE_F32, FMOE_F16, FMOE_BF16, FMOE_I32, FMOE_I64 } fmoe_dtype;

size_t fmoe_dtype_size(fmoe_dtype dtype);      /* bytes an element */
const char *fmoe_dtype_name(fmoe_dtype dtype); /* "f32", "f16", "bf16", "i32", "i64" */

/* Exact: every float16 and bfloat16 value is a float32 value. NaN stays NaN. dtype is one of the three float types. */
void fmoe_to_f32(fmoe_dtype dtype, int64_t count, const void *source, float *target);

/* Rounds to nearest, ties to even, subnormals included; beyond the largest value to infinity; NaN stays NaN. */
void fmoe_from_f32(fmoe_dtype dtype, int64_t count, const float *source, void *target);

/* ---- Comparing --------------------------------------------------------------------------------------------------- */

/* The error measure used everywhere: ‖out − ref‖ / ‖ref‖ over the whole tensor, in double. natural_scale is the norm
 * that the terms summed would have without cancellation, or 0 if unknown: where ‖ref‖ is below 1e-6 of it the result
 * is ‖out‖ / natural_scale instead. NaN where ref has none (or the reverse) gives infinity; both NaN count as equal. */
double fmoe_relative_error(int64_t count, const float *out, const float *ref, double natural_scale);

/* The limit that measure is held to: float32 1e-5, float16 6e-4, bfloat16 4e-3. */
double fmoe_error_limit(fmoe_dtype dtype);

/* Compares two choices of K experts a token as sets. A pair that only one of them holds is accepted if its sum of
 * logits lies within 1e-5 · max(1, largest |logit|) of the K-th best sum. logits [2, T, n], indices [T, K] each.
 * Returns the first token that is not accepted, or -1. */
int64_t fmoe_compare_indices(int64_t T, int64_t n, int64_t K, const float *logits, const int32_t *indices,
                             const int32_t *expected);

/* ---- Step: router (chapter 2) ------------------------------------------------------------------------------------
 * Batch normalisation without an affine part (Ioffe and Szegedy 2015), then a projection onto 2n keys. */

#define FMOE_NORM_EPS      1e-5
#define FMOE_NORM_MOMENTUM 0.1

/* x̂ = (x − mean) / sqrt(var + eps), per hidden unit. In training mean and biased variance are the batch's, and the
 * running buffers move by momentum 0.1 (the variance with the unbiased estimate); in evaluation the running buffers
 * normalise and stay as they are.
 * x [T, d], running_mean [d], running_var [d] (read in evaluation, updated in training), x_hat [T, d]. */
fmoe_status fmoe_router_norm(bool training, int64_t T, int64_t d, const float *x, float *running_mean,
                             float *running_var, float *x_hat);

/* dx from dx̂, through the batch statistics in training, as a constant affine map in evaluation. In training the
 * running buffers are not read and may be NULL. */
fmoe_status fmoe_router_norm_backward(bool training, int64_t T, int64_t d, const float *x, const float *running_mean,
                                      const float *running_var, const float *dx_hat, float *dx);

/* z = x̂ · gateᵀ. gate [2n, d]; logits [2, T, n]: first the x side (rows 0 to n−1 of gate), then the y side. */
fmoe_status fmoe_router_logits(int64_t T, int64_t d, int64_t n, const float *x_hat, const float *gate, float *logits);

typedef enum { FMOE_OVERWRITE, FMOE_ACCUMULATE } fmoe_write; /* how a weight gradient is stored */

/* dx_hat [T, d] (optional) and dgate [2n, d] (optional) from dlogits [2, T, n]. */
fmoe_status fmoe_router_logits_backward(int64_t T, int64_t d, int64_t n, const float *x_hat, const float *gate,
                                        const float *dlogits, fmoe_write write, float *dx_hat, float *dgate);

/* log p = z − log Σ exp z over each row of n. logits, log_probs [rows, n]; for router logits rows = 2T. */
fmoe_status fmoe_log_softmax(int64_t rows, int64_t n, const float *logits, float *log_probs);

/* dz = dlog_p − softmax(z) · Σ dlog_p. All [rows, n]. */
fmoe_status fmoe_log_softmax_backward(int64_t rows, int64_t n, const float *logits, const float *dlog_probs,
                                      float *dlogits);

/* ---- Step: topk (chapter 3) --------------------------------------------------------------------------------------
 * The Cartesian-product top-k (product keys: Lample et al. 2019), pruned to the staircase. */

/* floor(sqrt(N)), exactly. 0 for N < 1. */
int64_t fmoe_num_keys(int64_t N);

/* The K best of the n² pairs (i, j) by the sum of their logits, best first; index i·n + j. The rule, exactly: rank
 * each side by value, equal values by the smaller key, NaN last; candidates are the pairs of ranks (a, b) with
 * (a+1)(b+1) ≤ K; the larger float32 sum of raw logits comes first, equal sums by the smaller index, NaN last.
 * Any 1 ≤ K ≤ n².
 * logits [2, T, n]; indices [T, K]; scores [T, K] = log p_x[i] + log p_y[j] (optional); weights [T, K] = exp(score),
 * divided by the token's sum if norm_topk_prob (optional). A token with a NaN or +inf logit gets NaN weights. */
fmoe_status fmoe_topk(int64_t T, int64_t n, int64_t K, bool norm_topk_prob, const float *logits, int32_t *indices,
                      float *scores, float *weights);

/* Scores and weights (each optional) of a choice made elsewhere. An index outside [0, n²) is FMOE_BAD_INDEX. */
fmoe_status fmoe_topk_at(int64_t T, int64_t n, int64_t K, bool norm_topk_prob, const float *logits,
                         const int32_t *indices, float *scores, float *weights);

/* dlogits [2, T, n] from the gradients of weights and of scores, each [T, K] and optional (NULL counts as zero). The
 * indices are constants: a key collects the gradients of every chosen pair it is part of. */
fmoe_status fmoe_topk_backward(int64_t T, int64_t n, int64_t K, bool norm_topk_prob, const float *logits,
                               const int32_t *indices, const float *dweights, const float *dscores, float *dlogits);

/* ---- Step: schedule (chapter 4) ----------------------------------------------------------------------------------
 * Expert-major order of the T·K routed pairs: a stable counting sort (Knuth, vol. 3, 5.2), i.e. the transposed CSR. */

/* offsets [N+1]: expert e owns positions offsets[e] to offsets[e+1]−1. pairs [T·K]: the pair t·K + k at each
 * position, rising within an expert. T·K must fit int32_t. */
fmoe_status fmoe_schedule(int64_t T, int64_t K, int64_t N, const int32_t *indices, int32_t *offsets, int32_t *pairs);

/* ---- Step: expert (chapters 1 and 5) -----------------------------------------------------------------------------
 * One expert is one neuron: a row of down_embed and a row of up_embed. (PEER: He 2024; FlashMoE.) */

/* silu(s) = s / (1 + exp(−s)) and its derivative, in double. */
double fmoe_silu(double s);
double fmoe_silu_derivative(double s);

/* y_t = Σ_k silu(⟨x_t, down[e]⟩) · g · up[e] with e = indices[t, k], g = weights[t, k]. Any indices in [0, N),
 * repeated ones included, any real weights; 1 ≤ K ≤ N.
 * x [T, d]; down, up [N, d]; indices, weights [T, K]; y [T, d]; pre_activations [T, K] (optional): ⟨x_t, down[e]⟩. */
fmoe_status fmoe_expert(int64_t T, int64_t d, int64_t N, int64_t K, const float *x, const float *down, const float *up,
                        const int32_t *indices, const float *weights, float *y, float *pre_activations);

/* The same function computed expert by expert along a schedule (fmoe_schedule). The activations go back to token
 * order before the second phase, so y has the same bits as fmoe_expert's. */
fmoe_status fmoe_expert_scheduled(int64_t T, int64_t d, int64_t N, int64_t K, const float *x, const float *down,
                                  const float *up, const int32_t *indices, const float *weights, const int32_t *offsets,
                                  const int32_t *pairs, float *y, float *pre_activations);

/* Gradients, each optional: dx [T, d], ddown, dup [N, d], dweights [T, K], from dy [T, d]. */
fmoe_status fmoe_expert_backward(int64_t T, int64_t d, int64_t N, int64_t K, const float *x, const float *down,
                                 const float *up, const int32_t *indices, const float *weights, const float *dy,
                                 fmoe_write write, float *dx, float *ddown, float *dup, float *dweights);

/* ---- Step: mlp (chapter 6) ---------------------------------------------------------------------------------------
 * The shared SwiGLU MLP (Shazeer 2020): y = down · (silu(gate · x) ⊙ (up · x)). */

/* x [T, d]; gate, up [I, d]; down [d, I]; y [T, d]. */
fmoe_status fmoe_mlp(int64_t T, int64_t d, int64_t I, const float *x, const float *gate, const float *up,
                     const float *down, float *y);

/* Gradients, each optional: dx [T, d], dgate, dup [I, d], ddown [d, I], from dy [T, d]. */
fmoe_status fmoe_mlp_backward(int64_t T, int64_t d, int64_t I, const float *x, const float *gate, const float *up,
                              const float *down, const float *dy, fmoe_write write, float *dx, float *dgate, float *dup,
                              float *ddown);

/* ---- The layer (chapters 8 and 9) -------------------------------------------------------------------------------- */

typedef struct {
    int64_t hidden_size;         /* d */
    int64_t intermediate_size;   /* I */
    int64_t num_experts;         /* N */
    int64_t num_experts_per_tok; /* K */
    bool norm_topk_prob;
} fmoe_config;

/* Names and shapes as in a PyTorch state dict. */
typedef struct {
    const float *router_gate; /* [2n, d] */
    const float *down_embed;  /* [N, d] */
    const float *up_embed;    /* [N, d] */
    const float *gate_proj;   /* [I, d] */
    const float *up_proj;     /* [I, d] */
    const float *down_proj;   /* [d, I] */
    float *running_mean;      /* router_norm.running_mean [d]: moves in training */
    float *running_var;       /* router_norm.running_var [d]: moves in training */
} fmoe_weights;

/* What a forward pass returns. y is required, the others optional; backward reads router_logits and indices. */
typedef struct {
    float *y;             /* [T, d] */
    float *router_logits; /* [2, T, n] */
    float *scores;        /* [T, K] */
    int32_t *indices;     /* [T, K] */
} fmoe_outputs;

/* Gradients, each optional, named and shaped like what they are gradients of. */
typedef struct {
    float *dx; /* [T, d], always overwritten */
    float *router_gate, *down_embed, *up_embed, *gate_proj, *up_proj, *down_proj;
} fmoe_gradients;

/* y = MLP(x) + routed experts(x). chosen: NULL, or indices [T, K] to use in place of the layer's own top-k, so that
 * everything after a choice made elsewhere can be compared. In training the running buffers move. */
fmoe_status fmoe_layer_forward(const fmoe_config *config, const fmoe_weights *weights, bool training, int64_t T,
                               const float *x, const int32_t *chosen, fmoe_outputs *outputs);

/* All gradients from dy [T, d]; indices [T, K] are the forward pass's choice. Everything else is computed again from
 * x; in evaluation the running buffers must be what the forward pass used. */
fmoe_status fmoe_layer_backward(const fmoe_config *config, const fmoe_weights *weights, bool training, int64_t T,
                                const float *x, const int32_t *indices, const float *dy, fmoe_write write,
                                fmoe_gradients *gradients);

/* ---- Weights from disk (chapter 8): the safetensors format ------------------------------------------------------- */

#define FMOE_MAX_RANK 8

typedef struct {
    const char *name;
    fmoe_dtype dtype;
    int rank;
    int64_t shape[FMOE_MAX_RANK];
    int64_t count;    /* elements: the product of the shape */
    const void *data; /* little-endian, as stored; may not be aligned to the element size */
} fmoe_tensor;

typedef struct fmoe_file fmoe_file;

/* Files are untrusted: wrong magic, truncated data, overlapping or overflowing offsets, an unknown dtype give
 * FMOE_BAD_FILE and a message that names the file and the tensor. *file is NULL after a failure. Free with
 * fmoe_file_close (NULL is allowed). fmoe_file_parse reads a copy of bytes in memory; name is used in messages. */
fmoe_status fmoe_file_open(const char *path, fmoe_file **file);
fmoe_status fmoe_file_parse(const void *bytes, size_t size, const char *name, fmoe_file **file);
void fmoe_file_close(fmoe_file *file);

int64_t fmoe_file_count(const fmoe_file *file);
const fmoe_tensor *fmoe_file_tensor(const fmoe_file *file, int64_t i);      /* by position; NULL beyond */
const fmoe_tensor *fmoe_file_find(const fmoe_file *file, const char *name); /* NULL if there is none */
const char *fmoe_file_metadata(const fmoe_file *file, const char *key);     /* NULL if there is none */

/* The named tensor as float32, of exactly this shape; the caller frees *values. A missing or misshapen tensor is
 * FMOE_BAD_FILE. */
fmoe_status fmoe_file_read_f32(const fmoe_file *file, const char *name, int rank, const int64_t *shape, float **values);

typedef struct {
    const char *key, *value;
} fmoe_metadata;

/* Writes tensors in the order given; metadata (optional) becomes "__metadata__". */
fmoe_status fmoe_file_write(const char *path, int64_t num_tensors, const fmoe_tensor *tensors, int64_t num_metadata,
                            const fmoe_metadata *metadata);

/* A layer's weights as float32, sizes taken from the shapes, for any prefix ("" or e.g. "model.layers.3.mlp.").
 * num_experts_per_tok and norm_topk_prob come from the file's metadata if it has them and stay as the caller set them
 * otherwise. Running buffers are looked up as router_norm.running_mean, then with ".before" appended (golden files).
 * Free with fmoe_weights_free. */
fmoe_status fmoe_weights_load(const fmoe_file *file, const char *prefix, fmoe_config *config, fmoe_weights *weights);
void fmoe_weights_free(fmoe_weights *weights);

#ifdef __cplusplus
}
#endif
#endif
