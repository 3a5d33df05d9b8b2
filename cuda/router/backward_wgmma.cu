// The two products of the router's backward pass on tensor cores, by Hopper's product (cuda/product.cuh).
//
// Tensor cores multiply numbers of 8 bits (bfloat16), and gradients in float32 should be right to 1e-5. So a factor
// that has more bits is written as a sum of two bfloat16, of which the second is what the first lost:
//
//   dgate = (dz₁ + dz₂)ᵀ · (x̂₁ + x̂₂)        dx̂ = (dz₁ + dz₂) · gate
//
// What both lose together is 2⁻¹⁸ of a number, on average. bfloat16 has the exponents of float32, so no gradient is too
// small to be split; a float16 gate is split too, exactly. Sums of products cost no kernel: the depth of a product, or
// its rows, are as many times longer.
#include "../product.cuh"
#include "backward.cuh"
#include "split.cuh"

typedef __nv_bfloat16 bf16_part; // one of the two

// ---- Splitting

#define SPLIT_THREADS 256
#define SPLIT_ROWS    32 // of x or of the gate, by 32 packs of eight columns
#define DZ_ROWS       16 // tokens at a time, by DZ_KEYS keys, two of a thread
#define DZ_KEYS       32

// [split-in-two]
__device__ inline void split_two(float a, float b, unsigned &hi, unsigned &lo) {
    __nv_bfloat162 high = __floats2bfloat162_rn(a, b);
    float2 rounded = to_f32_pair(high);
    __nv_bfloat162 low = __floats2bfloat162_rn(a - rounded.x, b - rounded.y);
    hi = *(unsigned *)&high;
    lo = *(unsigned *)&low;
}
// [/split-in-two]

// Keys j and j + 1 of a token; beyond 2n are zeros.
__device__ inline float2 two_keys(const router_backward_job &job, int64_t t, int64_t j) {
    float at[2];
    for (int i = 0; i < 2; i++, j++) {
        int64_t side = j >= job.n;
        at[i] = j < 2 * job.n ? job.dlogits[(side * job.T + t) * job.n + j - side * job.n] : 0;
    }
    return make_float2(at[0], at[1]);
}

// The tokens of a slice, DZ_KEYS keys: split, and added up for the means.
__device__ inline void split_dz(const router_backward_job &job, int64_t slice, int64_t key) {
    __shared__ float2 sums[DZ_ROWS][DZ_KEYS / 2];
    int row = threadIdx.x / (DZ_KEYS / 2), column = threadIdx.x % (DZ_KEYS / 2);
    int64_t begin = slice * job.T / job.slices, end = (slice + 1) * job.T / job.slices, j = key + 2 * column;
    float2 sum = make_float2(0, 0);
#pragma unroll 8
    for (int64_t t = begin + row; t < end; t += DZ_ROWS) {
        float2 dz = two_keys(job, t, j);
        unsigned hi, lo;
        split_two(dz.x, dz.y, hi, lo);
        sum.x += dz.x, sum.y += dz.y;
        if (j < job.keys) {
            *(unsigned *)(job.halves.dz + 2 * t * job.keys + j) = hi;
            *(unsigned *)(job.halves.dz + (2 * t + 1) * job.keys + j) = lo;
        }
    }
    sums[row][column] = sum;
    __syncthreads();
    if (threadIdx.x >= DZ_KEYS || key + threadIdx.x >= 2 * job.n)
        return;
    float total = 0;
    for (int r = 0; r < DZ_ROWS; r++)
        total += threadIdx.x % 2 ? sums[r][threadIdx.x / 2].y : sums[r][threadIdx.x / 2].x;
    job.dz_sums[slice * 2 * job.n + key + threadIdx.x] = total;
}

