/* The machine's ceilings: how fast it copies, gathers, multiplies and forks. Every floor is computed from them. */
#include "program.h"

#include <ctype.h>
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>

/* ---- Name -------------------------------------------------------------------------------------------------------- */

/* "Intel(R) Xeon(R) CPU @ 2.20GHz" becomes "Intel Xeon CPU". */
static void tidy_name(char *name) {
    char *to = name;
    for (const char *from = name; *from && *from != '@' && *from != '\n'; from++) {
        if (!strncmp(from, "(R)", 3) || !strncmp(from, "(r)", 3))
            from += 2;
        else if (!strncmp(from, "(TM)", 4) || !strncmp(from, "(tm)", 4))
            from += 3;
        else if (*from != ' ' || (to > name && to[-1] != ' '))
            *to++ = *from;
    }
    while (to > name && to[-1] == ' ')
        to--;
    *to = 0;
}

static void processor_name(char *name, size_t size) {
    struct utsname system;
    snprintf(name, size, "%.40s CPU", uname(&system) ? "unknown" : system.machine);
    FILE *file = fopen("/proc/cpuinfo", "r");
    char line[256];
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, "model name", 10) && strchr(line, ':')) {
            snprintf(name, size, "%s", strchr(line, ':') + 1);
            break;
        }
    if (file)
        fclose(file);
    tidy_name(name);
}

static void name_machine(fmoe_ceilings *m) {
    char processor[64];
    processor_name(processor, sizeof processor);
    m->threads = omp_get_max_threads();
    snprintf(m->device, sizeof m->device, "%s (%d thread%s)", processor, m->threads, m->threads == 1 ? "" : "s");
    char slug[64];
    size_t used = 0;
    for (const char *ch = processor; *ch; ch++) {
        if (isalnum((unsigned char)*ch))
            slug[used++] = (char)tolower((unsigned char)*ch);
        else if (used && slug[used - 1] != '-')
            slug[used++] = '-';
    }
    while (used && slug[used - 1] == '-')
        used--;
    slug[used] = 0;
    snprintf(m->slug, sizeof m->slug, "%s-%dt", slug, m->threads);
}

void machine_clocks(char *text, size_t size) {
    double low = INFINITY, high = 0, mhz;
    FILE *file = fopen("/proc/cpuinfo", "r");
    char line[256];
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "cpu MHz : %lf", &mhz) == 1) {
            low = fmin(low, mhz);
            high = fmax(high, mhz);
        }
    if (file)
        fclose(file);
    if (high > 0)
        snprintf(text, size, "%.0f to %.0f MHz", low, high);
    else
        snprintf(text, size, "unknown");
}

/* ---- Measuring --------------------------------------------------------------------------------------------------- */

enum { ROW_FLOATS = 256, ROW_BYTES = 1024, GATHER_ROWS = 16384, SAMPLES = 5 };
static const double gather_sizes_mb[] = {0.25, 1, 4, 16, 64, 256};
enum { GATHER_SIZES = sizeof gather_sizes_mb / sizeof gather_sizes_mb[0] };

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

/* [copy] */
/* Half of the buffer to the other half, a contiguous share a thread. Returns GB/s, read and written. */
static double copy_once(float *buffer, int64_t count) {
    int64_t half = count / 2;
    double start = fmoe_now_ms();
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < half; i++)
        buffer[half + i] = buffer[i];
    return 2.0 * (double)half * sizeof *buffer / (fmoe_now_ms() - start) * 1e-6;
}
/* [/copy] */

/* [gather] */
/* Sums random rows of 1 KB; nothing links one row's address to another, so many loads are in flight. */
static float gather_rows(const float *table, uint32_t num_rows, int rows, uint32_t seed) {
    vector sum[4] = {0};
    uint32_t state = seed;
    for (int i = 0; i < rows; i++) {
        state = state * 1664525u + 1013904223u; /* Numerical Recipes' generator: its high bits will do */
        const float *row = table + ((uint64_t)state * num_rows >> 32) * ROW_FLOATS;
        for (int c = 0; c < ROW_FLOATS / LANES; c++)
            sum[c % 4] += ((const vector *)row)[c];
    }
    return (sum[0] + sum[1] + sum[2] + sum[3])[0];
}
/* [/gather] */

