// Rung: two tokens a warp.
#include "choice.cuh"

fmoe_status topk_run_pair(const topk_task *task, cudaStream_t stream) {
    if (task->n > TOPK_PAIR_KEYS || task->K > TOPK_PAIR_TOPK)
        return fmoe_fail(FMOE_UNSUPPORTED, "num_keys = %d exceeds %d, or num_experts_per_tok = %d exceeds %d", task->n,
                         TOPK_PAIR_KEYS, task->K, TOPK_PAIR_TOPK);
    return task->T == 0 ? FMOE_OK : launch_pairs<TOPK_PAIR_KEYS / 8>(*task, stream);
}

extern "C" fmoe_status cuda_topk_pair(const void *args, void *workspace, size_t bytes, void *stream) {
    topk_task a;
    (void)workspace, (void)bytes;
    TRY(topk_from_args(args, &a));
    return topk_run_pair(&a, (cudaStream_t)stream);
}
