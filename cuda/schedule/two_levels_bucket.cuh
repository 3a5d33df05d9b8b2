// A bucket's memory, how its records are found, and what a block must know of the bucket's other blocks.
#ifndef FMOE_SCHEDULE_TWO_LEVELS_BUCKET_CUH
#define FMOE_SCHEDULE_TWO_LEVELS_BUCKET_CUH

#include "two_levels.cuh"

#define SEGMENTS 4 // of so many segments of other blocks' a warp has words under way, ...
#define WORDS    4 // ... so many of each

typedef struct {
    int *counters;       // [warps, digits]
    int *before, *after; // [digits]: what other blocks of the bucket place
    int *segment;        // [padded]: how many of the bucket's records come from earlier chunks
    int *from;           // [chunks]: record i of the bucket, if it is of chunk c, is records[from[c] + i]
    int *staged, *place; // [staged] each: pairs in order, and their places if the bucket is divided
    int padded;          // chunks, rounded up to a power of two
} bucket_memory;

__host__ __device__ static inline int padded_chunks(const levels &a) {
    int padded = 1;
    while (padded < a.chunks)
        padded *= 2;
    return padded;
}

static inline int bucket_words(const levels &a) {
    return ((a.bucket_warps + 2) << a.low_bits) + 2 * padded_chunks(a) + (a.even ? 2 : 1) * a.staged;
}

__device__ inline bucket_memory lay_out_bucket(const levels &a, int *shared) {
    bucket_memory m;
    m.padded = a.chunks > 1 ? 1 << (32 - __clz(a.chunks - 1)) : 1;
    m.counters = shared;
    m.before = m.counters + (a.bucket_warps << a.low_bits);
    m.after = m.before + (1 << a.low_bits);
    m.segment = m.after + (1 << a.low_bits);
    m.from = m.segment + m.padded;
    m.staged = m.from + m.padded;
    m.place = m.staged + a.staged;
    return m;
}

// [find-chunks]
// The last of the sums that is at or below each row's number: bisection, all rows at a time.
template <int ROWS>
__device__ inline void find_chunks(const int *sums, int padded, const int (&i)[ROWS], int (&chunk)[ROWS]) {
#pragma unroll
    for (int j = 0; j < ROWS; j++)
        chunk[j] = 0;
    for (int step = padded / 2; step; step /= 2)
#pragma unroll
        for (int j = 0; j < ROWS; j++)
            if (sums[chunk[j] + step] <= i[j])
                chunk[j] += step;
}
// [/find-chunks]

// Digits and pairs of the records first to end - 1, which lie in as many chunks; -1 behind the end.
template <int ROWS>
__device__ inline void load_records(const levels &a, const bucket_memory &m, int first, int end, int (&digit)[ROWS],
                                    int (&pair)[ROWS]) {
    int i[ROWS], chunk[ROWS];
    uint32_t record[ROWS];
#pragma unroll
    for (int j = 0; j < ROWS; j++)
        i[j] = min(first + j * WARP + (int)threadIdx.x % WARP, end - 1);
    find_chunks(m.segment, m.padded, i, chunk);
#pragma unroll
    for (int j = 0; j < ROWS; j++)
        record[j] = a.records[m.from[chunk[j]] + i[j]];
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        bool inside = first + j * WARP + (int)threadIdx.x % WARP < end;
        digit[j] = inside ? (int)(record[j] >> POSITION_BITS) : -1;
        pair[j] = (chunk[j] << a.chunk_bits) + (int)(record[j] & ((1u << POSITION_BITS) - 1));
    }
}

// A load by some lanes only, without a branch: the others get 0.
__device__ inline uint32_t load_if(bool loads, const uint32_t *from) {
    uint32_t word = 0;
    asm volatile("{.reg .pred p;\n"
                 " setp.ne.s32 p, %2, 0;\n"
                 " @p ld.global.u32 %0, [%1];}"
                 : "+r"(word)
                 : "l"(from), "r"((int)loads));
    return word;
}

