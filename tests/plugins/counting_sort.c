/* The smallest plugin: chapter 0's text shows it, and the tests run it from there. */
// [plugin]
#include "plugin.h"

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)workspace, (void)workspace_bytes, (void)stream;
    const fmoe_schedule_args *a = args;
    int32_t *next = a->offsets + 1; /* counts; then where each expert's next pair goes; then where its pairs end */
    for (int64_t e = -1; e < a->N; e++)
        next[e] = 0;
    for (int64_t i = 0; i < a->T * a->K; i++)
        if (a->indices[i] + 1 < a->N)
            next[a->indices[i] + 1]++;
    for (int64_t e = 1; e < a->N; e++)
        next[e] += next[e - 1];
    for (int32_t i = 0; i < a->T * a->K; i++)
        a->pairs[next[a->indices[i]]++] = i;
    return FMOE_OK;
}

const fmoe_plugin fmoe_plugin_rung = {FMOE_STEPS_VERSION, "schedule", "my counting sort", run};
// [/plugin]
