/* Chapter 0: the doors for kernels from outside. A plugin's check, its hints, its grade; files to fill in. The plugins
 * are in tests/plugins; which mistake they make is said in the environment, which their process inherits. */
#include "../chapters/doors.h"
#include "../chapters/device.h"
#include "../chapters/program.h"
#include "../chapters/verify.h"
#include "../cuda/rungs.h"
#include "values.h"

#include <glob.h>
#include <jansson.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- A folder, a program, a plugin ------------------------------------------------------------------------------- */

static char root[512], program[512], output[1 << 17];

/* An empty folder to run in, with the ceilings of a machine that is made up. The sanitizers leave crashes alone. */
static void enter_folder(void) {
    char folder[] = "/tmp/flashmoe-doors-XXXXXX", path[160], self[400] = "", options[512];
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    expect(length > 0 && strstr(self, "/tests/run"), "the tests' program is %s", self);
    *strstr(self, "/tests/run") = 0;
    snprintf(program, sizeof program, "%s/chapter0", self);
    plugin_program = program;
    expect(getcwd(root, sizeof root) && mkdtemp(folder) && !chdir(folder), "no folder under /tmp");
    snprintf(options, sizeof options, "%.300s:handle_segv=0:handle_abort=0",
             getenv("ASAN_OPTIONS") ? getenv("ASAN_OPTIONS") : "");
    setenv("ASAN_OPTIONS", options, 1);
    setenv("FMOE_PLOTS", "nowhere", 1);
    snprintf(path, sizeof path, "build/ceilings-%s.csv", machine_slug());
    make_folders(path);
    FILE *file = fopen(path, "w");
    expect(file && fputs("copy_gbs,,10\ngather_gbs,1,50\nfma_gflops,,100\nfork_join_us,,1\n", file) >= 0, "no file");
    fclose(file);
}

static void leave_folder(void) {
    char folder[256], command[300];
    if (getcwd(folder, sizeof folder) && !strncmp(folder, "/tmp/flashmoe-doors-", 20) && !chdir("/")) {
        snprintf(command, sizeof command, "rm -r '%s'", folder);
        expect(system(command) == 0, "%s stays", folder);
    }
}

static void write_text(const char *path, const char *text) {
    FILE *file = fopen(path, "w");
    expect(file && fputs(text, file) >= 0 && !fclose(file), "%s cannot be written", path);
}

/* A file that is one of tests/plugins with these lines before it. */
static void write_plugin(const char *path, const char *lines, const char *plugin) {
    char text[1024];
    snprintf(text, sizeof text, "%s\n#include \"%s/tests/plugins/%s\"\n", lines, root, plugin);
    write_text(path, text);
}

static bool says(const char *words) {
    return strstr(output, words) != NULL;
}

static void read_output(void) {
    FILE *file = fopen("output.txt", "r");
    size_t length = file ? fread(output, 1, sizeof output - 1, file) : 0;
    output[length] = 0;
    if (file)
        fclose(file);
}

/* Runs the chapter in a process of its own; its status. OpenMP does not survive a fork, so in a sentence this comes
 * before anything that starts threads. */
static int run_chapter(const fmoe_chapter *chapter, const char *const *arguments) {
    char *argv[24] = {"chapter"};
    int argc = 1, status = -1;
    for (; arguments[argc - 1]; argc++)
        argv[argc] = (char *)arguments[argc - 1];
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* where the sentence's time is up */
        if (!freopen("output.txt", "w", stdout) || !freopen("errors.txt", "w", stderr))
            _exit(99);
        int left = fmoe_chapter_main(chapter, argc, argv);
        fflush(NULL);
        _exit(left);
    }
    waitpid(child, &status, 0);
    read_output();
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

#define RUN(chapter, ...) run_chapter(chapter, (const char *const[]){__VA_ARGS__, NULL})

/* What went to stderr, where messages about the command line go. */
static bool complains(const char *words) {
    static char errors[1 << 14];
    FILE *file = fopen("errors.txt", "r");
    size_t length = file ? fread(errors, 1, sizeof errors - 1, file) : 0;
    errors[length] = 0;
    if (file)
        fclose(file);
    return strstr(errors, words) != NULL;
}

/* Chapters of one rung, on small cases. */
static fmoe_status call_mlp(const void *args, void *workspace, size_t bytes, void *stream) {
    return cpu_mlp_best(args, workspace, bytes, stream);
}

static const fmoe_rung mlp_rungs[] = {
    {.name = "ours", .idea = "The best.", .run = call_mlp, .workspace = cpu_mlp_best_workspace},
    {0},
};
static const char *const mlp_cases[] = {"T16-d32-I32-f32", NULL};
static const char *const schedule_cases[] = {"T64-N100-K4-uniform-f32", NULL};
static const fmoe_ladder mlp_ladders[] = {{&fmoe_step_mlp, mlp_rungs, mlp_cases, mlp_cases, NULL, NULL}, {0}};
static const fmoe_ladder schedule_ladders[] = {
    {&fmoe_step_schedule, chapter4_rungs, schedule_cases, schedule_cases, NULL, NULL}, {0}};
static const fmoe_chapter mlp_chapter = {.number = 6, .title = "the mlp", .ladders = mlp_ladders};
static const fmoe_chapter schedule_chapter = {.number = 4, .title = "the schedule", .ladders = schedule_ladders};

/* ---- The text's example ------------------------------------------------------------------------------------------ */

/* The block of code in chapter 0's text that defines a plugin. */
static void copy_from_text(const char *path) {
    static char text[1 << 17];
    char name[600];
    snprintf(name, sizeof name, "%s/chapters/0-machine/README.md", root);
    FILE *file = fopen(name, "r");
    size_t length = file ? fread(text, 1, sizeof text - 1, file) : 0;
    text[length] = 0;
    if (file)
        fclose(file);
    char *variable = strstr(text, "const fmoe_plugin fmoe_plugin_rung"), *begin = NULL;
    for (char *at = text; variable && (at = strstr(at, "```c\n")) && at < variable; at += 5)
        begin = at + 5;
    char *end = begin ? strstr(variable, "\n```") : NULL;
    expect(end != NULL, "%s shows no plugin", name);
    if (end)
        end[1] = 0;
    write_text(path, begin ? begin : "");
}

