/* Chapter 8: the hybrid layer. */
#include "../../cuda/rungs.h"
#include "../golden.h"
#include "../steps.h"
#include "golden_rungs.h"
#include "gpu_steps.h"

#include <stdlib.h>
#include <string.h>

static const char *const cases[] = {"T1-d256-I1024-N4096-K16-normal-f32", "T64-d256-I1024-N4096-K16-normal-f32",
                                    "T1024-d256-I1024-N4096-K16-normal-f32", NULL};
static const char *const quick_cases[] = {"T1-d256-I1024-N4096-K16-normal-f32", "T64-d256-I1024-N4096-K16-normal-f32",
                                          "T256-d256-I1024-N4096-K16-normal-f32", NULL};

static const char *const cuda_cases[] = {
    "T1-d1024-I4096-N16384-K64-normal-bf16",     "T64-d1024-I4096-N16384-K64-normal-bf16",
    "T1024-d1024-I4096-N16384-K64-normal-bf16",  "T4096-d1024-I4096-N16384-K64-normal-bf16",
    "T4096-d1024-I4096-N16384-K64-trained-bf16", "T4096-d1024-I4096-N16384-K64-normal-bf16-train",
    "T16384-d1024-I4096-N16384-K64-normal-bf16", NULL};

/* From the command line, before the chapter reads it. */
static const char *asked; /* --case */
static bool on_gpu;       /* --backend cuda */

/* ---- --golden FILE ----------------------------------------------------------------------------------------------- */

static int run_golden(const char *path) {
    golden_report report;
    fmoe_status status = golden_check(path, &report);
    if (status != FMOE_OK) {
        fprintf(stderr, "%s: %s\n", fmoe_status_name(status), fmoe_error_message());
        return 2;
    }
    printf("%s\n%s\n\n", path, report.configuration);
    printf("  %-32s %-18s %10s %10s\n", "tensor", "shape", "error", "limit");
    for (int i = 0; i < report.num_lines; i++) {
        const golden_line *line = &report.lines[i];
        printf("  %-32s %-18s %10.2e %10.2e  %s%s%s\n", line->name, line->shape, line->error, line->limit,
               line->ok ? "ok" : "FAILED", line->note[0] ? ": " : "", line->note);
    }
    bool passed = golden_passed(&report);
    printf("\n%s\n", passed ? "Every result is within its limit." : "A result is over its limit: see FAILED above.");
    return passed ? 0 : 1;
}

/* Golden files are for the reference, or with --backend cuda for the GPU's rungs: no ladder is climbed, no CSV written.
 */
static bool option(int argc, char **argv, int *i) {
    if (strcmp(argv[*i], "--backend") == 0 && *i + 1 < argc) {
        ++*i;
        return true;
    }
    if (strcmp(argv[*i], "--golden") != 0)
        return false;
    if (*i + 1 == argc) {
        fprintf(stderr, "--golden needs a value\n");
        exit(2);
    }
    ++*i;
    exit(on_gpu ? golden_rungs(argv[*i]) : run_golden(argv[*i]));
}

/* ---- Where the time goes ----------------------------------------------------------------------------------------- */

/* One step of the layer on its own: the best rung of its chapter, on the layer's own data. */
typedef struct {
    const char *name;
    fmoe_rung_fn *run;
    const void *args;
    size_t workspace_bytes;
    void *workspace;
    double flops, bytes; /* bytes: what it reads and writes, through whichever cache */
    fmoe_status status;
    fmoe_timing timing;
} layer_step;

static void call_step(void *context) {
    layer_step *step = context;
    fmoe_status status = step->run(step->args, step->workspace, step->workspace_bytes, NULL);
    if (status != FMOE_OK)
        step->status = status;
}

static fmoe_status time_step(layer_step *step) {
    step->workspace = aligned_alloc(256, (step->workspace_bytes + 256) / 256 * 256);
    if (!step->workspace)
        return FMOE_OUT_OF_MEMORY;
    step->timing = fmoe_time(call_step, step);
    free(step->workspace);
    return step->status;
}

static void show_steps(const char *case_name, fmoe_dtype dtype, const layer_step *steps, int count) {
    enum { BAR = 40 };
    double total = 0;
    for (int i = 0; i < count; i++)
        total += steps[i].timing.median_ms;
    printf("\nwhere the time goes  %s\n", case_name);
    printf("  %-8s %10s %7s %9s %11s\n", "step", "median ms", "share", "GFLOP/s", "flop/byte");
    for (int i = 0; i < count; i++) {
        const layer_step *s = &steps[i];
        double share = s->timing.median_ms / total;
        printf("  %-8s %10.4f %6.1f%% %9.2f %11.2f  %.*s\n", s->name, s->timing.median_ms, 100 * share,
               s->flops / s->timing.median_ms / 1e6, s->flops / s->bytes, (int)(share * BAR + 0.5),
               "########################################");
        fmoe_work work = {.bytes = s->bytes, .flops = s->flops};
        fmoe_csv_row("layer_step", case_name, s->name, LEVEL_CORE, BACKEND_CPU, dtype, s->timing, 0, work);
    }
}

