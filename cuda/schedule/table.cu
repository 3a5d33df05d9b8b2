// Rung `table`: every chunk sorted by expert, a table of what each chunk has for each expert, and then blocks that fill
// parts of the result of at most 2,560 places, whatever the routing.
//
//     pairs     │   chunk 0   │   chunk 1   │ ..  │   as the router left them
//     records   │ e0 e0 e2 .. │ e0 e1 e1 .. │ ..  │   sort_by_expert: each chunk, in its own place
//     counts    │ 2  0  1  .. │ 1  2  0  .. │ ..  │   and how many it has for each expert
//     bases     │ bucket 0 │ bucket 1 │ ...       │   sum_starts: where each bucket begins in the result
//     pairs     │  slice 0  │  slice 1  │ ...     │   fill_slices: a bucket's places, or a part of them
#include "table.cuh"

// [turns]
// One warp lets all rows of 32 pairs add to the counters, in their order: a warp's accesses to shared memory happen in
// its program's order, so that no row waits for the row before. turns: each pair's counter, two in a word; then what
// was in that word. It tells the pair's rank among those with its expert.
template <int ROWS> __device__ inline void take_turns(unsigned *counts, unsigned *turns) {
#pragma unroll 1
    for (int row = 0; row < ROWS; row += TURNS) {
        unsigned turn[TURNS];
#pragma unroll
        for (int j = 0; j < TURNS; j++)
            turn[j] = turns[(row + j) * WARP + threadIdx.x];
#pragma unroll
        for (int j = 0; j < TURNS; j++)
            turn[j] = atomicAdd(counts + turn[j] / 2, 1u << turn[j] % 2 * 16);
#pragma unroll
        for (int j = 0; j < TURNS; j++)
            turns[(row + j) * WARP + threadIdx.x] = turn[j];
    }
}
// [/turns]

// [begin-experts]
// Counts leave for the table and become beginnings within their bucket of 128 experts, half a warp a bucket, a lane
// eight experts. Two numbers of 16 bits share a word: times 0x10001 adds the lower one to the upper one.
__device__ inline void begin_experts(const table &a, unsigned *counts, int *sizes) {
    int lane = threadIdx.x % 16, half = threadIdx.x / 16;
    uint4 *out = (uint4 *)(a.counts + (int64_t)blockIdx.x * a.pitch);
#pragma unroll 2
    for (int bucket = half; bucket < a.pitch / BUCKET; bucket += 2 * TABLE_WARPS) {
        uint4 *mine = (uint4 *)counts + eight_of(bucket, lane), eight = *mine, sum;
        out[bucket * 16 + lane] = eight;
        sum.x = eight.x * BOTH;
        sum.y = (eight.y + (sum.x >> 16)) * BOTH;
        sum.z = (eight.z + (sum.y >> 16)) * BOTH;
        sum.w = (eight.w + (sum.z >> 16)) * BOTH;
        unsigned all = sum.w >> 16, inclusive = all;
#pragma unroll
        for (int step = 1; step < 16; step *= 2) {
            unsigned other = __shfl_up_sync(ALL_LANES, inclusive, step, 16);
            inclusive += lane >= step ? other : 0;
        }
        unsigned begin = (inclusive - all) * BOTH;
        *mine = {begin + sum.x - eight.x, begin + sum.y - eight.y, begin + sum.z - eight.z, begin + sum.w - eight.w};
        if (lane == 15)
            sizes[bucket] = (int)inclusive;
    }
    __syncthreads();
}
// [/begin-experts]

