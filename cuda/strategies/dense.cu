// Rung `dense`: all T · N products on tensor cores, twice; between the two, the mask.
//
//   S = x · downᵀ, tile by tile, never stored;   A [T, N] = silu(s) · g at the chosen pairs, zero elsewhere;   y = A ·
//   up
#include "../expert/phases.cuh"
#include "../product_ends.cuh"
#include "strategies.cuh"

#include "../../chapters/workspace.h"

#define MOST_ACTIVATIONS (512ll << 20) // bytes of A at once: more tokens take turns
#define MOST_SUMS        32            // parts of the second product's depth, where tokens are few
#define FEWEST_PAIRS     64            // an activation's rounding alone can be 3.9e-3: among many it averages out

typedef struct {
    expert_task a;
    token_lists lists;
    int tokens;   // a turn
    int pitch;    // of A, in elements
    void *masked; // A [tokens, pitch] dtype
    float *sums;  // [splits, tokens, d]
    float *many;  // for pick_many
} dense_task;

// ---- The first product

#define MASK_COLUMNS 256 // of a tile: the experts of a group

// What product_produce fills, and what is picked from.
template <typename E> struct mask_shared {
    static constexpr int STAGES = 4;
    E a[STAGES][2 * PRODUCT_PANEL], b[STAGES][MASK_COLUMNS / 64 * PRODUCT_PANEL];
    float staging[2][PICK_BYTES / sizeof(float)];
    pick_rows rows[2];
    uint64_t full[STAGES], empty[STAGES];
};

// A's part under 16 rows of a tile, all zeros: 16 bytes a thread for every fourth row. Not all 64 rows at once: what
// the L2 takes in a while of 32 KB from everywhere is less.
template <typename E>
__device__ inline void clear_masked(const dense_task &task, int first_row, int first_column, int thread, int rows) {
    int row = first_row + thread / 32, column = first_column + thread % 32 * 8, left = rows - row;
    uint4 *to = (uint4 *)((E *)task.masked + (int64_t)row * task.pitch + column);
    if (column >= task.pitch)
        return;
#pragma unroll
    for (int i = 0; i < 16; i += 4, to += task.pitch / 2) // 4 rows of pitch / 8 times 16 bytes
        if (i < left)
            *to = make_uint4(0, 0, 0, 0);
}

// Where a warpgroup's part of a tile lies in A, and two of its rows, as a lane of the first warp knows them.
typedef struct {
    int row, column;
    pick_row rows[2];
} mask_place;

__device__ inline mask_place mask_place_of(const dense_task &task, const product_work &work, int first_token,
                                           int number, int rank, int group) {
    int down = product_tiles_down(work), across = product_tiles_across(work, MASK_COLUMNS);
    mask_place place = {0, 0, {{-1, 0, 0}, {-1, 0, 0}}};
    if (number >= down * across)
        return place;
    product_tile tile = product_tile_of(work, number, down, across);
    place.row = (tile.row * work.cluster + rank) * PRODUCT_ROWS + group * PICK_ROWS;
    place.column = tile.column * MASK_COLUMNS;
    for (int i = 0; i < 2; i++) {
        int row = place.row + 2 * (threadIdx.x % WARP) + i;
        place.rows[i] = look_up(task.lists, row < work.rows ? first_token + row : -1, tile.column);
    }
    return place;
}

