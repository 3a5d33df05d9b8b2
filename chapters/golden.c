/* Golden files: the reference against results computed elsewhere. */
#include "golden.h"

#include "../ref_cpu/check.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One file being checked. Arrays belong to it and are freed by close_golden. */
typedef struct {
    const fmoe_file *file;
    const char *path;
    golden_report *report;
    fmoe_config config;
    fmoe_weights weights;
    bool training;
    int rank; /* of x; its last size is d */
    int64_t shape[FMOE_MAX_RANK], T, n;
    float *x, *dy;
    float *mean, *var; /* what a pass moves */
    fmoe_outputs out;
    int32_t *indices; /* the file's; NULL if it has none */
} golden;

/* ---- Reading ----------------------------------------------------------------------------------------------------- */

static fmoe_status whole_number(const golden *g, const char *key, int64_t low, int64_t high, int64_t *value) {
    const char *text = fmoe_file_metadata(g->file, key);
    if (!text)
        return fmoe_fail(FMOE_BAD_FILE, "%s: its metadata has no %s", g->path, key);
    char *end;
    long long number = strtoll(text, &end, 10);
    if (end == text || *end != '\0' || number < low || number > high)
        return fmoe_fail(FMOE_BAD_FILE, "%s: metadata %s = \"%.40s\" is not a number within %lld and %lld", g->path,
                         key, text, (long long)low, (long long)high);
    *value = number;
    return FMOE_OK;
}

/* Metadata that says again what the shapes say must agree with them. */
static fmoe_status check_said(const golden *g, const char *key, int64_t actual) {
    if (!fmoe_file_metadata(g->file, key))
        return FMOE_OK;
    int64_t said = 0;
    TRY(whole_number(g, key, 0, INT64_MAX, &said));
    if (said != actual)
        return fmoe_fail(FMOE_BAD_FILE, "%s: metadata %s = %lld, its tensors say %lld", g->path, key, (long long)said,
                         (long long)actual);
    return FMOE_OK;
}

static fmoe_status read_config(golden *g) {
    int64_t flag;
    TRY(whole_number(g, "training", 0, 1, &flag));
    g->training = flag;
    TRY(whole_number(g, "norm_topk_prob", 0, 1, &flag));
    TRY(whole_number(g, "num_experts_per_tok", 1, INT32_MAX, &flag));
    const char *act = fmoe_file_metadata(g->file, "hidden_act");
    if (act && strcmp(act, "silu") != 0)
        return fmoe_fail(FMOE_BAD_FILE, "%s: metadata hidden_act = \"%.40s\" is not silu", g->path, act);
    TRY(fmoe_weights_load(g->file, "", &g->config, &g->weights));
    g->n = fmoe_num_keys(g->config.num_experts);
    TRY(check_said(g, "hidden_size", g->config.hidden_size));
    TRY(check_said(g, "intermediate_size", g->config.intermediate_size));
    return check_said(g, "num_experts", g->config.num_experts);
}

/* x is [..., d]; all sizes before the last make T. */
static fmoe_status read_tokens(golden *g) {
    const fmoe_tensor *x = fmoe_file_find(g->file, "x");
    if (!x || x->rank < 1 || x->shape[x->rank - 1] != g->config.hidden_size)
        return fmoe_fail(FMOE_BAD_FILE, "%s: tensor x: %s", g->path,
                         x ? "its last size is not hidden_size" : "missing");
    g->rank = x->rank;
    memcpy(g->shape, x->shape, sizeof g->shape);
    g->T = x->count / g->config.hidden_size;
    if (g->rank == 3) {
        TRY(check_said(g, "batch", g->shape[0]));
        TRY(check_said(g, "seq_len", g->shape[1]));
    }
    TRY(fmoe_file_read_f32(g->file, "x", g->rank, g->shape, &g->x));
    if (fmoe_file_find(g->file, "dy"))
        TRY(fmoe_file_read_f32(g->file, "dy", g->rank, g->shape, &g->dy));
    return FMOE_OK;
}

