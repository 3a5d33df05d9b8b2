// The first product of Cartesian rows: for each grid row, the tokens that chose from it times all of its experts. A
// product of chapter 6's kind, but for where A comes from: the rows of x are gathered.
#ifndef FMOE_ROWS_CUH
#define FMOE_ROWS_CUH

#include "strategies.cuh"

#define ROWS_TOKENS    128 // of a tile
#define MOST_ROWS      MOST_GROUPS
#define ROWS_REGISTERS 224 // a thread that multiplies; 56 for those that gather: 168 on average

typedef struct {
    expert_task a;
    token_lists lists;
    int rows;        // of the grid: groups of lists
    int *counts;     // [rows]: tokens that chose from a row
    int32_t *tokens; // [rows, T]: which, rising
    float *many;     // for pick_many
} rows_task;

template <typename E, int COLUMNS> struct rows_shared {
    static constexpr int STAGE_BYTES = (ROWS_TOKENS + COLUMNS) * TILE_DEPTH * 2;
    static constexpr int ROOM =
        (PRODUCT_SHARED - 1536 - 2 * PICK_BYTES - 8 * (MOST_ROWS + 1) - 2 * (int)sizeof(pick_rows)) / STAGE_BYTES;
    static constexpr int STAGES = ROOM < 6 ? ROOM : 6;
    E x[STAGES][ROWS_TOKENS * TILE_DEPTH], down[STAGES][COLUMNS * TILE_DEPTH];
    float staging[2][PICK_BYTES / sizeof(float)];
    int first_tile[MOST_ROWS + 1], counts[MOST_ROWS]; // of a row of the grid
    pick_rows rows[2];
    uint64_t full[STAGES], empty[STAGES];
};

// ---- Instructions that only this product needs

// One arrival at the barrier once this thread's copies so far are there.
__device__ inline void copies_arrive(uint64_t *barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

#define WGMMA_64x160x16(types, sums, a, b)                                                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n160k16.f32." types " {"                                             \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                              \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                    \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                    \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                    \
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79}, "                   \
                 "{%80, %81, %82, %83}, %84, 1, 1, 1, 0;"                                                              \
                 : WGMMA_8(sums, 0), WGMMA_8(sums, 8), WGMMA_8(sums, 16), WGMMA_8(sums, 24), WGMMA_8(sums, 32),        \
                   WGMMA_8(sums, 40), WGMMA_8(sums, 48), WGMMA_8(sums, 56), WGMMA_8(sums, 64), WGMMA_8(sums, 72)       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// sums [64 × COLUMNS] += x · downᵀ over 16 of the depth, x in registers. 320 columns are two products of 160.
template <typename E, int COLUMNS>
__device__ inline void multiply_16(float (&sums)[COLUMNS / 2], const unsigned (&x)[4], uint64_t down) {
    if constexpr (COLUMNS == 128) {
        wgmma_64x128x16<E>(sums, x, down);
    } else {
        static_assert(COLUMNS == 320, "128 or 320");
        uint64_t second = down + (160 * TILE_DEPTH * 2 >> 4);
        float *more = sums + 80;
        if constexpr (is_bf16<E>::value) {
            WGMMA_64x160x16("bf16.bf16", sums, x, down);
            WGMMA_64x160x16("bf16.bf16", more, x, second);
        } else {
            WGMMA_64x160x16("f16.f16", sums, x, down);
            WGMMA_64x160x16("f16.f16", more, x, second);
        }
    }
}

// ---- Tiles in order: row after row of the grid, 128 tokens after 128, and the columns of a row

typedef struct {
    int row, token, column; // the first of the row's list, the first of its experts
} rows_tile;

template <int COLUMNS> __device__ inline int tiles_across(const rows_task &task) {
    return (task.lists.size + COLUMNS - 1) / COLUMNS;
}

// first_tile, by one warp.
template <int COLUMNS> __device__ inline void number_tiles(const rows_task &task, int *first_tile, int *counts) {
    int lane = threadIdx.x % WARP, across = tiles_across<COLUMNS>(task), before = 0;
    for (int first = 0; first < task.rows; first += WARP) {
        int row = first + lane, sum = 0;
        if (row < task.rows) {
            counts[row] = task.counts[row];
            sum = (counts[row] + ROWS_TOKENS - 1) / ROWS_TOKENS * across;
        }
        for (int step = 1; step < WARP; step *= 2) {
            int other = __shfl_up_sync(ALL_LANES, sum, step);
            sum += lane >= step ? other : 0;
        }
        if (row < task.rows)
            first_tile[row + 1] = before + sum;
        before += __shfl_sync(ALL_LANES, sum, WARP - 1);
    }
    if (lane == 0)
        first_tile[0] = 0;
}