/* GB/s of all threads together, each gathering from the whole table. Never the same rows twice in a row: those of the
 * last call are still in some cache. */
static double gather_once(const float *table, uint32_t num_rows, int rows) {
    static uint32_t seed;
    seed += 104729;
    float total = 0;
    double start = fmoe_now_ms();
#pragma omp parallel reduction(+ : total)
    total += gather_rows(table, num_rows, rows, seed + 7919u * (uint32_t)omp_get_thread_num());
    double ms = fmoe_now_ms() - start;
    sink = total;
    return (double)rows * ROW_BYTES * omp_get_max_threads() / ms * 1e-6;
}

/* [fma] */
/* Ten independent chains of a·b + c a thread: enough to hide the latency of one, few enough for the registers. */
enum { CHAINS = 10 };
static float fma_chains(int steps, float seed) {
    vector sum[CHAINS], b = {0}, c = {0};
    b += 0.999f;
    c += seed;
    for (int i = 0; i < CHAINS; i++)
        sum[i] = c * (float)i;
    for (int s = 0; s < steps; s++)
        for (int i = 0; i < CHAINS; i++)
            sum[i] = sum[i] * b + c;
    vector all = sum[0];
    for (int i = 1; i < CHAINS; i++)
        all += sum[i];
    return all[0];
}
/* [/fma] */

static double fma_once(int steps) {
    float total = 0;
    double start = fmoe_now_ms();
#pragma omp parallel reduction(+ : total)
    total += fma_chains(steps, 1e-3f);
    double ms = fmoe_now_ms() - start;
    sink = total;
    return 2.0 * steps * CHAINS * LANES * omp_get_max_threads() / ms * 1e-6;
}

static double fork_join_once(int regions) {
    double start = fmoe_now_ms();
    for (int i = 0; i < regions; i++) {
#pragma omp parallel
        __asm__ volatile("" ::: "memory"); /* a region the compiler may not remove */
    }
    return (fmoe_now_ms() - start) * 1e3 / regions;
}

/* Other programs can only slow a sample down, so the best one is nearest to what the machine can do. */
static void measure_memory(fmoe_ceilings *m) {
    int sizes = GATHER_SIZES;
    float *table = NULL;
    while (sizes > 0 && posix_memalign((void **)&table, 4096, (size_t)(gather_sizes_mb[sizes - 1] * 1e6)))
        sizes--; /* too large for this machine */
    if (sizes == 0)
        return;
    int64_t count = (int64_t)(gather_sizes_mb[sizes - 1] * 1e6 / sizeof *table);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++)
        table[i] = 1;
    for (int s = 0; s < SAMPLES; s++)
        m->copy_gbs = fmax(m->copy_gbs, copy_once(table, count));
    for (int size = 0; size < sizes; size++) {
        uint32_t num_rows = (uint32_t)(gather_sizes_mb[size] * 1e6 / ROW_BYTES);
        gather_once(table, num_rows, GATHER_ROWS); /* brings the table into the caches that hold it */
        for (int s = 0; s < 4 * SAMPLES; s++)
            m->gather_gbs[size] = fmax(m->gather_gbs[size], gather_once(table, num_rows, GATHER_ROWS));
        m->gather_mb[size] = gather_sizes_mb[size];
    }
    m->num_gather = sizes;
    free(table);
}

