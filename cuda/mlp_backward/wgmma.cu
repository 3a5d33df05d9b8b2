// Rung `wgmma`: the six products by warpgroups, fed by the copy engine, which takes operands either way round.
#include "../product.cuh"
#include "mlp_backward.cuh"

// ---- dh, and through the middle

#define COLUMNS    256 // of a tile
#define MOST_PARTS 16  // of the depth of dx

// Two neighbours as they are stored, times two numbers, rounded.
template <typename E> __device__ inline unsigned times(unsigned pair, float a, float b) {
    if constexpr (is_bf16<E>::value)
        return round_pair<E>(__uint_as_float(pair << 16) * a, __uint_as_float(pair & 0xffff0000u) * b);
    float2 both = __half22float2(*(const __half2 *)&pair);
    return round_pair<E>(both.x * a, both.y * b);
}

// As store_panel of product.cuh, of sums that were rounded in pairs before: half the registers where several
// results of each sum wait for their turn.
template <typename E>
__device__ inline void store_pairs(const product_place &at, const CUtensorMap *to, int column,
                                   const unsigned (&pairs)[16], E *panel) {
    int lane = threadIdx.x % WARP, row = at.thread / WARP * 16 + lane % 16;
    if (at.thread == 0)
        store_box_wait_read<1>();
    barrier_sync(at.barrier, PRODUCT_GROUP);
#pragma unroll
    for (int step = 0; step < 4; step++) {
        unsigned parts[4] = {pairs[step * 4], pairs[step * 4 + 1], pairs[step * 4 + 2], pairs[step * 4 + 3]};
        store_matrices(panel + tile_at(row, 2 * step + lane / 16), parts);
    }
    shared_stores_done();
    barrier_sync(at.barrier, PRODUCT_GROUP);
    if (at.thread == 0) {
        store_box(to, column, at.row, panel);
        store_box_commit();
    }
}

// [hidden-epilogue]
// dh never leaves the registers: it goes on as dp and dq. What it is multiplied by comes as the operands do, by the
// copy engine, in panels of 64 columns, one ahead, and the results go back to where it was and out from there. The
// first panel of the next tile comes while that tile is multiplied.
template <typename E> struct hidden_gradients {
    typedef struct {
        E by_p[2][PRODUCT_PANEL], by_q[2][PRODUCT_PANEL];
        uint64_t full[2];
        int number; // of the tile
    } panels;
    static constexpr int STAGING = 4 * PRODUCT_PANEL * 2 + 1024;
    CUtensorMap by_p, by_q, dp, dq; // in boxes of 64 rows
    product_work work;

    // Where this warpgroup's rows of tile `number` lie.
    __device__ product_place place_of(const product_place &now, int number, int columns) const {
        int down = product_tiles_down(work), across = product_tiles_across(work, columns), group = now.barrier - 1;
        product_tile tile = product_tile_of(work, number, down, across);
        int rank = now.row / PRODUCT_ROWS % work.cluster;
        product_place at = now;
        at.row = (tile.row * work.cluster + rank) * PRODUCT_ROWS + group * 64;
        at.column = number < down * across ? tile.column * columns : INT_MAX;
        return at;
    }

    // Both panels at (at.row, at.column + 64 · panel), if there is such a tile.
    __device__ void bring(panels *s, const product_place &at, int panel) const {
        if (at.column == INT_MAX)
            return;
        barrier_arrive_expecting(&s->full[panel % 2], 2 * PRODUCT_PANEL * (int)sizeof(E));
        copy_box(s->by_p[panel % 2], &by_p, at.column + panel * 64, at.row, &s->full[panel % 2]);
        copy_box(s->by_q[panel % 2], &by_q, at.column + panel * 64, at.row, &s->full[panel % 2]);
    }

    // One thread, before a block's first tile.
    __device__ void begin(panels *s, const product_place &at, int columns) const {
        int first = blockIdx.x / work.cluster;
        product_place place = place_of(at, first, columns);
        if (place.row != at.row || place.column != at.column)
            return;
        barrier_init(&s->full[0], 1);
        barrier_init(&s->full[1], 1);
        barrier_init_done();
        s->number = first;
        bring(s, at, 0);
    }

    // The other panels are free once their results of the turn before have been read.
    __device__ void bring_next(panels *s, const product_place &at, int panel, int columns) const {
        store_box_wait_read<0>();
        if (panel + 1 < columns / 64) {
            bring(s, at, panel + 1);
        } else {
            s->number += gridDim.x / work.cluster;
            bring(s, place_of(at, s->number, columns), 0);
        }
    }

    template <int SUMS> __device__ void operator()(const product_place &at, float (&sums)[SUMS], char *staging) const {
        panels *s = (panels *)staging;
        int lane = threadIdx.x % WARP, row = at.thread / WARP * 16 + lane % 16;
        if (at.thread == 0)
            begin(s, at, 2 * SUMS);
        barrier_sync(at.barrier, PRODUCT_GROUP);
        // [panels]
#pragma unroll
        for (int panel = 0; panel < SUMS / 32; panel++) {
            if (at.thread == 0)
                bring_next(s, at, panel, 2 * SUMS);
            barrier_wait(&s->full[panel % 2], panel / 2 % 2);
#pragma unroll
            for (int step = 0; step < 4; step++) {
                E *p = s->by_p[panel % 2] + tile_at(row, 2 * step + lane / 16);
                E *q = s->by_q[panel % 2] + tile_at(row, 2 * step + lane / 16);
                const float *dh = sums + panel * 32 + step * 8;
                unsigned of_p[4], of_q[4];
                load_matrices(of_p, p);
                load_matrices(of_q, q);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    of_p[i] = times<E>(of_p[i], dh[2 * i], dh[2 * i + 1]);
                    of_q[i] = times<E>(of_q[i], dh[2 * i], dh[2 * i + 1]);
                }
                store_matrices(p, of_p);
                store_matrices(q, of_q);
            }
            shared_stores_done();
            barrier_sync(at.barrier, PRODUCT_GROUP);
            if (at.thread == 0) {
                store_box(&dp, at.column + panel * 64, at.row, s->by_p[panel % 2]);
                store_box(&dq, at.column + panel * 64, at.row, s->by_q[panel % 2]);
                store_box_commit();
            }
        }
        // [/panels]
    }
};
// [/hidden-epilogue]