template <int COLUMNS>
__device__ inline rows_tile rows_tile_of(const rows_task &task, const int *first_tile, int number) {
    int low = 0, high = task.rows, across = tiles_across<COLUMNS>(task);
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (first_tile[middle] <= number)
            low = middle;
        else
            high = middle;
    }
    int in_row = number - first_tile[low];
    return {low, in_row / across * ROWS_TOKENS, in_row % across * COLUMNS};
}

// ---- The warpgroup that brings the operands

// [gather]
// One block of the depth. Eight neighbouring threads bring the 128 bytes of a token, each thread a piece of eight
// tokens, to where the copy engine's swizzle would have put it. The experts stand together: one thread asks for them.
template <typename E, int COLUMNS, typename S>
__device__ inline void bring_tokens(const rows_task &task, S *s, int stage, const CUtensorMap *down, int depth,
                                    int expert, const int (&tokens)[8], int thread) {
    constexpr int BOX = COLUMNS == 320 ? 160 : COLUMNS;
    int row = thread / 8, piece = thread % 8;
    bool inside = depth + piece * 8 < task.a.d;
    const E *x = (const E *)task.a.x + depth + piece * 8;
    E *to = s->x[stage] + tile_at(row, piece);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        bool has = inside && tokens[i] >= 0;
        copy_async_16(to + i * 16 * TILE_DEPTH, has ? x + (int64_t)tokens[i] * task.a.d : task.a.x, has);
    }
    copies_arrive(&s->full[stage]);
    if (thread == 0) {
        barrier_arrive_expecting(&s->full[stage], COLUMNS * TILE_DEPTH * 2);
        for (int box = 0; box < COLUMNS; box += BOX)
            copy_box(s->down[stage] + box * TILE_DEPTH, down, depth, expert + box, &s->full[stage]);
    }
}
// [/gather]

template <typename E, int COLUMNS, typename S>
__device__ inline void rows_produce(const rows_task &task, S *s, const CUtensorMap *down) {
    int thread = threadIdx.x % PRODUCT_GROUP;
    product_turn turn = {0, 0};
    for (int number = blockIdx.x; number < s->first_tile[task.rows]; number += gridDim.x) {
        rows_tile tile = rows_tile_of<COLUMNS>(task, s->first_tile, number);
        int tokens[8], count = s->counts[tile.row];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int at = tile.token + thread / 8 + i * 16;
            tokens[i] = at < count ? task.tokens[(int64_t)tile.row * task.a.T + at] : -1;
        }
        for (int depth = 0; depth < task.a.d; depth += TILE_DEPTH) {
            barrier_wait(&s->empty[turn.stage], turn.parity ^ 1);
            bring_tokens<E, COLUMNS>(task, s, turn.stage, down, depth, tile.row * task.lists.size + tile.column, tokens,
                                     thread);
            turn.template next<S::STAGES>();
        }
    }
}

// ---- The warpgroups that multiply and pick

// [rows-multiply]
// The gathered rows came by ordinary copies, which the tensor cores must not read from shared memory without a fence
// that waits for everything under way: they take x from registers, filled by ordinary loads. Half a block at a time,
// while the half before is multiplied. beside: as in the masked product.
template <typename E, int COLUMNS, typename S, typename Beside>
__device__ inline void rows_multiply(S *s, product_turn &turn, int count, int group, float (&sums)[COLUMNS / 2],
                                     Beside beside) {
    int block = 0, before = 0, row = group * 64 + threadIdx.x % PRODUCT_GROUP / WARP * 16;
    unsigned x[2][2][4];
    for (int i = 0; i < COLUMNS / 2; i++)
        sums[i] = 0;
    do {
        uint64_t down = wgmma_operand(s->down[turn.stage]);
        barrier_wait(&s->full[turn.stage], turn.parity);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            load_left(x[half][0], s->x[turn.stage], row, 2 * half);
            load_left(x[half][1], s->x[turn.stage], row, 2 * half + 1);
            wgmma_fence();
            multiply_16<E, COLUMNS>(sums, x[half][0], down + 4 * half);
            multiply_16<E, COLUMNS>(sums, x[half][1], down + 4 * half + 2);
            wgmma_commit();
            wgmma_wait<1>();
            if (half == 0 && block > 0)
                product_release(&s->empty[before], 1);
        }
        if (block < PICK_STEPS)
            beside(block);
        before = turn.stage;
        turn.template next<S::STAGES>();
    } while (++block < count);
    for (; block < PICK_STEPS; block++)
        beside(block);
    wgmma_wait<0>();
    wgmma_arrived(sums);
    product_release(&s->empty[before], 1);
}
// [/rows-multiply]

// A warpgroup's part of a tile, as a lane of the first warp knows it: the row of the grid, its first column in it, and
// two tokens, or -1.
typedef struct {
    int row, column, tokens[2];
} rows_place;

