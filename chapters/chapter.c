/* The program that climbs a chapter's ladders: check, time, print, record, draw. */
#include "device.h"
#include "doors.h"
#include "program.h"
#include "verify.h"

#include "../ref_cpu/check.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void fmoe_progress(const char *format, ...) {
    if (!isatty(STDERR_FILENO))
        return;
    fflush(stdout);
    va_list args;
    va_start(args, format);
    fputs("\r\033[K", stderr);
    vfprintf(stderr, format, args);
    va_end(args);
    fflush(stderr);
}

/* ---- A rung ------------------------------------------------------------------------------------------------------ */

typedef enum { MEASURED, NOT_HERE, WRONG } outcome_kind;

typedef struct {
    outcome_kind kind;
    fmoe_timing timing;
    double error;
    char why[240];
} outcome;

typedef struct {
    const fmoe_rung *rung;
    const fmoe_problem *problem;
    workspace space;
    fmoe_status status;
} timed_run;

static void run_once(void *context) {
    timed_run *run = context;
    fmoe_status status = run->rung->run(run->problem->args, run->space.memory, run->space.bytes, NULL);
    if (status != FMOE_OK)
        run->status = status;
}

static outcome wrong(double error, const char *format, ...) __attribute__((format(printf, 2, 3)));
static outcome wrong(double error, const char *format, ...) {
    outcome o = {.kind = WRONG, .error = error};
    va_list args;
    va_start(args, format);
    vsnprintf(o.why, sizeof o.why, format, args);
    va_end(args);
    return o;
}

/* A reader's own rung, in its own process. */
static outcome measure_plugin(fmoe_problem *p) {
    door_result r = plugin_measure(p);
    outcome o = {.timing = r.timing, .error = r.error};
    bool right = r.verdict == DOOR_RIGHT;
    o.kind = right ? MEASURED : r.verdict == DOOR_UNSUPPORTED ? NOT_HERE : WRONG;
    snprintf(o.why, sizeof o.why, "%.235s", r.why);
    return o;
}

/* Checks the rung, then times it: on the GPU in turns with the library's rung, if there is one, whose time is then
 * taken anew. */
static outcome measure(const fmoe_rung *rung, fmoe_problem *p, const fmoe_rung *library, fmoe_timing *of_library) {
    outcome o = {.kind = MEASURED};
    char why[200];
    if (plugin_is(rung))
        return measure_plugin(p);
    fmoe_status status = fmoe_rung_check(rung, p, &o.error, why);
    if (status == FMOE_UNSUPPORTED) {
        o.kind = NOT_HERE;
        snprintf(o.why, sizeof o.why, "%s", why);
        return o;
    }
    double limit = fmoe_error_limit(p->c.dtype);
    if (status != FMOE_OK)
        return wrong(o.error, "%s", why);
    if (!(o.error <= limit))
        return wrong(o.error, "error %.1e over %.0e: %s", o.error, limit, why);
    if (rung->backend == BACKEND_CUDA) {
        fmoe_timing timings[2];
        status = fmoe_device_time_in_turns(rung, library, p, timings);
        if (status != FMOE_OK)
            return wrong(o.error, "%.200s", fmoe_error_message());
        o.timing = timings[0];
        if (library)
            *of_library = timings[1];
        return o;
    }
    timed_run run = {.rung = rung, .problem = p};
    if (workspace_new(rung_workspace(rung, p), &run.space) != FMOE_OK)
        return wrong(o.error, "%.200s", fmoe_error_message());
    o.timing = fmoe_time(run_once, &run);
    if (run.status != FMOE_OK)
        o = wrong(o.error, "%s when run again", fmoe_status_name(run.status));
    else if (workspace_check(&run.space, why) != FMOE_OK)
        o = wrong(o.error, "%s", why);
    workspace_free(&run.space);
    return o;
}

/* ---- A ladder at a case ------------------------------------------------------------------------------------------ */

static recorded_data recorded;
static bool any_wrong;

static bool is_chosen(const fmoe_rung *rung) {
    if (plugin_is(rung))
        return true;
    return only_chosen(rung->name) && (int)rung->level <= fmoe_opt.level;
}

static bool any_chosen(const fmoe_ladder *ladder) {
    const fmoe_rung *rung;
    for (int i = 0; (rung = ladder_rung(ladder, i)); i++)
        if (is_chosen(rung))
            return true;
    return false;
}

/* Where there is no device, what others recorded is shown in place of the GPU's rungs. */
static bool climbs_gpu(const fmoe_ladder *ladder) {
    return ladder->cuda && fmoe_device_get()->present;
}