SENTENCE(0, 40, "The plugin that the text shows is right at every case of its grid, and climbs the ladder.",
         "what a reader types first has to work", "the lines of this chapter's text") {
    enter_folder();
    copy_from_text("mine.c");
    expect(RUN(&schedule_chapter, "--plugin", "mine.c", "--quick") == 0, "%s", output);
    expect(says("\"my counting sort\" for schedule, host pointers") && says(" 0 wrong"), "%s", output);
    char *line = strstr(output, "\n  my counting sort");
    expect(line && strstr(line, "pass"), "it has no line in the table:\n%s", output);
    expect(RUN(&schedule_chapter, "--plugin", "mine.c", "--quick", "--only", "two levels") == 0 &&
               says("\n  my counting sort") && !says("comparison sort"),
           "with --only:\n%s", output);
    expect(RUN(&schedule_chapter, "--plugin", "build/plugins/mine.c.so", "--quick") == 0 && says("my counting sort"),
           "as a library:\n%s", output);
    leave_folder();
}

SENTENCE(0, 41,
         "The grid that plugins are held to has odd sizes, no tokens, skew and every type, and every rung passes.",
         "a grid that is too strict would fail what is right", "the ladders' own rungs, at the same cases") {
    static const struct {
        const fmoe_step *step;
        const fmoe_rung *rungs;
    } ladders[] = {
        {&fmoe_step_router, chapter2_rungs},
        {&fmoe_step_topk, chapter3_rungs},
        {&fmoe_step_schedule, chapter4_rungs},
        {&fmoe_step_expert, chapter1_rungs},
        {&fmoe_step_mlp, chapter6_rungs},
        {&fmoe_step_layer, chapter8_rungs},
        {&fmoe_step_router_backward, chapter9_router_rungs},
        {&fmoe_step_topk_backward, chapter9_topk_rungs},
        {&fmoe_step_expert_backward, chapter9_expert_rungs},
        {&fmoe_step_mlp_backward, chapter9_mlp_rungs},
        {&fmoe_step_layer_backward, chapter9_layer_rungs},
    };
    for (size_t i = 0; i < sizeof ladders / sizeof *ladders; i++) {
        const char *op = ladders[i].step->op;
        bool typed = false, empty = false, odd = false;
        const char *const *name = grid_cases(op, &typed);
        for (; *name; name++) {
            fmoe_case c;
            fmoe_case_parse(*name, &c);
            empty |= c.T == 0;
            odd |= c.T % 4 == 1 && c.T > 4;
            for (fmoe_dtype dtype = FMOE_F32; dtype <= (typed ? FMOE_BF16 : FMOE_F32); dtype++) {
                const char *why =
                    rungs_agree(ladders[i].step, ladders[i].rungs, 1, "%s-%s", *name, fmoe_dtype_name(dtype));
                expect(why == HOLDS, "%s: %s", op, why);
            }
        }
        expect(empty && odd, "%s: no case without tokens, or none that fills no tile", op);
        expect(typed == (ladders[i].step != &fmoe_step_schedule), "%s: storage types", op);
    }
}

/* ---- Wrong ones -------------------------------------------------------------------------------------------------- */

/* The library that a first plugin_open made of the file, opened with this mistake. */
static plugin open_with(const char *mistake, const char *library, double limit_s) {
    plugin p;
    setenv("MISTAKE", mistake, 1);
    plugin_open(&p, library, limit_s);
    expect(p.ready, "%s with mistake '%s': %s", library, mistake, p.why);
    return p;
}

static void compile(const char *source, const char *lines, const char *from) {
    plugin p;
    write_plugin(source, lines, from);
    plugin_open(&p, source, 20);
    expect(p.ready, "%s: %s", source, p.why);
    plugin_close(&p);
}

static door_result check(const char *mistake, const char *library, const fmoe_step *step, const char *case_name,
                         bool timed) {
    plugin p = open_with(mistake, library, 20);
    fmoe_problem problem FREED(fmoe_problem_free) = new_problem(step, 1, "%s", case_name);
    door_result r = plugin_check(&p, &problem, timed);
    plugin_close(&p);
    return r;
}

static const char mlp_library[] = "build/plugins/mlp.c.so", topk_library[] = "build/plugins/topk.c.so";

