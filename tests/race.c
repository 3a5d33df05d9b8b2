/* For the race detector: every function of the reference and every CPU rung once, with four threads, on sizes that
 * divide nothing. A program of its own, because the detector and Criterion's processes do not go together.
 *
 * --plant runs two races instead, each the kind of mistake that OpenMP makes easy. A detector that does not report them
 * proves nothing by its silence. */
#include "../chapters/steps.h"

#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 4, T = 29, D = 19, I = 23, N = 50, KEYS = 7, K = 6 };

static int failures;

static void must(const char *what, fmoe_status status) {
    if (status == FMOE_OK)
        return;
    fprintf(stderr, "race: %s: %s: %s\n", what, fmoe_status_name(status), fmoe_error_message());
    failures++;
}

/* ---- The ladders ------------------------------------------------------------------------------------------------- */

static const struct {
    const fmoe_step *step;
    const fmoe_rung *rungs;
    const char *cases[3];
} ladders[] = {
    {&fmoe_step_expert, chapter1_rungs, {"T29-d19-N50-K6-uniform-f32", "T29-d19-N49-K6-normal-bf16"}},
    {&fmoe_step_router, chapter2_rungs, {"T29-d19-n7-f32", "T29-d19-n7-bf16-train", "T131-d67-n7-f32-train"}},
    {&fmoe_step_topk, chapter3_rungs, {"T29-n7-K6-normal-f32", "T29-n13-K40-normal-bf16-norm"}},
    /* More than 2^14 pairs, or its rungs stay on one thread; more than 2^16 make two chunks. */
    {&fmoe_step_schedule, chapter4_rungs, {"T3001-N5000-K6-hot", "T9001-N5000-K8-uniform"}},
    {&fmoe_step_expert, chapter5_rungs, {"T29-d19-N50-K6-hot-f32", "T129-d70-N49-K6-normal-bf16"}},
    {&fmoe_step_mlp, chapter6_rungs, {"T29-d19-I23-f32", "T70-d67-I101-bf16", "T1-d19-I23-f32"}},
    {&fmoe_step_expert, chapter7_rungs, {"T29-d19-N49-K6-normal-f32", "T29-d19-N50-K40-uniform-bf16"}},
    /* Three blocks of tokens, in either mode, and few enough to decode. */
    {&fmoe_step_layer,
     chapter8_rungs,
     {"T131-d19-I23-N50-K6-normal-f32-train", "T131-d19-I23-N50-K6-normal-bf16-norm", "T3-d19-I23-N50-K6-normal-f32"}},
    {&fmoe_step_router_backward, chapter9_router_rungs, {"T29-d19-n7-f32-train", "T131-d67-n7-bf16"}},
    {&fmoe_step_topk_backward, chapter9_topk_rungs, {"T29-n7-K6-normal-f32", "T29-n7-K6-normal-bf16-norm"}},
    {&fmoe_step_expert_backward, chapter9_expert_rungs, {"T29-d19-N50-K6-hot-f32", "T29-d19-N49-K6-normal-bf16"}},
    {&fmoe_step_mlp_backward, chapter9_mlp_rungs, {"T29-d19-I23-f32", "T29-d19-I23-bf16"}},
    {&fmoe_step_layer_backward,
     chapter9_layer_rungs,
     {"T29-d19-I23-N50-K6-normal-f32-train", "T29-d19-I23-N50-K6-normal-bf16"}},
};

static void run_rungs(const fmoe_step *step, const fmoe_rung *rungs, const char *name) {
    fmoe_case c;
    fmoe_problem p;
    fmoe_status status = fmoe_case_parse(name, &c);
    if (status == FMOE_OK)
        status = fmoe_problem_new(step, &c, 1, &p);
    must(name, status);
    if (status != FMOE_OK)
        return;
    for (const fmoe_rung *rung = rungs; rung->run; rung++) {
        /* A library's own threads are not this project's, and the detector cannot see into it. */
        if (rung->backend != BACKEND_CPU || rung->library || (rung->available && !rung->available()))
            continue;
        double error = 0;
        status = fmoe_rung_check(rung, &p, &error, NULL);
        if (status == FMOE_UNSUPPORTED)
            continue;
        must(rung->name, status);
        if (status == FMOE_OK && !(error <= fmoe_error_limit(c.dtype))) {
            fprintf(stderr, "race: %s %s, %s: error %g\n", step->op, rung->name, name, error);
            failures++;
        }
        printf("  %s %s, %s\n", step->op, rung->name, name);
    }
    fmoe_problem_free(&p);
}

/* ---- The reference ----------------------------------------------------------------------------------------------- */

static float *drawn(int64_t count) {
    static uint64_t stream;
    float *values = malloc((size_t)count * sizeof *values);
    if (!values)
        exit(1);
    fmoe_fill_normal(1, stream++, 1, count, values);
    return values;
}

