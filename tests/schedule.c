/* Chapter 4: the expert-major order of the routed pairs, and its ladder. */
#include "cuda_values.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The rungs that the ladder's properties hold to account. A sentence about the GPU puts the GPU's in their place: its
 * process runs no other. */
static const fmoe_rung *ladder = chapter4_rungs;

/* T·K indices and the arrays of their schedule, each with an element behind it that nobody may touch. */
typedef struct {
    int64_t T, K, N;
    int32_t *indices, *offsets, *pairs;
} schedule;

/* xorshift64: the tests' own, so that a bug in the project's generator cannot blind them. */
static uint64_t next_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state >> 16;
}

static schedule empty_schedule(int64_t T, int64_t K, int64_t N) {
    return (schedule){T, K, N, integers(T * K + 1), integers(N + 2), integers(T * K + 1)};
}

/* Skewed indices: small experts are drawn more often, some never, and a token may choose one twice. */
static schedule new_schedule(uint64_t seed, int64_t T, int64_t K, int64_t N) {
    schedule s = empty_schedule(T, K, N);
    uint64_t state = seed * 2 + 1;
    for (int64_t p = 0; p < T * K; p++)
        s.indices[p] = (int32_t)(next_random(&state) % (1 + next_random(&state) % (uint64_t)N));
    return s;
}

static void free_schedule(schedule *s) {
    free(s->indices);
    free(s->offsets);
    free(s->pairs);
}

#define SCHEDULE FREED(free_schedule)

static fmoe_status reference(const schedule *s) {
    return fmoe_schedule(s->T, s->K, s->N, s->indices, s->offsets, s->pairs);
}

static bool wrote_behind(const schedule *s) {
    return s->offsets[s->N + 1] != UNWRITTEN || s->pairs[s->T * s->K] != UNWRITTEN;
}

typedef const char *claim(const schedule *s);

/* The claim about the reference's schedule of skewed indices. */
static const char *about_reference(const int64_t *size, uint64_t seed, claim *holds) {
    if (size[1] > size[2])
        return DOES_NOT_APPLY;
    schedule s SCHEDULE = new_schedule(seed, size[0], size[1], size[2]);
    CALL(reference(&s));
    return wrote_behind(&s) ? because("wrote behind an array") : holds(&s);
}

#define TKN SIZES({0, 3, 5}, {1, 1, 1}, {1, 4, 4}, {3, 2, 4}, {7, 5, 11}, {64, 8, 13}, {29, 6, 170}, {100, 16, 1000})

/* ---- The definition ---------------------------------------------------------------------------------------------- */

static const char *is_histogram(const schedule *s) {
    if (s->offsets[0] != 0 || s->offsets[s->N] != s->T * s->K)
        return because("offsets run from %d to %d", s->offsets[0], s->offsets[s->N]);
    for (int64_t e = 0; e < s->N; e++) {
        int32_t count = 0;
        for (int64_t p = 0; p < s->T * s->K; p++)
            count += s->indices[p] == e;
        if (s->offsets[e + 1] - s->offsets[e] != count)
            return because("expert %d owns %d positions, %d pairs chose it", (int)e, s->offsets[e + 1] - s->offsets[e],
                           count);
    }
    return HOLDS;
}

static const char *histogram(const int64_t *size, uint64_t seed) {
    return about_reference(size, seed, is_histogram);
}

SENTENCE(4, 1, "offsets rises from 0 to T·K, and expert e owns as many positions as pairs chose it.",
         "a schedule's offsets are the running sum of a histogram", "counting each expert by itself") {
    for_sizes("T K N", histogram, TKN);
}

static const char *is_permutation(const schedule *s) {
    bool *seen OWNED = zeros(s->T * s->K, sizeof *seen);
    for (int64_t i = 0; i < s->T * s->K; i++) {
        int32_t p = s->pairs[i];
        if (p < 0 || p >= s->T * s->K)
            return because("position %d holds pair %d, which is none", (int)i, p);
        if (seen[p])
            return because("position %d holds pair %d, which is there twice", (int)i, p);
        seen[p] = true;
    }
    return HOLDS;
}

static const char *permutation(const int64_t *size, uint64_t seed) {
    return about_reference(size, seed, is_permutation);
}

