/* What all chapters share: a case, a problem, a rung, a ladder, and the program that climbs it.
 *
 *   case     "T1024-d256-N16384-K64-normal-f32": sizes, routing and storage type, spelled in one name
 *   step     an operation of the layer: its arguments (steps.h), how to draw a random problem, its reference, its floor
 *   problem  one step at one case: named tensors with data, the arguments that point at them, the expected outputs
 *   rung     one way to compute a step; a ladder is a step's rungs in the order in which a reader meets them
 *   chapter  one or more ladders and the cases they are timed at
 */
#ifndef FMOE_CHAPTER_H
#define FMOE_CHAPTER_H

#include "../ref_cpu/fmoe.h"

#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Case (case.c) ----------------------------------------------------------------------------------------------- */

typedef enum {
    ROUTING_NONE,
    ROUTING_UNIFORM, /* every index drawn uniformly, weights uniform in (0, 1) / K */
    ROUTING_NORMAL,  /* the router's own top-k of standard normal logits (N = n²) */
    ROUTING_TRAINED, /* the top-k of the trained model's logits in tests/golden (n = 128, T ≤ 4096) */
    ROUTING_HOT,     /* uniform, but every token also chooses expert 0 */
} fmoe_routing;

typedef struct {
    char name[96];
    int64_t T, d, I, N, n, K; /* 0 where the name does not say; n = floor(sqrt(N)) where only N is given */
    fmoe_routing routing;
    fmoe_dtype dtype;
    bool training;       /* "-train" in the name; evaluation otherwise */
    bool norm_topk_prob; /* "-norm" in the name */
} fmoe_case;

/* Reads a name such as "T29-n13-K6-normal-bf16-norm": sizes are a letter and a number, words may stand in any order.
 * Any sizes are allowed; FMOE_BAD_SIZE with a message for what cannot be read. */
fmoe_status fmoe_case_parse(const char *name, fmoe_case *c);

/* Random numbers that depend only on (seed, stream, index): the same on any machine with any number of threads. */
uint64_t fmoe_random_bits(uint64_t seed, uint64_t stream, uint64_t index);
float fmoe_random_uniform(uint64_t seed, uint64_t stream, uint64_t index); /* (0, 1) */
float fmoe_random_normal(uint64_t seed, uint64_t stream, uint64_t index);  /* mean 0, variance 1 */
void fmoe_fill_normal(uint64_t seed, uint64_t stream, float scale, int64_t count, float *values);

/* Router logits [2, T, n] for ROUTING_NORMAL and ROUTING_TRAINED. */
fmoe_status fmoe_case_logits(const fmoe_case *c, uint64_t seed, float *logits);
/* indices and weights [T, K] as the case's routing says. */
fmoe_status fmoe_case_route(const fmoe_case *c, uint64_t seed, int32_t *indices, float *weights);

/* ---- Problem (problem.c) ----------------------------------------------------------------------------------------- */

typedef enum {
    ROLE_INPUT,
    ROLE_OUTPUT, /* poisoned before the checked run, compared after it */
    ROLE_INOUT,  /* restored before the checked run, compared after it */
} fmoe_role;

typedef struct {
    const char *name; /* as in fmoe.h: "x", "down", "indices" */
    size_t slot;      /* offsetof the pointer in the step's arguments */
    fmoe_dtype dtype;
    fmoe_role role;
    int rank;
    int64_t shape[4];
    int64_t count;        /* product of the shape */
    double natural_scale; /* see fmoe_relative_error; 0 if unknown */
    int64_t rows_apart;   /* outputs: if over 1, only rows 0, rows_apart, ... are compared; others must be no NaN */
    void *data;           /* host, as stored: the case's rungs read and write this. 64-byte aligned. NULL: left out */
    void *expected;       /* outputs: float32, or int32/int64 as dtype says; filled by the step's reference */
    void *pristine;       /* ROLE_INOUT: the value before the run */
} fmoe_argument;

#define FMOE_MAX_ARGUMENTS 24

typedef struct fmoe_step fmoe_step;

typedef struct {
    const fmoe_step *step;
    fmoe_case c;
    uint64_t seed;
    int num_arguments;
    fmoe_argument arguments[FMOE_MAX_ARGUMENTS];
    void *args; /* the step's argument struct (steps.h), its pointers set to the arguments' data */
} fmoe_problem;

