// Both products of the MLP in one kernel: the tiles of h = swiglu(x · gateᵀ, x · upᵀ), and then those of h · downᵀ. No
// multiprocessor waits until all of h is there, and the last tiles are cut so that all end together.
//
// ITEMS. The work is a list: the tiles of h in raster order; the tiles of the output that are whole; of each of its
// last `split` tiles the longer part of the depth; and of each of them the last `tail` blocks. A cluster claims the
// next item when it is nearly done with one, by adding to a counter. So whoever has an item knows that clusters which
// are running have claimed all items before it. Tiles of h wait for nobody and the others for tiles of h only: it
// cannot lock up, however few of the clusters are there at once.
//
// ORDER IN MEMORY. The copy engine of one multiprocessor stores a tile of h, and others' read it while the kernel runs.
// The thread that stored waits until its boxes are written (store_box_wait), passes from the copy engine's accesses to
// ordinary ones (copies_and_others) and adds to the counter of these rows and columns with release. The thread that
// wants to read waits for the sum with acquire, passes to the copy engine's accesses, and copies. Each step orders what
// is before it with what is after it in PTX's memory model: wait_group makes the copies' writes visible to the thread,
// the proxy fences join the two ways to memory, release and acquire join the threads. The counters are cleared by a
// kernel of their own. This one waits for it to end, which makes the zeros visible, before it touches a counter.
//
// BITS. The two parts of a tile meet in whoever is last, and a + b is b + a. Which tiles are cut, and where, depends on
// the sizes and on the number of multiprocessors alone.
#ifndef FMOE_MLP_BOTH_CUH
#define FMOE_MLP_BOTH_CUH

#include "../product.cuh"

#define BOTH_CLAIMS  8 // that a cluster remembers: more than stages, so that each is read before another takes its place
#define BOTH_GROUP   8 // tiles of h beside each other that share a counter
#define BOTH_STAGING (2 * PRODUCT_PANEL * 2)
#define BOTH_PART    (2 * PRODUCT_ROWS * 256) // sums of a cluster's tile
#define BOTH_MEETING 6 // to leave a part in memory, or to add one, takes as long as so many blocks of the depth

// [swiglu]
// silu(p) · q of two pairs. The special function unit, 8 clocks an instruction, is what the epilogue waits for, so two
// values share one reciprocal: 1/a = b · 1/(ab). The bound keeps ab finite and is not reached by any p whose silu a
// 16-bit sum could see. All of it is off by 2e-7 or so: no digit of a 16-bit type.
__device__ inline void swiglu_two(const float *p, const float *q, float *h) {
    float a = 1 + fast_exp2(fminf(p[0] * -1.44269504f, 60)), b = 1 + fast_exp2(fminf(p[1] * -1.44269504f, 60));
    float r = fast_reciprocal(a * b);
    h[0] = p[0] * q[0] * (b * r);
    h[1] = p[1] * q[1] * (a * r);
}

// A thread's first sums are gate's, and the others up's in the same places: no value has to move. h is rounded once,
// which the second product's operand must be anyway.
template <typename E> struct store_swiglu {
    static constexpr int STAGING = 2 * PRODUCT_PANEL * 2;
    CUtensorMap h; // in boxes of 64 rows

    template <int SUMS> __device__ void operator()(const product_place &at, float (&sums)[SUMS], char *staging) const {
        float parts[SUMS / 64][32];
#pragma unroll
        for (int i = 0; i < SUMS / 2; i += 2)
            swiglu_two(sums + i, sums + SUMS / 2 + i, parts[i / 32] + i % 32);
        store_panels(at, &h, at.column, parts, (E *)staging);
    }
};
// [/swiglu]

// A product's tiles, down and across, those of a cluster's rows together, and blocks of its depth.
typedef struct {
    product_work work;
    int down, across, tiles, blocks;
} both_product;

typedef struct {
    both_product hidden, output;
    int groups;      // of columns of h
    int split, tail; // so many of the output's tiles are cut, so many blocks of the depth before their end
    int *counters;   // cleared: the claims; then [split, blocks, warpgroups]; then [hidden.down, groups]
    float *parts;    // [split, blocks, warpgroups, 32, PRODUCT_GROUP] of four
} both_job;

typedef struct {
    product_maps hidden, output;
} both_maps;