// What the forward pass may have kept, made again: a thread's first sums are p's, and the others q's in the same
// places.
template <typename E> struct store_hidden {
    static constexpr int STAGING = 2 * PRODUCT_PANEL * 2;
    CUtensorMap h, by_p, by_q; // in boxes of 64 rows

    template <int SUMS> __device__ void operator()(const product_place &at, float (&sums)[SUMS], char *staging) const {
#pragma unroll
        for (int panel = 0; panel < SUMS / 64; panel++) {
            unsigned to_h[16], to_p[16], to_q[16];
#pragma unroll
            for (int i = 0; i < 16; i++) {
                const float *p = sums + panel * 32 + 2 * i, *q = p + SUMS / 2;
                hidden_unit a = hidden_of(p[0], q[0]), b = hidden_of(p[1], q[1]);
                to_h[i] = round_pair<E>(a.h, b.h);
                to_p[i] = round_pair<E>(a.by_p, b.by_p);
                to_q[i] = round_pair<E>(a.by_q, b.by_q);
            }
            E *panels[2] = {(E *)staging + panel % 2 * PRODUCT_PANEL, (E *)staging + (panel + 1) % 2 * PRODUCT_PANEL};
            store_pairs<E>(at, &h, at.column + panel * 64, to_h, panels[0]);
            store_pairs<E>(at, &by_p, at.column + panel * 64, to_p, panels[1]);
            store_pairs<E>(at, &by_q, at.column + panel * 64, to_q, panels[0]);
        }
    }
};

// ---- A gradient

// Overwritten or added to, in the storage type or in float32; or each part of the depth to a matrix of its own.
template <typename E> struct store_gradient {
    static constexpr int STAGING = 2 * PRODUCT_PANEL * 2;
    store_rounded<E> rounded; // with the gradient itself as addend if it is added to
    float *wide;              // NULL: rounded
    bool add;

    template <int SUMS> __device__ void operator()(const product_place &at, float (&sums)[SUMS], char *staging) const {
        if (!wide) {
            rounded(at, sums, staging);
            return;
        }
#pragma unroll
        for (int i = 0; i < SUMS; i += 2) {
            int r = at.row + sum_row(at, i), c = at.column + sum_column(at, i);
            if (r >= rounded.rows || c >= rounded.columns)
                continue;
            int64_t row = (int64_t)at.split * rounded.rows + r;
            float2 *to = (float2 *)(wide + row * rounded.columns + c);
            float2 before = add ? *to : make_float2(0, 0);
            *to = make_float2(before.x + sums[i], before.y + sums[i + 1]);
        }
    }
};

