/* The GPU's half of chapter 0: its ceilings, and how a timing on it goes wrong. Without a GPU, what one was recorded.
 */
#include "machine.h"

#include "../device.h"
#include "../program.h"

#ifdef FMOE_WITH_CUDA
#include "../../cuda/machine/machine_cuda.h"
#endif

#include <math.h>
#include <string.h>

/* ---- Ceilings ---------------------------------------------------------------------------------------------------- */

static const struct {
    const char *op, *variant, *unit, *meaning;
} explained[] = {
    {"copy", "half to half", "TB/s", "read + written; what streams through memory once is bound by this"},
    {"gather", "random rows", "TB/s", "random rows of 2 KB; those of a table beyond the L2 come from memory"},
    {"reduce", "float4 additions", "TB/s", "float32 added to random rows of 2 KB; bytes of payload"},
    {"shared", "16-byte loads", "TB/s", "shared memory of all multiprocessors, without bank conflicts"},
    {"fma", "eight chains", "TFLOP/s", "multiply-adds in registers; no program without tensor cores is faster"},
    {"gemm", "cuBLAS", "TFLOP/s", "a dense product of random matrices, a few at a time; float32 without TF32"},
    {"launch", "empty kernel", "µs", "from one empty kernel to the next in a full stream"},
    {"launch_call", "empty kernel", "µs", "what the host's call takes; kernels shorter than this starve the stream"},
    {"graph_launch", "empty kernel", "µs", "from one empty node to the next in a CUDA graph"},
    {"event_pair", "empty kernel", "µs", "two events and an empty kernel; no single call is timed as shorter"},
};

static size_t explanation(const char *op) {
    size_t i = 0;
    while (i + 1 < sizeof explained / sizeof explained[0] && strcmp(explained[i].op, op))
        i++;
    return i;
}

static double rate(double bytes, double flops, double ms) {
    if (bytes > 0)
        return bytes / ms * 1e-9;
    return flops > 0 ? flops / ms * 1e-9 : ms * 1e3;
}

/* One line; the meaning only where the op is first seen. */
static void show_line(const char *op, const char *case_name, double bytes, double flops, double min_ms,
                      double median_ms, bool repeated) {
    size_t i = explanation(op);
    printf("  %-13s%-23s%9.4g %-8s%9.4g   %s\n", op, case_name, rate(bytes, flops, min_ms), explained[i].unit,
           rate(bytes, flops, median_ms), repeated ? "" : explained[i].meaning);
}

/* ---- Recorded ---------------------------------------------------------------------------------------------------- */

static bool is_ceiling(const csv_row *row) {
    return !strcmp(row->backend, "cuda") && !strcmp(row->op, explained[explanation(row->op)].op);
}

static void show_recorded_file(const csv_file *file) {
    const csv_row *before = NULL;
    for (int64_t i = 0; i < file->count; i++) {
        const csv_row *row = &file->rows[i];
        if (!is_ceiling(row))
            continue;
        if (!before)
            printf("  recorded on %s, %s: the fastest of several runs, the median beside it\n", row->device, row->date);
        show_line(row->op, row->case_name, row->bytes, row->flops, row->min_ms, row->median_ms,
                  before && !strcmp(before->op, row->op));
        before = row;
    }
}

static void show_recorded(void) {
    recorded_data data;
    recorded_load(0, &data);
    for (int64_t i = 0; i < data.count; i++)
        show_recorded_file(&data.files[i]);
    recorded_free(&data);
}

/* ---- Measured ---------------------------------------------------------------------------------------------------- */

#ifdef FMOE_WITH_CUDA

static void record(const char *op, const char *case_name, const char *variant, fmoe_dtype dtype, fmoe_timing timing,
                   fmoe_work work) {
    work.floor_ms = NAN;
    fmoe_csv_row(op, case_name, variant, LEVEL_CORE, BACKEND_CUDA, dtype, timing, NAN, work);
}

static void measure_ceilings(void) {
    ceiling_list list = {0};
    fmoe_progress("measuring the GPU's ceilings");
    fmoe_status status = machine_measure_gpu_again(&list);
    fmoe_progress("%s", "");
    printf("  the fastest of several runs, the median beside it\n");
    for (int i = 0; i < list.count; i++) {
        const measured_ceiling *c = &list.all[i];
        show_line(c->op, c->case_name, c->work.bytes, c->work.flops, c->timing.min_ms, c->timing.median_ms,
                  i > 0 && !strcmp(c->op, list.all[i - 1].op));
        record(c->op, c->case_name, explained[explanation(c->op)].variant,
               strstr(c->case_name, "bf16") ? FMOE_BF16 : FMOE_F32, c->timing, c->work);
    }
    if (status != FMOE_OK)
        printf("  the rest is not measured: %s\n", fmoe_error_message());
    else if (!cublas_available())
        printf("  gemm         not measured: libcublas.so is not installed\n");
}

