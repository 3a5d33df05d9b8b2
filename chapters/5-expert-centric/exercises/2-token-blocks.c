/* Exercise 5.2, starter, right: one phase along the schedule of all tokens, on one thread. */
#include "plugin.h"
#include "rows.h"
#include "vec.h"
#include "workspace.h"

/* What a block of tokens needs; here all tokens are one block. */
typedef struct {
    int32_t *ends;  /* [N]: where an expert's pairs end */
    int32_t *pairs; /* [tokens · K], counted from the block's first, by expert */
    float *x, *y;   /* [tokens, d] */
    float *rows;    /* [2, d]: an expert's */
    size_t bytes;
} block;

static block lay_out(const fmoe_expert_args *a, size_t tokens, void *memory) {
    block b = {.bytes = 0};
    size_t d = (size_t)a->d;
    b.ends = carve(memory, &b.bytes, (size_t)a->N * sizeof *b.ends);
    b.pairs = carve(memory, &b.bytes, tokens * (size_t)a->K * sizeof *b.pairs);
    b.x = carve(memory, &b.bytes, tokens * d * sizeof *b.x);
    b.y = carve(memory, &b.bytes, tokens * d * sizeof *b.y);
    b.rows = carve(memory, &b.bytes, 2 * d * sizeof *b.rows);
    return b;
}

static size_t needed(const void *args) {
    const fmoe_expert_args *a = args;
    return lay_out(a, (size_t)a->T, NULL).bytes;
}

/* Chapter 4's counting sort. Placing moves ends[e] from the start of e to its end. */
static void build_schedule(const fmoe_expert_args *a, const block *b, const int32_t *indices, int64_t count) {
    memset(b->ends, 0, (size_t)a->N * sizeof *b->ends);
    for (int64_t i = 0; i < count; i++)
        b->ends[indices[i]]++;
    for (int32_t e = 0, end = 0; e < a->N; e++) {
        int32_t pairs = b->ends[e];
        b->ends[e] = end;
        end += pairs;
    }
    for (int64_t i = 0; i < count; i++)
        b->pairs[b->ends[indices[i]]++] = (int32_t)i;
}

static void run_block(const fmoe_expert_args *a, const block *b, int64_t first, int64_t tokens) {
    int64_t d = a->d, count = tokens * a->K, size = (int64_t)fmoe_dtype_size(a->dtype);
    const int32_t *indices = a->indices + first * a->K;
    const float *weights = a->weights + first * a->K;
    build_schedule(a, b, indices, count);
    fmoe_to_f32(a->dtype, tokens * d, (const char *)a->x + first * d * size, b->x);
    memset(b->y, 0, (size_t)(tokens * d) * sizeof *b->y);
    for (int64_t i = 0; i < count;) {
        int64_t e = indices[b->pairs[i]];
        const float *down = load_row(a->dtype, a->down, e, d, b->rows),
                    *up = load_row(a->dtype, a->up, e, d, b->rows + d);
        for (; i < b->ends[e]; i++) {
            int32_t pair = b->pairs[i], t = pair / (int32_t)a->K;
            float s = dot_row(d, down, b->x + t * d);
            add_row(d, s / (1 + exp_f32(-s)) * weights[pair], up, b->y + t * d);
        }
    }
    fmoe_from_f32(a->dtype, tokens * d, b->y, (char *)a->y + first * d * size);
}

static fmoe_status run(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    block all = lay_out(a, (size_t)a->T, workspace);
    (void)workspace_bytes, (void)stream;
    run_block(a, &all, 0, a->T);
    return FMOE_OK;
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "expert", .name = "one block", .run = run, .workspace = needed};
