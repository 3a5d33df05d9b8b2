/* Exercise 4.3, solution: sixteen records are collected a bucket, in the first-level cache, and written as one line. */
#include "plugin.h"

#include "4-schedule/cpu.c" // NOLINT(bugprone-suspicious-include): the chapter's rungs, so that only what changes stands here

static uint32_t record_of(const fmoe_schedule_args *a, range pairs, int64_t pair) {
    return (expert_of(a, pair) & (LOW - 1)) << CHUNK_BITS | (uint32_t)(pair - pairs.begin);
}

#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum { MOST = 1024, LINE = 16 }; // buckets that have a buffer, 64 KB in all; records of a cache line

/* A whole line, past the caches where the processor can. */
static inline void write_line(uint32_t *to, const uint32_t *line) {
#ifdef __SSE2__
    for (int i = 0; i < LINE; i += 4)
        _mm_stream_si128((__m128i *)(to + i), _mm_load_si128((const __m128i *)(line + i)));
#else
    memcpy(to, line, LINE * sizeof *line);
#endif
}

// [place]
/* Few buckets, or too many, are written to one record at a time. */
static bool collects(int64_t buckets) {
    return buckets >= 64 && buckets <= MOST;
}

/* A record waits at the place in its bucket's buffer that it will have in its line of memory. A chunk shares its first
 * and its last line of a bucket with its neighbours, so of those it writes its own records only. */
static void place(const fmoe_schedule_args *a, range pairs, int64_t buckets, int32_t *next, uint32_t *records) {
    _Alignas(64) uint32_t buffer[MOST][LINE];
    int32_t begin[MOST];
    bool collected = collects(buckets);
    memcpy(begin, next, (size_t)(collected ? buckets : 0) * sizeof *begin);
    for (int64_t pair = pairs.begin; pair < pairs.end; pair++) {
        uint32_t bucket = expert_of(a, pair) >> LOW_BITS, record = record_of(a, pairs, pair);
        int32_t at = next[bucket]++;
        if (!collected) {
            records[at] = record;
            continue;
        }
        buffer[bucket][at % LINE] = record;
        if (at % LINE != LINE - 1)
            continue;
        int32_t line = at - (LINE - 1), from = line < begin[bucket] ? begin[bucket] : line;
        if (from == line)
            write_line(records + line, buffer[bucket]);
        else
            memcpy(records + from, buffer[bucket] + from % LINE, (size_t)(at + 1 - from) * sizeof *records);
    }
    for (int64_t bucket = 0; collected && bucket < buckets; bucket++) {
        int32_t end = next[bucket], line = end - end % LINE, from = line < begin[bucket] ? begin[bucket] : line;
        memcpy(records + from, buffer[bucket] + from % LINE, (size_t)(end - from) * sizeof *records);
    }
}
// [/place]

static fmoe_status run(const void *args, void *workspace, size_t bytes, void *stream) {
    const fmoe_schedule_args *a = args;
    (void)bytes, (void)stream;
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
            place(a, chunk_of(a, chunk), l.buckets, l.ends + chunk * l.buckets, l.records);
#pragma omp for schedule(dynamic)
        for (int64_t bucket = 0; bucket < l.buckets; bucket++)
            sort_bucket(a, &l, bucket, l.counters + (int64_t)omp_get_thread_num() * LOW);
    }
    return verdict(a);
}

const fmoe_plugin fmoe_plugin_rung = {.version = FMOE_STEPS_VERSION,
                                      .step = "schedule",
                                      .name = "my places",
                                      .run = run,
                                      .workspace = two_levels_workspace};
