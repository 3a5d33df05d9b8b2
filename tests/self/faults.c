/* Sentences that must fail, to see that the suite and the sanitizers say so. Linked with the framework only. */
#include "../literate.h"

#include <limits.h>
#include <stdlib.h>
#include <unistd.h>

static const char *sum_below_seven(const int64_t *size, uint64_t seed) {
    (void)seed;
    if (size[0] > size[1])
        return DOES_NOT_APPLY;
    if (size[0] + size[1] >= 7)
        return because("%lld + %lld is not below 7", (long long)size[0], (long long)size[1]);
    return HOLDS;
}

static const char *crashes(const int64_t *size, uint64_t seed) {
    (void)seed;
    if (size[0] > 1)
        abort();
    return HOLDS;
}

static const char *hangs(const int64_t *size, uint64_t seed) {
    (void)seed;
    while (size[0] > 1)
        pause();
    return HOLDS;
}

SENTENCE(0, 1, "A counterexample is shrunk.", "a reason", "another way") {
    for_sizes("T n", sum_below_seven, SIZES({1, 2}, {9, 2}, {9, 30}, {100, 200}));
}

SENTENCE(0, 2, "A crash names the sizes.", "a reason", "another way") {
    for_sizes("T", crashes, SIZES({1}, {5}));
}

SENTENCE(0, 3, "A hang ends.", "a reason", "another way") {
    for_sizes("T", hangs, SIZES({1}, {5}));
}

SENTENCE(0, 4, "Sizes that make no case are no test.", "a reason", "another way") {
    for_sizes("T n", sum_below_seven, SIZES({2, 1}));
}

SENTENCE(0, 5, "A sentence that checks nothing is no test.", "a reason", "another way") {
}

SENTENCE(0, 6, "An expectation fails with its text.", "a reason", "another way") {
    expect(true, "not seen");
    expect(false, "two and two are %d", 5);
}

SENTENCE(0, 7, "A skipped sentence says why.", "a reason", "another way") {
    cr_skip("no device");
}

SENTENCE(0, 8, "Leaving early is a failure.", "a reason", "another way") {
    expect(true, "not seen");
    _exit(3);
}

SENTENCE(0, 9,
         "Random sizes lie between the limits; lines longer than a hundred columns, also those with ≤ and √, wrap.",
         "a reason", "another way") {
    for_random_sizes("T n", sum_below_seven, 20, (int64_t[]){1, 1}, (int64_t[]){3, 3});
}

SENTENCE(0, 10, "The tenth comes after the ninth.", "a reason", "another way") {
    for_random_sizes("T n", sum_below_seven, 20, (int64_t[]){1, 1}, (int64_t[]){3, 3});
}

/* ---- Only a sanitizer sees these --------------------------------------------------------------------------------- */

SENTENCE(1, 1, "A leak is a failure.", "LeakSanitizer", "a lost pointer") {
    char *volatile lost = malloc(100);
    lost = NULL;
    expect(!lost, "not seen");
}

SENTENCE(1, 2, "Writing beyond an array is a failure.", "AddressSanitizer", "one byte too far") {
    char *text = malloc(100);
    volatile size_t size = 100;
    *(volatile char *)(text + size) = 1;
    expect(true, "not seen");
    free(text);
}

SENTENCE(1, 3, "Signed overflow is a failure.", "UndefinedBehaviorSanitizer", "INT_MAX + 1") {
    volatile int big = INT_MAX;
    big = big + 1;
    expect(true, "not seen");
}