// Eight neighbours of a row.
template <typename E, bool NORM>
__device__ inline void split_pack(const uint4 &raw, const pack16<float> (&norm)[3][2], uint4 &hi, uint4 &lo) {
    pack16<E> in = unpack<E>(raw);
    unsigned high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float v[2];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            int c = 2 * i + k;
            v[k] = to_f32(in.at[c]);
            if (NORM)
                v[k] = normalised(v[k], norm[0][c / 4].at[c % 4], norm[1][c / 4].at[c % 4], norm[2][c / 4].at[c % 4]);
        }
        split_two(v[0], v[1], high[i], low[i]);
    }
    hi = make_uint4(high[0], high[1], high[2], high[3]);
    lo = make_uint4(low[0], low[1], low[2], low[3]);
}

// SPLIT_ROWS rows by 256 columns of x, normalised, or of the gate, as it is. Rows from `given` on are zeros.
template <typename E, bool NORM>
__device__ inline void split_rows(const router_backward_job &job, int64_t given, int64_t rows, int64_t block,
                                  const E *from, bf16_part *to_hi, bf16_part *to_lo) {
    constexpr int at_once = SPLIT_ROWS * WARP / SPLIT_THREADS;
    int64_t across = (job.d + 8 * WARP - 1) / (8 * WARP), column = (block % across * WARP + threadIdx.x % WARP) * 8;
    int64_t first = block / across * SPLIT_ROWS + threadIdx.x / WARP;
    if (column >= job.d)
        return;
    uint4 in[at_once];
#pragma unroll
    for (int i = 0; i < at_once; i++) {
        int64_t row = first + i * (SPLIT_THREADS / WARP);
        in[i] = load_pack<E, true>(from + row * job.d, column, row < given ? job.d : 0);
    }
    pack16<float> norm[3][2] = {};
    if (NORM) {
        wait_for_kernel_before();
        const float *of[] = {job.norm.center, job.norm.scale, job.norm.offset};
        for (int i = 0; i < 6; i++)
            norm[i / 2][i % 2] = *(const pack16<float> *)(of[i / 2] + column + i % 2 * 4);
    }
#pragma unroll
    for (int i = 0; i < at_once; i++) {
        int64_t row = first + i * (SPLIT_THREADS / WARP);
        uint4 hi, lo;
        split_pack<E, NORM>(in[i], norm, hi, lo);
        if (row < rows) {
            *(uint4 *)(to_hi + row * job.d + column) = hi;
            *(uint4 *)(to_lo + row * job.d + column) = lo;
        }
    }
}

// [split-kernel]
// Launch: blocks of 256 threads, in this order: dz_blocks for 32 keys of a slice of the tokens, x_blocks for 32 tokens
// by 256 hidden units, and as many as are left for the gate. Shared memory: 2 KB. Traffic: 4 bytes a logit read and
// written; of x 2 bytes an element read and 4 written. Only x's blocks wait for the kernel before: it makes the norm.
template <typename E>
__global__ void __launch_bounds__(SPLIT_THREADS)
    split_kernel(router_backward_job job, int dz_blocks, int x_blocks, const E *x, const E *gate) {
    int across = (int)((job.keys + DZ_KEYS - 1) / DZ_KEYS), block = blockIdx.x;
    start_next_kernel();
    if (block < dz_blocks) {
        split_dz(job, block / across, block % across * DZ_KEYS);
    } else if (block < dz_blocks + x_blocks) {
        split_rows<E, true>(job, job.T, job.T, block - dz_blocks, x, job.halves.x_hi, job.halves.x_lo);
    } else {
        bf16_part *lo = job.halves.gate, *hi = lo + job.keys * job.d;
        split_rows<E, false>(job, 2 * job.n, job.keys, block - dz_blocks - x_blocks, gate, hi, lo);
    }
}
// [/split-kernel]

template <typename E>
static fmoe_status split_all(const router_backward_job &job, const E *x, const E *gate, cudaStream_t stream) {
    int64_t across = ceil_div(job.d, 8 * WARP), dz_blocks = job.slices * ceil_div(job.keys, DZ_KEYS);
    int64_t x_blocks = across * ceil_div(job.T, SPLIT_ROWS);
    int64_t gate_blocks = job.halves.gate ? across * ceil_div(job.keys, SPLIT_ROWS) : 0;
    return launch_overlapping("split_kernel", true, split_kernel<E>, (unsigned)(dz_blocks + x_blocks + gate_blocks),
                              SPLIT_THREADS, 0, stream, job, (int)dz_blocks, (int)x_blocks, x, gate);
}

