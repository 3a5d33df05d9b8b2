// What the strategies share: a token's pairs in the order of the table, and how the chosen pairs are picked from a tile
// of products.
#ifndef FMOE_STRATEGIES_CUH
#define FMOE_STRATEGIES_CUH

#include "../expert/expert.cuh"
#include "../product.cuh"
#include "strategies.h"

#define MOST_GROUPS 1024 // of neighbouring experts, into which the table is divided
#define MOST_CHOSEN 65535

// A pair in its token's list. code: k, whether an earlier pair has the same expert, and the column within the group.
typedef struct {
    uint32_t code;
    float weight;
} chosen_pair;

#define REPEATED  0x8000u
#define NO_COLUMN 0x7fffu

__device__ inline chosen_pair make_chosen(int k, int column, float weight) {
    return {(uint32_t)k << 16 | (uint32_t)column, weight};
}
__device__ inline int chosen_k(chosen_pair p) {
    return p.code >> 16;
}
__device__ inline int chosen_column(chosen_pair p) {
    return p.code & NO_COLUMN;
}

// Every token's pairs, sorted by group of experts.
typedef struct {
    int size, groups;        // experts a group
    unsigned magic;          // 2^32 / size, rounded up
    uint16_t *begins;        // [T, groups + 1]: where in the token's list a group's pairs begin
    chosen_pair *pairs;      // [T, K]
    float *scales;           // [T], or NULL: see sort_pairs
    uint32_t *chosen_groups; // [groups / 32, T], or NULL: a bit for each group from which the token chose
} token_lists;

static inline token_lists lists_by(int64_t N, int64_t size) {
    token_lists lists = {};
    lists.size = (int)size;
    lists.groups = (int)ceil_div(N, size);
    lists.magic = (unsigned)ceil_div(1ll << 32, size);
    return lists;
}

// Carves the lists out of a workspace; merged: with scales, otherwise with chosen_groups.
void lists_carve(token_lists *lists, int64_t T, int64_t K, bool merged, void *workspace, size_t *used);
// Fills in the lists, writes the note, and sets pre_activations of bad indices to zero. merged: the weights of pairs of
// the same token and expert are added up, in the first of them, and each token's weights are multiplied by a power of
// two that brings the largest near 1, which is kept in scales.
fmoe_status sort_pairs(const expert_task &a, const token_lists &lists, bool merged, cudaStream_t stream);

// The task without its workspace.
static inline expert_task strategy_task(const fmoe_expert_args *a, float *pre_activations) {
    return {(int)a->T,  (int)a->d,  (int)a->N, (int)a->K,       a->dtype, a->x, a->down, a->up,
            a->indices, a->weights, a->y,      pre_activations, NULL,     NULL, NULL};
}

// This thread's warpgroup, as its warp's first lane knows it: now the compiler knows, too, that the warp agrees on it,
// and what the tensor cores' descriptors are made from stays in uniform registers, where they are wanted.
__device__ inline int product_group(void) {
    return __shfl_sync(ALL_LANES, (int)threadIdx.x / PRODUCT_GROUP, 0);
}

// ---- Picking: the chosen pairs out of a warpgroup's 64 rows of a tile of products ----

// Rows have few pairs or many (a token may have all of one grid row): the threads share out the pairs, not the rows.
// HELD pairs a thread come to registers while the tile is multiplied; if there are more, none is held, and all are read
// when the tile is done.
#define PICK_ROWS    64
#define PICK_COLUMNS 64 // that are in shared memory at a time
#define PICK_BYTES   (PICK_ROWS * PICK_COLUMNS * (int)sizeof(float))
#define PICK_STEPS   8 // that are taken beside the products, one a block of the depth, none longer than a block's product
#define HELD         8
#define ABREAST      8 // pairs that a thread reads at once if they are not held

typedef struct {
    int upto[PICK_ROWS];                   // pairs of the rows up to this one
    int from[PICK_ROWS], token[PICK_ROWS]; // pair i of all of them is token · K + from + i
    int row, column;                       // where the tile lies
} pick_rows;