typedef struct {
    bool hidden;
    product_tile tile;
    int first, blocks; // of the depth; no blocks: there is nothing more to do
    int part;          // number among the tiles that are cut; -1: not cut
} both_item;

template <typename E> struct both_shared : product_shared<E, 256, BOTH_STAGING> {
    both_item items[BOTH_CLAIMS];
    int claims[BOTH_CLAIMS];
    uint64_t claimed[BOTH_CLAIMS];
    int order[2];
};

// [items]
__device__ inline both_item both_item_of(const both_job &job, int number) {
    const both_product &hidden = job.hidden, &output = job.output;
    if (number < hidden.tiles)
        return {true, product_tile_of(hidden.work, number, hidden.down, hidden.across), 0, hidden.blocks, -1};
    number -= hidden.tiles;
    if (number >= output.tiles + job.split)
        return {};
    bool tail = number >= output.tiles;
    number -= tail ? job.split : 0;
    product_tile tile = product_tile_of(output.work, number, output.down, output.across);
    int part = number - (output.tiles - job.split), longer = output.blocks - job.tail;
    if (part < 0)
        return {false, tile, 0, output.blocks, -1};
    return {false, tile, tail ? longer : 0, tail ? job.tail : longer, part};
}
// [/items]

// ---- Claims: block 0 of a cluster asks, and tells both ----

template <typename S> __device__ inline void both_claim(S *s, const both_job &job, int turn) {
    int number = atomicAdd(job.counters, 1);
    for (int rank = 0; rank < 2; rank++)
        store_in_completing(&s->claims[turn % BOTH_CLAIMS], number, &s->claimed[turn % BOTH_CLAIMS], rank);
}

template <typename S> __device__ inline int both_claimed(S *s, int turn) {
    barrier_wait(&s->claimed[turn % BOTH_CLAIMS], turn / BOTH_CLAIMS % 2);
    return s->claims[turn % BOTH_CLAIMS];
}

// ---- The warp that brings the operands ----

__device__ inline int both_counter_of(const both_job &job, int row, int group) {
    return 1 + 4 * job.split + row * job.groups + group;
}

// [wait-for-hidden]
// Until the columns of h at block `block` of the output's depth are stored, in a cluster's rows: by two warpgroups of
// both blocks each.
__device__ inline void both_wait_for_hidden(const both_job &job, int row, int block) {
    int group = block / (2 * BOTH_GROUP), tiles = min(job.hidden.across - group * BOTH_GROUP, BOTH_GROUP);
    wait_acquire(job.counters + both_counter_of(job, row, group), 4 * tiles);
    copies_and_others();
}
// [/wait-for-hidden]

// [both-produce]
template <typename E, typename S>
__device__ inline void both_produce(S *s, const both_job &job, const both_maps &maps, int rank) {
    product_turn turn = {0, 0};
    if (rank == 0)
        both_claim(s, job, 0);
    for (int k = 0;; k++) {
        both_item item = both_item_of(job, both_claimed(s, k));
        product_source<2> from = product_source_of<256, 2>(item.hidden ? job.hidden.work : job.output.work,
                                                           item.hidden ? maps.hidden : maps.output, item.tile, rank, 0);
        barrier_arrive_expecting(&s->claimed[k % BOTH_CLAIMS], sizeof(int)); // the next claim in this place
        s->items[k % BOTH_CLAIMS] = item;
        int ask = max(item.blocks - S::STAGES, 0);
        for (int i = 0; i < item.blocks; i++) {
            int block = item.first + i;
            if (rank == 0 && i == ask)
                both_claim(s, job, k + 1);
            barrier_wait(&s->empty[turn.stage], turn.parity ^ 1);
            if (!item.hidden && (i == 0 || block % (2 * BOTH_GROUP) == 0))
                both_wait_for_hidden(job, item.tile.row, block);
            bring_stage<E, 256, false, false>(from, block * TILE_DEPTH, rank, s->a[turn.stage], s->b[turn.stage],
                                              &s->full[turn.stage]);
            turn.template next<S::STAGES>();
        }
        if (item.blocks == 0) { // the consumers find that in items
            barrier_wait(&s->empty[turn.stage], turn.parity ^ 1);
            barrier_arrive(&s->full[turn.stage]);
            return;
        }
    }
}
// [/both-produce]

