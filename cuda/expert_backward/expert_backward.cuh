// What the rungs of expert_backward share: their arguments and workspace, the checks, what a pair contributes.
#ifndef FMOE_EXPERT_BACKWARD_CUH
#define FMOE_EXPERT_BACKWARD_CUH

#include "../expert/expert.cuh"

// Letters as in fmoe.h. A pair is p = t · K + k.
typedef struct {
    int T, d, N, K;
    fmoe_dtype dtype;
    const void *x, *down, *up, *dy; // [T, d], [N, d], [N, d], [T, d] dtype
    const int32_t *indices;         // [T, K]
    const float *weights;           // [T, K]
    const float *pre_activations;   // [T, K]
    const int32_t *offsets, *pairs; // [N + 1], [T·K]; the pairs with a bad index are -1, at the end
    bool accumulate, wide;          // the tables' gradients; gradients in float32 though dtype is not
    void *dx, *ddown, *dup;         // [T, d], [N, d], [N, d], each may be NULL
    float *dweights;                // [T, K], or NULL
    // The workspace:
    void *note;         // notes;
    float *activations; // [T, K] a = silu(s) · g, of the rungs that need it;
    float *ds;          // [T, K] the gradients of the pre-activations;
    float *partials;    // [slices, T, K] of the pre-activations, where they are made from slices of the columns;
    int range;          // pairs of the schedule a list, about;
    float *parts;       // [lists, 2, d] of ddown and dup, for the lists that have a part of an expert's pairs
} backward_task;

// What of the workspace a rung needs.
typedef struct {
    bool activations, parts, pre_activations, schedule;
} backward_needs;

// Lays out the workspace, NULL to learn its size; the schedule's own workspace goes to *schedule.
size_t backward_lay_out(backward_task *task, backward_needs needs, void *workspace, void **schedule);
// The checks, and the task of a rung's arguments.
fmoe_status backward_from_args(const void *args, void *workspace, size_t workspace_bytes, backward_needs needs,
                               backward_task *task);
// Nothing but zeros, when there are no tokens.
fmoe_status backward_no_tokens(const backward_task &task, cudaStream_t stream);

static inline int64_t backward_lists(const backward_task &a) {
    return ceil_div((int64_t)a.T * a.K, a.range);
}

// What the layer adds to dx before it is rounded: float32 [T, d] each, or NULL.
typedef struct {
    const float *first, *second;
} dx_addends;

// gathered.cu: dx, notes, and dweights of bad indices, after ds. In slices of the columns where that pays.
fmoe_status backward_dx(const backward_task &a, bool sliced, dx_addends add, bool overlap, cudaStream_t stream);
// The bytes of a slice, 2048 where the columns are not sliced, and how many slices there are, 0 if they are not.
int backward_slice_bytes(const backward_task &a);
int backward_slices(const backward_task &a);
// sampled.cu: s = ⟨x, down[e]⟩ into pre_activations; activations and ds from dA = ⟨dy, up[e]⟩, and dweights.
fmoe_status backward_pre_activations(const backward_task &a, float *pre_activations, cudaStream_t stream);
fmoe_status backward_pair_numbers(const backward_task &a, cudaStream_t stream);
// lists.cu: ddown, dup; with `on_the_way` also ds and dweights, which are otherwise there before.
fmoe_status backward_tables(const backward_task &a, bool on_the_way, bool overlap, cudaStream_t stream);

// [pair-numbers]
// What a pair adds: `to_up` times dy to dup; dA times `to_down` is ds, which goes to ddown and dx; dA times `silu` is
// the gradient of its routing weight.
typedef struct {
    float to_up, to_down, silu;
} pair_scales;

__device__ inline pair_scales scales_of(float s, float weight) {
    float sigmoid = 1 / (1 + expf(-s)), silu = s * sigmoid;
    return {silu * weight, weight * (sigmoid * (1 + s * (1 - sigmoid))), silu};
}
// [/pair-numbers]

// The index as for the forward step, or NO_EXPERT.
__device__ inline int32_t expert_of_pair(const backward_task &a, int64_t pair) {
    int32_t e = a.indices[pair];
    return (uint32_t)e < (uint32_t)a.N ? e : NO_EXPERT;
}

// One element of a gradient, of E or of float32.
template <typename E>
__device__ inline void store_element(const backward_task &a, void *gradient, int64_t at, float v) {
    if (a.wide)
        ((float *)gradient)[at] = v;
    else
        ((E *)gradient)[at] = from_f32<E>(v);
}
template <typename E> __device__ inline float load_element(const backward_task &a, const void *gradient, int64_t at) {
    return a.wide ? ((const float *)gradient)[at] : to_f32(((const E *)gradient)[at]);
}

#endif
