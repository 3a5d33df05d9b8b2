// What the rungs of the expert step share: their arguments and workspace, the checks, a pair's index, notes.
#ifndef FMOE_EXPERT_CUH
#define FMOE_EXPERT_CUH

#include "../../chapters/steps.h"
#include "../ptx.cuh"

// Letters as in fmoe.h. A pair is p = t · K + k.
typedef struct {
    int T, d, N, K;
    fmoe_dtype dtype;
    const void *x, *down, *up; // [T, d], [N, d], [N, d] dtype
    const int32_t *indices;    // [T, K]
    const float *weights;      // [T, K]
    void *y;                   // [T, d] dtype
    float *pre_activations;    // [T, K], or NULL
    void *note;                // the workspace: notes,
    float *activations;        // [T, K] silu(s) · g,
    float *partials;           // and [slices, T, K] sums over a slice's columns, where the columns are sliced
} expert_task;

#define NO_EXPERT (-1)

fmoe_status expert_check(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype, const void *x, const void *down,
                         const void *up, const int32_t *indices, const float *weights, const void *y);
// The same for a rung's arguments, and the task that they make.
fmoe_status expert_from_args(const void *args, void *workspace, size_t workspace_bytes, size_t needed,
                             expert_task *task);
// Where the parts of the workspace lie; the bytes of all of it.
void expert_lay_out(expert_task *task, void *workspace);
size_t expert_bytes(int64_t T, int64_t K, int64_t slices);

static inline size_t up_to_256(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

// Chapter 5's last rung, which fmoe_cuda_expert calls.
fmoe_status expert_slices(const expert_task &task, cudaStream_t stream);
int expert_slices_kept(int64_t T, int64_t d, int64_t N, int64_t K, fmoe_dtype dtype);

// A pair's expert, or NO_EXPERT where the index is none.
__device__ inline int32_t expert_of_pair(const expert_task &a, int64_t pair) {
    int32_t e = a.indices[pair];
    return (uint32_t)e < (uint32_t)a.N ? e : NO_EXPERT;
}

// A token's line of the note: first_bad is the k of its first bad index, K if it has none. One thread a token.
__device__ inline void write_note(const expert_task &a, int t, int first_bad) {
    bool bad = first_bad < a.K;
    cuda_note_lines(a.note)[t] = {bad ? first_bad : -1, bad ? a.indices[(int64_t)t * a.K + first_bad] : 0};
    if (t == 0)
        *(cuda_note *)a.note = {CUDA_NOTE_MARK, a.T, a.N, LIMIT_EXPERTS};
}

__device__ inline float silu(float s) {
    return s / (1 + expf(-s));
}

// What becomes of a pair's sum: its pre-activation and its activation.
__device__ inline void store_pair(const expert_task &a, int64_t pair, int32_t expert, float s, float weight) {
    if (a.pre_activations)
        a.pre_activations[pair] = expert == NO_EXPERT ? 0 : s;
    a.activations[pair] = expert == NO_EXPERT ? 0 : silu(s) * weight;
}

#endif
