// Six ways to time a GPU wrongly, each with the right way beside it.
#include "bench.cuh"

#define MEMORY_BYTES ((size_t)512 << 20) // three bfloat16 matrices of 8192², or a table and what flushes the L2
#define GEMM         8192
#define RUNS         50
#define MANY         500
#define NODES        100

// Launch: 16 blocks of 256 threads. Shared memory: none. Traffic: 16 KB read and written. A kernel of a microsecond.
template <int step> static __global__ void add(float *values) {
    values[blockIdx.x * 256 + threadIdx.x] += (float)step;
}

static fmoe_status add_once(bench *b, void *unused) {
    (void)unused;
    add<1><<<16, 256, 0, b->stream>>>((float *)b->memory);
    return launched("add");
}

static fmoe_status add_first(bench *b, void *unused) {
    (void)unused;
    add<2><<<16, 256, 0, b->stream>>>((float *)b->memory);
    return launched("add");
}

// By the host's clock: around the call alone, or around the call and a wait for the device.
// [host]
static fmoe_status host_once(bench *b, bench_call *call, void *what, bool wait, double *ms) {
    double start = fmoe_now_ms();
    TRY(call(b, what));
    if (wait)
        TRY(cuda_call("cudaStreamSynchronize", cudaStreamSynchronize(b->stream)));
    *ms = fmoe_now_ms() - start;
    return cuda_call("cudaStreamSynchronize", cudaStreamSynchronize(b->stream));
}
// [/host]

static fmoe_status by_host(bench *b, bench_call *call, void *what, bool wait, fmoe_timing *timing) {
    double ms[RUNS];
    TRY(host_once(b, call, what, wait, &ms[0]));
    for (int i = 0; i < RUNS; i++)
        TRY(host_once(b, call, what, wait, &ms[i]));
    *timing = timing_of(RUNS, ms);
    return FMOE_OK;
}

// The driver loads a kernel's code when it is first launched.
static fmoe_status first_launch(bench *b, cuda_mistakes *m) {
    TRY(host_once(b, add_first, NULL, true, &m->first_ms));
    return host_once(b, add_first, NULL, true, &m->second_ms);
}

// A launch returns before the kernel has run.
static fmoe_status no_wait(bench *b, cuda_mistakes *m) {
    gather_what what = {34, 1 << 20, false};
    m->gathered_mb[0] = (double)what.rows * GATHER_ROW_BYTES * 1e-6;
    TRY(by_host(b, bench_gather, &what, false, &m->call));
    TRY(by_host(b, bench_gather, &what, true, &m->waited));
    return bench_time(b, AFTER_HOLD, bench_gather, &what, RUNS, 1, &m->events);
}

// 256 tokens gather 64 rows each. The rows of the call before are still in the L2, unless something else was read.
static fmoe_status hot_table(bench *b, cuda_mistakes *m) {
    gather_what what = {34, 1 << 14, true};
    m->gathered_mb[1] = (double)what.rows * GATHER_ROW_BYTES * 1e-6;
    TRY(bench_time(b, AFTER_HOLD, bench_gather, &what, 4 * RUNS, 1, &m->left_in_l2));
    return bench_time(b, AFTER_FLUSH, bench_gather, &what, 4 * RUNS, 1, &m->flushed);
}

static fmoe_status gemm(bench *b, void *unused) {
    (void)unused;
    size_t bytes = (size_t)GEMM * GEMM * 2;
    return cublas_product(FMOE_BF16, GEMM, GEMM, GEMM, b->memory, b->memory + bytes, b->memory + 2 * bytes, b->stream);
}

static fmoe_status gemm_on(bench *b, bool zeros, fmoe_timing *timing) {
    int64_t count = 2 * (int64_t)GEMM * GEMM;
    if (zeros)
        TRY(cuda_call("cudaMemsetAsync", cudaMemsetAsync(b->memory, 0, (size_t)count * 2, b->stream)));
    else
        TRY(bench_fill(b, FMOE_BF16, count, b->memory));
    graph_what products = {gemm, NULL, 20, NULL};
    return bench_time(b, AFTER_NOTHING, bench_repeat, &products, 15, 20, timing);
}

// The same instructions on zeros switch fewer transistors, and the clock goes by the power that is drawn. It follows
// slowly: half a second of products each, one after the other.
static fmoe_status zeros(bench *b, cuda_mistakes *m) {
    if (!cublas_available())
        return FMOE_OK;
    m->gemm_flops = 2.0 * GEMM * GEMM * GEMM;
    TRY(gemm_on(b, false, &m->gemm_random));
    TRY(gemm_on(b, true, &m->gemm_zeros));
    return gemm_on(b, false, &m->gemm_random_again);
}

// A kernel as short as what surrounds it.
static fmoe_status short_kernel(bench *b, cuda_mistakes *m) {
    graph_what many = {add_once, NULL, MANY, NULL}, nodes = {add_once, NULL, NODES, NULL};
    TRY(by_host(b, add_once, NULL, true, &m->short_host));
    TRY(bench_time(b, AFTER_NOTHING, add_once, NULL, RUNS, 1, &m->short_events));
    TRY(bench_time(b, AFTER_HOLD, add_once, NULL, RUNS, 1, &m->short_held));
    TRY(bench_time(b, AFTER_NOTHING, bench_repeat, &many, RUNS, MANY, &m->short_many));
    TRY(bench_capture(b, &nodes));
    fmoe_status status = bench_time(b, AFTER_HOLD, bench_replay, &nodes, RUNS, NODES, &m->short_graph);
    cudaGraphExecDestroy(nodes.graph);
    return status;
}

static fmoe_status measure_all(bench *b, cuda_mistakes *m) {
    TRY(first_launch(b, m)); // before anything else of this file has run
    TRY(no_wait(b, m));
    TRY(hot_table(b, m));
    TRY(short_kernel(b, m));
    return zeros(b, m);
}

extern "C" fmoe_status cuda_mistakes_measure(cuda_mistakes *m) {
    bench b;
    *m = cuda_mistakes{};
    fmoe_status status = bench_open(MEMORY_BYTES, &b);
    if (status == FMOE_OK)
        status = measure_all(&b, m);
    bench_close(&b);
    return status;
}
