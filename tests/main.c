/* The suite's program: runs the sentences in reading order and prints them as a text.
 *
 * CHAPTER=3, ONLY=3.1 (or 3.1,3.4) or CUDA=1 limit the run, SEED and SIZES repeat one; all come as environment
 * variables (make passes them on), because each sentence runs in a process of its own. */
#include "report.h"

#include "../chapters/device.h"

#include <criterion/logging.h>
#include <criterion/options.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { WIDTH = 100, INDENT = 8 };

static const char *const titles[] = {
    "your machine: timing, ceilings, error, floors",
    "one expert is one neuron: the token-centric step",
    "router norm and logits",
    "the Cartesian-product top-k",
    "expert-centric scheduling: building the order",
    "the fused expert step: running the schedule",
    "the shared dense MLP",
    "strategies: masked dense, Cartesian rows, the chooser",
    "the hybrid layer",
    "the backward pass",
};
enum { NUM_CHAPTERS = sizeof titles / sizeof titles[0] };

static struct report *report;
static char report_path[] = "/tmp/flashmoe-tests-XXXXXX";

/* ---- Printing ---------------------------------------------------------------------------------------------------- */

/* Columns that UTF-8 text takes: every byte that does not continue a character starts one. */
static int columns(const char *text, size_t bytes) {
    int count = 0;
    for (size_t i = 0; i < bytes; i++)
        count += ((unsigned char)text[i] & 0xc0) != 0x80;
    return count;
}

/* Prints text wrapped at WIDTH columns, the lines after the first indented. column: where the cursor stands. */
static void print_wrapped(int column, const char *text) {
    bool first = true;
    while (*text) {
        size_t length = strcspn(text, " \n");
        int wide = columns(text, length);
        if (!first && column + 1 + wide > WIDTH) {
            printf("\n%*s", INDENT, "");
            column = INDENT;
        } else if (!first) {
            putchar(' ');
            column++;
        }
        fwrite(text, 1, length, stdout);
        column += wide;
        text += length;
        text += strspn(text, " \n");
        first = false;
    }
    putchar('\n');
}

