// How a call on the GPU is timed: two events around it in the stream, and something before them that keeps the device
// busy until the host has queued all of it.
#include "bench.cuh"

#define MAX_RUNS 200

// ---- Memory

// Launch: a thread a value, 256 a block. Shared memory: none. Traffic: count values written.
template <typename E> static __global__ void fill(E *values, int64_t count) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count)
        values[i] = from_f32<E>((float)hashed((uint32_t)i + 1) * 0x1p-31f - 1);
}

fmoe_status bench_fill(bench *b, fmoe_dtype dtype, int64_t count, void *values) {
    TRY(check_dtype(dtype));
    if (count > 0)
        WITH_DTYPE(dtype, E, fill<<<(unsigned)ceil_div(count, 256), 256, 0, b->stream>>>((E *)values, count));
    return launched("fill");
}

fmoe_status bench_open(size_t bytes, bench *b) {
    int device = 0;
    *b = bench{};
    b->bytes = bytes;
    TRY(cuda_call("cudaGetDevice", cudaGetDevice(&device)));
    TRY(cuda_call("cudaDeviceGetAttribute",
                  cudaDeviceGetAttribute(&b->multiprocessors, cudaDevAttrMultiProcessorCount, device)));
    TRY(cuda_call("cudaMalloc", cudaMalloc(&b->memory, bytes)));
    TRY(cuda_call("cudaStreamCreate", cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking)));
    TRY(cuda_call("cudaEventCreate", cudaEventCreate(&b->before)));
    TRY(cuda_call("cudaEventCreate", cudaEventCreate(&b->after)));
    return bench_fill(b, FMOE_F32, (int64_t)(bytes / sizeof(float)), b->memory);
}

void bench_close(bench *b) {
    if (b->after)
        cudaEventDestroy(b->after);
    if (b->before)
        cudaEventDestroy(b->before);
    if (b->stream)
        cudaStreamDestroy(b->stream);
    cudaFree(b->memory);
    *b = bench{};
}

// ---- Timing

// Launch: one thread. Shared memory: none. Traffic: none; it reads a clock until that many cycles have passed.
static __global__ void hold(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles)
        ;
}

fmoe_status bench_hold(bench *b, int us) {
    hold<<<1, 1, 0, b->stream>>>(2000LL * us); // at 2 GHz; longer at a lower clock
    return launched("hold");
}

// [events]
static fmoe_status time_once(bench *b, bench_start start, bench_call *call, void *what, double *ms) {
    float elapsed = 0;
    if (start == AFTER_HOLD)
        TRY(bench_hold(b, HOLD_US));
    if (start == AFTER_FLUSH)
        TRY(cuda_flush_l2(b->memory + b->bytes - CUDA_FLUSH_BYTES, CUDA_FLUSH_BYTES, b->stream));
    TRY(cuda_call("cudaEventRecord", cudaEventRecord(b->before, b->stream)));
    TRY(call(b, what));
    TRY(cuda_call("cudaEventRecord", cudaEventRecord(b->after, b->stream)));
    TRY(cuda_call("cudaEventSynchronize", cudaEventSynchronize(b->after)));
    TRY(cuda_call("cudaEventElapsedTime", cudaEventElapsedTime(&elapsed, b->before, b->after)));
    *ms = elapsed;
    return FMOE_OK;
}
// [/events]

fmoe_status bench_time(bench *b, bench_start start, bench_call *call, void *what, int runs, int parts,
                       fmoe_timing *timing) {
    double ms[MAX_RUNS];
    for (int i = 0; i < 2; i++)
        TRY(time_once(b, start, call, what, &ms[0]));
    for (int i = 0; i < runs; i++) {
        TRY(time_once(b, start, call, what, &ms[i]));
        ms[i] /= parts;
    }
    *timing = timing_of(runs, ms);
    return FMOE_OK;
}

// ---- Gather

#define GATHER_THREADS 256
#define ROW_LOADS      (GATHER_ROW_BYTES / 16 / WARP) // of 16 bytes, a lane and row

// Launch: blocks of 8 warps, as many as fit the device at once; the warps take the rows in turn. Shared memory: none.
// Traffic: GATHER_ROW_BYTES a row, 4 loads of 16 bytes a lane, all under way before the first is used. The rows come
// from a hash of a counter, never from another row, so nothing waits for an address. The sums are used as in read_all.
// [gather]
static __global__ void __launch_bounds__(GATHER_THREADS)
    gather(const uint4 *table, uint32_t num_rows, uint32_t seed, uint32_t rows, unsigned *written) {
    uint32_t warps = gridDim.x * (GATHER_THREADS / WARP), lane = threadIdx.x % WARP;
    uint32_t first = blockIdx.x * (GATHER_THREADS / WARP) + threadIdx.x / WARP;
    unsigned sum = 0;
    for (uint32_t r = first; r < rows; r += warps) {
        size_t row = __umulhi(hashed(seed + r), num_rows);
        const uint4 *from = table + row * (GATHER_ROW_BYTES / 16) + lane;
        uint4 v[ROW_LOADS];
        for (int i = 0; i < ROW_LOADS; i++)
            v[i] = __ldg(from + i * WARP);
        for (int i = 0; i < ROW_LOADS; i++)
            sum ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    }
    if (sum == NEVER)
        *written = sum;
}
// [/gather]

fmoe_status bench_gather(bench *b, void *what) {
    const gather_what *g = (const gather_what *)what;
    int blocks = 0;
    uint32_t num_rows = (uint32_t)(g->table_mb * 1e6 / GATHER_ROW_BYTES);
    TRY(cuda_call("gather", cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, gather, GATHER_THREADS, 0)));
    if (!g->same_rows)
        b->calls++;
    gather<<<blocks * b->multiprocessors, GATHER_THREADS, 0, b->stream>>>(
        (const uint4 *)b->memory, num_rows, b->calls * (uint32_t)g->rows, (uint32_t)g->rows, (unsigned *)b->memory);
    return launched("gather");
}
