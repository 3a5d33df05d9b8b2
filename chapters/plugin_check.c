/* One call of a plugin, checked: the block of shared memory, what the worker did to it, and how long that took. */
#include "doors.h"
#include "program.h"

#include "../ref_cpu/check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { GUARD = 4096, GUARD_BYTE = 0xa5 };

/* Where everything lies is the parent's own knowledge: what the worker writes to the block's head changes nothing. */
typedef struct {
    const fmoe_problem *problem;
    unsigned char *bytes;
    size_t size, args, tensors[FMOE_MAX_ARGUMENTS], workspace, workspace_bytes;
} block;

const char *door_verdict_name(door_verdict verdict) {
    static const char *const names[] = {"right", "unsupported", "wrong", "outside", "refused", "gone", "no case"};
    return names[verdict];
}

/* ---- Laying it out ----------------------------------------------------------------------------------------------- */

static size_t tensor_bytes(const fmoe_argument *a) {
    return (size_t)a->count * fmoe_dtype_size(a->dtype);
}

/* A tensor between two guard bands; the second begins at the first byte beyond it. */
static size_t between_guards(size_t *used, size_t alignment, size_t bytes) {
    size_t begin = (*used + GUARD + alignment - 1) / alignment * alignment;
    *used = begin + bytes + GUARD;
    return begin;
}

static void lay_out(block *b, size_t workspace_bytes) {
    const fmoe_problem *p = b->problem;
    size_t used = sizeof(door_block);
    b->args = (used + 63) / 64 * 64;
    used = b->args + p->step->args_size;
    for (int i = 0; i < p->num_arguments; i++)
        b->tensors[i] = p->arguments[i].data ? between_guards(&used, 64, tensor_bytes(&p->arguments[i])) : 0;
    b->workspace_bytes = workspace_bytes;
    b->workspace = between_guards(&used, 256, workspace_bytes);
    b->size = used;
}

static void unmap(block *b) {
    if (b->bytes)
        munmap(b->bytes, b->size);
    b->bytes = NULL;
}

static void describe(const block *b) {
    const fmoe_problem *p = b->problem;
    door_block head = {.c = p->c,
                       .args_offset = b->args,
                       .args_size = p->step->args_size,
                       .workspace_offset = b->workspace,
                       .workspace_bytes = b->workspace_bytes,
                       .num_tensors = p->num_arguments};
    for (int i = 0; i < p->num_arguments; i++) {
        door_tensor *t = &head.tensors[i];
        snprintf(t->name, sizeof t->name, "%s", p->arguments[i].name);
        t->about = p->arguments[i];
        t->about.data = t->about.expected = t->about.pristine = NULL;
        t->offset = b->tensors[i];
    }
    memcpy(b->bytes, &head, sizeof head);
    memcpy(b->bytes + b->args, p->args, p->step->args_size);
}

/* Guard bands everywhere, inputs as drawn, a NaN in every output and in the workspace. */
static void fill(const block *b) {
    const fmoe_problem *p = b->problem;
    size_t head = b->args + p->step->args_size;
    memset(b->bytes + head, GUARD_BYTE, b->size - head);
    for (int i = 0; i < p->num_arguments; i++) {
        const fmoe_argument *a = &p->arguments[i];
        bool integer = a->dtype == FMOE_I32 || a->dtype == FMOE_I64;
        if (!a->data)
            continue;
        if (a->role == ROLE_OUTPUT)
            memset(b->bytes + b->tensors[i], integer ? 0x80 : 0xff, tensor_bytes(a));
        else
            memcpy(b->bytes + b->tensors[i], a->role == ROLE_INOUT ? a->pristine : a->data, tensor_bytes(a));
    }
    memset(b->bytes + b->workspace, 0xff, b->workspace_bytes);
    describe(b);
}

