// schedule: the checks that all rungs share.
#include "schedule.cuh"

fmoe_status schedule_make(int64_t T, int64_t K, int64_t N, const int32_t *indices, int32_t *offsets, int32_t *pairs,
                          void *workspace, size_t workspace_bytes, size_t needed, schedule_task *task) {
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