/* What one call must do, for the floor and the CSV: counted once, by hand, in the step's file. */
typedef struct {
    double bytes;          /* each input read once, each output written once */
    double flops;          /* multiply and add counted as two */
    double floor_ms;       /* on this machine, by its measured ceilings */
    const char *floor_why; /* e.g. "gather of two rows a pair from a 17 MB table" */
} fmoe_work;

typedef struct {
    char device[96]; /* "AMD EPYC (2 threads)" */
    char slug[96];   /* "amd-epyc-2t": the folder under plots/data */
    int threads;
    double copy_gbs; /* read + written */
    int num_gather;  /* random rows of 1 KB, by table size */
    double gather_mb[8], gather_gbs[8];
    double fma_gflops;  /* float32, registers only, all threads */
    double gemm_gflops; /* a large product of 16-bit matrices through the vendor's library; a CPU's is its fma_gflops */
    double fork_join_us; /* an empty parallel region; on a GPU an empty launch in a full stream */
} fmoe_ceilings;

/* Measured once a machine and a thread count, then read back from build/ceilings-*.csv. Takes about a second. */
const fmoe_ceilings *fmoe_machine_ceilings(void);
/* The gather rate for a table of this many bytes, interpolated between the measured sizes. GB/s. */
double fmoe_gather_gbs(const fmoe_ceilings *ceilings, double table_bytes);
/* The rate of a dense product of matrices stored so: fma_gflops for float32, else gemm_gflops. */
double fmoe_product_gflops(const fmoe_ceilings *ceilings, fmoe_dtype dtype);

struct fmoe_step {
    const char *op;   /* "topk": the name in CSV files and in performance figures */
    size_t args_size; /* sizeof the argument struct */
    /* Adds the arguments (fmoe_problem_add), draws the inputs, sets the sizes in p->args. */
    fmoe_status (*draw)(fmoe_problem *p);
    /* Fills every output's expected with the reference's result on the stored inputs. */
    fmoe_status (*reference)(fmoe_problem *p);
    /* Optional. The error of the outputs as they stand, where comparing tensor by tensor is not the rule (top-k).
     * Writes the reason to why (at least 200 bytes) and returns infinity where a result is wrong, not imprecise. */
    double (*error)(const fmoe_problem *p, char *why);
    fmoe_work (*work)(const fmoe_problem *p, const fmoe_ceilings *ceilings);
};

/* Builds a problem: arguments allocated and drawn, outputs poisoned, expected filled. Free with fmoe_problem_free. */
fmoe_status fmoe_problem_new(const fmoe_step *step, const fmoe_case *c, uint64_t seed, fmoe_problem *p);
void fmoe_problem_free(fmoe_problem *p);

/* For draw: allocates data (and expected and pristine by role) and points the slot at it. */
fmoe_argument *fmoe_problem_add(fmoe_problem *p, const char *name, size_t slot, fmoe_dtype dtype, fmoe_role role,
                                int rank, const int64_t *shape);
fmoe_argument *fmoe_problem_find(const fmoe_problem *p, const char *name);
/* An argument's stored values as float32 (exact); the caller frees. NULL if there is no such argument or no memory. */
float *fmoe_problem_f32(const fmoe_problem *p, const char *name);

/* Fills outputs with NaN (floats) or a pattern that is no index (integers); restores ROLE_INOUT. */
void fmoe_problem_poison(fmoe_problem *p);
/* The largest error over the outputs (relative for floats, infinity for any differing integer), or step->error.
 * why (at least 200 bytes, may be NULL) names the tensor and the first element that is off. */
double fmoe_problem_error(const fmoe_problem *p, char *why);

/* ---- Rung -------------------------------------------------------------------------------------------------------- */

typedef enum { LEVEL_CORE, LEVEL_ADVANCED, LEVEL_HOPPER } fmoe_level; /* plain, sm_75 | sm_80 | sm_90a */
typedef enum { BACKEND_CPU, BACKEND_CUDA } fmoe_backend;

