/* A kernel of your own: what a plugin includes.
 *
 * A plugin is a shared library, or a .c or .cu file that ./chapterN compiles into one, with a single variable of this
 * name. `run` has the signature of every rung (chapter.h); the argument structs of the steps are in steps.h:
 *
 *     static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
 *         const fmoe_topk_args *a = args;
 *         ...
 *         return FMOE_OK;
 *     }
 *     const fmoe_plugin fmoe_plugin_rung = {FMOE_STEPS_VERSION, "topk", "my kernel", run};
 *
 * It may allocate and print, though the ladder's rungs do neither. It runs in a process of its own: whatever it does
 * there, the inputs, the verdict and the clock are elsewhere.
 */
#ifndef FMOE_PLUGIN_H
#define FMOE_PLUGIN_H

#include "steps.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a plugin leaves out is zero, which is the usual case. */
typedef struct {
    int version;                  /* FMOE_STEPS_VERSION, as compiled */
    const char *step;             /* "router", "topk", "schedule", "expert", "mlp", "layer", "topk_backward", ... */
    const char *name;             /* the line's name in the table */
    fmoe_rung_fn *run;            /* as in fmoe_rung */
    fmoe_backend backend;         /* BACKEND_CPU: host pointers. BACKEND_CUDA: device pointers and a stream */
    unsigned dtypes;              /* FMOE_ONLY(FMOE_F32) | FMOE_ONLY(FMOE_BF16), ...; 0: all three */
    fmoe_workspace_fn *workspace; /* NULL: needs none */
    bool (*supports)(const void *args); /* NULL: supports every case */
    const char *idea;                   /* one sentence, optional */
} fmoe_plugin;

#define FMOE_ONLY(dtype) (1u << (dtype))

extern const fmoe_plugin fmoe_plugin_rung;

#ifdef __cplusplus
}
#endif
#endif
