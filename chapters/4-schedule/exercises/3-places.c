/* Exercise 4.3, starter, right: the rung "two levels" with a first level of its own, which writes a record at a time to
 * as many places as there are buckets. */
#include "plugin.h"

#include "4-schedule/cpu.c" // NOLINT(bugprone-suspicious-include): the chapter's rungs, so that only what changes stands here

static uint32_t record_of(const fmoe_schedule_args *a, range pairs, int64_t pair) {
    return (expert_of(a, pair) & (LOW - 1)) << CHUNK_BITS | (uint32_t)(pair - pairs.begin);
}

// [place]
static void place(const fmoe_schedule_args *a, range pairs, int64_t buckets, int32_t *next, uint32_t *records) {
    (void)buckets;
    for (int64_t pair = pairs.begin; pair < pairs.end; pair++)
        records[next[expert_of(a, pair) >> LOW_BITS]++] = record_of(a, pairs, pair);
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
