/* Chapter 9: the backward pass. Before the ladders it checks the gradients by finite differences, after them it counts
 * what atomic additions do to the bits, on the CPU and on the GPU. */
#include "../../cuda/layer_backward/layer_backward.h"
#include "../../cuda/rungs.h"
#include "../device.h"
#include "../steps.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Finite differences ------------------------------------------------------------------------------------------ */

enum { TOKENS = 6, D = 8, HIDDEN = 12, EXPERTS = 16, KEYS = 4, CHOSEN = 3, NUM_TENSORS = 7 };

/* A layer small enough to be nudged one weight at a time: x and the six weights, the fixed choice, and dy. */
static struct {
    float *tensors[NUM_TENSORS];
    float dy[TOKENS * D];
    int32_t indices[TOKENS * CHOSEN];
} tiny;

static const struct {
    const char *name;
    int count;
} tensors[NUM_TENSORS] = {
    {"x", TOKENS *D},         {"router_gate", 2 * KEYS *D}, {"down_embed", EXPERTS *D}, {"up_embed", EXPERTS *D},
    {"gate_proj", HIDDEN *D}, {"up_proj", HIDDEN *D},       {"down_proj", D *HIDDEN},
};

static const fmoe_config config = {D, HIDDEN, EXPERTS, CHOSEN, true};

static fmoe_weights weights_with(float *mean, float *var) {
    float **t = tiny.tensors;
    memset(mean, 0, D * sizeof *mean);
    memset(var, 0, D * sizeof *var);
    return (fmoe_weights){t[1], t[2], t[3], t[4], t[5], t[6], mean, var};
}

// [loss]
/* A number whose gradient by y is dy: L = Σ dy · y. The choice stays as it was made, as in the backward pass. */
static double loss(void) {
    float y[TOKENS * D], mean[D], var[D];
    fmoe_outputs outputs = {.y = y};
    fmoe_weights weights = weights_with(mean, var);
    double sum = 0;
    fmoe_layer_forward(&config, &weights, true, TOKENS, tiny.tensors[0], tiny.indices, &outputs);
    for (int i = 0; i < TOKENS * D; i++)
        sum += (double)tiny.dy[i] * y[i];
    return sum;
}

/* (L(w + h) − L(w − h)) / 2h, with the step that float32 really took. */
static double difference_quotient(float *w, float h) {
    float before = *w, above = before + h, below = before - h;
    *w = above;
    double loss_above = loss();
    *w = below;
    double loss_below = loss();
    *w = before;
    return (loss_above - loss_below) / ((double)above - below);
}
// [/loss]

/* ‖quotient − gradient‖ / ‖gradient‖ over a tensor. */
static double disagreement(int tensor, const float *gradient, float h) {
    double difference = 0, norm = 0;
    for (int i = 0; i < tensors[tensor].count; i++) {
        double off = difference_quotient(&tiny.tensors[tensor][i], h) - gradient[i];
        difference += off * off;
        norm += (double)gradient[i] * gradient[i];
    }
    return sqrt(difference / norm);
}

static bool draw_tiny(void) {
    for (int i = 0; i < NUM_TENSORS; i++) {
        tiny.tensors[i] = malloc((size_t)tensors[i].count * sizeof(float));
        if (!tiny.tensors[i])
            return false;
        float scale = i == 0 || i == 3 ? 1 : 0.35f;
        fmoe_fill_normal(fmoe_opt.seed, (uint64_t)i, scale, tensors[i].count, tiny.tensors[i]);
    }
    fmoe_fill_normal(fmoe_opt.seed, NUM_TENSORS, 1, TOKENS * D, tiny.dy);
    return true;
}

