/* Runs in a test's own process: calls properties, counts cases, shrinks what fails, and reports to the parent. */
#include "report.h"

#include "../chapters/device.h"

#include <fcntl.h>
#include <omp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

const char DOES_NOT_APPLY[] = "does not apply";

struct sentence sentences[MAX_SENTENCES];
int num_sentences;

static _Noreturn void give_up(const char *what) {
    fprintf(stderr, "tests: %s\n", what);
    abort();
}

/* With the leak sanitizer linked in, a sentence that leaks fails: Criterion does not look at how a process leaves. */
int __lsan_do_recoverable_leak_check(void) __attribute__((weak)); // NOLINT(bugprone-reserved-identifier)

static void check_leaks(void) {
    cr_assert(!__lsan_do_recoverable_leak_check || !__lsan_do_recoverable_leak_check(), "memory was leaked");
}

void literate_register(struct criterion_test *test, int chapter, int number, needs what, const char *sentence,
                       const char *why, const char *against) {
    static char names[MAX_SENTENCES][8];
    if (num_sentences == MAX_SENTENCES)
        give_up("too many sentences, raise MAX_SENTENCES");
    for (int i = 0; i < num_sentences; i++)
        if (sentences[i].chapter == chapter && sentences[i].number == number)
            give_up("two sentences have the same number");
    snprintf(names[num_sentences], sizeof names[0], "s%03d", number);
    test->name = names[num_sentences];
    test->data->fini = check_leaks;
    sentences[num_sentences++] = (struct sentence){chapter, number, what, sentence, why, against, test};
}

void skip_without(needs what) {
#ifndef FMOE_WITH_CUDA
    if (what != NEEDS_NOTHING)
        cr_skip("built without CUDA");
#endif
    const fmoe_device *gpu = fmoe_device_get();
    if (what == NEEDS_DEVICE && !gpu->present)
        cr_skip("%s", gpu->why_not);
}

static struct report *report(void) {
    static struct report *mapped;
    if (!mapped) {
        const char *path = getenv(REPORT_PATH);
        int file = path ? open(path, O_RDWR) : -1;
        void *memory = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *mapped, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (memory == MAP_FAILED)
            give_up("no report file; sentences run under tests/main.c only");
        close(file);
        mapped = memory;
    }
    return mapped;
}

static _Noreturn void fail(void) {
    report()->failed = true;
    cr_assert_fail("%s", report()->message);
    abort(); /* not reached: the assertion leaves the test */
}

const char *because(const char *format, ...) {
    static char text[sizeof report()->message];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return text;
}

void expect(bool ok, const char *format, ...) {
    struct report *r = report();
    if (ok) {
        r->cases++;
        return;
    }
    va_list args;
    va_start(args, format);
    vsnprintf(r->message, sizeof r->message, format, args);
    va_end(args);
    fail();
}

/* ---- Seeds ------------------------------------------------------------------------------------------------------- */

/* The finaliser of splitmix64 (Steele, Lea, Flood 2014). The tests' own, so that a bug in the project's generator
 * cannot blind them. Nine digits, to be typed. */
