/* The command line: the same options in every chapter. */
#include "doors.h"
#include "program.h"

#include <errno.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

fmoe_options fmoe_opt = {.level = LEVEL_HOPPER, .seed = 1};
options_more opt_more;

static void help(const fmoe_chapter *chapter) {
    bool has_cases = chapter->ladders && chapter->ladders->step && chapter->ladders->cases;
    const char *example = has_cases ? chapter->ladders->cases[0] : "T16-f32";
    printf("usage: ./chapter%d [options]\n"
           "Chapter %d: %s.\n"
           "Times every rung, checks it against the reference, draws the ladder, and leaves a CSV and an SVG.\n\n",
           chapter->number, chapter->number, chapter->title);
    printf("  --list           the rungs with their ideas, and the cases\n"
           "  --case NAME      time this case instead, e.g. %s; may be repeated\n"
           "  --only A[,B]     only these rungs\n"
           "  --level LEVEL    rungs up to core, advanced or hopper (default: all)\n"
           "  --dtype TYPE     f32, f16 or bf16 in place of the type that each case names\n"
           "  --seed NUMBER    another draw of the inputs (default: 1)\n"
           "  --threads NUMBER OpenMP threads (default: %d)\n"
           "  --csv FILE       where the measurements go (default: build/results/chapter%d.csv); the SVG lies beside\n"
           "  --quick          smaller cases, shorter timing\n"
           "  --predict        type a guess for each rung before its time is shown\n"
           "  --plugin FILE    a rung of your own, .so, .c or .cu: checked, then a line of the ladder\n"
           "  --grade FILE     a verdict and a score for it instead; --against RUNG, --json FILE\n"
           "  --time-limit S   seconds that one of its calls may take (default: 10)\n"
           "  --dump FILE      write a case with its expected results as safetensors instead\n"
           "  --verify FILE    check a file in which out.NAME was filled in instead\n"
           "  --help           this text\n",
           example, omp_get_max_threads(), chapter->number);
    if (chapter->option_help)
        printf("%s%s", chapter->option_help,
               chapter->option_help[strlen(chapter->option_help) - 1] == '\n' ? "" : "\n");
}

enum { WIDTH = 110 };

/* Columns that UTF-8 text takes: every byte that does not continue a character starts one. */
static int columns(const char *text, size_t bytes) {
    int count = 0;
    for (size_t i = 0; i < bytes; i++)
        count += ((unsigned char)text[i] & 0xc0) != 0x80;
    return count;
}

/* Prints text from this column on, broken between words and indented to the same column. */
static void print_wrapped(int indent, const char *text) {
    int column = indent;
    for (size_t length; *text; text += length + (text[length] == ' ')) {
        length = strcspn(text, " ");
        int wide = columns(text, length);
        if (column > indent && column + 1 + wide > WIDTH) {
            printf("\n%*s", indent, "");
            column = indent;
        } else if (column > indent) {
            putchar(' ');
            column++;
        }
        printf("%.*s", (int)length, text);
        column += wide;
    }
    putchar('\n');
}

const fmoe_rung *ladder_rung(const fmoe_ladder *ladder, int i) {
    const fmoe_rung *parts[] = {ladder->rungs, ladder->cuda};
    for (int part = 0; part < 2; part++)
        for (const fmoe_rung *rung = parts[part]; rung && rung->run; rung++)
            if (i-- == 0)
                return rung;
    return NULL;
}

static void list_cases(const char *title, const char *const *cases) {
    printf("  %s\n", title);
    for (; cases && *cases; cases++)
        printf("    %s\n", *cases);
}

static void list(const fmoe_chapter *chapter) {
    printf("Chapter %d: %s\n", chapter->number, chapter->title);
    for (const fmoe_ladder *ladder = chapter->ladders; ladder && ladder->step; ladder++) {
        printf("\n%s\n", ladder->step->op);
        const fmoe_rung *rung;
        for (int i = 0; (rung = ladder_rung(ladder, i)); i++) {
            printf("  %-18s %-4s %-8s ", rung->name, backend_name(rung->backend), level_name(rung->level));
            print_wrapped(35, rung->idea ? rung->idea : "");
        }
        list_cases("cases", ladder->cases);
        list_cases("cases with --quick", ladder->quick_cases);
        if (ladder->cuda_cases)
            list_cases("cases with a GPU", ladder->cuda_cases);
    }
}

/* True if `name` is one of the comma-separated names. */
static bool is_among(const char *names, const char *name, size_t length) {
    for (const char *at = names; at; at = strchr(at, ',')) {
        at += *at == ',';
        if (strcspn(at, ",") == length && !strncmp(at, name, length))
            return true;
    }
    return false;
}

bool only_chosen(const char *rung_name) {
    return !fmoe_opt.only || is_among(fmoe_opt.only, rung_name, strlen(rung_name));
}

static int bad(const char *option, const char *value, const char *expected) {
    fprintf(stderr, "%s '%s': expected %s\n", option, value, expected);
    return 2;
}

static bool is_rung(const fmoe_chapter *chapter, const char *name, size_t length) {
    const fmoe_rung *rung;
    for (const fmoe_ladder *ladder = chapter->ladders; ladder && ladder->step; ladder++)
        for (int i = 0; (rung = ladder_rung(ladder, i)); i++)
            if (strlen(rung->name) == length && !strncmp(rung->name, name, length))
                return true;
    return false;
}

