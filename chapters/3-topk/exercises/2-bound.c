/* Exercise 3.2, starter, right: the K-th sum is bisected between the worst and the best candidate. It is the rung
 * vector-softmax; `lowest` is where a better bound belongs. */
#include "plugin.h"

#include "3-topk/cpu.c" // NOLINT(bugprone-suspicious-include): the chapter's rungs, so that only what changes stands here

/* A value, as rising bits, that at least K candidates reach. */
static int32_t lowest(const token *k, int64_t count) {
    int32_t low = INT32_MAX;
#pragma omp simd reduction(min : low)
    for (int64_t i = 0; i < count; i++)
        low = k->bits[i] < low ? k->bits[i] : low;
    return low;
}

/* As find_threshold, but for where it begins. */
static int32_t threshold_from(int32_t low, int64_t count, const int32_t *bits, int64_t K) {
    int32_t high = INT32_MIN;
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
    int32_t threshold = threshold_from(lowest(k, candidates), candidates, k->bits, k->K);
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