fmoe_status router_split(const router_backward_job &job, fmoe_dtype dtype, const void *x, const void *gate,
                         cudaStream_t stream) {
    return dtype == FMOE_F16 ? split_all(job, (const __half *)x, (const __half *)gate, stream)
                             : split_all(job, (const __nv_bfloat16 *)x, (const __nv_bfloat16 *)gate, stream);
}

// ---- dgate: rows are the halves of all keys, and the depth is the tokens, twice: with x̂₁ and with x̂₂

#define COLUMNS 256

static int in_blocks(int64_t depth) {
    return (int)(ceil_div(depth, TILE_DEPTH) * TILE_DEPTH);
}

static product_work work_of(int64_t rows, int64_t columns, int first_depth, int64_t second_depth) {
    product_work work = product_plan(rows, columns, first_depth + second_depth, COLUMNS, 1);
    work.second_from = first_depth;
    return work;
}

// [gate-product-wgmma]
fmoe_status router_gate_product_wgmma(const router_backward_job &job, cudaStream_t stream) {
    product_work work = work_of(2 * job.keys, job.d, in_blocks(job.T), job.T);
    product_maps maps = {};
    store_sums epilogue = {job.dgate_slices, work.rows, work.columns};
    work.splits = (int)job.slices / 2; // each has a slice for dz₁ and one for dz₂
    TRY(describe_a<true>("dz", &maps.a[0], FMOE_BF16, job.halves.dz, 2 * job.keys, job.T, 2 * job.keys));
    maps.a[1] = maps.a[0];
    TRY((describe_b<true, COLUMNS>("x̂", &maps.b[0], FMOE_BF16, job.halves.x_hi, job.d, job.T, job.d)));
    TRY((describe_b<true, COLUMNS>("x̂", &maps.b[1], FMOE_BF16, job.halves.x_lo, job.d, job.T, job.d)));
    return product_launch<bf16_part, COLUMNS, true, true>("dgate", work, maps, epilogue, true, stream);
}
// [/gate-product-wgmma]

// ---- dx

// What a hidden unit's column needs at its end, in shared memory.
typedef struct {
    float mean[COLUMNS], mean_x_hat[COLUMNS], center[COLUMNS], scale[COLUMNS], offset[COLUMNS];
} norm_columns;

template <typename G> __device__ inline void store_two(G *to, float a, float b) {
    if constexpr (sizeof(G) == sizeof(float))
        *(float2 *)to = make_float2(a, b);
    else
        *(unsigned *)to = round_pair<G>(a, b);
}

__device__ inline float2 two_of(const float *values, int at) {
    return *(const float2 *)(values + at);
}

