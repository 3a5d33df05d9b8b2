// schedule: the checks that all rungs share, and what fmoe_cuda_schedule calls.
#include "schedule.cuh"

static fmoe_status schedule_make(int64_t T, int64_t K, int64_t N, const int32_t *indices, int32_t *offsets,
                                 int32_t *pairs, void *workspace, size_t workspace_bytes, size_t needed,
                                 schedule_task *task) {
    TRY(fmoe_check_tokens(T));
    TRY(fmoe_check_topk(K, "the largest 32-bit position", INT32_MAX));
    TRY(fmoe_check_experts(N));
    if (N > FMOE_CUDA_MAX_EXPERTS)
        return fmoe_fail(FMOE_UNSUPPORTED, "num_experts = %lld exceeds %d, the most on the GPU", (long long)N,
                         FMOE_CUDA_MAX_EXPERTS);
    TRY(fmoe_check_pairs(T, K));
    TRY(fmoe_check_pointer("indices", indices, T * K));
    TRY(fmoe_check_pointer("offsets", offsets, N + 1));
    TRY(fmoe_check_pointer("pairs", pairs, T * K));
    size_t note = schedule_note_bytes(T);
    TRY(check_workspace(workspace, workspace_bytes, note + needed));
    *task = {(int)T, (int)K, (int)N, (int)(T * K), indices, offsets, pairs, workspace, (char *)workspace + note};
    return FMOE_OK;
}

fmoe_status schedule_from_args(const void *args, void *workspace, size_t workspace_bytes, size_t needed,
                               schedule_task *task) {
    const fmoe_schedule_args *a = (const fmoe_schedule_args *)args;
    return schedule_make(a->T, a->K, a->N, a->indices, a->offsets, a->pairs, workspace, workspace_bytes, needed, task);
}

fmoe_status schedule_nothing(const schedule_task *task, cudaStream_t stream) {
    size_t bytes = ((size_t)task->N + 1) * sizeof(int32_t);
    TRY(cuda_call("cudaMemsetAsync", cudaMemsetAsync(task->offsets, 0, bytes, stream)));
    return cuda_call("cudaMemsetAsync", cudaMemsetAsync(task->note, 0, CUDA_NOTE_BYTES, stream));
}

// The table pays from 65,536 pairs on, where it fits: below, a second kernel that sorts costs less than the table.
static bool takes_table(const fmoe_schedule_args *a) {
    return fmoe_cuda_level() >= 2 && a->T > 0 && a->T * a->K >= 1 << 16 && cuda_schedule_table_fits(a);
}

extern "C" size_t fmoe_cuda_schedule_workspace(int64_t T, int64_t K, int64_t N) {
    if (T < 0 || K < 1 || N < 1 || N > FMOE_CUDA_MAX_EXPERTS || T > INT32_MAX / K)
        return 0;
    fmoe_schedule_args args = {T, K, N, NULL, NULL, NULL};
    return takes_table(&args) ? cuda_schedule_table_workspace(&args) : cuda_schedule_levels_workspace(&args);
}

extern "C" fmoe_status fmoe_cuda_schedule(int64_t T, int64_t K, int64_t N, const int32_t *indices, int32_t *offsets,
                                          int32_t *pairs, void *workspace, size_t workspace_bytes, void *stream) {
    fmoe_schedule_args args = {T, K, N, indices, offsets, pairs};
    schedule_task checked;
    TRY(schedule_from_args(&args, workspace, workspace_bytes, 0, &checked));
    if (takes_table(&args))
        return cuda_schedule_table(&args, workspace, workspace_bytes, stream);
    return (fmoe_cuda_level() >= 2 ? cuda_schedule_overlap : cuda_schedule_even)(&args, workspace, workspace_bytes,
                                                                                 stream);
}
