/* Chapter 4 on the CPU: the expert-major order of the routed pairs, from a library sort to two levels of counting.
 *
 * All rungs treat an index outside [0, N) alike: it is read as expert N, a slot behind the last expert. That costs one
 * minimum an index and no branch, everything stays inside its array, and at the end offsets[N] falls short of T·K. */
#include "../steps.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

static int64_t num_pairs(const fmoe_schedule_args *a) {
    return a->T * a->K;
}

// As an unsigned number a negative index is larger than any N.
static inline uint32_t expert_of(const fmoe_schedule_args *a, int64_t pair) {
    uint32_t expert = (uint32_t)a->indices[pair];
    return expert < (uint32_t)a->N ? expert : (uint32_t)a->N;
}

static fmoe_status verdict(const fmoe_schedule_args *a) {
    return a->offsets[a->N] == num_pairs(a) ? FMOE_OK : FMOE_BAD_INDEX;
}

/* ---- Comparison sort --------------------------------------------------------------------------------------------- */

// An expert and a pair in one number, so that one comparison orders by expert and then by pair. (Inside qsort the C
// library may allocate; nothing else in a rung does.)
typedef uint64_t sort_key;

static inline sort_key make_key(uint32_t expert, int64_t pair) {
    return (sort_key)expert << 32 | (sort_key)pair;
}

static int by_key(const void *left, const void *right) {
    sort_key a = *(const sort_key *)left, b = *(const sort_key *)right;
    return (a > b) - (a < b);
}

// Where the keys step from one expert to the next, offsets follow.
static void unpack_sorted(const fmoe_schedule_args *a, const sort_key *keys) {
    int64_t next = 0;
    for (int64_t position = 0; position < num_pairs(a); position++) {
        a->pairs[position] = (int32_t)(keys[position] & UINT32_MAX);
        while (next <= (int64_t)(keys[position] >> 32))
            a->offsets[next++] = (int32_t)position;
    }
    while (next <= a->N)
        a->offsets[next++] = (int32_t)num_pairs(a);
}

static size_t keys_workspace(const void *args) {
    return (size_t)num_pairs(args) * sizeof(sort_key);
}

static fmoe_status comparison_sort(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)bytes, (void)stream;
    const fmoe_schedule_args *a = args;
    sort_key *keys = workspace;
    for (int64_t pair = 0; pair < num_pairs(a); pair++)
        keys[pair] = make_key(expert_of(a, pair), pair);
    if (num_pairs(a) > 0)
        qsort(keys, (size_t)num_pairs(a), sizeof *keys, by_key);
    unpack_sorted(a, keys);
    return verdict(a);
}

/* ---- Counting sort ----------------------------------------------------------------------------------------------- */

static size_t counters_workspace(const void *args) {
    return (size_t)(((const fmoe_schedule_args *)args)->N + 1) * sizeof(int32_t);
}

// [counting]
static fmoe_status counting_sort(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)bytes, (void)stream;
    const fmoe_schedule_args *a = args;
    int32_t *next = workspace; // [N + 1]: first the counts, then where each expert's next pair goes
    memset(next, 0, counters_workspace(a));
    for (int64_t pair = 0; pair < num_pairs(a); pair++)
        next[expert_of(a, pair)]++;

    int32_t sum = 0;
    for (int64_t expert = 0; expert <= a->N; expert++) {
        int32_t count = next[expert];
        a->offsets[expert] = next[expert] = sum;
        sum += count;
    }

    for (int64_t pair = 0; pair < num_pairs(a); pair++)
        a->pairs[next[expert_of(a, pair)]++] = (int32_t)pair;
    return verdict(a);
}
// [/counting]

/* ---- Radix sort, lowest digit first ------------------------------------------------------------------------------ */

enum { DIGIT_BITS = 8 };

// Bits that hold any number up to and including the largest.
static int bits_for(int64_t largest) {
    int bits = 1;
    while (largest >> bits)
        bits++;
    return bits;
}

static void sort_by_digit(int64_t count, int shift, const sort_key *from, sort_key *to) {
    int32_t next[1 << DIGIT_BITS] = {0};
    for (int64_t i = 0; i < count; i++)
        next[from[i] >> shift & ((1 << DIGIT_BITS) - 1)]++;
    int32_t sum = 0;
    for (int digit = 0; digit < 1 << DIGIT_BITS; digit++) {
        int32_t size = next[digit];
        next[digit] = sum;
        sum += size;
    }
    for (int64_t i = 0; i < count; i++)
        to[next[from[i] >> shift & ((1 << DIGIT_BITS) - 1)]++] = from[i];
}

static size_t two_keys_workspace(const void *args) {
    return 2 * keys_workspace(args);
}