static fmoe_status map(plugin *p, block *b, size_t workspace_bytes, char *why) {
    unmap(b);
    lay_out(b, workspace_bytes);
    size_t memory = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    void *bytes = MAP_FAILED;
    if (workspace_bytes < memory && b->size < memory && ftruncate(p->memory, 0) == 0 &&
        ftruncate(p->memory, (off_t)b->size) == 0)
        bytes = mmap(NULL, b->size, PROT_READ | PROT_WRITE, MAP_SHARED, p->memory, 0);
    if (bytes == MAP_FAILED) {
        snprintf(why, DOOR_TEXT, "no memory for its tensors and a workspace of %zu bytes", workspace_bytes);
        return fmoe_fail(FMOE_OUT_OF_MEMORY, "%s", why);
    }
    b->bytes = bytes;
    fill(b);
    return FMOE_OK;
}

/* ---- What was written -------------------------------------------------------------------------------------------- */

static bool guard_broken(const block *b, const char *name, size_t begin, size_t bytes, char *why) {
    for (size_t i = 0; i < GUARD; i++)
        if (b->bytes[begin + bytes + i] != GUARD_BYTE) {
            snprintf(why, DOOR_TEXT, "wrote beyond %s, at byte %zu of %zu", name, bytes + i, bytes);
            return true;
        }
    for (size_t i = GUARD; i > 0; i--)
        if (b->bytes[begin - i] != GUARD_BYTE) {
            snprintf(why, DOOR_TEXT, "wrote before %s, %zu bytes ahead of it", name, i);
            return true;
        }
    return false;
}

static bool wrote_outside(const block *b, char *why) {
    const fmoe_problem *p = b->problem;
    for (int i = 0; i < p->num_arguments; i++) {
        const fmoe_argument *a = &p->arguments[i];
        if (!a->data)
            continue;
        if (guard_broken(b, a->name, b->tensors[i], tensor_bytes(a), why))
            return true;
        if (a->role == ROLE_INPUT && memcmp(b->bytes + b->tensors[i], a->data, tensor_bytes(a)) != 0) {
            snprintf(why, DOOR_TEXT, "wrote to %s, which is an input", a->name);
            return true;
        }
    }
    return guard_broken(b, "its workspace", b->workspace, b->workspace_bytes, why);
}

/* The outputs into the problem's own memory; whether they have the bits that lay there. */
static bool fetch(const block *b) {
    const fmoe_problem *p = b->problem;
    bool same = true;
    for (int i = 0; i < p->num_arguments; i++) {
        const fmoe_argument *a = &p->arguments[i];
        if (!a->data || a->role == ROLE_INPUT)
            continue;
        same &= memcmp(a->data, b->bytes + b->tensors[i], tensor_bytes(a)) == 0;
        memcpy(a->data, b->bytes + b->tensors[i], tensor_bytes(a));
    }
    return same;
}

static bool found(door_result *r, door_verdict verdict) {
    r->verdict = verdict;
    return false;
}

/* ---- Calls ------------------------------------------------------------------------------------------------------- */

static bool ask(plugin *p, const block *b, door_question what, int64_t runs, door_reply *reply, door_result *r) {
    door_request request = {.what = what, .runs = runs, .block_bytes = b->size};
    if (plugin_ask(p, &request, reply, r->why) != FMOE_OK)
        return found(r, DOOR_GONE);
    if (reply->status == FMOE_OK)
        return true;
    memcpy(r->why, reply->text, sizeof r->why);
    r->why[sizeof r->why - 1] = 0;
    return found(r, reply->status == FMOE_BAD_WORKSPACE ? DOOR_OUTSIDE : DOOR_REFUSED);
}

/* One call on poisoned outputs. False with the verdict in r. */
static bool call_once(plugin *p, const block *b, bool again, door_result *r) {
    door_reply reply;
    fill(b);
    if (!ask(p, b, ASK_RUN, 1, &reply, r))
        return false;
    if (wrote_outside(b, r->why))
        return found(r, DOOR_OUTSIDE);
    bool same = fetch(b);
    r->error = fmoe_problem_error(b->problem, r->why);
    if (!(r->error <= r->limit)) {
        char where[DOOR_TEXT];
        door_explain(b->problem, where, r->hint);
        if (*where)
            memcpy(r->why, where, sizeof where);
        return found(r, DOOR_WRONG);
    }
    *r->why = 0;
    if (!again || same)
        return true;
    snprintf(r->why, DOOR_TEXT, "a second call gave other bits than the first");
    snprintf(r->hint, DOOR_TEXT, "threads that add to one sum in the order in which they arrive?");
    return found(r, DOOR_WRONG);
}