/* The steps in the layer's order, so that each finds what the one before left. */
static fmoe_status break_down(const fmoe_problem *p, float *log_probs, float *weights, void *routed) {
    const fmoe_layer_args *a = p->args;
    fmoe_router_args router = {.T = a->T,
                               .d = a->d,
                               .n = a->n,
                               .training = a->training,
                               .dtype = a->dtype,
                               .x = a->x,
                               .gate = a->router_gate,
                               .running_mean = a->running_mean,
                               .running_var = a->running_var,
                               .logits = a->router_logits,
                               .log_probs = log_probs};
    fmoe_topk_args topk = {.T = a->T,
                           .n = a->n,
                           .K = a->K,
                           .norm_topk_prob = a->norm_topk_prob,
                           .dtype = FMOE_F32,
                           .logits = a->router_logits,
                           .indices = a->indices,
                           .scores = a->scores,
                           .weights = weights};
    fmoe_expert_args expert = {.T = a->T,
                               .d = a->d,
                               .N = a->N,
                               .K = a->K,
                               .from_router = true,
                               .dtype = a->dtype,
                               .x = a->x,
                               .down = a->down_embed,
                               .up = a->up_embed,
                               .indices = a->indices,
                               .weights = weights,
                               .y = routed};
    fmoe_mlp_args mlp = {.T = a->T,
                         .d = a->d,
                         .I = a->I,
                         .dtype = a->dtype,
                         .x = a->x,
                         .gate = a->gate_proj,
                         .up = a->up_proj,
                         .down = a->down_proj,
                         .y = a->y};
    double size = (double)fmoe_dtype_size(a->dtype), T = (double)a->T, d = (double)a->d, I = (double)a->I;
    double n = (double)a->n, K = (double)a->K;
    bool grouped = a->T * a->K > a->N;
    layer_step steps[] = {
        {.name = "router",
         .run = cpu_router_best,
         .args = &router,
         .workspace_bytes = cpu_router_best_workspace(&router),
         .flops = 4 * T * n * d,
         .bytes = (T * d + 2 * n * d) * size + 2 * T * n * 4},
        {.name = "topk",
         .run = cpu_topk_best,
         .args = &topk,
         .workspace_bytes = cpu_topk_best_workspace(&topk),
         .flops = T * (2 * n + 4 * K),
         .bytes = 2 * T * n * 4 + 3 * T * K * 4},
        {.name = "expert",
         .run = grouped ? cpu_expert_scheduled_best : cpu_expert_token_best,
         .args = &expert,
         .workspace_bytes =
             grouped ? cpu_expert_scheduled_best_workspace(&expert) : cpu_expert_token_best_workspace(&expert),
         .flops = 4 * T * K * d,
         .bytes = (2 * T * K * d + 2 * T * d) * size + 8 * T * K},
        {.name = "mlp",
         .run = cpu_mlp_best,
         .args = &mlp,
         .workspace_bytes = cpu_mlp_best_workspace(&mlp),
         .flops = 6 * T * I * d,
         .bytes = (3 * I * d + 2 * T * d) * size},
    };
    enum { COUNT = sizeof steps / sizeof *steps };
    for (int i = 0; i < COUNT; i++) {
        fmoe_progress("%s: %s alone", p->c.name, steps[i].name);
        fmoe_status status = time_step(&steps[i]);
        if (status != FMOE_OK)
            return status;
    }
    fmoe_progress("%s", "");
    show_steps(p->c.name, a->dtype, steps, COUNT);
    return FMOE_OK;
}

static int break_down_case(const char *name) {
    fmoe_case c;
    fmoe_problem p;
    fmoe_status status = fmoe_case_parse(name, &c);
    if (status == FMOE_OK)
        status = fmoe_problem_new(&fmoe_step_layer, &c, fmoe_opt.seed, &p);
    if (status != FMOE_OK) {
        fprintf(stderr, "%s: %s\n", name, fmoe_error_message());
        return 2;
    }
    const fmoe_layer_args *a = p.args;
    float *log_probs = malloc((size_t)(2 * a->T * a->n) * sizeof *log_probs + 1);
    float *weights = malloc((size_t)(a->T * a->K) * sizeof *weights + 1);
    void *routed = malloc((size_t)(a->T * a->d) * sizeof(float) + 1);
    status = FMOE_OUT_OF_MEMORY;
    if (log_probs && weights && routed)
        status = break_down(&p, log_probs, weights, routed);
    if (status != FMOE_OK)
        fprintf(stderr, "%s: %s\n", name, fmoe_status_name(status));
    free(log_probs);
    free(weights);
    free(routed);
    fmoe_problem_free(&p);
    return status != FMOE_OK;
}

static int after(void) {
    const char *const *all = fmoe_opt.quick ? quick_cases : cases;
    const char *const one[] = {asked, NULL};
    int status = 0;
    if (fmoe_opt.only)
        return 0;
    for (all = asked ? one : all; *all && status == 0; all++)
        status = break_down_case(*all);
    for (all = asked ? one : cuda_cases; *all && status == 0; all++)
        status = gpu_steps(*all);
    return status;
}

static const fmoe_ladder ladders[] = {
    {.step = &fmoe_step_layer,
     .rungs = chapter8_rungs,
     .cases = cases,
     .quick_cases = quick_cases,
     .cuda = cuda_layer_rungs,
     .cuda_cases = cuda_cases},
    {0},
};
static const fmoe_chapter chapter = {
    .number = 8,
    .title = "the hybrid layer: overlap, graphs, decode",
    .ladders = ladders,
    .option = option,
    .option_help = "  --golden FILE    check the reference, forward and backward, against a golden file, and nothing\n"
                   "                   else: a line a tensor; status 1 if one is over its limit, 2 if the file is bad\n"
                   "  --backend cuda   with --golden: the GPU's rungs, forward, in place of the reference\n",
    .after = after,
    .gnuplot = "breakdown.gp",
};

int main(int argc, char **argv) {
    for (int i = 1; i + 1 < argc; i++)
        if (strcmp(argv[i], "--case") == 0)
            asked = argv[i + 1];
        else if (strcmp(argv[i], "--backend") == 0)
            on_gpu = strcmp(argv[i + 1], "cuda") == 0;
    return fmoe_chapter_main(&chapter, argc, argv);
}