// Sizes become beginnings within the chunk, by one warp, a lane eight buckets; the table of starts gets them too.
__device__ inline void begin_buckets(const table &a, int count, int *sizes) {
    int t = threadIdx.x;
    for (int first = 0, base = 0; t < WARP && first < a.buckets; first += EIGHT * WARP) {
        int size[EIGHT], all = 0, inclusive;
#pragma unroll
        for (int k = 0; k < EIGHT; k++)
            all += size[k] = first + t * EIGHT + k < a.buckets ? sizes[first + t * EIGHT + k] : 0;
        inclusive = all;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            int other = __shfl_up_sync(ALL_LANES, inclusive, step);
            inclusive += t >= step ? other : 0;
        }
#pragma unroll
        for (int k = 0, begin = base + inclusive - all; k < EIGHT; begin += size[k++])
            sizes[first + t * EIGHT + k] = begin;
        base += __shfl_sync(ALL_LANES, inclusive, WARP - 1);
    }
    __syncthreads();
    if (t <= a.buckets)
        a.starts[t * MOST_CHUNKS + blockIdx.x] = (uint16_t)(t < a.buckets ? sizes[t] : count);
}

// [put-right]
// Pairs of one row with one expert added to its counter at once, in an order that nobody promises. Here they lie side
// by side; a rank of 0 begins another expert's list.
__device__ inline bool is_out_of_order(const uint32_t *sorted, int i, int count) {
    return i + 1 < count && rank_of(sorted[i + 1]) > 0 && pair_of(sorted[i + 1]) < pair_of(sorted[i]);
}

__device__ inline int steps_to_its_place(const uint32_t *sorted, int i, int count) {
    int row = pair_of(sorted[i]) / WARP, pair = pair_of(sorted[i]), steps = 0;
    for (int k = i; rank_of(sorted[k]) > 0 && pair_of(sorted[k - 1]) / WARP == row; k--)
        steps -= pair_of(sorted[k - 1]) > pair;
    for (int k = i + 1; k < count && rank_of(sorted[k]) > 0 && pair_of(sorted[k]) / WARP == row; k++)
        steps += pair_of(sorted[k]) < pair;
    return steps;
}
// [/put-right]

// [sort-by-expert]
// A block of 16 warps a chunk of 16 · ROWS · 32 pairs. Shared memory: 2 bytes an expert, 4 a pair, 4 a bucket; 42 KB
// with 16,384 experts. Reads the indices, writes 4 bytes a pair and 2 an expert.
template <int ROWS> __global__ void __launch_bounds__(TABLE_WARPS *WARP) sort_by_expert(table a) {
    extern __shared__ __align__(16) unsigned shared[];
    unsigned *counts = shared;                             // [pitch], two in a word; one more word for nobody's
    unsigned *turns = counts + a.pitch / 2 + 4;            // [pairs]
    uint32_t *sorted = turns;                              // later
    int *sizes = (int *)turns + TABLE_WARPS * ROWS * WARP; // [buckets], up to the next 256
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, first = warp * ROWS * WARP + lane;
    int begin = blockIdx.x * a.chunk, count = min(a.chunk, a.call.num_pairs - begin), expert[ROWS], rank[ROWS];
#pragma unroll
    for (int j = 0; j < ROWS; j++)
        expert[j] = a.call.indices[begin + min(first + j * WARP, count - 1)];
#pragma unroll 4
    for (int i = threadIdx.x; i < a.pitch / 8; i += TABLE_WARPS * WARP)
        ((uint4 *)counts)[i] = {};
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        expert[j] = (int)min((unsigned)expert[j], (unsigned)a.call.N);
        turns[first + j * WARP] = (unsigned)(first + j * WARP < count ? slot_of(expert[j]) : a.pitch);
    }
    __syncthreads();
    if (warp == 0)
        take_turns<TABLE_WARPS * ROWS>(counts, turns);
    __syncthreads();
    let_next_start();
#pragma unroll
    for (int j = 0; j < ROWS; j++)
        rank[j] = (int)(turns[first + j * WARP] >> slot_of(expert[j]) % 2 * 16 & 0xffff);
    begin_experts(a, counts, sizes);
    begin_buckets(a, count, sizes);
