/* The suite as a text that runs. A test is a sentence with a number in its chapter, a reason, and something
 * independent it is checked against; Criterion runs it, literate.c prints it.
 *
 *     static const char *k_best_of_all(const int64_t *size, uint64_t seed) {
 *         int64_t T = size[0], n = size[1], K = size[2];
 *         if (K > n * n)
 *             return DOES_NOT_APPLY;
 *         ...
 *         if (indices[i] != sorted[i])
 *             return because("token %d: place %d holds pair %d, the sort has %d", ...);
 *         return HOLDS;
 *     }
 *
 *     SENTENCE(3, 1, "The chosen pairs are the K best of all n², when sums are exact.",
 *              "the definition", "a full sort") {
 *         for_sizes("T n K", k_best_of_all, SIZES({1, 1, 1}, {3, 4, 16}, {7, 13, 6}));
 *     }
 *
 * A property is called once a row of sizes with a fresh seed. When it fails, the sizes are shrunk one at a time while
 * it still fails, and the smallest counterexample is printed with the command that repeats it.
 */
#ifndef LITERATE_H
#define LITERATE_H

#include "../chapters/steps.h"

#include <criterion/criterion.h>

#define MAX_SIZES 8

typedef const char *property(const int64_t *size, uint64_t seed);

extern const char DOES_NOT_APPLY[]; /* these sizes make no case (not counted) */
#define HOLDS NULL
/* A failure's text, formatted into a buffer that lives until the next call. */
const char *because(const char *format, ...) __attribute__((format(printf, 1, 2)));

#define SIZES(...)                                                                                                     \
    (const int64_t[][MAX_SIZES]){__VA_ARGS__},                                                                         \
        sizeof((const int64_t[][MAX_SIZES]){__VA_ARGS__}) / sizeof(int64_t[MAX_SIZES])

/* names: "T n K", one word a size. Fails the sentence at the first row that does not hold. */
void for_sizes(const char *names, property *holds, const int64_t (*rows)[MAX_SIZES], size_t num_rows);
/* The same for `random` rows, each size drawn between low and high; rows that make no case are drawn again. */
void for_random_sizes(const char *names, property *holds, int64_t random, const int64_t *low, const int64_t *high);

/* For sentences without sizes: fails with the text unless ok; each call counts as a case. */
void expect(bool ok, const char *format, ...) __attribute__((format(printf, 2, 3)));
uint64_t fresh_seed(void); /* the run's seed (SEED= repeats it) mixed with a counter */

/* Every rung of a ladder against the step's reference, at the case the name spells; a rung that does not support it is
 * passed over, on the GPU too. HOLDS, or which rung failed and where. A case with an output of a few numbers, which may
 * all be near zero by chance, has to hold in most of nine draws. */
const char *rungs_agree(const fmoe_step *step, const fmoe_rung *rungs, uint64_t seed, const char *case_format, ...)
    __attribute__((format(printf, 4, 5)));
/* The rung writes the same bits with 1, 2, 3 and 7 threads and on a second run; on the GPU, in three runs. */
const char *rungs_repeat(const fmoe_step *step, const fmoe_rung *rungs, uint64_t seed, const char *case_format, ...)
    __attribute__((format(printf, 4, 5)));

/* What a sentence needs, besides the CPU: a build with CUDA, or a device for its code as well. */
typedef enum { NEEDS_NOTHING, NEEDS_BUILD, NEEDS_DEVICE } needs;
void skip_without(needs what); /* leaves the test as skipped, with the reason */

/* Names the test so that Criterion, which sorts by name, keeps reading order, and keeps its texts for main.c. */
void literate_register(struct criterion_test *test, int chapter, int number, needs what, const char *sentence,
                       const char *why, const char *against);

/* One Criterion test, s1 in suite chapter3, registered before main. A number used twice does not link. */
#define SENTENCE(ch, num, sentence, why, against) SENTENCE_WITH(NEEDS_NOTHING, ch, num, sentence, why, against)
#define SENTENCE_WITH(what, ch, num, sentence, why, against)                                                           \
    extern struct criterion_test CR_IDENTIFIER_(chapter##ch, s##num, meta);                                            \
    __attribute__((constructor)) static void literate_##ch##_##num(void) {                                             \
        literate_register(&CR_IDENTIFIER_(chapter##ch, s##num, meta), ch, num, what, sentence, why, against);          \
    }                                                                                                                  \
    Test(chapter##ch, s##num)

/* A sentence about the GPU, which counts as skipped where there is no device; one about what is refused before a launch
 * needs only a build with CUDA. Without CUDA the body is compiled and never called. */
#define CUDA_SENTENCE(ch, num, sentence, why, against)      NEEDING(NEEDS_DEVICE, ch, num, sentence, why, against)
#define CUDA_HOST_SENTENCE(ch, num, sentence, why, against) NEEDING(NEEDS_BUILD, ch, num, sentence, why, against)
#define NEEDING(what, ch, num, sentence, why, against)                                                                 \
    __attribute__((unused)) static void cuda_##ch##_##num(void);                                                       \
    SENTENCE_WITH(what, ch, num, sentence, why, against) {                                                             \
        skip_without(what);                                                                                            \
        CALL_WITH_CUDA(cuda_##ch##_##num);                                                                             \
    }                                                                                                                  \
    static void cuda_##ch##_##num(void)

#ifdef FMOE_WITH_CUDA
#define CALL_WITH_CUDA(body) body()
#else
#define CALL_WITH_CUDA(body) (void)0
#endif

#endif