/* Stored as int32 or int64, every one a legal index of the router's. */
static fmoe_status read_indices(golden *g) {
    const fmoe_tensor *t = fmoe_file_find(g->file, "indices");
    if (!t)
        return FMOE_OK;
    int64_t K = g->config.num_experts_per_tok, limit = g->n * g->n;
    if ((t->dtype != FMOE_I32 && t->dtype != FMOE_I64) || t->rank < 1 || t->shape[t->rank - 1] != K ||
        t->count != g->T * K)
        return fmoe_fail(FMOE_BAD_FILE, "%s: tensor indices: not %lld × %lld integers", g->path, (long long)g->T,
                         (long long)K);
    g->indices = fmoe_allocate(t->count, sizeof *g->indices);
    if (!g->indices)
        return fmoe_no_memory(t->count, sizeof *g->indices);
    for (int64_t i = 0; i < t->count; i++) {
        int64_t wide = 0;
        int32_t narrow;
        if (t->dtype == FMOE_I64) {
            memcpy(&wide, (const char *)t->data + 8 * i, 8);
        } else {
            memcpy(&narrow, (const char *)t->data + 4 * i, 4);
            wide = narrow;
        }
        if (wide < 0 || wide >= limit)
            return fmoe_fail(FMOE_BAD_FILE, "%s: tensor indices: element %lld = %lld is not within 0 and n² - 1 = %lld",
                             g->path, (long long)i, (long long)wide, (long long)(limit - 1));
        g->indices[i] = (int32_t)wide;
    }
    return FMOE_OK;
}

static fmoe_status allocate_outputs(golden *g) {
    int64_t T = g->T, d = g->config.hidden_size, K = g->config.num_experts_per_tok;
    g->mean = fmoe_allocate(d, sizeof *g->mean);
    g->var = fmoe_allocate(d, sizeof *g->var);
    g->out.y = fmoe_allocate(T * d, sizeof(float));
    g->out.router_logits = fmoe_allocate(2 * T * g->n, sizeof(float));
    g->out.scores = fmoe_allocate(T * K, sizeof(float));
    g->out.indices = fmoe_allocate(T * K, sizeof(int32_t));
    if (!g->mean || !g->var || !g->out.y || !g->out.router_logits || !g->out.scores || !g->out.indices)
        return fmoe_no_memory(T * (2 * d + 2 * g->n + 2 * K), sizeof(float));
    return FMOE_OK;
}

static void close_golden(golden *g) {
    fmoe_weights_free(&g->weights);
    free(g->x);
    free(g->dy);
    free(g->mean);
    free(g->var);
    free(g->out.y);
    free(g->out.router_logits);
    free(g->out.scores);
    free(g->out.indices);
    free(g->indices);
}

/* ---- Comparing --------------------------------------------------------------------------------------------------- */

static golden_line *add_line(golden_report *report, const char *name, int rank, const int64_t *shape, double error,
                             double limit) {
    golden_line *line = &report->lines[report->num_lines++];
    *line = (golden_line){.error = error, .limit = limit, .ok = error <= limit};
    snprintf(line->name, sizeof line->name, "%s", name);
    size_t used = (size_t)snprintf(line->shape, sizeof line->shape, "[");
    for (int i = 0; i < rank && used < sizeof line->shape; i++)
        used += (size_t)snprintf(line->shape + used, sizeof line->shape - used, "%s%lld", i ? ", " : "",
                                 (long long)shape[i]);
    if (used < sizeof line->shape)
        snprintf(line->shape + used, sizeof line->shape - used, "]");
    return line;
}

/* A result against the file's tensor of that name; nothing if the file has none. Results are float32 whatever the
 * weights are stored in: only a tensor that the file itself keeps in 16 bits has a wider limit. */
static fmoe_status compare(golden *g, const char *name, int rank, const int64_t *shape, const float *out,
                           double natural_scale) {
    const fmoe_tensor *tensor = fmoe_file_find(g->file, name);
    if (!tensor)
        return FMOE_OK;
    float *expected;
    TRY(fmoe_file_read_f32(g->file, name, rank, shape, &expected));
    double error = fmoe_relative_error(tensor->count, out, expected, natural_scale);
    add_line(g->report, name, rank, shape, error, fmoe_error_limit(tensor->dtype));
    free(expected);
    return FMOE_OK;
}

static double norm(int64_t count, const float *values) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum += (double)values[i] * values[i];
    return sqrt(sum);
}