// A row of a tile, as it is looked up: its token, or -1, and where in the token's list its pairs are.
typedef struct {
    int token, begin, end;
} pick_row;

typedef struct {
    chosen_pair pair;
    int at; // its sum's place among 64 × 64
} held_pair;

// What is loaded here and in pair_of is not looked at before the products are under way again: nothing waits for it.
__device__ inline pick_row look_up(const token_lists &lists, int token, int group) {
    const uint16_t *begins = lists.begins + (int64_t)max(token, 0) * (lists.groups + 1) + group;
    return {token, begins[0], begins[1]};
}

// By the first warp, two rows a lane; then all know how many pairs come before each row.
__device__ inline void number_pairs(pick_rows *rows, const pick_row (&mine)[2]) {
    int lane = threadIdx.x % WARP, first = mine[0].token < 0 ? 0 : mine[0].end - mine[0].begin;
    int both = first + (mine[1].token < 0 ? 0 : mine[1].end - mine[1].begin), before = both;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        int other = __shfl_up_sync(ALL_LANES, before, step);
        before += lane >= step ? other : 0;
    }
    before -= both;
    for (int i = 0; i < 2; i++) {
        rows->upto[2 * lane + i] = before + (i ? both : first);
        rows->from[2 * lane + i] = mine[i].begin - before - (i ? first : 0);
        rows->token[2 * lane + i] = mine[i].token;
    }
}

// 64 × 64 sums in shared memory, moved about so that the writers, who have eight rows a warp, do not meet in a bank.
__device__ inline int pick_at(int row, int column) {
    return row * PICK_COLUMNS + (column ^ (row & 3) * 8);
}

// The pair of that number; if there are not so many, some pair of these lists. No condition decides about the address:
// chapter 7 tells what a compiler made of one.
__device__ inline held_pair pair_of(const token_lists &lists, const pick_rows *rows, int K, int number) {
    int row = 0;
#pragma unroll
    for (int step = PICK_ROWS / 2; step; step /= 2)
        row += rows->upto[row + step - 1] <= number ? step : 0;
    int64_t at = (int64_t)rows->token[row] * K + rows->from[row] + min(number, rows->upto[PICK_ROWS - 1] - 1);
    return {lists.pairs[max(at, (int64_t)0)], pick_at(row, 0)};
}

// Asked by a vote, so that the compiler knows that all take the same way: otherwise it gives up the uniform registers,
// in which the products' loop has its addresses.
__device__ inline bool all_agree(bool yes) {
    return __all_sync(ALL_LANES, yes);
}

__device__ inline bool all_held(const pick_rows *rows) {
    return all_agree(rows->upto[PICK_ROWS - 1] <= HELD * PRODUCT_GROUP);
}

// A thread's pairs from first to last, if there are so many, and if all of the tile's can be held.
__device__ inline void hold_pairs(const token_lists &lists, const pick_rows *rows, int K, int thread, int first,
                                  int last, held_pair (&held)[HELD]) {
    int all = rows->upto[PICK_ROWS - 1];
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (i >= first && i < last) {
            held[i] = {{NO_COLUMN, 0}, 0};
            if (all_agree(i * PRODUCT_GROUP < all && all <= HELD * PRODUCT_GROUP))
                held[i] = pair_of(lists, rows, K, thread + i * PRODUCT_GROUP);
        }
}

__device__ inline int row_of(const held_pair &held) {
    return held.at / PICK_COLUMNS;
}

// A thread's sums of 64 columns, as the tensor cores leave them.
__device__ inline void put_sums(float *const (&at)[4], const float *sums) {
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        float *to = at[i / 4 % 4] + i / 16 * 32 + i / 2 % 2 * 8 * PICK_COLUMNS;
        *(float2 *)to = make_float2(sums[i], sums[i + 1]);
    }
}

// To a few units in the last place: the exact division has a branch, and HELD of these are to run abreast.
__device__ inline float silu_at_once(float s) {
    return __fdividef(s, 1 + expf(-s));
}

