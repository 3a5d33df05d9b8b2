/* Chapter 0 on the GPU: the check of a rung there, its timing, the ceilings. */
#include "cuda_values.h"

#include "../cuda/machine/machine_cuda.h"
#include "../ref_cpu/check.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- Rungs with planted mistakes --------------------------------------------------------------------------------- */

/* y and last become x; count becomes four bytes of 1. */
typedef struct {
    int64_t T;
    const float *x;
    float *y, *last;
    int32_t *count;
} copy_args;

static fmoe_status copy_draw(fmoe_problem *p) {
    copy_args *a = p->args;
    a->T = p->c.T;
    const int64_t shape[] = {a->T}, one[] = {1};
    fmoe_argument *x, *last;
    if (!(x = fmoe_problem_add(p, "x", offsetof(copy_args, x), FMOE_F32, ROLE_INPUT, 1, shape)) ||
        !fmoe_problem_add(p, "y", offsetof(copy_args, y), FMOE_F32, ROLE_OUTPUT, 1, shape) ||
        !(last = fmoe_problem_add(p, "last", offsetof(copy_args, last), FMOE_F32, ROLE_INOUT, 1, shape)) ||
        !fmoe_problem_add(p, "count", offsetof(copy_args, count), FMOE_I32, ROLE_OUTPUT, 1, one))
        return FMOE_OUT_OF_MEMORY;
    fmoe_fill_normal(p->seed, 1, 1, a->T, x->data);
    fmoe_fill_normal(p->seed, 2, 1, a->T, last->data);
    ((float *)x->data)[0] = 0; /* what a workspace of zeros would give */
    return FMOE_OK;
}

static fmoe_status copy_reference(fmoe_problem *p) {
    const copy_args *a = p->args;
    size_t bytes = (size_t)a->T * sizeof(float);
    memcpy(fmoe_problem_find(p, "y")->expected, a->x, bytes);
    memcpy(fmoe_problem_find(p, "last")->expected, a->x, bytes);
    memset(fmoe_problem_find(p, "count")->expected, 1, sizeof(int32_t));
    return FMOE_OK;
}

static const fmoe_step copy_step = {"copy", sizeof(copy_args), copy_draw, copy_reference, NULL, NULL};

enum { ELEMENTS = 100, COPY_WORKSPACE = 403 };

static size_t copy_workspace(const void *args) {
    (void)args;
    return COPY_WORKSPACE;
}

/* What a rung does wrong, after everything has been done right. */
typedef fmoe_status mistake(const copy_args *a, char *workspace, void *stream);

static fmoe_status none(const copy_args *a, char *workspace, void *stream) {
    (void)a;
    return queue_copy(workspace, NULL, 1, COPY_WORKSPACE, stream);
}
static fmoe_status unwritten_last(const copy_args *a, char *workspace, void *stream) {
    (void)workspace;
    return queue_copy(a->y + ELEMENTS - 1, NULL, 0xff, sizeof(float), stream);
}
static fmoe_status zero_second(const copy_args *a, char *workspace, void *stream) {
    (void)workspace;
    return queue_copy(a->last + 1, NULL, 0, sizeof(float), stream);
}
static fmoe_status wrong_integer(const copy_args *a, char *workspace, void *stream) {
    (void)workspace;
    return queue_copy(a->count, NULL, 2, 1, stream);
}
static fmoe_status beyond_output(const copy_args *a, char *workspace, void *stream) {
    (void)workspace;
    return queue_copy(a->y + ELEMENTS, NULL, 1, 1, stream);
}
static fmoe_status before_output(const copy_args *a, char *workspace, void *stream) {
    (void)workspace;
    return queue_copy((char *)a->y - 1, NULL, 1, 1, stream);
}
static fmoe_status into_input(const copy_args *a, char *workspace, void *stream) {
    (void)workspace;
    return queue_copy((void *)(a->x + 7), NULL, 1, 1, stream);
}
static fmoe_status beyond_workspace(const copy_args *a, char *workspace, void *stream) {
    (void)a;
    return queue_copy(workspace + COPY_WORKSPACE, NULL, 1, 1, stream);
}
static fmoe_status before_workspace(const copy_args *a, char *workspace, void *stream) {
    (void)a;
    return queue_copy(workspace - 1, NULL, 1, 1, stream);
}
static fmoe_status counts_on_zeros(const copy_args *a, char *workspace, void *stream) {
    return queue_copy(a->y, workspace, 0, sizeof(float), stream);
}
static fmoe_status fails(const copy_args *a, char *workspace, void *stream) {
    (void)a, (void)workspace, (void)stream;
    return FMOE_BAD_TOPK;
}
static mistake *planted = none;