/* ---- Time -------------------------------------------------------------------------------------------------------- */

typedef struct {
    plugin *p;
    const block *b;
    int64_t runs;
    door_result *result;
    bool ok;
} batch;

static void run_batch(void *context) {
    batch *all = context;
    door_reply reply;
    all->ok = all->ok && ask(all->p, all->b, ASK_RUN, all->runs, &reply, all->result);
}

/* By this process's clock. Asking takes some 10 µs, so short calls are asked for by the batch of about 3 ms. On a
 * device a batch of one would time the copies to it and back (plugin_worker.c). */
static bool time_batches(plugin *p, const block *b, door_result *r) {
    int64_t least = p->about.backend == BACKEND_CUDA ? 2 : 1;
    batch all = {p, b, least, r, true};
    run_batch(&all);
    double start = fmoe_now_ms();
    run_batch(&all);
    double once = (fmoe_now_ms() - start) / (double)least;
    all.runs = (int64_t)fmax((double)least, fmin(1000, 3 / fmax(once, 0.003)));
    r->timing = all.ok ? time_runs(run_batch, &all, 3, 200, fmoe_opt.quick ? 100 : 400) : (fmoe_timing){0};
    r->timing.median_ms /= (double)all.runs;
    r->timing.min_ms /= (double)all.runs;
    r->timing.max_ms /= (double)all.runs;
    return all.ok;
}

/* On a device one call is too short for a clock outside, and the L2 has to be flushed before each; so the worker times
 * it as every GPU rung is timed, by events on the stream. Work on another stream escapes those, but not this clock. */
static bool time_device(plugin *p, const block *b, door_result *r) {
    door_reply reply;
    if (!time_batches(p, b, r) || !ask(p, b, ASK_DEVICE_TIME, 0, &reply, r))
        return false;
    if (r->timing.median_ms < 2 * reply.timing.median_ms + 0.02)
        r->timing = reply.timing;
    else
        snprintf(r->why, DOOR_TEXT, "by the host's clock: events on its stream saw %.4f ms", reply.timing.median_ms);
    return true;
}

/* ---- The check --------------------------------------------------------------------------------------------------- */

static bool check(plugin *p, block *b, bool timed, door_result *r) {
    door_reply reply;
    if (map(p, b, 0, r->why) != FMOE_OK)
        return found(r, DOOR_REFUSED);
    if (!ask(p, b, ASK_WORKSPACE, 0, &reply, r))
        return false;
    if (!reply.supported) {
        snprintf(r->why, DOOR_TEXT, "does not support this case");
        return found(r, DOOR_UNSUPPORTED);
    }
    bool cuda = p->about.backend == BACKEND_CUDA; /* there the workspace lies on the device */
    if (reply.workspace_bytes > 0 && !cuda && map(p, b, reply.workspace_bytes, r->why) != FMOE_OK)
        return found(r, DOOR_REFUSED);
    if (!call_once(p, b, false, r) || !call_once(p, b, true, r))
        return false;
    if (!timed)
        return true;
    char note[DOOR_TEXT];
    if (!(cuda ? time_device(p, b, r) : time_batches(p, b, r)))
        return false;
    memcpy(note, r->why, sizeof note);
    if (!call_once(p, b, true, r)) /* a kernel that stopped working when it was called often is found out */
        return false;
    memcpy(r->why, note, sizeof note);
    return true;
}

door_result plugin_check(plugin *p, fmoe_problem *problem, bool timed) {
    door_result r = {.verdict = DOOR_RIGHT, .error = INFINITY, .limit = fmoe_error_limit(problem->c.dtype)};
    if (!plugin_takes(p, problem->c.dtype)) {
        snprintf(r.why, sizeof r.why, "does not take %s", fmoe_dtype_name(problem->c.dtype));
        r.verdict = DOOR_UNSUPPORTED;
        return r;
    }
    block b = {.problem = problem};
    check(p, &b, timed, &r);
    unmap(&b);
    return r;
}
