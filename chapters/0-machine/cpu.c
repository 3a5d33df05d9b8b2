/* Chapter 0: what this machine can do, and how to tell. Ceilings, timing, error, floors. */
#include "machine.h"

#include "../openblas.h"
#include "../program.h"
#include "../steps.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static volatile float sink; /* what is written here cannot be left out */

/* ---- Ceilings ---------------------------------------------------------------------------------------------------- */

enum { GEMM = 1024 };

typedef struct {
    float *a, *b, *c;
} matrices;

static void gemm(void *context) {
    const matrices *m = context;
    openblas_sgemm()(BLAS_ROW_MAJOR, BLAS_NO_TRANSPOSE, BLAS_TRANSPOSE, GEMM, GEMM, GEMM, 1, m->a, GEMM, m->b, GEMM, 0,
                     m->c, GEMM);
}

/* A dense product through the vendor library, on random data: what a tuned program makes of the FMA peak. */
static void measure_gemm(ceiling_list *list) {
    if (!openblas_available())
        return;
    int64_t count = GEMM * GEMM;
    float *memory = malloc((size_t)(3 * count) * sizeof *memory);
    if (!memory)
        return;
    fmoe_fill_normal(fmoe_opt.seed, 1, 1, 2 * count, memory);
    matrices m = {memory, memory + count, memory + 2 * count};
    measured_ceiling *c = &list->all[list->count++];
    *c = (measured_ceiling){.op = "gemm", .case_name = "M1024-N1024-K1024-f32", .work.flops = 2.0 * GEMM * GEMM * GEMM};
    c->timing = time_runs(gemm, &m, 5, 20, 200);
    free(memory);
}

static const struct {
    const char *op, *variant, *unit, *meaning;
} explained[] = {
    {"copy", "half to half", "GB/s", "read + written; what streams through memory once is bound by this"},
    {"gather", "random rows", "GB/s", "random rows of 1 KB; the smaller the table, the nearer its cache"},
    {"fma", "ten chains", "GFLOP/s", "multiply-adds in registers, all threads; no program computes faster"},
    {"fork_join", "empty region", "µs", "an empty parallel region; a phase shorter than this should stay serial"},
    {"gemm", "OpenBLAS", "GFLOP/s", "a dense product; what a tuned program makes of the FMA peak"},
};

static double rate(const measured_ceiling *c, double ms) {
    if (c->work.bytes > 0)
        return c->work.bytes / ms * 1e-6;
    return c->work.flops > 0 ? c->work.flops / ms * 1e-6 : ms * 1e3;
}

static void show_ceiling(const measured_ceiling *c, bool repeated) {
    size_t i = 0;
    while (strcmp(explained[i].op, c->op))
        i++;
    printf("  %-10s%-22s%9.4g %-8s %9.4g   %s\n", c->op, c->case_name, rate(c, c->timing.min_ms), explained[i].unit,
           rate(c, c->timing.median_ms), repeated ? "" : explained[i].meaning);
    fmoe_work work = c->work;
    work.floor_ms = NAN;
    fmoe_csv_row(c->op, c->case_name, explained[i].variant, LEVEL_CORE, BACKEND_CPU, FMOE_F32, c->timing, NAN, work);
}

void show_ceilings(void) {
    ceiling_list list;
    machine_measure_again(&list);
    measure_gemm(&list);
    printf("\nCeilings: the fastest of several runs, the median beside it\n");
    bool busy = false;
    for (int i = 0; i < list.count; i++) {
        show_ceiling(&list.all[i], i > 0 && !strcmp(list.all[i].op, list.all[i - 1].op));
        busy |= list.all[i].timing.median_ms > 2 * list.all[i].timing.min_ms;
    }
    if (busy)
        printf("  A median is below half of its fastest run: other programs are running. Measure again when they are "
               "done.\n");
    if (!openblas_available())
        printf("  gemm      not measured: libopenblas.so.0 is not installed\n");
}

/* ---- Timing ------------------------------------------------------------------------------------------------------ */

/* The smallest step between two different readings, and what a reading costs. */
static void clock_itself(void) {
    double step = INFINITY, first = fmoe_now_ms(), last = first;
    int readings = 100000;
    for (int i = 0; i < readings; i++) {
        double now = fmoe_now_ms();
        if (now > last)
            step = fmin(step, now - last);
        last = now;
    }
    printf("  the clock       smallest step %.0f ns, a reading costs %.0f ns\n", step * 1e6,
           (last - first) * 1e6 / readings);
}

typedef struct {
    int64_t count;
    float *values;
} vector_of;

// [kept]
static void sum_kept(void *context) {
    const vector_of *v = context;
    float sum = 0;
    for (int64_t i = 0; i < v->count; i++)
        sum += v->values[i] * v->values[i];
    sink = sum;
}
// [/kept]

// [dropped]
static void sum_dropped(void *context) {
    const vector_of *v = context;
    float sum = 0;
    for (int64_t i = 0; i < v->count; i++)
        sum += v->values[i] * v->values[i];
    (void)sum; /* nobody reads it, so the compiler leaves the loop out */
}
// [/dropped]

