// Rung: warpgroup products, fed by the copy engine. x̂ is split in registers, where wgmma takes its left operand from.
#include "split.cuh"

#define STAGES        6
#define WARPGROUPS    2 // that multiply, each every other chunk of 64 hidden units
#define GROUP_THREADS 128
#define PRODUCER_WARP (WARPGROUPS * GROUP_THREADS / WARP)
#define NORM_WARP     (PRODUCER_WARP + 1)
#define WGMMA_THREADS (WARPGROUPS * GROUP_THREADS + 2 * WARP)

// One chunk: what the copy engine brings together.
template <typename E> struct alignas(1024) wgmma_stage {
    E gate[TILE_KEYS * TILE_DEPTH], x[TILE_TOKENS * TILE_DEPTH];
    float center[TILE_DEPTH], scale[TILE_DEPTH], offset[TILE_DEPTH];
};

template <typename E> struct wgmma_shared {
    wgmma_stage<E> stages[STAGES];
    float logits[TILE_TOKENS * TILE_PITCH];
    uint64_t full[STAGES], empty[STAGES];
};

#define TILE_BYTES(E) ((TILE_KEYS + TILE_TOKENS) * TILE_DEPTH * (int)sizeof(E))
#define NORM_BYTES    (3 * TILE_DEPTH * (int)sizeof(float))

template <typename E>
__device__ inline void bring_tiles(wgmma_shared<E> *s, int chunk, const CUtensorMap *x, const CUtensorMap *gate,
                                   int token, int key, bool and_norm) {
    int stage = chunk % STAGES;
    barrier_arrive_expecting(&s->full[stage], TILE_BYTES(E) + (and_norm ? NORM_BYTES : 0));
    copy_box(s->stages[stage].x, x, chunk * TILE_DEPTH, token, &s->full[stage]);
    copy_box(s->stages[stage].gate, gate, chunk * TILE_DEPTH, key, &s->full[stage]);
}

template <typename E> __device__ inline void bring_norm(wgmma_shared<E> *s, int chunk, const router_norm &norm) {
    int stage = chunk % STAGES, bytes = TILE_DEPTH * (int)sizeof(float);
    copy_bulk(s->stages[stage].center, norm.center + chunk * TILE_DEPTH, bytes, &s->full[stage]);
    copy_bulk(s->stages[stage].scale, norm.scale + chunk * TILE_DEPTH, bytes, &s->full[stage]);
    copy_bulk(s->stages[stage].offset, norm.offset + chunk * TILE_DEPTH, bytes, &s->full[stage]);
}

// [producer]
// One thread asks for everything. x and the gate are there from the start. In training the norm is what the kernel
// before still works on, while the first stages' tiles are on their way.
template <typename E>
__device__ inline void produce(wgmma_shared<E> *s, const router_job &job, const CUtensorMap *x, const CUtensorMap *gate,
                               int token, int key, int chunks) {
    int first = chunks < STAGES ? chunks : STAGES;
    bool with_norm = !job.mean;
    for (int chunk = 0; chunk < first; chunk++)
        bring_tiles(s, chunk, x, gate, token, key, with_norm);
    wait_for_kernel_before();
    for (int chunk = 0; chunk < first && with_norm; chunk++)
        bring_norm(s, chunk, job.norm);
    for (int chunk = first; chunk < chunks; chunk++) {
        barrier_wait(&s->empty[chunk % STAGES], (chunk / STAGES - 1) % 2);
        bring_tiles(s, chunk, x, gate, token, key, with_norm);
        if (with_norm)
            bring_norm(s, chunk, job.norm);
    }
}
// [/producer]