// [mask]
// S to A, tile by tile. Beside the products the first warp numbers this tile's pairs, all take theirs to registers, A
// becomes all zeros where the tile lies, and the first warp looks up the next tile.
template <typename E, typename S>
__device__ inline void mask_consume(S *s, const dense_task &task, const product_work &work, int first_token, int rank,
                                    int group) {
    const expert_task &a = task.a;
    int tiles = product_tiles_down(work) * product_tiles_across(work, MASK_COLUMNS);
    int thread = threadIdx.x % PRODUCT_GROUP, barrier = 1 + group, depth = product_depth_blocks(work);
    int cluster = blockIdx.x / work.cluster, clusters = gridDim.x / work.cluster;
    pick_rows *rows = &s->rows[group];
    product_turn turn = {0, 0};
    mask_place place;
    for (int number = cluster; number < tiles; number += clusters) {
        held_pair held[HELD];
        float sums[MASK_COLUMNS / 2];
        auto beside = [&](int step) {
            if (step == 0) {
                if (number == cluster) {
                    wait_for_kernel_before(); // the lists, which were made while the first products began
                    if (thread < WARP)
                        place = mask_place_of(task, work, first_token, number, rank, group);
                }
                barrier_sync(barrier, PRODUCT_GROUP); // the tile before is done with
                if (thread < WARP) {
                    number_pairs(rows, place.rows);
                    rows->row = place.row, rows->column = place.column;
                }
                barrier_sync(barrier, PRODUCT_GROUP);
            } else if (step < 3) {
                hold_pairs(task.lists, rows, a.K, thread, (step - 1) * HELD / 2, step * HELD / 2, held);
            } else if (step < 7) {
                clear_masked<E>(task, rows->row + (step - 3) * 16, rows->column, thread, work.rows);
            } else if (thread < WARP) {
                place = mask_place_of(task, work, first_token, number + clusters, rank, group);
            }
        };
        int last = product_blocks<E, false, false>(s, turn, depth, group, work.cluster, sums, [&](int block) {
            if (block < PICK_STEPS)
                beside(block);
        });
        for (int step = depth; step < PICK_STEPS; step++)
            beside(step);
        wgmma_wait<0>();
        wgmma_arrived(sums);
        product_release(&s->empty[last], work.cluster);
        E *masked = (E *)task.masked + (int64_t)rows->row * task.pitch + rows->column;
        auto take = [&](int row, chosen_pair p, float s, float activation) {
            if (a.pre_activations)
                a.pre_activations[(int64_t)rows->token[row] * a.K + chosen_k(p)] = s;
            if (!(p.code & REPEATED))
                masked[(int64_t)row * task.pitch + chosen_column(p)] = from_f32<E>(activation);
        };
        if (all_held(rows))
            pick_held(sums, s->staging[group], thread, barrier, rows, held, 0, take);
        else
            pick_many(sums, many_sums(task.many, MASK_COLUMNS, group), thread, barrier, task.lists, rows, a.K, 0, take);
    }
}
// [/mask]

// Launch: as product_kernel, with tiles of 128 × 256: four stages and 32 KB of sums to pick from. Traffic: as there; 8
// bytes a pair in, A out; the sums of a tile with many pairs to the L2 and back.
template <typename E>
__global__ void __launch_bounds__(PRODUCT_THREADS, 1)
    mask_kernel(dense_task task, product_work work, int first_token, const __grid_constant__ product_maps maps) {
#if HAS_WGMMA
    extern __shared__ char shared[];
    typedef mask_shared<E> S;
    static_assert(sizeof(S) + 1023 <= PRODUCT_SHARED, "too much shared memory");
    S *s = (S *)(shared + (-shared_address(shared) & 1023));
    int group = product_group(), rank = work.cluster > 1 ? (int)cluster_rank() : 0;
    product_set_up(s, work.cluster);
    start_next_kernel();
    if (group == 2) {
        give_registers<40>(); // x and down were there before the lists: nothing to wait for
        if (threadIdx.x == 2 * PRODUCT_GROUP)
            product_produce<E, MASK_COLUMNS, false, false>(s, work, maps, rank);
    } else {
        take_registers<PRODUCT_REGISTERS>();
        mask_consume<E>(s, task, work, first_token, rank, group);
    }
    cluster_sync(); // no block ends while the other still writes into it
#endif
}

// ---- The end