// [pick]
// 64 columns at a time go through shared memory, and whoever has a pair there takes its sum along. take(row, pair,
// s, a) comes for each pair of this thread, a = silu(s) times its weight. first_column: the tile's, within the group, a
// multiple of 64. Nobody looks at any other sum: what an unchosen expert holds, even NaN, stays behind.
template <int SUMS, typename Take>
__device__ inline void pick_held(const float (&sums)[SUMS], float *staging, int thread, int barrier,
                                 const pick_rows *rows, const held_pair (&held)[HELD], int first_column, Take take) {
    float picked[HELD] = {}, *at[4];
#pragma unroll
    for (int i = 0; i < 4; i++) // columns 8 i, and 32 further; rows also 8 further
        at[i] = staging + pick_at(thread / WARP * 16 + thread % WARP / 4, i * 8 + thread % 4 * 2);
#pragma unroll
    for (int part = 0; part < SUMS / 32; part++) {
        int first = first_column + part * PICK_COLUMNS;
        barrier_sync(barrier, PRODUCT_GROUP); // the columns before are done with
        put_sums(at, sums + part * 32);
        barrier_sync(barrier, PRODUCT_GROUP);
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            if ((chosen_column(held[i].pair) & -PICK_COLUMNS) == first)
                picked[i] = staging[held[i].at ^ chosen_column(held[i].pair) % PICK_COLUMNS];
        }
    }
    float activations[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++)
        activations[i] = silu_at_once(picked[i]) * held[i].pair.weight;
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if ((unsigned)(chosen_column(held[i].pair) - first_column) < SUMS * 2 &&
            thread + i * PRODUCT_GROUP < rows->upto[PICK_ROWS - 1])
            take(row_of(held[i]), held[i].pair, picked[i], activations[i]);
}
// [/pick]

// [pick-many]
// The same where the tile has more pairs than are held: a trained router's favourites, or many experts a token. All
// sums go to memory, [64, SUMS * 2], which the L2 holds. That frees their registers for ABREAST pairs at a time: a
// thread that walked pair by pair would wait for each one's load.
template <int SUMS, typename Take>
__device__ inline void pick_many(const float (&sums)[SUMS], float *all_sums, int thread, int barrier,
                                 const token_lists &lists, const pick_rows *rows, int K, int first_column, Take take) {
    constexpr int COLUMNS = SUMS * 2;
    float *to = all_sums + (thread / WARP * 16 + thread % WARP / 4) * COLUMNS + thread % 4 * 2;
#pragma unroll
    for (int i = 0; i < SUMS; i += 2)
        *(float2 *)(to + i / 4 * 8 + i / 2 % 2 * 8 * COLUMNS) = make_float2(sums[i], sums[i + 1]);
    barrier_sync(barrier, PRODUCT_GROUP);
    for (int number = thread, all = rows->upto[PICK_ROWS - 1]; !all_agree(number >= all);
         number += ABREAST * PRODUCT_GROUP) {
        held_pair pairs[ABREAST];
        float there[ABREAST];
        bool mine[ABREAST];
#pragma unroll
        for (int i = 0; i < ABREAST; i++)
            pairs[i] = pair_of(lists, rows, K, number + i * PRODUCT_GROUP);
#pragma unroll
        for (int i = 0; i < ABREAST; i++) {
            int column = chosen_column(pairs[i].pair) - first_column;
            mine[i] = (unsigned)column < COLUMNS && number + i * PRODUCT_GROUP < all;
            there[i] = all_sums[row_of(pairs[i]) * COLUMNS + (mine[i] ? column : 0)];
        }
#pragma unroll
        for (int i = 0; i < ABREAST; i++)
            if (mine[i])
                take(row_of(pairs[i]), pairs[i].pair, there[i], silu_at_once(there[i]) * pairs[i].pair.weight);
    }
}
// [/pick-many]

// Bytes of all blocks' sums for pick_many, and where a warpgroup's are.
static inline size_t many_bytes(int columns) {
    return (size_t)multiprocessors() * 2 * PICK_ROWS * columns * sizeof(float);
}
__device__ inline float *many_sums(float *all, int columns, int group) {
    return all + (int64_t)(blockIdx.x * 2 + group) * PICK_ROWS * columns;
}

#endif
