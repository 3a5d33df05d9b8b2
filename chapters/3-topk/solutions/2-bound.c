/* Exercise 3.2, solution: the bisection begins at the best corner of the staircase, so it has a third of the way to go.
 */
#include "plugin.h"

#include "3-topk/cpu.c" // NOLINT(bugprone-suspicious-include): the chapter's rungs, so that only what changes stands here

/* A value, as rising bits, that at least K candidates reach: the best corner (a, b) whose rectangle holds K pairs. All
 * of those do at least as well, rounded or not, since rounding never reverses two sums. Some may be no candidates; but
 * whoever takes pairs with (a+1)(b+1) > K away, outermost first, is left with K or more each time. +∞ plus −∞ is NaN,
 * and then a pair of better keys can have a worse sum: no bound. */
// [lowest]
static int32_t lowest(const token *k) {
    int32_t low = INT32_MIN;
    if (k->x_value[0] == INFINITY || k->y_value[0] == INFINITY)
        return low;
    for (int64_t a = 0; a < k->m; a++) {
        int64_t b = (k->K + a) / (a + 1) - 1;
        int32_t corner = b < k->m ? rising_bits(k->x_value[a] + k->y_value[b]) : INT32_MIN;
        low = corner > low ? corner : low;
    }
    return low;
}
// [/lowest]

/* As find_threshold, but from a bound that may itself be the answer: then every guess above it would find too few. */
static int32_t threshold_from(int32_t low, int64_t count, const int32_t *bits, int64_t K) {
    int32_t high = INT32_MIN;
    if (count_from(count, bits, low) == K)
        return low;
#pragma omp simd reduction(max : high)
    for (int64_t i = 0; i < count; i++)
        high = bits[i] > high ? bits[i] : high;
    while (low < high) {
        int32_t middle = (int32_t)(((int64_t)low + high + 1) >> 1);
        int64_t found = count_from(count, bits, middle);
        if (found == K)
            return middle;
        if (found > K)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

static void choose(token *k) {
    rank_by_counting(k, k->x, k->x_value, k->x_key);
    rank_by_counting(k, k->y, k->y_value, k->y_key);
    int64_t candidates = list_candidates(k), kept = 0;
    int32_t threshold = threshold_from(lowest(k), candidates, k->bits, k->K);
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
    .version = FMOE_STEPS_VERSION, .step = "topk", .name = "my bound", .run = run, .workspace = token_a_thread};
