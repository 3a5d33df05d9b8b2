/* Exercise 4.1, starter, right: the ladder's rung "two levels", to be tried with other sizes of a bucket. */
#include "plugin.h"

#include <omp.h>
#include <string.h>

// A bucket is LOW experts in a row. A chunk is as many pairs as CHUNK_BITS can number, and a record of the first level
// is (expert within the bucket, pair within the chunk) in 32 bits.
enum { LOW_BITS = 12, LOW = 1 << LOW_BITS, CHUNK_BITS = 16, CHUNK = 1 << CHUNK_BITS };

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

typedef struct {
    int64_t begin, end;
} range;

// Too few pairs to pay for waking a team.
static bool worth_threads(const fmoe_schedule_args *a) {
    return num_pairs(a) > 1 << 14;
}

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

static void place_in_buckets(const fmoe_schedule_args *a, range pairs, int32_t *next, uint32_t *records) {
    for (int64_t pair = pairs.begin; pair < pairs.end; pair++) {
        uint32_t expert = expert_of(a, pair);
        records[next[expert >> LOW_BITS]++] = (expert & (LOW - 1)) << CHUNK_BITS | (uint32_t)(pair - pairs.begin);
    }
}

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

const fmoe_plugin fmoe_plugin_rung = {.version = FMOE_STEPS_VERSION,
                                      .step = "schedule",
                                      .name = "my buckets",
                                      .run = two_levels,
                                      .workspace = two_levels_workspace};