SENTENCE(4, 2, "pairs holds every pair from 0 to T·K − 1 exactly once.", "nothing may be computed twice or left out",
         "a mark a pair") {
    for_sizes("T K N", permutation, TKN);
}

static const char *is_in_order(const schedule *s) {
    for (int64_t e = 0; e < s->N; e++)
        for (int64_t i = s->offsets[e]; i < s->offsets[e + 1]; i++) {
            if (s->indices[s->pairs[i]] != e)
                return because("position %d is expert %d's and holds a pair of expert %d", (int)i, (int)e,
                               s->indices[s->pairs[i]]);
            if (i > s->offsets[e] && s->pairs[i] <= s->pairs[i - 1])
                return because("expert %d: pair %d comes after pair %d", (int)e, s->pairs[i], s->pairs[i - 1]);
        }
    return HOLDS;
}

static const char *in_order(const int64_t *size, uint64_t seed) {
    return about_reference(size, seed, is_in_order);
}

SENTENCE(4, 3, "An expert's positions hold its own pairs, and they rise.",
         "stability makes the order the only one possible, so that sums along it have the same bits everywhere",
         "looking at neighbours") {
    for_sizes("T K N", in_order, TKN);
}

/* Insertion sort: stable because it only ever passes strictly larger experts. */
static const char *is_stable_sort(const schedule *s) {
    int32_t *sorted OWNED = integers(s->T * s->K);
    for (int64_t p = 0; p < s->T * s->K; p++) {
        int64_t at = p;
        for (; at > 0 && s->indices[sorted[at - 1]] > s->indices[p]; at--)
            sorted[at] = sorted[at - 1];
        sorted[at] = (int32_t)p;
    }
    for (int64_t i = 0; i < s->T * s->K; i++)
        if (s->pairs[i] != sorted[i])
            return because("position %d holds pair %d, the sort has %d", (int)i, s->pairs[i], sorted[i]);
    return HOLDS;
}

static const char *stable_sort(const int64_t *size, uint64_t seed) {
    return about_reference(size, seed, is_stable_sort);
}

SENTENCE(4, 4, "The schedule is what a stable sort of the pairs by expert gives.", "the definition",
         "an insertion sort") {
    for_sizes("T K N", stable_sort, TKN);
    for_random_sizes("T K N", stable_sort, 40, (int64_t[]){1, 1, 1}, (int64_t[]){40, 12, 60});
}

/* ---- What it is good for ----------------------------------------------------------------------------------------- */

static const char *gives_indices_back(const schedule *s) {
    int32_t *back OWNED = integers(s->T * s->K);
    for (int64_t e = 0; e < s->N; e++)
        for (int64_t i = s->offsets[e]; i < s->offsets[e + 1]; i++)
            back[s->pairs[i]] = (int32_t)e;
    for (int64_t p = 0; p < s->T * s->K; p++)
        if (back[p] != s->indices[p])
            return because("pair %d comes back as expert %d, it was %d", (int)p, back[p], s->indices[p]);
    return HOLDS;
}

static const char *inverse(const int64_t *size, uint64_t seed) {
    return about_reference(size, seed, gives_indices_back);
}

SENTENCE(4, 5, "Writing each expert's number back to its pairs gives the indices.", "nothing is lost on the way",
         "the indices themselves") {
    for_sizes("T K N", inverse, TKN);
}

static int by_number(const void *left, const void *right) {
    int32_t a = *(const int32_t *)left, b = *(const int32_t *)right;
    return (a > b) - (a < b);
}

/* The schedule once more, of the transposed matrix: its T·K entries one a row, tokens in the place of experts. */
static const char *transposes_back(const schedule *s) {
    schedule back SCHEDULE = empty_schedule(s->T * s->K, 1, s->T);
    int32_t *expert OWNED = integers(s->T * s->K), *own OWNED = integers(s->K);
    for (int64_t e = 0; e < s->N; e++)
        for (int64_t i = s->offsets[e]; i < s->offsets[e + 1]; i++) {
            expert[i] = (int32_t)e;
            back.indices[i] = (int32_t)(s->pairs[i] / s->K);
        }
    CALL(reference(&back));
    for (int64_t t = 0; t < s->T; t++) {
        memcpy(own, s->indices + t * s->K, (size_t)s->K * sizeof *own);
        qsort(own, (size_t)s->K, sizeof *own, by_number);
        for (int64_t k = 0; k < s->K; k++)
            if (back.offsets[t] != t * s->K || expert[back.pairs[t * s->K + k]] != own[k])
                return because("token %d: place %d should hold expert %d", (int)t, (int)k, own[k]);
    }
    return HOLDS;
}

