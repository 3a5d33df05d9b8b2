/* --grade: a plugin's verdict and score. 70 points for the cases of its step's grid that are right; and where all are,
 * 30 for its time at the ladder's cases against a rung of this repository, timed in turns with it. */
#include "doors.h"
#include "device.h"
#include "program.h"

#include "../ref_cpu/check.h"

#include <jansson.h>
#include <math.h>
#include <string.h>
#include <time.h>

enum { CORRECT_POINTS = 70, TIME_POINTS = 30, TURNS = 3 };

/* What is known so far; the JSON document says the same. grade.schema.json describes it. */
typedef struct {
    plugin kernel;
    const fmoe_chapter *chapter;
    const fmoe_ladder *ladder;
    const fmoe_rung *against;
    int right, counted;
    double correct_points, time_points, log_ratio;
    int timed;
    bool time_failed;
    json_t *cases, *times;
    char message[DOOR_TEXT];
} grade;

/* ---- Correctness ------------------------------------------------------------------------------------------------- */

static json_t *number_or_null(double value) {
    return isfinite(value) ? json_real(value) : json_null();
}

static json_t *text_or_null(const char *text) {
    json_t *value = text && *text ? json_string(text) : NULL;
    return value ? value : json_null();
}

static void judge(const char *case_name, const door_result *r, void *context) {
    grade *g = context;
    bool counts = r->verdict != DOOR_UNSUPPORTED && r->verdict != DOOR_NO_CASE;
    g->counted += counts;
    g->right += r->verdict == DOOR_RIGHT;
    json_array_append_new(g->cases, json_pack("{s:s, s:s, s:o, s:f, s:o, s:o}", "case", case_name, "verdict",
                                              door_verdict_name(r->verdict), "error", number_or_null(r->error), "limit",
                                              r->limit, "why", text_or_null(r->why), "hint", text_or_null(r->hint)));
    printf("  %-44s %s%s%s\n", case_name, door_verdict_name(r->verdict), counts && *r->why ? ": " : "",
           counts ? r->why : "");
    if (*r->hint)
        printf("  %44s hint: %s\n", "", r->hint);
    fflush(stdout);
}

/* ---- Time -------------------------------------------------------------------------------------------------------- */

typedef struct {
    const fmoe_rung *rung;
    const fmoe_problem *problem;
    workspace space;
    fmoe_status status;
} rung_call;

static void call_rung(void *context) {
    rung_call *c = context;
    if (c->rung->run(c->problem->args, c->space.memory, c->space.bytes, NULL) != FMOE_OK)
        c->status = FMOE_UNSUPPORTED;
}

static bool time_rung(const fmoe_rung *rung, fmoe_problem *p, double *ms) {
    fmoe_timing timing = {0};
    rung_call c = {.rung = rung, .problem = p};
    if (rung->backend == BACKEND_CUDA) {
        c.status = fmoe_device_time(rung, p, &timing);
    } else if ((c.status = workspace_new(rung_workspace(rung, p), &c.space)) == FMOE_OK) {
        timing = fmoe_time(call_rung, &c);
        workspace_free(&c.space);
    }
    *ms = fmin(*ms, timing.median_ms);
    return c.status == FMOE_OK;
}

/* In turns, the better of three medians each: what else runs on the machine should not decide a grade. */
static bool compare_times(grade *g, fmoe_problem *p, double *kernel_ms, double *rung_ms, char *why) {
    *kernel_ms = *rung_ms = INFINITY;
    for (int turn = 0; turn < TURNS; turn++) {
        door_result r = plugin_check(&g->kernel, p, true);
        memcpy(why, r.why, sizeof r.why);
        if (r.verdict == DOOR_UNSUPPORTED)
            return false;
        if (r.verdict != DOOR_RIGHT || !time_rung(g->against, p, rung_ms)) {
            g->time_failed = true;
            return false;
        }
        *kernel_ms = fmin(*kernel_ms, r.timing.median_ms);
    }
    return true;
}

static void time_case(grade *g, const char *name) {
    fmoe_case c;
    fmoe_problem p;
    char why[DOOR_TEXT] = "";
    if (fmoe_case_parse(name, &c) != FMOE_OK || fmoe_problem_new(g->ladder->step, &c, fmoe_opt.seed, &p) != FMOE_OK) {
        printf("  %-44s %s\n", name, fmoe_error_message());
        return;
    }
    double kernel_ms, rung_ms;
    fmoe_progress("%s: %s", g->kernel.about.name, name);
    bool supported = rung_supports(g->against, &p, why) == FMOE_OK;
    bool ok = supported && compare_times(g, &p, &kernel_ms, &rung_ms, why);
    fmoe_progress("%s", "");
    fmoe_problem_free(&p);
    if (!ok) {
        printf("  %-44s not timed: %s\n", name, why);
        return;
    }
    g->log_ratio += log(rung_ms / kernel_ms);
    g->timed++;
    json_array_append_new(g->times, json_pack("{s:s, s:f, s:f, s:f}", "case", name, "kernel_ms", kernel_ms, "rung_ms",
                                              rung_ms, "ratio", rung_ms / kernel_ms));
    printf("  %-44s %10.4f ms, %s %10.4f ms: %.3g times its speed\n", name, kernel_ms, g->against->name, rung_ms,
           rung_ms / kernel_ms);
    fflush(stdout);
}

