// What the router's backward pass hands from kernel to kernel.
#ifndef FMOE_ROUTER_BACKWARD_CUH
#define FMOE_ROUTER_BACKWARD_CUH

#include "router.cuh"

#define JOIN_KEYS  32 // keys whose share of the two means is added up by one block
#define MAX_SLICES 16

// dz, x̂ and the gate as sums of two bfloat16 each, for the products on tensor cores. dz: the first halves of all keys,
// then the second ones; gate: the second halves first, NULL where the gate is bfloat16 itself.
typedef struct {
    __nv_bfloat16 *dz;          // [T, 2, keys]
    __nv_bfloat16 *x_hi, *x_lo; // [T, d]
    __nv_bfloat16 *gate;        // [2, keys, d]
} router_halves;

typedef struct {
    int64_t T, d, n;
    bool training;
    int64_t slices;       // of the sum over the tokens
    int64_t keys;         // rows of a slice of dgate: 2n or more
    int64_t key_groups;   // of JOIN_KEYS keys, out of 2n
    router_norm norm;     // x̂ = normalised(x)
    const float *dlogits; // dz [2, T, n]
    float *dgate_slices;  // [slices, keys, d]
    float *dz_sums;       // [slices, 2n]
    float *means;         // [key_groups, 2, d]: shares of Σ_t dx̂ and of Σ_t dx̂ · x̂
    router_halves halves;
} router_backward_job;

// fmoe_cuda_router_backward with types of their own for dx and dgate, each dtype or float32. Either may be NULL.
fmoe_status router_backward(const fmoe_router_backward_args *args, fmoe_dtype dx_dtype, fmoe_write write,
                            fmoe_dtype dgate_dtype, void *workspace, size_t workspace_bytes, cudaStream_t stream);

// dgate_slices and dz_sums, from dlogits and x.
fmoe_status router_gate_product(const router_backward_job &job, fmoe_dtype dtype, const void *x, cudaStream_t stream);
// dx, from dlogits, the gate, and in training x and the means.
fmoe_status router_x_product(const router_backward_job &job, fmoe_dtype dtype, const void *x, const void *gate,
                             fmoe_dtype gradient_dtype, void *dx, cudaStream_t stream);

// The same by tensor cores (backward_wgmma.cu), after everything was split.
fmoe_status router_split(const router_backward_job &job, fmoe_dtype dtype, const void *x, const void *gate,
                         cudaStream_t stream);
fmoe_status router_gate_product_wgmma(const router_backward_job &job, cudaStream_t stream);
fmoe_status router_x_product_wgmma(const router_backward_job &job, fmoe_dtype dtype, const void *x, const void *gate,
                                   fmoe_dtype gradient_dtype, void *dx, cudaStream_t stream);

#endif