static const char *twice(const int64_t *size, uint64_t seed) {
    return size[0] ? about_reference(size, seed, transposes_back) : DOES_NOT_APPLY;
}

SENTENCE(4, 6, "Transposing twice gives every token its experts back, in rising order.",
         "a schedule is the transposed sparse matrix, and a stable transposition keeps the order of columns",
         "each token's experts, sorted by the C library") {
    for_sizes("T K N", twice, TKN);
}

/* ---- Corners ----------------------------------------------------------------------------------------------------- */

/* All pairs to one expert: it owns everything, the pairs stay as they are. */
static const char *one_takes_all(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], K = size[1], N = size[2];
    if (K > N)
        return DOES_NOT_APPLY;
    int32_t busy = (int32_t)(seed % (uint64_t)N);
    schedule s SCHEDULE = new_schedule(seed, T, K, N);
    for (int64_t p = 0; p < T * K; p++)
        s.indices[p] = busy;
    CALL(reference(&s));
    for (int64_t e = 0; e <= N; e++)
        if (s.offsets[e] != (e <= busy ? 0 : T * K))
            return because("busy expert %d: offsets[%d] = %d", busy, (int)e, s.offsets[e]);
    for (int64_t p = 0; p < T * K; p++)
        if (s.pairs[p] != p)
            return because("position %d holds pair %d", (int)p, s.pairs[p]);
    return HOLDS;
}

SENTENCE(4, 7, "One expert may take every pair and leave the others empty; T may be 0 and N may be 1.",
         "skew is what routers produce, and empty is legal", "closed form") {
    for_sizes("T K N", one_takes_all, TKN);
}

/* Every token chooses all experts, in falling order: expert e's pairs are t·K + (K − 1 − e). */
static const char *all_chosen(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], K = size[1];
    schedule s SCHEDULE = new_schedule(seed, T, K, K);
    for (int64_t p = 0; p < T * K; p++)
        s.indices[p] = (int32_t)(K - 1 - p % K);
    CALL(reference(&s));
    for (int64_t i = 0; i < T * K; i++)
        if (s.pairs[i] != i % T * K + K - 1 - i / T)
            return because("position %d holds pair %d", (int)i, s.pairs[i]);
    for (int64_t e = 0; e <= K; e++)
        if (s.offsets[e] != e * T)
            return because("offsets[%d] = %d", (int)e, s.offsets[e]);
    return HOLDS;
}

SENTENCE(4, 8, "With K = N the schedule is the dense transposition.", "every token chooses every expert",
         "closed form") {
    for_sizes("T K", all_chosen, SIZES({1, 1}, {1, 5}, {4, 1}, {6, 7}, {33, 20}));
}

/* ---- Bad input --------------------------------------------------------------------------------------------------- */

SENTENCE(4, 9, "An index outside [0, N) is refused, and the message says which, its value and the limit.",
         "an index is a memory address in the making", "the message's text") {
    const int32_t bad[] = {-1, 4, INT32_MIN, INT32_MAX};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        schedule s SCHEDULE = new_schedule(fresh_seed(), 3, 2, 4);
        s.indices[5] = bad[i];
        fmoe_status status = reference(&s);
        char value[32];
        snprintf(value, sizeof value, "%d", bad[i]);
        expect(status == FMOE_BAD_INDEX, "index %d: %s", bad[i], fmoe_status_name(status));
        const char *message = fmoe_error_message();
        expect(strstr(message, "indices") && strstr(message, value) && strstr(message, "4"), "index %d: '%s'", bad[i],
               message);
    }
}

SENTENCE(4, 10, "More pairs than 32-bit positions can number are refused before anything is touched.",
         "T·K beyond 2^31 − 1 would wrap around", "the status, with pointers to nothing much") {
    int32_t one = 0, offsets[3] = {UNWRITTEN, UNWRITTEN, UNWRITTEN};
    const int64_t sizes[][2] = {{INT32_MAX, 2}, {(int64_t)1 << 31, 1}, {INT64_MAX, 2}, {(int64_t)1 << 62, 4}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        fmoe_status status = fmoe_schedule(sizes[i][0], sizes[i][1], 2, &one, offsets, &one);
        expect(status == FMOE_OVERFLOW, "T %lld, K %lld: %s", (long long)sizes[i][0], (long long)sizes[i][1],
               fmoe_status_name(status));
        expect(offsets[0] == UNWRITTEN && offsets[2] == UNWRITTEN, "T %lld: offsets were written",
               (long long)sizes[i][0]);
    }
}