static double once(void (*call)(void *), void *context) {
    double start = fmoe_now_ms();
    call(context);
    return fmoe_now_ms() - start;
}

static void fill(void *context) {
    const vector_of *v = context;
    for (int64_t i = 0; i < v->count; i++)
        v->values[i] = (float)i;
}

/* Fresh memory has no pages behind it yet: the first run pays for them, and for cold caches. */
static void cold_start(void) {
    vector_of v = {.count = 8 << 20};
    v.values = malloc((size_t)v.count * sizeof *v.values);
    if (!v.values)
        return;
    double cold = once(fill, &v);
    fmoe_timing warm = time_runs(fill, &v, 10, 10, 0);
    printf("  a cold start    first run %.2f ms, median of the next ten %.2f ms: %.1f times less\n", cold,
           warm.median_ms, cold / warm.median_ms);
    free(v.values);
}

/* Two single runs of the same thing can differ by more than the rungs of a ladder. */
static void one_run(const vector_of *v) {
    fmoe_timing t = time_runs(sum_kept, (void *)v, 100, 100, 0);
    printf("  one run         100 runs of one loop: fastest %.3f, median %.3f, slowest %.3f ms\n", t.min_ms,
           t.median_ms, t.max_ms);
}

static void dead_code(const vector_of *v) {
    double kept = time_runs(sum_kept, (void *)v, 20, 20, 0).min_ms;
    double dropped = time_runs(sum_dropped, (void *)v, 20, 20, 0).min_ms;
    printf("  dead code       %lld multiply-adds, sum unread: %.5f ms, \"%.3g GFLOP/s\"; sum read: %.3f ms, %.3g "
           "GFLOP/s\n",
           (long long)v->count, dropped, 2e-6 * (double)v->count / fmax(dropped, 1e-6), kept,
           2e-6 * (double)v->count / kept);
}

typedef struct {
    vector_of v;
    int calls;
} batch;

static void call_often(void *context) {
    batch *b = context;
    for (int i = 0; i < b->calls; i++)
        sum_kept(&b->v);
}

/* A call that takes as long as reading the clock: only many of them at once can be timed. */
static void short_calls(const vector_of *v) {
    batch b = {{16, v->values}, 1};
    double single = time_runs(call_often, &b, 100, 100, 0).median_ms;
    b.calls = 10000;
    double many = time_runs(call_often, &b, 10, 10, 0).median_ms / b.calls;
    printf("  short calls     a sum of 16: %.0f ns when timed alone, %.1f ns when 10,000 are timed together\n",
           single * 1e6, many * 1e6);
}

void show_timing(void) {
    printf("\nTiming: how to be wrong\n");
    vector_of v = {.count = 1 << 20};
    v.values = malloc((size_t)v.count * sizeof *v.values);
    if (!v.values)
        return;
    fmoe_fill_normal(fmoe_opt.seed, 2, 1, v.count, v.values);
    clock_itself();
    cold_start();
    one_run(&v);
    dead_code(&v);
    short_calls(&v);
    free(v.values);
}

/* ---- Error ------------------------------------------------------------------------------------------------------- */

enum { OUTPUTS = 4096, TERMS = 64 };

static float rounded(fmoe_dtype dtype, float value) {
    char stored[4];
    fmoe_from_f32(dtype, 1, &value, stored);
    fmoe_to_f32(dtype, 1, stored, &value);
    return value;
}

/* Where a sum of products is rounded to the storage type. */
typedef enum { AT_THE_STORE, PRODUCTS_TOO, EVERY_SUM } rounding;

// [rounding]
static float sum_of_products(fmoe_dtype dtype, rounding where, const float *a, const float *b) {
    double sum = 0;
    for (int k = 0; k < TERMS; k++) {
        double product = (double)a[k] * b[k];
        if (where == PRODUCTS_TOO)
            product = rounded(dtype, (float)product);
        sum += product;
        if (where == EVERY_SUM)
            sum = rounded(dtype, (float)sum);
    }
    return rounded(dtype, (float)sum);
}
// [/rounding]

/* fmoe_relative_error with a reference that is not rounded itself. */
static double rounding_error(fmoe_dtype dtype, rounding where, const float *a, const float *b) {
    double difference = 0, norm = 0;
    for (int i = 0; i < OUTPUTS; i++) {
        double ref = 0;
        for (int k = 0; k < TERMS; k++)
            ref += (double)a[i * TERMS + k] * b[i * TERMS + k];
        double error = sum_of_products(dtype, where, a + i * TERMS, b + i * TERMS) - ref;
        difference += error * error;
        norm += ref * ref;
    }
    return sqrt(difference / norm);
}

