// What the router's backward pass hands from kernel to kernel.
#ifndef FMOE_ROUTER_BACKWARD_CUH
#define FMOE_ROUTER_BACKWARD_CUH

#include "router.cuh"

#define JOIN_KEYS 32 // keys whose share of the two means is added up by one block

typedef struct {
    int64_t T, d, n;
    bool training;
    int64_t slices;       // of the tokens
    int64_t key_groups;   // of JOIN_KEYS keys, out of 2n
    router_norm norm;     // x̂ = normalised(x)
    const float *dlogits; // dz [2, T, n]
    float *dgate_slices;  // [slices, 2n, d]
    float *dz_sums;       // [slices, 2n]
    float *means;         // [key_groups, 2, d]: shares of Σ_t dx̂ and of Σ_t dx̂ · x̂
} router_backward_job;

// dgate_slices and dz_sums, from dlogits and x.
fmoe_status router_gate_product(const router_backward_job &job, fmoe_dtype dtype, const void *x, cudaStream_t stream);
// dx, from dlogits, the gate, and in training x and the means.
fmoe_status router_x_product(const router_backward_job &job, fmoe_dtype dtype, const void *x, const void *gate,
                             fmoe_dtype gradient_dtype, void *dx, cudaStream_t stream);

#endif
