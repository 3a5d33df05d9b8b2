/* The GPU as the chapters and the tests see it: which one there is, a problem's copy on it, and timing by events. Plain
 * C on the CUDA runtime; without nvcc (FMOE_WITH_CUDA undefined) no device is ever present and the rest is never
 * called. */
#ifndef FMOE_CHAPTERS_DEVICE_H
#define FMOE_CHAPTERS_DEVICE_H

#include "chapter.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    bool present;      /* a GPU, a driver for it, and code for it in this build */
    char why_not[120]; /* "built without CUDA", "no device: ..." */
    char name[96];     /* "NVIDIA H200" */
    char slug[96];     /* "nvidia-h200": the folder under plots/data */
    char driver[64];   /* "driver 580.159.04, CUDA 13.0" */
    int level;         /* fmoe_cuda_level() */
    int multiprocessors;
    size_t l2_bytes, memory_bytes;
} fmoe_device;

/* Looked up once a process. */
const fmoe_device *fmoe_device_get(void);

/* The GPU's ceilings, measured once and then read back from build/ceilings-<slug>.csv. Only where a device is present.
 */
const fmoe_ceilings *fmoe_device_ceilings(void);

/* "SM 1980 MHz, memory 3201 MHz" as nvidia-smi reports them now; "unknown" without it. */
void fmoe_device_clocks(char *text, size_t size);

/* A problem's tensors on the device, each between guard bands, with a workspace of exactly the size asked for. */
typedef struct {
    const fmoe_problem *problem;
    void *args;   /* the problem's arguments with device pointers */
    void *stream; /* a cudaStream_t of its own */
    void *blocks[FMOE_MAX_ARGUMENTS], *workspace_block, *workspace;
    size_t workspace_bytes;
} fmoe_device_problem;

/* Copies the inputs, poisons outputs and workspace, restores what is both. Free with fmoe_device_problem_free. */
fmoe_status fmoe_device_problem_new(const fmoe_problem *p, size_t workspace_bytes, fmoe_device_problem *d);
void fmoe_device_problem_free(fmoe_device_problem *d);
/* The host's inputs to the device once more (after they were changed there), outputs and workspace poisoned again. */
fmoe_status fmoe_device_problem_reset(fmoe_device_problem *d);
/* Waits for the stream and copies the outputs into the problem's data. FMOE_CUDA if the device failed;
 * FMOE_BAD_WORKSPACE if a guard band was written to, or an input changed. why (at least 200 bytes) names what. */
fmoe_status fmoe_device_problem_fetch(fmoe_device_problem *d, fmoe_problem *p, char *why);

/* Captures one call of the rung in a CUDA graph, which fmoe_device_replay launches; free with fmoe_device_graph_free.
 */
fmoe_status fmoe_device_capture(const fmoe_rung *rung, fmoe_device_problem *d, void **graph);
fmoe_status fmoe_device_replay(void *graph, void *stream);
void fmoe_device_graph_free(void *graph);

/* Plain memory on the device, for tests that call fmoe_cuda_ functions: NULL if there is none. Synchronous copies. */
void *fmoe_device_allocate(size_t bytes);
void fmoe_device_free(void *memory);
fmoe_status fmoe_device_upload(void *device, const void *host, size_t bytes);
fmoe_status fmoe_device_download(void *host, const void *device, size_t bytes);

/* As fmoe_rung_check and fmoe_time, for a CUDA rung. Each timed call follows a read of 256 MB, which flushes the L2,
 * and lies between two events; at least 50 calls, unless they take longer than two seconds. */
fmoe_status fmoe_device_rung_check(const fmoe_rung *rung, fmoe_problem *p, double *error, char *why);
fmoe_status fmoe_device_time(const fmoe_rung *rung, const fmoe_problem *p, fmoe_timing *timing);
/* Two rungs whose calls take turns, so that a card at its power limit is as hot and as slow for the one as for the
 * other. timings: of both; other: may be NULL. */
fmoe_status fmoe_device_time_in_turns(const fmoe_rung *rung, const fmoe_rung *other, const fmoe_problem *p,
                                      fmoe_timing *timings);

#ifdef __cplusplus
}
#endif
#endif
