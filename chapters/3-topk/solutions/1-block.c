/* Exercise 3.1, solution: 64 keys ranked at once is the best of 16 to 256 here. With it the rung is vector-softmax. */
#include "plugin.h"

#include "3-topk/cpu.c" // NOLINT(bugprone-suspicious-include): the chapter's rungs, so that only what changes stands here

enum { RANKED = 64 };

// [rank]
/* A key's place is the number of keys that beat it: RANKED · count comparisons, no branch. */
static void rank_some(int64_t count, const int64_t *keys, int64_t *sorted) {
    int64_t place[RANKED] = {0};
    for (int64_t j = 0; j < count; j++)
#pragma omp simd
        for (int i = 0; i < RANKED; i++)
            place[i] += keys[j] > keys[i];
    for (int64_t i = 0; i < count; i++)
        sorted[place[i]] = keys[i];
}

/* The best k->m keys of a side: runs of RANKED, then log2(n / RANKED) rounds of merges. */
static void rank_side(const token *k, const float *row, float *value, int32_t *key) {
    int64_t room = (k->n / RANKED + 1) * RANKED, all[2][room];
    for (int64_t i = 0; i < room; i++)
        all[0][i] = i < k->n ? pack(row[i], (int32_t)i) : INT64_MIN;
    for (int64_t i = 0; i < k->n; i += RANKED)
        rank_some(smaller(RANKED, k->n - i), all[0] + i, all[1] + i);
    int64_t *from = all[1], *to = all[0];
    for (int64_t width = RANKED; width < k->n; width *= 2) {
        for (int64_t i = 0; i < k->n; i += 2 * width) {
            int64_t left = smaller(width, k->n - i), right = smaller(width, k->n - i - left);
            merge(smaller(left, k->m), from + i, smaller(right, k->m), from + i + left, k->m, to + i);
        }
        int64_t *swap = from;
        from = to;
        to = swap;
    }
    for (int64_t a = 0; a < k->m; a++) {
        key[a] = index_of(from[a]);
        value[a] = row[key[a]];
    }
}
// [/rank]

/* As choose_by_threshold, but for who ranks. */
static void choose(token *k) {
    rank_side(k, k->x, k->x_value, k->x_key);
    rank_side(k, k->y, k->y_value, k->y_key);
    int64_t candidates = list_candidates(k), kept = 0;
    int32_t threshold = find_threshold(candidates, k->bits, k->K);
    for (int64_t i = 0; i < candidates; i++) {
        k->packed[kept] = (int64_t)((uint64_t)(uint32_t)k->bits[i] << 32 | (uint32_t)~k->index[i]);
        kept += k->bits[i] >= threshold;
    }
    memcpy(k->best, sort_best(kept, k->K, k->packed, k->sorted), (size_t)k->K * sizeof *k->best);
}

static fmoe_status run(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    return each_token(args, workspace, bytes, true, choose, finish_vector);
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "topk", .name = "my block", .run = run, .workspace = token_a_thread};
