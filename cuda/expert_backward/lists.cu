// Rungs `balanced`, `on-the-way` and `slices`: the tables' gradients by lists of the schedule.
#include "expert_backward.h"
#include "join.cuh"
#include "lists.cuh"

template <typename E, slice_form F>
using rows = reading<E, F, 32, 1, F == ELEMENTS ? 4 : 8, 4, F == ELEMENTS ? 5 : 7, true>;

template <typename R, bool ON_THE_WAY>
static fmoe_status launch(const backward_task &a, bool overlap, cudaStream_t stream) {
    typedef typename R::element E;
    int lists = (int)backward_lists(a), clearing = a.accumulate ? 0 : (int)ceil_div(a.N, CLEARED);
    lists_kernel<R, ON_THE_WAY><<<lists + clearing, R::WARPS * WARP, 0, stream>>>(a, lists);
    TRY(launched("lists_kernel"));
    int chunks = (int)ceil_div(2 * (int64_t)a.d, WARP * JOIN_COLUMNS);
    return launch_overlapping("join_kernel", overlap, join_kernel<E>, (unsigned)(ceil_div(lists, JOINED) * chunks),
                              JOIN_WARPS * WARP, 0, stream, a, lists, chunks);
}

template <bool ON_THE_WAY> static fmoe_status tables(const backward_task &a, bool overlap, cudaStream_t stream) {
    WITH_DTYPE(a.dtype, E, {
        if (a.d % pack16<E>::count != 0)
            return (launch<rows<E, ELEMENTS>, ON_THE_WAY>(a, overlap, stream));
        if (a.d % rows<E, WHOLE_SLICES>::WIDTH == 0)
            return (launch<rows<E, WHOLE_SLICES>, ON_THE_WAY>(a, overlap, stream));
        return (launch<rows<E, CUT_SLICES>, ON_THE_WAY>(a, overlap, stream));
    });
}

fmoe_status backward_tables(const backward_task &a, bool on_the_way, bool overlap, cudaStream_t stream) {
    return on_the_way ? tables<true>(a, overlap, stream) : tables<false>(a, overlap, stream);
}

// ---- The rungs

static const backward_needs lists_needs = {true, true, false, false};

extern "C" size_t cuda_expert_backward_lists_bytes(const void *args) {
    const fmoe_expert_backward_args *a = (const fmoe_expert_backward_args *)args;
    backward_task task = {};
    task.T = (int)a->T, task.d = (int)a->d, task.N = (int)a->N, task.K = (int)a->K;
    return backward_lay_out(&task, lists_needs, NULL, NULL);
}

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, bool on_the_way, bool sliced,
                       void *stream) {
    backward_task a;
    bool overlap = fmoe_cuda_level() >= 2;
    TRY(backward_from_args(args, workspace, workspace_bytes, lists_needs, &a));
    if (a.T == 0)
        return backward_no_tokens(a, (cudaStream_t)stream);
    if (!on_the_way)
        TRY(backward_pair_numbers(a, (cudaStream_t)stream));
    TRY(backward_tables(a, on_the_way, overlap, (cudaStream_t)stream));
    return backward_dx(a, sliced, {}, overlap, (cudaStream_t)stream);
}

extern "C" fmoe_status cuda_expert_backward_balanced(const void *args, void *workspace, size_t workspace_bytes,
                                                     void *stream) {
    return run(args, workspace, workspace_bytes, false, false, stream);
}

extern "C" fmoe_status cuda_expert_backward_on_the_way(const void *args, void *workspace, size_t workspace_bytes,
                                                       void *stream) {
    return run(args, workspace, workspace_bytes, true, false, stream);
}

extern "C" fmoe_status cuda_expert_backward_slices(const void *args, void *workspace, size_t workspace_bytes,
                                                   void *stream) {
    return run(args, workspace, workspace_bytes, true, true, stream);
}
