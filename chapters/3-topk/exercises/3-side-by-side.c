/* Exercise 3.3, starter, right: a token a lane. Eight tokens are sorted side by side, by a network that compares and
 * exchanges in a fixed order; this one needs n(n − 1) / 2 exchanges. */
#include "plugin.h"

#include "3-topk/cpu.c" // NOLINT(bugprone-suspicious-include): the chapter's rungs, so that only what changes stands here

enum { TOKENS = 8 };

typedef int64_t eight[TOKENS]; // key i of eight tokens

static inline void exchange(eight first, eight second) {
#pragma omp simd
    for (int l = 0; l < TOKENS; l++) {
        int64_t a = first[l], b = second[l];
        first[l] = a > b ? a : b;
        second[l] = a > b ? b : a;
    }
}

// [sort]
/* Neighbours change places, n times over. */
static void sort_lanes(int64_t n, eight *keys) {
    for (int64_t round = 0; round < n; round++)
        for (int64_t i = round % 2; i + 1 < n; i += 2)
            exchange(keys[i], keys[i + 1]);
}
// [/sort]

/* Both sides of the tokens from `first` on, each ranked, best first. A lane without a token sorts zeros. */
static void rank_group(const fmoe_topk_args *args, int64_t first, int64_t count, eight *keys, float *buffer) {
    memset(keys, 0, (size_t)(2 * args->n) * sizeof *keys);
    for (int64_t side = 0; side < 2; side++) {
        eight *mine = keys + side * args->n;
        for (int64_t l = 0; l < count; l++) {
            const float *row = load_row(args->dtype, args->logits, side * args->T + first + l, args->n, buffer);
            for (int64_t i = 0; i < args->n; i++)
                mine[i][l] = pack(row[i], (int32_t)i);
        }
        sort_lanes(args->n, mine);
    }
}

static void take_lane(const token *k, int64_t l, const eight *sorted, const float *row, float *value, int32_t *key) {
    for (int64_t a = 0; a < k->m; a++) {
        key[a] = index_of(sorted[a][l]);
        value[a] = row[key[a]];
    }
}

/* As choose_by_threshold, once the sides are ranked. */
static void choose_ranked(token *k) {
    int64_t candidates = list_candidates(k), kept = 0;
    int32_t threshold = find_threshold(candidates, k->bits, k->K);
    for (int64_t i = 0; i < candidates; i++) {
        k->packed[kept] = (int64_t)((uint64_t)(uint32_t)k->bits[i] << 32 | (uint32_t)~k->index[i]);
        kept += k->bits[i] >= threshold;
    }
    memcpy(k->best, sort_best(kept, k->K, k->packed, k->sorted), (size_t)k->K * sizeof *k->best);
}

static void do_group(const fmoe_topk_args *args, int64_t first, token k, eight *keys) {
    int64_t n = args->n, K = args->K, count = smaller(TOKENS, args->T - first);
    rank_group(args, first, count, keys, k.x_row);
    for (int64_t l = 0; l < count; l++) {
        int64_t t = first + l;
        k.x = load_row(args->dtype, args->logits, t, n, k.x_row);
        k.y = load_row(args->dtype, args->logits, args->T + t, n, k.y_row);
        take_lane(&k, l, keys, k.x, k.x_value, k.x_key);
        take_lane(&k, l, keys + n, k.y, k.y_value, k.y_key);
        choose_ranked(&k);
        finish_vector(&k, args->norm_topk_prob, args->indices + t * K, args->scores + t * K, args->weights + t * K);
    }
}

/* A thread's token, and behind it the keys of both sides of eight. */
static size_t a_thread(const fmoe_topk_args *args) {
    return (token_bytes(args) + 255) / 256 * 256 + (size_t)(2 * args->n) * sizeof(eight);
}

static size_t needed(const void *args) {
    return a_thread(args) * (size_t)omp_get_max_threads();
}

static fmoe_status run(const void *arguments, void *workspace, size_t bytes, void *stream) {
    const fmoe_topk_args *args = arguments;
    (void)bytes, (void)stream;
#pragma omp parallel
    {
        char *mine = (char *)workspace + a_thread(args) * (size_t)omp_get_thread_num();
        size_t used = 0;
        token k = carve_token(args->n, args->K, mine, &used);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < args->T; first += TOKENS)
            do_group(args, first, k, (eight *)(mine + (token_bytes(args) + 255) / 256 * 256));
    }
    return FMOE_OK;
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "topk", .name = "my lanes", .run = run, .workspace = needed};