template <int COLUMNS, typename S>
__device__ inline rows_place rows_place_of(const rows_task &task, const S *s, int number, int group) {
    rows_place place = {0, 0, {-1, -1}};
    if (number >= s->first_tile[task.rows])
        return place;
    rows_tile tile = rows_tile_of<COLUMNS>(task, s->first_tile, number);
    place.row = tile.row, place.column = tile.column;
    for (int i = 0; i < 2; i++) {
        int at = tile.token + group * PICK_ROWS + 2 * (threadIdx.x % WARP) + i;
        if (at < s->counts[tile.row])
            place.tokens[i] = task.tokens[(int64_t)tile.row * task.a.T + at];
    }
    return place;
}

// [rows-pick]
// Beside the products the first warp numbers this tile's pairs, all take theirs to registers, and the first warp finds
// the next tile's lists and the tokens of the one after it.
template <typename E, int COLUMNS, typename S>
__device__ inline void rows_consume(const rows_task &task, S *s, int group) {
    const expert_task &a = task.a;
    product_turn turn = {0, 0};
    int thread = threadIdx.x % PRODUCT_GROUP, barrier = 1 + group, depth = (a.d + TILE_DEPTH - 1) / TILE_DEPTH;
    pick_rows *rows = &s->rows[group];
    rows_place next = {}, after = {};
    pick_row found[2] = {};
    auto find = [&]() {
        for (int i = 0; i < 2; i++)
            found[i] = look_up(task.lists, next.tokens[i], next.row);
    };
    if (thread < WARP) {
        next = rows_place_of<COLUMNS>(task, s, blockIdx.x, group);
        after = rows_place_of<COLUMNS>(task, s, blockIdx.x + gridDim.x, group);
        find();
    }
    for (int number = blockIdx.x; number < s->first_tile[task.rows]; number += gridDim.x) {
        held_pair held[HELD];
        float sums[COLUMNS / 2];
        auto beside = [&](int step) {
            if (step == 0) {
                barrier_sync(barrier, PRODUCT_GROUP); // the tile before is done with
                if (thread < WARP) {
                    number_pairs(rows, found);
                    rows->column = next.column;
                }
                barrier_sync(barrier, PRODUCT_GROUP);
            } else if (step < 3) {
                hold_pairs(task.lists, rows, a.K, thread, (step - 1) * HELD / 2, step * HELD / 2, held);
            } else if (thread < WARP && step == 3) {
                next = after;
                find();
            } else if (thread < WARP && step == 4) {
                after = rows_place_of<COLUMNS>(task, s, number + 2 * gridDim.x, group);
            }
        };
        rows_multiply<E, COLUMNS>(s, turn, depth, group, sums, beside);
        auto take = [&](int row, chosen_pair p, float s, float activation) {
            int64_t pair = (int64_t)rows->token[row] * a.K + chosen_k(p);
            if (a.pre_activations)
                a.pre_activations[pair] = s;
            a.activations[pair] = activation;
        };
        if (all_held(rows))
            pick_held(sums, s->staging[group], thread, barrier, rows, held, rows->column, take);
        else
            pick_many(sums, many_sums(task.many, COLUMNS, group), thread, barrier, task.lists, rows, a.K, rows->column,
                      take);
    }
}
// [/rows-pick]

// Launch: persistent blocks of 384 threads, one a multiprocessor: a warpgroup that gathers and two that multiply.
// Shared memory: 205 to 210 KB: a ring of stages (three of 128 tokens × 320 experts), 32 KB of sums to pick from, and
// where the grid's rows begin among the tiles. Traffic: a tile reads a row of x a token and its experts' rows once,
// from the L2 for the most part; 8 bytes a pair in and 4 out; the sums of a tile with many pairs to the L2 and back.
template <typename E, int COLUMNS>
__global__ void __launch_bounds__(PRODUCT_THREADS, 1)
    rows_kernel(rows_task task, const __grid_constant__ CUtensorMap down) {
#if HAS_WGMMA
    extern __shared__ char memory[];
    typedef rows_shared<E, COLUMNS> S;
    S *s = (S *)(memory + (-shared_address(memory) & 1023));
    int group = product_group();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < S::STAGES; stage++) {
            barrier_init(&s->full[stage], PRODUCT_GROUP + 1);
            barrier_init(&s->empty[stage], 2);
        }
        barrier_init_done();
    }
    start_next_kernel();
    wait_for_kernel_before();
    if (threadIdx.x < WARP)
        number_tiles<COLUMNS>(task, s->first_tile, s->counts);
    __syncthreads();
    if (group == 2) {
        give_registers<56>();
        rows_produce<E, COLUMNS>(task, s, &down);
    } else {
        take_registers<ROWS_REGISTERS>();
        rows_consume<E, COLUMNS>(task, s, group);
    }
#endif
}

#endif
