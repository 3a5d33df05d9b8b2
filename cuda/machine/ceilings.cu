// The GPU's ceilings: one small kernel a bottleneck, each timed between two events on random data.
#include "bench.cuh"

#include <stdio.h>

#define MEMORY_BYTES ((size_t)1 << 30)
#define RUNS         30

measured_ceiling *ceiling_add(ceiling_list *list, const char *op, const char *case_name) {
    measured_ceiling *c = &list->all[list->count++];
    *c = measured_ceiling{};
    c->op = op;
    snprintf(c->case_name, sizeof c->case_name, "%s", case_name);
    return c;
}

// ---- Copy

#define COPY_THREADS 256

// Launch: a thread for every 16 bytes, 256 a block. Shared memory: none. Traffic: count units of 16 bytes read once and
// written once. 2,048 threads a multiprocessor have 32 KB on their way, more than memory needs to be kept busy.
// [copy]
static __global__ void __launch_bounds__(COPY_THREADS) copy(const uint4 *from, uint4 *to, size_t count) {
    size_t i = (size_t)blockIdx.x * COPY_THREADS + threadIdx.x;
    if (i < count)
        to[i] = from[i];
}
// [/copy]

// Each call goes the other way: what the last one left in the L2 is then the end of this one's source, which has left
// it again when it is read.
static fmoe_status copy_half(bench *b, void *unused) {
    (void)unused;
    char *halves[] = {b->memory, b->memory + b->bytes / 2};
    size_t count = b->bytes / 2 / sizeof(uint4);
    copy<<<(unsigned)ceil_div((int64_t)count, COPY_THREADS), COPY_THREADS, 0, b->stream>>>(
        (const uint4 *)halves[b->calls % 2], (uint4 *)halves[(b->calls + 1) % 2], count);
    b->calls++;
    return launched("copy");
}

static fmoe_status measure_copy(bench *b, ceiling_list *list) {
    fmoe_timing timing;
    TRY(bench_time(b, AFTER_HOLD, copy_half, NULL, RUNS, 1, &timing));
    measured_ceiling *c = ceiling_add(list, "copy", "512MB");
    c->timing = timing;
    c->work.bytes = (double)b->bytes;
    return FMOE_OK;
}

// ---- Gather (the kernel is in bench.cu)

static fmoe_status measure_gather(bench *b, ceiling_list *list) {
    const double tables_mb[] = {2, 8, 17, 34, 67, 210};
    for (double mb : tables_mb) {
        gather_what what = {mb, 1 << 20, false};
        fmoe_timing timing;
        char name[32];
        TRY(bench_time(b, AFTER_HOLD, bench_gather, &what, RUNS, 1, &timing));
        snprintf(name, sizeof name, "table%gMB-row2KB", mb);
        measured_ceiling *c = ceiling_add(list, "gather", name);
        c->mb = mb;
        c->timing = timing;
        c->work.bytes = (double)what.rows * GATHER_ROW_BYTES;
    }
    return FMOE_OK;
}

// ---- Reductions

#define REDUCE_THREADS 256

__device__ inline void add_to_memory(float4 *target, float4 value) {
#if __CUDA_ARCH__ >= 900
    atomicAdd(target, value); // one instruction: red.global.add.v4.f32
#else
    float *at = (float *)target;
    atomicAdd(at, value.x), atomicAdd(at + 1, value.y), atomicAdd(at + 2, value.z), atomicAdd(at + 3, value.w);
#endif
}