static void run_reference(bool training) {
    fmoe_config config = {D, I, N, K, training};
    float *x = drawn(T * D), *dy = drawn(T * D), *y = drawn(T * D), *dx = drawn(T * D), *scores = drawn(T * K);
    float *logits = drawn(2 * T * KEYS), *other = drawn(2 * T * KEYS), *routing = drawn(T * K), *pre = drawn(T * K);
    float *mean = drawn(D), *var = drawn(D);
    float *gate = drawn(2 * KEYS * D), *down = drawn(N * D), *up = drawn(N * D);
    float *gate_proj = drawn(I * D), *up_proj = drawn(I * D), *down_proj = drawn(D * I);
    float *dgate = drawn(2 * KEYS * D), *ddown = drawn(N * D), *dup = drawn(N * D);
    float *dgate_proj = drawn(I * D), *dup_proj = drawn(I * D), *ddown_proj = drawn(D * I);
    int32_t indices[T * K], offsets[N + 1], pairs[T * K];
    for (int h = 0; h < D; h++)
        var[h] = 1;

    fmoe_weights weights = {gate, down, up, gate_proj, up_proj, down_proj, mean, var};
    fmoe_outputs outputs = {y, logits, scores, indices};
    must("layer", fmoe_layer_forward(&config, &weights, training, T, x, NULL, &outputs));
    fmoe_gradients gradients = {dx, dgate, ddown, dup, dgate_proj, dup_proj, ddown_proj};
    for (fmoe_write write = FMOE_OVERWRITE; write <= FMOE_ACCUMULATE; write++)
        must("layer backward", fmoe_layer_backward(&config, &weights, training, T, x, indices, dy, write, &gradients));

    must("norm", fmoe_router_norm(training, T, D, x, mean, var, y));
    must("norm backward", fmoe_router_norm_backward(training, T, D, x, mean, var, dy, dx));
    must("logits", fmoe_router_logits(T, D, KEYS, y, gate, logits));
    must("logits backward", fmoe_router_logits_backward(T, D, KEYS, y, gate, logits, FMOE_OVERWRITE, dx, dgate));
    must("log-softmax", fmoe_log_softmax(2 * T, KEYS, logits, other));
    must("log-softmax backward", fmoe_log_softmax_backward(2 * T, KEYS, logits, logits, other));
    must("topk", fmoe_topk(T, KEYS, K, training, logits, indices, scores, routing));
    must("topk at", fmoe_topk_at(T, KEYS, K, training, logits, indices, scores, routing));
    must("topk backward", fmoe_topk_backward(T, KEYS, K, training, logits, indices, pre, scores, other));
    must("schedule", fmoe_schedule(T, K, N, indices, offsets, pairs));
    must("expert", fmoe_expert(T, D, N, K, x, down, up, indices, routing, y, pre));
    must("expert scheduled", fmoe_expert_scheduled(T, D, N, K, x, down, up, indices, routing, offsets, pairs, y, pre));
    must("expert backward",
         fmoe_expert_backward(T, D, N, K, x, down, up, indices, routing, dy, FMOE_OVERWRITE, dx, ddown, dup, scores));
    must("mlp", fmoe_mlp(T, D, I, x, gate_proj, up_proj, down_proj, y));
    must("mlp backward", fmoe_mlp_backward(T, D, I, x, gate_proj, up_proj, down_proj, dy, FMOE_OVERWRITE, dx,
                                           dgate_proj, dup_proj, ddown_proj));

    uint16_t halves[T * D];
    fmoe_from_f32(FMOE_F16, T * D, x, halves);
    fmoe_to_f32(FMOE_F16, T * D, halves, y);
    (void)fmoe_relative_error(T * D, x, y, 1);
    (void)fmoe_compare_indices(T, KEYS, K, logits, indices, indices);

    float *all[] = {x,         dy,    y,     dx,   scores,     logits,   other,     routing,
                    pre,       mean,  var,   gate, down,       up,       gate_proj, up_proj,
                    down_proj, dgate, ddown, dup,  dgate_proj, dup_proj, ddown_proj};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    printf("  the reference, %s\n", training ? "training" : "evaluation");
}

/* ---- The plant --------------------------------------------------------------------------------------------------- */

/* A sum without a reduction clause. */
static int sum_without_reduction(void) {
    int sum = 0;
#pragma omp parallel for
    for (int i = 0; i < 1000; i++)
        sum += i;
    return sum;
}

/* A second loop that reads what other threads of the first may still be writing. */
static int loops_without_barrier(void) {
    int written[1000], read[1000];
#pragma omp parallel
    {
#pragma omp for nowait
        for (int i = 0; i < 1000; i++)
            written[i] = i;
#pragma omp for
        for (int i = 0; i < 1000; i++)
            read[i] = written[999 - i];
    }
    return read[0];
}

int main(int argc, char **argv) {
    omp_set_num_threads(THREADS);
    if (argc > 1 && strcmp(argv[1], "--plant") == 0) {
        printf("two races were run: %d, %d\n", sum_without_reduction(), loops_without_barrier());
        return 0;
    }
    run_reference(false);
    run_reference(true);
    for (size_t i = 0; i < sizeof ladders / sizeof *ladders; i++)
        for (size_t c = 0; c < 3 && ladders[i].cases[c]; c++)
            run_rungs(ladders[i].step, ladders[i].rungs, ladders[i].cases[c]);
    return failures != 0;
}