SENTENCE(0, 42, "A wrong plugin is told the first element that is off, what it should be, and what that looks like.",
         "transposed, unsorted, ties, one rounding too many: most mistakes leave a trace",
         "plugins with one planted mistake each") {
    enter_folder();
    compile("mlp.c", "", "mlp.c");
    compile("topk.c", "", "topk.c");
    static const struct {
        const char *mistake, *case_name, *first, *hint;
    } mlp[] = {
        {"TRANSPOSED", "T3-d33-I72-f32", "y[0, 1] is ", "transposed?"},
        {"TRANSPOSED", "T3-d33-I72-bf16", "y[0, 1] is ", "transposed?"},
        {"NARROW_HIDDEN", "T5-d64-I33-f32", "y[0, 0] is ",
         "one rounding too many? everything is close, and off by more"},
        {"ROUNDED_SUM", "T5-d64-I100-bf16", " and should be ", "more than one rounding to bf16"},
        {"UNWRITTEN", "T5-d64-I33-f16", "y[0, 0] is nan and should be ", "nothing was written to y?"},
        {"TAIL_UNWRITTEN", "T5-d33-I33-f32", "y[0, 32] is nan", "left unwritten? 5 of 165 elements are NaN"},
        {"COUNTS_ON_ZEROS", "T5-d33-I33-f32", "y[0, 0] is nan",
         "1 of 165 elements are NaN, which outputs and workspace"},
        {"FACTOR", "T5-d33-I33-f32", "y[0, 0] is ", "all of y is 2 times what it should be"},
        {"SHIFTED", "T5-d33-I33-f32", "y[0, 0] is ", "off by one? every element is the next one"},
        {"EDGE", "T5-d35-I33-f32", "y[0, 32] is ", "an edge? 15 of 175 elements are off, none in the first 32 of 35"},
        {"ONE_ELEMENT", "T5-d33-I33-f32", "y[4, 1] is ", "1 of 165 elements is off"},
    };
    for (size_t i = 0; i < sizeof mlp / sizeof *mlp; i++) {
        door_result r = check(mlp[i].mistake, mlp_library, &fmoe_step_mlp, mlp[i].case_name, false);
        expect(r.verdict == DOOR_WRONG && strstr(r.why, mlp[i].first) && strstr(r.why, " and should be ") &&
                   strstr(r.hint, mlp[i].hint),
               "%s: %s: %s | %s", mlp[i].mistake, door_verdict_name(r.verdict), r.why, r.hint);
    }
    static const struct {
        const char *mistake, *hint;
    } topk[] = {
        {"TIES", "ties? of two pairs with equal sums"},     {"UNSORTED", "unsorted? the pair belongs to the choice"},
        {"PASSED_OVER", "a better pair was passed over?"},  {"TWICE", "the same pair twice?"},
        {"SIDES", "transposed? a pair's index is i·n + j"}, {"OUTSIDE", "outside: pairs are 0 to n² - 1"},
        {"UNSCALED", "every row of weights is a multiple"},
    };
    for (size_t i = 0; i < sizeof topk / sizeof *topk; i++) {
        door_result r = check(topk[i].mistake, topk_library, &fmoe_step_topk, "T29-n13-K6-normal-bf16-norm", false);
        const char *tensor = strcmp(topk[i].mistake, "UNSCALED") == 0 ? "weights[" : "indices[";
        expect(r.verdict == DOOR_WRONG && strstr(r.why, tensor) == r.why && strstr(r.hint, topk[i].hint),
               "%s: %s: %s | %s", topk[i].mistake, door_verdict_name(r.verdict), r.why, r.hint);
    }
    expect(check("", mlp_library, &fmoe_step_mlp, "T5-d35-I33-bf16", false).verdict == DOOR_RIGHT &&
               check("", topk_library, &fmoe_step_topk, "T29-n13-K6-normal-bf16-norm", false).verdict == DOOR_RIGHT,
           "without a mistake they are refused");
    leave_folder();
}

SENTENCE(0, 43, "A plugin that crashes, hangs or exits is reported as such, and the ladder is climbed to its end.",
         "an evening's mistakes should not cost the evening", "plugins that do so") {
    enter_folder();
    compile("mlp.c", "", "mlp.c");
    static const struct {
        const char *mistake, *message;
    } all[] = {
        {"CRASH", "crashed: Segmentation fault in its call"},
        {"HANG", "no answer within 0.5 s in its call: it hangs, or --time-limit is too short"},
        {"EXIT", "left its process with exit(0) instead of returning in its call"},
        {"RETURNS_STATUS", "returned \"unsupported\": d is odd"},
        {"CRASH_AT_LOAD", "crashed: Aborted while it was loaded"},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        setenv("MISTAKE", all[i].mistake, 1);
        int status = RUN(&mlp_chapter, "--plugin", mlp_library, "--quick", "--time-limit", "0.5");
        char *line = strstr(output, "\n  ours");
        expect(status == 1 && says(all[i].message), "%s: status %d\n%s", all[i].mistake, status, output);
        expect(line && strstr(line, "pass") && says("measurements:"), "%s: the ladder ends early:\n%s", all[i].mistake,
               output);
    }
    setenv("MISTAKE", "CRASH", 1);
    RUN(&mlp_chapter, "--grade", mlp_library, "--quick");
    expect(says("not tried: the last 3 cases ended its process") && says("of 27 cases") == false &&
               says("0 of 30 cases"),
           "a kernel that crashes everywhere:\n%s", output);
    leave_folder();
}

SENTENCE(0, 44,
         "A plugin gets the workspace it asks for; what it writes beyond that or its outputs, or to an input, shows.",
         "what holds here holds for any caller", "plugins that write where they should not") {
    enter_folder();
    compile("mlp.c", "", "mlp.c");
    static const struct {
        const char *mistake, *message;
        door_verdict verdict;
    } all[] = {
        {"BEYOND_OUTPUT", "wrote beyond y, at byte 80 of 80", DOOR_OUTSIDE},
        {"BEFORE_OUTPUT", "wrote before y, 1 bytes ahead of it", DOOR_OUTSIDE},
        {"INPUT_WRITTEN", "wrote to x, which is an input", DOOR_OUTSIDE},
        {"BEYOND_WORKSPACE", "wrote beyond its workspace, at byte 108 of 108", DOOR_OUTSIDE},
        {"ENDLESS_WORKSPACE", "a workspace of 9223372036854775807 bytes", DOOR_REFUSED},
        {"", "", DOOR_RIGHT}, /* returns a status unless it finds what it asked for at 256 bytes */
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        door_result r = check(all[i].mistake, mlp_library, &fmoe_step_mlp, "T5-d8-I9-bf16", false);
        expect(r.verdict == all[i].verdict && strstr(r.why, all[i].message), "%s: %s: %s", all[i].mistake,
               door_verdict_name(r.verdict), r.why);
    }
    leave_folder();
}

SENTENCE(0, 45, "Results that change from call to call, or that stop coming once a call is timed, are refused.",
         "the same input gives the same bits, and only work is timed", "a plugin that counts its calls") {
    enter_folder();
    compile("mlp.c", "", "mlp.c");
    door_result r = check("OTHER_BITS", mlp_library, &fmoe_step_mlp, "T5-d33-I33-f32", false);
    expect(r.verdict == DOOR_WRONG && strstr(r.why, "a second call gave other bits"), "%s", r.why);
    r = check("STOPS_WORKING", mlp_library, &fmoe_step_mlp, "T5-d33-I33-f32", false);
    expect(r.verdict == DOOR_RIGHT, "four calls: %s", r.why);
    r = check("STOPS_WORKING", mlp_library, &fmoe_step_mlp, "T5-d33-I33-f32", true);
    expect(r.verdict == DOOR_WRONG && strstr(r.hint, "nothing was written"), "timed: %s: %s", r.why, r.hint);
    leave_folder();
}