static int finite_differences(void) {
    float mean[D], var[D], y[TOKENS * D], gradients[NUM_TENSORS][EXPERTS * D];
    fmoe_outputs outputs = {.y = y, .indices = tiny.indices};
    fmoe_gradients g = {gradients[0], gradients[1], gradients[2], gradients[3],
                        gradients[4], gradients[5], gradients[6]};
    fmoe_weights weights;
    if (!draw_tiny())
        return 1;
    weights = weights_with(mean, var);
    if (fmoe_layer_forward(&config, &weights, true, TOKENS, tiny.tensors[0], NULL, &outputs) != FMOE_OK ||
        fmoe_layer_backward(&config, &weights, true, TOKENS, tiny.tensors[0], tiny.indices, tiny.dy, FMOE_OVERWRITE,
                            &g) != FMOE_OK) {
        fprintf(stderr, "%s\n", fmoe_error_message());
        return 1;
    }
    printf(
        "\nGradients against (L(w + h) - L(w - h)) / 2h, for a layer of %d tokens, d %d, I %d, N %d, K %d in training"
        "\n  %-12s %9s %10s %10s %10s\n",
        TOKENS, D, HIDDEN, EXPERTS, CHOSEN, "tensor", "elements", "h = 1/8", "h = 1/16", "h = 1/32");
    for (int i = 0; i < NUM_TENSORS; i++) {
        printf("  %-12s %9d", tensors[i].name, tensors[i].count);
        for (int shift = 3; shift <= 5; shift++)
            printf("    %.1e", disagreement(i, gradients[i], 1.0f / (float)(1 << shift)));
        printf("\n");
    }
    for (int i = 0; i < NUM_TENSORS; i++)
        free(tiny.tensors[i]);
    printf(
        "  Halving the step divides what is left by four: it is the quotient's own error, h² and smaller.\n"
        "  Where L is linear (up_embed, up_proj, down_proj) the quotient is exact, and rounding is all that shows.\n");
    return 0;
}

/* ---- Atomic additions -------------------------------------------------------------------------------------------- */

enum { RUNS = 20, PAIRS = 4096, WIDTH = 64, TABLE = 16 };

// [atomic-scatter]
/* dup of a small table, token by token on all threads: whoever comes first adds first. */
static void atomic_scatter(const float *rows, float *table) {
    memset(table, 0, TABLE * WIDTH * sizeof *table);
#pragma omp parallel for schedule(dynamic, 8)
    for (int p = 0; p < PAIRS; p++)
        for (int c = 0; c < WIDTH; c++) {
#pragma omp atomic
            table[p % TABLE * WIDTH + c] += rows[p * WIDTH + c];
        }
}
// [/atomic-scatter]

static int count_bits(void) {
    float *rows = malloc(PAIRS * WIDTH * sizeof *rows), first[TABLE * WIDTH], table[TABLE * WIDTH];
    int different = 0, elements = 0;
    if (!rows)
        return 1;
    fmoe_fill_normal(fmoe_opt.seed, 0, 1, PAIRS * WIDTH, rows);
    atomic_scatter(rows, first);
    for (int run = 1; run < RUNS; run++) {
        atomic_scatter(rows, table);
        different += memcmp(first, table, sizeof table) != 0;
        for (int i = 0; i < TABLE * WIDTH; i++)
            elements += table[i] != first[i];
    }
    free(rows);
    printf(
        "\nAtomic additions, %d pairs into %d rows, %d threads: %d of %d repeated runs differ in bits from the first,"
        "\nin %d of %d elements on average. Every rung above writes the same bits every time.\n",
        PAIRS, TABLE, fmoe_opt.threads, different, RUNS - 1, elements / (RUNS - 1), TABLE * WIDTH);
    return 0;
}

#ifdef FMOE_WITH_CUDA

/* Of a GPU rung: its time and error, the repeated runs whose dup differs from the first one's, and in how many elements
 * on average. */
typedef struct {
    fmoe_timing timing;
    double error, elements;
    int different;
} gpu_bits;

// [gpu-bits]
static fmoe_status compare_runs(const fmoe_rung *rung, fmoe_problem *p, gpu_bits *bits) {
    fmoe_device_problem device;
    fmoe_argument *dup = fmoe_problem_find(p, "dup");
    float *first = malloc((size_t)dup->count * sizeof *first), *now = dup->data;
    size_t bytes = rung->workspace(p->args);
    char why[200];
    fmoe_status status = first ? fmoe_device_problem_new(p, bytes, &device) : FMOE_OUT_OF_MEMORY;
    for (int run = 0; run < RUNS && status == FMOE_OK; run++) {
        int64_t off = 0;
        status = rung->run(device.args, device.workspace, bytes, device.stream);
        if (status == FMOE_OK)
            status = fmoe_device_problem_fetch(&device, p, why);
        if (run == 0)
            memcpy(first, now, (size_t)dup->count * sizeof *first);
        for (int64_t i = 0; i < dup->count; i++)
            off += memcmp(&first[i], &now[i], sizeof *now) != 0;
        bits->different += off > 0;
        bits->elements += (double)off / (RUNS - 1);
    }
    if (first)
        fmoe_device_problem_free(&device);
    free(first);
    bits->error = fmoe_problem_error(p, why);
    return status == FMOE_OK ? fmoe_device_time(rung, p, &bits->timing) : status;
}
// [/gpu-bits]

