/* What chapter 0 asks of the GPU: its ceilings, and what becomes of a timing that is done wrong. */
#ifndef FMOE_MACHINE_CUDA_H
#define FMOE_MACHINE_CUDA_H

#include "../../chapters/chapter.h"

#ifdef __cplusplus
extern "C" {
#endif

#include "../../chapters/program.h"

/* ---- Before each timed call (flush.cu) --------------------------------------------------------------------------- */

#define CUDA_FLUSH_BYTES ((size_t)256 << 20)

/* Reads the buffer (CUDA_FLUSH_BYTES on the device), so that the L2 holds nothing else. */
fmoe_status cuda_flush_l2(const void *buffer, size_t bytes, void *stream);

/* ---- The vendor's library (cublas.cu) ---------------------------------------------------------------------------- */

/* Opened once, at run time: nothing is linked. */
bool cublas_available(void);
/* c = a · bᵀ with a [M, K], b [N, K], c [M, N], row-major and all of dtype; sums in float32, float32 without TF32. */
fmoe_status cublas_product(fmoe_dtype dtype, int M, int N, int K, const void *a, const void *b, void *c, void *stream);

/* ---- Ceilings (ceilings.cu, launches.cu) ------------------------------------------------------------------------- */

/* Adds the GPU's to the list: copy, gather, reduce, shared, fma, gemm (where there is a cuBLAS), launch, launch_call,
 * graph_launch, event_pair. Takes a second and 1.1 GB. What it could not measure is left out. */
fmoe_status cuda_ceilings_measure(ceiling_list *list);

/* ---- Timing done wrong (timing.cu) ------------------------------------------------------------------------------- */

typedef struct {
    double first_ms, second_ms; /* the first launch of a kernel, with the wait for it, and the next one */
    /* A gather of gathered_mb[0]: the host's clock around the launch, around launch and wait, and events. */
    fmoe_timing call, waited, events;
    /* A gather of gathered_mb[1] by events: the call before has left its rows in the L2, or the L2 was flushed. */
    fmoe_timing left_in_l2, flushed;
    double gathered_mb[2];
    /* A kernel of a microsecond: the host's clock around launch and wait; events around it in an empty stream, and
     * behind a kernel that holds the device; among 500 between two events, and among 100 of a graph. */
    fmoe_timing short_host, short_events, short_held, short_many, short_graph;
    /* A product of bfloat16 matrices, of gemm_flops; all zero where there is no cuBLAS. */
    fmoe_timing gemm_random, gemm_zeros, gemm_random_again;
    double gemm_flops;
} cuda_mistakes;

/* Takes two seconds and 0.5 GB. */
fmoe_status cuda_mistakes_measure(cuda_mistakes *m);

#ifdef __cplusplus
}
#endif
#endif
