// Rungs `block-an-expert` and `balanced`: the schedule is built, the first phase follows it, the second goes token by
// token as in two_kernels.cu, so that y is written once and in one order.
#include "scheduled.cuh"
#include "../fmoe_cuda.h"
#include "expert.h"

template <typename E> using whole = reading<E, WHOLE_SLICES, 32, 4, 2, 4, 5, true>;
template <typename E> using cut = reading<E, CUT_SLICES, 32, 4, 2, 4, 5, true>;
template <typename E> using elements = reading<E, ELEMENTS, 32, 1, 2, 4, 5, false>;

// The workspace: the expert step's own, offsets, pairs, the schedule's workspace.
typedef struct {
    size_t offsets, pairs, schedule, bytes;
} schedule_layout;

static schedule_layout lay_out(int64_t T, int64_t K, int64_t N) {
    schedule_layout l;
    l.offsets = expert_bytes(T, K, 0);
    l.pairs = l.offsets + up_to_256((size_t)(N + 1) * sizeof(int32_t));
    l.schedule = l.pairs + up_to_256((size_t)(T * K) * sizeof(int32_t));
    l.bytes = l.schedule + fmoe_cuda_schedule_workspace(T, K, N);
    return l;
}

extern "C" size_t cuda_expert_schedule_bytes(const void *args) {
    const fmoe_expert_args *a = (const fmoe_expert_args *)args;
    return lay_out(a->T, a->K, a->N).bytes;
}

extern "C" bool cuda_expert_can_schedule(const void *args) {
    const fmoe_expert_args *a = (const fmoe_expert_args *)args;
    return a->N <= FMOE_CUDA_MAX_EXPERTS && a->T <= INT32_MAX / a->K;
}

template <typename R>
static fmoe_status along(const expert_task &a, expert_order order, bool balanced, cudaStream_t stream) {
    unsigned blocks = balanced ? (unsigned)ceil_div((int64_t)a.T * a.K, R::WARPS * WARP) : (unsigned)a.N;
    if (balanced)
        balanced_kernel<R><<<blocks, R::WARPS * WARP, 0, stream>>>(a, order);
    else
        expert_kernel<R><<<blocks, R::WARPS * WARP, 0, stream>>>(a, order);
    TRY(launched(balanced ? "balanced_kernel" : "expert_kernel"));
    return launch_output<R>(a, R::WARPS, (int)ceil_div(a.d, R::WIDTH) * R::WIDTH, false, stream);
}

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, bool balanced, void *stream) {
    expert_task a;
    TRY(expert_from_args(args, workspace, workspace_bytes, cuda_expert_schedule_bytes(args), &a));
    if (!cuda_expert_can_schedule(args))
        return fmoe_fail(FMOE_UNSUPPORTED, "num_experts = %d exceeds %d, the most in a schedule on the GPU", a.N,
                         FMOE_CUDA_MAX_EXPERTS);
    if (a.T == 0)
        return FMOE_OK;
    schedule_layout l = lay_out(a.T, a.K, a.N);
    int32_t *offsets = (int32_t *)((char *)workspace + l.offsets), *pairs = (int32_t *)((char *)workspace + l.pairs);
    TRY(fmoe_cuda_schedule(a.T, a.K, a.N, a.indices, offsets, pairs, (char *)workspace + l.schedule,
                           l.bytes - l.schedule, stream));
    expert_order order = {offsets, pairs};
    WITH_DTYPE(a.dtype, E, {
        if (a.d % whole<E>::WIDTH == 0)
            return along<whole<E>>(a, order, balanced, (cudaStream_t)stream);
        if (a.d % pack16<E>::count == 0)
            return along<cut<E>>(a, order, balanced, (cudaStream_t)stream);
        return along<elements<E>>(a, order, balanced, (cudaStream_t)stream);
    });
}

extern "C" fmoe_status cuda_expert_block_an_expert(const void *args, void *workspace, size_t workspace_bytes,
                                                   void *stream) {
    return run(args, workspace, workspace_bytes, false, stream);
}

extern "C" fmoe_status cuda_expert_balanced(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    return run(args, workspace, workspace_bytes, true, stream);
}
