/* The recorded data: one row a measurement, written while a chapter runs and read back to show other machines'. */
#include "device.h"
#include "program.h"

#include "../ref_cpu/check.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <time.h>

#define COLUMNS                                                                                                        \
    "chapter,op,case,variant,level,backend,dtype,median_ms,min_ms,max_ms,rel_err,bytes,flops,floor_ms,threads,"        \
    "device,date"

const char *level_name(fmoe_level level) {
    return level == LEVEL_CORE ? "core" : level == LEVEL_ADVANCED ? "advanced" : "hopper";
}

const char *backend_name(fmoe_backend backend) {
    return backend == BACKEND_CPU ? "cpu" : "cuda";
}

/* ---- Writing ----------------------------------------------------------------------------------------------------- */

static FILE *out;
static int out_chapter;

/* A field is quoted where its text would be read as something else. */
static void put_text(const char *text) {
    if (!strpbrk(text, ",\"\n")) {
        fputs(text, out);
        return;
    }
    fputc('"', out);
    for (; *text; text++) {
        if (*text == '"')
            fputc('"', out);
        fputc(*text, out);
    }
    fputc('"', out);
}

/* Nothing where the number is not known. */
static void put_number(double number) {
    if (isfinite(number))
        fprintf(out, "%.6g", number);
    fputc(',', out);
}

static void today(char *text, size_t size) {
    time_t now = time(NULL);
    struct tm local;
    strftime(text, size, "%Y-%m-%d", localtime_r(&now, &local));
}

/* The commit that the working folder is at, with a plus sign where something was changed since. FMOE_COMMIT names it
 * for a copy that left its history behind. */
static void commit_name(char *text, size_t size) {
    const char *given = getenv("FMOE_COMMIT");
    snprintf(text, size, "%s", given ? given : "unknown");
    if (given)
        return;
    FILE *git = popen("git describe --always --abbrev=12 --dirty=+ --exclude='*' 2>/dev/null", "r");
    char line[64];
    if (git && fgets(line, sizeof line, git)) {
        line[strcspn(line, "\n")] = 0;
        snprintf(text, size, "%s", line);
    }
    if (git)
        pclose(git);
}

fmoe_status csv_open(int chapter, const char *path) {
    make_folders(path);
    out = fopen(path, "w");
    if (!out)
        return fmoe_fail(FMOE_IO, "cannot write %s: %s", path, strerror(errno));
    out_chapter = chapter;
    char date[16], commit[64], clocks[64];
    struct utsname system;
    today(date, sizeof date);
    commit_name(commit, sizeof commit);
    machine_clocks(clocks, sizeof clocks);
    fprintf(out, "# device: %s\n", machine_device());
    if (!uname(&system))
        fprintf(out, "# system: %s %s %s\n", system.sysname, system.release, system.machine);
    fprintf(out, "# compiler: %s\n", FMOE_COMPILER);
    fprintf(out, "# clocks seen: %s\n# date: %s\n# commit: %s\n", clocks, date, commit);
    if (fmoe_device_get()->present)
        fprintf(out, "# gpu: %s, driver %s\n", fmoe_device_get()->name, fmoe_device_get()->driver);
    fprintf(out, "%s\n", COLUMNS);
    return FMOE_OK;
}

void csv_close(void) {
    if (!out)
        return;
    if (fmoe_device_get()->present) {
        char clocks[64];
        fmoe_device_clocks(clocks, sizeof clocks);
        fprintf(out, "# gpu clocks seen at the end: %s\n", clocks);
    }
    fclose(out);
    out = NULL;
}

void fmoe_csv_row(const char *op, const char *case_name, const char *variant, fmoe_level level, fmoe_backend backend,
                  fmoe_dtype dtype, fmoe_timing timing, double rel_err, fmoe_work work) {
    if (!out)
        return;
    fprintf(out, "%d,", out_chapter);
    put_text(op);
    fputc(',', out);
    put_text(case_name);
    fputc(',', out);
    put_text(variant);
    fprintf(out, ",%s,%s,%s,", level_name(level), backend_name(backend), fmoe_dtype_name(dtype));
    put_number(timing.median_ms);
    put_number(timing.min_ms);
    put_number(timing.max_ms);
    put_number(rel_err);
    put_number(work.bytes);
    put_number(work.flops);
    put_number(work.floor_ms);
    char date[16];
    today(date, sizeof date);
    bool gpu = backend == BACKEND_CUDA;
    fprintf(out, "%d,", gpu ? 0 : fmoe_opt.threads);
    put_text(gpu ? fmoe_device_get()->name : machine_device());
    fprintf(out, ",%s\n", date);
    fflush(out);
}

