/* Expert-major order of the routed pairs: a stable counting sort. The T·K indices are a sparse matrix by rows (tokens);
 * the schedule is the same matrix by columns (experts).
 *
 *     indices   2 0 | 0 1 | 2 0        T = 3, K = 2, N = 4
 *     offsets   0 3 4 6 6              expert 0 has three pairs, expert 3 none
 *     pairs     1 2 5 | 3 | 0 4        pair p belongs to token p / K
 */
#include "check.h"

// [schedule]
fmoe_status fmoe_schedule(int64_t T, int64_t K, int64_t N, const int32_t *indices, int32_t *offsets, int32_t *pairs) {
    TRY(fmoe_check_tokens(T));
    TRY(fmoe_check_topk(K, "the largest 32-bit position", INT32_MAX));
    TRY(fmoe_check_experts(N));
    TRY(fmoe_check_pairs(T, K));
    TRY(fmoe_check_pointer("indices", indices, T * K));
    TRY(fmoe_check_pointer("offsets", offsets, N + 1));
    TRY(fmoe_check_pointer("pairs", pairs, T * K));
    TRY(fmoe_check_indices(T, K, indices, "num_experts", N));

    /* Count, one place to the right, then add up: offsets[e] is where expert e begins. */
    for (int64_t e = 0; e <= N; e++)
        offsets[e] = 0;
    for (int64_t p = 0; p < T * K; p++)
        offsets[indices[p] + 1]++;
    for (int64_t e = 0; e < N; e++)
        offsets[e + 1] += offsets[e];
    /* Place in rising order, which makes the sort stable. offsets[e] moves on to where expert e + 1 begins ... */
    for (int64_t p = 0; p < T * K; p++)
        pairs[offsets[indices[p]]++] = (int32_t)p;
    /* ... so that it takes one shift to restore it. */
    for (int64_t e = N; e > 0; e--)
        offsets[e] = offsets[e - 1];
    offsets[0] = 0;
    return FMOE_OK;
}
// [/schedule]
