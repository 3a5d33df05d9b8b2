/* The GPU from the host's side: which one there is, a problem's copy on it, one checked run, and timing by events. */
#include "device.h"

#include "../ref_cpu/check.h"
#include "program.h"

#ifndef FMOE_WITH_CUDA

#include "../cuda/rungs.h"

const fmoe_device *fmoe_device_get(void) {
    static const fmoe_device none = {.why_not = "built without CUDA", .level = -1};
    return &none;
}

const fmoe_ceilings *fmoe_device_ceilings(void) {
    return NULL;
}

void fmoe_device_clocks(char *text, size_t size) {
    snprintf(text, size, "unknown");
}

static fmoe_status not_built(void) {
    return fmoe_fail(FMOE_UNSUPPORTED, "this build has no CUDA");
}

fmoe_status cuda_not_built(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)args, (void)workspace, (void)workspace_bytes, (void)stream;
    return not_built();
}

fmoe_status fmoe_device_rung_check(const fmoe_rung *rung, fmoe_problem *p, double *error, char *why) {
    (void)rung, (void)p, (void)error;
    snprintf(why, 200, "this build has no CUDA");
    return not_built();
}

fmoe_status fmoe_device_time(const fmoe_rung *rung, const fmoe_problem *p, fmoe_timing *timing) {
    (void)rung, (void)p, (void)timing;
    return not_built();
}

fmoe_status fmoe_device_time_in_turns(const fmoe_rung *rung, const fmoe_rung *other, const fmoe_problem *p,
                                      fmoe_timing *timings) {
    (void)other;
    return fmoe_device_time(rung, p, timings);
}

#else

#include "../cuda/fmoe_cuda.h"
#include "../cuda/machine/machine_cuda.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- Which one there is ------------------------------------------------------------------------------------------ */

/* The first line that nvidia-smi prints for a query; false if there is none. */
static bool ask_driver(const char *query, char *line, int size) {
    char command[160];
    snprintf(command, sizeof command, "nvidia-smi --query-gpu=%s --format=csv,noheader 2>/dev/null", query);
    FILE *answer = popen(command, "r");
    bool found = answer && fgets(line, size, answer);
    if (answer)
        pclose(answer);
    if (found)
        line[strcspn(line, "\n")] = 0;
    return found;
}

static void describe_driver(char *text, size_t size) {
    char version[32];
    int cuda = 0;
    cudaDriverGetVersion(&cuda);
    if (!ask_driver("driver_version", version, sizeof version))
        snprintf(version, sizeof version, "unknown");
    snprintf(text, size, "%s, CUDA %d.%d", version, cuda / 1000, cuda % 1000 / 10);
}

static void look_up(fmoe_device *d) {
    struct cudaDeviceProp properties;
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaGetDeviceProperties(&properties, device);
    d->level = error == cudaSuccess ? fmoe_cuda_level() : -1;
    if (error != cudaSuccess) {
        snprintf(d->why_not, sizeof d->why_not, "no device");
        (void)cudaGetLastError();
        return;
    }
    snprintf(d->name, sizeof d->name, "%.90s", properties.name);
    slug_of(d->name, d->slug, sizeof d->slug);
    describe_driver(d->driver, sizeof d->driver);
    d->multiprocessors = properties.multiProcessorCount;
    d->l2_bytes = (size_t)properties.l2CacheSize;
    d->memory_bytes = properties.totalGlobalMem;
    d->present = d->level >= 0;
    if (!d->present)
        snprintf(d->why_not, sizeof d->why_not, "no code for %.60s in this build (make ARCHS=%d%d)", d->name,
                 properties.major, properties.minor);
}

const fmoe_device *fmoe_device_get(void) {
    static fmoe_device device;
    static bool known;
    if (!known)
        look_up(&device);
    known = true;
    return &device;
}

void fmoe_device_clocks(char *text, size_t size) {
    char line[64], *comma;
    snprintf(text, size, "unknown");
    if (ask_driver("clocks.sm,clocks.mem", line, sizeof line) && (comma = strstr(line, ", "))) {
        *comma = 0;
        snprintf(text, size, "SM %s, memory %s", line, comma + 2);
    }
}

/* ---- Memory ------------------------------------------------------------------------------------------------------ */

