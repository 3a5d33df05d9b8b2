// Every token's pairs in the order of the table: a counting sort a token, in shared memory.
#include "strategies.cuh"

#include "../../chapters/workspace.h"

#define AT_ONCE     4    // pairs of a lane on their way
#define FEW_PAIRS   1024 // a token, up to which four warps sort them; else eight
#define MOST_STAGED 4096 // a token, up to which the list is put together in shared memory

void lists_carve(token_lists *lists, int64_t T, int64_t K, bool merged, void *workspace, size_t *used) {
    int64_t words = ceil_div(lists->groups, 32);
    lists->begins = (uint16_t *)carve(workspace, used, (size_t)T * (lists->groups + 1) * sizeof(uint16_t));
    lists->pairs = (chosen_pair *)carve(workspace, used, (size_t)(T * K) * sizeof(chosen_pair));
    lists->scales = NULL, lists->chosen_groups = NULL;
    if (merged)
        lists->scales = (float *)carve(workspace, used, (size_t)T * sizeof(float));
    else
        lists->chosen_groups = (uint32_t *)carve(workspace, used, (size_t)(T * words) * sizeof(uint32_t));
}

// What a block has in shared memory for its token.
typedef struct {
    int *places;           // [warps, groups]: first counts
    uint32_t *with_repeat; // a bit a group in which an expert comes twice
    uint32_t *seen;        // a bit an expert, where repeats are merged
    uint16_t *firsts;      // [warps, experts a group], where repeats are merged
    chosen_pair *sorted;   // the list, here or where it belongs
} sort_space;

// The experts and weights of a lane's next pairs: k, k + 32, ...; NO_EXPERT from end on.
__device__ inline void load_pairs(const expert_task &a, int k, int end, int (&experts)[AT_ONCE],
                                  float (&weights)[AT_ONCE]) {
    int64_t pairs = (int64_t)blockIdx.x * a.K;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
        int at = min(k + i * WARP, end - 1); // no branch, so that all loads are on their way at once
        experts[i] = a.indices[pairs + at];
        weights[i] = a.weights[pairs + at];
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
        if (k + i * WARP >= end || (unsigned)experts[i] >= (unsigned)a.N)
            experts[i] = NO_EXPERT;
}

// expert / size by a product: exact, as both together have no more than 32 bits.
__device__ inline int group_of(const token_lists &lists, int expert) {
    return lists.size == 1 ? expert : (int)__umulhi((unsigned)expert, lists.magic);
}

// Counts a warp's pairs by group; finds the first bad index, the groups with repeats, and returns the largest weight.
template <bool MERGED>
__device__ inline float count_pairs(const expert_task &a, const token_lists &lists, const sort_space &space, int begin,
                                    int end, int *counts, int *first_bad) {
    int experts[AT_ONCE];
    float weights[AT_ONCE], largest = 0;
    for (int k = begin + threadIdx.x % WARP; k < end; k += AT_ONCE * WARP) {
        load_pairs(a, k, end, experts, weights);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int expert = experts[i], group = group_of(lists, expert);
            if (expert != NO_EXPERT) {
                atomicAdd(counts + group, 1);
                largest = fmaxf(largest, fabsf(weights[i]));
                if (MERGED && atomicOr(space.seen + expert / 32, 1u << expert % 32) >> expert % 32 & 1)
                    atomicOr(space.with_repeat + group / 32, 1u << group % 32);
            } else if (k + i * WARP < end) {
                atomicMin(first_bad, k + i * WARP);
                if (a.pre_activations)
                    a.pre_activations[(int64_t)blockIdx.x * a.K + k + i * WARP] = 0;
            }
        }
    }
    return warp_max(largest);
}

// The counts become places: group after group, in each warp after warp. A thread has some groups in a row. Returns the
// number of all pairs that have an expert.
template <int WARPS> __device__ inline int counts_to_places(int groups, int *counts, int *warp_sums) {
    int each = (groups + (WARPS * WARP) - 1) / (WARPS * WARP), lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int first = min(groups, (int)threadIdx.x * each), last = min(groups, first + each), sum = 0, all = 0;
    for (int group = first; group < last; group++)
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            sum += counts[w * groups + group];
    int place = sum;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        int other = __shfl_up_sync(ALL_LANES, place, step);
        place += lane >= step ? other : 0;
    }
    if (lane == WARP - 1)
        warp_sums[warp] = place;
    __syncthreads();
    place -= sum;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        place += w < warp ? warp_sums[w] : 0;
        all += warp_sums[w];
    }
    for (int group = first; group < last; group++)
        for (int w = 0; w < WARPS; w++) {
            int count = counts[w * groups + group];
            counts[w * groups + group] = place;
            place += count;
        }
    return all;
}