static void measure(fmoe_ceilings *m) {
    fmoe_progress("measuring this machine's ceilings");
    measure_memory(m);
    for (int s = 0; s < 2 * SAMPLES; s++)
        m->fma_gflops = fmax(m->fma_gflops, fma_once(1000000));
    m->fork_join_us = INFINITY;
    for (int s = 0; s < SAMPLES; s++)
        m->fork_join_us = fmin(m->fork_join_us, fork_join_once(1000));
    fmoe_progress("%s", "");
}

/* ---- Cache ------------------------------------------------------------------------------------------------------- */

void make_folders(const char *path) {
    char folder[512];
    snprintf(folder, sizeof folder, "%s", path);
    for (char *slash = strchr(folder + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(folder, 0777);
        *slash = '/';
    }
}

static void cache_path(const fmoe_ceilings *m, char *path, size_t size) {
    snprintf(path, size, "build/ceilings-%s.csv", m->slug);
}

static void cache_write(const fmoe_ceilings *m) {
    char path[160];
    cache_path(m, path, sizeof path);
    make_folders(path);
    FILE *file = fopen(path, "w");
    if (!file)
        return; /* measured again next time */
    fprintf(file, "# ceilings of %s; `make ceilings` measures them again\nwhat,size_mb,rate\n", m->device);
    fprintf(file, "copy_gbs,,%.4g\n", m->copy_gbs);
    for (int i = 0; i < m->num_gather; i++)
        fprintf(file, "gather_gbs,%g,%.4g\n", m->gather_mb[i], m->gather_gbs[i]);
    fprintf(file, "fma_gflops,,%.4g\nfork_join_us,,%.4g\n", m->fma_gflops, m->fork_join_us);
    fclose(file);
}

/* True if every figure was there. */
static bool cache_read(fmoe_ceilings *m) {
    char path[160], line[160];
    cache_path(m, path, sizeof path);
    FILE *file = fopen(path, "r");
    if (!file)
        return false;
    while (fgets(line, sizeof line, file)) {
        double mb, rate;
        if (sscanf(line, "copy_gbs,,%lf", &rate) == 1)
            m->copy_gbs = rate;
        else if (sscanf(line, "fma_gflops,,%lf", &rate) == 1)
            m->fma_gflops = rate;
        else if (sscanf(line, "fork_join_us,,%lf", &rate) == 1)
            m->fork_join_us = rate;
        else if (m->num_gather < 8 && sscanf(line, "gather_gbs,%lf,%lf", &mb, &rate) == 2) {
            m->gather_mb[m->num_gather] = mb;
            m->gather_gbs[m->num_gather++] = rate;
        }
    }
    fclose(file);
    return m->copy_gbs > 0 && m->fma_gflops > 0 && m->fork_join_us > 0 && m->num_gather > 0;
}

static fmoe_ceilings machine;

const fmoe_ceilings *machine_measure_again(void) {
    machine = (fmoe_ceilings){0};
    name_machine(&machine);
    measure(&machine);
    cache_write(&machine);
    return &machine;
}

const fmoe_ceilings *fmoe_machine_ceilings(void) {
    if (machine.threads == omp_get_max_threads())
        return &machine;
    machine = (fmoe_ceilings){0};
    name_machine(&machine);
    return cache_read(&machine) ? &machine : machine_measure_again();
}

double fmoe_gather_gbs(const fmoe_ceilings *ceilings, double table_bytes) {
    const fmoe_ceilings *m = ceilings;
    double mb = table_bytes * 1e-6;
    if (m->num_gather == 0)
        return m->copy_gbs;
    if (mb <= m->gather_mb[0])
        return m->gather_gbs[0];
    for (int i = 1; i < m->num_gather; i++)
        if (mb <= m->gather_mb[i]) {
            double t = log(mb / m->gather_mb[i - 1]) / log(m->gather_mb[i] / m->gather_mb[i - 1]);
            return m->gather_gbs[i - 1] + t * (m->gather_gbs[i] - m->gather_gbs[i - 1]);
        }
    return m->gather_gbs[m->num_gather - 1];
}