// [others]
// Counts the segments that lie wholly outside [low, high), a warp each. One that lies before it counts as before, else
// as after. A light segment is a list of records, a heavy one a histogram: words of 32 bits either way.
template <int WARPS>
__device__ inline void count_segments(const levels &a, const bucket_memory &m, int size, int low, int high) {
    int lane = threadIdx.x % WARP, digits = 1 << a.low_bits, most = max(digits, 1 << heavy_bits(a));
#pragma unroll 1
    for (int piece = lane; piece < most; piece += WORDS * WARP) {
        uint32_t earlier[WORDS] = {}, later[WORDS] = {}; // of histograms
#pragma unroll 1
        for (int first = threadIdx.x / WARP; first < a.chunks; first += SEGMENTS * WARPS) {
            // Each of the first lanes looks at a segment.
            int chunk = first + lane % SEGMENTS * WARPS, begin = 0, end = 0;
            if (chunk < a.chunks) {
                begin = m.segment[chunk];
                end = chunk + 1 < a.chunks ? m.segment[chunk + 1] : size;
            }
            bool outside = end > begin && (end <= low || begin >= high), heavy = end - begin >= 1 << heavy_bits(a);
            int count = !outside ? 0 : heavy ? digits : end - begin, from = outside ? m.from[chunk] + begin : 0;
            int kind = (heavy ? 2 : 0) + (begin < low ? 1 : 0), counts[SEGMENTS], kinds[SEGMENTS];
            const uint32_t *words = a.records + from;
            if (outside && heavy)
                words = heavy_histogram(a, chunk, from - (chunk << a.chunk_bits));
            uint32_t word[SEGMENTS][WORDS];
#pragma unroll
            for (int j = 0; j < SEGMENTS; j++) {
                const uint32_t *theirs = (const uint32_t *)__shfl_sync(ALL_LANES, (unsigned long long)words, j) + piece;
                counts[j] = __shfl_sync(ALL_LANES, count, j);
                kinds[j] = __shfl_sync(ALL_LANES, kind, j);
#pragma unroll
                for (int k = 0; k < WORDS; k++)
                    word[j][k] = load_if(piece + k * WARP < counts[j], theirs + k * WARP);
            }
#pragma unroll
            for (int j = 0; j < SEGMENTS; j++) {
                if (kinds[j] & 2) {
#pragma unroll
                    for (int k = 0; k < WORDS; k++) {
                        earlier[k] += kinds[j] & 1 ? word[j][k] : 0;
                        later[k] += kinds[j] & 1 ? 0 : word[j][k];
                    }
                } else {
                    int *counter = kinds[j] & 1 ? m.before : m.after;
#pragma unroll
                    for (int k = 0; k < WORDS; k++)
                        if (piece + k * WARP < counts[j])
                            atomicAdd(counter + (word[j][k] >> POSITION_BITS), 1);
                }
            }
        }
#pragma unroll
        for (int k = 0; k < WORDS; k++)
            if (piece + k * WARP < digits) {
                atomicAdd(m.before + piece + k * WARP, (int)earlier[k]);
                atomicAdd(m.after + piece + k * WARP, (int)later[k]);
            }
    }
}

// Counts what lies outside [low, high). The barrier that follows is the caller's.
template <int WARPS>
__device__ inline void count_others(const levels &a, const bucket_memory &m, int size, int low, int high) {
    int ends[2] = {low, high - 1}, chunk[2];
    find_chunks(m.segment, m.padded, ends, chunk);
    // What the segments at both ends have outside, by all threads.
    int begin = m.segment[chunk[0]], end = chunk[1] + 1 < a.chunks ? m.segment[chunk[1] + 1] : size;
#pragma unroll 1
    for (int i = begin + threadIdx.x, gap = high - low; i < end - gap; i += WARPS * WARP) {
        bool earlier = i < low;
        int record = earlier ? m.from[chunk[0]] + i : m.from[chunk[1]] + i + gap;
        atomicAdd((earlier ? m.before : m.after) + (a.records[record] >> POSITION_BITS), 1);
    }
    count_segments<WARPS>(a, m, size, low, high);
}
// [/others]

// [place-experts]
// Counters become places among the block's records: by expert, and for one expert warp by warp. before becomes what has
// to be added for the place in the result: there an expert's pairs begin with what earlier slices place. The first
// slice's block writes the offsets. Returns how many pairs have an expert, if this is expert N's bucket.
template <int WARPS>
__device__ inline int place_experts(const levels &a, const bucket_memory &m, int base, bool writes, int lowest) {
    __shared__ __align__(16) unsigned long long sums[2 * WARPS];
    __shared__ int good;
    int digits = 1 << a.low_bits;
    unsigned long long seen = 0, total; // two sums in one number: of the bucket above, of the block below
    for (int first = 0, turn = 0; first < digits; first += WARPS * WARP, seen += total, turn ^= 1) {
        int active = warps_for<WARPS>(digits - first), digit = first + threadIdx.x, held[WARPS], count = 0, ahead = 0;
        bool inside = digit < digits;
        unsigned long long both = 0;
        if (threadIdx.x / WARP < active)
            count = sum_column<WARPS>(m.counters, digits, min(digit, digits - 1), held);
        if (inside) {
            ahead = m.before[digit];
            both = (unsigned long long)(ahead + m.after[digit] + count) << 32 | (unsigned)count;
        }
        both = seen + scan_block<WARPS>(both, active, turn, sums, &total);
        if (inside) {
            int place = base + (int)(both >> 32), own = (int)both;
            place_column<WARPS>(m.counters, digits, digit, held, own);
            m.before[digit] = place + ahead - own;
            if (writes && lowest + digit <= a.call.N)
                a.call.offsets[lowest + digit] = place;
            if (lowest + digit == a.call.N)
                good = place;
        }
    }
    __syncthreads();
    return good;
}
// [/place-experts]

#endif
