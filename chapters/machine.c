/* The machine: its name, and its ceilings, measured once and then read back. Every floor is computed from them. */
#include "device.h"
#include "program.h"

#ifdef FMOE_WITH_CUDA
#include "../cuda/machine/machine_cuda.h"
#endif

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

void slug_of(const char *name, char *slug, size_t size) {
    size_t used = 0;
    for (const char *ch = name; *ch && used + 1 < size; ch++) {
        if (isalnum((unsigned char)*ch))
            slug[used++] = (char)tolower((unsigned char)*ch);
        else if (used && slug[used - 1] != '-')
            slug[used++] = '-';
    }
    while (used && slug[used - 1] == '-')
        used--;
    slug[used] = 0;
}

static void name_machine(fmoe_ceilings *m) {
    char processor[64], slug[64];
    processor_name(processor, sizeof processor);
    slug_of(processor, slug, sizeof slug);
    m->threads = omp_get_max_threads();
    snprintf(m->device, sizeof m->device, "%s (%d thread%s)", processor, m->threads, m->threads == 1 ? "" : "s");
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
    fprintf(file, "fma_gflops,,%.4g\ngemm_gflops,,%.4g\nfork_join_us,,%.4g\n", m->fma_gflops, m->gemm_gflops,
            m->fork_join_us);
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
        else if (sscanf(line, "gemm_gflops,,%lf", &rate) == 1)
            m->gemm_gflops = rate;
        else if (sscanf(line, "fork_join_us,,%lf", &rate) == 1)
            m->fork_join_us = rate;
        else if (m->num_gather < 8 && sscanf(line, "gather_gbs,%lf,%lf", &mb, &rate) == 2) {
            m->gather_mb[m->num_gather] = mb;
            m->gather_gbs[m->num_gather++] = rate;
        }
    }
    fclose(file);
    if (!(m->gemm_gflops > 0))
        m->gemm_gflops = m->fma_gflops;
    return m->copy_gbs > 0 && m->fma_gflops > 0 && m->fork_join_us > 0 && m->num_gather > 0;
}

static fmoe_ceilings machine;

/* Other programs can only slow a run down, so the fastest one is nearest to what the machine can do. */
static void set_ceilings(const ceiling_list *list, fmoe_ceilings *m) {
    for (int i = 0; i < list->count; i++) {
        const measured_ceiling *c = &list->all[i];
        if (!strcmp(c->op, "copy")) {
            m->copy_gbs = c->work.bytes / c->timing.min_ms * 1e-6;
        } else if (!strcmp(c->op, "gather")) {
            m->gather_mb[m->num_gather] = c->mb;
            m->gather_gbs[m->num_gather++] = c->work.bytes / c->timing.min_ms * 1e-6;
        } else if (!strcmp(c->op, "fma")) {
            m->fma_gflops = c->work.flops / c->timing.min_ms * 1e-6;
        } else if (!strcmp(c->op, "gemm") && strstr(c->case_name, "bf16")) {
            m->gemm_gflops = c->work.flops / c->timing.min_ms * 1e-6;
        } else if (!strcmp(c->op, "fork_join") || !strcmp(c->op, "launch")) {
            m->fork_join_us = c->timing.min_ms * 1e3;
        }
    }
    if (!(m->gemm_gflops > 0)) /* no 16-bit product, or no library for it */
        m->gemm_gflops = m->fma_gflops;
}

const fmoe_ceilings *machine_measure_again(ceiling_list *list) {
    machine = (fmoe_ceilings){0};
    name_machine(&machine);
    ceilings_measure(list);
    set_ceilings(list, &machine);
    cache_write(&machine);
    return &machine;
}

const fmoe_ceilings *fmoe_machine_ceilings(void) {
    if (machine.threads == omp_get_max_threads())
        return &machine;
    machine = (fmoe_ceilings){0};
    name_machine(&machine);
    ceiling_list list;
    return cache_read(&machine) ? &machine : machine_measure_again(&list);
}

#ifdef FMOE_WITH_CUDA
static fmoe_ceilings gpu;

static void name_gpu(void) {
    gpu = (fmoe_ceilings){0};
    snprintf(gpu.device, sizeof gpu.device, "%s", fmoe_device_get()->name);
    snprintf(gpu.slug, sizeof gpu.slug, "%s", fmoe_device_get()->slug);
}

fmoe_status machine_measure_gpu_again(ceiling_list *list) {
    name_gpu();
    list->count = 0;
    fmoe_status status = cuda_ceilings_measure(list);
    set_ceilings(list, &gpu);
    if (status == FMOE_OK)
        cache_write(&gpu);
    return status;
}

const fmoe_ceilings *fmoe_device_ceilings(void) {
    ceiling_list list;
    if (gpu.copy_gbs > 0 || !fmoe_device_get()->present)
        return &gpu;
    name_gpu();
    if (!cache_read(&gpu)) {
        fmoe_progress("measuring the GPU's ceilings");
        machine_measure_gpu_again(&list);
        fmoe_progress("%s", "");
    }
    return &gpu;
}
#endif

static const fmoe_ceilings *named(void) {
    static fmoe_ceilings m;
    name_machine(&m);
    return &m;
}

const char *machine_device(void) {
    return named()->device;
}

const char *machine_slug(void) {
    return named()->slug;
}

double fmoe_product_gflops(const fmoe_ceilings *ceilings, fmoe_dtype dtype) {
    return dtype == FMOE_F32 ? ceilings->fma_gflops : ceilings->gemm_gflops;
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