template <typename E>
static fmoe_status describe_gradient(const mlp_backward_task &t, const char *name, void *gradient, bool wide, bool add,
                                     const product_work &work, store_gradient<E> *to) {
    *to = {};
    to->rounded.rows = work.rows, to->rounded.columns = work.columns;
    to->add = add;
    if (wide) {
        to->wide = (float *)gradient;
        return FMOE_OK;
    }
    to->rounded.add = {add ? gradient : NULL, false};
    return describe_matrix(name, &to->rounded.to, t.dtype, gradient, work.rows, work.columns, 64);
}

// ---- The products

// A kernel that may not have all multiprocessors does not start under the end of the one before either: its blocks
// would sit down on those that are left to others.
static product_work work_of(const mlp_backward_task &t, int64_t rows, int64_t columns, int64_t depth, int max_splits) {
    product_work work = product_plan(rows, columns, depth, COLUMNS, max_splits);
    work.blocks = t.blocks;
    return work;
}

template <typename E> static fmoe_status make_hidden(const mlp_backward_task &t, cudaStream_t stream) {
    product_work work = work_of(t, t.T, t.I, t.d, 1);
    product_maps maps = {};
    store_hidden<E> epilogue = {};
    work.paired = true;
    TRY(describe_a<false>("x", &maps.a[0], t.dtype, t.x, t.T, t.d, t.d));
    TRY((describe_b<false, COLUMNS>("gate_proj.weight", &maps.b[0], t.dtype, t.gate, t.I, t.d, t.d)));
    TRY((describe_b<false, COLUMNS>("up_proj.weight", &maps.b[1], t.dtype, t.up, t.I, t.d, t.d)));
    TRY(describe_matrix("h", &epilogue.h, t.dtype, t.h, t.T, t.I, 64));
    TRY(describe_matrix("h_by_p", &epilogue.by_p, t.dtype, t.h_by_p, t.T, t.I, 64));
    TRY(describe_matrix("h_by_q", &epilogue.by_q, t.dtype, t.h_by_q, t.T, t.I, 64));
    return product_launch<E, COLUMNS, false, false>("the hidden units", work, maps, epilogue, false, stream);
}

// [dh]
template <typename E> static fmoe_status hidden(const mlp_backward_task &t, cudaStream_t stream) {
    product_work work = work_of(t, t.T, t.I, t.d, 1);
    product_maps maps = {};
    hidden_gradients<E> epilogue = {};
    epilogue.work = work;
    TRY(describe_matrix("h_by_p", &epilogue.by_p, t.dtype, t.h_by_p, t.T, t.I, 64));
    TRY(describe_matrix("h_by_q", &epilogue.by_q, t.dtype, t.h_by_q, t.T, t.I, 64));
    TRY(describe_a<false>("dy", &maps.a[0], t.dtype, t.dy, t.T, t.d, t.d));
    TRY((describe_b<true, COLUMNS>("down_proj.weight", &maps.b[0], t.dtype, t.down, t.I, t.d, t.I)));
    TRY(describe_matrix("dp", &epilogue.dp, t.dtype, t.dp, t.T, t.I, 64));
    TRY(describe_matrix("dq", &epilogue.dq, t.dtype, t.dq, t.T, t.I, 64));
    return product_launch<E, COLUMNS, false, true>("dh", work, maps, epilogue, t.made && !t.blocks, stream);
}
// [/dh]

// [weight]
// aᵀ · b over the tokens, which run down the rows of both.
template <typename E>
static fmoe_status weight(const mlp_backward_task &t, const char *name, int64_t rows, int64_t columns, const void *a,
                          const void *b, void *gradient, cudaStream_t stream) {
    product_work work = work_of(t, rows, columns, t.T, 1);
    product_maps maps = {};
    store_gradient<E> epilogue;
    if (!gradient)
        return FMOE_OK;
    TRY(describe_a<true>(name, &maps.a[0], t.dtype, a, rows, t.T, rows));
    TRY((describe_b<true, COLUMNS>(name, &maps.b[0], t.dtype, b, columns, t.T, columns)));
    TRY(describe_gradient(t, name, gradient, t.wide, t.accumulate, work, &epilogue));
    return product_launch<E, COLUMNS, true, true>(name, work, maps, epilogue, !t.blocks, stream);
}
// [/weight]

// [dx]
// dp · gate + dq · up: one product that is twice as deep. What a block of the depth has beyond I is read as zeros.
// Where the tiles of dx are too few for the GPU, several blocks share one, each a part of the depth.
static int second_from(const mlp_backward_task &t) {
    return (int)(ceil_div(t.I, TILE_DEPTH) * TILE_DEPTH);
}

static product_work tokens_work(const mlp_backward_task &t) {
    product_work work = work_of(t, t.T, t.d, second_from(t) + t.I, MOST_PARTS);
    work.second_from = second_from(t);
    return work;
}