/* Logits decide discretely, so no single one may be off either. */
static fmoe_status compare_logits(golden *g) {
    int64_t shape[] = {2, g->T, g->n}, count = 2 * g->T * g->n;
    /* x̂ has variance 1: a logit's terms have the norm of its gate row. */
    double natural = sqrt((double)g->T) * norm(2 * g->n * g->config.hidden_size, g->weights.router_gate);
    TRY(compare(g, "router_logits", 3, shape, g->out.router_logits, natural));
    if (!fmoe_file_find(g->file, "router_logits"))
        return FMOE_OK;
    float *expected;
    TRY(fmoe_file_read_f32(g->file, "router_logits", 3, shape, &expected));
    double worst = 0, scale = 1;
    for (int64_t i = 0; i < count; i++) {
        double off = fabs((double)g->out.router_logits[i] - expected[i]);
        worst = off <= worst ? worst : off; /* NaN goes through */
        scale = fmax(scale, fabs((double)expected[i]));
    }
    golden_line *line = add_line(g->report, "router_logits", 3, shape, worst, 2e-5 * scale);
    snprintf(line->note, sizeof line->note, "the largest absolute error");
    free(expected);
    return FMOE_OK;
}

/* As sets, by the logits of the file where it has them. Leaves in out.indices the choice that the file's other results
 * belong to, and says whether the pass has to be run again for it. */
static fmoe_status compare_indices(golden *g, bool *again) {
    *again = false;
    if (!g->indices)
        return FMOE_OK;
    int64_t T = g->T, K = g->config.num_experts_per_tok, shape[] = {T, K}, differ = 0;
    float *logits = NULL;
    if (fmoe_file_find(g->file, "router_logits"))
        TRY(fmoe_file_read_f32(g->file, "router_logits", 3, (int64_t[]){2, T, g->n}, &logits));
    int64_t token =
        fmoe_compare_indices(T, g->n, K, logits ? logits : g->out.router_logits, g->out.indices, g->indices);
    free(logits);
    for (int64_t t = 0; t < T; t++)
        differ += memcmp(g->out.indices + t * K, g->indices + t * K, (size_t)K * sizeof *g->indices) != 0;
    golden_line *line = add_line(g->report, "indices", 2, shape, token < 0 ? 0 : INFINITY, 0);
    if (token >= 0)
        snprintf(line->note, sizeof line->note, "token %lld chose other experts", (long long)token);
    else if (differ > 0)
        snprintf(line->note, sizeof line->note, "%lld tokens differ within the rule: the rest is at the file's choice",
                 (long long)differ);
    else
        snprintf(line->note, sizeof line->note, "equal");
    *again = differ > 0;
    if (*again)
        memcpy(g->out.indices, g->indices, (size_t)(T * K) * sizeof *g->indices);
    return FMOE_OK;
}

/* ---- Running ----------------------------------------------------------------------------------------------------- */

/* A pass on copies of the running buffers, so that another can follow. */
static fmoe_status forward(golden *g, const int32_t *chosen) {
    fmoe_weights w = g->weights;
    size_t bytes = (size_t)g->config.hidden_size * sizeof(float);
    memcpy(g->mean, w.running_mean, bytes);
    memcpy(g->var, w.running_var, bytes);
    w.running_mean = g->mean;
    w.running_var = g->var;
    fmoe_outputs out = g->out;
    if (chosen)
        out.indices = NULL;
    return fmoe_layer_forward(&g->config, &w, g->training, g->T, g->x, chosen, &out);
}

static fmoe_status check_forward(golden *g) {
    bool again;
    TRY(forward(g, NULL));
    TRY(compare_logits(g));
    TRY(compare_indices(g, &again));
    if (again)
        TRY(forward(g, g->indices));
    int64_t T = g->T, d = g->config.hidden_size, K = g->config.num_experts_per_tok;
    TRY(compare(g, "scores", 2, (int64_t[]){T, K}, g->out.scores, 0));
    TRY(compare(g, "y", g->rank, g->shape, g->out.y, 0));
    /* A unit's mean sums T values of x: that it may cancel to zero is no fault. */
    double natural = T > 0 ? norm(T * d, g->x) / sqrt((double)T) : 0;
    TRY(compare(g, "router_norm.running_mean.after", 1, &d, g->mean, natural));
    return compare(g, "router_norm.running_var.after", 1, &d, g->var, 0);
}

/* The norm that grad.router_gate would have if nothing cancelled. A key's gradient sums g·dg over its pairs less the
 * softmax's share of them all (with K = 1 and norm_topk_prob nothing is left), times x̂, whose rows have norm √d. */