// ---- The warpgroups that multiply ----

// [announce]
// By the thread that stored this warpgroup's rows of a tile of h.
__device__ inline void both_announce(const both_job &job, int counter) {
    store_box_wait();
    copies_and_others();
    add_release(job.counters + counter, 1);
}
// [/announce]

// [meet]
// A part of a tile. Who is first leaves its sums in memory; who is last adds them to its own and goes on: true. It
// waits at most for stores that are under way.
template <int SUMS>
__device__ inline bool both_meet(const both_job &job, int part, int rank, const product_place &at, int *order,
                                 float (&sums)[SUMS]) {
    int place = (part * 2 + rank) * 2 + at.barrier - 1, *met = job.counters + 1 + place;
    float4 *parts = (float4 *)job.parts + place * (SUMS / 4) * PRODUCT_GROUP + at.thread;
    if (at.thread == 0)
        *order = atomicAdd(met, 1);
    barrier_sync(at.barrier, PRODUCT_GROUP);
    if (*order == 0) {
#pragma unroll
        for (int i = 0; i < SUMS / 4; i++)
            parts[i * PRODUCT_GROUP] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
        barrier_sync(at.barrier, PRODUCT_GROUP);
        if (at.thread == 0)
            add_release(met, 2);
        return false;
    }
    if (at.thread == 0)
        wait_acquire(met, 4); // both have come, and the first has stored
    barrier_sync(at.barrier, PRODUCT_GROUP);
#pragma unroll
    for (int i = 0; i < SUMS / 4; i++) {
        float4 other = __ldcg(parts + i * PRODUCT_GROUP);
        sums[4 * i] += other.x, sums[4 * i + 1] += other.y, sums[4 * i + 2] += other.z, sums[4 * i + 3] += other.w;
    }
    return true;
}
// [/meet]

// [both-consume]
// A tile of h is announced some blocks into the next item, when its boxes have long been written; at once if the next
// item reads h itself, for it could be this tile that its operands wait for.
template <typename E, typename S, typename Output>
__device__ inline void both_consume(S *s, const both_job &job, const store_swiglu<E> &hidden, const Output &output,
                                    int rank, int group) {
    int thread = threadIdx.x % PRODUCT_GROUP, stored = 0; // the counter of a tile that is not announced yet
    product_turn turn = {0, 0};
    for (int k = 0;; k++) {
        if (stored && both_claimed(s, k) >= job.hidden.tiles)
            both_announce(job, stored), stored = 0;
        barrier_wait(&s->full[turn.stage], turn.parity);
        const both_item &item = s->items[k % BOTH_CLAIMS];
        if (item.blocks == 0)
            break;
        int when = stored ? min(item.blocks, S::STAGES) - 1 : -1;
        float sums[128];
        int last = product_blocks<E, false, false>(s, turn, item.blocks, group, 2, sums, [&](int block) {
            if (block == when)
                both_announce(job, stored);
        });
        product_place at = {(item.tile.row * 2 + rank) * PRODUCT_ROWS + group * 64,
                            item.tile.column * (item.hidden ? 128 : 256), 0, thread, 1 + group};
        stored = thread == 0 && item.hidden ? both_counter_of(job, item.tile.row, item.tile.column / BOTH_GROUP) : 0;
        wgmma_wait<0>();
        wgmma_arrived(sums);
        product_release(&s->empty[last], 2);
        if (item.hidden)
            hidden(at, sums, s->staging[group]);
        else if (item.part < 0 || both_meet(job, item.part, rank, at, &s->order[group], sums))
            output(at, sums, s->staging[group]);
    }
    store_box_wait();
}
// [/both-consume]