static bool has_library(const fmoe_rung *rungs) {
    for (const fmoe_rung *rung = rungs; rung->run; rung++)
        if (rung->library && is_chosen(rung))
            return true;
    return false;
}

/* Times seen so far at this case; 0 where there is none yet. */
typedef struct {
    double before_ms, first_ms, best_cpu_ms, library_ms;
} baselines;

static void show(const fmoe_rung *rung, const outcome *o, const fmoe_work *work, const baselines *base) {
    char note[300];
    switch (o->kind) {
    case NOT_HERE:
        table_note(rung->name, level_name(rung->level), o->why);
        break;
    case WRONG:
        snprintf(note, sizeof note, "FAILED: %s", o->why);
        table_note(rung->name, level_name(rung->level), note);
        break;
    case MEASURED:
        snprintf(note, sizeof note, "pass%s%s", *o->why ? ", " : "", o->why);
        if (o->timing.median_ms > 2 * o->timing.min_ms) /* other programs were running */
            snprintf(note, sizeof note, "pass, fastest %.4f", o->timing.min_ms);
        table_line(&(table_row){.name = rung->name,
                                .level = level_name(rung->level),
                                .ms = o->timing.median_ms,
                                .before_ms = rung->library ? 0 : base->before_ms,
                                .base_ms = rung->backend == BACKEND_CUDA ? base->best_cpu_ms : base->first_ms,
                                .library_ms = rung->library ? 0 : base->library_ms,
                                .floor_ms = work->floor_ms,
                                .error = o->error,
                                .verdict = note});
    }
    fflush(stdout);
}

static void remember(const fmoe_rung *rung, double ms, baselines *base) {
    if (rung->backend == BACKEND_CPU && !(base->best_cpu_ms > 0 && base->best_cpu_ms < ms))
        base->best_cpu_ms = ms;
    if (rung->library)
        return;
    base->before_ms = ms;
    if (!(base->first_ms > 0))
        base->first_ms = ms;
}

/* The library's time stands in every line, so it is taken first and shown in its turn; on the GPU it is taken again in
 * turns with every rung, and what is shown and recorded is the last. */
static outcome measure_library(const fmoe_rung *rungs, fmoe_problem *p, const fmoe_rung **library) {
    outcome o = {0};
    *library = NULL;
    for (const fmoe_rung *rung = rungs; rung->run && !*library; rung++)
        if (rung->library && is_chosen(rung)) {
            fmoe_progress("%s %s: %s", p->step->op, p->c.name, rung->name);
            o = measure(rung, p, NULL, NULL);
            *library = rung;
        }
    return o;
}

/* One back end's rungs; best_cpu_ms is what its CPU rungs reached, for the GPU's to be compared with. */
static void climb(const fmoe_rung *rungs, fmoe_problem *p, const fmoe_work *work, double *best_cpu_ms) {
    const fmoe_rung *library;
    outcome of_library = measure_library(rungs, p, &library);
    bool on_gpu = library && library->backend == BACKEND_CUDA;
    baselines base = {.best_cpu_ms = *best_cpu_ms};
    for (const fmoe_rung *rung = rungs; rung->run; rung++) {
        if (!is_chosen(rung))
            continue;
        if (fmoe_opt.predict)
            predict_ask(rung, base.before_ms);
        fmoe_progress("%s %s: %s", p->step->op, p->c.name, rung->name);
        const fmoe_rung *beside = on_gpu && of_library.kind == MEASURED ? library : NULL;
        outcome o = rung == library ? of_library : measure(rung, p, beside, &of_library.timing);
        base.library_ms = of_library.timing.median_ms;
        fmoe_progress("%s", "");
        show(rung, &o, work, &base);
        any_wrong |= o.kind == WRONG;
        if (o.kind != MEASURED)
            continue;
        predict_measured(rung->name, o.timing.median_ms);
        remember(rung, o.timing.median_ms, &base);
        fmoe_csv_row(p->step->op, p->c.name, rung->name, rung->level, rung->backend, p->c.dtype, o.timing, o.error,
                     *work);
    }
    *best_cpu_ms = base.best_cpu_ms;
}

static fmoe_work work_on(const fmoe_problem *p, const fmoe_ceilings *machine) {
    fmoe_work work = p->step->work(p, machine);
    if (work.floor_ms > 0)
        printf("  floor %.4g ms: %s\n", work.floor_ms, work.floor_why ? work.floor_why : "");
    return work;
}

/* The ladder's rungs on the CPU, or only the last of them. */
static const fmoe_rung *cpu_rungs(const fmoe_ladder *ladder, bool last_only) {
    const fmoe_rung *rungs = ladder->rungs;
    while (last_only && rungs->run && rungs[1].run)
        rungs++;
    return rungs;
}

