// Rung `radix-cub`, the library's: CUB sorts the pairs by expert, one digit after the other, each pass stable.
#include <cub/device/device_radix_sort.cuh> // first: it has a WARP of its own

#include "schedule.cuh"

#define THREADS 256

static int bits_of(int64_t largest) {
    int bits = 1;
    while (largest >> bits)
        bits++;
    return bits;
}

typedef struct {
    uint32_t *keys, *sorted; // [T·K] experts
    int32_t *numbers;        // [T·K]: 0, 1, 2, ...
    void *temporary;         // CUB's
    size_t temporary_bytes;
} cub_memory;

static cudaError_t sort(const schedule_task *a, const cub_memory *m, void *temporary, size_t *bytes,
                        cudaStream_t stream) {
    return cub::DeviceRadixSort::SortPairs(temporary, *bytes, m->keys, m->sorted, m->numbers, a->pairs, a->num_pairs, 0,
                                           bits_of(a->N), stream);
}

// Returns the bytes after the note.
static size_t lay_out(int64_t num_pairs, int64_t N, char *memory, cub_memory *m) {
    size_t array = round_256((size_t)num_pairs * sizeof(int32_t));
    m->keys = (uint32_t *)memory;
    m->sorted = (uint32_t *)(memory + array);
    m->numbers = (int32_t *)(memory + 2 * array);
    m->temporary = memory + 3 * array;
    m->temporary_bytes = 0;
    schedule_task sizes = {};
    sizes.N = (int)N;
    sizes.num_pairs = (int)num_pairs;
    if (sort(&sizes, m, NULL, &m->temporary_bytes, NULL) != cudaSuccess) // only asks for the size
        cudaGetLastError();
    return 3 * array + m->temporary_bytes;
}

// [cub]
// A thread a pair, 256 a block; no shared memory. Reads 4 bytes a pair, writes 8.
__global__ void number_pairs(schedule_task a, uint32_t *keys, int32_t *numbers) {
    int64_t pair = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (pair >= a.num_pairs)
        return;
    keys[pair] = (uint32_t)expert_of(a, (int)pair);
    numbers[pair] = (int32_t)pair;
}

__device__ inline int first_from(int count, const uint32_t *sorted, uint32_t least) {
    int first = 0;
    while (count > 0) {
        int half = count / 2;
        if (sorted[first + half] < least) {
            first += half + 1;
            count -= half + 1;
        } else {
            count = half;
        }
    }
    return first;
}

// A thread an expert or a pair, 256 a block; no shared memory. log2(T·K) reads an expert, from caches for the most
// part. The last block notes bad indices.
__global__ void find_offsets(schedule_task a, const uint32_t *sorted) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i <= a.N)
        a.offsets[i] = first_from(a.num_pairs, sorted, (uint32_t)i);
    if (i < a.num_pairs && sorted[i] == (uint32_t)a.N)
        a.pairs[i] = -1;
    if (blockIdx.x == gridDim.x - 1)
        note_bad_indices(a, first_from(a.num_pairs, sorted, (uint32_t)a.N));
}
// [/cub]

extern "C" size_t cuda_schedule_radix_cub_workspace(const void *args) {
    const fmoe_schedule_args *a = (const fmoe_schedule_args *)args;
    cub_memory m;
    return schedule_note_bytes(a->T) + lay_out(a->T * a->K, a->N, NULL, &m);
}

extern "C" fmoe_status cuda_schedule_radix_cub(const void *args, void *workspace, size_t workspace_bytes,
                                               void *stream) {
    schedule_task a;
    cub_memory m;
    TRY(schedule_from_args(args, workspace, workspace_bytes, 0, &a));
    size_t needed = lay_out(a.num_pairs, a.N, a.rest, &m);
    TRY(check_workspace(workspace, workspace_bytes, schedule_note_bytes(a.T) + needed));
    cudaStream_t s = (cudaStream_t)stream;
    if (a.T == 0)
        return schedule_nothing(&a, s);
    number_pairs<<<(unsigned)ceil_div(a.num_pairs, THREADS), THREADS, 0, s>>>(a, m.keys, m.numbers);
    TRY(launched("number_pairs"));
    TRY(cuda_call("DeviceRadixSort", sort(&a, &m, m.temporary, &m.temporary_bytes, s)));
    int64_t most = a.num_pairs > a.N + 1 ? a.num_pairs : a.N + 1;
    find_offsets<<<(unsigned)ceil_div(most, THREADS), THREADS, 0, s>>>(a, m.sorted);
    return launched("find_offsets");
}