SENTENCE(0, 46,
         "A plugin's time is a call's, by a clock that the plugin does not have, and its prints stay out of the table.",
         "short calls are asked for many at a time", "plugins that sleep for a known time") {
    enter_folder();
    compile("mlp.c", "", "mlp.c");
    setenv("MISTAKE", "PRINTS", 1);
    expect(RUN(&mlp_chapter, "--plugin", mlp_library, "--quick") == 0 && !says("a plugin prints this") &&
               complains("a plugin prints this"),
           "%s", output);
    door_result r = check("SLEEPS", mlp_library, &fmoe_step_mlp, "T5-d33-I33-f32", true);
    expect(r.verdict == DOOR_RIGHT && r.timing.min_ms >= 5 && r.timing.median_ms < 30, "5 ms take %g to %g ms: %s",
           r.timing.min_ms, r.timing.median_ms, r.why);
    r = check("SLEEPS_BRIEFLY", mlp_library, &fmoe_step_mlp, "T1-d3-I3-f32", true);
    expect(r.verdict == DOOR_RIGHT && r.timing.min_ms >= 0.2 && r.timing.median_ms < 3, "0.2 ms take %g to %g ms",
           r.timing.min_ms, r.timing.median_ms);
    leave_folder();
}

SENTENCE(0, 47, "A plugin that cannot be loaded says why, and the ladder is climbed without it.",
         "another version of the structs would be read as garbage", "files with one thing wrong") {
    enter_folder();
    setenv("MISTAKE", "", 1);
    write_text("broken.c", "#include \"plugin.h\"\nint broken = ;\n");
    write_plugin("version.c", "#define VERSION 99", "mlp.c");
    write_plugin("symbol.c", "#define NO_SYMBOL", "mlp.c");
    write_plugin("device.c", "#define BACKEND BACKEND_CUDA", "mlp.c");
    write_plugin("empty.c", "#define NAME \"\"", "mlp.c");
    write_plugin("step.c", "", "topk.c");
    write_text("missing.c", "#include \"plugin.h\"\nfmoe_status elsewhere(void);\nconst fmoe_plugin fmoe_plugin_rung = "
                            "{FMOE_STEPS_VERSION, \"mlp\", \"a\", (fmoe_rung_fn *)elsewhere};\n");
    write_text("text.so", "not a library");
    char needs_device[160];
    snprintf(needs_device, sizeof needs_device, "takes device pointers: %s", fmoe_device_get()->why_not);
    const struct {
        const char *file, *message;
    } all[] = {
        {"broken.c", "broken.c does not compile"},
        {"version.c", "it was compiled for version 99 of the steps, this program has version"},
        {"symbol.c", "it has no variable fmoe_plugin_rung"},
        {"empty.c", "fmoe_plugin_rung.name is not set"},
        {"step.c", "its step is \"topk\", and chapter 6 has no such ladder"},
        {"missing.c", "undefined symbol: elsewhere"},
        {"text.so", "text.so: "},
        {"nothing.c", "nothing.c: No such file or directory"},
        {"nothing.so", "nothing.so: No such file or directory"},
        {fmoe_device_get()->present ? "nothing.so" : "device.c",
         fmoe_device_get()->present ? "No such file" : needs_device},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        int status = RUN(&mlp_chapter, "--plugin", all[i].file, "--quick");
        char *line = strstr(output, "\n  ours");
        expect(status == 1 && says(all[i].message), "%s: status %d\n%s", all[i].file, status, output);
        expect(line && strstr(line, "pass"), "%s: the ladder is not climbed:\n%s", all[i].file, output);
        if (i == 0)
            expect(complains("broken = ;"), "the compiler's message is not shown");
    }
    write_plugin("narrow.c", "#define DTYPES FMOE_ONLY(FMOE_BF16)", "mlp.c");
    expect(RUN(&mlp_chapter, "--plugin", "narrow.c", "--quick") == 0 && says("does not take f32") &&
               says("10 cases right, 0 wrong, 20 that it does not take"),
           "one that takes bf16 alone:\n%s", output);
    leave_folder();
}

/* ---- Grades ------------------------------------------------------------------------------------------------------ */

static bool has_type(const json_t *value, const char *type) {
    return (!strcmp(type, "object") && json_is_object(value)) || (!strcmp(type, "array") && json_is_array(value)) ||
           (!strcmp(type, "string") && json_is_string(value)) || (!strcmp(type, "integer") && json_is_integer(value)) ||
           (!strcmp(type, "number") && json_is_number(value)) || (!strcmp(type, "null") && json_is_null(value));
}

static bool one_of(const json_t *value, const json_t *types, bool as_types) {
    if (!json_is_array(types))
        return has_type(value, json_string_value(types));
    for (size_t i = 0; i < json_array_size(types); i++)
        if (as_types ? has_type(value, json_string_value(json_array_get(types, i)))
                     : json_equal(value, json_array_get(types, i)))
            return true;
    return false;
}

/* As much of JSON Schema as the schema uses. */
static void fits(const json_t *value, const json_t *schema, const char *where) {
    const json_t *type = json_object_get(schema, "type"), *constant = json_object_get(schema, "const");
    const json_t *values = json_object_get(schema, "enum"), *required = json_object_get(schema, "required");
    json_t *properties = json_object_get(schema, "properties");
    expect(!type || one_of(value, type, true), "%s is of another type", where);
    expect(!constant || json_equal(value, constant), "%s is another constant", where);
    expect(!values || one_of(value, values, false), "%s is no value of its list", where);
    for (size_t i = 0; i < json_array_size(required); i++)
        expect(json_object_get(value, json_string_value(json_array_get(required, i))) != NULL, "%s lacks %s", where,
               json_string_value(json_array_get(required, i)));
    const char *key;
    json_t *member;
    json_object_foreach((json_t *)value, key, member) {
        expect(json_object_get(properties, key) != NULL, "%s has %s, which the schema does not know", where, key);
        fits(member, json_object_get(properties, key), key);
    }
    for (size_t i = 0; i < json_array_size(value); i++)
        fits(json_array_get(value, i), json_object_get(schema, "items"), where);
}