// [place]
// A warp's pairs to their places, 32 at a time in rising order: lanes with the same group find one another, and each
// counts those below it.
__device__ inline void place_pairs(const expert_task &a, const token_lists &lists, int begin, int end, float scale,
                                   int *places, chosen_pair *sorted) {
    int lane = threadIdx.x % WARP, experts[AT_ONCE];
    float weights[AT_ONCE];
    for (int first = begin; first < end; first += AT_ONCE * WARP) {
        load_pairs(a, first + lane, end, experts, weights);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            bool has = experts[i] != NO_EXPERT;
            int group = has ? group_of(lists, experts[i]) : -1;
            unsigned same = __match_any_sync(ALL_LANES, group);
            int below = __popc(same & ((1u << lane) - 1)), place = has ? places[group] : 0;
            __syncwarp();
            if (has && below == 0)
                places[group] = place + __popc(same);
            __syncwarp();
            if (has)
                sorted[place + below] =
                    make_chosen(first + i * WARP + lane, experts[i] - group * lists.size, weights[i] * scale);
        }
    }
}
// [/place]

// [merge]
// The pairs of one group, by a warp, 32 at a time: lanes with the same expert find one another, and the first of them
// has the sum of their weights. firsts [experts a group]: where the expert's first pair is; none before and after.
#define NO_PAIR 0xffff
__device__ inline void merge_group(chosen_pair *pairs, int count, uint16_t *firsts) {
    int lane = threadIdx.x % WARP;
    for (int begin = 0; begin < count; begin += WARP) {
        bool has = begin + lane < count;
        chosen_pair p = has ? pairs[begin + lane] : chosen_pair{NO_COLUMN, 0};
        unsigned same = __match_any_sync(ALL_LANES, chosen_column(p));
        bool lowest = has && __ffs(same) - 1 == lane;
        unsigned left = lowest ? same & (same - 1) : 0;
        float sum = p.weight;
        while (__any_sync(ALL_LANES, left)) {
            float other = __shfl_sync(ALL_LANES, p.weight, left ? __ffs(left) - 1 : lane);
            sum += left ? other : 0;
            left &= left - 1;
        }
        int first = lowest ? firsts[chosen_column(p)] : 0;
        bool is_first = lowest && first == NO_PAIR;
        if (is_first)
            firsts[chosen_column(p)] = (uint16_t)(begin + lane);
        else if (lowest)
            pairs[first].weight += sum;
        if (has)
            pairs[begin + lane] = {is_first ? p.code : p.code | REPEATED, sum};
        __syncwarp();
    }
    for (int i = lane; i < count; i += WARP)
        firsts[chosen_column(pairs[i])] = NO_PAIR;
    __syncwarp();
}
// [/merge]

// All groups with repeats, each by one warp. ends: where each one's pairs end.
template <int WARPS>
__device__ inline void merge_repeats(const token_lists &lists, const sort_space &space, const int *ends) {
    for (int word = threadIdx.x / WARP; word < (lists.groups + 31) / 32; word += WARPS)
        for (uint32_t bits = space.with_repeat[word]; bits; bits &= bits - 1) {
            int group = word * 32 + __ffs(bits) - 1, from = group > 0 ? ends[group - 1] : 0, count = ends[group] - from;
            merge_group(space.sorted + from, count, space.firsts + threadIdx.x / WARP * lists.size);
        }
}

// The power of two that brings the largest weight to between 1 and 2.
__device__ inline float scale_for(float largest) {
    return largest > 0 ? ldexpf(1, -max(-100, min(100, ilogbf(largest)))) : 1;
}

// The groups from which the token chose, a bit each. ends: where each one's pairs end.
template <int WARPS>
__device__ inline void mark_groups(const expert_task &a, const token_lists &lists, const int *ends) {
    int lane = threadIdx.x % WARP;
    for (int first = threadIdx.x / WARP * WARP; first < lists.groups; first += WARPS * WARP) {
        int group = first + lane;
        bool any = group < lists.groups && ends[group] > (group > 0 ? ends[group - 1] : 0);
        unsigned bits = __ballot_sync(ALL_LANES, any);
        if (lane == 0)
            lists.chosen_groups[(int64_t)(first / WARP) * a.T + blockIdx.x] = bits;
    }
}

