// What a warp does with one token in rung `registers`: loads, what the pairs add up to and pass on, and the slow way
// for a token whose numbers leave the usual range.
#ifndef FMOE_TOPK_BACKWARD_TOKEN_CUH
#define FMOE_TOPK_BACKWARD_TOKEN_CUH

#include "backward.cuh"

#define HELD 2 // pairs a lane keeps in registers: no token with K ≤ 64 reads one twice
#define TAIL 4 // pairs a lane loads at a time of those beyond
#define PACK 4 // neighbouring keys a lane: 16 bytes of float32

typedef struct {
    int32_t index; // -1: none
    float dweight, dscore;
} chosen;

// What every lane of a token's warp knows.
typedef struct {
    float max_x, max_y, sum_x, sum_y; // of the sides' logits; of p
    float scale, mean;                // a pair passes on dscore + r · (dweight − mean) · scale
    float total;                      // of that over all pairs
} token_sums;

// ---- Loads

template <typename E> struct alignas(PACK * sizeof(E)) pack { E at[PACK]; };

// A token's logits, PACK neighbouring keys a lane and a round; −∞ beyond the last. Every load is issued before the
// first value is touched, so lanes beyond the last key load that one again rather than branch.
template <typename E, int ROUNDS>
__device__ void load_token(const backward_task &a, uint32_t t, int lane, float z[2][ROUNDS][PACK]) {
    pack<E> raw[2][ROUNDS];
    const E *x = side_of_token<E>(a, 0, t), *y = side_of_token<E>(a, 1, t);
    if (a.n % PACK == 0) // rows begin at multiples of a pack
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            int key = min((r * WARP + lane) * PACK, a.n - PACK);
            raw[0][r] = *(const pack<E> *)(x + key);
            raw[1][r] = *(const pack<E> *)(y + key);
        }
    else
#pragma unroll
        for (int r = 0; r < ROUNDS; r++)
#pragma unroll
            for (int i = 0; i < PACK; i++) {
                int key = min((r * WARP + lane) * PACK + i, a.n - 1);
                raw[0][r].at[i] = x[key];
                raw[1][r].at[i] = y[key];
            }
#pragma unroll
    for (int side = 0; side < 2; side++)
#pragma unroll
        for (int r = 0; r < ROUNDS; r++)
#pragma unroll
            for (int i = 0; i < PACK; i++)
                z[side][r][i] = (r * WARP + lane) * PACK + i < a.n ? to_f32(raw[side][r].at[i]) : -INFINITY;
}

__device__ inline void store_keys(float *row, int n, int key, const float *z) {
    if (n % PACK == 0) {
        if (key < n)
            *(float4 *)(row + key) = {z[0], z[1], z[2], z[3]};
    } else {
#pragma unroll
        for (int i = 0; i < PACK; i++)
            if (key + i < n)
                row[key + i] = z[i];
    }
}

__device__ inline chosen load_pair(const backward_task &a, uint32_t t, int k) {
    if (k >= a.K)
        return {-1, 0, 0};
    uint64_t at = row_at(t, a.K) + k;
    return {a.indices[at], a.dweights ? a.dweights[at] : 0, a.dscores ? a.dscores[at] : 0};
}

// Every 32nd pair from k on.
template <int COUNT> __device__ void load_pairs(const backward_task &a, uint32_t t, int k, chosen *pairs) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        pairs[i] = load_pair(a, t, k + i * WARP);
}

// The x key of an index below n², index / n: one multiplication by 2³²/n rounded up. That is exact for n ≤ 2¹⁰, since
// the rounding adds less than index / 2³² < 1/n to the quotient.
__device__ inline int x_key(const backward_task &a, int32_t index) {
    return (int)__umulhi((uint32_t)index, a.reciprocal);
}

// ---- Rounds of shuffles

// `count` sums at once: their shuffles overlap.
template <int COUNT> __device__ void warp_sums(float *sums) {
#pragma unroll
    for (int step = WARP / 2; step; step /= 2)
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            sums[i] += __shfl_xor_sync(ALL_LANES, sums[i], step);
}