static double points(const json_t *grade, const char *part) {
    return json_number_value(json_object_get(json_object_get(grade, part), "points"));
}

/* The document of a run that ended with this status. */
static json_t *graded(const char *mistake, const char *file, const char *against, int status) {
    char path[600];
    setenv("MISTAKE", mistake, 1);
    int left = RUN(&mlp_chapter, "--grade", file, "--quick", "--against", against, "--json", "out/grade.json");
    expect(left == status, "%s: status %d\n%s", mistake, left, output);
    json_t *grade = json_load_file("out/grade.json", 0, NULL);
    snprintf(path, sizeof path, "%s/chapters/grade.schema.json", root);
    json_t *schema = json_load_file(path, 0, NULL);
    expect(grade && schema, "no document, or no schema");
    fits(grade, schema, "the document");
    json_decref(schema);
    return grade;
}

static bool is_verdict(const json_t *grade, const char *verdict) {
    return strcmp(json_string_value(json_object_get(grade, "verdict")), verdict) == 0;
}

SENTENCE(0, 48, "A grade is 70 points for right cases and 30 for time, in a document that fits its schema.",
         "a score that cannot be recomputed is an opinion",
         "the schema, and the score from the document's own figures") {
    enter_folder();
    compile("mlp.c", "", "mlp.c");
    json_t *right = graded("SLEEPS", mlp_library, "ours", 0), *edge = graded("TAIL_UNWRITTEN", mlp_library, "ours", 1);
    const json_t *time = json_array_get(json_object_get(json_object_get(right, "time"), "cases"), 0);
    double ratio = json_number_value(json_object_get(time, "ratio"));
    expect(is_verdict(right, "right") && points(right, "correctness") == 70, "a right one gets %g of 70",
           points(right, "correctness"));
    expect(ratio > 0 && ratio < 0.5 && fabs(points(right, "time") - 30 * ratio) < 1e-3, "one %g times as fast gets %g",
           ratio, points(right, "time"));
    expect(fabs(json_number_value(json_object_get(time, "rung_ms")) / ratio -
                json_number_value(json_object_get(time, "kernel_ms"))) < 0.01,
           "the ratio is not that of the times");
    const json_t *part = json_object_get(edge, "correctness");
    double share =
        json_number_value(json_object_get(part, "right")) / json_number_value(json_object_get(part, "counted"));
    expect(is_verdict(edge, "wrong") && fabs(points(edge, "correctness") - 70 * share) < 1e-3 && share > 0.3 &&
               share < 0.9 && points(edge, "time") == 0,
           "one that is right at %g of the cases gets %g and %g", share, points(edge, "correctness"),
           points(edge, "time"));
    expect(json_number_value(json_object_get(edge, "score")) == points(edge, "correctness"),
           "the score is another sum");
    json_decref(right);
    json_decref(edge);
    setenv("MISTAKE", "", 1);
    json_t *none = graded("", mlp_library, "nobody", 2), *missing = graded("", "nothing.so", "ours", 2);
    const char *message = json_string_value(json_object_get(missing, "message"));
    expect(message && strstr(message, "No such file"), "the document does not say why: %s", message ? message : "");
    expect(is_verdict(none, "not graded") && is_verdict(missing, "not graded") && says("nothing.so: No such file"),
           "one that cannot be graded:\n%s", output);
    json_decref(none);
    json_decref(missing);
    leave_folder();
}

/* ---- Files to fill in -------------------------------------------------------------------------------------------- */

enum { MOST_TENSORS = 64 };

/* A dumped file as somebody would hand it back: out.NAME for every expected.NAME, and what `change` does to them. */
typedef struct {
    fmoe_file *file;
    int count;
    fmoe_tensor tensors[MOST_TENSORS];
    char names[MOST_TENSORS][64];
    int num_metadata;
    fmoe_metadata metadata[4];
} answer;

static void fill_in(const char *path, answer *f) {
    *f = (answer){0};
    expect(fmoe_file_open(path, &f->file) == FMOE_OK, "%s", fmoe_error_message());
    for (int64_t i = 0; i < fmoe_file_count(f->file); i++) {
        const fmoe_tensor *t = fmoe_file_tensor(f->file, i);
        f->tensors[f->count++] = *t;
        if (strncmp(t->name, "expected.", 9) != 0)
            continue;
        snprintf(f->names[f->count], sizeof f->names[0], "out.%s", t->name + 9);
        f->tensors[f->count] = *t;
        f->tensors[f->count].name = f->names[f->count];
        f->count++;
    }
    static const char *const keys[] = {"step", "case", "seed"};
    for (int i = 0; i < 3; i++)
        f->metadata[f->num_metadata++] = (fmoe_metadata){keys[i], fmoe_file_metadata(f->file, keys[i])};
}

static fmoe_tensor *find(answer *f, const char *name) {
    for (int i = 0; i < f->count; i++)
        if (!strcmp(f->tensors[i].name, name))
            return &f->tensors[i];
    expect(false, "the file has no %s", name);
    return NULL;
}

static void save(const answer *f, const char *path) {
    expect(fmoe_file_write(path, f->count, f->tensors, f->num_metadata, f->metadata) == FMOE_OK, "%s",
           fmoe_error_message());
}

