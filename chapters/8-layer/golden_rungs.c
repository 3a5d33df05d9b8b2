/* A golden file as a problem of the layer's step: the inputs as they are stored, and as the expected results the
 * file's. The GPU's rungs then run on it like on any other. A file of router logits alone is one of the top-k's. */
#include "golden_rungs.h"

#include "../../cuda/rungs.h"
#include "../../ref_cpu/check.h"
#include "../device.h"

#include <stdlib.h>
#include <string.h>

static const fmoe_file *file; /* draw has no argument for it */

static const char *inputs[][2] = {
    {"x", "x"},
    {"router_gate", "router_gate.weight"},
    {"down_embed", "down_embed.weight"},
    {"up_embed", "up_embed.weight"},
    {"gate_proj", "gate_proj.weight"},
    {"up_proj", "up_proj.weight"},
    {"down_proj", "down_proj.weight"},
};

/* ---- Drawing ----------------------------------------------------------------------------------------------------- */

static fmoe_status read_sizes(fmoe_layer_args *a) {
    fmoe_config config = {0};
    fmoe_weights weights;
    TRY(fmoe_weights_load(file, "", &config, &weights)); /* checks names and shapes */
    fmoe_weights_free(&weights);
    const fmoe_tensor *x = fmoe_file_find(file, "x");
    const char *training = fmoe_file_metadata(file, "training");
    if (!x || x->rank < 1 || x->shape[x->rank - 1] != config.hidden_size || !training)
        return fmoe_fail(FMOE_BAD_FILE, "no x of hidden_size columns, or no word on training");
    *a = (fmoe_layer_args){.T = x->count / config.hidden_size,
                           .d = config.hidden_size,
                           .I = config.intermediate_size,
                           .N = config.num_experts,
                           .K = config.num_experts_per_tok,
                           .n = fmoe_num_keys(config.num_experts),
                           .training = atoi(training) != 0,
                           .norm_topk_prob = config.norm_topk_prob,
                           .dtype = x->dtype};
    return FMOE_OK;
}

static fmoe_status add_inputs(fmoe_problem *p, const fmoe_layer_args *a) {
    const size_t slots[] = {offsetof(fmoe_layer_args, x),          offsetof(fmoe_layer_args, router_gate),
                            offsetof(fmoe_layer_args, down_embed), offsetof(fmoe_layer_args, up_embed),
                            offsetof(fmoe_layer_args, gate_proj),  offsetof(fmoe_layer_args, up_proj),
                            offsetof(fmoe_layer_args, down_proj)};
    for (size_t i = 0; i < sizeof slots / sizeof *slots; i++) {
        const fmoe_tensor *t = fmoe_file_find(file, inputs[i][1]);
        if (t->dtype != a->dtype)
            return fmoe_fail(FMOE_BAD_FILE, "tensor %s is not stored as x is", inputs[i][1]);
        fmoe_argument *added =
            fmoe_problem_add(p, inputs[i][0], slots[i], a->dtype, ROLE_INPUT, 1, (int64_t[]){t->count});
        if (!added)
            return FMOE_OUT_OF_MEMORY;
        memcpy(added->data, t->data, (size_t)t->count * fmoe_dtype_size(a->dtype));
    }
    return FMOE_OK;
}

static fmoe_status add_buffer(fmoe_problem *p, const char *name, size_t slot, const char *stored, int64_t d) {
    fmoe_argument *added = fmoe_problem_add(p, name, slot, FMOE_F32, ROLE_INOUT, 1, &d);
    float *values;
    if (!added)
        return FMOE_OUT_OF_MEMORY;
    TRY(fmoe_file_read_f32(file, stored, 1, &d, &values));
    memcpy(added->data, values, (size_t)d * sizeof *values);
    memcpy(added->pristine, values, (size_t)d * sizeof *values);
    free(values);
    return FMOE_OK;
}

