// The crossover map's measurements.
#include "map.h"
#include "../expert/expert.h"
#include "../machine/bench.cuh"

#include <math.h>
#include <stdlib.h>

struct cuda_map {
    bench timing;
    int64_t most_tokens, d, N;
    __nv_bfloat16 *x, *down, *up, *y;
    float *host_down, *host_up; // the same as the device's
};

// Launch: a thread a value, 256 a block. Shared memory: none. Traffic: count values out.
static __global__ void draw_values(int64_t count, uint32_t seed, float scale, __nv_bfloat16 *values) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) // uniform, of variance scale²
        values[i] = __float2bfloat16_rn(scale * 1.7320508f * ((float)hashed((uint32_t)i ^ seed) * 0x1p-31f - 1));
}

// Launch: a thread a pair, 256 a block. Shared memory: none. Traffic: 8 bytes a pair out.
static __global__ void draw_pairs(int64_t count, uint32_t N, float scale, int32_t *indices, float *weights) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) {
        indices[i] = (int32_t)__umulhi(hashed((uint32_t)i), N);
        weights[i] = scale * ((float)hashed((uint32_t)i ^ 0x5bd1e995u) + 1) * 0x1p-32f;
    }
}

static unsigned blocks_for(int64_t count) {
    return (unsigned)ceil_div(count, 256);
}

// Device memory that the caller frees, also after an error.
static fmoe_status get(size_t bytes, void **memory) {
    return cuda_call("cudaMalloc", cudaMalloc(memory, bytes + 256));
}

static fmoe_status bring_back(int64_t count, const __nv_bfloat16 *values, float *to) {
    __nv_bfloat16 *stored = (__nv_bfloat16 *)malloc((size_t)count * sizeof *stored);
    fmoe_status status =
        stored ? cuda_call("copy", cudaMemcpy(stored, values, (size_t)count * sizeof *stored, cudaMemcpyDeviceToHost))
               : FMOE_OUT_OF_MEMORY;
    if (status == FMOE_OK)
        fmoe_to_f32(FMOE_BF16, count, stored, to);
    free(stored);
    return status;
}

static fmoe_status fill_map(cuda_map *m) {
    int64_t table = m->N * m->d, tokens = m->most_tokens * m->d;
    TRY(bench_open(CUDA_FLUSH_BYTES, &m->timing));
    TRY(get((size_t)tokens * 2, (void **)&m->x));
    TRY(get((size_t)tokens * 2, (void **)&m->y));
    TRY(get((size_t)table * 2, (void **)&m->down));
    TRY(get((size_t)table * 2, (void **)&m->up));
    cudaStream_t stream = m->timing.stream;
    draw_values<<<blocks_for(tokens), 256, 0, stream>>>(tokens, 0x1234567u, 1, m->x);
    draw_values<<<blocks_for(table), 256, 0, stream>>>(table, 0x89abcdeu, 1 / sqrtf((float)m->d), m->down);
    draw_values<<<blocks_for(table), 256, 0, stream>>>(table, 0xf012345u, 1, m->up);
    TRY(launched("draw_values"));
    TRY(cuda_call("cudaStreamSynchronize", cudaStreamSynchronize(stream)));
    m->host_down = (float *)malloc((size_t)table * sizeof(float));
    m->host_up = (float *)malloc((size_t)table * sizeof(float));
    if (!m->host_down || !m->host_up)
        return fmoe_fail(FMOE_OUT_OF_MEMORY, "no memory for the reference's tables");
    TRY(bring_back(table, m->down, m->host_down));
    return bring_back(table, m->up, m->host_up);
}

extern "C" fmoe_status cuda_map_open(int64_t most_tokens, int64_t d, int64_t N, cuda_map **map) {
    *map = (cuda_map *)calloc(1, sizeof **map);
    if (!*map)
        return fmoe_fail(FMOE_OUT_OF_MEMORY, "no memory for the map");
    (*map)->most_tokens = most_tokens, (*map)->d = d, (*map)->N = N;
    return fill_map(*map);
}

extern "C" void cuda_map_close(cuda_map *map) {
    if (!map)
        return;
    bench_close(&map->timing);
    cudaFree(map->x), cudaFree(map->y), cudaFree(map->down), cudaFree(map->up);
    free(map->host_down), free(map->host_up);
    free(map);
}

// ---- A cell

typedef struct {
    fmoe_expert_args args;
    int32_t *indices;
    float *weights;
    void *workspace;
    size_t workspace_bytes;
    fmoe_rung_fn *run;
} map_call;

static fmoe_status run_strategy(bench *b, void *what) {
    map_call *call = (map_call *)what;
    return call->run(&call->args, call->workspace, call->workspace_bytes, b->stream);
}