static fmoe_status router_gate_scale(const golden *g, double *scale) {
    const fmoe_weights *w = &g->weights;
    int64_t T = g->T, d = g->config.hidden_size, K = g->config.num_experts_per_tok, N = g->config.num_experts;
    float *weights = fmoe_allocate(2 * T * K, sizeof *weights), *dweights = weights + T * K;
    fmoe_status status = weights ? FMOE_OK : fmoe_no_memory(2 * T * K, sizeof *weights);
    if (status == FMOE_OK)
        status =
            fmoe_topk_at(T, g->n, K, g->config.norm_topk_prob, g->out.router_logits, g->out.indices, NULL, weights);
    if (status == FMOE_OK)
        status = fmoe_expert_backward(T, d, N, K, g->x, w->down_embed, w->up_embed, g->out.indices, weights, g->dy,
                                      FMOE_OVERWRITE, NULL, NULL, NULL, dweights);
    double sum = 0;
    for (int64_t i = 0; status == FMOE_OK && i < T * K; i++)
        sum += pow((double)weights[i] * dweights[i], 2);
    *scale = 2 * sqrt(sum * (double)d);
    free(weights);
    return status;
}

static fmoe_status check_backward(golden *g) {
    int64_t d = g->config.hidden_size, I = g->config.intermediate_size, N = g->config.num_experts;
    const struct {
        const char *name;
        int64_t rows, columns;
    } all[] = {
        {"grad.router_gate.weight", 2 * g->n, d},
        {"grad.down_embed.weight", N, d},
        {"grad.up_embed.weight", N, d},
        {"grad.gate_proj.weight", I, d},
        {"grad.up_proj.weight", I, d},
        {"grad.down_proj.weight", d, I},
        {"dx", g->T, d},
    };
    enum { COUNT = sizeof all / sizeof *all };
    float *values[COUNT] = {0};
    fmoe_status status = FMOE_OK;
    for (int i = 0; i < COUNT && status == FMOE_OK; i++) {
        if (!fmoe_file_find(g->file, all[i].name))
            continue;
        values[i] = fmoe_allocate(all[i].rows * all[i].columns, sizeof(float));
        status = values[i] ? FMOE_OK : fmoe_no_memory(all[i].rows * all[i].columns, sizeof(float));
    }
    fmoe_gradients gradients = {.router_gate = values[0],
                                .down_embed = values[1],
                                .up_embed = values[2],
                                .gate_proj = values[3],
                                .up_proj = values[4],
                                .down_proj = values[5],
                                .dx = values[6]};
    double natural = 0;
    if (status == FMOE_OK)
        status = fmoe_layer_backward(&g->config, &g->weights, g->training, g->T, g->x, g->out.indices, g->dy,
                                     FMOE_OVERWRITE, &gradients);
    if (status == FMOE_OK)
        status = router_gate_scale(g, &natural);
    for (int i = 0; i < COUNT && status == FMOE_OK; i++) {
        bool is_dx = i == COUNT - 1;
        int64_t shape[] = {all[i].rows, all[i].columns};
        status =
            compare(g, all[i].name, is_dx ? g->rank : 2, is_dx ? g->shape : shape, values[i], i == 0 ? natural : 0);
    }
    for (int i = 0; i < COUNT; i++)
        free(values[i]);
    return status;
}

static fmoe_status check_layer(golden *g) {
    TRY(read_config(g));
    TRY(read_tokens(g));
    TRY(read_indices(g));
    TRY(allocate_outputs(g));
    snprintf(g->report->configuration, sizeof g->report->configuration,
             "%s, T = %lld, hidden_size = %lld, intermediate_size = %lld, num_experts = %lld (n = %lld), "
             "num_experts_per_tok = %lld, norm_topk_prob = %d, stored as %s",
             g->training ? "training" : "evaluation", (long long)g->T, (long long)g->config.hidden_size,
             (long long)g->config.intermediate_size, (long long)g->config.num_experts, (long long)g->n,
             (long long)g->config.num_experts_per_tok, g->config.norm_topk_prob,
             fmoe_dtype_name(fmoe_file_find(g->file, "down_embed.weight")->dtype));
    TRY(check_forward(g));
    if (g->dy)
        TRY(check_backward(g));
    if (g->report->num_lines == 0)
        return fmoe_fail(FMOE_BAD_FILE, "%s: holds no results to compare with", g->path);
    return FMOE_OK;
}

/* ---- Logits alone ------------------------------------------------------------------------------------------------ */