// Launch: a block of WARPS warps a token. Shared memory: 4 bytes a group and warp, 8 a pair where that is not too much,
// and a bit an expert where repeats are merged. Traffic: 8 bytes a pair in, twice, 8 out; 2 bytes a group out.
template <int WARPS, bool MERGED>
__global__ void __launch_bounds__(WARPS *WARP) sort_kernel(expert_task a, token_lists lists) {
    extern __shared__ __align__(16) int counters[];
    __shared__ int warp_sums[WARPS], first_bad;
    __shared__ float of_warp[WARPS];
    constexpr int THREADS = WARPS * WARP;
    int t = blockIdx.x, warp = threadIdx.x / WARP, groups = lists.groups, bits = (groups + 31) / 32;
    int share = (a.K + THREADS - 1) / THREADS * WARP, begin = min(a.K, warp * share), end = min(a.K, begin + share);
    int cleared = (WARPS * groups + (MERGED ? bits + (a.N + 31) / 32 : 0) + 3) / 4 * 4;
    int marks = MERGED ? WARPS * lists.size / 2 : 0; // words of firsts: a group has an even number of experts there
    chosen_pair *list = lists.pairs + (int64_t)t * a.K;
    sort_space space = {counters, (uint32_t *)counters + WARPS * groups, (uint32_t *)counters + WARPS * groups + bits,
                        (uint16_t *)(counters + cleared),
                        a.K <= MOST_STAGED ? (chosen_pair *)(counters + cleared + marks) : list};
    start_next_kernel();
    for (int i = threadIdx.x; i < cleared / 4; i += THREADS)
        ((uint4 *)counters)[i] = make_uint4(0, 0, 0, 0);
    for (int i = threadIdx.x; i < marks; i += THREADS)
        counters[cleared + i] = -1;
    if (threadIdx.x == 0)
        first_bad = a.K;
    __syncthreads();
    float largest = count_pairs<MERGED>(a, lists, space, begin, end, space.places + warp * groups, &first_bad);
    if (threadIdx.x % WARP == 0)
        of_warp[warp] = largest;
    __syncthreads();
    int all = counts_to_places<WARPS>(groups, space.places, warp_sums);
    for (int w = 0; w < WARPS; w++)
        largest = fmaxf(largest, of_warp[w]);
    float scale = MERGED ? scale_for(largest) : 1;
    __syncthreads();
    uint16_t *begins = lists.begins + (int64_t)t * (groups + 1);
    for (int group = threadIdx.x; group <= groups; group += THREADS)
        begins[group] = (uint16_t)(group < groups ? space.places[group] : all);
    __syncthreads();
    place_pairs(a, lists, begin, end, scale, space.places + warp * groups, space.sorted);
    __syncthreads();
    const int *ends = space.places + (WARPS - 1) * groups; // the last warp's places have moved there
    if (MERGED)
        merge_repeats<WARPS>(lists, space, ends);
    else
        mark_groups<WARPS>(a, lists, ends);
    __syncthreads();
    for (int i = threadIdx.x; i < all && space.sorted != list; i += THREADS)
        list[i] = space.sorted[i];
    if (threadIdx.x == 0) {
        write_note(a, t, first_bad);
        if (MERGED)
            lists.scales[t] = scale;
    }
}

template <int WARPS, bool MERGED>
static fmoe_status sort_with(const expert_task &a, const token_lists &lists, cudaStream_t stream) {
    size_t staged = a.K <= MOST_STAGED ? (size_t)a.K * sizeof(chosen_pair) : 0;
    size_t merging = MERGED ? ceil_div(lists.groups, 32) + ceil_div(a.N, 32) + WARPS * (size_t)lists.size / 2 : 0;
    size_t shared = (WARPS * (size_t)lists.groups + merging + 4) * sizeof(int) + staged;
    TRY(cuda_call("sort_kernel", cudaFuncSetAttribute(sort_kernel<WARPS, MERGED>,
                                                      cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared)));
    sort_kernel<WARPS, MERGED><<<(unsigned)a.T, WARPS * WARP, shared, stream>>>(a, lists);
    return launched("sort_kernel");
}

fmoe_status sort_pairs(const expert_task &a, const token_lists &lists, bool merged, cudaStream_t stream) {
    if (merged)
        return a.K <= FEW_PAIRS ? sort_with<4, true>(a, lists, stream) : sort_with<8, true>(a, lists, stream);
    return a.K <= FEW_PAIRS ? sort_with<4, false>(a, lists, stream) : sort_with<8, false>(a, lists, stream);
}
