/* A right plugin for the mlp step, and a wrong one for every mistake that the tests make. */
#include "plugin.h"

#include "../ref_cpu/check.h"

#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The environment says which; the tests compile this once. */
static const char *mistake = "";
#define MISTAKE(name) (!strcmp(mistake, #name))

#ifndef VERSION
#define VERSION FMOE_STEPS_VERSION
#endif
#ifndef NAME
#define NAME "mine"
#endif
#ifndef BACKEND
#define BACKEND BACKEND_CPU
#endif
#ifndef DTYPES
#define DTYPES 0
#endif

static void read_row(const fmoe_mlp_args *a, const void *matrix, int64_t row, int64_t columns, float *values) {
    const char *bytes = matrix;
    fmoe_to_f32(a->dtype, columns, bytes + (size_t)(row * columns) * fmoe_dtype_size(a->dtype), values);
}

static void write_one(const fmoe_mlp_args *a, int64_t at, double value) {
    float single = (float)value;
    fmoe_from_f32(a->dtype, 1, &single, (char *)a->y + (size_t)at * fmoe_dtype_size(a->dtype));
}

static float narrow(fmoe_dtype dtype, double value) {
    float single = (float)value;
    uint16_t bits[2];
    fmoe_from_f32(dtype, 1, &single, bits);
    fmoe_to_f32(dtype, 1, bits, &single);
    return single;
}

static double dot(int64_t count, const float *a, const float *b) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum += (double)a[i] * b[i];
    return sum;
}

/* y[t, j]: its place in memory. */
static int64_t place(const fmoe_mlp_args *a, int64_t t, int64_t j) {
    if (MISTAKE(TRANSPOSED))
        return j * a->T + t;
    if (MISTAKE(SHIFTED))
        return (t * a->d + j + a->T * a->d - 1) % (a->T * a->d);
    return t * a->d + j;
}

static double spoil(const fmoe_mlp_args *a, int64_t t, int64_t j, double y) {
    if (MISTAKE(FACTOR))
        return 2 * y;
    if (MISTAKE(EDGE) && j >= a->d / 4 * 4)
        return -y;
    if (MISTAKE(ONE_ELEMENT) && t == a->T - 1 && j == 1 && t > 0)
        return y + 10;
    return y;
}

static void hidden_row(const fmoe_mlp_args *a, const float *x, float *row, float *h) {
    for (int64_t i = 0; i < a->I; i++) {
        read_row(a, a->gate, i, a->d, row);
        double p = dot(a->d, row, x);
        read_row(a, a->up, i, a->d, row);
        h[i] = (float)(p / (1 + exp(-p)) * dot(a->d, row, x));
        if (MISTAKE(NARROW_HIDDEN))
            h[i] = narrow(FMOE_BF16, h[i]);
    }
}

static void compute_token(const fmoe_mlp_args *a, int64_t t, float *x, float *row, float *h) {
    read_row(a, a->x, t, a->d, x);
    hidden_row(a, x, row, h);
    for (int64_t j = 0; j < a->d; j++) {
        read_row(a, a->down, j, a->I, row);
        double y = dot(a->I, row, h);
        for (int64_t i = 0, first = 1; MISTAKE(ROUNDED_SUM) && i < a->I; i++, first = 0)
            y = narrow(a->dtype == FMOE_F32 ? FMOE_F16 : a->dtype, (first ? 0 : y) + (double)row[i] * h[i]);
        if (!MISTAKE(TAIL_UNWRITTEN) || j < a->d / 4 * 4)
            write_one(a, place(a, t, j), spoil(a, t, j, y));
    }
}

/* What does not depend on a token. */
static void misbehave(const fmoe_mlp_args *a, unsigned char *workspace, size_t bytes) {
    size_t y_bytes = (size_t)(a->T * a->d) * fmoe_dtype_size(a->dtype);
    if (MISTAKE(BEYOND_OUTPUT))
        ((unsigned char *)a->y)[y_bytes] = 0;
    if (MISTAKE(BEFORE_OUTPUT))
        ((unsigned char *)a->y)[-1] = 0;
    if (MISTAKE(INPUT_WRITTEN) && a->T > 0)
        ((unsigned char *)a->x)[0] ^= 1;
    if (MISTAKE(BEYOND_WORKSPACE))
        workspace[bytes] = 0;
    if (MISTAKE(CRASH))
        raise(SIGSEGV);
    while (MISTAKE(HANG))
        usleep(1000);
    if (MISTAKE(EXIT))
        exit(0);
    if (MISTAKE(SLEEPS))
        usleep(5000);
    if (MISTAKE(SLEEPS_BRIEFLY))
        usleep(200);
    if (MISTAKE(PRINTS))
        puts("a plugin prints this");
}

static size_t needed(const void *args) {
    const fmoe_mlp_args *a = args;
    if (MISTAKE(ENDLESS_WORKSPACE))
        return SIZE_MAX / 2;
    return (size_t)(2 * (a->d > a->I ? a->d : a->I) + a->I) * sizeof(float);
}

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_mlp_args *a = args;
    int64_t longest = a->d > a->I ? a->d : a->I;
    float *x = workspace, *row = x + longest, *h = row + longest, left = h[0];
    static int calls;
    (void)stream;
    calls++;
    if ((uintptr_t)workspace % 256 || workspace_bytes != needed(args))
        return FMOE_BAD_WORKSPACE;
    if (MISTAKE(RETURNS_STATUS) && a->d % 2)
        return fmoe_fail(FMOE_UNSUPPORTED, "d is odd");
    for (int64_t t = 0; t < a->T && !MISTAKE(UNWRITTEN) && (!MISTAKE(STOPS_WORKING) || calls < 5); t++)
        compute_token(a, t, x, row, h);
    if (MISTAKE(OTHER_BITS) && calls % 2 == 0 && a->T > 0)
        ((unsigned char *)a->y)[0] ^= 1; /* far below the limit */
    if (MISTAKE(COUNTS_ON_ZEROS) && a->T > 0)
        write_one(a, 0, left);
    misbehave(a, workspace, workspace_bytes);
    return FMOE_OK;
}

__attribute__((constructor)) static void loaded(void) {
    const char *said = getenv("MISTAKE");
    mistake = said ? said : "";
    if (MISTAKE(CRASH_AT_LOAD))
        abort();
}

#ifndef NO_SYMBOL
const fmoe_plugin fmoe_plugin_rung = {.version = VERSION,
                                      .step = "mlp",
                                      .name = NAME,
                                      .run = run,
                                      .backend = BACKEND,
                                      .dtypes = DTYPES,
                                      .workspace = needed,
                                      .idea = "The definition, in double."};
#endif
