// fmoe_cuda_topk: what it checks, and which rung it runs.
#include "topk.cuh"

fmoe_status topk_make(int64_t T, int64_t n, int64_t K, bool norm_topk_prob, fmoe_dtype dtype, const void *logits,
                      int32_t *indices, float *scores, float *weights, topk_task *task) {
    TRY(fmoe_check_tokens(T));
    TRY(fmoe_check_size("num_keys", n));
    if (n > FMOE_CUDA_MAX_KEYS)
        return fmoe_fail(FMOE_UNSUPPORTED, "num_keys = %lld exceeds %d, the most this back end takes", (long long)n,
                         FMOE_CUDA_MAX_KEYS);
    TRY(fmoe_check_topk(K, "n²", n * n));
    if (K > FMOE_CUDA_MAX_TOPK)
        return fmoe_fail(FMOE_UNSUPPORTED, "num_experts_per_tok = %lld exceeds %d, the most this back end takes",
                         (long long)K, FMOE_CUDA_MAX_TOPK);
    TRY(fmoe_check_shape("tokens", T, "num_keys", n));
    TRY(fmoe_check_shape("tokens", T, "num_experts_per_tok", K));
    if (T > INT32_MAX)
        return fmoe_fail(FMOE_UNSUPPORTED, "tokens = %lld exceeds %d, the most this back end takes", (long long)T,
                         INT32_MAX);
    TRY(check_dtype(dtype));
    TRY(fmoe_check_pointer("router_logits", logits, 2 * T * n));
    TRY(fmoe_check_pointer("indices", indices, T * K));
    *task = {(int)T, (int)n, (int)K, norm_topk_prob, dtype, logits, indices, scores, weights};
    return FMOE_OK;
}

fmoe_status topk_from_args(const void *args, topk_task *task) {
    const fmoe_topk_args *a = (const fmoe_topk_args *)args;
    return topk_make(a->T, a->n, a->K, a->norm_topk_prob, a->dtype, a->logits, a->indices, a->scores, a->weights, task);
}

extern "C" size_t fmoe_cuda_topk_workspace(int64_t T, int64_t n, int64_t K, fmoe_dtype dtype) {
    (void)T, (void)n, (void)K, (void)dtype;
    return 0;
}

extern "C" fmoe_status fmoe_cuda_topk(int64_t T, int64_t n, int64_t K, bool norm_topk_prob, fmoe_dtype dtype,
                                      const void *logits, int32_t *indices, float *scores, float *weights,
                                      void *workspace, size_t workspace_bytes, void *stream) {
    topk_task task;
    (void)workspace, (void)workspace_bytes;
    TRY(topk_make(T, n, K, norm_topk_prob, dtype, logits, indices, scores, weights, &task));
    // Pairs need fewer instructions a token, but their code is longer and has to be read first: they pay where every
    // multiprocessor works on many tokens one after another.
    if (T >= 8192 && n <= TOPK_PAIR_KEYS && K <= TOPK_PAIR_TOPK)
        return topk_run_pair(&task, (cudaStream_t)stream);
    if (n <= TOPK_WARP_KEYS && K <= TOPK_WARP_TOPK)
        return topk_run_keep_best(&task, (cudaStream_t)stream);
    return topk_run_staircase(&task, (cudaStream_t)stream);
}