static const fmoe_ladder all_ladders[] = {
    {&fmoe_step_router, chapter2_rungs, (const char *const[]){"T9-d5-n3-f32", NULL}, NULL, NULL, NULL},
    {&fmoe_step_topk, chapter3_rungs, (const char *const[]){"T9-n5-K3-f32", NULL}, NULL, NULL, NULL},
    {&fmoe_step_schedule, chapter4_rungs, (const char *const[]){"T9-N5-K3-uniform-f32", NULL}, NULL, NULL, NULL},
    {&fmoe_step_expert, chapter1_rungs, (const char *const[]){"T9-d5-N5-K3-uniform-f32", NULL}, NULL, NULL, NULL},
    {&fmoe_step_mlp, chapter6_rungs, (const char *const[]){"T9-d5-I3-f32", NULL}, NULL, NULL, NULL},
    {&fmoe_step_layer, chapter8_rungs, (const char *const[]){"T9-d5-I3-N9-K3-f32", NULL}, NULL, NULL, NULL},
    {0},
};
static const fmoe_chapter all_steps = {.number = 7, .title = "all steps", .ladders = all_ladders};

SENTENCE(0, 49, "A dumped case filled in with its expected results passes; one changed value is named, with its index.",
         "the door for kernels in other languages", "every step, its gradients too, in two storage types") {
    enter_folder();
    static const struct {
        const char *case_name, *gradient;
    } all[] = {
        {"T29-d33-n9-bf16-train", "dgate"}, {"T29-n9-K5-f32-norm", "dlogits"},
        {"T29-N50-K5-hot-f32", "pairs"},    {"T29-d33-N50-K5-uniform-bf16", "dup"},
        {"T29-d33-I20-f32", "ddown"},       {"T29-d33-I20-N50-K5-bf16", "dx"},
        {"T29-d33-n9-f32", "dx"},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        char name[64], element[80], changed[4] = {0, 0, (char)0x80, 0x45}; /* 4096 as a float */
        answer f;
        expect(RUN(&all_steps, "--dump", "case.st", "--case", all[i].case_name) == 0, "%s: %s", all[i].case_name,
               output);
        fill_in("case.st", &f);
        save(&f, "filled.st");
        expect(RUN(&all_steps, "--verify", "filled.st") == 0 && says("is within its limit") && !says("not filled in"),
               "%s:\n%s", all[i].case_name, output);
        snprintf(name, sizeof name, "out.%s", all[i].gradient);
        fmoe_tensor *t = find(&f, name);
        char *values OWNED = poisoned(t->count, 4);
        memcpy(values, t->data, (size_t)t->count * 4);
        memcpy(values + (t->count - 2) * 4, changed, 4);
        t->data = values;
        save(&f, "wrong.st");
        expect(RUN(&all_steps, "--verify", "wrong.st") == 1, "%s with a wrong value passes:\n%s", all[i].case_name,
               output);
        if (t->rank == 2)
            snprintf(element, sizeof element, "    %s[%lld, %lld] is 4096 and should be ", all[i].gradient,
                     (long long)t->shape[0] - 1, (long long)t->shape[1] - 2);
        else
            snprintf(element, sizeof element, "    %s[", all[i].gradient);
        expect(says(element), "%s: '%s' is not named:\n%s", all[i].case_name, element, output);
        fmoe_file_close(f.file);
    }
    leave_folder();
}

static float *values_of(const fmoe_file *file, const char *name, int64_t rows, int64_t columns) {
    float *values = NULL;
    expect(fmoe_file_read_f32(file, name, 2, (int64_t[]){rows, columns}, &values) == FMOE_OK, "%s",
           fmoe_error_message());
    return values;
}

SENTENCE(0, 50, "The gradients in a dumped case belong to the inputs that lie beside them.",
         "two problems of one case draw different numbers", "the reference, run on what the file holds") {
    enter_folder();
    enum { T = 7, D = 9, I = 5 };
    expect(RUN(&all_steps, "--dump", "case.st", "--case", "T7-d9-I5-f16", "--seed", "3") == 0, "%s", output);
    fmoe_file *file;
    expect(fmoe_file_open("case.st", &file) == FMOE_OK, "%s", fmoe_error_message());
    float *x OWNED = values_of(file, "in.x", T, D), *gate OWNED = values_of(file, "in.gate", I, D);
    float *up OWNED = values_of(file, "in.up", I, D), *down OWNED = values_of(file, "in.down", D, I);
    float *dy OWNED = values_of(file, "in.dy", T, D), *y OWNED = values_of(file, "expected.y", T, D);
    float *dx OWNED = values_of(file, "expected.dx", T, D), *ddown OWNED = values_of(file, "expected.ddown", D, I);
    float own_y[T * D], own_dx[T * D], own_ddown[D * I];
    fmoe_mlp(T, D, I, x, gate, up, down, own_y);
    fmoe_mlp_backward(T, D, I, x, gate, up, down, dy, FMOE_OVERWRITE, own_dx, NULL, NULL, own_ddown);
    expect(same_bits(y, own_y, T * D), "y is of other inputs");
    expect(same_bits(dx, own_dx, T * D) && same_bits(ddown, own_ddown, D * I), "the gradients are of other inputs");
    expect(!fmoe_file_find(file, "in.p"), "what the way back keeps is dumped, of other inputs");
    expect(!strcmp(fmoe_file_metadata(file, "seed"), "3"), "the seed is not there");
    fmoe_file_close(file);
    leave_folder();
}