static void print_indented(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void print_indented(const char *format, ...) {
    char text[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    printf("%*s", INDENT, "");
    print_wrapped(INDENT, text);
}

/* " | cuda: NVIDIA H200" for a chapter with sentences about the GPU, or why they are skipped. */
static void print_gpu(int chapter) {
    bool any = false;
    for (int i = 0; i < num_sentences; i++)
        any |= sentences[i].chapter == chapter && sentences[i].what == NEEDS_DEVICE;
    const fmoe_device *gpu = any ? fmoe_device_get() : NULL;
    if (gpu)
        printf(" | cuda: %s%s", gpu->present ? "" : "skipped, ", gpu->present ? gpu->name : gpu->why_not);
}

static void print_header(int chapter) {
    static int last = -1;
    if (chapter == last)
        return;
    char title[96];
    snprintf(title, sizeof title, "Chapter %d: %s", chapter, chapter < NUM_CHAPTERS ? titles[chapter] : "");
    printf("%s%-*s cpu", last < 0 ? "" : "\n", 72 + (int)strlen(title) - columns(title, strlen(title)), title);
    print_gpu(chapter);
    putchar('\n');
    last = chapter;
}

/* " with T = 1, n = 2", or nothing for a sentence without sizes. */
static void print_attempt(const char *verb, const struct attempt *a) {
    char text[512] = "";
    int used = 0;
    const char *name = a->names;
    for (int i = 0; i < a->num_sizes; i++) {
        name += strspn(name, " ");
        int length = (int)strcspn(name, " ");
        used += snprintf(text + used, sizeof text - (size_t)used, "%s%.*s = %lld", i ? ", " : "", length, name,
                         (long long)a->size[i]);
        name += length;
    }
    if (a->num_sizes)
        print_indented("%s %s", verb, text);
}

static void print_repeat(const struct sentence *s, const struct attempt *a) {
    printf("%*srepeat: make test ONLY=%d.%d SEED=", INDENT, "", s->chapter, s->number);
    if (!a->num_sizes) {
        printf("%s\n", getenv("SEED"));
        return;
    }
    printf("%llu SIZES=", (unsigned long long)a->seed);
    for (int i = 0; i < a->num_sizes; i++)
        printf("%s%lld", i ? "," : "", (long long)a->size[i]);
    putchar('\n');
}

/* ---- One sentence after the other -------------------------------------------------------------------------------- */

typedef enum { NONE, PASSED, FAILED, SKIPPED, NUM_RESULTS } result;

/* The sentence under way. Its process may still crash on leaving after it has passed, so its line is printed when the
 * next one starts. */
static struct {
    const struct sentence *sentence;
    result result;
    char message[1024]; /* what Criterion says; the report's own message comes first */
    bool died;          /* a crash or a timeout: the sizes being tried are the counterexample */
} now;
static int totals[NUM_RESULTS];

static double timeout(void) {
    const char *seconds = getenv("LITERATE_TIMEOUT");
    return seconds ? strtod(seconds, NULL) : 60;
}

static void print_failure(const struct sentence *s) {
    const struct attempt *a = report->failed ? &report->found : &report->trying;
    if (report->failed) {
        print_attempt("smallest counterexample:", a);
        print_indented("%s", report->message);
    } else {
        if (now.died)
            print_attempt("while trying", a);
        print_indented("%s", now.message);
    }
    print_repeat(s, a);
}

static void finish(void) {
    const struct sentence *s = now.sentence;
    if (!s)
        return;
    if (now.result == PASSED && report->cases == 0) {
        now.result = FAILED;
        snprintf(now.message, sizeof now.message, "%s", "it checked nothing: no case was counted");
    }
    static const char *const words[] = {"FAILED", "ok", "FAILED", "skipped"};
    print_header(s->chapter);
    char number[32];
    int column = snprintf(number, sizeof number, "%s %d.%d  ", words[now.result], s->chapter, s->number);
    fputs(number, stdout);
    print_wrapped(column, s->text);
    if (now.result == SKIPPED)
        print_indented("%s", now.message);
    else
        print_indented("why: %s | against: %s | %lld case%s", s->why, s->against, (long long)report->cases,
                       report->cases == 1 ? "" : "s");
    if (now.result == FAILED)
        print_failure(s);
    fflush(stdout);
    totals[now.result]++;
    now.sentence = NULL;
}

static void start(struct criterion_suite *suite, struct criterion_test *test) {
    (void)suite;
    finish();
    if (test->data->disabled)
        return;
    memset(report, 0, sizeof *report);
    memset(&now, 0, sizeof now);
    for (int i = 0; i < num_sentences; i++)
        if (sentences[i].test->data == test->data) /* Criterion copies the rest */
            now.sentence = &sentences[i];
}

static void fails(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void fails(const char *format, ...) {
    now.result = FAILED;
    va_list args;
    va_start(args, format);
    vsnprintf(now.message, sizeof now.message, format, args);
    va_end(args);
}

static void asserted(struct criterion_assert_stats *stats) {
    if (!stats->passed)
        fails("%s:%u: %s", stats->file, stats->line, stats->message);
}

static void ended(struct criterion_test_stats *stats) {
    if (stats->test_status == CR_STATUS_SKIPPED) {
        now.result = SKIPPED;
        snprintf(now.message, sizeof now.message, "%s", stats->message ? stats->message : "");
    } else if (stats->exit_code != 0)
        fails("the process left with status %d", stats->exit_code);
    else if (stats->test_status == CR_STATUS_FAILED)
        now.result = FAILED;
    else if (now.result == NONE)
        now.result = PASSED;
}

static void crashed(struct criterion_test_stats *stats) {
    now.died = true;
    fails("it crashed: %s", stats->signal ? strsignal(stats->signal) : "the process ended early");
}

static void timed_out(struct criterion_test_stats *stats) {
    (void)stats;
    now.died = true;
    fails("no result after %g s", timeout());
}

static void left_badly(struct criterion_test_stats *stats) {
    now.died = true;
    fails("the process left with status %d", stats->exit_code);
}

static void message(enum criterion_severity severity, const char *text) {
    (void)severity;
    fprintf(stderr, "%s\n", text);
}

static struct criterion_logger logger = {
    .log_pre_init = start,
    .log_assert = asserted,
    .log_post_test = ended,
    .log_post_fini = ended,
    .log_test_crash = crashed,
    .log_other_crash = crashed,
    .log_test_timeout = timed_out,
    .log_abnormal_exit = left_badly,
    .log_message = message,
};

/* ---- The run ----------------------------------------------------------------------------------------------------- */

static void open_report(void) {
    int file = mkstemp(report_path);
    void *memory = MAP_FAILED;
    if (file >= 0 && ftruncate(file, sizeof *report) == 0)
        memory = mmap(NULL, sizeof *report, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "tests: %s: %s\n", report_path, strerror(errno));
        exit(1);
    }
    close(file);
    report = memory;
    setenv(REPORT_PATH, report_path, 1);
}

static void choose_seed(void) {
    const char *given = getenv("SEED");
    char seed[32];
    struct timespec clock;
    clock_gettime(CLOCK_REALTIME, &clock);
    snprintf(seed, sizeof seed, "%lld", (long long)((clock.tv_sec ^ clock.tv_nsec) % 1000000000));
    if (!given || !*given)
        setenv("SEED", seed, 1);
    printf("seed %s (make test SEED=%s repeats this run)\n\n", getenv("SEED"), getenv("SEED"));
}

static bool in_list(const char *list, const char *number) {
    size_t length = strlen(number);
    for (; *list; list += strcspn(list, ","), list += *list == ',')
        if (strcspn(list, ",") == length && strncmp(list, number, length) == 0)
            return true;
    return false;
}

static bool wanted(const struct sentence *s, const char *chapter, const char *only, bool gpu_only) {
    char number[32];
    snprintf(number, sizeof number, "%d.%d", s->chapter, s->number);
    if (only && *only)
        return in_list(only, number);
    if (gpu_only && s->what == NEEDS_NOTHING)
        return false;
    snprintf(number, sizeof number, "%d", s->chapter);
    return !chapter || !*chapter || strcmp(chapter, number) == 0;
}

/* Disables what was not asked for. How many are left. */
static int select_sentences(void) {
    const char *cuda = getenv("CUDA");
    bool gpu_only = cuda && strcmp(cuda, "1") == 0;
    int left = 0;
    for (int i = 0; i < num_sentences; i++) {
        sentences[i].test->data->disabled = !wanted(&sentences[i], getenv("CHAPTER"), getenv("ONLY"), gpu_only);
        sentences[i].test->data->timeout = timeout();
        left += !sentences[i].test->data->disabled;
    }
    return left;
}

int main(void) {
    if (select_sentences() == 0) {
        fprintf(stderr, "No sentence to run: CHAPTER is 0 to %d, ONLY a sentence such as 3.1.\n", NUM_CHAPTERS - 1);
        return 1;
    }
    choose_seed();
    fflush(stdout);
    open_report();
    setenv("OMP_WAIT_POLICY", "passive", 0); /* threads that outnumber the cores must not spin */
    struct criterion_test_set *set = criterion_initialize();
    criterion_options.logger = &logger;
    criterion_options.jobs = 1; /* the code under test has threads of its own */
    bool ok = criterion_run_all_tests(set);
    finish();
    criterion_finalize(set);
    unlink(report_path);
    if (totals[PASSED] + totals[FAILED] + totals[SKIPPED] == 0)
        ok = false;
    printf("\n%d passed, %d failed, %d skipped\n", totals[PASSED], totals[FAILED], totals[SKIPPED]);
    return ok && totals[FAILED] == 0 ? 0 : 1;
}