// [norm-warp]
// In evaluation the norm is a root for each hidden unit. A warp of each block makes it, chunk by chunk, from running
// buffers that it loads a ring of stages ahead. The mean is a float32, so nothing is lost that an offset would hold.
template <typename E> __device__ inline void make_norm(wgmma_shared<E> *s, const router_job &job, int chunks) {
    constexpr int UNITS = TILE_DEPTH / WARP;
    int lane = threadIdx.x % WARP;
    float mean[STAGES][UNITS], var[STAGES][UNITS];
    auto load = [&](int stage, int chunk) {
        for (int j = 0; j < UNITS; j++) {
            int h = chunk * TILE_DEPTH + j * WARP + lane;
            mean[stage][j] = h < job.d ? job.mean[h] : 0; // x is 0 beyond d, and so is x̂
            var[stage][j] = h < job.d ? job.var[h] : 0;
        }
    };
#pragma unroll
    for (int i = 0; i < STAGES; i++)
        load(i, i);
    for (int first = 0; first < chunks; first += STAGES)
#pragma unroll
        for (int i = 0; i < STAGES; i++) {
            int chunk = first + i;
            if (chunk >= chunks)
                return;
            if (first > 0)
                barrier_wait(&s->empty[i], (first / STAGES - 1) % 2);
            for (int j = 0; j < UNITS; j++) {
                s->stages[i].center[j * WARP + lane] = mean[i][j];
                s->stages[i].scale[j * WARP + lane] = running_scale(var[i][j]);
                s->stages[i].offset[j * WARP + lane] = 0;
            }
            barrier_arrive(&s->full[i]);
            load(i, chunk + STAGES);
        }
}
// [/norm-warp]

__device__ inline float2 two_at(const float *values, int at) {
    return *(const float2 *)(values + at);
}

// A warp's 16 tokens by 16 hidden units of x as they are stored, to two left operands. Parts 0 and 1 hold units
// 2 (lane mod 4) and the next, parts 2 and 3 those eight further.
template <typename E>
__device__ inline void split_operand(const wgmma_stage<E> &stage, int row, int step, unsigned (&hi)[4],
                                     unsigned (&lo)[4]) {
    unsigned x[4];
    load_left(x, stage.x, row, step);
    for (int half = 0; half < 2; half++) {
        int h = step * 16 + half * 8 + threadIdx.x % 4 * 2;
        float2 center = two_at(stage.center, h), scale = two_at(stage.scale, h), offset = two_at(stage.offset, h);
        for (int i = 0; i < 2; i++)
            split<E>(x[2 * half + i], center, scale, offset, hi[2 * half + i], lo[2 * half + i]);
    }
}

// Half a chunk: two steps of 16 hidden units, split and set to multiply. The registers must be free by then.
template <typename E>
__device__ inline void multiply_half(const wgmma_stage<E> &stage, int row, int half, unsigned (&hi)[2][4],
                                     unsigned (&lo)[2][4], float (&sums)[64]) {
    uint64_t gate = wgmma_operand(stage.gate);
    for (int i = 0; i < 2; i++)
        split_operand(stage, row, 2 * half + i, hi[i], lo[i]);
    wgmma_fence();
    for (int i = 0; i < 2; i++) {
        wgmma_64x128x16<E>(sums, lo[i], gate + 2 * (2 * half + i));
        wgmma_64x128x16<E>(sums, hi[i], gate + 2 * (2 * half + i));
    }
    wgmma_commit();
}

// [consumer]
// A warpgroup's share of the sum over the hidden units, at least a chunk. While one half of a chunk is normalised and
// split, the products of the half before run, and those of the other warpgroup. (The loop has its test at the end: were
// there a way round it, the compiler would see sums that no product made and let each product wait for the one before.)
template <typename E> __device__ inline void consume(wgmma_shared<E> *s, int group, int chunks, float (&sums)[64]) {
    int row = threadIdx.x / WARP % 4 * 16, chunk = group;
    unsigned hi[2][2][4], lo[2][2][4];
    do {
        int stage = chunk % STAGES;
        barrier_wait(&s->full[stage], chunk / STAGES % 2);
        multiply_half(s->stages[stage], row, 0, hi[0], lo[0], sums);
        wgmma_wait<1>();         // the chunk before is done with
        if (chunk >= WARPGROUPS) // every lane for itself: the norm's warp writes over what each of them has read
            barrier_arrive(&s->empty[(chunk - WARPGROUPS) % STAGES]);
        multiply_half(s->stages[stage], row, 1, hi[1], lo[1], sums);
        wgmma_wait<1>(); // the first half's registers are free
        chunk += WARPGROUPS;
    } while (chunk < chunks);
    wgmma_wait<0>();
}
// [/consumer]