SENTENCE(0, 51, "A file that is cut short, of another case, or holds a tensor that nobody knows is refused by name.",
         "a mixed-up file must not be taken for a wrong kernel", "files with one thing wrong") {
    enter_folder();
    answer f;
    expect(RUN(&all_steps, "--dump", "case.st", "--case", "T9-d5-I3-f32") == 0, "%s", output);
    fill_in("case.st", &f);

#define REFUSED(file, message, ...)                                                                                    \
    expect(RUN(&all_steps, "--verify", file, __VA_ARGS__) == 2 && complains(message),                                  \
           "%s: not refused with '%s':\n%s", file, message, output)
    REFUSED("case.st", "nothing is filled in", "--quick");
    REFUSED("nothing.st", "No such file", "--quick");

    answer other = f;
    other.metadata[2].value = "2";
    save(&other, "seed.st");
    REFUSED("seed.st", "another seed", "--quick");
    other = f;
    other.metadata[1].value = "T9-d5-I4-f32";
    save(&other, "shape.st");
    REFUSED("shape.st", "its shape is [3, 5] and should be [4, 5]", "--quick");
    other = f;
    other.metadata[0].value = "dance";
    save(&other, "step.st");
    REFUSED("step.st", "dance at T9-d5-I3-f32 is no step", "--quick");
    other = f;
    find(&other, "out.dx")->name = "out.dz";
    save(&other, "unknown.st");
    REFUSED("unknown.st", "tensor out.dz: unknown", "--quick");
    other = f;
    find(&other, "out.y")->dtype = FMOE_I32;
    save(&other, "integers.st");
    REFUSED("integers.st", "floats are expected", "--quick");
    save(&f, "filled.st");
    REFUSED("filled.st", "--case says T9-d5-I3-bf16", "--case", "T9-d5-I3-bf16");
    expect(truncate("filled.st", 600) == 0, "no file to cut");
    REFUSED("filled.st", "filled.st: ", "--quick");

    other = f;
    other.num_metadata = 0;
    save(&other, "bare.st");
    REFUSED("bare.st", "its metadata names no case; --case NAME", "--quick");
    expect(RUN(&all_steps, "--verify", "bare.st", "--case", "T9-d5-I3-f32") == 0, "named by --case:\n%s", output);
    other.count = 0;
    for (int i = 0; i < f.count; i++)
        if (!strcmp(f.tensors[i].name, "out.dx"))
            other.tensors[other.count++] = f.tensors[i];
    save(&other, "partly.st");
    expect(RUN(&all_steps, "--verify", "partly.st", "--case", "T9-d5-I3-f32") == 0 && says("not filled in: out.y, "),
           "one result alone:\n%s", output);
    fmoe_file_close(f.file);
    leave_folder();
}

/* ---- The course -------------------------------------------------------------------------------------------------- */