static fmoe_status radix_sort(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)bytes, (void)stream;
    const fmoe_schedule_args *a = args;
    sort_key *keys = workspace, *spare = keys + num_pairs(a);
    for (int64_t pair = 0; pair < num_pairs(a); pair++)
        keys[pair] = make_key(expert_of(a, pair), pair);
    for (int bit = 0; bit < bits_for(a->N); bit += DIGIT_BITS) {
        sort_by_digit(num_pairs(a), 32 + bit, keys, spare);
        sort_key *sorted = spare;
        spare = keys;
        keys = sorted;
    }
    unpack_sorted(a, keys);
    return verdict(a);
}

/* ---- Threads ----------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t begin, end;
} range;

static range part_of(int64_t count, int parts, int part) {
    return (range){count * part / parts, count * (part + 1) / parts};
}

// Too few pairs to pay for waking a team.
static bool worth_threads(const fmoe_schedule_args *a) {
    return num_pairs(a) > 1 << 14;
}

static size_t threads_workspace(const void *args) {
    return (size_t)omp_get_max_threads() * (counters_workspace(args) + sizeof(int32_t));
}

// [threads]
static fmoe_status counting_threads(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)bytes, (void)stream;
    const fmoe_schedule_args *a = args;
    int64_t slots = a->N + 1;
    int32_t *sums = workspace, *counts = sums + omp_get_max_threads(); // [threads], [threads, N + 1]
#pragma omp parallel if (worth_threads(a))
    {
        int threads = omp_get_num_threads(), me = omp_get_thread_num();
        range pairs = part_of(num_pairs(a), threads, me), experts = part_of(slots, threads, me);
        int32_t *next = counts + me * slots;
        memset(next, 0, (size_t)slots * sizeof *next);
        for (int64_t pair = pairs.begin; pair < pairs.end; pair++)
            next[expert_of(a, pair)]++;
#pragma omp barrier
        // The scan, by ranges of experts: first what each range holds in all ...
        int32_t held = 0;
        for (int thread = 0; thread < threads; thread++)
            for (int64_t expert = experts.begin; expert < experts.end; expert++)
                held += counts[thread * slots + expert];
        sums[me] = held;
#pragma omp barrier
        int32_t sum = 0;
        for (int range_before = 0; range_before < me; range_before++)
            sum += sums[range_before];
        // ... then inside it: by expert, and for one expert by slice of pairs. That order is what makes it stable.
        for (int64_t expert = experts.begin; expert < experts.end; expert++) {
            a->offsets[expert] = sum;
            for (int thread = 0; thread < threads; thread++) {
                int32_t count = counts[thread * slots + expert];
                counts[thread * slots + expert] = sum;
                sum += count;
            }
        }
#pragma omp barrier
        for (int64_t pair = pairs.begin; pair < pairs.end; pair++)
            a->pairs[next[expert_of(a, pair)]++] = (int32_t)pair;
    }
    return verdict(a);
}
// [/threads]

/* ---- Two levels -------------------------------------------------------------------------------------------------- */

// A bucket is LOW experts in a row: their counters, 16 KB, stay in the first-level cache. A chunk is as many pairs as
// 16 bits can number, so that a record of the first level, (expert within the bucket, pair within the chunk), is 4
// bytes.
enum { LOW_BITS = 12, LOW = 1 << LOW_BITS, CHUNK_BITS = 16, CHUNK = 1 << CHUNK_BITS };

typedef struct {
    int64_t chunks, buckets;
    uint32_t *records; // [T·K]: by bucket, then by chunk, then by pair
    int32_t *starts;   // [buckets + 1]: each bucket's first position
    int32_t *ends;     // [chunks, buckets]: where a chunk's part of a bucket ends
    int32_t *counters; // [threads, LOW]
} levels;

static void lay_out(const fmoe_schedule_args *a, void *workspace, levels *l) {
    l->chunks = (num_pairs(a) + CHUNK - 1) / CHUNK;
    l->buckets = (a->N >> LOW_BITS) + 1;
    l->records = workspace;
    l->starts = (int32_t *)workspace + num_pairs(a);
    l->ends = l->starts + l->buckets + 1;
    l->counters = l->ends + l->chunks * l->buckets;
}

static size_t two_levels_workspace(const void *args) {
    const fmoe_schedule_args *a = args;
    size_t chunks = (size_t)(num_pairs(a) + CHUNK - 1) / CHUNK, buckets = (size_t)(a->N >> LOW_BITS) + 1;
    return sizeof(int32_t) *
           ((size_t)num_pairs(a) + buckets + 1 + chunks * buckets + (size_t)omp_get_max_threads() * LOW);
}

static range chunk_of(const fmoe_schedule_args *a, int64_t chunk) {
    int64_t end = (chunk + 1) * CHUNK;
    return (range){chunk * CHUNK, end < num_pairs(a) ? end : num_pairs(a)};
}

static void count_buckets(const fmoe_schedule_args *a, range pairs, int64_t buckets, int32_t *counts) {
    memset(counts, 0, (size_t)buckets * sizeof *counts);
    for (int64_t pair = pairs.begin; pair < pairs.end; pair++)
        counts[expert_of(a, pair) >> LOW_BITS]++;
}