#pragma unroll
    for (int j = 0; j < ROWS; j++)
        if (first + j * WARP < count) {
            int place = sizes[expert[j] / BUCKET] + ((uint16_t *)counts)[slot_of(expert[j])] + rank[j];
            sorted[place] = make_record(expert[j] % BUCKET, rank[j], first + j * WARP);
        }
    __syncthreads();
    bool wrong = false;
#pragma unroll
    for (int j = 0; j < ROWS; j++)
        wrong |= is_out_of_order(sorted, j * TABLE_WARPS * WARP + threadIdx.x, count);
    wrong = __syncthreads_or(wrong);
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        int i = j * TABLE_WARPS * WARP + threadIdx.x;
        if (i < count) {
            int steps = wrong ? steps_to_its_place(sorted, i, count) : 0;
            a.records[begin + i + steps] = sorted[i] + (uint32_t)(steps * (1 << RANK_SHIFT));
        }
    }
}
// [/sort-by-expert]

// [sum-starts]
// A warp a bucket, 8 a block; no shared memory. Reads the bucket's starts, writes their sum: where the bucket begins in
// the result. The next kernel may start as soon as the chunks are sorted: most of its blocks need no more than that.
__global__ void sum_starts(table a) {
    int lane = threadIdx.x % WARP, bucket = blockIdx.x * 8 + threadIdx.x / WARP, sum = 0;
    wait_for_previous();
    let_next_start();
    if (bucket > a.buckets)
        return;
    const uint16_t *starts = a.starts + bucket * MOST_CHUNKS;
#pragma unroll
    for (int chunk = lane; chunk < MOST_CHUNKS; chunk += WARP)
        sum += chunk < a.chunks ? starts[chunk] : 0;
    sum = (int)sum_lanes((unsigned)sum);
    if (lane == 0)
        a.bases[bucket] = sum;
}
// [/sum-starts]

typedef struct {
    int bucket, slice; // bucket -1: nothing to do
} share;

// [share]
// Block b takes the first slice of bucket b. The blocks behind the last bucket count off the slices that are left over:
// one warp does, a lane eight buckets.
__device__ inline share share_of_block(const table &a) {
    __shared__ share found;
    int helper = (int)blockIdx.x - a.buckets, t = threadIdx.x;
    if (helper < 0)
        return {(int)blockIdx.x, 0};
    wait_for_previous(); // for the bases
    if (t == 0)
        found = {-1, 0};
    __syncwarp();
    for (int first = 0; t < WARP && first < a.buckets; first += EIGHT * WARP) {
        int base[EIGHT + 1], left_over[EIGHT], all = 0, inclusive, bucket = first + t * EIGHT;
#pragma unroll
        for (int k = 0; k <= EIGHT; k++)
            base[k] = a.bases[min(bucket + k, a.buckets)];
#pragma unroll
        for (int k = 0; k < EIGHT; k++)
            all += left_over[k] = max(base[k + 1] - base[k] - 1, 0) / SLICE;
        inclusive = all;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            int other = __shfl_up_sync(ALL_LANES, inclusive, step);
            inclusive += t >= step ? other : 0;
        }
        int earlier = inclusive - all;
#pragma unroll
        for (int k = 0; k < EIGHT; earlier += left_over[k++])
            if (earlier <= helper && helper < earlier + left_over[k])
                found = {bucket + k, helper - earlier + 1};
        helper -= __shfl_sync(ALL_LANES, inclusive, WARP - 1);
    }
    __syncthreads();
    return found;
}
// [/share]

// [columns]
// The bucket's part of the table: a warp has up to 8 chunks, a lane 4 experts. What sort_by_expert left is read past
// the first-level cache: sum_starts has seen that kernel end, this one need not have.
__device__ inline void load_columns(const table &a, int bucket, uint2 (&held)[CHUNKS_A_WARP]) {
    int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * CHUNKS_A_WARP;
    unsigned fours = (unsigned)a.pitch / 4;
    const uint2 *rows = (const uint2 *)a.counts + ((unsigned)first * fours + (unsigned)(bucket * (BUCKET / 4) + lane));
#pragma unroll
    for (int r = 0; r < CHUNKS_A_WARP; r++)
        held[r] = first + r < a.chunks ? __ldcg(rows + r * fours) : uint2{};
}