SENTENCE(4, 11, "Sizes below one and missing arrays have a status each; with T = 0 the pairs may be missing.",
         "the contract", "the status") {
    int32_t index = 0, offsets[2], pair;
    expect(fmoe_schedule(-1, 1, 1, &index, offsets, &pair) == FMOE_BAD_SIZE, "T = -1");
    expect(fmoe_schedule(1, 1, 0, &index, offsets, &pair) == FMOE_BAD_SIZE, "N = 0");
    expect(fmoe_schedule(1, 0, 1, &index, offsets, &pair) == FMOE_BAD_TOPK, "K = 0");
    expect(fmoe_schedule(1, 1, 1, NULL, offsets, &pair) == FMOE_NULL_POINTER, "no indices");
    expect(fmoe_schedule(1, 1, 1, &index, NULL, &pair) == FMOE_NULL_POINTER, "no offsets");
    expect(fmoe_schedule(1, 1, 1, &index, offsets, NULL) == FMOE_NULL_POINTER, "no pairs");
    expect(fmoe_schedule(0, 1, 1, NULL, offsets, NULL) == FMOE_OK && offsets[1] == 0, "T = 0");
}

/* ---- The ladder -------------------------------------------------------------------------------------------------- */

static const char *ladder_agrees(const int64_t *size, uint64_t seed) {
    static const char *const routings[] = {"uniform", "hot", "normal"};
    for (int r = 0; r < 3; r++) {
        int64_t n = fmoe_num_keys(size[2]), limit = r == 2 ? n * n : size[2];
        if (size[1] <= limit)
            CHECK(rungs_agree(&fmoe_step_schedule, ladder, seed, "T%lld-N%lld-K%lld-%s-f32", (long long)size[0],
                              (long long)size[2], (long long)size[1], routings[r]));
    }
    return HOLDS;
}

SENTENCE(4, 12, "Every rung gives the reference's schedule, bit for bit, for any sizes and any routing.",
         "integers leave no room for an error", "the reference") {
    for_sizes("T K N", ladder_agrees,
              SIZES({0, 3, 9}, {1, 1, 1}, {5, 4, 4}, {29, 6, 170}, {300, 64, 1000}, {40, 2, 70000}));
}

SENTENCE(4, 13, "Nothing shows where a rung cuts the pairs into chunks and the experts into buckets.",
         "off by one hides at a seam: 4,096 experts a bucket, 65,536 pairs a chunk, 256 values a digit",
         "the reference, a step to either side") {
    for_sizes("T K N", ladder_agrees,
              SIZES({64, 4, 255}, {64, 4, 256}, {64, 4, 4095}, {64, 4, 4096}, {64, 4, 4097}, {64, 4, 8192},
                    {16383, 4, 100}, {16384, 4, 100}, {4681, 14, 9000}, {8192, 17, 5000}));
}

/* The largest expert is always there, or the seam above it would go unseen. */
static const char *last_expert(const int64_t *size, uint64_t seed) {
    schedule s SCHEDULE = new_schedule(seed, size[0], 2, size[1]);
    for (int64_t p = 0; p < s.T * s.K; p++)
        s.indices[p] = (int32_t)(p % 3 ? s.N - 1 : p % s.N);
    int32_t *offsets OWNED = integers(s.N + 2), *pairs OWNED = integers(s.T * s.K + 1);
    CALL(reference(&s));
    fmoe_schedule_args args = {s.T, s.K, s.N, s.indices, offsets, pairs};
    size_t bytes = cpu_schedule_best_workspace(&args);
    void *workspace OWNED = workspace_of(bytes);
    if (cpu_schedule_best(&args, workspace, bytes, NULL) != FMOE_OK)
        return because("N %d: the best rung refuses", (int)s.N);
    if (!same_bits(offsets, s.offsets, s.N + 2) || !same_bits(pairs, s.pairs, s.T * s.K + 1))
        return because("N %d: the best rung's schedule is another", (int)s.N);
    return HOLDS;
}