// By bucket, and for one bucket by chunk. Turns counts into beginnings, which the first level moves to the ends.
static void scan_buckets(levels *l) {
    int32_t sum = 0;
    for (int64_t bucket = 0; bucket < l->buckets; bucket++) {
        l->starts[bucket] = sum;
        for (int64_t chunk = 0; chunk < l->chunks; chunk++) {
            int32_t count = l->ends[chunk * l->buckets + bucket];
            l->ends[chunk * l->buckets + bucket] = sum;
            sum += count;
        }
    }
    l->starts[l->buckets] = sum;
}

// [first-level]
static void place_in_buckets(const fmoe_schedule_args *a, range pairs, int32_t *next, uint32_t *records) {
    for (int64_t pair = pairs.begin; pair < pairs.end; pair++) {
        uint32_t expert = expert_of(a, pair);
        records[next[expert >> LOW_BITS]++] = (expert & (LOW - 1)) << CHUNK_BITS | (uint32_t)(pair - pairs.begin);
    }
}
// [/first-level]

// [second-level]
static void sort_bucket(const fmoe_schedule_args *a, const levels *l, int64_t bucket, int32_t *next) {
    int64_t first = bucket * LOW, experts = a->N + 1 - first < LOW ? a->N + 1 - first : LOW;
    memset(next, 0, (size_t)experts * sizeof *next);
    for (int32_t i = l->starts[bucket]; i < l->starts[bucket + 1]; i++)
        next[l->records[i] >> CHUNK_BITS]++;

    int32_t sum = l->starts[bucket];
    for (int64_t expert = 0; expert < experts; expert++) {
        int32_t count = next[expert];
        a->offsets[first + expert] = next[expert] = sum;
        sum += count;
    }

    int32_t i = l->starts[bucket];
    for (int64_t chunk = 0; chunk < l->chunks; chunk++)
        for (; i < l->ends[chunk * l->buckets + bucket]; i++)
            a->pairs[next[l->records[i] >> CHUNK_BITS]++] =
                (int32_t)(chunk * CHUNK) + (int32_t)(l->records[i] & (CHUNK - 1));
}
// [/second-level]

static fmoe_status two_levels(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)bytes, (void)stream;
    const fmoe_schedule_args *a = args;
    levels l;
    lay_out(a, workspace, &l);
#pragma omp parallel if (worth_threads(a))
    {
#pragma omp for
        for (int64_t chunk = 0; chunk < l.chunks; chunk++)
            count_buckets(a, chunk_of(a, chunk), l.buckets, l.ends + chunk * l.buckets);
#pragma omp single
        scan_buckets(&l);
#pragma omp for
        for (int64_t chunk = 0; chunk < l.chunks; chunk++)
            place_in_buckets(a, chunk_of(a, chunk), l.ends + chunk * l.buckets, l.records);
            // Buckets differ in size when the routing is skewed: whoever is free takes the next.
#pragma omp for schedule(dynamic)
        for (int64_t bucket = 0; bucket < l.buckets; bucket++)
            sort_bucket(a, &l, bucket, l.counters + (int64_t)omp_get_thread_num() * LOW);
    }
    return verdict(a);
}

/* ---- The ladder -------------------------------------------------------------------------------------------------- */

// [best]
// One level while a thread's counters fit its second-level cache (1 MB here), two beyond.
static bool counters_fit(const fmoe_schedule_args *a) {
    return a->N < 1 << 18;
}
// [/best]

fmoe_status cpu_schedule_best(const void *args, void *workspace, size_t bytes, void *stream) {
    return (counters_fit(args) ? counting_threads : two_levels)(args, workspace, bytes, stream);
}

size_t cpu_schedule_best_workspace(const void *args) {
    return (counters_fit(args) ? threads_workspace : two_levels_workspace)(args);
}

const fmoe_rung chapter4_rungs[] = {
    {.name = "comparison sort",
     .idea = "The C library's qsort on (expert, pair) keys: about log2(T·K) comparisons a pair, each a function call.",
     .run = comparison_sort,
     .workspace = keys_workspace},
    {.name = "counting sort",
     .idea = "Experts are small integers: count, scan, place. Two passes over the indices and no comparison.",
     .run = counting_sort,
     .workspace = counters_workspace},
    {.name = "radix sort",
     .idea = "One byte of the expert at a time, lowest first: only 256 counters and places to write, but more passes.",
     .run = radix_sort,
     .workspace = two_keys_workspace},
    {.name = "threads",
     .idea =
         "Counting sort with a histogram a thread; the scan runs by expert, then by slice, so the order stays stable.",
     .run = counting_threads,
     .workspace = threads_workspace},
    {.name = "two levels",
     .idea = "Buckets of 4096 experts first, then experts in a bucket: no counter leaves the cache, whatever N is.",
     .run = two_levels,
     .workspace = two_levels_workspace},
    {0},
};