static fmoe_status copy_run(const void *args, void *workspace, size_t bytes, void *stream) {
    const copy_args *a = args;
    size_t length = (size_t)a->T * sizeof(float);
    TRY(bytes == COPY_WORKSPACE ? FMOE_OK : FMOE_BAD_WORKSPACE);
    TRY(queue_copy(a->y, a->x, 0, length, stream));
    TRY(queue_copy(a->last, a->x, 0, length, stream));
    TRY(queue_copy(a->count, NULL, 1, sizeof *a->count, stream));
    return planted(a, workspace, stream);
}

static fmoe_status idle_run(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)args, (void)workspace, (void)bytes, (void)stream;
    return FMOE_OK;
}

static fmoe_status check(fmoe_rung_fn *run, mistake *what, double *error, char *why) {
    fmoe_problem p FREED(fmoe_problem_free) = new_problem(&copy_step, fresh_seed(), "T%d-f32", ELEMENTS);
    fmoe_rung rung = {.name = "copy", .backend = BACKEND_CUDA, .run = run, .workspace = copy_workspace};
    planted = what;
    return fmoe_rung_check(&rung, &p, error, why);
}

CUDA_SENTENCE(0, 23,
              "The check of a GPU rung passes a right one and refuses every way of being wrong that it is shown.",
              "a kernel that writes one element too far is seldom punished by the device",
              "rungs with one planted mistake each") {
    static const struct {
        fmoe_rung_fn *run;
        mistake *what;
        fmoe_status status; /* FMOE_OK: only the error shows it */
        const char *does, *names;
    } wrong[] = {
        {idle_run, none, FMOE_OK, "writes nothing", "y[0]"},
        {copy_run, unwritten_last, FMOE_OK, "leaves the last element", "y[99]"},
        {copy_run, zero_second, FMOE_OK, "moves an in-out argument wrongly", "last[1]"},
        {copy_run, wrong_integer, FMOE_OK, "has one wrong integer", "count[0] is 16843010 and should be 16843009"},
        {copy_run, counts_on_zeros, FMOE_OK, "counts on a zeroed workspace", "y[0]"},
        {copy_run, beyond_output, FMOE_BAD_WORKSPACE, "writes beyond an output", "beyond y, 1 bytes"},
        {copy_run, before_output, FMOE_BAD_WORKSPACE, "writes before an output", "before y, 1 bytes"},
        {copy_run, into_input, FMOE_BAD_WORKSPACE, "changes an input", "x is an input"},
        {copy_run, beyond_workspace, FMOE_BAD_WORKSPACE, "writes beyond its workspace", "beyond its workspace"},
        {copy_run, before_workspace, FMOE_BAD_WORKSPACE, "writes before its workspace", "before its workspace"},
        {copy_run, fails, FMOE_BAD_TOPK, "fails", "bad top-k"},
    };
    double error;
    char why[256];
    fmoe_status status = check(copy_run, none, &error, why);
    expect(status == FMOE_OK && error == 0, "the right one is refused: %s, error %g, %s", fmoe_status_name(status),
           error, why);
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        status = check(wrong[i].run, wrong[i].what, &error, why);
        expect(status == wrong[i].status && !(error <= fmoe_error_limit(FMOE_F32)), "one that %s passes: %s, error %g",
               wrong[i].does, fmoe_status_name(status), error);
        expect(strstr(why, wrong[i].names), "one that %s: the reason lacks \"%s\": %s", wrong[i].does, wrong[i].names,
               why);
    }
}

/* ---- Timing ------------------------------------------------------------------------------------------------------ */

enum { SLEEP_US = 2000 };
static int calls;