static fmoe_status cuda_status(cudaError_t error, const char *what) {
    if (error == cudaSuccess)
        return FMOE_OK;
    (void)cudaGetLastError();
    return fmoe_fail(error == cudaErrorMemoryAllocation ? FMOE_OUT_OF_MEMORY : FMOE_CUDA, "%s: %s", what,
                     cudaGetErrorString(error));
}

void *fmoe_device_allocate(size_t bytes) {
    void *memory = NULL;
    return cuda_status(cudaMalloc(&memory, bytes ? bytes : 1), "cudaMalloc") == FMOE_OK ? memory : NULL;
}

void fmoe_device_free(void *memory) {
    cudaFree(memory);
}

fmoe_status fmoe_device_upload(void *device, const void *host, size_t bytes) {
    return bytes ? cuda_status(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice), "copy to the device") : FMOE_OK;
}

fmoe_status fmoe_device_download(void *host, const void *device, size_t bytes) {
    return bytes ? cuda_status(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), "copy from the device")
                 : FMOE_OK;
}

/* ---- A problem on the device ------------------------------------------------------------------------------------- */

enum { GUARD = 4096, GUARD_BYTE = 0xa5, WHY = 200 };

static size_t bytes_of(const fmoe_argument *a) {
    return (size_t)a->count * fmoe_dtype_size(a->dtype);
}

static void *guarded(size_t bytes) {
    unsigned char *block = fmoe_device_allocate(bytes + 2 * (size_t)GUARD);
    if (!block)
        return NULL;
    cudaMemset(block, GUARD_BYTE, GUARD);
    cudaMemset(block + GUARD + bytes, GUARD_BYTE, GUARD);
    return block;
}

static void *inside(void *block) {
    return (char *)block + GUARD;
}

fmoe_status fmoe_device_problem_reset(fmoe_device_problem *d) {
    const fmoe_problem *p = d->problem;
    for (int i = 0; i < p->num_arguments; i++) {
        const fmoe_argument *a = &p->arguments[i];
        if (!a->data)
            continue;
        if (a->role == ROLE_OUTPUT)
            TRY(cuda_status(cudaMemset(inside(d->blocks[i]), a->dtype == FMOE_I32 || a->dtype == FMOE_I64 ? 0x80 : 0xff,
                                       bytes_of(a)),
                            a->name));
        else
            TRY(fmoe_device_upload(inside(d->blocks[i]), a->role == ROLE_INOUT ? a->pristine : a->data, bytes_of(a)));
    }
    TRY(cuda_status(cudaMemset(d->workspace, 0xff, d->workspace_bytes), "workspace"));
    return cuda_status(cudaDeviceSynchronize(), "reset");
}

fmoe_status fmoe_device_problem_new(const fmoe_problem *p, size_t workspace_bytes, fmoe_device_problem *d) {
    *d = (fmoe_device_problem){.problem = p, .workspace_bytes = workspace_bytes};
    fmoe_status status = FMOE_OK;
    d->args = malloc(p->step->args_size);
    d->workspace_block = guarded(workspace_bytes);
    if (!d->args || !d->workspace_block)
        status = fmoe_fail(FMOE_OUT_OF_MEMORY, "no memory for a workspace of %zu bytes on the device", workspace_bytes);
    if (status == FMOE_OK) {
        d->workspace = inside(d->workspace_block);
        memcpy(d->args, p->args, p->step->args_size);
        status = cuda_status(cudaStreamCreateWithFlags((cudaStream_t *)&d->stream, cudaStreamNonBlocking), "stream");
    }
    for (int i = 0; i < p->num_arguments && status == FMOE_OK; i++) {
        const fmoe_argument *a = &p->arguments[i];
        if (!a->data)
            continue;
        d->blocks[i] = guarded(bytes_of(a));
        if (!d->blocks[i]) {
            status = fmoe_fail(FMOE_OUT_OF_MEMORY, "no memory for %s on the device: %zu bytes", a->name, bytes_of(a));
            break;
        }
        void *pointer = inside(d->blocks[i]);
        memcpy((char *)d->args + a->slot, &pointer, sizeof pointer);
    }
    if (status == FMOE_OK)
        status = fmoe_device_problem_reset(d);
    if (status != FMOE_OK)
        fmoe_device_problem_free(d);
    return status;
}

void fmoe_device_problem_free(fmoe_device_problem *d) {
    for (int i = 0; i < FMOE_MAX_ARGUMENTS; i++)
        cudaFree(d->blocks[i]);
    cudaFree(d->workspace_block);
    if (d->stream)
        cudaStreamDestroy(d->stream);
    free(d->args);
    *d = (fmoe_device_problem){0};
}

