// A bucket's memory, how its records are found, and what a block must know of the bucket's other blocks.
#ifndef FMOE_SCHEDULE_TWO_LEVELS_BUCKET_CUH
#define FMOE_SCHEDULE_TWO_LEVELS_BUCKET_CUH

#include "two_levels.cuh"

#define OTHER_ROWS 4 // so many records of other blocks a thread counts at a time

typedef struct {
    int *counters;       // [warps, digits]
    int *before, *after; // [digits]: what other blocks of the bucket place
    int *segment;        // [padded]: how many of the bucket's records come from earlier chunks
    int *from;           // [chunks]: record i of the bucket, if it is of chunk c, is records[from[c] + i]
    int *light, *listed; // [padded] each, for count_others; staged lies in the same place
    int *staged;         // [slice]
    int padded;          // chunks, rounded up to a power of two
} bucket_memory;

__host__ __device__ static inline int padded_chunks(const levels &a) {
    int padded = 1;
    while (padded < a.chunks)
        padded *= 2;
    return padded;
}

static inline int bucket_words(const levels &a) {
    int padded = padded_chunks(a), last = 2 * padded < a.slice ? a.slice : 2 * padded;
    return ((a.bucket_warps + 2) << a.low_bits) + 2 * padded + last;
}

__device__ inline bucket_memory lay_out_bucket(const levels &a, int *shared) {
    bucket_memory m;
    m.padded = a.chunks > 1 ? 1 << (32 - __clz(a.chunks - 1)) : 1;
    m.counters = shared;
    m.before = m.counters + (a.bucket_warps << a.low_bits);
    m.after = m.before + (1 << a.low_bits);
    m.segment = m.after + (1 << a.low_bits);
    m.from = m.segment + m.padded;
    m.staged = m.light = m.from + m.padded;
    m.listed = m.light + m.padded;
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

// [others]
// Sorts the bucket's segments by how they are counted: those wholly inside [low, high) not at all, heavy ones wholly
// outside by their histograms, the others, the light ones, record by record. Returns the number of records of these.
template <int WARPS>
__device__ inline int list_others(const levels &a, const bucket_memory &m, int size, int low, int high,
                                  int *num_heavy) {
    __shared__ __align__(16) int sums[2 * WARPS];
    __shared__ int counted;
    int light = 0, total;
    if (threadIdx.x == 0)
        counted = 0;
    __syncthreads();
    for (int first = 0, turn = 0; first < m.padded; first += WARPS * WARP, light += total, turn ^= 1) {
        int chunk = first + threadIdx.x, length = 0;
        if (chunk < a.chunks) {
            int begin = m.segment[chunk], end = chunk + 1 < a.chunks ? m.segment[chunk + 1] : size;
            bool inside = begin >= low && end <= high, outside = end <= low || begin >= high;
            bool heavy = outside && end - begin >= 1 << heavy_bits(a);
            length = inside || heavy ? 0 : end - begin;
            if (heavy)
                m.listed[atomicAdd(&counted, 1)] = chunk; // in any order: they are only added up
        }
        int earlier = light + scan_block<WARPS>(length, warps_for<WARPS>(a.chunks - first), turn, sums, &total);
        if (chunk < m.padded)
            m.light[chunk] = chunk < a.chunks ? earlier : INT32_MAX;
    }
    __syncthreads();
    *num_heavy = counted;
    return light;
}

template <int THREADS>
__device__ inline void count_light(const levels &a, const bucket_memory &m, int light, int low, int high) {
    int i[OTHER_ROWS], chunk[OTHER_ROWS], record[OTHER_ROWS];
    for (int first = threadIdx.x; first < light; first += OTHER_ROWS * THREADS) {
#pragma unroll
        for (int j = 0; j < OTHER_ROWS; j++)
            i[j] = min(first + j * THREADS, light - 1);
        find_chunks(m.light, m.padded, i, chunk);
#pragma unroll
        for (int j = 0; j < OTHER_ROWS; j++) {
            i[j] += m.segment[chunk[j]] - m.light[chunk[j]]; // among all of the bucket's
            record[j] = (int)(a.records[m.from[chunk[j]] + i[j]] >> POSITION_BITS);
        }
#pragma unroll
        for (int j = 0; j < OTHER_ROWS; j++)
            if (first + j * THREADS < light && (i[j] < low || i[j] >= high))
                atomicAdd((i[j] < low ? m.before : m.after) + record[j], 1);
    }
}

template <int THREADS>
__device__ inline void count_listed(const levels &a, const bucket_memory &m, int num_heavy, int low) {
    int digits = 1 << a.low_bits, parts = max(THREADS >> a.low_bits, 1);
    for (int digit = threadIdx.x & (digits - 1); digit < digits; digit += THREADS) {
        int earlier = 0, later = 0;
#pragma unroll 4
        for (int h = threadIdx.x >> a.low_bits; h < num_heavy; h += parts) {
            int chunk = m.listed[h], begin = m.segment[chunk];
            int slot = (m.from[chunk] + begin - (chunk << a.chunk_bits)) >> heavy_bits(a);
            int count = a.heavy[(((int64_t)chunk * HEAVY_SLOTS + slot) << a.low_bits) + digit];
            earlier += begin < low ? count : 0;
            later += begin < low ? 0 : count;
        }
        if (earlier)
            atomicAdd(m.before + digit, earlier);
        if (later)
            atomicAdd(m.after + digit, later);
    }
}

// Counts what lies outside [low, high). The barrier that follows is the caller's.
template <int WARPS>
__device__ inline void count_others(const levels &a, const bucket_memory &m, int size, int low, int high) {
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 << a.low_bits; i += WARPS * WARP)
        m.before[i] = 0; // and after
    int num_heavy, light = list_others<WARPS>(a, m, size, low, high, &num_heavy);
    count_light<WARPS * WARP>(a, m, light, low, high);
    count_listed<WARPS * WARP>(a, m, num_heavy, low);
}
// [/others]

// [place-experts]
// Counters become places: by expert, and for one expert first what earlier slices place, then warp by warp. The first
// slice's block writes the offsets. Returns how many pairs have an expert, if this is expert N's bucket.
template <int WARPS>
__device__ inline int place_experts(const levels &a, const bucket_memory &m, int base, bool divided, bool writes,
                                    int lowest) {
    __shared__ __align__(16) int sums[2 * WARPS];
    __shared__ int good;
    int digits = 1 << a.low_bits, total;
    for (int first = 0, turn = 0; first < digits; first += WARPS * WARP, base += total, turn ^= 1) {
        int active = warps_for<WARPS>(digits - first), digit = first + threadIdx.x, held[WARPS], count = 0, ahead = 0;
        bool inside = digit < digits;
        if (threadIdx.x / WARP < active)
            count = sum_column<WARPS>(m.counters, digits, min(digit, digits - 1), held);
        count = inside ? count : 0;
        if (divided && inside) {
            ahead = m.before[digit];
            count += ahead + m.after[digit];
        }
        int place = base + scan_block<WARPS>(count, active, turn, sums, &total);
        if (inside) {
            place_column<WARPS>(m.counters, digits, digit, held, place + ahead);
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