static fmoe_status draw(fmoe_problem *p) {
    fmoe_layer_args *a = p->args;
    TRY(read_sizes(a));
    TRY(add_inputs(p, a));
    TRY(add_buffer(p, "running_mean", offsetof(fmoe_layer_args, running_mean), "router_norm.running_mean.before",
                   a->d));
    TRY(add_buffer(p, "running_var", offsetof(fmoe_layer_args, running_var), "router_norm.running_var.before", a->d));
    p->c.dtype = a->dtype;
    if (!fmoe_problem_add(p, "y", offsetof(fmoe_layer_args, y), a->dtype, ROLE_OUTPUT, 2, (int64_t[]){a->T, a->d}) ||
        !fmoe_problem_add(p, "router_logits", offsetof(fmoe_layer_args, router_logits), FMOE_F32, ROLE_OUTPUT, 3,
                          (int64_t[]){2, a->T, a->n}) ||
        !fmoe_problem_add(p, "scores", offsetof(fmoe_layer_args, scores), FMOE_F32, ROLE_OUTPUT, 2,
                          (int64_t[]){a->T, a->K}) ||
        !fmoe_problem_add(p, "indices", offsetof(fmoe_layer_args, indices), FMOE_I32, ROLE_OUTPUT, 2,
                          (int64_t[]){a->T, a->K}))
        return FMOE_OUT_OF_MEMORY;
    return FMOE_OK;
}

/* ---- What is expected -------------------------------------------------------------------------------------------- */

static fmoe_status expect(fmoe_problem *p, const char *name, const char *stored) {
    const fmoe_tensor *t = fmoe_file_find(file, stored);
    fmoe_argument *a = fmoe_problem_find(p, name);
    if (!t)
        return FMOE_OK; /* the reference's stays */
    float *values;
    if (t->count != a->count)
        return fmoe_fail(FMOE_BAD_FILE, "tensor %s has the wrong size", stored);
    TRY(fmoe_file_read_f32(file, stored, t->rank, t->shape, &values));
    memcpy(a->expected, values, (size_t)a->count * sizeof *values);
    free(values);
    return FMOE_OK;
}

static fmoe_status expect_indices(fmoe_problem *p) {
    const fmoe_tensor *t = fmoe_file_find(file, "indices");
    fmoe_argument *a = fmoe_problem_find(p, "indices");
    if (!t)
        return FMOE_OK;
    if (t->count != a->count || t->dtype != FMOE_I32)
        return fmoe_fail(FMOE_BAD_FILE, "tensor indices is not %lld int32", (long long)a->count);
    memcpy(a->expected, t->data, (size_t)a->count * sizeof(int32_t));
    return FMOE_OK;
}

static fmoe_status reference(fmoe_problem *p) {
    TRY(fmoe_step_layer.reference(p));
    TRY(expect(p, "y", "y"));
    TRY(expect(p, "router_logits", "router_logits"));
    TRY(expect(p, "scores", "scores"));
    TRY(expect(p, "running_mean", "router_norm.running_mean.after"));
    TRY(expect(p, "running_var", "router_norm.running_var.after"));
    return expect_indices(p);
}

/* ---- Router logits alone ----------------------------------------------------------------------------------------- */

static fmoe_status draw_logits(fmoe_problem *p) {
    fmoe_topk_args *a = p->args;
    const fmoe_tensor *t = fmoe_file_find(file, "router_logits");
    const char *K = fmoe_file_metadata(file, "num_experts_per_tok");
    if (t->rank != 3 || t->shape[0] != 2 || !K)
        return fmoe_fail(FMOE_BAD_FILE, "router_logits not of shape [2, T, n], or no word on num_experts_per_tok");
    *a = (fmoe_topk_args){.T = t->shape[1], .n = t->shape[2], .K = atoll(K), .dtype = t->dtype};
    p->c.dtype = t->dtype;
    fmoe_argument *logits =
        fmoe_problem_add(p, "logits", offsetof(fmoe_topk_args, logits), a->dtype, ROLE_INPUT, 3, t->shape);
    const int64_t chosen[] = {a->T, a->K};
    if (!logits ||
        !fmoe_problem_add(p, "indices", offsetof(fmoe_topk_args, indices), FMOE_I32, ROLE_OUTPUT, 2, chosen) ||
        !fmoe_problem_add(p, "scores", offsetof(fmoe_topk_args, scores), FMOE_F32, ROLE_OUTPUT, 2, chosen) ||
        !fmoe_problem_add(p, "weights", offsetof(fmoe_topk_args, weights), FMOE_F32, ROLE_OUTPUT, 2, chosen))
        return FMOE_OUT_OF_MEMORY;
    memcpy(logits->data, t->data, (size_t)t->count * fmoe_dtype_size(t->dtype));
    return FMOE_OK;
}