/* The first call and every fifth take five times as long. */
static fmoe_status sleep_run(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)args, (void)workspace, (void)bytes;
    return queue_sleep(calls++ % 5 ? SLEEP_US : 5 * SLEEP_US, stream);
}

static void time_both(fmoe_rung_fn *run, fmoe_rung_fn *other_run, fmoe_timing *timings) {
    fmoe_problem p FREED(fmoe_problem_free) = new_problem(&copy_step, fresh_seed(), "T%d-f32", ELEMENTS);
    fmoe_rung rung = {.name = "timed", .backend = BACKEND_CUDA, .run = run}, other = rung;
    other.run = other_run;
    calls = 0;
    fmoe_status status = fmoe_device_time_in_turns(&rung, other_run ? &other : NULL, &p, timings);
    expect(status == FMOE_OK, "%s", fmoe_error_message());
}

static void expect_slept(const fmoe_timing *slept, const fmoe_timing *nothing) {
    double ms = SLEEP_US * 1e-3, flush_ms = (double)CUDA_FLUSH_BYTES / peak_memory_gbs() * 1e-6;
    expect(slept->runs >= 50, "%d runs", slept->runs);
    expect(slept->median_ms >= ms && slept->median_ms < 1.5 * ms, "%g ms waited are timed as %g", ms, slept->median_ms);
    expect(slept->max_ms >= 5 * ms && slept->min_ms >= ms, "the slowest is %g ms, the fastest %g", slept->max_ms,
           slept->min_ms);
    expect(nothing->median_ms < flush_ms / 2, "nothing takes %g ms", nothing->median_ms);
}

CUDA_SENTENCE(0, 24,
              "A GPU timing is the median of what lies between two events: the call, and not what flushes the L2.",
              "a call returns before the device is done, and the flush takes longer than most kernels",
              "calls that keep the stream waiting for known times") {
    fmoe_timing timings[2], turns[2];
    time_both(sleep_run, NULL, &timings[0]);
    time_both(idle_run, NULL, &timings[1]);
    expect_slept(&timings[0], &timings[1]);
    time_both(sleep_run, idle_run, turns);
    expect_slept(&turns[0], &turns[1]);
    expect(turns[0].runs == turns[1].runs, "%d and %d runs in turns", turns[0].runs, turns[1].runs);
}

/* ---- Ceilings ---------------------------------------------------------------------------------------------------- */

CUDA_SENTENCE(0, 25, "The GPU's measured ceilings are most of what its clocks and widths allow, and never more.",
              "a ceiling that is too low flatters every rung below it", "arithmetic with the device's attributes") {
    char folder[] = "/tmp/flashmoe-ceilings-XXXXXX"; /* where no earlier measurement is kept */
    expect(mkdtemp(folder) && chdir(folder) == 0, "no folder %s", folder);
    const fmoe_ceilings *m = fmoe_device_ceilings();
    double copy = m->copy_gbs / peak_memory_gbs(), fma = m->fma_gflops / peak_fma_gflops();
    expect(copy > 0.6 && copy <= 1, "copies reach %.2f of what the memory's pins could", copy);
    expect(fma > 0.4 && fma <= 1.05, "multiply-adds reach %.2f of what the cores could", fma);
    expect(m->fork_join_us > 0.3 && m->fork_join_us < 50, "a launch takes %g µs", m->fork_join_us);
    expect(m->num_gather >= 2, "%d sizes of tables were gathered from", m->num_gather);
    for (int i = 0; i < m->num_gather; i++)
        expect(m->gather_mb[i] > 0 && m->gather_gbs[i] > 0.1 * m->copy_gbs, "a table of %g MB is read at %g GB/s",
               m->gather_mb[i], m->gather_gbs[i]);
    double smallest = m->gather_gbs[0], largest = m->gather_gbs[m->num_gather - 1];
    expect(smallest > 1.2 * largest, "a table in the L2 is read at %g GB/s, one in memory at %g", smallest, largest);
    expect(m->gemm_gflops >= m->fma_gflops, "tensor cores are slower than multiply-adds: %g GFLOP/s", m->gemm_gflops);
}