static int check_only(const fmoe_chapter *chapter) {
    for (const char *at = fmoe_opt.only; at; at = strchr(at, ',')) {
        at += *at == ',';
        size_t length = strcspn(at, ",");
        if (is_rung(chapter, at, length))
            continue;
        fprintf(stderr, "--only: this chapter has no rung '%.*s'; ./chapter%d --list names them all\n", (int)length, at,
                chapter->number);
        return 2;
    }
    return -1;
}

static bool read_number(const char *text, uint64_t low, uint64_t high, uint64_t *value) {
    char *end;
    errno = 0;
    *value = strtoull(text, &end, 10);
    return *text >= '0' && *text <= '9' && !*end && !errno && *value >= low && *value <= high;
}

static int set_level(const char *value) {
    for (int level = LEVEL_CORE; level <= LEVEL_HOPPER; level++)
        if (!strcmp(value, level_name((fmoe_level)level))) {
            fmoe_opt.level = level;
            return -1;
        }
    return bad("--level", value, "core, advanced or hopper");
}

static int set_dtype(const char *value) {
    for (int dtype = FMOE_F32; dtype <= FMOE_BF16; dtype++)
        if (!strcmp(value, fmoe_dtype_name((fmoe_dtype)dtype))) {
            opt_more.dtype = (fmoe_dtype)dtype;
            opt_more.dtype_given = true;
            return -1;
        }
    return bad("--dtype", value, "f32, f16 or bf16");
}

static int set_seed(const char *value) {
    return read_number(value, 0, UINT64_MAX, &fmoe_opt.seed) ? -1 : bad("--seed", value, "a number from 0 to 2^64 - 1");
}

static int set_threads(const char *value) {
    uint64_t threads;
    if (!read_number(value, 1, 4096, &threads))
        return bad("--threads", value, "a number from 1 to 4096");
    omp_set_num_threads((int)threads);
    return -1;
}

static int add_case(const char *value) {
    fmoe_case c;
    if (fmoe_case_parse(value, &c) != FMOE_OK) {
        fprintf(stderr, "--case: %s\n", fmoe_error_message());
        return 2;
    }
    int limit = sizeof opt_more.cases / sizeof opt_more.cases[0] - 1;
    if (opt_more.num_cases == limit) {
        fprintf(stderr, "--case '%s': more than %d cases\n", value, limit);
        return 2;
    }
    opt_more.cases[opt_more.num_cases++] = value;
    return -1;
}

static int set_only(const char *value) {
    fmoe_opt.only = value;
    return -1;
}

static int set_csv(const char *value) {
    fmoe_opt.csv = value;
    return *value ? -1 : bad("--csv", value, "a file name");
}

/* ---- Doors for kernels from outside ------------------------------------------------------------------------------ */

static int set_file(const char **file, const char *option, const char *value) {
    *file = value;
    return *value ? -1 : bad(option, value, "a file name");
}

static int set_plugin(const char *value) {
    return set_file(&door_opt.plugin, "--plugin", value);
}

static int set_grade(const char *value) {
    return set_file(&door_opt.grade, "--grade", value);
}

static int set_json(const char *value) {
    return set_file(&door_opt.json, "--json", value);
}

static int set_dump(const char *value) {
    return set_file(&door_opt.dump, "--dump", value);
}

static int set_verify(const char *value) {
    return set_file(&door_opt.verify, "--verify", value);
}

static int set_against(const char *value) {
    door_opt.against = value;
    return -1;
}

static int set_time_limit(const char *value) {
    char *end;
    door_opt.limit_s = strtod(value, &end);
    bool number = end != value && !*end && door_opt.limit_s >= 0.1 && door_opt.limit_s <= 86400;
    return number ? -1 : bad("--time-limit", value, "seconds, 0.1 to 86400");
}

static const struct {
    const char *name;
    int (*set)(const char *value);
} with_value[] = {
    {"--case", add_case},   {"--only", set_only},       {"--level", set_level}, {"--dtype", set_dtype},
    {"--seed", set_seed},   {"--threads", set_threads}, {"--csv", set_csv},     {"--plugin", set_plugin},
    {"--grade", set_grade}, {"--against", set_against}, {"--json", set_json},   {"--time-limit", set_time_limit},
    {"--dump", set_dump},   {"--verify", set_verify},
};

static int read_one(const fmoe_chapter *chapter, int argc, char **argv, int *i) {
    const char *name = argv[*i];
    for (size_t k = 0; k < sizeof with_value / sizeof with_value[0]; k++) {
        if (strcmp(name, with_value[k].name))
            continue;
        if (*i + 1 == argc) {
            fprintf(stderr, "%s needs a value\n", name);
            return 2;
        }
        return with_value[k].set(argv[++*i]);
    }
    if (!strcmp(name, "--quick"))
        fmoe_opt.quick = true;
    else if (!strcmp(name, "--predict"))
        fmoe_opt.predict = true;
    else if (!strcmp(name, "--list"))
        opt_more.list = true;
    else if (!strcmp(name, "--help") || !strcmp(name, "-h")) {
        help(chapter);
        return 0;
    } else if (!chapter->option || !chapter->option(argc, argv, i)) {
        fprintf(stderr, "unknown option '%s'; ./chapter%d --help lists them\n", name, chapter->number);
        return 2;
    }
    return -1;
}

int options_read(const fmoe_chapter *chapter, int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        int status = read_one(chapter, argc, argv, &i);
        if (status >= 0)
            return status;
    }
    fmoe_opt.threads = omp_get_max_threads();
    if (opt_more.list) {
        list(chapter);
        return 0;
    }
    return check_only(chapter);
}