SENTENCE(4, 14, "The rung that later chapters call gives the same on both sides of its switch to two levels.",
         "it changes its method at 2^18 experts", "the reference") {
    for_sizes("T N", last_expert, SIZES({1, 2}, {100, 1000}, {200, 262143}, {200, 262144}, {200, 262145}));
}

static const char *ladder_repeats(const int64_t *size, uint64_t seed) {
    return rungs_repeat(&fmoe_step_schedule, ladder, seed, "T%lld-N%lld-K%lld-hot-f32", (long long)size[0],
                        (long long)size[2], (long long)size[1]);
}

SENTENCE(4, 15, "Every rung writes the same bits with 1, 2, 3 and 7 threads, and again on a second run.",
         "a stable order is unique, so there is nothing for threads to disagree about", "the run with one thread") {
    for_sizes("T K N", ladder_repeats, SIZES({5, 3, 4}, {100, 7, 50}, {3000, 24, 20000}));
}

static const char *rungs_refuse(const int64_t *size, uint64_t seed) {
    schedule s SCHEDULE = new_schedule(seed, size[0], size[1], size[2]);
    s.indices[(int64_t)(seed % (uint64_t)(s.T * s.K))] = (int32_t)size[3];
    fmoe_schedule_args args = {s.T, s.K, s.N, s.indices, s.offsets, s.pairs};
    for (const fmoe_rung *rung = chapter4_rungs; rung->run; rung++) {
        size_t bytes = rung->workspace(&args);
        void *workspace OWNED = workspace_of(bytes);
        fmoe_status status = rung->run(&args, workspace, bytes, NULL);
        if (status != FMOE_BAD_INDEX)
            return because("%s, index %d of %d experts: %s", rung->name, (int)size[3], (int)s.N,
                           fmoe_status_name(status));
        if (wrote_behind(&s))
            return because("%s, index %d: wrote behind an array", rung->name, (int)size[3]);
    }
    return HOLDS;
}

SENTENCE(4, 16, "No rung takes an index outside [0, N), and none writes outside its arrays because of one.",
         "later chapters hand the caller's indices straight to them", "the status, and a guard behind each array") {
    const int64_t rows[][MAX_SIZES] = {{1, 1, 1, -1},
                                       {1, 1, 1, 1},
                                       {30, 5, 70, -1},
                                       {30, 5, 70, 70},
                                       {30, 5, 4095, 4095},
                                       {30, 5, 4096, 1000000000},
                                       {9, 3, 20000, -2000000000}};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        const char *why = rungs_refuse(rows[i], fresh_seed());
        expect(why == HOLDS, "%s", why);
    }
}

/* ---- On the GPU -------------------------------------------------------------------------------------------------- */

enum { SKEWED, ONE_TAKES_ALL, EVERY_EXPERT };

static const char *name_of(const fmoe_rung *rung) {
    return rung->run ? rung->name : "fmoe_cuda_schedule";
}

/* Every rung in its turn, then the public function. */
static const char *gpu_invariants(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], K = size[1], N = size[2], kind = size[3];
    if (K > N)
        return DOES_NOT_APPLY;
    schedule s SCHEDULE = new_schedule(seed, T, K, N);
    for (int64_t p = 0; p < T * K && kind != SKEWED; p++)
        s.indices[p] = (int32_t)(kind == ONE_TAKES_ALL ? (int64_t)(seed % (uint64_t)N) : p % N);
    for (const fmoe_rung *rung = cuda_schedule_rungs;; rung++) {
        fmoe_schedule_args args = {T, K, N, s.indices, s.offsets, s.pairs};
        fmoe_status status = schedule_by(rung, &args);
        const char *wrong = status == FMOE_OK ? is_histogram(&s) : status == FMOE_UNSUPPORTED ? HOLDS : "";
        if (wrong == HOLDS && status == FMOE_OK)
            wrong = is_permutation(&s);
        if (wrong == HOLDS && status == FMOE_OK)
            wrong = is_in_order(&s);
        if (wrong != HOLDS) {
            char text[300];
            snprintf(text, sizeof text, "%s", *wrong ? wrong : fmoe_error_message());
            return because("%s: %s", name_of(rung), text);
        }
        if (!rung->run)
            return HOLDS;
    }
}