// A token pair by pair, should a sum not be finite: there zero times something that is not may have come in, or an
// activation may have been too large for float16.
template <typename E> using pair_by_pair = reading<E, CUT_SLICES, 32, 4, 2, 4, 5, true>;

// Launch: a block of 128 threads a token. Shared memory: 16 KB, for the tokens that are done again. Traffic: 4 bytes an
// output and part of the depth in, y out.
// [join-sums]
template <typename E> __global__ void __launch_bounds__(128) join_sums_kernel(dense_task task, int first, int splits) {
    extern __shared__ char shared[];
    const expert_task &a = task.a;
    int row = blockIdx.x, tokens = gridDim.x;
    start_next_kernel();
    wait_for_kernel_before();
    float scale = 1 / task.lists.scales[first + row];
    bool finite = true;
    for (int column = threadIdx.x * 4; column < a.d; column += 4 * blockDim.x) {
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
        for (int split = 0; split < splits; split++) {
            float4 part = __ldcs((const float4 *)(task.sums + ((int64_t)split * tokens + row) * a.d + column));
            sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        }
        E *y = (E *)a.y + (int64_t)(first + row) * a.d + column;
        *(uint2 *)y =
            make_uint2(round_pair<E>(sum.x * scale, sum.y * scale), round_pair<E>(sum.z * scale, sum.w * scale));
        finite = finite && isfinite(sum.x) && isfinite(sum.y) && isfinite(sum.z) && isfinite(sum.w);
    }
    if (__syncthreads_and(finite))
        return;
    pre_activations<pair_by_pair<E>>(a, first + row, 0, a.d, NULL);
    __syncthreads();
    output<pair_by_pair<E>>(a, first + row, 0, a.d, false, (float *)shared);
}
// [/join-sums]

// ---- Host

// A few tokens have few tiles: the depth, which is all experts, is cut into as many parts as give every multiprocessor
// some, and many tokens' parts would be much to write and read.
static int most_sums(int tokens) {
    return min(MOST_SUMS, max(8, 4096 / max(tokens, 1)));
}

static size_t dense_carve(dense_task *task, void *workspace) {
    const expert_task &a = task->a;
    size_t used = 0;
    task->a.note = carve(workspace, &used, cuda_note_workspace(a.T));
    task->a.activations = (float *)carve(workspace, &used, (size_t)a.T * a.K * sizeof(float));
    task->lists = lists_by(a.N, MASK_COLUMNS);
    lists_carve(&task->lists, a.T, a.K, true, workspace, &used);
    task->pitch = (int)ceil_div(a.N, 8) * 8;
    int64_t most = MOST_ACTIVATIONS / (2 * (int64_t)task->pitch) / 256 * 256;
    most = most < 256 ? 256 : most;
    task->tokens = (int)(ceil_div(ceil_div(a.T, ceil_div(a.T, most)), 128) * 128);
    task->tokens = a.T < task->tokens ? a.T : task->tokens;
    task->masked = carve(workspace, &used, (size_t)task->tokens * task->pitch * 2);
    task->sums = (float *)carve(workspace, &used, (size_t)most_sums(task->tokens) * task->tokens * a.d * sizeof(float));
    task->many = (float *)carve(workspace, &used, many_bytes(MASK_COLUMNS));
    return used;
}

template <typename E>
static fmoe_status mask_launch(const dense_task &task, const product_work &work, int first, const product_maps &maps,
                               cudaStream_t stream) {
    int tiles = product_tiles_down(work) * product_tiles_across(work, MASK_COLUMNS);
    int clusters = multiprocessors() / work.cluster;
    return product_start("mask_kernel", mask_kernel<E>, min(clusters, tiles), work.cluster, true, stream, task, work,
                         first, maps);
}