/* Runs a command and keeps what it prints. Its status. */
static int shell(const char *format, ...) {
    char command[2000];
    va_list list;
    va_start(list, format);
    vsnprintf(command, sizeof command, format, list);
    va_end(list);
    FILE *pipe = popen(command, "r");
    expect(pipe != NULL, "no shell");
    size_t length = fread(output, 1, sizeof output - 1, pipe);
    output[length] = 0;
    int status = pclose(pipe);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* Whether a file begins so, after the mark of a comment. */
static bool begins(const char *path, const char *format, ...) {
    char wanted[200], line[400] = "";
    va_list list;
    va_start(list, format);
    vsnprintf(wanted, sizeof wanted, format, list);
    va_end(list);
    FILE *file = fopen(path, "r");
    if (!file)
        return false;
    const char *text = fgets(line, sizeof line, file);
    fclose(file);
    if (!text)
        return false;
    if (!strncmp(text, "/* ", 3) || !strncmp(text, "// ", 3))
        text += 3;
    return strncmp(text, wanted, strlen(wanted)) == 0;
}

static void has_paragraphs(const char *path) {
    static const char *const paragraphs[] = {"\n**Starter.** ", "\n**Predict first.** ", "\n**Find out.**"};
    static char text[1 << 16];
    FILE *file = fopen(path, "r");
    expect(file != NULL, "%s: no such file", path);
    text[fread(text, 1, sizeof text - 1, file)] = 0;
    fclose(file);
    for (size_t i = 0; i < sizeof paragraphs / sizeof *paragraphs; i++)
        expect(strstr(text, paragraphs[i]) != NULL, "%s has no paragraph %s", path, paragraphs[i] + 1);
}

/* chapters/3-topk/exercises/1-block.c: chapters/3-topk/solutions/1-block.c */
static void solution_of(const char *starter, char *path, size_t size) {
    const char *folder = strstr(starter, "/exercises/");
    snprintf(path, size, "%.*s/solutions/%s", (int)(folder - starter), starter, folder + strlen("/exercises/"));
}

SENTENCE(0, 53,
         "Every chapter has three exercises, which say what to predict and what to find out, and a solution a starter.",
         "a guess that was written down can be wrong, which is what teaches", "the folders") {
    glob_t texts = {0}, starters = {0}, solutions = {0};
    char pattern[100], solution[400];
    bool packed = glob("chapters/*/solutions", 0, NULL, &solutions) == GLOB_NOMATCH; /* as make course does */
    globfree(&solutions);
    for (int chapter = 0; chapter < 10; chapter++) {
        snprintf(pattern, sizeof pattern, "chapters/%d-*/exercises/[0-9]-*.md", chapter);
        expect(glob(pattern, 0, NULL, &texts) == 0 && texts.gl_pathc == 3, "chapter %d has %zu exercises", chapter,
               texts.gl_pathc);
        for (int e = 1; e <= 3; e++) {
            const char *text = texts.gl_pathv[e - 1];
            expect(begins(text, "# %d.%d ", chapter, e), "%s does not begin with its number", text);
            has_paragraphs(text);
            snprintf(pattern, sizeof pattern, "chapters/%d-*/exercises/%d-*.c*", chapter, e);
            expect(glob(pattern, 0, NULL, &starters) == 0, "%s has no starter", text);
            for (size_t i = 0; i < starters.gl_pathc; i++) {
                const char *starter = starters.gl_pathv[i];
                expect(begins(starter, "Exercise %d.%d, starter, ", chapter, e), "%s does not say what it is", starter);
                solution_of(starter, solution, sizeof solution);
                expect(packed || begins(solution, "Exercise %d.%d, solution: ", chapter, e),
                       "%s does not say what it is", solution);
            }
            solution_of(text, solution, sizeof solution);
            expect(packed || begins(solution, "# Solution to %d.%d: ", chapter, e), "%s: no such text", solution);
            globfree(&starters);
        }
        globfree(&texts);
    }
}

/* A course of one exercise, whose starter and solution are these lines, graded by a program that looks for the word
 * RIGHT in a file. The status. */
static int grade_course(const char *suffix, const char *starter, const char *solution) {
    static const char grader[] = "#!/bin/sh\ngrep -q RIGHT \"$2\" && echo right: all points && exit 0\n"
                                 "grep -q FOREIGN \"$2\" && echo not graded && exit 2\n"
                                 "echo wrong: no points\nexit 1\n";
    char path[100];
    expect(shell("rm -rf chapters && mkdir -p build chapters/4-x/exercises chapters/4-x/solutions") == 0, "no folders");
    write_text("build/chapter4", grader);
    write_text("chapters/steps.h", "");
    snprintf(path, sizeof path, "chapters/4-x/exercises/1-a.%s", suffix);
    write_text(path, starter);
    snprintf(path, sizeof path, "chapters/4-x/solutions/1-a.%s", suffix);
    write_text(path, solution);
    return shell("chmod +x build/chapter4; COURSE_ROOT=$PWD BUILD=build NVCC= %s/chapters/course.sh grade 2>&1", root);
}

SENTENCE(0, 54,
         "Solutions that are not right, starters that are not what they claim, and files that say nothing all fail.",
         "make grade-all has to be believed", "a course of one exercise and a grader that looks for a word") {
    static const char good[] = "/* Exercise 4.1, solution: RIGHT. */\n",
                      begun[] = "/* Exercise 4.1, starter, not done: x. */\n";
    enter_folder();
    expect(grade_course("c", begun, good) == 0 && says("1 starters are what they claim, 0 failed, 0 skipped") &&
               says("1 solutions graded, 0 failed, 0 skipped"),
           "a course without fault:\n%s", output);
    expect(grade_course("c", "/* Exercise 4.1, starter, right: RIGHT. */\n", good) == 0, "a right starter:\n%s",
           output);
    static const struct {
        const char *what, *starter, *solution;
    } faults[] = {
        {"a solution is wrong", begun, "/* Exercise 4.1, solution: x. */\n"},
        {"a solution cannot be graded", begun, "/* Exercise 4.1, solution: FOREIGN. */\n"},
        {"a solution does not compile", begun, "/* Exercise 4.1, solution: RIGHT. */ int broken = ;\n"},
        {"a solution has a warning", begun, "/* Exercise 4.1, solution: RIGHT. */\nstatic int unused;\n"},
        {"a solution is another exercise's", begun, "/* Exercise 4.2, solution: RIGHT. */\n"},
        {"a solution is a starter", begun, begun},
        {"a starter is not right", "/* Exercise 4.1, starter, right: x. */\n", good},
        {"a starter is done", "/* Exercise 4.1, starter, not done: RIGHT. */\n", good},
        {"a starter cannot be graded", "/* Exercise 4.1, starter, not done: FOREIGN. */\n", good},
        {"a starter says nothing", "int x;\n", good},
    };
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        expect(grade_course("c", faults[i].starter, faults[i].solution) == 1 && says("FAILED"), "%s:\n%s",
               faults[i].what, output);
    expect(grade_course("cu", "// Exercise 4.1, starter, right: x.\n", "// Exercise 4.1, solution: x.\n") == 0 &&
               says("0 solutions graded, 0 failed, 1 skipped"),
           "without a compiler for it:\n%s", output);
    leave_folder();
}

SENTENCE(0, 55, "The packed course has every exercise and no solution.", "a student should not find them by accident",
         "the archive's list") {
    glob_t files = {0};
    enter_folder();
    expect(shell("%s/chapters/course.sh pack $PWD/course.tar.gz 2>&1 && tar -tzf course.tar.gz", root) == 0, "%s",
           output);
    expect(says("flashmoe-course/Makefile\n") && says("flashmoe-course/tests/golden/tiny_f32_train.safetensors\n"),
           "it is not whole:\n%s", output);
    expect(!says("solution"), "it has a solution:\n%s", output);
    expect(chdir(root) == 0 && glob("chapters/*/exercises/*", 0, NULL, &files) == 0, "no exercises");
    for (size_t i = 0; i < files.gl_pathc; i++)
        expect(says(files.gl_pathv[i]), "%s is missing", files.gl_pathv[i]);
    globfree(&files);
}

/* ---- On the GPU -------------------------------------------------------------------------------------------------- */

CUDA_SENTENCE(0, 52,
              "A plugin with device pointers is checked and timed like any rung; its faults end only its process.",
              "a device error stays until its process ends", "plugins with one planted mistake each") {
    enter_folder();
    char source[600];
    snprintf(source, sizeof source, "%s/tests/plugins/expert.cu", root);
    plugin p;
    setenv("MISTAKE", "", 1);
    plugin_open(&p, source, 60);
    expect(p.ready, "%s", p.why);
    plugin_close(&p);
    static const char library[] = "build/plugins/expert.cu.so", name[] = "T301-d72-N170-K6-hot-f32";
    door_result r = check("", library, &fmoe_step_expert, name, true);
    expect(r.verdict == DOOR_RIGHT && r.timing.runs >= 5 && r.timing.median_ms > 0.001 && r.timing.median_ms < 50,
           "%s: %s, %g ms", door_verdict_name(r.verdict), r.why, r.timing.median_ms);
    r = check("BEYOND", library, &fmoe_step_expert, name, false);
    expect(r.verdict == DOOR_OUTSIDE && strstr(r.why, "wrote beyond y"), "BEYOND: %s", r.why);
    r = check("ILLEGAL", library, &fmoe_step_expert, name, false);
    expect(r.verdict == DOOR_REFUSED && strstr(r.why, "the device"), "ILLEGAL: %s", r.why);
    r = check("OTHER_STREAM", library, &fmoe_step_expert, "T4001-d300-N170-K60-hot-f32", true);
    expect(r.verdict == DOOR_RIGHT && strstr(r.why, "by the host's clock"), "OTHER_STREAM: %s: %s",
           door_verdict_name(r.verdict), r.why);
    r = check("", library, &fmoe_step_expert, "T3-d72-N170-K6-hot-bf16", false);
    expect(r.verdict == DOOR_UNSUPPORTED, "bf16: %s", door_verdict_name(r.verdict));
    leave_folder();
}
