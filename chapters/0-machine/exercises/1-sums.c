/* Exercise 0.1, starter, not done: a dot product whose sums wait for one another. It ends with a verdict of its own. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { SUMS = 1, LANES = 8, COUNT = 4096, REPEATS = 20000 };

_Static_assert(COUNT % (SUMS * LANES) == 0, "the last round must be a whole one");

typedef float lanes __attribute__((vector_size(LANES * 4)));

// [dot]
/* SUMS chains of multiply-adds side by side; COUNT is a multiple of SUMS · LANES. */
static float dot(const lanes *a, const lanes *b) {
    lanes sum[SUMS] = {{0}};
    for (int i = 0; i < COUNT / LANES; i += SUMS)
        for (int s = 0; s < SUMS; s++)
            sum[s] += a[i + s] * b[i + s];
    for (int s = 1; s < SUMS; s++)
        sum[0] += sum[s];
    float total = 0;
    for (int l = 0; l < LANES; l++)
        total += sum[0][l];
    return total;
}
// [/dot]

/* The same with one chain, to compare with. */
static float dot_one_chain(const lanes *a, const lanes *b) {
    lanes sum = {0};
    for (int i = 0; i < COUNT / LANES; i++)
        sum += a[i] * b[i];
    float total = 0;
    for (int l = 0; l < LANES; l++)
        total += sum[l];
    return total;
}

/* This thread's own time, which stands still while another program has the core. */
static double now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

static volatile float sink; /* a result that nobody reads may not be computed at all */

/* Nanoseconds a call, the best of ten. */
static double time_of(float (*call)(const lanes *, const lanes *), const lanes *a, const lanes *b) {
    double best = 1e30;
    for (int turn = 0; turn < 10; turn++) {
        double start = now_ns();
        for (int i = 0; i < REPEATS / 10; i++)
            sink = call(a, b);
        double ns = (now_ns() - start) / (REPEATS / 10.0);
        best = ns < best ? ns : best;
    }
    return best;
}

int main(void) {
    static lanes a[COUNT / LANES], b[COUNT / LANES];
    double exact = 0;
    for (int i = 0; i < COUNT; i++) {
        ((float *)a)[i] = (float)rand() / (float)RAND_MAX - 0.5f; // NOLINT(cert-msc30-c,cert-msc50-cpp)
        ((float *)b)[i] = (float)rand() / (float)RAND_MAX - 0.5f; // NOLINT(cert-msc30-c,cert-msc50-cpp)
        exact += (double)((float *)a)[i] * ((float *)b)[i];
    }
    double one = time_of(dot_one_chain, a, b), mine = time_of(dot, a, b);
    double error = exact - dot(a, b);
    printf("one chain %6.0f ns, %4.1f GFLOP/s\n%2d chains %6.0f ns, %4.1f GFLOP/s: %.1f times as fast, error %.1e\n",
           one, 2 * COUNT / one, SUMS, mine, 2 * COUNT / mine, one / mine, error);
    int right = error * error < 1e-8 && one / mine > 1.5;
    puts(right ? "right: the sums do not wait"
               : "wrong: it should be half as fast again as one chain, and exact to 1e-4");
    return !right;
}