/* 0, or the status to exit with. */
static int climb_case(const fmoe_ladder *ladder, const char *name, bool last_cpu_rung_only) {
    fmoe_case c;
    fmoe_problem p;
    fmoe_progress("%s %s: drawing the inputs, computing the reference", ladder->step->op, name);
    fmoe_status status = fmoe_case_parse(name, &c);
    if (status == FMOE_OK)
        status = fmoe_problem_new(ladder->step, &c, fmoe_opt.seed, &p);
    fmoe_progress("%s", "");
    if (status != FMOE_OK) {
        fprintf(stderr, "%s %s: %s: %s\n", ladder->step->op, name, fmoe_status_name(status), fmoe_error_message());
        return opt_more.num_cases ? 2 : 1;
    }
    const fmoe_rung *rungs = cpu_rungs(ladder, last_cpu_rung_only);
    double best_cpu_ms = 0;
    printf("\n%s  %s\n", ladder->step->op, name);
    fmoe_work work = work_on(&p, fmoe_machine_ceilings());
    table_header("first", has_library(rungs));
    climb(last_cpu_rung_only ? rungs : plugin_join(rungs, ladder->step, BACKEND_CPU), &p, &work, &best_cpu_ms);
    if (climbs_gpu(ladder)) {
        printf("  on %s\n", fmoe_device_get()->name);
        work = work_on(&p, fmoe_device_ceilings());
        table_header("cpu", has_library(ladder->cuda));
        climb(plugin_join(ladder->cuda, ladder->step, BACKEND_CUDA), &p, &work, &best_cpu_ms);
    }
    recorded_show(&recorded, ladder->step->op, name, !climbs_gpu(ladder));
    predict_compare();
    fmoe_problem_free(&p);
    return 0;
}

/* ---- A chapter's ladders and cases ------------------------------------------------------------------------------- */

/* The name with --dtype in place of its own type. */
static void with_dtype(const char *name, char *out, size_t size) {
    fmoe_case c;
    snprintf(out, size, "%s", name);
    if (!opt_more.dtype_given || fmoe_case_parse(name, &c) != FMOE_OK)
        return;
    const char *old = fmoe_dtype_name(c.dtype), *new = fmoe_dtype_name(opt_more.dtype);
    for (const char *word = strstr(name, old); word; word = strstr(word + 1, old)) {
        char after = word[strlen(old)];
        if ((word == name || word[-1] == '-') && (after == '-' || !after)) {
            snprintf(out, size, "%.*s%s%s", (int)(word - name), name, new, word + strlen(old));
            return;
        }
    }
    snprintf(out, size, "%s-%s", name, new);
}

/* A chapter with several ladders takes a --case to those whose own cases spell the same sizes. */
static bool case_fits(const fmoe_chapter *chapter, const fmoe_ladder *ladder, const char *name) {
    return !chapter->ladders[1].step || !ladder->cases || !ladder->cases[0] ||
           case_letters(ladder->cases[0]) == case_letters(name);
}

static int check_cases(const fmoe_chapter *chapter) {
    for (int i = 0; i < opt_more.num_cases; i++) {
        bool fits = false;
        for (const fmoe_ladder *ladder = chapter->ladders; ladder && ladder->step; ladder++)
            fits |= case_fits(chapter, ladder, opt_more.cases[i]);
        if (!fits) {
            fprintf(stderr,
                    "--case '%s': no ladder of this chapter has these sizes; ./chapter%d --list shows its cases\n",
                    opt_more.cases[i], chapter->number);
            return 2;
        }
    }
    return 0;
}

static bool seen_before(const char *const *cases, int count, const char *name) {
    char other[128];
    for (int i = 0; i < count; i++) {
        with_dtype(cases[i], other, sizeof other);
        if (!strcmp(other, name))
            return true;
    }
    return false;
}

static int count(const char *const *names) {
    int number = 0;
    while (names && names[number])
        number++;
    return number;
}

static int climb_cases(const fmoe_chapter *chapter, const fmoe_ladder *ladder, const char *const *cases,
                       bool last_cpu_rung_only) {
    for (int i = 0; cases && cases[i]; i++) {
        char name[128];
        with_dtype(cases[i], name, sizeof name);
        if (last_cpu_rung_only && seen_before(ladder->cases, count(ladder->cases), name))
            continue;
        if ((opt_more.num_cases && !case_fits(chapter, ladder, cases[i])) || seen_before(cases, i, name))
            continue;
        int status = climb_case(ladder, name, last_cpu_rung_only);
        if (status)
            return status;
    }
    return 0;
}