static void show_limits(void) {
    float *a = malloc(2 * sizeof *a * OUTPUTS * TERMS);
    if (!a)
        return;
    const float *b = a + OUTPUTS * TERMS;
    fmoe_fill_normal(fmoe_opt.seed, 3, 1, 2 * OUTPUTS * TERMS, a);
    printf("  %d sums of %d products, rounded     at the store   products too   every sum     limit\n", OUTPUTS, TERMS);
    for (int t = FMOE_F32; t <= FMOE_BF16; t++) {
        fmoe_dtype dtype = (fmoe_dtype)t;
        printf("  %-37s %10.1e %14.1e %11.1e %9.0e\n", fmoe_dtype_name(dtype),
               rounding_error(dtype, AT_THE_STORE, a, b), rounding_error(dtype, PRODUCTS_TOO, a, b),
               rounding_error(dtype, EVERY_SUM, a, b), fmoe_error_limit(dtype));
    }
    free(a);
}

static float sum_in_order(const float *v, int64_t count) {
    volatile float sum = 0; /* keeps the compiler from reordering */
    for (int64_t i = 0; i < count; i++)
        sum = sum + v[i];
    return sum;
}

static float sum_in_lanes(const float *v, int64_t count) {
    float sum[16] = {0}, all = 0;
    for (int64_t i = 0; i < count; i++)
        sum[i % 16] += v[i];
    for (int lane = 0; lane < 16; lane++)
        all += sum[lane];
    return all;
}

// [pairwise]
static float sum_pairwise(const float *v, int64_t count) {
    if (count <= 16)
        return sum_in_order(v, count);
    return sum_pairwise(v, count / 2) + sum_pairwise(v + count / 2, count - count / 2);
}
// [/pairwise]

static void show_orders(void) {
    enum { COUNT = 1 << 20 };
    float *v = malloc(sizeof *v * COUNT);
    if (!v)
        return;
    double exact = 0;
    for (int64_t i = 0; i < COUNT; i++) {
        v[i] = fmoe_random_uniform(fmoe_opt.seed, 4, (uint64_t)i);
        exact += v[i];
    }
    printf("  one float32 sum of a million terms: in order %.0e off, in 16 lanes %.0e, pairwise %.0e\n",
           fabs(sum_in_order(v, COUNT) / exact - 1), fabs(sum_in_lanes(v, COUNT) / exact - 1),
           fabs(sum_pairwise(v, COUNT) / exact - 1));
    free(v);
}

/* Single elements can cancel to almost nothing; the tensor as a whole does not. */
static void show_measure(void) {
    enum { COUNT = 4096, LENGTH = 256 };
    float out[COUNT], ref[COUNT], terms[LENGTH];
    double worst = 0;
    for (int i = 0; i < COUNT; i++) {
        double exact = 0;
        fmoe_fill_normal(fmoe_opt.seed, 100 + (uint64_t)i, 1, LENGTH, terms);
        for (int k = 0; k < LENGTH; k++)
            exact += terms[k];
        ref[i] = (float)exact;
        out[i] = sum_in_order(terms, LENGTH);
        worst = fmax(worst, fabs(out[i] / exact - 1));
    }
    printf("  %d float32 sums of %d normal numbers: worst element %.0e off, ‖out - ref‖ / ‖ref‖ = %.0e\n", COUNT,
           LENGTH, worst, fmoe_relative_error(COUNT, out, ref, 0));
}

void show_error(void) {
    printf("\nError: what rounding costs\n");
    show_limits();
    show_orders();
    show_measure();
}

/* ---- Floor ------------------------------------------------------------------------------------------------------- */

void show_floor(void) {
    const char *name = "T1024-d256-N16384-K64-normal-f32";
    const fmoe_ceilings *m = fmoe_machine_ceilings();
    fmoe_case c;
    fmoe_problem p;
    fmoe_progress("drawing %s", name);
    if (fmoe_case_parse(name, &c) != FMOE_OK || fmoe_problem_new(&fmoe_step_expert, &c, fmoe_opt.seed, &p) != FMOE_OK)
        return;
    fmoe_progress("%s", "");
    double row = (double)c.d * 4, pairs = (double)(c.T * c.K), table = (double)c.N * row;
    double gather = pairs * row / fmoe_gather_gbs(m, table) * 1e-6, stream = table / m->copy_gbs * 1e-6;
    double multiply = 2 * pairs * (double)c.d / m->fma_gflops * 1e-6;
    printf("\nA floor: the expert step at %s, either of its two phases\n", name);
    printf("  gather    %8.0f rows of %.0f bytes, %.3g MB at %.3g GB/s %25.3f ms\n", pairs, row, pairs * row * 1e-6,
           fmoe_gather_gbs(m, table), gather);
    printf("  stream    %8lld rows of the table once, %.3g MB at %.3g GB/s %17.3f ms\n", (long long)c.N, table * 1e-6,
           m->copy_gbs, stream);
    printf("  multiply  %.3g GFLOP at %.3g GFLOP/s %46.3f ms\n", 2e-9 * pairs * (double)c.d, m->fma_gflops, multiply);
    printf("  the largest of the three, twice: %.3f ms by this strategy\n", 2 * fmax(gather, fmax(stream, multiply)));
    fmoe_work work = fmoe_step_expert.work(&p, m);
    printf("  the floor that chapters 1 and 5 print is the cheapest strategy's: %.3f ms\n  (%s)\n", work.floor_ms,
           work.floor_why);
    fmoe_problem_free(&p);
}
