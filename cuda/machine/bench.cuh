// What the measurements of chapter 0 share: memory, a stream, two events, and how a call is timed with them.
#ifndef FMOE_BENCH_CUH
#define FMOE_BENCH_CUH

#include "machine_cuda.h"

#include "../device.cuh"

// What a kernel loaded is kept by a store that happens if all of it adds up to this: never, but who compiles cannot
// know.
#define NEVER 0x9e3779b9u

// A number that looks random for each x.
__device__ inline uint32_t hashed(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

typedef struct {
    cudaStream_t stream;
    cudaEvent_t before, after;
    char *memory; // `bytes` of random float32 in (-1, 1), never zeros
    size_t bytes;
    int multiprocessors;
    uint32_t calls; // counts them, so that no call gathers the rows of the one before it
} bench;

fmoe_status bench_open(size_t bytes, bench *b);
void bench_close(bench *b);
// Random values of dtype (float32 or bfloat16) in (-1, 1).
fmoe_status bench_fill(bench *b, fmoe_dtype dtype, int64_t count, void *values);

// What precedes a timed call in the stream: a kernel that holds the device while the host queues the rest, or a flush
// of the L2, which does so too. Without one of them the time of a short call is the host's.
typedef enum { AFTER_HOLD, AFTER_FLUSH, AFTER_NOTHING } bench_start;
#define HOLD_US 200

typedef fmoe_status bench_call(bench *b, void *what);

// Two warm-ups, then so many runs (at most 200), each between two events. A call of several equal parts counts as one
// part: the times are divided by `parts`.
fmoe_status bench_time(bench *b, bench_start start, bench_call *call, void *what, int runs, int parts,
                       fmoe_timing *timing);
// Spins on one thread of the device.
fmoe_status bench_hold(bench *b, int us);

// Random rows of 2 KB from a table at the start of the bench's memory.
#define GATHER_ROW_BYTES 2048
typedef struct {
    double table_mb;
    int64_t rows;
    bool same_rows; // as in the call before
} gather_what;
fmoe_status bench_gather(bench *b, void *what);

// A call in a CUDA graph: `parts` of them, captured once.
typedef struct {
    bench_call *call;
    void *what;
    int parts;
    cudaGraphExec_t graph;
} graph_what;
fmoe_status bench_capture(bench *b, graph_what *g);
fmoe_status bench_replay(bench *b, void *graph_what);
fmoe_status bench_repeat(bench *b, void *graph_what); // the same calls without the graph
fmoe_status bench_empty(bench *b, void *unused);      // an empty kernel

// launches.cu and ceilings.cu add what they measured.
measured_ceiling *ceiling_add(ceiling_list *list, const char *op, const char *case_name);
fmoe_status launches_measure(bench *b, ceiling_list *list);

#endif