// ---- The usual token

typedef struct {
    float weights, with_dweights, with_size; // Σ r, Σ r · dg, Σ r · |dg|
    float scores, scores_size;               // Σ ds, Σ |ds|
} pair_sums;

// p holds both sides, `side` floats each.
__device__ inline float product(const float *p, int side, int x, int y) {
    return p[x] * p[side + y];
}

template <int COUNT>
__device__ void add_pairs(const backward_task &a, const float *p, int side, int k, const chosen *pairs, pair_sums *s,
                          int *first_bad) {
#pragma unroll
    for (int i = 0; i < COUNT; i++, k += WARP) {
        chosen c = pairs[i];
        if (!is_pair(a, c.index)) {
            *first_bad = min(*first_bad, k); // K and above: no pair at all
            continue;
        }
        int x = x_key(a, c.index), y = c.index - x * a.n;
        float r = product(p, side, x, y);
        s->weights += r;
        s->with_dweights += r * c.dweight;
        s->with_size += r * fabsf(c.dweight);
        s->scores += c.dscore;
        s->scores_size += fabsf(c.dscore);
    }
}

template <int COUNT>
__device__ void scatter_pairs(const backward_task &a, const float *p, int side, const chosen *pairs,
                              const token_sums &s, float scale, int *sums) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        chosen c = pairs[i];
        if (!is_pair(a, c.index))
            continue;
        int x = x_key(a, c.index), y = c.index - x * a.n;
        float gradient = c.dscore;
        if (a.dweights)
            gradient += product(p, side, x, y) * (c.dweight - s.mean) * s.scale;
        int integer = __float2int_rn(gradient * scale);
        atomicAdd(sums + x, integer);
        atomicAdd(sums + side + y, integer);
    }
}

// ---- The token whose numbers leave that range: infinities, NaN, weights that vanish beside the token's largest

template <typename E> __device__ float score_of(const backward_task &a, uint32_t t, const token_sums &s, int x, int y) {
    return (to_f32(side_of_token<E>(a, 0, t)[x]) - s.max_x) + (to_f32(side_of_token<E>(a, 1, t)[y]) - s.max_y);
}

// By the definition, slowly: every lane computes every pair's gradient, in order, and adds what belongs to its keys.
template <typename E>
__device__ __noinline__ float walk_in_order(const backward_task &a, uint32_t t, int lane, token_sums s, int side,
                                            float *sums) {
    float best = -INFINITY, mean = 0, total = 0;
    float weights = 0 * (s.sum_x * s.sum_y); // 0, or NaN where a logit is NaN or +∞
    for (int i = lane; i < 2 * side; i += WARP)
        sums[i] = 0;
    for (int k = 0; k < a.K && a.norm_topk_prob; k++) {
        int32_t index = a.indices[row_at(t, a.K) + k];
        if (is_pair(a, index))
            best = fmaxf(best, score_of<E>(a, t, s, index / a.n, index % a.n));
    }
    for (int pass = a.norm_topk_prob ? 0 : 1; pass < 2; pass++)
        for (int k = 0; k < a.K; k++) {
            chosen c = load_pair(a, t, k);
            if (!is_pair(a, c.index))
                continue;
            int x = c.index / a.n, y = c.index % a.n;
            float score = score_of<E>(a, t, s, x, y);
            float g = a.norm_topk_prob ? expf(score - best) : expf(score) / (s.sum_x * s.sum_y);
            if (pass == 0) {
                weights += g;
                mean += g * c.dweight;
                continue;
            }
            if (a.norm_topk_prob)
                g /= weights;
            float gradient = c.dscore + (a.dweights ? g * (c.dweight - (a.norm_topk_prob ? mean / weights : 0)) : 0);
            total += gradient;
            if (x % WARP == lane)
                sums[x] += gradient;
            if (y % WARP == lane)
                sums[side + y] += gradient;
        }
    __syncwarp();
    return total;
}

#endif