__device__ inline int4 plus(int4 a, uint2 four) {
    return {a.x + (int)(four.x & 0xffff), a.y + (int)(four.x >> 16), a.z + (int)(four.y & 0xffff),
            a.w + (int)(four.y >> 16)};
}
// [/columns]

// [cut-segments]
// Of a bucket that several blocks share, a block fills the places from low to high. A chunk's records are sorted as the
// result is, so that those with such places are one stretch of its segment. Where an end of the stretch lies: behind
// the records of smaller experts than the one that has the place, and behind those of its own that have smaller places.
__device__ inline unsigned up_to_lane(int digit, int lane, int half) {
    int there = digit - 4 * lane - 2 * half;
    return there > 1 ? ~0u : there > 0 ? 0xffff : 0;
}

__device__ inline void cut_segments(const table &a, const int *places, const uint2 (&held)[CHUNKS_A_WARP], int2 digit,
                                    int low, int high, int start, int *segment, int *from) {
    __shared__ uint2 ends[MOST_CHUNKS];
    __shared__ __align__(16) int scans[2 * MOST_CHUNKS / WARP];
    int t = threadIdx.x, lane = t % WARP, skipped = 0, length = 0;
    uint2 mask_low = {up_to_lane(digit.x, lane, 0), up_to_lane(digit.x, lane, 1)};
    uint2 mask_high = {up_to_lane(digit.y, lane, 0), up_to_lane(digit.y, lane, 1)};
#pragma unroll
    for (int r = 0; r < CHUNKS_A_WARP; r++) { // two numbers of 16 bits in a word, none of them above 4,096
        unsigned lower = sum_lanes((held[r].x & mask_low.x) + (held[r].y & mask_low.y));
        unsigned upper = sum_lanes((held[r].x & mask_high.x) + (held[r].y & mask_high.y));
        if (lane == 0)
            ends[t / WARP * CHUNKS_A_WARP + r] = {lower, upper};
    }
    __syncthreads();
    if (t < MOST_CHUNKS) {
        const int *mine = places + t * PLACES_PITCH, *next = mine + PLACES_PITCH;
        uint2 end = ends[t];
        skipped =
            (int)((end.x & 0xffff) + (end.x >> 16)) + min(max(low - mine[digit.x], 0), next[digit.x] - mine[digit.x]);
        length = (int)((end.y & 0xffff) + (end.y >> 16)) +
                 min(max(high - mine[digit.y], 0), next[digit.y] - mine[digit.y]) - skipped;
    }
    int total, earlier = scan_block<MOST_CHUNKS / WARP>(length, MOST_CHUNKS / WARP, 0, scans, &total);
    if (t < MOST_CHUNKS) {
        segment[t] = earlier;
        from[t] = t * a.chunk + start + skipped - earlier;
    }
    __syncthreads();
}
// [/cut-segments]