static int count_gpu_bits(void) {
    fmoe_problem p;
    fmoe_case c;
    if (!fmoe_device_get()->present)
        return 0;
    if (fmoe_case_parse("T1024-d256-N1024-K32-hot-f32", &c) != FMOE_OK ||
        fmoe_problem_new(&fmoe_step_expert_backward, &c, fmoe_opt.seed, &p) != FMOE_OK) {
        fprintf(stderr, "%s\n", fmoe_error_message());
        return 1;
    }
    printf("\nThe same on the GPU, dup at %s: of %d repeated runs\n  %-12s %9s %8s %8s %22s\n", c.name, RUNS - 1,
           "rung", "ms", "error", "differ", "in elements of their");
    int failed = 0;
    for (const fmoe_rung *rung = cuda_expert_backward_rungs; rung->run && !failed; rung++) {
        gpu_bits bits = {0};
        failed = compare_runs(rung, &p, &bits) != FMOE_OK;
        if (failed)
            fprintf(stderr, "%s: %s\n", rung->name, fmoe_error_message());
        else
            printf("  %-12s %9.4f %8.1e %8d %12.0f %9lld\n", rung->name, bits.timing.median_ms, bits.error,
                   bits.different, bits.elements, (long long)fmoe_problem_find(&p, "dup")->count);
    }
    fmoe_problem_free(&p);
    return failed;
}

#else

static int count_gpu_bits(void) {
    return 0;
}

#endif

static int after(void) {
    int failed = count_bits();
    return failed ? failed : count_gpu_bits();
}

/* ---- The chapter ------------------------------------------------------------------------------------------------- */

static const char *const router_cases[] = {"T1024-d256-n128-f32-train", NULL};
static const char *const topk_cases[] = {"T4096-n128-K64-normal-f32", NULL};
static const char *const expert_cases[] = {"T1024-d256-N16384-K64-uniform-f32", "T1024-d256-N16384-K64-trained-bf16",
                                           "T8192-d256-N1024-K2-hot-f32", NULL};
static const char *const mlp_cases[] = {"T256-d256-I1024-f32", NULL};
static const char *const layer_cases[] = {"T256-d256-I1024-N4096-K32-normal-f32-train",
                                          "T1024-d256-I1024-N16384-K64-normal-f32-train", NULL};

static const char *const quick_router[] = {"T256-d256-n64-f32-train", NULL};
static const char *const quick_topk[] = {"T1024-n128-K64-normal-f32", NULL};
static const char *const quick_expert[] = {"T512-d256-N4096-K32-uniform-f32", "T4096-d256-N1024-K2-hot-f32", NULL};
static const char *const quick_mlp[] = {"T128-d256-I512-f32", NULL};
static const char *const quick_layer[] = {"T128-d128-I512-N1024-K16-normal-f32-train", NULL};

static const char *const expert_cuda_cases[] = {"T4096-d1024-N16384-K64-uniform-bf16",
                                                "T4096-d1024-N16384-K64-normal-bf16",
                                                "T4096-d1024-N16384-K64-trained-bf16",
                                                "T4096-d1024-N16384-K64-hot-bf16",
                                                "T1024-d1024-N65536-K32-uniform-bf16",
                                                "T1024-d1024-N102400-K512-uniform-bf16",
                                                NULL};
static const char *const router_cuda_cases[] = {"T4096-d1024-n128-bf16-train", "T1024-d1024-n128-bf16-train", NULL};
static const char *const layer_cuda_cases[] = {"T4096-d1024-I4096-N16384-K64-normal-bf16-train", NULL};
static const char *const mlp_cuda_cases[] = {"T4096-d1024-I4096-bf16", "T1024-d1024-I4096-bf16", NULL};

static const fmoe_ladder ladders[] = {
    {&fmoe_step_router_backward, chapter9_router_rungs, router_cases, quick_router, cuda_router_backward_rungs,
     router_cuda_cases},
    {&fmoe_step_topk_backward, chapter9_topk_rungs, topk_cases, quick_topk, cuda_topk_backward_rungs, NULL},
    {&fmoe_step_expert_backward, chapter9_expert_rungs, expert_cases, quick_expert, cuda_expert_backward_rungs,
     expert_cuda_cases},
    {&fmoe_step_mlp_backward, chapter9_mlp_rungs, mlp_cases, quick_mlp, cuda_mlp_backward_rungs, mlp_cuda_cases},
    {&fmoe_step_layer_backward, chapter9_layer_rungs, layer_cases, quick_layer, cuda_layer_backward_rungs,
     layer_cuda_cases},
    {.step = NULL},
};

int main(int argc, char **argv) {
    fmoe_chapter chapter = {
        .number = 9, .title = "the backward pass", .ladders = ladders, .before = finite_differences, .after = after};
    return fmoe_chapter_main(&chapter, argc, argv);
}
