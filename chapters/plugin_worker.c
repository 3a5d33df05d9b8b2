/* The process that a plugin runs in: loads it, and does what the parent asks until the parent closes the socket. */
#include "doors.h"
#include "device.h"
#include "program.h"

#include "../ref_cpu/check.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#ifdef FMOE_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

typedef struct {
    fmoe_rung rung;               /* the plugin as one */
    const char *(*message)(void); /* the plugin's own copy of fmoe_error_message, if it has one */
    int socket, memory;
    unsigned char *bytes; /* the shared block */
    size_t size;
    fmoe_step step; /* only its args_size is used here */
    fmoe_problem problem;
#ifdef FMOE_WITH_CUDA
    fmoe_device_problem device;
    bool on_device;
#endif
} worker;

/* ---- Loading ----------------------------------------------------------------------------------------------------- */

static void copy_text(char *to, size_t size, const char *from) {
    snprintf(to, size, "%s", from ? from : "");
}

/* The version comes first in the struct and stays there, so it can be read whatever follows. */
static void load(worker *w, const char *path, door_about *about) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        copy_text(about->text, sizeof about->text, dlerror());
        return;
    }
    const fmoe_plugin *p = dlsym(library, "fmoe_plugin_rung");
    if (!p) {
        snprintf(about->text, sizeof about->text,
                 "it has no variable fmoe_plugin_rung: a plugin defines one (chapters/plugin.h)");
        return;
    }
    if (p->version != FMOE_STEPS_VERSION) {
        snprintf(about->text, sizeof about->text,
                 "it was compiled for version %d of the steps, this program has version %d: compile it again",
                 p->version, FMOE_STEPS_VERSION);
        return;
    }
    if (!p->step || !p->name || !p->run || !*p->name) {
        snprintf(about->text, sizeof about->text, "fmoe_plugin_rung.%s is not set",
                 !p->step  ? "step"
                 : !p->run ? "run"
                           : "name");
        return;
    }
    w->rung = (fmoe_rung){
        .name = p->name, .backend = p->backend, .run = p->run, .workspace = p->workspace, .supports = p->supports};
    *(void **)&w->message = dlsym(library, "fmoe_error_message");
    *about = (door_about){.loaded = true, .backend = p->backend, .dtypes = p->dtypes};
    copy_text(about->step, sizeof about->step, p->step);
    copy_text(about->name, sizeof about->name, p->name);
    copy_text(about->idea, sizeof about->idea, p->idea);
}

/* ---- The block --------------------------------------------------------------------------------------------------- */

static void forget(worker *w) {
#ifdef FMOE_WITH_CUDA
    if (w->on_device)
        fmoe_device_problem_free(&w->device);
    w->on_device = false;
#endif
    if (w->bytes)
        munmap(w->bytes, w->size);
    free(w->problem.args);
    w->problem = (fmoe_problem){0};
    w->bytes = NULL;
}

/* The problem as the block describes it: the arguments' pointers are set to where the block lies here. */
static fmoe_status look_at(worker *w, size_t size) {
    forget(w);
    void *bytes = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, w->memory, 0);
    if (bytes == MAP_FAILED)
        return fmoe_fail(FMOE_OUT_OF_MEMORY, "no memory for %zu shared bytes", size);
    w->bytes = bytes;
    w->size = size;
    const door_block *block = bytes;
    w->step.args_size = block->args_size;
    w->problem = (fmoe_problem){.step = &w->step, .c = block->c, .num_arguments = block->num_tensors};
    w->problem.args = malloc(block->args_size);
    if (!w->problem.args)
        return fmoe_fail(FMOE_OUT_OF_MEMORY, "no memory for the arguments");
    memcpy(w->problem.args, w->bytes + block->args_offset, block->args_size);
    for (int i = 0; i < block->num_tensors; i++) {
        fmoe_argument *a = &w->problem.arguments[i];
        *a = block->tensors[i].about;
        a->name = block->tensors[i].name;
        a->data = block->tensors[i].offset ? w->bytes + block->tensors[i].offset : NULL;
        a->pristine = a->role == ROLE_INOUT ? a->data : NULL;
        a->expected = NULL;
        if (a->data)
            memcpy((char *)w->problem.args + a->slot, &a->data, sizeof a->data);
    }
    return FMOE_OK;
}

/* ---- Calls ------------------------------------------------------------------------------------------------------- */