// [fill-slices]
// A block of 16 warps a slice: as many as there are buckets, and T·K / 2,560. Shared memory: 79 KB. Reads the bucket's
// counts, 32 KB, and 4 bytes a record, writes 4 bytes a pair and the offsets.
__global__ void __launch_bounds__(TABLE_WARPS *WARP, 2) fill_slices(table a) {
    extern __shared__ __align__(16) unsigned shared[];
    __shared__ __align__(16) unsigned long long scans[2 * BUCKET / WARP];
    __shared__ int segment[MOST_CHUNKS], from[MOST_CHUNKS], good;
    __shared__ int2 cut; // the experts that have the first place of the slice and the last one
    int *places = (int *)shared, *sums = places + (MOST_CHUNKS + 1) * PLACES_PITCH, *staged = sums; // later
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, t = threadIdx.x;
    share mine = share_of_block(a);
    if (mine.bucket < 0)
        return;
    uint2 held[CHUNKS_A_WARP];
    load_columns(a, mine.bucket, held);
    int start = 0, length = 0;
    if (t < a.chunks) {
        start = __ldcg(a.starts + mine.bucket * MOST_CHUNKS + t);
        length = __ldcg(a.starts + (mine.bucket + 1) * MOST_CHUNKS + t) - start;
    }

    // Down the columns: what a warp's chunks have (eight of them fit 16 bits), what the warps before it have. Then
    // three sums over the block in one number: of starts, where the bucket begins; of lengths; of what smaller experts
    // have.
    uint2 sum = {};
#pragma unroll
    for (int r = 0; r < CHUNKS_A_WARP; r++)
        sum = {sum.x + held[r].x, sum.y + held[r].y};
    ((int4 *)sums)[t] = plus(int4{}, sum);
    __syncthreads();
    int before[TABLE_WARPS], of_expert = 0, expert = mine.bucket * BUCKET + t;
    if (t < BUCKET)
#pragma unroll
        for (int w = 0; w < TABLE_WARPS; w++) {
            before[w] = of_expert;
            of_expert += sums[w * BUCKET + t];
        }
    unsigned long long three = (unsigned long long)start << 42 | (unsigned long long)length << 21 | (unsigned)of_expert;
    unsigned long long total;
    three = scan_block<BUCKET / WARP>(three, BUCKET / WARP, 0, scans, &total);
    int base = (int)(total >> 42), size = (int)total & 0x1fffff, place = (int)three & 0x1fffff;
    int low = mine.slice * SLICE, high = min(low + SLICE, size), count = high - low;
    if (t < BUCKET) {
        if (place <= low && low < place + of_expert)
            cut.x = t;
        if (place < high && high <= place + of_expert)
            cut.y = t;
#pragma unroll
        for (int w = 0; w < TABLE_WARPS; w++)
            sums[w * BUCKET + t] = place + before[w];
        if (mine.slice == 0 && expert <= a.call.N)
            a.call.offsets[expert] = base + place;
        if (expert == a.call.N)
            good = base + place;
        segment[t] = (int)(three >> 21) & 0x1fffff;
        from[t] = t * a.chunk + start - segment[t];
    }
    __syncthreads();

    int4 next = ((int4 *)sums)[t];
#pragma unroll
    for (int r = 0; r < CHUNKS_A_WARP; r++) {
        ((int4 *)places)[(warp * CHUNKS_A_WARP + r) * (PLACES_PITCH / 4) + lane] = next;
        next = plus(next, held[r]);
    }
    if (warp == TABLE_WARPS - 1)
        ((int4 *)places)[MOST_CHUNKS * (PLACES_PITCH / 4) + lane] = next;
    if (size > SLICE)
        cut_segments(a, places, held, cut, low, high, start, segment, from);
    int i[SLICE_ROWS], chunk[SLICE_ROWS];
    uint32_t record[SLICE_ROWS];
#pragma unroll
    for (int j = 0; j < SLICE_ROWS; j++)
        i[j] = max(min(j * TABLE_WARPS * WARP + t, count - 1), 0);
    find_chunks(segment, MOST_CHUNKS, i, chunk);
#pragma unroll
    for (int j = 0; j < SLICE_ROWS; j++)
        record[j] = count > 0 ? __ldcg(a.records + from[chunk[j]] + i[j]) : 0;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < SLICE_ROWS; j++) {
        int digit = digit_of(record[j]), to = places[chunk[j] * PLACES_PITCH + digit] + rank_of(record[j]) - low;
        if (j * TABLE_WARPS * WARP + t < count)
            staged[to] = mine.bucket * BUCKET + digit == a.call.N ? -1 : chunk[j] * a.chunk + pair_of(record[j]);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < SLICE_ROWS; j++)
        if (j * TABLE_WARPS * WARP + t < count)
            a.call.pairs[base + low + j * TABLE_WARPS * WARP + t] = staged[j * TABLE_WARPS * WARP + t];
    if (mine.bucket == a.buckets - 1 && mine.slice == 0)
        note_bad_indices(a.call, good);
    wait_for_previous(); // this kernel must not end before the one before it
}
// [/fill-slices]

