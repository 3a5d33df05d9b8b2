// Two levels: sizes, launches, and the rungs that are made of them.
#include "two_levels.cuh"

static int bits_for(int64_t count) {
    int bits = 0;
    while ((int64_t)1 << bits < count)
        bits++;
    return bits;
}

// [geometry]
// Chunks of 2,048 pairs, then of 4,096, then of whatever keeps their number at 2,048. About as many buckets as make
// 2,048 pairs each, but at least 128, one a multiprocessor, if there are so many experts, and not so few that a bucket
// has more experts than a block has counters for.
static void choose_sizes(int64_t num_pairs, int64_t N, levels *l) {
    l->chunk_bits = num_pairs <= (1 << 19) ? 11 : 12;
    while (ceil_div(num_pairs, (int64_t)1 << l->chunk_bits) > MAX_CHUNKS)
        l->chunk_bits++;
    l->chunks = (int)ceil_div(num_pairs, (int64_t)1 << l->chunk_bits);
    int64_t most = num_pairs / 2048 > 128 ? num_pairs / 2048 : 128;
    most = most < 2048 ? most : 2048;
    l->low_bits = bits_for(ceil_div(N, most));
    if (l->low_bits > 10)
        l->low_bits = N >> 10 > 2048 ? 11 : 10;
    l->buckets = (int)(N >> l->low_bits) + 1;
}
// [/geometry]

// [slices]
// A slice is what a block of sort_bucket holds in registers, or more where buckets are larger on average: what all
// routings have in common need not be divided.
static void choose_slices(int64_t num_pairs, levels *l) {
    int64_t average = num_pairs / l->buckets, held = l->bucket_warps * BUCKET_ROWS * WARP;
    l->slice = (int)(average + average / 4 < held ? held : ceil_div(average + average / 4, WARP) * WARP);
    l->staged = l->slice < l->bucket_warps * 224 ? l->slice : l->bucket_warps * 224;
}
// [/slices]

size_t levels_lay_out(int64_t num_pairs, int64_t N, bool even, char *memory, levels *l) {
    choose_sizes(num_pairs, N, l);
    l->chunk_warps = l->buckets <= MANY_BUCKETS ? MANY_WARPS : FEW_WARPS;
    l->bucket_warps = 1 << l->low_bits <= MANY_EXPERTS ? MANY_WARPS : FEW_WARPS;
    choose_slices(num_pairs, l);
    l->pitch = (int)ceil_div(l->buckets, 8) * 8;
    l->even = even;
    // Each helper adds up a small table itself, a warp its rows in 16 bits; for a large one there is a kernel.
    l->planned = even && ((int64_t)l->buckets * l->chunks > 32768 ||
                          ceil_div(l->chunks, l->bucket_warps) << l->chunk_bits > UINT16_MAX);
    size_t records = round_256((size_t)num_pairs * sizeof(uint32_t));
    size_t starts = round_256((size_t)(l->buckets + 1) * (size_t)l->chunks * sizeof(int32_t));
    size_t bases = round_256((size_t)(l->buckets + 1) * sizeof(int32_t));
    size_t sizes = !even || l->planned ? 0 : round_256((size_t)l->pitch * (size_t)l->chunks * sizeof(uint16_t));
    size_t heavy = ((size_t)l->chunks << SLOT_BITS << l->low_bits) * sizeof(int32_t);
    l->records = (uint32_t *)memory;
    l->starts = (int32_t *)(memory + records);
    l->bases = (int32_t *)(memory + records + starts);
    l->sizes = (uint16_t *)(memory + records + starts + bases);
    l->heavy = (uint32_t *)(memory + records + starts + bases + sizes);
    return records + starts + bases + sizes + heavy;
}

static fmoe_status run(levels *l, bool overlap, cudaStream_t stream) {
    if (l->call.T == 0)
        return schedule_nothing(&l->call, stream);
    int helpers = l->even ? l->call.num_pairs / l->slice : 0;
    TRY(launch_early("sort_chunk", sort_chunk_for(l), l->chunks, l->chunk_warps * WARP, sort_chunk_shared(l), false, *l,
                     stream));
    if (l->planned)
        TRY(launch_early("find_bases", find_bases_kernel(), (int)ceil_div(l->buckets + 1, WARP), 8 * WARP, 0, overlap,
                         *l, stream));
    return launch_early("sort_bucket", sort_bucket_for(l), l->buckets + helpers, l->bucket_warps * WARP,
                        sort_bucket_shared(l), overlap, *l, stream);
}

extern "C" size_t cuda_schedule_levels_workspace(const void *args) {
    const fmoe_schedule_args *a = (const fmoe_schedule_args *)args;
    levels l;
    return schedule_note_bytes(a->T) + levels_lay_out(a->T * a->K, a->N, true, NULL, &l);
}

static fmoe_status run_rung(const void *args, void *workspace, size_t workspace_bytes, bool even, bool overlap,
                            void *stream) {
    levels l;
    TRY(schedule_from_args(args, workspace, workspace_bytes, 0, &l.call));
    size_t needed = levels_lay_out(l.call.num_pairs, l.call.N, true, NULL, &l);
    TRY(check_workspace(workspace, workspace_bytes, schedule_note_bytes(l.call.T) + needed));
    levels_lay_out(l.call.num_pairs, l.call.N, even, l.call.rest, &l);
    return run(&l, overlap, (cudaStream_t)stream);
}

extern "C" fmoe_status cuda_schedule_two_levels(const void *args, void *workspace, size_t workspace_bytes,
                                                void *stream) {
    return run_rung(args, workspace, workspace_bytes, false, false, stream);
}

extern "C" fmoe_status cuda_schedule_even(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    return run_rung(args, workspace, workspace_bytes, true, false, stream);
}

extern "C" fmoe_status cuda_schedule_overlap(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    return run_rung(args, workspace, workspace_bytes, true, true, stream);
}
