/* Exercise 2.2, solution: one pass, from which the first number has been subtracted.
 *
 *     cc -O2 -std=gnu11 -DTRY -Ichapters chapters/2-router/solutions/2-variance.c -o try -lm && ./try */
#include <stdint.h>

// [variance]
/* Mean and sum of squared deviations of `count` numbers, `step` apart. Deviations are taken from the first number,
 * which is as good as the mean to within a few standard deviations, and the variance does not change by a shift. */
static void statistics_of(int64_t count, int64_t step, const float *x, double *mean, double *squares) {
    float sum = 0, sum_squares = 0, shift = x[0];
    for (int64_t t = 1; t < count; t++) {
        float deviation = x[t * step] - shift;
        sum += deviation;
        sum_squares += deviation * deviation;
    }
    *mean = shift + (double)sum / (double)count;
    *squares = sum_squares - (double)sum * sum / (double)count;
}
// [/variance]

#ifdef TRY
#include <math.h>
#include <stdio.h>

int main(void) {
    static const float offsets[] = {0, 1, 10, 100, 1e3f, 1e4f, 1e5f, 1e6f};
    for (int o = 0; o < 8; o++) {
        float x[1000];
        double mean, squares, exact_mean = 0, exact = 0;
        for (int i = 0; i < 1000; i++) {
            x[i] = offsets[o] + sinf((float)(i * i));
            exact_mean += x[i] / 1000.0;
        }
        for (int i = 0; i < 1000; i++)
            exact += (x[i] - exact_mean) * (x[i] - exact_mean);
        statistics_of(1000, 1, x, &mean, &squares);
        printf("mean %9.1f: variance %12.7f, exactly %.7f, relative error %8.1e, deviation %g\n", exact_mean,
               squares / 1000, exact / 1000, fabs(squares - exact) / exact, sqrt(squares / 1000));
    }
}
#else
#include "plugin.h"

/* The chapter's rungs and the product that they use, so that only what changes stands here. */
#include "2-router/cpu.c" // NOLINT(bugprone-suspicious-include)
#define smaller smaller_of_gemm
#include "gemm.c" // NOLINT(bugprone-suspicious-include)
#undef smaller

/* x as float32, in the workspace. */
static const float *widened(const fmoe_router_args *args, float *room) {
    for (int64_t t = 0; t < args->T; t++) {
        const float *row = load_row(args->dtype, args->x, t, args->d, room + t * args->d);
        if (row != room + t * args->d)
            memcpy(room + t * args->d, row, (size_t)args->d * sizeof *row);
    }
    return room;
}

static fmoe_status run(const void *arguments, void *workspace, size_t bytes, void *stream) {
    const fmoe_router_args *args = arguments;
    size_t used = 0;
    scratch s = carve_scratch(args, workspace, &used);
    fmoe_status status = check(args, used, bytes);
    (void)stream;
    if (status != FMOE_OK || args->T == 0)
        return status;
    const float *x = widened(args, s.x_hat);
    if (!args->training)
        set_from_running(args, s.norm);
    for (int64_t h = 0; args->training && h < args->d; h++) {
        double mean, squares;
        statistics_of(args->T, args->d, x + h, &mean, &squares);
        set_from_batch(args, s.norm, h, mean, squares);
    }
    for (int64_t t = 0; t < args->T; t++)
        normalise_row(args, s.norm, t, s.x_hat + t * args->d);
    project(args, s, true, dot_in_vectors);
    log_softmax_rows(args, 0, args->T);
    return FMOE_OK;
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "router", .name = "my variance", .run = run, .workspace = scratch_bytes};
#endif
