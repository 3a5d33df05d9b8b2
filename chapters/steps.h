/* The C signature of each step: the arguments a rung is given, whether it is built in or a reader's own.
 *
 * Every struct has sizes, flags, the storage type of the pointers marked "dtype", and pointers: inputs const, outputs
 * not. Letters and shapes as in fmoe.h. Routing weights, scores, logits and their gradients are float32 unless marked.
 * The pointers are host pointers for a CPU rung and device pointers for a CUDA rung. Results are rounded once, at the
 * store. A pointer marked "optional" may be NULL. FMOE_STEPS_VERSION grows with every change of a struct.
 */
#ifndef FMOE_STEPS_H
#define FMOE_STEPS_H

#include "chapter.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FMOE_STEPS_VERSION 2

/* Chapter 2. x̂ = norm(x); logits = x̂ · gateᵀ; log_probs = log-softmax of each side. */
typedef struct {
    int64_t T, d, n;
    bool training;
    fmoe_dtype dtype;
    const void *x;       /* [T, d] dtype */
    const void *gate;    /* [2n, d] dtype */
    float *running_mean; /* [d]; moves in training */
    float *running_var;  /* [d]; moves in training */
    float *logits;       /* [2, T, n] */
    float *log_probs;    /* [2, T, n] */
} fmoe_router_args;

/* Chapter 3. */
typedef struct {
    int64_t T, n, K;
    bool norm_topk_prob;
    fmoe_dtype dtype;
    const void *logits; /* [2, T, n] dtype */
    int32_t *indices;   /* [T, K] */
    float *scores;      /* [T, K] */
    float *weights;     /* [T, K] */
} fmoe_topk_args;

/* Chapter 4. */
typedef struct {
    int64_t T, K, N;
    const int32_t *indices; /* [T, K] */
    int32_t *offsets;       /* [N + 1] */
    int32_t *pairs;         /* [T·K] */
} fmoe_schedule_args;

/* Chapters 1, 5 and 7: from indices and routing weights to y; a rung that wants a schedule builds it itself. */
typedef struct {
    int64_t T, d, N, K;
    bool from_router; /* a hint: the indices come from the Cartesian router, so they cluster in rows; may be false */
    fmoe_dtype dtype;
    const void *x;          /* [T, d] dtype */
    const void *down;       /* [N, d] dtype */
    const void *up;         /* [N, d] dtype */
    const int32_t *indices; /* [T, K] */
    const float *weights;   /* [T, K] */
    void *y;                /* [T, d] dtype */
} fmoe_expert_args;

/* Chapter 6. */
typedef struct {
    int64_t T, d, I;
    fmoe_dtype dtype;
    const void *x;    /* [T, d] dtype */
    const void *gate; /* [I, d] dtype */
    const void *up;   /* [I, d] dtype */
    const void *down; /* [d, I] dtype */
    void *y;          /* [T, d] dtype */
} fmoe_mlp_args;

/* Chapter 8. */
typedef struct {
    int64_t T, d, I, N, K, n;
    bool training, norm_topk_prob;
    fmoe_dtype dtype;
    const void *x;           /* [T, d] dtype */
    const void *router_gate; /* [2n, d] dtype */
    const void *down_embed;  /* [N, d] dtype */
    const void *up_embed;    /* [N, d] dtype */
    const void *gate_proj;   /* [I, d] dtype */
    const void *up_proj;     /* [I, d] dtype */
    const void *down_proj;   /* [d, I] dtype */
    float *running_mean;     /* [d]; moves in training */
    float *running_var;      /* [d]; moves in training */
    void *y;                 /* [T, d] dtype */
    float *router_logits;    /* [2, T, n] */
    float *scores;           /* [T, K] */
    int32_t *indices;        /* [T, K] */
} fmoe_layer_args;

/* Chapter 9. Weight gradients are dense, in the storage type, overwriting. */
typedef struct {
    int64_t T, d, n;
    bool training;
    fmoe_dtype dtype;
    const void *x;                           /* [T, d] dtype */
    const void *gate;                        /* [2n, d] dtype */
    const float *running_mean, *running_var; /* [d]; in training not read */
    const float *dlogits;                    /* [2, T, n] */
    void *dx;                                /* [T, d] dtype */
    void *dgate;                             /* [2n, d] dtype */
} fmoe_router_backward_args;

typedef struct {
    int64_t T, n, K;
    bool norm_topk_prob;
    fmoe_dtype dtype;
    const void *logits;     /* [2, T, n] dtype */
    const int32_t *indices; /* [T, K] */
    const float *dweights;  /* [T, K] */
    float *dlogits;         /* [2, T, n] */
} fmoe_topk_backward_args;