// [finish-norm]
// As finish_columns of backward_products.cu: the epilogue of dx's product.
template <typename E, typename G> struct finish_norm {
    static constexpr int STAGING = sizeof(norm_columns);
    static constexpr int AT_ONCE = 32; // pairs of x on their way
    router_backward_job job;
    const E *x;
    G *dx;

    __device__ void read_columns(const product_place &at, norm_columns *columns) const {
        for (int c = at.thread; c < COLUMNS; c += PRODUCT_GROUP) {
            int64_t unit = at.column + c < job.d ? at.column + c : job.d - 1;
            float sum = 0, sum_x_hat = 0;
            if (job.training)
#pragma unroll 8
                for (int64_t group = 0; group < job.key_groups; group++) {
                    sum += job.means[(2 * group + 0) * job.d + unit];
                    sum_x_hat += job.means[(2 * group + 1) * job.d + unit];
                }
            columns->mean[c] = sum / (float)job.T, columns->mean_x_hat[c] = sum_x_hat / (float)job.T;
            columns->center[c] = job.norm.center[unit], columns->scale[c] = job.norm.scale[unit];
            columns->offset[c] = job.norm.offset[unit];
        }
    }

    template <int SUMS> __device__ void operator()(const product_place &at, float (&sums)[SUMS], char *staging) const {
        typedef typename pair_of<E>::type pair;
        norm_columns *columns = (norm_columns *)staging;
        barrier_sync(at.barrier, PRODUCT_GROUP); // the tile before is done with them
        read_columns(at, columns);
        barrier_sync(at.barrier, PRODUCT_GROUP);
#pragma unroll
        for (int first = 0; first < SUMS; first += 2 * AT_ONCE) {
            unsigned in[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                int64_t r = at.row + sum_row(at, first + 2 * i), c = at.column + sum_column(at, first + 2 * i);
                in[i] = job.training && r < job.T && c < job.d ? *(const unsigned *)(x + r * job.d + c) : 0;
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                int column = sum_column(at, first + 2 * i);
                int64_t r = at.row + sum_row(at, first + 2 * i), c = at.column + column;
                float2 scale = two_of(columns->scale, column), out;
                float2 gradient = make_float2(sums[first + 2 * i], sums[first + 2 * i + 1]);
                if (job.training) {
                    float2 center = two_of(columns->center, column), offset = two_of(columns->offset, column);
                    float2 mean = two_of(columns->mean, column), along = two_of(columns->mean_x_hat, column);
                    float2 value = to_f32_pair(*(pair *)&in[i]);
                    gradient.x -= mean.x + along.x * normalised(value.x, center.x, scale.x, offset.x);
                    gradient.y -= mean.y + along.y * normalised(value.y, center.y, scale.y, offset.y);
                }
                out = make_float2(gradient.x * scale.x, gradient.y * scale.y);
                if (r < job.T && c < job.d)
                    store_two(dx + r * job.d + c, out.x, out.y);
            }
        }
    }
};
// [/finish-norm]

// [x-product-wgmma]
// dz₁ · gate + dz₂ · gate; or, where the gate was split, (dz₁ · gate₂ + dz₂ · gate₁) + dz₁ · gate₁.
template <typename E, typename G>
static fmoe_status x_product(const router_backward_job &job, const void *x, const void *gate, void *dx,
                             cudaStream_t stream) {
    const bf16_part *dz = job.halves.dz, *low = job.halves.gate, *high = low + job.keys * job.d;
    int64_t first_depth = low ? 2 * job.keys : job.keys, pitch = 2 * job.keys;
    product_work work = work_of(job.T, job.d, in_blocks(first_depth), job.keys);
    product_maps maps = {};
    finish_norm<E, G> epilogue = {job, (const E *)x, (G *)dx};
    TRY(describe_a<false>("dz", &maps.a[0], FMOE_BF16, dz, job.T, first_depth, pitch));
    TRY(describe_a<false>("dz", &maps.a[1], FMOE_BF16, low ? dz : dz + job.keys, job.T, job.keys, pitch));
    if (low) {
        TRY((describe_b<true, COLUMNS>("gate", &maps.b[0], FMOE_BF16, low, job.d, 2 * job.keys, job.d)));
        TRY((describe_b<true, COLUMNS>("gate", &maps.b[1], FMOE_BF16, high, job.d, job.keys, job.d)));
    } else {
        TRY((describe_b<true, COLUMNS>("gate", &maps.b[0], FMOE_BF16, gate, job.d, 2 * job.n, job.d)));
        maps.b[1] = maps.b[0];
    }
    return product_launch<bf16_part, COLUMNS, false, true>("dx", work, maps, epilogue, true, stream);
}
// [/x-product-wgmma]

fmoe_status router_x_product_wgmma(const router_backward_job &job, fmoe_dtype dtype, const void *x, const void *gate,
                                   fmoe_dtype gradient_dtype, void *dx, cudaStream_t stream) {
    if (dtype == FMOE_F16)
        return (gradient_dtype == FMOE_F32 ? x_product<__half, float> : x_product<__half, __half>)(job, x, gate, dx,
                                                                                                   stream);
    return (gradient_dtype == FMOE_F32 ? x_product<__nv_bfloat16, float>
                                       : x_product<__nv_bfloat16, __nv_bfloat16>)(job, x, gate, dx, stream);
}
