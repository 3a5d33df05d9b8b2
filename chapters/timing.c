/* Time: a clock that never jumps, one warm-up, and the median of the runs after it. */
#include "program.h"

#include <stdlib.h>
#include <time.h>

double fmoe_now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

enum { MAX_RUNS = 200 };

fmoe_timing timing_of(int runs, double *ms) {
    qsort(ms, (size_t)runs, sizeof *ms, by_value);
    double median = runs % 2 ? ms[runs / 2] : 0.5 * (ms[runs / 2 - 1] + ms[runs / 2]);
    return (fmoe_timing){.median_ms = median, .min_ms = ms[0], .max_ms = ms[runs - 1], .runs = runs};
}

// [time]
fmoe_timing time_runs(void (*call)(void *), void *context, int at_least, int at_most, double budget_ms) {
    double spent_ms = 0, ms[MAX_RUNS];
    int runs = 0;
    call(context);
    do {
        double start = fmoe_now_ms();
        call(context);
        ms[runs] = fmoe_now_ms() - start;
        spent_ms += ms[runs++];
    } while (runs < at_least || (runs < at_most && spent_ms < budget_ms));
    return timing_of(runs, ms);
}
// [/time]

fmoe_timing fmoe_time(void (*call)(void *), void *context) {
    return time_runs(call, context, 3, MAX_RUNS, fmoe_opt.quick ? 100 : 400);
}