typedef struct {
    int64_t T, d, N, K;
    fmoe_dtype dtype;
    const void *x;                /* [T, d] dtype */
    const void *down;             /* [N, d] dtype */
    const void *up;               /* [N, d] dtype */
    const int32_t *indices;       /* [T, K] */
    const float *weights;         /* [T, K] */
    const float *pre_activations; /* [T, K] kept by the forward pass */
    const int32_t *offsets;       /* [N + 1] kept by the forward pass */
    const int32_t *pairs;         /* [T·K] kept by the forward pass */
    const void *dy;               /* [T, d] dtype */
    void *dx;                     /* [T, d] dtype */
    void *ddown;                  /* [N, d] dtype */
    void *dup;                    /* [N, d] dtype */
    float *dweights;              /* [T, K] */
} fmoe_expert_backward_args;

/* h = silu(p) ⊙ q with p = x · gateᵀ, q = x · upᵀ. What the forward pass keeps is h and what dh will be multiplied by:
 * silu'(p) ⊙ q and silu(p). */
typedef struct {
    int64_t T, d, I;
    fmoe_dtype dtype;
    const void *x;      /* [T, d] dtype */
    const void *gate;   /* [I, d] dtype */
    const void *up;     /* [I, d] dtype */
    const void *down;   /* [d, I] dtype */
    const void *h;      /* [T, I] dtype, kept by the forward pass; optional, as are the next two */
    const void *h_by_p; /* [T, I] dtype */
    const void *h_by_q; /* [T, I] dtype */
    const void *dy;     /* [T, d] dtype */
    void *dx;           /* [T, d] dtype */
    void *dgate;        /* [I, d] dtype */
    void *dup;          /* [I, d] dtype */
    void *ddown;        /* [d, I] dtype */
} fmoe_mlp_backward_args;

typedef struct {
    fmoe_layer_args forward;
    const void *dy;                               /* [T, d] dtype */
    void *dx;                                     /* [T, d] dtype */
    void *drouter_gate, *ddown_embed, *dup_embed; /* like the weights */
    void *dgate_proj, *dup_proj, *ddown_proj;     /* like the weights */
} fmoe_layer_backward_args;

/* chapters/step_router.c, step_topk.c, ...: how to draw each step's problem, its reference and its floor. */
extern const fmoe_step fmoe_step_router, fmoe_step_topk, fmoe_step_schedule, fmoe_step_expert, fmoe_step_mlp,
    fmoe_step_layer, fmoe_step_router_backward, fmoe_step_topk_backward, fmoe_step_expert_backward,
    fmoe_step_mlp_backward, fmoe_step_layer_backward;

/* The router step's inputs at a case, which its gradients are taken at: x and the gate as stored, the buffers [d]. */
fmoe_status fmoe_router_draw(const fmoe_case *c, uint64_t seed, void *x, void *gate, float *running_mean,
                             float *running_var);

/* The most that the mlp step's reference computes in full; beyond it, a quarter of that, by leaving tokens out. */
extern double fmoe_mlp_reference_operations;

/* The CPU ladders, in each chapter's cpu.c (chapter 9: a file a ladder), each ended by a rung whose run is NULL. */
extern const fmoe_rung chapter1_rungs[], chapter2_rungs[], chapter3_rungs[], chapter4_rungs[], chapter5_rungs[],
    chapter6_rungs[], chapter7_rungs[], chapter8_rungs[];
extern const fmoe_rung chapter9_router_rungs[], chapter9_topk_rungs[], chapter9_expert_rungs[], chapter9_mlp_rungs[],
    chapter9_layer_rungs[];

/* Rungs that later chapters build on, by name. The expert ones take fmoe_expert_args, and so on. */
fmoe_rung_fn cpu_router_best, cpu_topk_best, cpu_schedule_best, cpu_expert_token_best, cpu_expert_scheduled_best,
    cpu_mlp_best;
fmoe_workspace_fn cpu_router_best_workspace, cpu_topk_best_workspace, cpu_schedule_best_workspace,
    cpu_expert_token_best_workspace, cpu_expert_scheduled_best_workspace, cpu_mlp_best_workspace;

/* What three of them are made of: they store y in a type of its own. The layer asks for float32, adds its two branches
 * and rounds once. The workspaces are the rungs'. */
fmoe_status cpu_expert_token_into(const fmoe_expert_args *args, fmoe_dtype y_dtype, void *workspace);
fmoe_status cpu_expert_scheduled_into(const fmoe_expert_args *args, fmoe_dtype y_dtype, void *workspace);
fmoe_status cpu_mlp_into(const fmoe_mlp_args *args, fmoe_dtype y_dtype, void *workspace, size_t workspace_bytes);

#ifdef __cplusplus
}
#endif
#endif