/* args: the step's struct of steps.h; pointers are host pointers for BACKEND_CPU, device pointers for BACKEND_CUDA.
 * workspace: workspace_bytes as the rung asked for, 256-byte aligned, same side as the pointers, contents undefined.
 * stream: a cudaStream_t for BACKEND_CUDA, NULL for BACKEND_CPU. A rung allocates nothing, prints nothing, and on CUDA
 * does not synchronise. */
typedef fmoe_status fmoe_rung_fn(const void *args, void *workspace, size_t workspace_bytes, void *stream);
typedef size_t fmoe_workspace_fn(const void *args);

typedef struct {
    const char *name; /* "staircase": what --only takes and the CSV's variant column holds */
    fmoe_level level;
    fmoe_backend backend;
    const char *idea;                   /* one sentence: what it changes and what that should buy */
    fmoe_rung_fn *run;                  /* NULL ends a ladder's array */
    fmoe_workspace_fn *workspace;       /* NULL: needs none */
    bool (*supports)(const void *args); /* NULL: supports every case */
    bool library;                       /* a vendor library's rung, the baseline of one column */
    bool replay;                        /* on CUDA: timed as one replay of a graph that holds the call */
    bool (*available)(void);            /* NULL: always; else e.g. whether the library could be loaded */
} fmoe_rung;

/* Runs a rung once on poisoned outputs with a workspace of exactly the size it asks for, between guard bands, and
 * measures the error. FMOE_UNSUPPORTED if it does not support the case. why as in fmoe_problem_error. */
fmoe_status fmoe_rung_check(const fmoe_rung *rung, fmoe_problem *p, double *error, char *why);

/* ---- Chapter ----------------------------------------------------------------------------------------------------- */

typedef struct {
    const fmoe_step *step;
    const fmoe_rung *rungs;         /* on the CPU, ended by a rung whose run is NULL */
    const char *const *cases;       /* default cases, ended by NULL; about ten seconds for all of a chapter's. Without
                                       any, the ladder is climbed only where there is a GPU */
    const char *const *quick_cases; /* --quick; about three seconds */
    const fmoe_rung *cuda; /* optional: on the GPU, ended like rungs; climbed after them where there is a device */
    const char *const
        *cuda_cases; /* optional: more cases where there is a device; of the CPU only its last rung climbs */
} fmoe_ladder;

typedef struct {
    int number;
    const char *title;
    const fmoe_ladder *ladders; /* ended by a ladder whose step is NULL */
    /* Optional, e.g. chapter 8's --golden FILE. Returns true if it took argv[*i] (and what belongs to it, *i then being
     * the last argument taken). */
    bool (*option)(int argc, char **argv, int *i);
    const char *option_help;
    /* Optional: runs before or after the ladders (a demonstration, a breakdown, a map). Nonzero ends with that status.
     */
    int (*before)(void);
    int (*after)(void);
    /* Optional: a script in plots/ of the chapter's own, besides the ladder plot. It is given csv, svg ('' for the
     * terminal), title, and ops, the names of the chapter's ladders. */
    const char *gnuplot;
} fmoe_chapter;

int fmoe_chapter_main(const fmoe_chapter *chapter, int argc, char **argv);

/* ---- For chapters with figures of their own ---------------------------------------------------------------------- */

typedef struct {
    int threads, level;
    uint64_t seed;
    bool quick, predict;
    const char *only, *csv;
} fmoe_options;
extern fmoe_options fmoe_opt; /* the command line, after fmoe_chapter_main read it */

typedef struct {
    double median_ms, min_ms, max_ms;
    int runs;
} fmoe_timing;
/* One warm-up, then runs until about 0.4 s (0.1 s with --quick), at least 3 and at most 200 of them. */
fmoe_timing fmoe_time(void (*call)(void *), void *context);
double fmoe_now_ms(void);

/* One CSV row (the columns of the recorded data); written to the chapter's CSV, and to nowhere outside a chapter. */
void fmoe_csv_row(const char *op, const char *case_name, const char *variant, fmoe_level level, fmoe_backend backend,
                  fmoe_dtype dtype, fmoe_timing timing, double rel_err, fmoe_work work);
void fmoe_progress(const char *format, ...) __attribute__((format(printf, 1, 2))); /* stderr, only on a terminal */

#ifdef __cplusplus
}
#endif
#endif
