/* Exercise 0.2, solution: a walk whose next step is read from memory. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { LINE = 64, STEPS = 1 << 20 };

/* A place of its own cache line. */
typedef struct {
    uint32_t next;
    char rest[LINE - 4];
} place;

static uint64_t state = 1;
static uint32_t random_below(uint32_t limit) { /* Knuth's generator: its high bits will do */
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((state >> 32) * limit >> 32);
}

// [missing]
/* next[] of all places: a single cycle that visits every place, in a random order. A random permutation would have some
 * ln(count) cycles, and the walk would stay in one of them. Sattolo's shuffle exchanges with an *earlier* place only,
 * which leaves exactly one. */
static void make_cycle(place *places, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        places[i].next = i;
    for (uint32_t i = count - 1; i > 0; i--) {
        uint32_t other = random_below(i), here = places[i].next;
        places[i].next = places[other].next;
        places[other].next = here;
    }
}

/* The place that the walk reaches from `at` after so many steps. */
static uint32_t walk(const place *places, uint32_t at, uint32_t steps) {
    for (uint32_t i = 0; i < steps; i++)
        at = places[at].next;
    return at;
}
// [/missing]

static double now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

/* Whether the cycle has all places, and walk follows it. */
static int visits_all(const place *places, uint32_t count) {
    uint32_t at = 0, seen = 0;
    do {
        if (walk(places, at, 1) != places[at].next)
            return 0;
        at = places[at].next;
        seen++;
    } while (at != 0 && seen <= count);
    return seen == count;
}

static double ns_a_step(const place *places, uint32_t *at) {
    double best = 1e30;
    for (int turn = 0; turn < 3; turn++) {
        double start = now_ns();
        *at = walk(places, *at, STEPS);
        double ns = (now_ns() - start) / STEPS;
        best = ns < best ? ns : best;
    }
    return best;
}

int main(void) {
    double first = 0, last = 0;
    uint32_t at = 0;
    for (uint32_t kb = 4; kb <= 128 * 1024; kb *= 2) {
        uint32_t count = kb * 1024 / LINE;
        place *places = aligned_alloc(LINE, (size_t)count * sizeof *places);
        if (!places)
            return 2;
        make_cycle(places, count);
        if (!visits_all(places, count)) {
            printf("wrong: in %u KB the walk does not visit all %u places\n", kb, count);
            free(places);
            return 1;
        }
        at = 0;
        last = ns_a_step(places, &at);
        first = first > 0 ? first : last;
        printf("%7u KB %7.2f ns a step\n", kb, last);
        free(places);
    }
    int right = last > 3 * first;
    printf("%s: from memory a step takes %.0f times as long as from the first-level cache (ended at %u)\n",
           right ? "right" : "wrong", last / first, at);
    return !right;
}