CUDA_SENTENCE(4, 17, "On the GPU offsets are the running histogram, pairs a permutation, rising within an expert.",
              "threads that race for places must not show in the order",
              "counting each expert, a mark a pair, looking at neighbours") {
    for_sizes("T K N kind", gpu_invariants,
              SIZES({0, 3, 5, 0}, {1, 1, 1, 0}, {1, 4, 4, 2}, {3, 2, 4, 0}, {29, 6, 170, 0}, {100, 16, 1000, 0},
                    {301, 7, 7, 2}, {999, 5, 9, 1}, {5000, 3, 40, 1}, {7, 1, 3000, 0}, {2049, 2, 33, 0},
                    {700, 64, 64, 2}));
    for_random_sizes("T K N kind", gpu_invariants, 40, (int64_t[]){1, 1, 1, 0}, (int64_t[]){300, 20, 400, 2});
}

static const char *trained_routing(const int64_t *size, uint64_t seed) {
    return rungs_agree(&fmoe_step_schedule, ladder, seed, "T%d-N16384-K%d-trained-f32", (int)size[0], (int)size[1]);
}

CUDA_SENTENCE(4, 18,
              "Every GPU rung gives the reference's schedule, bit for bit, for any routing and up to 2^22 experts.",
              "hot experts, empty ones, and seams between chunks, slices and buckets", "the reference") {
    ladder = cuda_schedule_rungs;
    for_sizes("T K N", ladder_agrees,
              SIZES({0, 3, 9}, {1, 1, 1}, {5, 4, 4}, {29, 6, 170}, {300, 64, 1000}, {3, 2, 70000}, {64, 4, 255},
                    {64, 4, 256}, {64, 4, 257}, {64, 4, 4095}, {64, 4, 4096}, {64, 4, 4097}, {1023, 2, 300},
                    {1024, 2, 300}, {1025, 2, 300}, {16383, 4, 100}, {16384, 4, 100}, {16385, 4, 100}, {4681, 14, 9000},
                    {8192, 17, 5000}, {5, 3, 1 << 22}, {20000, 1, 2}, {1000, 100, 100}, {40000, 8, 3000}, {2560, 1, 1},
                    {2561, 1, 1}, {5120, 1, 2}, {65536, 4, 300}, {65537, 4, 300}, {131072, 4, 39999},
                    {131073, 4, 40000}));
    for_sizes("T K", trained_routing, SIZES({1, 64}, {1001, 64}, {4096, 64}));
}

static const char *gpu_bad_indices(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], K = size[1], N = size[2], bad = size[3], good = 0;
    if (K > N)
        return DOES_NOT_APPLY;
    const int32_t wrong[] = {-1, (int32_t)N, INT32_MIN, INT32_MAX};
    schedule s SCHEDULE = new_schedule(seed, T, K, N);
    for (int64_t i = 0; i < bad; i++)
        s.indices[fmoe_random_bits(seed, 3, (uint64_t)i) % (uint64_t)(T * K)] = wrong[i % 4];
    int32_t *offsets OWNED = integers(N + 1), *pairs OWNED = integers(T * K);
    int64_t first = -1;
    for (int64_t p = T * K - 1; p >= 0; p--)
        if (s.indices[p] < 0 || s.indices[p] >= N)
            first = p;
    for (int64_t e = 0; e <= N; e++) { /* the definition; at N what is left over */
        offsets[e] = (int32_t)good;
        for (int64_t p = 0; p < T * K && e < N; p++)
            if (s.indices[p] == e)
                pairs[good++] = (int32_t)p;
    }
    for (int64_t at = good; at < T * K; at++)
        pairs[at] = -1;
    char note[96] = "";
    if (bad)
        snprintf(note, sizeof note, "indices[%d, %d] = %d is outside [0, num_experts = %d)", (int)(first / K),
                 (int)(first % K), s.indices[first], (int)N);
    for (const fmoe_rung *rung = cuda_schedule_rungs;; rung++) {
        fmoe_schedule_args args = {T, K, N, s.indices, s.offsets, s.pairs};
        fmoe_status status = schedule_by(rung, &args);
        if (status != FMOE_UNSUPPORTED) {
            if (status != (bad ? FMOE_BAD_INDEX : FMOE_OK) || (bad && strcmp(fmoe_error_message(), note) != 0))
                return because("%s: %s, \"%s\", should be \"%s\"", name_of(rung), fmoe_status_name(status),
                               fmoe_error_message(), note);
            if (!same_bits(s.offsets, offsets, N + 1))
                return because("%s: the offsets are not those of the good pairs", name_of(rung));
            if (!same_bits(s.pairs, pairs, T * K))
                return because("%s: the pairs are not the good ones and then -1", name_of(rung));
        }
        if (!rung->run)
            return HOLDS;
    }
}