/* ---- The rungs --------------------------------------------------------------------------------------------------- */

static bool check_rung(const fmoe_rung *rung, fmoe_problem *p) {
    double error = 0, limit = fmoe_error_limit(p->c.dtype);
    char why[200] = "";
    if ((int)rung->level > fmoe_device_get()->level || (rung->supports && !rung->supports(p->args))) {
        printf("  %-14s not for this case or device\n", rung->name);
        return true;
    }
    fmoe_status status = fmoe_device_rung_check(rung, p, &error, why);
    bool ok = status == FMOE_OK && error <= limit;
    printf("  %-14s %10.2e %10.2e  %s%s\n", rung->name, error, limit, ok ? "ok" : "FAILED: ", ok ? "" : why);
    return ok;
}

static int check_all(const fmoe_rung *rungs, fmoe_problem *p, const char *what) {
    bool passed = true;
    printf("\n  %-14s %10s %10s  (%s)\n", "rung", "error", "limit", what);
    for (const fmoe_rung *rung = rungs; rung->run; rung++)
        passed &= check_rung(rung, p);
    printf("\n%s\n", passed ? "Every result is within its limit." : "A result is over its limit: see FAILED above.");
    return passed ? 0 : 1;
}

static int check_layer(fmoe_problem *p) {
    const fmoe_layer_args *a = p->args;
    printf("%s, T = %lld, hidden_size = %lld, num_experts = %lld, num_experts_per_tok = %lld, stored as %s, on %s\n",
           a->training ? "training" : "evaluation", (long long)a->T, (long long)a->d, (long long)a->N, (long long)a->K,
           fmoe_dtype_name(a->dtype), fmoe_device_get()->name);
    return check_all(cuda_layer_rungs, p,
                     "y, at the rung's own choice; logits, scores, indices and running buffers are in it");
}

static int check_topk(fmoe_problem *p) {
    const fmoe_topk_args *a = p->args;
    printf("router logits alone, T = %lld, n = %lld, num_experts_per_tok = %lld, stored as %s, on %s\n",
           (long long)a->T, (long long)a->n, (long long)a->K, fmoe_dtype_name(a->dtype), fmoe_device_get()->name);
    return check_all(cuda_topk_rungs, p, "scores and weights; the choice is in it, as a set");
}

int golden_rungs(const char *path) {
    static fmoe_step step;
    fmoe_case c = {.name = "golden"};
    fmoe_problem p;
    fmoe_file *opened = NULL;
    if (!fmoe_device_get()->present) {
        fprintf(stderr, "--backend cuda: %s\n", fmoe_device_get()->why_not);
        return 2;
    }
    fmoe_status status = fmoe_file_open(path, &opened);
    file = opened;
    bool alone = status == FMOE_OK && !fmoe_file_find(file, "x") && fmoe_file_find(file, "router_logits");
    step = alone ? fmoe_step_topk : fmoe_step_layer;
    step.draw = alone ? draw_logits : draw;
    step.reference = alone ? fmoe_step_topk.reference : reference;
    if (status == FMOE_OK)
        status = fmoe_problem_new(&step, &c, 1, &p);
    int result = 2;
    if (status == FMOE_OK) {
        printf("%s\n", path);
        result = alone ? check_topk(&p) : check_layer(&p);
        fmoe_problem_free(&p);
    } else {
        fprintf(stderr, "%s: %s: %s\n", path, fmoe_status_name(status), fmoe_error_message());
    }
    fmoe_file_close(opened);
    return result;
}