// [dense]
template <typename E> static fmoe_status dense_turn(const dense_task &task, int first, cudaStream_t stream) {
    const expert_task &a = task.a;
    int tokens = min(task.tokens, a.T - first);
    const E *x = (const E *)a.x + (int64_t)first * a.d;
    product_maps to_sums = {}, to_y = {};
    TRY(describe_a<false>("x", &to_sums.a[0], a.dtype, x, tokens, a.d, a.d));
    TRY((describe_b<false, 256>("down_embed.weight", &to_sums.b[0], a.dtype, a.down, a.N, a.d, a.d)));
    TRY(describe_a<false>("activations", &to_y.a[0], a.dtype, task.masked, tokens, a.N, task.pitch));
    TRY((describe_b<true, 256>("up_embed.weight", &to_y.b[0], a.dtype, a.up, a.d, a.N, a.d)));
    product_work first_work = product_plan(tokens, a.N, a.d, 256, 1);
    product_work second_work = product_plan(tokens, a.d, a.N, 256, most_sums(task.tokens));
    store_sums store = {task.sums, tokens, a.d};
    TRY(mask_launch<E>(task, first_work, first, to_sums, stream));
    TRY((product_launch<E, 256, false, true>("dense_sums", second_work, to_y, store, true, stream)));
    return launch_overlapping("join_sums_kernel", true, join_sums_kernel<E>, (unsigned)tokens, 128,
                              4 * pair_by_pair<E>::WIDTH * sizeof(float), stream, task, first, second_work.splits);
}

template <typename E> static fmoe_status dense(const dense_task &task, cudaStream_t stream) {
    TRY(sort_pairs(task.a, task.lists, true, stream));
    for (int first = 0; first < task.a.T; first += task.tokens)
        TRY(dense_turn<E>(task, first, stream));
    return FMOE_OK;
}
// [/dense]

extern "C" bool cuda_strategy_dense_fits(const void *args) {
    const fmoe_expert_args *a = (const fmoe_expert_args *)args;
    return a->dtype != FMOE_F32 && a->d % 8 == 0 && a->K <= MOST_CHOSEN && (a->T == 0 || a->T * a->K >= FEWEST_PAIRS) &&
           lists_by(a->N, MASK_COLUMNS).groups <= MOST_GROUPS;
}

extern "C" size_t cuda_strategy_dense_bytes(const void *args) {
    dense_task task = {};
    task.a = strategy_task((const fmoe_expert_args *)args, NULL);
    return task.a.T > 0 ? dense_carve(&task, NULL) : CUDA_NOTE_BYTES;
}

extern "C" fmoe_status cuda_strategy_dense_run(const fmoe_expert_args *a, float *pre_activations, void *workspace,
                                               size_t workspace_bytes, void *stream) {
    TRY(expert_check(a->T, a->d, a->N, a->K, a->dtype, a->x, a->down, a->up, a->indices, a->weights, a->y));
    if (!cuda_strategy_dense_fits(a))
        return fmoe_fail(FMOE_UNSUPPORTED,
                         "dense: wants 16-bit storage, a hidden_size that is a multiple of 8, "
                         "%d pairs, num_experts_per_tok <= %d and num_experts <= %d",
                         FEWEST_PAIRS, MOST_CHOSEN, MOST_GROUPS * MASK_COLUMNS);
    TRY(check_workspace(workspace, workspace_bytes, cuda_strategy_dense_bytes(a)));
    if (a->T == 0)
        return cuda_call("clearing the note", cudaMemsetAsync(workspace, 0, CUDA_NOTE_BYTES, (cudaStream_t)stream));
    dense_task task = {};
    task.a = strategy_task(a, pre_activations);
    dense_carve(&task, workspace);
    if (a->dtype == FMOE_F16)
        return dense<__half>(task, (cudaStream_t)stream);
    return dense<__nv_bfloat16>(task, (cudaStream_t)stream);
}

extern "C" fmoe_status cuda_strategy_dense(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    return cuda_strategy_dense_run((const fmoe_expert_args *)args, NULL, workspace, workspace_bytes, stream);
}
