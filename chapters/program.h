/* What the shared sources of the chapter programs tell each other, and nobody else. */
#ifndef FMOE_PROGRAM_H
#define FMOE_PROGRAM_H

#include "chapter.h"

#ifdef __clang__
#define FMOE_COMPILER __VERSION__
#else
#define FMOE_COMPILER "gcc " __VERSION__
#endif

/* case.c: the size letters that a name spells, one bit each. */
unsigned case_letters(const char *name);

/* problem.c */
typedef struct {
    unsigned char *block, *memory;
    size_t bytes;
} workspace;
fmoe_status workspace_new(size_t bytes, workspace *w);
fmoe_status workspace_check(const workspace *w, char *why); /* FMOE_BAD_WORKSPACE if a guard band was written to */
void workspace_free(workspace *w);
/* FMOE_UNSUPPORTED, with the reason (at least 200 bytes), if the rung cannot be run on this problem here. */
fmoe_status rung_supports(const fmoe_rung *rung, const fmoe_problem *p, char *why);
size_t rung_workspace(const fmoe_rung *rung, const fmoe_problem *p);

/* timing.c: one warm-up, then runs until the budget is spent, within these numbers of them. */
fmoe_timing time_runs(void (*call)(void *), void *context, int at_least, int at_most, double budget_ms);
fmoe_timing timing_of(int runs, double *ms); /* sorts them */

/* ceilings.c: each a timing of a known amount of work. */
typedef struct {
    const char *op; /* copy, gather, fma, fork_join */
    char case_name[32];
    double mb; /* the table's size, for gather */
    fmoe_timing timing;
    fmoe_work work;
} measured_ceiling;

typedef struct {
    int count;
    measured_ceiling all[32];
} ceiling_list;

void ceilings_measure(ceiling_list *list);

/* machine.c */
/* fmoe_machine_ceilings without the cached file; the list receives what was measured. */
const fmoe_ceilings *machine_measure_again(ceiling_list *list);
/* The same for the GPU, where there is one. What could not be measured is left out of the list, and nothing is cached.
 */
fmoe_status machine_measure_gpu_again(ceiling_list *list);
const char *machine_device(void);                        /* "AMD EPYC (2 threads)", without measuring anything */
const char *machine_slug(void);                          /* "amd-epyc-2t" */
void slug_of(const char *name, char *slug, size_t size); /* "NVIDIA H200" becomes "nvidia-h200" */
void machine_clocks(char *text, size_t size);            /* "2600 to 3700 MHz" as the system reports them now */
void make_folders(const char *path);                     /* the folders a file's path needs; existing ones are fine */

/* csv.c: a row of the recorded data, as read or as measured. */
typedef struct {
    int chapter;
    char op[48], case_name[96], variant[64], level[16], backend[16], dtype[8];
    double median_ms, min_ms, max_ms, rel_err, bytes, flops, floor_ms; /* NaN where the file says nothing */
    int threads;
    char device[96], date[16];
    bool shown; /* already in a table of this run */
} csv_row;

typedef struct {
    char path[512];
    int64_t count;
    csv_row *rows;
} csv_file;

fmoe_status csv_open(int chapter, const char *path); /* the file fmoe_csv_row writes to */
void csv_close(void);
fmoe_status csv_read(const char *path, csv_file *file); /* columns in any order, found by their names */
void csv_free(csv_file *file);
const char *level_name(fmoe_level level);
const char *backend_name(fmoe_backend backend);

/* table.c */
typedef struct {
    const char *name, *level, *verdict;
    double ms, before_ms, base_ms, library_ms, floor_ms, error; /* 0 or NaN where there is nothing to compare with */
} table_row;
void table_header(const char *base,
                  bool library); /* base: what base_ms is, "first" or "cpu", the fastest CPU rung timed here */
void table_line(const table_row *row);
void table_note(const char *name, const char *level, const char *note);

/* recorded.c: what other machines measured, from plots/data/<device>/. */
typedef struct {
    int64_t count;
    csv_file *files;
} recorded_data;

void recorded_load(int chapter, recorded_data *data);
void recorded_free(recorded_data *data);
/* Rows of this op and case: CUDA rungs (where wanted) beside their own machine's best CPU rung, then peers. */
void recorded_show(recorded_data *data, const char *op, const char *case_name, bool cuda);
/* The recorded CUDA rungs of the op's other cases. */
void recorded_show_rest(recorded_data *data, const char *op);

/* options.c */
typedef struct {
    int num_cases;
    const char *cases[65]; /* ended by NULL */
    bool list, dtype_given;
    fmoe_dtype dtype;
} options_more;
extern options_more opt_more;

/* -1 to go on, or the status to exit with. */
int options_read(const fmoe_chapter *chapter, int argc, char **argv);
bool only_chosen(const char *rung_name);
/* A ladder's rungs by number, the CPU's and then the GPU's; NULL beyond the last. */
const fmoe_rung *ladder_rung(const fmoe_ladder *ladder, int i);

/* draw.c */
void draw_chapter(const fmoe_chapter *chapter, const char *csv_path);

/* predict.c: the reader's guesses. */
void predict_ask(const fmoe_rung *rung, double before_ms); /* before_ms 0: there is no rung before */
void predict_measured(const char *rung_name, double ms);
void predict_compare(void);

#endif
