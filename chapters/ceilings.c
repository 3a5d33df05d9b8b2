/* How fast this machine copies, gathers, multiplies and forks: four small programs, each with one bottleneck. */
#include "program.h"

#include <omp.h>
#include <stdlib.h>
#include <time.h>

/* The widest vector of the machine compiled for, in bytes. */
#if defined(__AVX512F__)
#define VECTOR 64
#elif defined(__AVX__)
#define VECTOR 32
#else
#define VECTOR 16
#endif
typedef float vector __attribute__((vector_size(VECTOR)));
enum { LANES = VECTOR / sizeof(float) };

static volatile float sink; /* results go here so that the compiler cannot leave the work out */

static const double gather_mb[] = {0.25, 1, 4, 16, 64, 256};
enum { GATHER_SIZES = sizeof gather_mb / sizeof gather_mb[0] };
enum { ROW_FLOATS = 256, ROW_BYTES = 1024, GATHER_ROWS = 65536, FMA_STEPS = 1000000, REGIONS = 1000, MAX_SAMPLES = 20 };

typedef struct {
    float *table;
    int64_t count;     /* floats */
    uint32_t num_rows; /* of 1 KB, in the part gathered from */
    uint32_t seed;
} memory;

/* A thread's own clock: it stands still while another program has the core, so that a busy machine still shows what it
 * can do. The ceilings are read from it; rungs are not, because whoever calls them waits for the wall's clock. */
static double cpu_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

// [copy]
/* Half of the table to the other half, a contiguous share a thread. Returns the slowest thread's time. */
static double copy(memory *m) {
    int64_t half = m->count / 2;
    double ms = 0;
#pragma omp parallel reduction(max : ms)
    {
        double start = cpu_ms();
#pragma omp for simd schedule(static) nowait
        for (int64_t i = 0; i < half; i++)
            m->table[half + i] = m->table[i];
        ms = cpu_ms() - start;
    }
    return ms;
}
// [/copy]

// [gather]
/* Sums random rows of 1 KB. No row's address depends on another row, so many loads are in flight. */
static float gather_rows(const float *table, uint32_t num_rows, uint32_t state) {
    vector sum[4] = {0};
    for (int i = 0; i < GATHER_ROWS; i++) {
        state = state * 1664525u + 1013904223u; /* Numerical Recipes' generator: its high bits will do */
        const float *row = table + ((uint64_t)state * num_rows >> 32) * ROW_FLOATS;
        for (int c = 0; c < ROW_FLOATS / LANES; c++)
            sum[c % 4] += ((const vector *)row)[c];
    }
    return (sum[0] + sum[1] + sum[2] + sum[3])[0];
}
// [/gather]

/* Every thread gathers from the whole table, and never the last call's rows: those are still in some cache. */
static double gather(memory *m) {
    float total = 0;
    double ms = 0;
    m->seed += 104729;
#pragma omp parallel reduction(+ : total) reduction(max : ms)
    {
        double start = cpu_ms();
        total += gather_rows(m->table, m->num_rows, m->seed + 7919u * (uint32_t)omp_get_thread_num());
        ms = cpu_ms() - start;
    }
    sink = total;
    return ms;
}

// [fma]
/* Ten independent chains of a·b + c: enough to hide the latency of one, few enough to stay in registers. */
enum { CHAINS = 10 };
static float fma_chains(float step) {
    vector sum[CHAINS], b = {0}, c = {0};
    b += 0.999f;
    c += step;
    for (int i = 0; i < CHAINS; i++)
        sum[i] = c * (float)i;
    for (int s = 0; s < FMA_STEPS; s++)
        for (int i = 0; i < CHAINS; i++)
            sum[i] = sum[i] * b + c;
    vector all = sum[0];
    for (int i = 1; i < CHAINS; i++)
        all += sum[i];
    return all[0];
}
// [/fma]

static double fma_all(memory *m) {
    float total = 0, step = 1e-6f * (float)++m->seed; /* not known when this is compiled */
    double ms = 0;
#pragma omp parallel reduction(+ : total) reduction(max : ms)
    {
        double start = cpu_ms();
        total += fma_chains(step);
        ms = cpu_ms() - start;
    }
    sink = total;
    return ms;
}

/* By the wall's clock: waiting for each other is what is measured. */
static double fork_join(memory *m) {
    (void)m;
    double start = fmoe_now_ms();
    for (int i = 0; i < REGIONS; i++) {
#pragma omp parallel
        __asm__ volatile("" ::: "memory"); /* a region that the compiler may not remove */
    }
    return (fmoe_now_ms() - start) / REGIONS;
}

static fmoe_timing several(double (*call)(memory *), memory *m, int runs) {
    double ms[MAX_SAMPLES];
    call(m);
    for (int i = 0; i < runs; i++)
        ms[i] = call(m);
    return timing_of(runs, ms);
}

static measured_ceiling *add(ceiling_list *list, const char *op) {
    measured_ceiling *c = &list->all[list->count++];
    *c = (measured_ceiling){.op = op, .case_name = "-"};
    return c;
}

static void measure_memory(ceiling_list *list) {
    int sizes = GATHER_SIZES;
    memory m = {0};
    while (sizes > 0 && posix_memalign((void **)&m.table, 4096, (size_t)(gather_mb[sizes - 1] * 1e6)))
        sizes--; /* too large for this machine */
    if (sizes == 0)
        return;
    double mb = gather_mb[sizes - 1];
    m.count = (int64_t)(mb * 1e6 / sizeof *m.table);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < m.count; i++)
        m.table[i] = 1;
    measured_ceiling *c = add(list, "copy");
    snprintf(c->case_name, sizeof c->case_name, "%gMB", mb / 2);
    c->work.bytes = mb * 1e6;
    c->timing = several(copy, &m, 5);
    for (int i = 0; i < sizes; i++) {
        c = add(list, "gather");
        c->mb = gather_mb[i];
        snprintf(c->case_name, sizeof c->case_name, "table%gMB-row1KB", c->mb);
        m.num_rows = (uint32_t)(c->mb * 1e6 / ROW_BYTES);
        c->work.bytes = (double)GATHER_ROWS * ROW_BYTES * omp_get_max_threads();
        c->timing = several(gather, &m, MAX_SAMPLES);
    }
    free(m.table);
}

void ceilings_measure(ceiling_list *list) {
    list->count = 0;
    fmoe_progress("measuring this machine's ceilings");
    measure_memory(list);
    memory none = {0};
    measured_ceiling *c = add(list, "fma");
    c->work.flops = 2.0 * FMA_STEPS * CHAINS * LANES * omp_get_max_threads();
    c->timing = several(fma_all, &none, 10);
    c = add(list, "fork_join");
    c->timing = several(fork_join, &none, 10);
    fmoe_progress("%s", "");
}