static void time_cases(grade *g) {
    const char *const *cases = fmoe_opt.quick && g->ladder->quick_cases ? g->ladder->quick_cases : g->ladder->cases;
    if (g->kernel.about.backend == BACKEND_CUDA && g->ladder->cuda_cases && !fmoe_opt.quick)
        cases = g->ladder->cuda_cases;
    if (opt_more.num_cases)
        cases = opt_more.cases;
    for (; cases && *cases; cases++)
        time_case(g, *cases);
    /* The geometric mean: twice as fast here and half as fast there is even. */
    double mean = g->timed ? exp(g->log_ratio / g->timed) : 0;
    g->time_points = g->time_failed ? 0 : TIME_POINTS * fmin(1, mean);
}

/* The named rung, or the last that is no library's: the one that the ladder leads to. */
static const fmoe_rung *rung_against(const grade *g) {
    const fmoe_rung *found = NULL;
    const fmoe_rung *rungs = g->kernel.about.backend == BACKEND_CUDA ? g->ladder->cuda : g->ladder->rungs;
    for (const fmoe_rung *rung = rungs; rung && rung->run; rung++)
        if (door_opt.against ? !strcmp(rung->name, door_opt.against) : !rung->library)
            found = rung;
    return found;
}

/* ---- The whole --------------------------------------------------------------------------------------------------- */

static bool prepare(grade *g) {
    plugin_open(&g->kernel, door_opt.grade, door_opt.limit_s);
    if (!g->kernel.ready) {
        memcpy(g->message, g->kernel.why, sizeof g->message);
        return false;
    }
    for (const fmoe_ladder *ladder = g->chapter->ladders; ladder && ladder->step; ladder++)
        if (!strcmp(ladder->step->op, g->kernel.about.step))
            g->ladder = ladder;
    if (!g->ladder)
        snprintf(g->message, sizeof g->message, "its step is \"%s\", and chapter %d has no such ladder",
                 g->kernel.about.step, g->chapter->number);
    else if (g->kernel.about.backend == BACKEND_CUDA && !fmoe_device_get()->present)
        snprintf(g->message, sizeof g->message, "takes device pointers: %s", fmoe_device_get()->why_not);
    else if (!(g->against = rung_against(g)))
        snprintf(g->message, sizeof g->message, "--against '%s': the ladder of %s has no such rung",
                 door_opt.against ? door_opt.against : "", g->ladder->step->op);
    return !*g->message;
}

static const char *verdict_of(const grade *g) {
    if (*g->message)
        return "not graded";
    return g->counted > 0 && g->right == g->counted && !g->time_failed ? "right" : "wrong";
}

static bool write_json(const grade *g, const char *path) {
    char date[16];
    time_t now = time(NULL);
    struct tm day;
    strftime(date, sizeof date, "%Y-%m-%d", localtime_r(&now, &day));
    const door_about *about = &g->kernel.about;
    bool cuda = about->backend == BACKEND_CUDA;
    json_t *all =
        json_pack("{s:i, s:i, s:o, s:s, s:o, s:s, s:s, s:s, s:I, s:i, s:s, s:f, s:o, s:{s:f, s:i, s:i, s:i, s:O}, "
                  "s:{s:f, s:i, s:o, s:O}}",
                  "format", 1, "chapter", g->chapter->number, "step", text_or_null(about->step), "kernel",
                  g->kernel.path, "name", text_or_null(about->name), "backend", backend_name(about->backend), "device",
                  cuda ? fmoe_device_get()->name : machine_device(), "date", date, "seed", (json_int_t)fmoe_opt.seed,
                  "threads", fmoe_opt.threads, "verdict", verdict_of(g), "score", g->correct_points + g->time_points,
                  "message", text_or_null(g->message), "correctness", "points", g->correct_points, "of", CORRECT_POINTS,
                  "right", g->right, "counted", g->counted, "cases", g->cases, "time", "points", g->time_points, "of",
                  TIME_POINTS, "against", text_or_null(g->against ? g->against->name : NULL), "cases", g->times);
    make_folders(path);
    bool ok = all && json_dump_file(all, path, JSON_INDENT(2) | JSON_REAL_PRECISION(6)) == 0;
    json_decref(all);
    return ok;
}

static void run_grade(grade *g) {
    printf("%s: \"%s\" for %s, against the rung \"%s\"\n", g->kernel.path, g->kernel.about.name, g->kernel.about.step,
           g->against->name);
    plugin_grid(&g->kernel, g->ladder->step, judge, g);
    g->correct_points = g->counted ? (double)(CORRECT_POINTS * g->right) / g->counted : 0;
    if (g->counted > 0 && g->right == g->counted)
        time_cases(g);
    else
        printf("  not timed: first it has to be right\n");
}

int grade_main(const fmoe_chapter *chapter) {
    grade g = {.chapter = chapter, .cases = json_array(), .times = json_array()};
    char path[512];
    if (door_opt.json)
        snprintf(path, sizeof path, "%s", door_opt.json);
    else
        snprintf(path, sizeof path, "build/results/grade%d.json", chapter->number);
    if (prepare(&g))
        run_grade(&g);
    else
        printf("%s: %s\n", door_opt.grade, g.message);
    printf("\n%s: %.1f of %d points for %d of %d cases, %.1f of %d for time: score %.0f\n", verdict_of(&g),
           g.correct_points, CORRECT_POINTS, g.right, g.counted, g.time_points, TIME_POINTS,
           g.correct_points + g.time_points);
    bool written = write_json(&g, path);
    if (written)
        printf("details: %s\n", path);
    else
        fprintf(stderr, "--json '%s': could not be written\n", path);
    int status = *g.message || !written ? 2 : strcmp(verdict_of(&g), "right") != 0;
    plugin_close(&g.kernel);
    json_decref(g.cases);
    json_decref(g.times);
    return status;
}
