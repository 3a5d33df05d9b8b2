// Exercise 4.3, solution: a radix sort, lowest digit first. A pass counts digits by chunk, adds the table up, and
// places each chunk; a pair's place among the equal digits of its chunk is a count of the earlier ones.
#include "plugin.h"

enum { WARP = 32, WARPS = 8, THREADS = WARPS * WARP, DIGITS = 256, ROUNDS = 4, CHUNK = THREADS * ROUNDS };

typedef uint64_t sort_key; // the expert above the pair

// Thread i makes key i. An index that is none becomes expert N, behind the last.
__global__ static void make_keys(fmoe_schedule_args a, sort_key *keys) {
    int64_t pair = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (pair >= a.T * a.K)
        return;
    uint32_t expert = (uint32_t)a.indices[pair];
    keys[pair] = (sort_key)(expert < (uint32_t)a.N ? expert : (uint32_t)a.N) << 32 | (uint32_t)pair;
}

__device__ static int digit_of(sort_key key, int shift) {
    return (int)(key >> shift) & (DIGITS - 1);
}

// A block of 256 threads a chunk of 1,024 keys; 1 KB of shared memory. Reads 8 bytes a key, writes a column of the
// table: [digit, chunk], so that running sums along it go by digit and then by chunk.
__global__ static void __launch_bounds__(THREADS)
    count(const sort_key *keys, int64_t pairs, int shift, int64_t chunks, int32_t *table) {
    __shared__ int32_t counts[DIGITS];
    counts[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = blockIdx.x * (int64_t)CHUNK + threadIdx.x; i < min((blockIdx.x + 1) * (int64_t)CHUNK, pairs);
         i += THREADS)
        atomicAdd(&counts[digit_of(keys[i], shift)], 1); // a sum of integers has one value, whatever the order
    __syncthreads();
    table[threadIdx.x * chunks + blockIdx.x] = counts[threadIdx.x];
}

// One block of 1,024 threads: numbers become the sums of all before them. 4 KB of shared memory.
__global__ static void __launch_bounds__(1024) add_up(int64_t length, int32_t *table) {
    __shared__ int32_t sums[1024];
    int64_t share = (length + 1023) / 1024, begin = threadIdx.x * share, end = min(begin + share, length);
    int32_t sum = 0;
    for (int64_t i = begin; i < end; i++)
        sum += table[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned apart = 1; apart < 1024; apart *= 2) {
        int32_t before = threadIdx.x >= apart ? sums[threadIdx.x - apart] : 0;
        __syncthreads();
        sums[threadIdx.x] += before;
        __syncthreads();
    }
    sum = sums[threadIdx.x] - sum;
    for (int64_t i = begin; i < end; i++) {
        int32_t here = table[i];
        table[i] = sum;
        sum += here;
    }
}

// A block of 256 threads a chunk, 128 keys in a row a warp; 8 KB of shared memory. Reads and writes 8 bytes a key.
__global__ static void __launch_bounds__(THREADS)
    place(const sort_key *keys, int64_t pairs, int shift, int64_t chunks, const int32_t *table, sort_key *sorted) {
    __shared__ int32_t next[WARPS][DIGITS];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int64_t first = blockIdx.x * (int64_t)CHUNK + warp * (ROUNDS * WARP) + lane;
    for (int w = 0; w < WARPS; w++)
        next[w][threadIdx.x] = 0;
    __syncthreads();
    for (int r = 0; r < ROUNDS; r++)
        if (first + r * WARP < pairs)
            atomicAdd(&next[warp][digit_of(keys[first + r * WARP], shift)], 1);
    __syncthreads();
    int32_t sum = table[threadIdx.x * chunks + blockIdx.x]; // a thread a digit: where each warp's first one goes
    for (int w = 0; w < WARPS; w++) {
        int32_t here = next[w][threadIdx.x];
        next[w][threadIdx.x] = sum;
        sum += here;
    }
    __syncthreads();
    for (int r = 0; r < ROUNDS; r++) {
        bool there = first + r * WARP < pairs;
        sort_key key = there ? keys[first + r * WARP] : 0;
        int digit = there ? digit_of(key, shift) : DIGITS; // no key has it
        unsigned same = __match_any_sync(0xffffffffu, digit);
        int earlier = __popc(same & ((1u << lane) - 1));
        int32_t at = there ? next[warp][digit] + earlier : 0;
        __syncwarp();
        if (there) {
            sorted[at] = key;
            if (earlier == 0)
                next[warp][digit] += __popc(same);
        }
        __syncwarp();
    }
}

// Thread i takes a pair off its key and bisects for where expert i begins. Reads 8 bytes a pair and 8·log2(T·K) an
// expert.
__global__ static void finish(fmoe_schedule_args a, const sort_key *sorted) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, pairs = a.T * a.K;
    if (i < pairs)
        a.pairs[i] = (int32_t)(uint32_t)sorted[i];
    if (i > a.N)
        return;
    int64_t low = 0, high = pairs; // the first key of expert i or more
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if ((int64_t)(sorted[middle] >> 32) < i)
            low = middle + 1;
        else
            high = middle;
    }
    a.offsets[i] = (int32_t)low;
}

static int64_t chunks_of(const fmoe_schedule_args *a) {
    return (a->T * a->K + CHUNK - 1) / CHUNK;
}

static size_t needed(const void *args) {
    const fmoe_schedule_args *a = (const fmoe_schedule_args *)args;
    return (size_t)(2 * a->T * a->K) * sizeof(sort_key) + (size_t)(DIGITS * chunks_of(a)) * sizeof(int32_t);
}

static unsigned blocks(int64_t threads) {
    return (unsigned)((threads + THREADS - 1) / THREADS);
}

static fmoe_status run(const void *args, void *workspace, size_t bytes, void *stream) {
    fmoe_schedule_args a = *(const fmoe_schedule_args *)args;
    cudaStream_t on = (cudaStream_t)stream;
    int64_t pairs = a.T * a.K, chunks = chunks_of(&a);
    sort_key *keys = (sort_key *)workspace, *spare = keys + pairs;
    int32_t *table = (int32_t *)(spare + pairs);
    (void)bytes;
    if (pairs > 0)
        make_keys<<<blocks(pairs), THREADS, 0, on>>>(a, keys);
    for (int shift = 32; pairs > 0 && a.N >> (shift - 32); shift += 8) {
        count<<<(unsigned)chunks, THREADS, 0, on>>>(keys, pairs, shift, chunks, table);
        add_up<<<1, 1024, 0, on>>>(DIGITS * chunks, table);
        place<<<(unsigned)chunks, THREADS, 0, on>>>(keys, pairs, shift, chunks, table, spare);
        sort_key *swap = keys;
        keys = spare;
        spare = swap;
    }
    finish<<<blocks(pairs > a.N + 1 ? pairs : a.N + 1), THREADS, 0, on>>>(a, keys);
    return cudaGetLastError() == cudaSuccess ? FMOE_OK : FMOE_CUDA;
}

const fmoe_plugin fmoe_plugin_rung = {
    FMOE_STEPS_VERSION, "schedule", "a digit a pass", run, BACKEND_CUDA, 0, needed, NULL, NULL};