/* ---- Reading ----------------------------------------------------------------------------------------------------- */

enum { MAX_FIELDS = 32, MAX_LINE = 1024 };

/* Splits a line in place, quotes taken off. */
static int split(char *line, char *fields[MAX_FIELDS]) {
    int count = 0;
    for (char *from = line; count < MAX_FIELDS;) {
        char *to = from;
        bool quoted = *from == '"';
        fields[count++] = to;
        from += quoted;
        while (*from && (quoted || (*from != ',' && *from != '\n' && *from != '\r'))) {
            if (quoted && *from == '"') {
                from++;
                if (*from != '"') {
                    quoted = false;
                    continue;
                }
            }
            *to++ = *from++;
        }
        bool more = *from == ',';
        *to = 0;
        if (!more)
            break;
        from++;
    }
    return count;
}

static double number(const char *text) {
    char *end;
    double value = strtod(text, &end);
    return end == text ? NAN : value;
}

static void set_field(csv_row *row, const char *column, const char *text) {
    const struct {
        const char *name;
        char *text;
        size_t size;
        double *number;
    } fields[] = {
        {"op", row->op, sizeof row->op, NULL},
        {"case", row->case_name, sizeof row->case_name, NULL},
        {"variant", row->variant, sizeof row->variant, NULL},
        {"level", row->level, sizeof row->level, NULL},
        {"backend", row->backend, sizeof row->backend, NULL},
        {"dtype", row->dtype, sizeof row->dtype, NULL},
        {"device", row->device, sizeof row->device, NULL},
        {"date", row->date, sizeof row->date, NULL},
        {"median_ms", NULL, 0, &row->median_ms},
        {"min_ms", NULL, 0, &row->min_ms},
        {"max_ms", NULL, 0, &row->max_ms},
        {"rel_err", NULL, 0, &row->rel_err},
        {"bytes", NULL, 0, &row->bytes},
        {"flops", NULL, 0, &row->flops},
        {"floor_ms", NULL, 0, &row->floor_ms},
    };
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        if (strcmp(column, fields[i].name))
            continue;
        if (fields[i].number)
            *fields[i].number = number(text);
        else
            snprintf(fields[i].text, fields[i].size, "%s", text);
    }
    if (!strcmp(column, "chapter"))
        row->chapter = atoi(text);
    if (!strcmp(column, "threads"))
        row->threads = atoi(text);
}

static bool add_row(csv_file *file, const csv_row *row) {
    if ((file->count & (file->count - 1)) == 0) { /* grows at every power of two */
        csv_row *larger = realloc(file->rows, (size_t)(file->count ? 2 * file->count : 1) * sizeof *larger);
        if (!larger)
            return false;
        file->rows = larger;
    }
    file->rows[file->count++] = *row;
    return true;
}

fmoe_status csv_read(const char *path, csv_file *file) {
    *file = (csv_file){0};
    snprintf(file->path, sizeof file->path, "%s", path);
    FILE *in = fopen(path, "r");
    if (!in)
        return fmoe_fail(FMOE_IO, "cannot read %s: %s", path, strerror(errno));
    char line[MAX_LINE], header[MAX_LINE] = "", *columns[MAX_FIELDS], *fields[MAX_FIELDS];
    int num_columns = 0;
    fmoe_status status = FMOE_OK;
    while (status == FMOE_OK && fgets(line, sizeof line, in)) {
        if (*line == '#' || *line == '\n')
            continue;
        if (num_columns == 0) {
            strcpy(header, line);
            num_columns = split(header, columns);
            continue;
        }
        csv_row row = {.median_ms = NAN,
                       .min_ms = NAN,
                       .max_ms = NAN,
                       .rel_err = NAN,
                       .bytes = NAN,
                       .flops = NAN,
                       .floor_ms = NAN};
        int num_fields = split(line, fields);
        for (int i = 0; i < num_fields && i < num_columns; i++)
            set_field(&row, columns[i], fields[i]);
        if (!add_row(file, &row))
            status = fmoe_fail(FMOE_OUT_OF_MEMORY, "no memory for the rows of %s", path);
    }
    fclose(in);
    if (status != FMOE_OK)
        csv_free(file);
    return status;
}

void csv_free(csv_file *file) {
    free(file->rows);
    *file = (csv_file){0};
}
