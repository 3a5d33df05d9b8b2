/* Exercise 0.3, solution: the largest difference over the largest finite value. Linked with ref_cpu/compare.c. */
#include "../ref_cpu/fmoe.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

// [measure]
/* The largest difference over the largest finite value. A comparison with NaN is false, so what must be refused is
 * asked for by name: whatever differs and is not finite. */
static double largest_error(int64_t count, const float *out, const float *ref) {
    double difference = 0, scale = 0;
    for (int64_t i = 0; i < count; i++) {
        if (out[i] == ref[i] || (isnan(out[i]) && isnan(ref[i])))
            continue;
        if (!isfinite(out[i]) || !isfinite(ref[i]))
            return INFINITY;
        difference = fmax(difference, fabs((double)out[i] - ref[i]));
    }
    for (int64_t i = 0; i < count; i++)
        if (isfinite(ref[i]))
            scale = fmax(scale, fabs((double)ref[i]));
    return difference > 0 ? difference / scale : 0;
}
// [/measure]

enum { COUNT = 1 << 20 };
static float ref[COUNT], out[COUNT];
static int failures;

/* Both measures on `out`; what yours should say. */
static void judge(const char *what, int refuse) {
    double limit = 1e-4, norm = fmoe_relative_error(COUNT, out, ref, 0), mine = largest_error(COUNT, out, ref);
    int refused = !(mine <= limit), ok = refused == refuse && (refuse || mine >= 0);
    failures += !ok;
    printf("%-44s ‖·‖: %8.1e %-7s  largest: %8.1e %-7s %s\n", what, norm, norm <= limit ? "passed" : "refused", mine,
           refused ? "refused" : "passed", ok ? "" : "<- wrong");
    for (int i = 0; i < COUNT; i++)
        out[i] = ref[i];
}

int main(void) {
    for (int i = 0; i < COUNT; i++)
        out[i] = ref[i] = (float)rand() / (float)RAND_MAX - 0.5f; // NOLINT(cert-msc30-c,cert-msc50-cpp)
    judge("the same bits", 0);
    for (int i = 0; i < COUNT; i++)
        out[i] = nextafterf(ref[i], 1);
    judge("every element off by its last bit", 0);
    out[COUNT / 2] += 0.01f;
    judge("one element of a million off by 0.01", 1);
    out[COUNT / 3] = NAN;
    judge("one element is NaN", 1);
    out[0] = INFINITY;
    judge("one element is infinite", 1);
    for (int i = 0; i < COUNT; i++)
        out[i] = ref[i] * 1.001f;
    judge("everything too large by a thousandth", 1);
    ref[7] = out[7] = INFINITY;
    judge("an infinity where one is expected", 0);
    out[8] = out[8] + 0.01f;
    judge("the same, and one element off by 0.01", 1);
    for (int i = 0; i < COUNT; i++)
        out[i] = ref[i] = 0;
    judge("all zero, as expected", 0);
    out[9] = 1e-3f;
    judge("all expected zero, one is not", 1);
    printf("%s\n", failures ? "wrong" : "right: it refuses and passes what it should");
    return failures != 0;
}