CUDA_SENTENCE(
    4, 19, "On the GPU a bad index is in no expert's list, the pairs end with -1, and fmoe_cuda_check names the first.",
    "what only the device can see is told later, and no good pair pays for it",
    "the definition on the good pairs; guard bands around every array") {
    for_sizes("T K N bad", gpu_bad_indices,
              SIZES({1, 1, 1, 1}, {3, 2, 4, 0}, {29, 6, 17, 1}, {29, 6, 17, 40}, {300, 7, 70, 3}, {50, 4, 4096, 9},
                    {2049, 2, 5, 2}, {9, 3, 2000, 100}));
    for_random_sizes("T K N bad", gpu_bad_indices, 30, (int64_t[]){1, 1, 1, 0}, (int64_t[]){200, 10, 100, 9});
}

CUDA_SENTENCE(
    4, 20, "Every GPU rung writes the same schedule in every run, from a graph with new data, and beside another call.",
    "a stable order is unique, and a call depends on its arguments alone",
    "three runs; the reference on data that the capture has not seen; two streams that start together") {
    ladder = cuda_schedule_rungs;
    for_sizes("T K N", ladder_repeats, SIZES({5, 3, 4}, {1001, 7, 50}, {3000, 24, 20000}));
    static const char *const cases[] = {"T129-N70-K6-uniform-f32", "T2000-N16384-K16-hot-f32",
                                        "T1000-N16384-K64-normal-f32"};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *wrong = rungs_replay(&fmoe_step_schedule, cuda_schedule_rungs, fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
        wrong = rungs_side_by_side(&fmoe_step_schedule, cuda_schedule_rungs, fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
    }
}

CUDA_HOST_SENTENCE(4, 21, "The GPU's schedule names bad arguments and its limit before it launches anything.",
                   "more pairs than 32-bit positions can number would overrun them", "the contract") {
    int32_t a[16] = {0};
    const size_t plenty = (size_t)1 << 40;
#define RUN(T, K, N, indices, offsets, pairs, workspace, bytes)                                                        \
    fmoe_cuda_schedule(T, K, N, indices, offsets, pairs, workspace, bytes, NULL)
    refused(RUN(-1, 2, 4, a, a, a, a, plenty), FMOE_BAD_SIZE, "tokens = -1");
    refused(RUN(2, 0, 4, a, a, a, a, plenty), FMOE_BAD_TOPK, "num_experts_per_tok = 0");
    refused(RUN(2, 2, 0, a, a, a, a, plenty), FMOE_BAD_SIZE, "num_experts = 0");
    refused(RUN(2, 2, FMOE_CUDA_MAX_EXPERTS + 1, a, a, a, a, plenty), FMOE_UNSUPPORTED, "num_experts = 4194305");
    refused(RUN(INT64_C(1) << 31, 2, 4, a, a, a, a, plenty), FMOE_OVERFLOW, "tokens × num_experts_per_tok");
    refused(RUN(2, 2, 4, NULL, a, a, a, plenty), FMOE_NULL_POINTER, "indices");
    refused(RUN(2, 2, 4, a, NULL, a, a, plenty), FMOE_NULL_POINTER, "offsets");
    refused(RUN(2, 2, 4, a, a, NULL, a, plenty), FMOE_NULL_POINTER, "pairs");
    size_t needed = fmoe_cuda_schedule_workspace(2, 2, 4);
    expect(needed >= 256, "there is no room for a note in %zu bytes", needed);
    refused(RUN(2, 2, 4, a, a, a, a, needed - 1), FMOE_BAD_WORKSPACE, "workspace_bytes");
    refused(RUN(2, 2, 4, a, a, a, NULL, needed), FMOE_NULL_POINTER, "workspace");
#undef RUN
}
