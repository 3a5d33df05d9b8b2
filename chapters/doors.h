/* The doors for kernels from outside: a plugin that climbs a ladder (plugin*.c), its grade (grade.c), and files for
 * kernels that live elsewhere (verify.c). For the chapters' program and the tests, not for plugins: those include
 * plugin.h.
 *
 * A plugin is loaded by a worker, this program once more with other arguments, so that nothing of the parent's memory
 * is there. Both have one block of shared memory in sight, which holds the step's tensors between guard bands. The
 * parent fills it, asks over a socket for a call, waits for no longer than a time limit, and compares what it finds in
 * the block with results that only the parent has. This keeps a mistake from passing; it is no sandbox: a worker may do
 * whatever this user may. */
#ifndef FMOE_DOORS_H
#define FMOE_DOORS_H

#include "plugin.h"

/* ---- What parent and worker say to each other (plugin.c, plugin_worker.c) ---------------------------------------- */

enum { DOOR_TEXT = 400, DOOR_NAME = 64 };

typedef enum { ASK_WORKSPACE, ASK_RUN, ASK_DEVICE_TIME } door_question;

typedef struct {
    door_question what;
    int64_t runs;       /* ASK_RUN: calls, one after the other */
    size_t block_bytes; /* the shared memory's size now */
} door_request;

typedef struct {
    fmoe_status status;
    bool supported;         /* ASK_WORKSPACE */
    size_t workspace_bytes; /* ASK_WORKSPACE */
    fmoe_timing timing;     /* ASK_DEVICE_TIME: by events on the stream */
    char text[DOOR_TEXT];   /* the reason where status is not FMOE_OK */
} door_reply;

/* The worker's first word: the plugin's declaration, or why there is none. */
typedef struct {
    bool loaded;
    fmoe_backend backend;
    unsigned dtypes;
    char step[DOOR_NAME], name[DOOR_NAME], idea[DOOR_TEXT], text[DOOR_TEXT];
} door_about;

/* The block begins with this; tensors and workspace follow. Offsets count from its start. */
typedef struct {
    char name[32];
    fmoe_argument about; /* its pointers mean nothing to the other side */
    size_t offset;       /* 0: the argument is left out */
} door_tensor;

typedef struct {
    fmoe_case c;
    size_t args_offset, args_size, workspace_offset, workspace_bytes;
    int num_tensors;
    door_tensor tensors[FMOE_MAX_ARGUMENTS];
} door_block;

#define DOOR_WORKER "--plugin-worker" /* PLUGIN SOCKET MEMORY: argv[1] to argv[4] of a worker */
int plugin_worker(char **argv);
/* The program that becomes the worker; the tests, which have another main, name a chapter's. */
extern const char *plugin_program;

/* ---- One plugin a run (plugin.c) --------------------------------------------------------------------------------- */

typedef struct {
    const char *path; /* as given; NULL: there is no plugin */
    char library[512];
    bool ready; /* loaded, for this build's steps; else why says why not */
    char why[DOOR_TEXT];
    door_about about;
    double limit_s; /* for one call */
    int pid;        /* of the worker; 0: none is running */
    int socket, memory;
} plugin;

/* Compiles where the name ends in .c or .cu, and loads once to read the declaration. p->ready says whether it could. */
void plugin_open(plugin *p, const char *path, double limit_s);
void plugin_close(plugin *p);
bool plugin_takes(const plugin *p, fmoe_dtype dtype);

/* Asks the worker, which is started if none is running. FMOE_OK if it answered; else it is gone, and why (DOOR_TEXT
 * bytes) says how: a crash, no answer in time, an exit. */
fmoe_status plugin_ask(plugin *p, const door_request *request, door_reply *reply, char *why);

/* ---- One checked call (plugin_check.c) --------------------------------------------------------------------------- */

typedef enum {
    DOOR_RIGHT,
    DOOR_UNSUPPORTED,
    DOOR_WRONG,   /* a result is off */
    DOOR_OUTSIDE, /* wrote where it has no business */
    DOOR_REFUSED, /* returned a status, or the device failed */
    DOOR_GONE,    /* crashed, hung or left */
    DOOR_NO_CASE, /* the case itself could not be drawn */
} door_verdict;

const char *door_verdict_name(door_verdict verdict); /* "right", "unsupported", ... */

typedef struct {
    door_verdict verdict;
    double error, limit;
    fmoe_timing timing; /* where it was timed */
    char why[DOOR_TEXT], hint[DOOR_TEXT];
} door_result;

/* Twice on poisoned outputs: guard bands, inputs, results, and the same bits. timed: the time of a call as well, and
 * the results once more after it. */
door_result plugin_check(plugin *p, fmoe_problem *problem, bool timed);

/* Where the first wrong result lies ("y[3, 17] is 0.5 and should be 0.25"), and what it looks like (hint.c). Both
 * DOOR_TEXT bytes; the hint may stay empty. */
void door_explain(const fmoe_problem *p, char *where, char *hint);
void door_explain_tensor(const fmoe_problem *p, const fmoe_argument *a, char *where, char *hint);

/* The step's test grid: names without a storage type, ended by NULL; typed: whether the step has storage types. */
const char *const *grid_cases(const char *op, bool *typed);

/* Calls `each` with the plugin's result at every case of its step's grid. How many failed. */
typedef void grid_visitor(const char *case_name, const door_result *result, void *context);
int plugin_grid(plugin *p, const fmoe_step *step, grid_visitor *each, void *context);

/* ---- In the chapters' program ------------------------------------------------------------------------------------ */

/* --plugin: checked over the grid before the ladder is climbed. False if it failed. */
bool plugin_introduce(const fmoe_chapter *chapter);
/* The rungs, and after them the plugin if it belongs there. */
const fmoe_rung *plugin_join(const fmoe_rung *rungs, const fmoe_step *step, fmoe_backend backend);
bool plugin_climbs(const fmoe_step *step);
bool plugin_is(const fmoe_rung *rung);
door_result plugin_measure(fmoe_problem *problem);
void plugin_dismiss(void);

/* What the command line said about doors; the options' own file is options.c. */
typedef struct {
    const char *plugin, *grade, *against, *json, *dump, *verify;
    double limit_s;
} door_options;
extern door_options door_opt;

/* --grade (grade.c): the status to exit with. */
int grade_main(const fmoe_chapter *chapter);

/* --dump and --verify (verify.h) have a header of their own. */

#endif