static fmoe_status check_guards(const char *name, const void *block, size_t bytes, char *why) {
    unsigned char guards[2 * GUARD];
    TRY(fmoe_device_download(guards, block, GUARD));
    TRY(fmoe_device_download(guards + GUARD, (const char *)block + GUARD + bytes, GUARD));
    for (int i = 0; i < 2 * GUARD; i++)
        if (guards[i] != GUARD_BYTE) {
            snprintf(why, WHY, "wrote %s %s, %d bytes off", i < GUARD ? "before" : "beyond", name,
                     i < GUARD ? GUARD - i : i - GUARD + 1);
            return fmoe_fail(FMOE_BAD_WORKSPACE, "%s", why);
        }
    return FMOE_OK;
}

static fmoe_status check_input(const fmoe_argument *a, const void *device, char *why) {
    size_t bytes = bytes_of(a);
    void *now = malloc(bytes ? bytes : 1);
    if (!now)
        return fmoe_fail(FMOE_OUT_OF_MEMORY, "no memory to compare %s", a->name);
    fmoe_status status = fmoe_device_download(now, device, bytes);
    if (status == FMOE_OK && memcmp(now, a->data, bytes) != 0) {
        snprintf(why, WHY, "%s is an input and was written to", a->name);
        status = fmoe_fail(FMOE_BAD_WORKSPACE, "%s", why);
    }
    free(now);
    return status;
}

fmoe_status fmoe_device_problem_fetch(fmoe_device_problem *d, fmoe_problem *p, char *why) {
    *why = 0;
    fmoe_status status = cuda_status(cudaStreamSynchronize(d->stream), "the device");
    if (status != FMOE_OK) {
        snprintf(why, WHY, "%.190s", fmoe_error_message());
        return status;
    }
    TRY(check_guards("its workspace", d->workspace_block, d->workspace_bytes, why));
    for (int i = 0; i < p->num_arguments; i++) {
        fmoe_argument *a = &p->arguments[i];
        if (!a->data)
            continue;
        TRY(check_guards(a->name, d->blocks[i], bytes_of(a), why));
        if (a->role == ROLE_INPUT)
            TRY(check_input(a, inside(d->blocks[i]), why));
        else
            TRY(fmoe_device_download(a->data, inside(d->blocks[i]), bytes_of(a)));
    }
    return FMOE_OK;
}

/* ---- One checked run --------------------------------------------------------------------------------------------- */

fmoe_status fmoe_device_rung_check(const fmoe_rung *rung, fmoe_problem *p, double *error, char *why) {
    fmoe_device_problem d;
    *error = INFINITY;
    fmoe_status status = fmoe_device_problem_new(p, rung_workspace(rung, p), &d);
    if (status == FMOE_OK)
        status = rung->run(d.args, d.workspace, d.workspace_bytes, d.stream);
    if (status != FMOE_OK) {
        snprintf(why, WHY, "%s: %.150s", fmoe_status_name(status), fmoe_error_message());
    } else {
        fmoe_problem_poison(p);
        status = fmoe_device_problem_fetch(&d, p, why);
        if (status == FMOE_OK)
            *error = fmoe_problem_error(p, why);
    }
    fmoe_device_problem_free(&d);
    return status;
}

/* ---- Graphs ------------------------------------------------------------------------------------------------------ */

fmoe_status fmoe_device_capture(const fmoe_rung *rung, fmoe_device_problem *d, void **graph) {
    cudaGraph_t recorded = NULL;
    *graph = NULL;
    TRY(cuda_status(cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal), "capture"));
    fmoe_status status = rung->run(d->args, d->workspace, d->workspace_bytes, d->stream);
    fmoe_status ended = cuda_status(cudaStreamEndCapture(d->stream, &recorded), "end of capture");
    if (status == FMOE_OK)
        status = ended;
    if (status == FMOE_OK)
        status = cuda_status(cudaGraphInstantiate((cudaGraphExec_t *)graph, recorded, 0), "instantiate");
    if (recorded)
        cudaGraphDestroy(recorded);
    return status;
}

fmoe_status fmoe_device_replay(void *graph, void *stream) {
    return cuda_status(cudaGraphLaunch(graph, stream), "replay");
}

