// What it costs to start something: a kernel, a kernel in a graph, and two events around nothing but a kernel.
#include "bench.cuh"

#define LAUNCHES 500 // a stream queues at least a thousand
#define NODES    100
#define RUNS     30

// Launch: one warp. Shared memory: none. Traffic: none.
static __global__ void empty() {
}

fmoe_status bench_empty(bench *b, void *unused) {
    (void)unused;
    empty<<<1, WARP, 0, b->stream>>>();
    return launched("empty");
}

fmoe_status bench_repeat(bench *b, void *what) {
    const graph_what *g = (const graph_what *)what;
    for (int i = 0; i < g->parts; i++)
        TRY(g->call(b, g->what));
    return FMOE_OK;
}

// [capture]
fmoe_status bench_capture(bench *b, graph_what *g) {
    cudaGraph_t recorded = NULL;
    TRY(cuda_call("capture", cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal)));
    fmoe_status status = bench_repeat(b, g);
    fmoe_status ended = cuda_call("end of capture", cudaStreamEndCapture(b->stream, &recorded));
    if (status == FMOE_OK && ended == FMOE_OK)
        ended = cuda_call("cudaGraphInstantiate", cudaGraphInstantiate(&g->graph, recorded, 0));
    if (recorded)
        cudaGraphDestroy(recorded);
    return status == FMOE_OK ? ended : status;
}
// [/capture]

fmoe_status bench_replay(bench *b, void *what) {
    return cuda_call("cudaGraphLaunch", cudaGraphLaunch(((graph_what *)what)->graph, b->stream));
}

// Behind a kernel that holds the device until the last launch is queued: the events then tell what the device needs for
// each launch, and the clock around the calls what the host needs.
static fmoe_status held_launches(bench *b, graph_what *many, fmoe_timing *timing, fmoe_timing *host) {
    double device_ms[RUNS], host_ms[RUNS];
    for (int i = -1; i < RUNS; i++) {
        float elapsed = 0;
        TRY(bench_hold(b, 10 * LAUNCHES)); // ten microseconds a call are plenty
        TRY(cuda_call("cudaEventRecord", cudaEventRecord(b->before, b->stream)));
        double start = fmoe_now_ms();
        TRY(bench_repeat(b, many));
        double queued = fmoe_now_ms() - start;
        TRY(cuda_call("cudaEventRecord", cudaEventRecord(b->after, b->stream)));
        TRY(cuda_call("cudaEventSynchronize", cudaEventSynchronize(b->after)));
        TRY(cuda_call("cudaEventElapsedTime", cudaEventElapsedTime(&elapsed, b->before, b->after)));
        if (i < 0)
            continue;
        device_ms[i] = elapsed / many->parts;
        host_ms[i] = queued / many->parts;
    }
    *timing = timing_of(RUNS, device_ms);
    *host = timing_of(RUNS, host_ms);
    return FMOE_OK;
}

fmoe_status launches_measure(bench *b, ceiling_list *list) {
    graph_what many = {bench_empty, NULL, LAUNCHES, NULL}, nodes = {bench_empty, NULL, NODES, NULL};
    fmoe_timing device, host, graph, pair;
    TRY(held_launches(b, &many, &device, &host));
    ceiling_add(list, "launch", "queued-500")->timing = device;
    ceiling_add(list, "launch_call", "queued-500")->timing = host;
    TRY(bench_capture(b, &nodes));
    fmoe_status status = bench_time(b, AFTER_HOLD, bench_replay, &nodes, RUNS, NODES, &graph);
    cudaGraphExecDestroy(nodes.graph);
    TRY(status);
    ceiling_add(list, "graph_launch", "nodes-100")->timing = graph;
    TRY(bench_time(b, AFTER_HOLD, bench_empty, NULL, RUNS, 1, &pair));
    ceiling_add(list, "event_pair", "empty-kernel")->timing = pair;
    return FMOE_OK;
}
