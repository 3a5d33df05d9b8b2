// Rung: value and key in 32 bits.
#include "choice.cuh"

extern "C" fmoe_status cuda_topk_packed(const void *args, void *workspace, size_t bytes, void *stream) {
    topk_task a;
    (void)workspace, (void)bytes;
    TRY(topk_from_args(args, &a));
    return launch_warps<FORM_PACKED>(a, (cudaStream_t)stream);
}
