/* What sentences are made of: memory of exactly the size asked for, poisoned so that what is not written shows, and
 * freed by itself; values to fill it with; problems, refusals and runs with several numbers of threads. */
#ifndef VALUES_H
#define VALUES_H

#include "literate.h"

/* Frees a variable when its block is left: `float *y OWNED`, `fmoe_problem p FREED(fmoe_problem_free)`. */
#define FREED(function) __attribute__((cleanup(function)))
#define OWNED           FREED(free_pointer)
void free_pointer(void *pointer);

enum { UNWRITTEN = -0x5a5a5a5a };

void *poisoned(int64_t count, size_t size); /* 0xff in every byte: NaN as float, double or long double */
void *workspace_of(size_t bytes);           /* poisoned too, 256-byte aligned */
void *zeros(int64_t count, size_t size);
float *floats(int64_t count);     /* NaN */
int32_t *integers(int64_t count); /* UNWRITTEN */
float *filled(float value, int64_t count);
float *normals(uint64_t seed, uint64_t stream, double scale, int64_t count);
float *copy_of(const float *values, int64_t count);
/* Any indices below limit, repeated ones included. */
int32_t *any_indices(uint64_t seed, uint64_t stream, int64_t limit, int64_t count);

/* Of 32-bit values of any kind. */
bool same_bits(const void *a, const void *b, int64_t count);

/* The step's problem at the case that the name spells. */
fmoe_problem new_problem(const fmoe_step *step, uint64_t seed, const char *case_format, ...)
    __attribute__((format(printf, 3, 4)));
/* HOLDS if every rung is right to float32's limit on a problem that was changed by hand. A GPU's rungs may pass on it.
 */
const char *rungs_right(const fmoe_rung *rungs, fmoe_problem *p);

/* For tables of bad calls: the status, and words of the message. */
void refused(fmoe_status status, fmoe_status expected, const char *words);

/* Inside properties: the message of a call that fails, or of a check that does not hold, is the property's result. */
#define CALL(call)                                                                                                     \
    do {                                                                                                               \
        if ((call) != FMOE_OK)                                                                                         \
            return because("%s", fmoe_error_message());                                                                \
    } while (0)

#define CHECK(check)                                                                                                   \
    do {                                                                                                               \
        const char *wrong_ = (check);                                                                                  \
        if (wrong_)                                                                                                    \
            return wrong_;                                                                                             \
    } while (0)

/* Runs its block with 1, 2, 3, 7 and again 7 threads; afterwards, however it is left, there are as many as before.
 *
 *     FOR_THREADS(run) {
 *         CALL(compute(run.turn ? again : first));
 *         if (!same_bits(first, again, count)) ... run.threads ...
 */
typedef struct {
    int before, turn, threads;
} thread_turns;
thread_turns first_turn(void);
void next_turn(thread_turns *turns);
void end_turns(thread_turns *turns);
#define FOR_THREADS(run) for (thread_turns run FREED(end_turns) = first_turn(); (run).threads; next_turn(&(run)))

#endif