static double us(fmoe_timing timing) {
    return timing.median_ms * 1e3;
}

static void show_mistakes(const cuda_mistakes *m) {
    printf("  a cold start    first launch of a kernel %.3f ms, the next %.3f ms: its code is loaded when first asked "
           "for\n",
           m->first_ms, m->second_ms);
    printf("  no wait         %.0f MB gathered: %.1f µs around the launch, \"%.3g TB/s\"; %.1f µs with the wait, %.1f "
           "µs by events\n",
           m->gathered_mb[0], us(m->call), m->gathered_mb[0] / us(m->call), us(m->waited), us(m->events));
    printf(
        "  a warm L2       %.0f MB gathered from 34 MB: %.2f µs where the call before left the rows, %.2f µs after a "
        "flush\n",
        m->gathered_mb[1], us(m->left_in_l2), us(m->flushed));
    printf("  one run         200 runs of the latter: fastest %.2f, median %.2f, slowest %.2f µs\n",
           m->flushed.min_ms * 1e3, us(m->flushed), m->flushed.max_ms * 1e3);
    printf("  a short kernel  alone: %.1f µs by the host's clock, %.1f by events, %.1f by events behind other work\n",
           us(m->short_host), us(m->short_events), us(m->short_held));
    printf("                  500 in a row between two events: %.2f µs each, the host's pace; in a graph of 100: %.2f "
           "µs each\n",
           us(m->short_many), us(m->short_graph));
    if (m->gemm_flops > 0)
        printf("  zeros           a bf16 product of 8192³: %.0f TFLOP/s on random data, %.0f on zeros, %.0f on random "
               "data again\n",
               m->gemm_flops / m->gemm_random.median_ms * 1e-9, m->gemm_flops / m->gemm_zeros.median_ms * 1e-9,
               m->gemm_flops / m->gemm_random_again.median_ms * 1e-9);
}

static fmoe_timing once(double ms) {
    return (fmoe_timing){ms, ms, ms, 1};
}

static void record_mistakes(const cuda_mistakes *m) {
    fmoe_work large = {.bytes = m->gathered_mb[0] * 1e6}, small = {.bytes = m->gathered_mb[1] * 1e6};
    fmoe_work product = {.flops = m->gemm_flops}, none = {0};
    const struct {
        const char *case_name, *variant;
        fmoe_timing timing;
        fmoe_work work;
    } rows[] = {
        {"cold-start", "first launch", once(m->first_ms), none},
        {"cold-start", "next launch", once(m->second_ms), none},
        {"no-wait", "host clock around the launch", m->call, large},
        {"no-wait", "host clock with the wait", m->waited, large},
        {"no-wait", "events", m->events, large},
        {"warm-l2", "left in the L2", m->left_in_l2, small},
        {"warm-l2", "flushed", m->flushed, small},
        {"short-kernel", "host clock with the wait", m->short_host, none},
        {"short-kernel", "events", m->short_events, none},
        {"short-kernel", "events behind other work", m->short_held, none},
        {"short-kernel", "among 500", m->short_many, none},
        {"short-kernel", "in a graph of 100", m->short_graph, none},
        {"zeros", "random data", m->gemm_random, product},
        {"zeros", "zeros", m->gemm_zeros, product},
        {"zeros", "random data again", m->gemm_random_again, product},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        if (rows[i].timing.median_ms > 0)
            record("timing", rows[i].case_name, rows[i].variant,
                   strcmp(rows[i].case_name, "zeros") ? FMOE_F32 : FMOE_BF16, rows[i].timing, rows[i].work);
}

static void measure_mistakes(void) {
    cuda_mistakes m;
    fmoe_progress("timing the GPU wrongly");
    fmoe_status status = cuda_mistakes_measure(&m);
    fmoe_progress("%s", "");
    if (status != FMOE_OK) {
        printf("  not measured: %s\n", fmoe_error_message());
        return;
    }
    show_mistakes(&m);
    record_mistakes(&m);
}

#else

static void measure_ceilings(void) {
}

static void measure_mistakes(void) {
}

#endif

void show_gpu_ceilings(void) {
    const fmoe_device *gpu = fmoe_device_get();
    if (gpu->present) {
        printf("\nCeilings of the GPU: %s (%s)\n", gpu->name, gpu->driver);
        measure_ceilings();
        return;
    }
    printf("\nCeilings of the GPU: %s\n", gpu->why_not);
    show_recorded();
}

void show_gpu_timing(void) {
    const fmoe_device *gpu = fmoe_device_get();
    printf("\nTiming on a GPU: how to be wrong%s%s\n", gpu->present ? "" : ": not shown, ",
           gpu->present ? "" : gpu->why_not);
    if (gpu->present)
        measure_mistakes();
}
