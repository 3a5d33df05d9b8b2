/* What other machines measured: rows of plots/data/<device>/, always marked as recorded and with the machine named. */
#include "program.h"

#include "../ref_cpu/check.h"

#include <glob.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static void add_files(recorded_data *data, const char *folder, const char *name) {
    char pattern[512];
    snprintf(pattern, sizeof pattern, "%s/data/*/%s", folder, name);
    glob_t found;
    if (glob(pattern, 0, NULL, &found))
        return;
    for (size_t i = 0; i < found.gl_pathc; i++) {
        csv_file *larger = realloc(data->files, (size_t)(data->count + 1) * sizeof *larger);
        if (!larger)
            break;
        data->files = larger;
        if (csv_read(found.gl_pathv[i], &data->files[data->count]) == FMOE_OK)
            data->count++;
    }
    globfree(&found);
}

void recorded_load(int chapter, recorded_data *data) {
    *data = (recorded_data){0};
    const char *folder = getenv("FMOE_PLOTS");
    char name[32];
    snprintf(name, sizeof name, "chapter%d.csv", chapter);
    add_files(data, folder ? folder : "plots", name);
    add_files(data, folder ? folder : "plots", "peers.csv");
}

void recorded_free(recorded_data *data) {
    for (int64_t i = 0; i < data->count; i++)
        csv_free(&data->files[i]);
    free(data->files);
    *data = (recorded_data){0};
}

static bool matches(const csv_row *row, const char *op, const char *case_name, const char *backend) {
    return !strcmp(row->op, op) && !strcmp(row->case_name, case_name) && !strcmp(row->backend, backend);
}

static const csv_row *best_cpu(const csv_file *file, const char *op, const char *case_name) {
    const csv_row *best = NULL;
    for (int64_t i = 0; i < file->count; i++)
        if (matches(&file->rows[i], op, case_name, "cpu") && (!best || file->rows[i].median_ms < best->median_ms))
            best = &file->rows[i];
    return best;
}

static void show_row(const csv_row *row, double before_ms, double best_cpu_ms) {
    bool peer = !strcmp(row->backend, "peer");
    table_line(&(table_row){.name = row->variant,
                            .level = peer                           ? "peer"
                                     : !strcmp(row->backend, "cpu") ? "cpu"
                                                                    : row->level,
                            .ms = row->median_ms,
                            .before_ms = before_ms,
                            .base_ms = best_cpu_ms,
                            .floor_ms = row->floor_ms,
                            .error = row->rel_err,
                            .verdict = "recorded"});
}

static void show_file(csv_file *file, const char *op, const char *case_name, const char *backend) {
    const csv_row *cpu = best_cpu(file, op, case_name), *before = NULL;
    bool peer = !strcmp(backend, "peer");
    for (int64_t i = 0; i < file->count; i++) {
        csv_row *row = &file->rows[i];
        if (!matches(row, op, case_name, backend) || !(row->median_ms > 0))
            continue;
        if (!before) {
            printf("  recorded on %s, %s%s\n", row->device, row->date,
                   peer ? ": other implementations (peers)"
                        : " (× cpu: the fastest CPU rung that was recorded with them)");
            if (cpu && !peer)
                show_row(cpu, 0, 0);
        }
        show_row(row, before && !peer ? before->median_ms : 0, cpu ? cpu->median_ms : 0);
        row->shown = true;
        before = row;
    }
}

void recorded_show(recorded_data *data, const char *op, const char *case_name, bool cuda) {
    for (int64_t i = 0; i < data->count; i++) {
        if (cuda)
            show_file(&data->files[i], op, case_name, "cuda");
        show_file(&data->files[i], op, case_name, "peer");
    }
}

void recorded_show_rest(recorded_data *data, const char *op) {
    for (int64_t f = 0; f < data->count; f++)
        for (int64_t i = 0; i < data->files[f].count; i++) {
            csv_row *row = &data->files[f].rows[i];
            if (row->shown || strcmp(row->op, op) || strcmp(row->backend, "cuda"))
                continue;
            row->shown = true; /* even if it has no time */
            char case_name[sizeof row->case_name];
            strcpy(case_name, row->case_name);
            printf("\n%s  %s\n", op, case_name);
            table_header("cpu", false);
            recorded_show(data, op, case_name, true);
        }
}