static fmoe_status call(worker *w, const void *args, void *workspace, size_t bytes, void *stream, char *text) {
    fmoe_status status = w->rung.run(args, workspace, bytes, stream);
    if (status != FMOE_OK)
        snprintf(text, DOOR_TEXT, "returned \"%s\"%s%.300s", fmoe_status_name(status),
                 w->message && *w->message() ? ": " : "", w->message ? w->message() : "");
    return status;
}

static fmoe_status failed(fmoe_status status, char *text) {
    if (status != FMOE_OK)
        snprintf(text, DOOR_TEXT, "%.390s", fmoe_error_message());
    return status;
}

static fmoe_status run_on_host(worker *w, int64_t runs, char *text) {
    const door_block *block = (const door_block *)w->bytes;
    for (int64_t i = 0; i < runs; i++)
        TRY(call(w, w->problem.args, w->bytes + block->workspace_offset, block->workspace_bytes, NULL, text));
    return FMOE_OK;
}

#ifdef FMOE_WITH_CUDA

static fmoe_status place_on_device(worker *w, char *text) {
    if (w->on_device)
        return failed(fmoe_device_problem_reset(&w->device), text);
    fmoe_status status =
        failed(fmoe_device_problem_new(&w->problem, rung_workspace(&w->rung, &w->problem), &w->device), text);
    w->on_device = status == FMOE_OK;
    return status;
}

/* Everything that the calls started, on whichever stream, before the answer. */
static fmoe_status wait_for_device(char *text) {
    cudaError_t error = cudaDeviceSynchronize();
    if (error == cudaSuccess)
        return FMOE_OK;
    snprintf(text, DOOR_TEXT, "the device: %s", cudaGetErrorString(error));
    return FMOE_CUDA;
}

/* One call is checked and its results fetched; more are for the parent's clock. */
static fmoe_status run_on_device(worker *w, int64_t runs, char *text) {
    if (runs == 1 || !w->on_device)
        TRY(place_on_device(w, text));
    for (int64_t i = 0; i < runs; i++)
        TRY(call(w, w->device.args, w->device.workspace, w->device.workspace_bytes, w->device.stream, text));
    TRY(wait_for_device(text));
    return runs == 1 ? fmoe_device_problem_fetch(&w->device, &w->problem, text) : FMOE_OK;
}

static fmoe_status time_on_device(worker *w, fmoe_timing *timing, char *text) {
    return failed(fmoe_device_time(&w->rung, &w->problem, timing), text);
}

#else

static fmoe_status run_on_device(worker *w, int64_t runs, char *text) {
    (void)w, (void)runs;
    snprintf(text, DOOR_TEXT, "this build has no CUDA");
    return FMOE_UNSUPPORTED;
}

static fmoe_status time_on_device(worker *w, fmoe_timing *timing, char *text) {
    (void)timing;
    return run_on_device(w, 0, text);
}

#endif

static void answer(worker *w, const door_request *request, door_reply *reply) {
    bool cuda = w->rung.backend == BACKEND_CUDA;
    if (!w->bytes || request->what == ASK_WORKSPACE || request->block_bytes != w->size)
        reply->status = failed(look_at(w, request->block_bytes), reply->text);
    if (reply->status != FMOE_OK)
        return;
    switch (request->what) {
    case ASK_WORKSPACE:
        reply->supported = !w->rung.supports || w->rung.supports(w->problem.args);
        reply->workspace_bytes = reply->supported ? rung_workspace(&w->rung, &w->problem) : 0;
        break;
    case ASK_RUN:
        reply->status =
            cuda ? run_on_device(w, request->runs, reply->text) : run_on_host(w, request->runs, reply->text);
        break;
    case ASK_DEVICE_TIME:
        reply->status = time_on_device(w, &reply->timing, reply->text);
    }
}

int plugin_worker(char **argv) {
    worker w = {.socket = atoi(argv[3]), .memory = atoi(argv[4])}; // NOLINT(cert-err34-c)
    door_about about = {.text = ""};
    load(&w, argv[2], &about);
    if (send(w.socket, &about, sizeof about, MSG_NOSIGNAL) != sizeof about || !about.loaded)
        _exit(0);
    door_request request;
    while (recv(w.socket, &request, sizeof request, 0) == sizeof request) {
        door_reply reply = {.status = FMOE_OK};
        answer(&w, &request, &reply);
        if (send(w.socket, &reply, sizeof reply, MSG_NOSIGNAL) != sizeof reply)
            break;
    }
    _exit(0); /* what the plugin left behind needs no farewell */
}