static fmoe_status choose_pairs(bench *b, const float *logits, map_call *call) {
    const fmoe_expert_args *a = &call->args;
    int64_t n = fmoe_num_keys(a->N), pairs = a->T * a->K;
    if (!logits) {
        draw_pairs<<<blocks_for(pairs), 256, 0, b->stream>>>(pairs, (uint32_t)a->N, 1 / (float)a->K, call->indices,
                                                             call->weights);
        return launched("draw_pairs");
    }
    size_t bytes = (size_t)(2 * a->T * n) * sizeof(float);
    size_t workspace = fmoe_cuda_topk_workspace(a->T, n, a->K, FMOE_F32);
    void *memory = NULL, *scratch = NULL;
    fmoe_status status = get(bytes, &memory);
    if (status == FMOE_OK)
        status = get(workspace, &scratch);
    if (status == FMOE_OK)
        status = cuda_call("copy", cudaMemcpy(memory, logits, bytes, cudaMemcpyHostToDevice));
    if (status == FMOE_OK)
        status = fmoe_cuda_topk(a->T, n, a->K, false, FMOE_F32, memory, call->indices, NULL, call->weights, scratch,
                                workspace, b->stream);
    if (status == FMOE_OK)
        status = cuda_call("cudaStreamSynchronize", cudaStreamSynchronize(b->stream));
    cudaFree(memory), cudaFree(scratch);
    return status;
}

// The outputs of some tokens, first to last, against the reference's.
static fmoe_status check_tokens(cuda_map *m, const map_call *call, double *error) {
    const fmoe_expert_args *a = &call->args;
    int64_t tokens = a->T < CUDA_MAP_CHECK ? a->T : CUDA_MAP_CHECK, step = tokens > 1 ? (a->T - 1) / (tokens - 1) : 1;
    float *x = (float *)malloc((size_t)(3 * tokens * m->d) * sizeof(float)), *y = x + tokens * m->d;
    float *expected = y + tokens * m->d, *weights = (float *)malloc((size_t)(2 * tokens * a->K) * sizeof(float));
    int32_t *indices = (int32_t *)(weights + tokens * a->K);
    size_t row = (size_t)a->K * sizeof(float);
    fmoe_status status = x && weights ? cuda_call("the device", cudaStreamSynchronize(m->timing.stream))
                                      : fmoe_fail(FMOE_OUT_OF_MEMORY, "no memory for the check");
    for (int64_t i = 0; i < tokens && status == FMOE_OK; i++) {
        int64_t t = i * step;
        status = bring_back(m->d, m->x + t * m->d, x + i * m->d);
        if (status == FMOE_OK)
            status = bring_back(m->d, m->y + t * m->d, y + i * m->d);
        if (status == FMOE_OK)
            status = cuda_call("copy",
                               cudaMemcpy(indices + i * a->K, call->indices + t * a->K, row, cudaMemcpyDeviceToHost));
        if (status == FMOE_OK)
            status = cuda_call("copy",
                               cudaMemcpy(weights + i * a->K, call->weights + t * a->K, row, cudaMemcpyDeviceToHost));
    }
    if (status == FMOE_OK)
        status = fmoe_expert(tokens, m->d, m->N, a->K, x, m->host_down, m->host_up, indices, weights, expected, NULL);
    if (status == FMOE_OK)
        *error = fmoe_relative_error(tokens * m->d, y, expected, 0);
    free(x), free(weights);
    return status;
}

static fmoe_status measure(cuda_map *m, map_call *call, cuda_map_cell *cell) {
    static fmoe_rung_fn *const runs[] = {cuda_expert_slices, cuda_strategy_dense, cuda_strategy_rows};
    static fmoe_workspace_fn *const bytes[] = {cuda_expert_slices_bytes, cuda_strategy_dense_bytes,
                                               cuda_strategy_rows_bytes};
    const fmoe_expert_args *a = &call->args;
    for (int s = 0; s < CUDA_NUM_STRATEGIES; s++) {
        cell->fits[s] = isfinite(cuda_strategy_cost_us((cuda_strategy)s, a));
        if (!cell->fits[s])
            continue;
        call->run = runs[s], call->workspace_bytes = bytes[s](a);
        TRY(get(call->workspace_bytes, &call->workspace));
        TRY(cuda_call("cudaMemset", cudaMemset(m->y, 0xff, (size_t)(a->T * a->d) * 2)));
        TRY(bench_time(&m->timing, AFTER_FLUSH, run_strategy, call, CUDA_MAP_RUNS, 1, &cell->timing[s]));
        TRY(check_tokens(m, call, &cell->error[s]));
        cudaFree(call->workspace);
        call->workspace = NULL;
    }
    return FMOE_OK;
}

extern "C" fmoe_status cuda_map_measure(cuda_map *m, int64_t T, int64_t K, const float *logits, cuda_map_cell *cell) {
    map_call call = {};
    fmoe_expert_args *a = &call.args;
    *cell = cuda_map_cell{};
    fmoe_status status = get((size_t)(T * K) * sizeof(int32_t), (void **)&call.indices);
    if (status == FMOE_OK)
        status = get((size_t)(T * K) * sizeof(float), (void **)&call.weights);
    a->T = T, a->d = m->d, a->N = m->N, a->K = K, a->dtype = FMOE_BF16, a->from_router = logits != NULL;
    a->x = m->x, a->down = m->down, a->up = m->up, a->y = m->y, a->indices = call.indices, a->weights = call.weights;
    cell->choice = cuda_strategy_choose(a);
    if (status == FMOE_OK)
        status = choose_pairs(&m->timing, logits, &call);
    if (status == FMOE_OK)
        status = measure(m, &call, cell);
    cudaFree(call.indices), cudaFree(call.weights), cudaFree(call.workspace);
    return status;
}
