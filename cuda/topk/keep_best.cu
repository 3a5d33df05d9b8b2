// Rung: only the best K keys of a side are kept while it is sorted.
#include "choice.cuh"

fmoe_status topk_run_keep_best(const topk_task *task, cudaStream_t stream) {
    return launch_warps<FORM_BEST>(*task, stream);
}

extern "C" fmoe_status cuda_topk_keep_best(const void *args, void *workspace, size_t bytes, void *stream) {
    topk_task a;
    (void)workspace, (void)bytes;
    TRY(topk_from_args(args, &a));
    return topk_run_keep_best(&a, (cudaStream_t)stream);
}
