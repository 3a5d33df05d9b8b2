/* Poisoned memory, fills, comparisons: see values.h. */
#include "values.h"

#include <math.h>
#include <omp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Memory ------------------------------------------------------------------------------------------------------ */

void free_pointer(void *pointer) {
    free(*(void **)pointer);
}

void *workspace_of(size_t bytes) {
    void *memory = NULL;
    cr_assert(posix_memalign(&memory, 256, bytes ? bytes : 1) == 0, "out of memory");
    return memset(memory, 0xff, bytes);
}

void *poisoned(int64_t count, size_t size) {
    size_t bytes = (size_t)count * size;
    void *memory = malloc(bytes ? bytes : 1);
    cr_assert(memory != NULL, "out of memory");
    return memset(memory, 0xff, bytes);
}

void *zeros(int64_t count, size_t size) {
    return memset(poisoned(count, size), 0, (size_t)count * size);
}

float *floats(int64_t count) {
    return poisoned(count, sizeof(float));
}

int32_t *integers(int64_t count) {
    int32_t *values = poisoned(count, sizeof *values);
    for (int64_t i = 0; i < count; i++)
        values[i] = UNWRITTEN;
    return values;
}

float *filled(float value, int64_t count) {
    float *values = floats(count);
    for (int64_t i = 0; i < count; i++)
        values[i] = value;
    return values;
}

float *normals(uint64_t seed, uint64_t stream, double scale, int64_t count) {
    float *values = floats(count);
    fmoe_fill_normal(seed, stream, (float)scale, count, values);
    return values;
}

float *copy_of(const float *values, int64_t count) {
    return memcpy(floats(count), values, (size_t)count * sizeof *values);
}

int32_t *any_indices(uint64_t seed, uint64_t stream, int64_t limit, int64_t count) {
    int32_t *indices = integers(count);
    for (int64_t i = 0; i < count; i++)
        indices[i] = (int32_t)(fmoe_random_bits(seed, stream, (uint64_t)i) % (uint64_t)limit);
    return indices;
}

bool same_bits(const void *a, const void *b, int64_t count) {
    return memcmp(a, b, (size_t)count * 4) == 0;
}

/* ---- Problems and refusals --------------------------------------------------------------------------------------- */

fmoe_problem new_problem(const fmoe_step *step, uint64_t seed, const char *case_format, ...) {
    char name[96];
    va_list args;
    va_start(args, case_format);
    vsnprintf(name, sizeof name, case_format, args);
    va_end(args);
    fmoe_case c;
    fmoe_problem p = {0};
    fmoe_status status = fmoe_case_parse(name, &c);
    if (status == FMOE_OK)
        status = fmoe_problem_new(step, &c, seed, &p);
    cr_assert(status == FMOE_OK, "case %s: %s", name, fmoe_error_message());
    return p;
}

/* The limit of the type that the outputs are stored in; logits are float32 whatever the case's type. */
static double limit_of(const fmoe_problem *p) {
    double limit = 0;
    for (int i = 0; i < p->num_arguments; i++)
        if (p->arguments[i].role != ROLE_INPUT && p->arguments[i].dtype <= FMOE_BF16)
            limit = fmax(limit, fmoe_error_limit(p->arguments[i].dtype));
    return limit;
}

const char *rungs_right(const fmoe_rung *rungs, fmoe_problem *p) {
    for (const fmoe_rung *rung = rungs; rung->run; rung++) {
        char why[256] = "";
        double error = 0;
        fmoe_status status = fmoe_rung_check(rung, p, &error, why);
        if (status == FMOE_UNSUPPORTED && rung->backend == BACKEND_CUDA)
            continue;
        if (status != FMOE_OK || !(error <= limit_of(p)))
            return because("%s: %s, error %.2g: %s", rung->name, fmoe_status_name(status), error, why);
    }
    return HOLDS;
}

void refused(fmoe_status status, fmoe_status expected, const char *words) {
    expect(status == expected, "%s: status is %s, should be %s", words, fmoe_status_name(status),
           fmoe_status_name(expected));
    expect(strstr(fmoe_error_message(), words) != NULL, "the message \"%s\" does not say \"%s\"", fmoe_error_message(),
           words);
}

/* ---- Threads ----------------------------------------------------------------------------------------------------- */

static int threads_at(int turn) {
    static const int counts[] = {1, 2, 3, 7, 7, 0};
    if (counts[turn])
        omp_set_num_threads(counts[turn]);
    return counts[turn];
}

thread_turns first_turn(void) {
    int before = omp_get_max_threads();
    return (thread_turns){before, 0, threads_at(0)};
}

void next_turn(thread_turns *turns) {
    turns->threads = threads_at(++turns->turn);
}

void end_turns(thread_turns *turns) {
    omp_set_num_threads(turns->before);
}