static uint64_t mix(uint64_t a, uint64_t b) {
    uint64_t z = a + (b + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (z ^ z >> 31) % 1000000000;
}

static uint64_t run_seed(void) {
    const char *seed = getenv("SEED");
    return seed ? strtoull(seed, NULL, 10) : 0;
}

/* Seeds drawn inside a property depend on the property's seed alone, so one failing call can be repeated by itself. */
static struct {
    bool inside;
    uint64_t seed, drawn;
} property_seed;
static uint64_t seeds_drawn;

uint64_t fresh_seed(void) {
    if (property_seed.inside)
        return mix(property_seed.seed, property_seed.drawn++);
    return mix(run_seed(), seeds_drawn++);
}

/* ---- Properties -------------------------------------------------------------------------------------------------- */

static int count_words(const char *text) {
    int words = 0;
    for (const char *p = text; *p; p++)
        words += *p != ' ' && (p == text || p[-1] == ' ');
    return words;
}

static struct attempt attempt(const char *names, const int64_t *size, uint64_t seed) {
    struct attempt a = {.num_sizes = count_words(names), .seed = seed};
    if (a.num_sizes > MAX_SIZES || strlen(names) >= sizeof a.names)
        give_up("too many sizes");
    snprintf(a.names, sizeof a.names, "%s", names);
    memcpy(a.size, size, (size_t)a.num_sizes * sizeof *size);
    return a;
}

static const char *call(property *holds, const struct attempt *a) {
    report()->trying = *a;
    property_seed.inside = true;
    property_seed.seed = a->seed;
    property_seed.drawn = 0;
    const char *result = holds(a->size, a->seed);
    property_seed.inside = false;
    report()->trying.num_sizes = 0;
    return result;
}

static void found(const struct attempt *a, const char *message) {
    struct report *r = report();
    r->failed = true;
    r->found = *a;
    snprintf(r->message, sizeof r->message, "%s", message);
}

/* Makes one size smaller at a time while the property still fails: to its lowest value, to half, by one. */
static void shrink(property *holds, const int64_t *lowest) {
    const char *wanted = getenv("LITERATE_SHRINK");
    if (wanted && strcmp(wanted, "0") == 0)
        return;
    struct report *r = report();
    time_t end = time(NULL) + 15;
    int tries = 0;
    bool smaller = true;
    while (smaller) {
        smaller = false;
        for (int i = 0; i < r->found.num_sizes; i++) {
            int64_t now = r->found.size[i];
            const int64_t candidates[] = {lowest[i], now / 2, now - 1};
            for (int c = 0; c < 3; c++) {
                if (candidates[c] < lowest[i] || candidates[c] >= now)
                    continue;
                if (tries++ == 200 || time(NULL) >= end)
                    return;
                struct attempt a = r->found;
                a.size[i] = candidates[c];
                const char *result = call(holds, &a);
                if (result == HOLDS || result == DOES_NOT_APPLY)
                    continue;
                found(&a, result);
                smaller = true;
                break;
            }
        }
    }
}

/* Whether the row made a case. Leaves the test if the property fails. */
static bool try(property *holds, const struct attempt *a, const int64_t *lowest) {
    const char *result = call(holds, a);
    if (result == DOES_NOT_APPLY)
        return false;
    if (result != HOLDS) {
        found(a, result);
        shrink(holds, lowest);
        fail();
    }
    report()->cases++;
    return true;
}

/* SIZES=1,2,3 repeats one call, with SEED as its seed. Whether it was asked for. */
static bool repeat(const char *names, property *holds) {
    const char *text = getenv("SIZES");
    if (!text || !*text)
        return false;
    int64_t size[MAX_SIZES] = {0};
    int count = 0;
    for (char *end; *text && count < MAX_SIZES; text = *end ? end + 1 : end) {
        size[count++] = strtoll(text, &end, 10);
        if (end == text)
            give_up("SIZES is not a list of numbers such as 1,2,3");
    }
    if (count == count_words(names)) {
        struct attempt a = attempt(names, size, run_seed());
        try(holds, &a, size); /* as asked for: nothing to shrink */
    }
    return true;
}

void for_sizes(const char *names, property *holds, const int64_t (*rows)[MAX_SIZES], size_t num_rows) {
    if (repeat(names, holds))
        return;
    /* Zero is tried in shrinking only where a row says that it is legal. */
    int64_t lowest[MAX_SIZES];
    for (int i = 0; i < MAX_SIZES; i++) {
        lowest[i] = 1;
        for (size_t row = 0; row < num_rows; row++)
            if (rows[row][i] < lowest[i])
                lowest[i] = rows[row][i];
    }
    bool any = false;
    for (size_t row = 0; row < num_rows; row++) {
        struct attempt a = attempt(names, rows[row], fresh_seed());
        any |= try(holds, &a, lowest);
    }
    if (!any)
        expect(false, "no row of sizes (%s) makes a case", names);
}

void for_random_sizes(const char *names, property *holds, int64_t random, const int64_t *low, const int64_t *high) {
    if (repeat(names, holds))
        return;
    int64_t cases = 0;
    for (int64_t tries = 0; cases < random && tries < 100 * random; tries++) {
        int64_t size[MAX_SIZES];
        for (int i = 0; i < count_words(names); i++)
            size[i] = low[i] + (int64_t)(fresh_seed() % (uint64_t)(high[i] - low[i] + 1));
        struct attempt a = attempt(names, size, fresh_seed());
        cases += try(holds, &a, low);
    }
    if (cases < random)
        expect(false, "only %lld of %lld random rows of sizes (%s) make a case", (long long)cases, (long long)random,
               names);
}

/* ---- Ladders ----------------------------------------------------------------------------------------------------- */

/* One checked run. HOLDS, DOES_NOT_APPLY if the rung does not support the case, or what is wrong. */
static const char *run_checked(const fmoe_rung *rung, fmoe_problem *p) {
    char why[256] = "";
    double error = 0;
    fmoe_status status = fmoe_rung_check(rung, p, &error, why);
    if (status == FMOE_UNSUPPORTED)
        return DOES_NOT_APPLY;
    if (status != FMOE_OK)
        return because("%s, case %s: %s: %s", rung->name, p->c.name, fmoe_status_name(status), fmoe_error_message());
    if (!(error <= fmoe_error_limit(p->c.dtype))) /* so written, NaN fails too */
        return because("%s, case %s: error %.2g is over %.2g: %s", rung->name, p->c.name, error,
                       fmoe_error_limit(p->c.dtype), why);
    return HOLDS;
}

/* The outputs' bytes, one after the other; the caller frees. */
static char *copy_outputs(const fmoe_problem *p, size_t *size) {
    char *copy = NULL;
    *size = 0;
    for (int i = 0; i < p->num_arguments; i++) {
        const fmoe_argument *a = &p->arguments[i];
        size_t bytes = (size_t)a->count * fmoe_dtype_size(a->dtype);
        if (a->role == ROLE_INPUT || !a->data || bytes == 0)
            continue;
        copy = realloc(copy, *size + bytes);
        if (!copy)
            give_up("out of memory");
        memcpy(copy + *size, a->data, bytes);
        *size += bytes;
    }
    return copy;
}

/* Adds with floating-point atomics, to show what that does; or a vendor's library, which promises less. */
static bool order_is_chance(const fmoe_rung *rung, const fmoe_problem *p) {
    if (rung->backend != BACKEND_CUDA)
        return false;
    return rung->library || (strcmp(rung->name, "atomics") == 0 &&
                             (p->step == &fmoe_step_topk_backward || p->step == &fmoe_step_expert_backward));
}

static const char *same_bits(const fmoe_rung *rung, fmoe_problem *p) {
    static const int threads[] = {1, 2, 3, 7, 7};
    bool gpu = rung->backend == BACKEND_CUDA;
    int before = omp_get_max_threads(), runs = gpu ? 3 : 5;
    char *first = NULL, *again = NULL;
    size_t first_size = 0, again_size = 0;
    const char *result = order_is_chance(rung, p) ? DOES_NOT_APPLY : HOLDS;
    for (int i = 0; result == HOLDS && i < runs; i++) {
        omp_set_num_threads(threads[i]);
        result = run_checked(rung, p);
        if (result != HOLDS)
            break;
        free(again);
        again = copy_outputs(p, &again_size);
        if (i == 0) {
            first = again;
            first_size = again_size;
            again = NULL;
        } else if (first_size && memcmp(first, again, first_size) != 0) {
            result =
                gpu ? because("%s, case %s: another run gives other bits", rung->name, p->c.name)
                    : because("%s, case %s: %d threads give other bits than one", rung->name, p->c.name, threads[i]);
        }
    }
    omp_set_num_threads(before);
    free(first);
    free(again);
    return result;
}

static const char *each_rung(const fmoe_step *step, const fmoe_rung *rungs, uint64_t seed, const char *name,
                             const char *(*check)(const fmoe_rung *rung, fmoe_problem *p)) {
    fmoe_case c;
    fmoe_problem p;
    fmoe_status status = fmoe_case_parse(name, &c);
    if (status == FMOE_OK)
        status = fmoe_problem_new(step, &c, seed, &p);
    if (status != FMOE_OK)
        return because("case %s: %s: %s", name, fmoe_status_name(status), fmoe_error_message());
    const char *result = DOES_NOT_APPLY;
    for (const fmoe_rung *rung = rungs; rung->run; rung++) {
        const char *one = check(rung, &p);
        if (one != DOES_NOT_APPLY)
            result = one;
        if (one != DOES_NOT_APPLY && one != HOLDS)
            break;
    }
    fmoe_problem_free(&p);
    return result;
}

/* A few numbers can all be near zero by chance: their terms cancel, or float16 has hardly a digit left there. Then a
 * relative error says nothing about the rung. A case that small is drawn again, and must hold in most of its draws. */
enum { FEW = 32, DRAWS = 9 };

static bool is_small(const fmoe_step *step, const char *name, uint64_t seed) {
    fmoe_case c;
    fmoe_problem p;
    if (fmoe_case_parse(name, &c) != FMOE_OK || fmoe_problem_new(step, &c, seed, &p) != FMOE_OK)
        return false;
    bool small = false;
    for (int i = 0; i < p.num_arguments; i++)
        small |= p.arguments[i].role != ROLE_INPUT && p.arguments[i].count < FEW;
    fmoe_problem_free(&p);
    return small;
}

const char *rungs_agree(const fmoe_step *step, const fmoe_rung *rungs, uint64_t seed, const char *case_format, ...) {
    char name[96];
    va_list args;
    va_start(args, case_format);
    vsnprintf(name, sizeof name, case_format, args);
    va_end(args);
    const char *result = each_rung(step, rungs, seed, name, run_checked);
    if (result == HOLDS || result == DOES_NOT_APPLY || !is_small(step, name, seed))
        return result;
    int failures = 1;
    for (uint64_t draw = 1; draw < DRAWS; draw++) {
        const char *again = each_rung(step, rungs, fmoe_random_bits(seed, draw, 0), name, run_checked);
        if (again != HOLDS) {
            result = again;
            failures++;
        }
    }
    return failures > DRAWS / 2 ? result : HOLDS;
}

const char *rungs_repeat(const fmoe_step *step, const fmoe_rung *rungs, uint64_t seed, const char *case_format, ...) {
    char name[96];
    va_list args;
    va_start(args, case_format);
    vsnprintf(name, sizeof name, case_format, args);
    va_end(args);
    return each_rung(step, rungs, seed, name, same_bits);
}