template <typename E> static fmoe_status tokens(const mlp_backward_task &t, cudaStream_t stream) {
    product_work work = tokens_work(t);
    product_maps maps = {};
    if (!t.dx)
        return FMOE_OK;
    TRY(describe_a<false>("dp", &maps.a[0], t.dtype, t.dp, t.T, t.I, t.I));
    TRY(describe_a<false>("dq", &maps.a[1], t.dtype, t.dq, t.T, t.I, t.I));
    TRY((describe_b<true, COLUMNS>("gate_proj.weight", &maps.b[0], t.dtype, t.gate, t.d, t.I, t.d)));
    TRY((describe_b<true, COLUMNS>("up_proj.weight", &maps.b[1], t.dtype, t.up, t.d, t.I, t.d)));
    store_gradient<E> epilogue;
    if (work.splits == 1) {
        TRY(describe_gradient(t, "dx", t.dx, t.wide_dx, false, work, &epilogue));
        return product_launch<E, COLUMNS, false, true>("dx", work, maps, epilogue, !t.blocks, stream);
    }
    epilogue = {};
    epilogue.rounded.rows = work.rows, epilogue.rounded.columns = work.columns;
    epilogue.wide = t.parts;
    TRY((product_launch<E, COLUMNS, false, true>("the parts of dx", work, maps, epilogue, !t.blocks, stream)));
    if (t.wide_dx)
        return add_parts(t.parts, work.splits, t.T * t.d, {}, (float *)t.dx, !t.blocks, stream);
    return add_parts(t.parts, work.splits, t.T * t.d, {}, (E *)t.dx, !t.blocks, stream);
}
// [/dx]

int mlp_backward_parts(const mlp_backward_task &t) {
    int splits = t.T > 0 ? tokens_work(t).splits : 1;
    return splits > 1 ? splits : 0;
}

template <typename E> static fmoe_status run(const mlp_backward_task &t, cudaStream_t stream) {
    if (t.made)
        TRY(make_hidden<E>(t, stream));
    TRY(hidden<E>(t, stream));
    TRY(weight<E>(t, "ddown", t.d, t.I, t.dy, t.h, t.ddown, stream));
    TRY(weight<E>(t, "dgate", t.I, t.d, t.dp, t.x, t.dgate, stream));
    TRY(weight<E>(t, "dup", t.I, t.d, t.dq, t.x, t.dup, stream));
    return tokens<E>(t, stream);
}

// ---- The way there, for a layer that comes back

template <typename E> static fmoe_status forward_keeping(const mlp_backward_task &t, float *y, cudaStream_t stream) {
    product_work work = work_of(t, t.T, t.d, t.I, 1);
    product_maps maps = {};
    store_sums epilogue = {y, work.rows, work.columns};
    TRY(make_hidden<E>(t, stream));
    TRY(describe_a<false>("h", &maps.a[0], t.dtype, t.h, t.T, t.I, t.I));
    TRY((describe_b<false, COLUMNS>("down_proj.weight", &maps.b[0], t.dtype, t.down, t.d, t.I, t.I)));
    return product_launch<E, COLUMNS, false, false>("y", work, maps, epilogue, !t.blocks, stream);
}

fmoe_status mlp_forward_keeping(const mlp_backward_task &t, float *y, cudaStream_t stream) {
    return t.dtype == FMOE_F16 ? forward_keeping<__half>(t, y, stream) : forward_keeping<__nv_bfloat16>(t, y, stream);
}

// ---- The rung

fmoe_status mlp_backward_wgmma(mlp_backward_task *t, void *workspace, size_t bytes, cudaStream_t stream) {
    t->middle = t->dtype;
    TRY(check_workspace(workspace, bytes, mlp_backward_lay_out(t, mlp_backward_parts(*t), workspace)));
    if (t->T == 0)
        return mlp_backward_no_tokens(*t, stream);
    return t->dtype == FMOE_F16 ? run<__half>(*t, stream) : run<__nv_bfloat16>(*t, stream);
}

extern "C" fmoe_status cuda_mlp_backward_wgmma(const void *args, void *workspace, size_t bytes, void *stream) {
    mlp_backward_task t;
    TRY(mlp_backward_from_args(args, &t));
    if (!cuda_mlp_backward_16_bit(args))
        return fmoe_fail(FMOE_UNSUPPORTED,
                         "dtype = %s, hidden_size = %lld, intermediate_size = %lld: the rows are not "
                         "16-bit numbers in multiples of 8",
                         fmoe_dtype_name(t.dtype), (long long)t.d, (long long)t.I);
    return mlp_backward_wgmma(&t, workspace, bytes, (cudaStream_t)stream);
}
