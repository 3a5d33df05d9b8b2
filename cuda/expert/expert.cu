// The expert step's entry point, and what all of its rungs check and lay out.
#include "expert.h"
#include "../strategies/strategies.h"
#include "expert.cuh"

static fmoe_status check_fits(const char *name, int64_t value) {
    if (value > INT32_MAX / 16) // of this the kernels' int products make use
        return fmoe_fail(FMOE_UNSUPPORTED, "%s = %lld exceeds %d, the most on the GPU", name, (long long)value,
                         INT32_MAX / 16);
    return FMOE_OK;
}

fmoe_status expert_check(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype, const void *x, const void *down,
                         const void *up, const int32_t *indices, const float *weights, const void *y) {
    TRY(fmoe_check_tokens(T));
    TRY(fmoe_check_size("hidden_size", d));
    TRY(fmoe_check_experts(N));
    TRY(fmoe_check_topk(K, "num_experts", N));
    TRY(check_dtype(dtype));
    TRY(fmoe_check_shape("tokens", T, "hidden_size", d));
    TRY(fmoe_check_shape("num_experts", N, "hidden_size", d));
    TRY(fmoe_check_shape("tokens", T, "num_experts_per_tok", K));
    TRY(check_fits("tokens", T));
    TRY(check_fits("hidden_size", d));
    TRY(check_fits("num_experts_per_tok", K));
    TRY(fmoe_check_pointer("x", x, T * d));
    TRY(fmoe_check_pointer("down_embed.weight", down, N * d));
    TRY(fmoe_check_pointer("up_embed.weight", up, N * d));
    TRY(fmoe_check_pointer("indices", indices, T * K));
    TRY(fmoe_check_pointer("weights", weights, T * K));
    return fmoe_check_pointer("y", y, T * d);
}

size_t expert_bytes(int64_t T, int64_t K, int64_t slices) {
    return up_to_256(cuda_note_workspace(T)) + (size_t)(1 + slices) * up_to_256((size_t)(T * K) * sizeof(float));
}

void expert_lay_out(expert_task *task, void *workspace) {
    size_t pairs = up_to_256((size_t)task->T * task->K * sizeof(float));
    char *after_note = (char *)workspace + up_to_256(cuda_note_workspace(task->T));
    task->note = workspace;
    task->activations = (float *)after_note;
    task->partials = (float *)(after_note + pairs);
}

fmoe_status expert_from_args(const void *args, void *workspace, size_t workspace_bytes, size_t needed,
                             expert_task *task) {
    const fmoe_expert_args *a = (const fmoe_expert_args *)args;
    TRY(expert_check(a->T, a->d, a->N, a->K, a->dtype, a->x, a->down, a->up, a->indices, a->weights, a->y));
    TRY(check_workspace(workspace, workspace_bytes, needed));
    *task = {(int)a->T,  (int)a->d,  (int)a->N, (int)a->K, a->dtype, a->x, a->down, a->up,
             a->indices, a->weights, a->y,      NULL,      NULL,     NULL, NULL};
    expert_lay_out(task, workspace);
    return FMOE_OK;
}

extern "C" size_t cuda_expert_bytes(const void *args) {
    const fmoe_expert_args *a = (const fmoe_expert_args *)args;
    return expert_bytes(a->T, a->K, 0);
}

extern "C" bool cuda_expert_16_byte_rows(const void *args) {
    const fmoe_expert_args *a = (const fmoe_expert_args *)args;
    return a->d * fmoe_dtype_size(a->dtype) % 16 == 0;
}

extern "C" bool cuda_expert_small(const void *args) {
    const fmoe_expert_args *a = (const fmoe_expert_args *)args;
    return a->T * a->K <= (1ll << 30) / a->d;
}

// By chapter 7's choice: token by token, or on tensor cores where a token chooses a good part of all experts.
extern "C" fmoe_status fmoe_cuda_expert(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype, const void *x,
                                        const void *down, const void *up, const int32_t *indices, const float *weights,
                                        void *y, float *pre_activations, void *workspace, size_t workspace_bytes,
                                        void *stream) {
    TRY(expert_check(T, d, N, K, dtype, x, down, up, indices, weights, y));
    TRY(check_workspace(workspace, workspace_bytes, fmoe_cuda_expert_workspace(T, d, N, K, dtype)));
    if (T == 0) // no token's block writes the note
        return cuda_call("clearing the note", cudaMemsetAsync(workspace, 0, CUDA_NOTE_BYTES, (cudaStream_t)stream));
    fmoe_expert_args args = {T, d, N, K, false, dtype, x, down, up, indices, weights, y};
    cuda_strategy choice = cuda_strategy_choose(&args);
    if (choice == CUDA_STRATEGY_DENSE)
        return cuda_strategy_dense_run(&args, pre_activations, workspace, workspace_bytes, stream);
    if (choice == CUDA_STRATEGY_ROWS)
        return cuda_strategy_rows_run(&args, pre_activations, workspace, workspace_bytes, stream);
    expert_task task = {(int)T,  (int)d,  (int)N, (int)K,          dtype, x,    down, up,
                        indices, weights, y,      pre_activations, NULL,  NULL, NULL};
    expert_lay_out(&task, workspace);
    return expert_slices(task, (cudaStream_t)stream);
}

extern "C" size_t fmoe_cuda_expert_workspace(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype) {
    if (T < 0 || d < 1 || N < 1 || K < 1 || check_dtype(dtype) != FMOE_OK) // fmoe_cuda_expert says which
        return 0;
    fmoe_expert_args args = {T, d, N, K, false, dtype, NULL, NULL, NULL, NULL, NULL, NULL};
    return cuda_strategy_chooser_bytes(&args);
}