// Launch: a warp for every four rows of 2 KB, 8 warps a block. Shared memory: none. Traffic: 2 KB of payload a row into
// a random row of the target, 16 bytes a lane at a time; the additions happen in the L2, nothing comes back. [reduce]
static __global__ void __launch_bounds__(REDUCE_THREADS) reduce(float4 *target, uint32_t num_rows, uint32_t seed) {
    uint32_t warp = (blockIdx.x * REDUCE_THREADS + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    float4 value = make_float4(0.25f, -0.5f, 0.75f, -(float)lane);
    for (uint32_t r = 0; r < 4; r++) {
        uint32_t row = __umulhi(hashed(seed + 4 * warp + r), num_rows);
        for (int c = 0; c < GATHER_ROW_BYTES / 16 / WARP; c++)
            add_to_memory(target + (size_t)row * (GATHER_ROW_BYTES / 16) + c * WARP + lane, value);
    }
}
// [/reduce]

#define REDUCE_ROWS (1 << 18)

static fmoe_status reduce_rows(bench *b, void *what) {
    double mb = *(const double *)what;
    b->calls += REDUCE_ROWS;
    reduce<<<REDUCE_ROWS / 4 * WARP / REDUCE_THREADS, REDUCE_THREADS, 0, b->stream>>>(
        (float4 *)b->memory, (uint32_t)(mb * 1e6 / GATHER_ROW_BYTES), b->calls);
    return launched("reduce");
}

static fmoe_status measure_reduce(bench *b, ceiling_list *list) {
    const double targets_mb[] = {17, 67, 134};
    for (double mb : targets_mb) {
        fmoe_timing timing;
        char name[32];
        TRY(bench_time(b, AFTER_HOLD, reduce_rows, &mb, RUNS, 1, &timing));
        snprintf(name, sizeof name, "target%gMB-row2KB", mb);
        measured_ceiling *c = ceiling_add(list, "reduce", name);
        c->timing = timing;
        c->work.bytes = (double)REDUCE_ROWS * GATHER_ROW_BYTES;
    }
    return FMOE_OK;
}

// ---- Shared memory

#define SHARED_THREADS 1024
#define SHARED_UNITS   2048 // of 16 bytes: 32 KB
#define SHARED_LOADS   8    // a turn
#define SHARED_TURNS   512

// Launch: two blocks of 1,024 threads a multiprocessor. Shared memory: 32 KB a block. Traffic: 16 bytes a lane from 512
// successive bytes a warp, which is free of bank conflicts: four turns of all 32 banks. The place moves on from turn to
// turn, or the compiler would load once and for all.
// [shared]
static __global__ void __launch_bounds__(SHARED_THREADS) shared_loads(const uint4 *from, unsigned *written) {
    __shared__ uint4 tile[SHARED_UNITS];
    for (int i = threadIdx.x; i < SHARED_UNITS; i += SHARED_THREADS)
        tile[i] = from[i];
    __syncthreads();
    unsigned sum = 0, at = threadIdx.x % WARP;
    for (int turn = 0; turn < SHARED_TURNS; turn++) {
        for (int i = 0; i < SHARED_LOADS; i++) {
            uint4 v = tile[at + i * WARP];
            sum ^= v.x ^ v.y ^ v.z ^ v.w;
        }
        at = (at + SHARED_LOADS * WARP) % SHARED_UNITS;
    }
    if (sum == NEVER)
        *written = sum;
}
// [/shared]

static fmoe_status load_shared(bench *b, void *unused) {
    (void)unused;
    shared_loads<<<2 * b->multiprocessors, SHARED_THREADS, 0, b->stream>>>((const uint4 *)b->memory,
                                                                           (unsigned *)b->memory);
    return launched("shared_loads");
}

static fmoe_status measure_shared(bench *b, ceiling_list *list) {
    fmoe_timing timing;
    TRY(bench_time(b, AFTER_HOLD, load_shared, NULL, RUNS, 1, &timing));
    measured_ceiling *c = ceiling_add(list, "shared", "tile32KB");
    c->timing = timing;
    c->work.bytes = 2.0 * b->multiprocessors * SHARED_THREADS * SHARED_TURNS * SHARED_LOADS * sizeof(uint4);
    return FMOE_OK;
}

// ---- Multiply-adds

#define FMA_THREADS 1024
#define FMA_CHAINS  8
#define FMA_STEPS   16384

// Launch: two blocks of 1,024 threads a multiprocessor. Shared memory: none. Traffic: none; FMA_CHAINS · FMA_STEPS
// multiply-adds a thread in registers. One takes four cycles, and a quarter of the multiprocessor starts one a cycle:
// its 16 warps of 8 independent chains hide that many times over. [fma]
static __global__ void __launch_bounds__(FMA_THREADS) fma_chains(float step, float *written) {
    float sum[FMA_CHAINS];
    for (int i = 0; i < FMA_CHAINS; i++)
        sum[i] = step * (float)(threadIdx.x + i);
    for (int s = 0; s < FMA_STEPS; s++)
        for (int i = 0; i < FMA_CHAINS; i++)
            sum[i] = fmaf(sum[i], 0.999f, step);
    float all = 0;
    for (int i = 0; i < FMA_CHAINS; i++)
        all += sum[i];
    if (all == -1) // the sums are positive, which the compiler does not know
        *written = all;
}
// [/fma]

static fmoe_status multiply_add(bench *b, void *unused) {
    (void)unused;
    fma_chains<<<2 * b->multiprocessors, FMA_THREADS, 0, b->stream>>>(1e-6f * (float)++b->calls, (float *)b->memory);
    return launched("fma_chains");
}

static fmoe_status measure_fma(bench *b, ceiling_list *list) {
    fmoe_timing timing;
    TRY(bench_time(b, AFTER_HOLD, multiply_add, NULL, RUNS, 1, &timing));
    measured_ceiling *c = ceiling_add(list, "fma", "-");
    c->timing = timing;
    c->work.flops = 2.0 * 2 * b->multiprocessors * FMA_THREADS * FMA_CHAINS * FMA_STEPS;
    return FMOE_OK;
}

// ---- Matrix product

#define GEMM 8192

static fmoe_status gemm(bench *b, void *dtype) {
    fmoe_dtype of = *(const fmoe_dtype *)dtype;
    size_t bytes = (size_t)GEMM * GEMM * fmoe_dtype_size(of);
    return cublas_product(of, GEMM, GEMM, GEMM, b->memory, b->memory + bytes, b->memory + 2 * bytes, b->stream);
}

static fmoe_status measure_gemm(bench *b, ceiling_list *list) {
    fmoe_dtype types[] = {FMOE_F32, FMOE_BF16};
    for (fmoe_dtype dtype : types) {
        fmoe_timing timing;
        char name[32];
        TRY(bench_fill(b, dtype, 2 * (int64_t)GEMM * GEMM, b->memory));
        TRY(bench_time(b, AFTER_HOLD, gemm, &dtype, dtype == FMOE_F32 ? 10 : RUNS, 1, &timing));
        snprintf(name, sizeof name, "M%d-N%d-K%d-%s", GEMM, GEMM, GEMM, fmoe_dtype_name(dtype));
        measured_ceiling *c = ceiling_add(list, "gemm", name);
        c->timing = timing;
        c->work.flops = 2.0 * GEMM * GEMM * GEMM;
    }
    return FMOE_OK;
}

// ---- All

static fmoe_status measure_all(bench *b, ceiling_list *list) {
    TRY(measure_copy(b, list));
    TRY(measure_gather(b, list));
    TRY(measure_reduce(b, list));
    TRY(measure_shared(b, list));
    TRY(measure_fma(b, list));
    TRY(launches_measure(b, list));
    return cublas_available() ? measure_gemm(b, list) : FMOE_OK;
}

extern "C" fmoe_status cuda_ceilings_measure(ceiling_list *list) {
    bench b;
    fmoe_status status = bench_open(MEMORY_BYTES, &b);
    if (status == FMOE_OK)
        status = measure_all(&b, list);
    bench_close(&b);
    return status;
}
