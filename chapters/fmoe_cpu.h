/* The fast CPU back end: where the CPU ladders of chapters 1 to 6 end, as functions for callers outside the course.
 *
 * Letters, shapes, rules and statuses are fmoe.h's. Unlike the reference these take every storage type, accumulate in
 * float32 and use vector instructions: dtype is the type of the pointers that are `const void *` or `void *`, results
 * are within fmoe_error_limit(dtype) of the reference, and logits, scores and weights within float32's. Temporary
 * memory is allocated inside. The same input gives the same bits for any number of threads. No pointer is optional. */
#ifndef FMOE_CPU_H
#define FMOE_CPU_H

#include "../ref_cpu/fmoe.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Norm, logits and log-softmax in one. x [T, d], gate [2n, d] of dtype; running_mean, running_var [d], read in
 * evaluation and moved in training; logits, log_probs [2, T, n]. */
fmoe_status fmoe_cpu_router(bool training, int64_t T, int64_t d, int64_t n, fmoe_dtype dtype, const void *x,
                            const void *gate, float *running_mean, float *running_var, float *logits, float *log_probs);

/* logits [2, T, n] of dtype; indices, scores, weights [T, K]. */
fmoe_status fmoe_cpu_topk(int64_t T, int64_t n, int64_t K, bool norm_topk_prob, fmoe_dtype dtype, const void *logits,
                          int32_t *indices, float *scores, float *weights);

/* indices [T, K]; offsets [N+1]; pairs [T·K]. */
fmoe_status fmoe_cpu_schedule(int64_t T, int64_t K, int64_t N, const int32_t *indices, int32_t *offsets,
                              int32_t *pairs);

/* x [T, d], down, up [N, d], y [T, d] of dtype; indices, weights [T, K]. */
fmoe_status fmoe_cpu_expert(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype, const void *x,
                            const void *down, const void *up, const int32_t *indices, const float *weights, void *y);

/* x [T, d], gate, up [I, d], down [d, I], y [T, d] of dtype. */
fmoe_status fmoe_cpu_mlp(int64_t T, int64_t d, int64_t I, fmoe_dtype dtype, const void *x, const void *gate,
                         const void *up, const void *down, void *y);

#ifdef __cplusplus
}
#endif
#endif
