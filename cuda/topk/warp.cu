// Rung: a warp a token, with 64-bit keys.
#include "choice.cuh"

extern "C" fmoe_status cuda_topk_warp(const void *args, void *workspace, size_t bytes, void *stream) {
    topk_task a;
    (void)workspace, (void)bytes;
    TRY(topk_from_args(args, &a));
    return launch_warps<FORM_WIDE>(a, (cudaStream_t)stream);
}
