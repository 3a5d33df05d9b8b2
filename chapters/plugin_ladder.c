/* --plugin: the reader's rung in the chapters' program. Checked over its step's grid, then a line of the ladder. */
#include "doors.h"
#include "device.h"
#include "program.h"

#include "../ref_cpu/check.h"

#include <stdlib.h>
#include <string.h>

door_options door_opt = {.limit_s = 10};

static plugin mine;
static bool right;        /* over the whole grid */
static fmoe_rung *joined; /* a ladder and the plugin after it */

/* ---- The grid ---------------------------------------------------------------------------------------------------- */

typedef struct {
    int passed, unsupported, skipped;
    bool shown;
    char why[DOOR_TEXT]; /* a case could not be drawn */
} grid_count;

/* Failures beyond the first say little that is new. */
static void count_case(const char *case_name, const door_result *r, void *context) {
    grid_count *count = context;
    count->passed += r->verdict == DOOR_RIGHT;
    count->unsupported += r->verdict == DOOR_UNSUPPORTED;
    count->skipped += r->verdict == DOOR_NO_CASE;
    if (r->verdict == DOOR_NO_CASE)
        memcpy(count->why, r->why, sizeof count->why);
    if (r->verdict == DOOR_RIGHT || r->verdict == DOOR_UNSUPPORTED || r->verdict == DOOR_NO_CASE || count->shown)
        return;
    printf("  FAILED at %s: %s\n", case_name, r->why);
    if (*r->hint)
        printf("    hint: %s\n", r->hint);
    count->shown = true;
}

static const fmoe_ladder *ladder_of(const fmoe_chapter *chapter, const char *step) {
    for (const fmoe_ladder *ladder = chapter->ladders; ladder && ladder->step; ladder++)
        if (!strcmp(ladder->step->op, step))
            return ladder;
    return NULL;
}

static bool refuse(const char *why) {
    printf("plugin %s: %s\n", mine.path, why);
    fflush(stdout);
    return false;
}

/* Loaded, for a step of this chapter, for a device that there is. */
static const fmoe_ladder *place_of(const fmoe_chapter *chapter) {
    char why[DOOR_TEXT];
    const fmoe_ladder *ladder = mine.ready ? ladder_of(chapter, mine.about.step) : NULL;
    if (!mine.ready) {
        refuse(mine.why);
    } else if (!ladder) {
        snprintf(why, sizeof why, "its step is \"%s\", and chapter %d has no such ladder", mine.about.step,
                 chapter->number);
        refuse(why);
    } else if (mine.about.backend == BACKEND_CUDA && !fmoe_device_get()->present) {
        snprintf(why, sizeof why, "takes device pointers: %s", fmoe_device_get()->why_not);
        refuse(why);
        ladder = NULL;
    }
    return ladder;
}

bool plugin_introduce(const fmoe_chapter *chapter) {
    if (!door_opt.plugin)
        return true;
    plugin_open(&mine, door_opt.plugin, door_opt.limit_s);
    const fmoe_ladder *ladder = place_of(chapter);
    if (!ladder)
        return false;
    printf("plugin %s: \"%s\" for %s, %s pointers\n", mine.path, mine.about.name, mine.about.step,
           mine.about.backend == BACKEND_CUDA ? "device" : "host");
    if (*mine.about.idea)
        printf("  %s\n", mine.about.idea);
    fflush(stdout);
    grid_count count = {0};
    int failed = plugin_grid(&mine, ladder->step, count_case, &count);
    printf("  %d cases right, %d wrong, %d that it does not take\n", count.passed, failed, count.unsupported);
    if (count.skipped)
        printf("  %d could not be drawn here: %s\n", count.skipped, count.why);
    fflush(stdout);
    right = failed == 0 && count.passed > 0;
    return right;
}

/* ---- The ladder -------------------------------------------------------------------------------------------------- */

static fmoe_status elsewhere(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    (void)args, (void)workspace, (void)workspace_bytes, (void)stream;
    return fmoe_fail(FMOE_UNSUPPORTED, "a plugin runs in a process of its own");
}

bool plugin_climbs(const fmoe_step *step) {
    return mine.ready && !strcmp(mine.about.step, step->op);
}

const fmoe_rung *plugin_join(const fmoe_rung *rungs, const fmoe_step *step, fmoe_backend backend) {
    size_t count = 0;
    if (!plugin_climbs(step) || mine.about.backend != backend)
        return rungs;
    while (rungs[count].run)
        count++;
    free(joined);
    joined = calloc(count + 2, sizeof *joined);
    if (!joined)
        return rungs;
    memcpy(joined, rungs, count * sizeof *joined);
    joined[count] = (fmoe_rung){.name = mine.about.name, .backend = backend, .idea = mine.about.idea, .run = elsewhere};
    return joined;
}

bool plugin_is(const fmoe_rung *rung) {
    return rung->run == elsewhere;
}

door_result plugin_measure(fmoe_problem *problem) {
    if (right)
        return plugin_check(&mine, problem, true);
    door_result r = {.verdict = DOOR_WRONG};
    snprintf(r.why, sizeof r.why, "not timed: see its check above");
    return r;
}

void plugin_dismiss(void) {
    plugin_close(&mine);
    free(joined);
    joined = NULL;
    mine = (plugin){0};
}