// ---- Host

// The counts of a chunk have to fit shared memory, and the table has to stay small beside the pairs.
extern "C" bool cuda_schedule_table_fits(const void *args) {
    const fmoe_schedule_args *a = (const fmoe_schedule_args *)args;
    int64_t num_pairs = a->T * a->K;
    return num_pairs <= MOST_CHUNKS * 4096 && a->N <= 40000 &&
           ceil_div(num_pairs, 2048) * 2 * (a->N + BUCKET) <= 40 * num_pairs;
}

static size_t table_lay_out(int64_t num_pairs, int64_t N, char *memory, table *t) {
    t->chunk = num_pairs <= MOST_CHUNKS * 2048 ? 2048 : 4096;
    t->chunks = (int)ceil_div(num_pairs, t->chunk);
    t->buckets = (int)(N / BUCKET) + 1;
    t->pitch = (t->buckets + t->buckets % 2) * BUCKET;
    size_t records = round_256((size_t)num_pairs * sizeof(uint32_t));
    size_t starts = round_256((size_t)(t->buckets + 1) * MOST_CHUNKS * sizeof(uint16_t));
    size_t bases = round_256((size_t)(t->buckets + 1) * sizeof(int32_t));
    t->records = (uint32_t *)memory;
    t->starts = (uint16_t *)(memory + records);
    t->bases = (int32_t *)(memory + records + starts);
    t->counts = (uint16_t *)(memory + records + starts + bases);
    return records + starts + bases + (size_t)t->chunks * (size_t)t->pitch * sizeof(uint16_t);
}

static fmoe_status table_run(const table *t, cudaStream_t stream) {
    int rows = t->chunk / (TABLE_WARPS * WARP);
    size_t sort = (size_t)t->pitch * sizeof(uint16_t) + 16 + (size_t)t->chunk * sizeof(unsigned) +
                  (size_t)ceil_div(t->buckets, EIGHT * WARP) * EIGHT * WARP * sizeof(int);
    size_t fill = ((MOST_CHUNKS + 1) * PLACES_PITCH + SLICE) * sizeof(int);
    TRY(launch_early("sort_by_expert", rows == 4 ? sort_by_expert<4> : sort_by_expert<8>, t->chunks, TABLE_WARPS * WARP,
                     sort, false, *t, stream));
    TRY(launch_early("sum_starts", sum_starts, (int)ceil_div(t->buckets + 1, 8), 8 * WARP, 0, true, *t, stream));
    return launch_early("fill_slices", fill_slices, t->buckets + t->call.num_pairs / SLICE, TABLE_WARPS * WARP, fill,
                        true, *t, stream);
}

extern "C" size_t cuda_schedule_table_workspace(const void *args) {
    const fmoe_schedule_args *a = (const fmoe_schedule_args *)args;
    table t;
    return schedule_note_bytes(a->T) + (cuda_schedule_table_fits(a) ? table_lay_out(a->T * a->K, a->N, NULL, &t) : 0);
}

extern "C" fmoe_status cuda_schedule_table(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    table t;
    TRY(schedule_from_args(args, workspace, workspace_bytes, 0, &t.call));
    if (!cuda_schedule_table_fits(args))
        return fmoe_fail(FMOE_UNSUPPORTED, "the table of %d pairs and %d experts would be too large", t.call.num_pairs,
                         t.call.N);
    size_t needed = table_lay_out(t.call.num_pairs, t.call.N, t.call.rest, &t);
    TRY(check_workspace(workspace, workspace_bytes, schedule_note_bytes(t.call.T) + needed));
    if (t.call.T == 0)
        return schedule_nothing(&t.call, (cudaStream_t)stream);
    return table_run(&t, (cudaStream_t)stream);
}