// The warpgroups' sums, added in shared memory: the last stores its own, the one before it adds.
__device__ inline void add_groups(int group, const float (&sums)[64], float *tile) {
    int lane = threadIdx.x % WARP, row = threadIdx.x / WARP % 4 * 16 + lane / 4;
    for (int turn = WARPGROUPS - 1; turn >= 0; turn--) {
        if (turn == group)
            for (int i = 0; i < 32; i++) {
                float2 *to = (float2 *)(tile + (row + i % 2 * 8) * TILE_PITCH + i / 2 * 8 + lane % 4 * 2);
                float2 before = turn == WARPGROUPS - 1 ? make_float2(0, 0) : *to;
                *to = make_float2(before.x + sums[2 * i], before.y + sums[2 * i + 1]);
            }
        barrier_sync(1, WARPGROUPS * GROUP_THREADS);
    }
}

// Launch: a block of 320 threads for 64 tokens by 128 keys of one side: two warpgroups that multiply, and a warp that
// feeds them, and one for the norm. Shared memory: 185 KB, six stages of 25 KB and the tile of logits. Traffic: as the
// split rung's, but all of it by the copy engine, and x̂ never leaves the registers.
template <typename E>
__global__ void __launch_bounds__(WGMMA_THREADS, 1)
    wgmma_kernel(router_job job, const __grid_constant__ CUtensorMap x_map,
                 const __grid_constant__ CUtensorMap gate_map, const E *x, const E *gate) {
#if HAS_WGMMA
    extern __shared__ __align__(1024) char shared[];
    wgmma_shared<E> *s = (wgmma_shared<E> *)shared;
    router_tile at = router_tile_of(job);
    int warp = threadIdx.x / WARP, chunks = (int)((job.d + TILE_DEPTH - 1) / TILE_DEPTH);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(&s->full[stage], job.mean ? 1 + WARP : 1);
            barrier_init(&s->empty[stage], GROUP_THREADS);
        }
        barrier_init_done();
    }
    __syncthreads();
    if (warp == PRODUCER_WARP) {
        if (threadIdx.x % WARP == 0)
            produce(s, job, &x_map, &gate_map, (int)at.token, (int)(at.side * job.n + at.key), chunks);
        return;
    }
    if (warp == NORM_WARP) {
        if (job.mean)
            make_norm(s, job, chunks);
        return;
    }
    float sums[64] = {};
    int group = threadIdx.x / GROUP_THREADS;
    if (group < chunks)
        consume(s, group, chunks, sums);
    add_groups(group, sums, s->logits);
    wait_for_kernel_before(); // long over; plain_row reads what it wrote
    finish_tile<E, true>(job, at, s->logits, warp, WARPGROUPS * GROUP_THREADS / WARP, x, gate);
#endif
}

template <typename E> static fmoe_status run(router_job job, const fmoe_router_args *args, cudaStream_t stream) {
    CUtensorMap x_map, gate_map;
    size_t shared = sizeof(wgmma_shared<E>);
    TRY(describe_matrix("x", &x_map, args->dtype, args->x, args->T, args->d, TILE_TOKENS));
    TRY(describe_matrix("router_gate.weight", &gate_map, args->dtype, args->gate, 2 * args->n, args->d, TILE_KEYS));
    TRY(cuda_call("wgmma_kernel",
                  cudaFuncSetAttribute(wgmma_kernel<E>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared)));
    return launch_overlapping("wgmma_kernel", !job.mean, wgmma_kernel<E>, router_tiles(job), WGMMA_THREADS, shared,
                              stream, job, x_map, gate_map, (const E *)args->x, (const E *)args->gate);
}

extern "C" fmoe_status cuda_router_wgmma(const void *arguments, void *workspace, size_t bytes, void *stream) {
    const fmoe_router_args *args = (const fmoe_router_args *)arguments;
    size_t used = 0;
    router_scratch s = router_carve(args, false, workspace, &used);
    TRY(router_check(args, workspace, bytes, used));
    TRY(router_check_16_bit(args));
    if (args->T == 0)
        return FMOE_OK;
    router_job job = router_job_of(args, s);
    if (args->training)
        TRY(router_set_norm(args, s, true, (cudaStream_t)stream));
    else
        job.mean = args->running_mean, job.var = args->running_var;
    if (args->dtype == FMOE_F16)
        TRY(run<__half>(job, args, (cudaStream_t)stream));
    else
        TRY(run<__nv_bfloat16>(job, args, (cudaStream_t)stream));
    return job.key_tiles > 1 ? router_log_softmax(args, (cudaStream_t)stream) : FMOE_OK;
}