// Launch: persistent clusters of two blocks of 384 threads, a block a multiprocessor: one warp that feeds and two
// warpgroups that multiply. Shared memory: 227 KB, four stages of 48 KB and 32 KB of staging. Traffic: a cluster reads
// 64 KB and does 256 × 256 × 64 products a step; a tile that is cut costs 256 KB written and read again.
template <typename E, typename Output>
__global__ void __launch_bounds__(PRODUCT_THREADS, 1)
    both_kernel(const __grid_constant__ both_job job, const __grid_constant__ both_maps maps,
                const __grid_constant__ store_swiglu<E> hidden, const __grid_constant__ Output output) {
#if HAS_WGMMA
    extern __shared__ char shared[];
    typedef both_shared<E> S;
    static_assert(sizeof(S) + 1023 <= PRODUCT_SHARED && S::STAGES < BOTH_CLAIMS, "the ring and the rest fit");
    S *s = (S *)(shared + (-shared_address(shared) & 1023));
    int group = threadIdx.x / PRODUCT_GROUP, rank = (int)cluster_rank();
    if (threadIdx.x == 0) {
        for (int i = 0; i < BOTH_CLAIMS; i++) {
            barrier_init(&s->claimed[i], 1);
            barrier_arrive_expecting(&s->claimed[i], sizeof(int));
        }
        expect_map(&maps.hidden.a[0]), expect_map(&maps.hidden.b[0]), expect_map(&maps.hidden.b[1]);
    }
    product_set_up(s, 2);
    wait_for_kernel_before();
    if (group == 2) {
        give_registers<40>();
        if (threadIdx.x == 2 * PRODUCT_GROUP)
            both_produce<E>(s, job, maps, rank);
    } else {
        take_registers<PRODUCT_REGISTERS>();
        both_consume<E>(s, job, hidden, output, rank, group);
    }
    cluster_sync(); // no block ends while the other still writes into it
#endif
}

// Launch: a thread a counter, 256 a block. Shared memory: none. Traffic: 4 bytes a thread.
static __global__ void clear_counters_kernel(int count, int *counters) {
    int at = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    start_next_kernel();
    if (at < count)
        counters[at] = 0;
}

// ---- Host ----

static inline both_product both_product_of(const product_work &work) {
    int down = product_tiles_down(work), across = product_tiles_across(work, 256);
    return {work, down, across, down * across, product_depth_blocks(work)};
}

static inline int both_counters(const both_job &job) {
    return 1 + 4 * job.split + job.hidden.down * job.groups;
}

// Nothing cut: both_share cuts.
static inline both_job both_job_of(const product_work &hidden, const product_work &output) {
    both_job job = {both_product_of(hidden), both_product_of(output), 0, 0, 0, NULL, NULL};
    job.groups = (int)ceil_div(job.hidden.across, BOTH_GROUP);
    return job;
}

// [share]
// Clusters that have no tile of h in its last round are `ahead` of the others, by a tile's depth and its end, which
// takes as long as two blocks. They begin the output. Its tiles fill rounds of all clusters, and `last` are left for
// the last one: so many as are early stay whole if others have to begin late, and the rest is cut. Then a round takes
// as long as the longer part. Whoever is done before does tails. This finds the longest tail for which there is time.
static inline void both_share(both_job *job, int clusters) {
    int depth = job->output.blocks, ahead = job->hidden.blocks + 2, late = job->hidden.tiles % clusters;
    int early = clusters - late, last = (job->output.tiles - 1) % clusters + 1;
    int split = last > early ? last - early : last, most = last > early ? min(depth / 2, ahead) : depth / 2;
    for (int tail = most; tail > BOTH_MEETING; tail--) {
        int each = tail + BOTH_MEETING, longer = depth - tail + BOTH_MEETING, tails;
        if (last > early) // the early ones have a whole tile first, and of the late ones some have none
            tails = early * ((ahead + longer - depth) / each) + (clusters - last) * (longer / each);
        else
            tails = (early - last) * (longer / each) + late * (max(longer - ahead, 0) / each);
        if (tails >= split) {
            job->split = split, job->tail = tail;
            return;
        }
    }
}
// [/share]

template <typename E, typename Output>
static inline fmoe_status both_launch(const both_job &job, const both_maps &maps, const store_swiglu<E> &hidden,
                                      const Output &output, int clusters, cudaStream_t stream) {
    void (*kernel)(both_job, both_maps, store_swiglu<E>, Output) = both_kernel<E, Output>;
    int count = both_counters(job), items = job.hidden.tiles + job.output.tiles + job.split;
    TRY(launch_overlapping("clear_counters_kernel", false, clear_counters_kernel, (unsigned)ceil_div(count, 256), 256,
                           0, stream, count, job.counters));
    return product_start("both_kernel", kernel, min(clusters, items), 2, true, stream, job, maps, hidden, output);
}

#endif