/* The K best of all n² sums by insertion, larger sums first and equal ones by index. */
static void best_of_all(int64_t n, int64_t K, const float *x, const float *y, float *sums, int32_t *indices) {
    int64_t held = 0;
    for (int64_t pair = 0; pair < n * n; pair++) {
        float sum = x[pair / n] + y[pair % n];
        if (held == K && !(sum > sums[K - 1]))
            continue;
        int64_t at = held < K ? held++ : K - 1;
        for (; at > 0 && sum > sums[at - 1]; at--) {
            sums[at] = sums[at - 1];
            indices[at] = indices[at - 1];
        }
        sums[at] = sum;
        indices[at] = (int32_t)pair;
    }
}

/* How many experts are chosen at all, and by how many tokens the busiest. tokens [n²] is for counting. */
static void count_experts(int64_t pairs, const int32_t *indices, int64_t experts, int32_t *tokens, int64_t *used,
                          int64_t *busiest) {
    memset(tokens, 0, (size_t)experts * sizeof *tokens);
    *used = *busiest = 0;
    for (int64_t i = 0; i < pairs; i++) {
        int32_t count = ++tokens[indices[i]];
        *used += count == 1;
        *busiest = count > *busiest ? count : *busiest;
    }
}

static fmoe_status compare_topk(golden_report *report, int64_t T, int64_t n, int64_t K, const float *logits) {
    int32_t *indices = fmoe_allocate(T * K, sizeof *indices), *all = fmoe_allocate(T * K, sizeof *all);
    int64_t experts = n * n;
    int32_t *tokens = fmoe_allocate(experts, sizeof *tokens);
    float *sums = fmoe_allocate(T * K, sizeof *sums);
    fmoe_status status = indices && all && tokens && sums ? fmoe_topk(T, n, K, false, logits, indices, NULL, NULL)
                                                          : fmoe_no_memory(3 * T * K + experts, sizeof *sums);
    if (status == FMOE_OK) {
#pragma omp parallel for
        for (int64_t t = 0; t < T; t++)
            best_of_all(n, K, logits + t * n, logits + (T + t) * n, sums + t * K, all + t * K);
        int64_t token = fmoe_compare_indices(T, n, K, logits, indices, all), used, busiest;
        count_experts(T * K, indices, experts, tokens, &used, &busiest);
        golden_line *line = add_line(report, "indices", 2, (int64_t[]){T, K}, token < 0 ? 0 : INFINITY, 0);
        snprintf(line->note, sizeof line->note,
                 "top-k against all n² pairs; %lld of %lld experts chosen, the busiest by %lld tokens", (long long)used,
                 (long long)experts, (long long)busiest);
    }
    free(indices);
    free(all);
    free(tokens);
    free(sums);
    return status;
}

static fmoe_status check_logits(const fmoe_file *file, const char *path, golden_report *report) {
    golden g = {.file = file, .path = path, .report = report};
    const fmoe_tensor *tensor = fmoe_file_find(file, "router_logits");
    if (tensor->rank != 3 || tensor->shape[0] != 2 || tensor->shape[2] < 1 || tensor->shape[2] > 46340)
        return fmoe_fail(FMOE_BAD_FILE, "%s: tensor router_logits: not of shape [2, T, n]", path);
    int64_t T = tensor->shape[1], n = tensor->shape[2], K;
    TRY(whole_number(&g, "num_experts_per_tok", 1, n * n, &K));
    snprintf(report->configuration, sizeof report->configuration,
             "router logits alone, T = %lld, n = %lld, num_experts_per_tok = %lld, stored as %s", (long long)T,
             (long long)n, (long long)K, fmoe_dtype_name(tensor->dtype));
    float *logits;
    TRY(fmoe_file_read_f32(file, "router_logits", 3, tensor->shape, &logits));
    fmoe_status status = compare_topk(report, T, n, K, logits);
    free(logits);
    return status;
}

/* ---- The whole file ---------------------------------------------------------------------------------------------- */

fmoe_status golden_check_file(const fmoe_file *file, const char *path, golden_report *report) {
    *report = (golden_report){0};
    if (!fmoe_file_find(file, "x") && fmoe_file_find(file, "router_logits"))
        return check_logits(file, path, report);
    golden g = {.file = file, .path = path, .report = report};
    fmoe_status status = check_layer(&g);
    close_golden(&g);
    return status;
}

fmoe_status golden_check(const char *path, golden_report *report) {
    fmoe_file *file;
    TRY(fmoe_file_open(path, &file));
    fmoe_status status = golden_check_file(file, path, report);
    fmoe_file_close(file);
    return status;
}

bool golden_passed(const golden_report *report) {
    for (int i = 0; i < report->num_lines; i++)
        if (!report->lines[i].ok)
            return false;
    return report->num_lines > 0;
}