void fmoe_device_graph_free(void *graph) {
    if (graph)
        cudaGraphExecDestroy(graph);
}

/* ---- Timing ------------------------------------------------------------------------------------------------------ */

enum { WARM_UP = 3, AT_LEAST = 50, AT_MOST = 200 };

// A rung whose calls are timed, one after the other or in turns with another's.
typedef struct {
    const fmoe_rung *rung;
    void *graph;
    double ms[AT_MOST];
} timed_calls;

// [device-time]
/* The flush runs longer than the host needs to queue what follows, so no gap between launches is the host's. */
static fmoe_status time_once(const timed_calls *of, fmoe_device_problem *d, const void *flush, cudaEvent_t *events,
                             double *ms) {
    float elapsed = 0;
    TRY(cuda_flush_l2(flush, CUDA_FLUSH_BYTES, d->stream));
    TRY(cuda_status(cudaEventRecord(events[0], d->stream), "event"));
    TRY(of->graph ? fmoe_device_replay(of->graph, d->stream)
                  : of->rung->run(d->args, d->workspace, d->workspace_bytes, d->stream));
    TRY(cuda_status(cudaEventRecord(events[1], d->stream), "event"));
    TRY(cuda_status(cudaEventSynchronize(events[1]), "the device"));
    TRY(cuda_status(cudaEventElapsedTime(&elapsed, events[0], events[1]), "event"));
    *ms = elapsed;
    return FMOE_OK;
}
// [/device-time]

// [turns]
static fmoe_status time_turns(timed_calls *of, int count, fmoe_device_problem *d, const void *flush,
                              cudaEvent_t *events, int *runs) {
    double spent_ms = 0;
    for (int i = 0; i < WARM_UP * count; i++)
        TRY(time_once(&of[i % count], d, flush, events, &of[i % count].ms[0]));
    *runs = 0;
    while (*runs < AT_MOST) {
        for (int i = 0; i < count; i++) {
            TRY(time_once(&of[i], d, flush, events, &of[i].ms[*runs]));
            spent_ms += of[i].ms[*runs];
        }
        ++*runs;
        if ((*runs >= AT_LEAST && spent_ms > (fmoe_opt.quick ? 20 : 100)) || (*runs >= 5 && spent_ms > 2000))
            break;
    }
    return FMOE_OK;
}
// [/turns]

static fmoe_status time_all(timed_calls *of, int count, fmoe_device_problem *d, fmoe_timing *timings) {
    cudaEvent_t events[2] = {NULL, NULL};
    int runs = 0;
    void *flush = fmoe_device_allocate(CUDA_FLUSH_BYTES);
    fmoe_status status = flush ? FMOE_OK : FMOE_OUT_OF_MEMORY;
    for (int i = 0; i < 2 && status == FMOE_OK; i++)
        status = cuda_status(cudaEventCreate(&events[i]), "event");
    for (int i = 0; i < count && status == FMOE_OK; i++)
        if (of[i].rung->replay)
            status = fmoe_device_capture(of[i].rung, d, &of[i].graph);
    if (status == FMOE_OK)
        status = time_turns(of, count, d, flush, events, &runs);
    for (int i = 0; i < count; i++) {
        fmoe_device_graph_free(of[i].graph);
        if (status == FMOE_OK)
            timings[i] = timing_of(runs, of[i].ms);
    }
    for (int i = 0; i < 2; i++)
        if (events[i])
            cudaEventDestroy(events[i]);
    fmoe_device_free(flush);
    return status;
}

fmoe_status fmoe_device_time_in_turns(const fmoe_rung *rung, const fmoe_rung *other, const fmoe_problem *p,
                                      fmoe_timing *timings) {
    fmoe_device_problem d;
    timed_calls of[2] = {{.rung = rung}, {.rung = other}};
    size_t bytes = rung_workspace(rung, p);
    if (other && rung_workspace(other, p) > bytes)
        bytes = rung_workspace(other, p);
    TRY(fmoe_device_problem_new(p, bytes, &d));
    fmoe_status status = time_all(of, other ? 2 : 1, &d, timings);
    fmoe_device_problem_free(&d);
    return status;
}

fmoe_status fmoe_device_time(const fmoe_rung *rung, const fmoe_problem *p, fmoe_timing *timing) {
    return fmoe_device_time_in_turns(rung, NULL, p, timing);
}

#endif