static int climb_ladder(const fmoe_chapter *chapter, const fmoe_ladder *ladder) {
    if (!any_chosen(ladder) && !plugin_climbs(ladder->step))
        return 0;
    const char *const *cases = fmoe_opt.quick && ladder->quick_cases ? ladder->quick_cases : ladder->cases;
    if (opt_more.num_cases && (ladder->cases || climbs_gpu(ladder)))
        cases = opt_more.cases; /* ended by NULL: one more place than --case fills */
    int status = climb_cases(chapter, ladder, cases, false);
    if (!status && !opt_more.num_cases && !fmoe_opt.quick && climbs_gpu(ladder))
        status = climb_cases(chapter, ladder, ladder->cuda_cases, true);
    if (!status && !opt_more.num_cases && !climbs_gpu(ladder))
        recorded_show_rest(&recorded, ladder->step->op);
    return status;
}

static void print_gpu(const fmoe_chapter *chapter) {
    bool wanted = false;
    for (const fmoe_ladder *ladder = chapter->ladders; ladder->step; ladder++)
        wanted |= ladder->cuda != NULL;
    const fmoe_device *gpu = fmoe_device_get();
    if (wanted && gpu->present) {
        const fmoe_ceilings *m = fmoe_device_ceilings();
        printf("%s (%s): copy %.3g GB/s, FMA %.3g GFLOP/s, 16-bit GEMM %.3g GFLOP/s, a launch %.2g µs\n", gpu->name,
               gpu->driver, m->copy_gbs, m->fma_gflops, m->gemm_gflops, m->fork_join_us);
    } else if (wanted) {
        printf("GPU rungs: %s; recorded ones are shown where there are any\n", gpu->why_not);
    }
}

static void print_machine(const fmoe_chapter *chapter) {
    printf("Chapter %d: %s\n", chapter->number, chapter->title);
    if (!chapter->ladders) {
        printf("%s\n", machine_device());
        return;
    }
    const fmoe_ceilings *m = fmoe_machine_ceilings();
    printf("%s: copy %.3g GB/s, FMA %.3g GFLOP/s, fork and join %.2g µs\n", m->device, m->copy_gbs, m->fma_gflops,
           m->fork_join_us);
    if (m->num_gather > 0)
        printf("gather of random 1 KB rows: %.3g GB/s from %g MB, %.3g GB/s from %g MB\n", m->gather_gbs[0],
               m->gather_mb[0], m->gather_gbs[m->num_gather - 1], m->gather_mb[m->num_gather - 1]);
    print_gpu(chapter);
    fflush(stdout);
}

static int run_chapter(const fmoe_chapter *chapter) {
    int status = chapter->before ? chapter->before() : 0;
    for (const fmoe_ladder *ladder = chapter->ladders; !status && ladder && ladder->step; ladder++)
        status = climb_ladder(chapter, ladder);
    if (!status && chapter->after)
        status = chapter->after();
    return status;
}

/* What else a chapter's program can be asked for: the status to exit with, or -1 to climb the ladders. */
static int other_doors(const fmoe_chapter *chapter) {
    const char *case_name = opt_more.num_cases ? opt_more.cases[0] : NULL;
    if (door_opt.dump)
        return verify_dump(chapter, door_opt.dump, case_name);
    if (door_opt.verify)
        return verify_file(chapter, door_opt.verify, case_name);
    return door_opt.grade ? grade_main(chapter) : -1;
}

int fmoe_chapter_main(const fmoe_chapter *chapter, int argc, char **argv) {
    if (argc == 5 && !strcmp(argv[1], DOOR_WORKER))
        return plugin_worker(argv);
    int status = options_read(chapter, argc, argv);
    if (status < 0)
        status = check_cases(chapter) ? 2 : other_doors(chapter);
    if (status >= 0)
        return status;
    char path[512];
    if (fmoe_opt.csv)
        snprintf(path, sizeof path, "%s", fmoe_opt.csv);
    else
        snprintf(path, sizeof path, "build/results/chapter%d.csv", chapter->number);
    print_machine(chapter);
    if (csv_open(chapter->number, path) != FMOE_OK) {
        fprintf(stderr, "--csv: %s\n", fmoe_error_message());
        return 2;
    }
    recorded_load(chapter->number, &recorded);
    any_wrong = !plugin_introduce(chapter);
    status = run_chapter(chapter);
    plugin_dismiss();
    csv_close();
    recorded_free(&recorded);
    if (status)
        return status;
    printf("\n");
    draw_chapter(chapter, path);
    printf("measurements: %s\n", path);
    if (any_wrong)
        printf("A rung is wrong: see FAILED above.\n");
    return any_wrong;
}
