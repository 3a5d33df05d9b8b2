// Rungs `naive` and `tiles`: the products of the way back in float32, for every storage type and every size. A product
// is a job that either rung carries out: C [rows, columns] = Σ over the depth of A · B, with operands that lie either
// way round.
#include "mlp_backward.cuh"

// An element of an operand: values[row * of_row + depth * of_depth]. A sum of two products has two operands a side.
typedef struct {
    const void *values[2];
    bool f32; // though the storage type is not
    int64_t of_row, of_depth;
} operand;

typedef struct {
    int64_t rows, columns, depth; // of each of the products
    int products;                 // 1 or 2, added up
    operand a, b;
    void *gradient; // where sums go: to a gradient [rows, columns],
    bool wide, add; // in float32, to what is there;
    float *sums;    // or to [rows, columns] as they are;
    // or, where both are NULL, they are dh [T, I] and give dp and dq.
    operand by_p, by_q;
    float *dp, *dq;
} product_job;

// ⟨row, depth⟩ is where an element lies.
template <typename E> __device__ inline float element(const operand &o, int product, int64_t row, int64_t depth) {
    int64_t at = row * o.of_row + depth * o.of_depth;
    return o.f32 ? ((const float *)o.values[product])[at] : to_f32(((const E *)o.values[product])[at]);
}

// [finish]
template <typename E> __device__ inline void finish(const product_job &job, int64_t row, int64_t column, float sum) {
    int64_t at = row * job.columns + column;
    if (job.gradient && job.wide) {
        float *to = (float *)job.gradient + at;
        *to = job.add ? *to + sum : sum;
    } else if (job.gradient) {
        E *to = (E *)job.gradient + at;
        *to = from_f32<E>(job.add ? to_f32(*to) + sum : sum);
    } else if (job.sums) {
        job.sums[at] = sum;
    } else {
        job.dp[at] = sum * element<E>(job.by_p, 0, row, column);
        job.dq[at] = sum * element<E>(job.by_q, 0, row, column);
    }
}
// [/finish]

// ---- Rung `naive`

#define NAIVE_SIDE  16
#define NAIVE_FLOPS 3e10 // about a tenth of a second

// Launch: a thread an element, 16 × 16 a block. Shared memory: none. Traffic: two elements for each multiply-add, from
// the caches.
// [naive]
template <typename E> static __global__ void __launch_bounds__(NAIVE_SIDE *NAIVE_SIDE) naive_kernel(product_job job) {
    int64_t tiles = (job.columns + NAIVE_SIDE - 1) / NAIVE_SIDE;
    int64_t row = blockIdx.x / tiles * NAIVE_SIDE + threadIdx.y, column = blockIdx.x % tiles * NAIVE_SIDE + threadIdx.x;
    if (row >= job.rows || column >= job.columns)
        return;
    float sum = 0;
    for (int i = 0; i < job.products; i++)
        for (int64_t k = 0; k < job.depth; k++)
            sum = fmaf(element<E>(job.a, i, row, k), element<E>(job.b, i, column, k), sum);
    finish<E>(job, row, column, sum);
}
// [/naive]

// ---- Rung `tiles`

#define THREADS 256
#define TILE    128
#define DEPTH   8
#define LOADS   (TILE * DEPTH / THREADS) // elements of a tile that a thread brings
#define PITCH   (TILE + 4)               // neighbours in the depth lie four banks apart

typedef struct {
    float a[DEPTH][PITCH], b[DEPTH][PITCH];
} tile_pair;

// The thread's i-th element of a tile. Neighbouring threads have neighbours in memory, whichever way that runs.
__device__ inline void place_of(const operand &o, int i, int *row, int *depth) {
    int at = threadIdx.x + i * THREADS;
    bool along_depth = o.of_depth == 1;
    *row = along_depth ? at / DEPTH : at % TILE;
    *depth = along_depth ? at % DEPTH : at / TILE;
}

template <typename E>
__device__ inline void fetch(const operand &o, int product, int64_t first_row, int64_t rows, int64_t first_depth,
                             int64_t depth, float (&in)[LOADS]) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        int r, k;
        place_of(o, i, &r, &k);
        bool inside = first_row + r < rows && first_depth + k < depth;
        in[i] = inside ? element<E>(o, product, first_row + r, first_depth + k) : 0;
    }
}

__device__ inline void place(const operand &o, const float (&in)[LOADS], float (&tile)[DEPTH][PITCH]) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        int r, k;
        place_of(o, i, &r, &k);
        tile[k][r] = in[i];
    }
}

// A thread's eight rows and columns: two groups of four, half a tile apart.
__device__ inline int first_row(void) {
    return (threadIdx.x / 64 * 4 + threadIdx.x % 32 / 8) * 4;
}
__device__ inline int first_column(void) {
    return (threadIdx.x / 32 % 2 * 8 + threadIdx.x % 8) * 4;
}

__device__ inline void load_eight(const float (&row)[PITCH], int first, float (&eight)[8]) {
    *(float4 *)eight = *(const float4 *)&row[first];
    *(float4 *)(eight + 4) = *(const float4 *)&row[first + TILE / 2];
}

__device__ inline void multiply(const tile_pair *tiles, float (&sums)[8][8]) {
#pragma unroll
    for (int k = 0; k < DEPTH; k++) {
        float a[8], b[8];
        load_eight(tiles->a[k], first_row(), a);
        load_eight(tiles->b[k], first_column(), b);
        for (int i = 0; i < 8; i++)
            for (int j = 0; j < 8; j++)
                sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
    }
}

// Launch: a block of 256 threads for 128 × 128 sums; two blocks a multiprocessor. Shared memory: 17 KB, two pairs of
// tiles; while one is multiplied the next is loaded into registers. Traffic: each operand once for every 128 rows or
// columns of the other.
// [tiles]
template <typename E> static __global__ void __launch_bounds__(THREADS, 2) tiles_kernel(product_job job) {
    __shared__ alignas(16) tile_pair pairs[2];
    int64_t tiles = (job.columns + TILE - 1) / TILE, steps = (job.depth + DEPTH - 1) / DEPTH;
    int64_t row = blockIdx.x / tiles * TILE, column = blockIdx.x % tiles * TILE;
    float sums[8][8] = {}, a[LOADS], b[LOADS];
    fetch<E>(job.a, 0, row, job.rows, 0, job.depth, a);
    fetch<E>(job.b, 0, column, job.columns, 0, job.depth, b);
    for (int64_t step = 0, all = steps * job.products; step < all; step++) {
        tile_pair *now = &pairs[step % 2];
        place(job.a, a, now->a);
        place(job.b, b, now->b);
        __syncthreads();
        if (step + 1 < all) {
            int product = step + 1 >= steps;
            int64_t depth = (step + 1 - product * steps) * DEPTH;
            fetch<E>(job.a, product, row, job.rows, depth, job.depth, a);
            fetch<E>(job.b, product, column, job.columns, depth, job.depth, b);
        }
        multiply(now, sums);
    }
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) {
            int64_t r = row + first_row() + i % 4 + i / 4 * (TILE / 2);
            int64_t c = column + first_column() + j % 4 + j / 4 * (TILE / 2);
            if (r < job.rows && c < job.columns)
                finish<E>(job, r, c, sums[i][j]);
        }
}
// [/tiles]

// ---- The middle

#define MIDDLE_THREADS 256

// Launch: a thread a hidden unit, 256 a block. Shared memory: none. Traffic: p and q in, three numbers out, the first
// two in p's and q's places.
static __global__ void __launch_bounds__(MIDDLE_THREADS) middle_kernel(int64_t count, float *p, float *q, float *h) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count)
        return;
    hidden_unit unit = hidden_of(p[i], q[i]);
    p[i] = unit.by_p, q[i] = unit.by_q, h[i] = unit.h;
}

// ---- All products

typedef fmoe_status launch_fn(const product_job &job, fmoe_dtype dtype, cudaStream_t stream);

static fmoe_status launch_naive(const product_job &job, fmoe_dtype dtype, cudaStream_t stream) {
    unsigned blocks = (unsigned)(ceil_div(job.rows, NAIVE_SIDE) * ceil_div(job.columns, NAIVE_SIDE));
    dim3 threads(NAIVE_SIDE, NAIVE_SIDE);
    WITH_DTYPE(dtype, E, naive_kernel<E><<<blocks, threads, 0, stream>>>(job));
    return launched("naive_kernel");
}

static fmoe_status launch_tiles(const product_job &job, fmoe_dtype dtype, cudaStream_t stream) {
    unsigned blocks = (unsigned)(ceil_div(job.rows, TILE) * ceil_div(job.columns, TILE));
    WITH_DTYPE(dtype, E, tiles_kernel<E><<<blocks, THREADS, 0, stream>>>(job));
    return launched("tiles_kernel");
}

// An operand stored [rows, depth], and one stored [depth, rows].
static operand along(const void *values, int64_t depth, bool f32) {
    return {{values, NULL}, f32, depth, 1};
}
static operand across(const void *values, int64_t rows, bool f32) {
    return {{values, NULL}, f32, 1, rows};
}

static product_job product(int64_t rows, int64_t columns, int64_t depth, const operand &a, const operand &b) {
    product_job job = {};
    job.rows = rows, job.columns = columns, job.depth = depth, job.products = 1, job.a = a, job.b = b;
    return job;
}

// [products]
static fmoe_status make_hidden(const mlp_backward_task &t, launch_fn *launch, cudaStream_t stream) {
    product_job p = product(t.T, t.I, t.d, along(t.x, t.d, false), along(t.gate, t.d, false)), q = p;
    q.b = along(t.up, t.d, false);
    p.sums = (float *)t.h_by_p, q.sums = (float *)t.h_by_q;
    TRY(launch(p, t.dtype, stream));
    TRY(launch(q, t.dtype, stream));
    unsigned blocks = (unsigned)ceil_div(t.T * t.I, MIDDLE_THREADS);
    middle_kernel<<<blocks, MIDDLE_THREADS, 0, stream>>>(t.T * t.I, p.sums, q.sums, (float *)t.h);
    return launched("middle_kernel");
}

static fmoe_status hidden(const mlp_backward_task &t, launch_fn *launch, cudaStream_t stream) {
    product_job dh = product(t.T, t.I, t.d, along(t.dy, t.d, false), across(t.down, t.I, false));
    dh.by_p = along(t.h_by_p, t.I, t.made), dh.by_q = along(t.h_by_q, t.I, t.made);
    dh.dp = (float *)t.dp, dh.dq = (float *)t.dq;
    return launch(dh, t.dtype, stream);
}

// aᵀ · b over the tokens.
static fmoe_status weight(const mlp_backward_task &t, const operand &a, int64_t rows, const operand &b, int64_t columns,
                          void *gradient, launch_fn *launch, cudaStream_t stream) {
    product_job job = product(rows, columns, t.T, a, b);
    job.gradient = gradient, job.wide = t.wide, job.add = t.accumulate;
    return gradient ? launch(job, t.dtype, stream) : FMOE_OK;
}

static fmoe_status tokens(const mlp_backward_task &t, launch_fn *launch, cudaStream_t stream) {
    product_job dx = product(t.T, t.d, t.I, along(t.dp, t.I, true), across(t.gate, t.d, false));
    dx.products = 2, dx.a.values[1] = t.dq, dx.b.values[1] = t.up;
    dx.gradient = t.dx, dx.wide = t.wide_dx;
    return t.dx ? launch(dx, t.dtype, stream) : FMOE_OK;
}

static fmoe_status run(mlp_backward_task *t, void *workspace, size_t bytes, launch_fn *launch, cudaStream_t stream) {
    t->middle = FMOE_F32;
    TRY(check_workspace(workspace, bytes, mlp_backward_lay_out(t, 0, workspace)));
    if (t->T == 0)
        return mlp_backward_no_tokens(*t, stream);
    operand x = across(t->x, t->d, false), dy = across(t->dy, t->d, false), h = across(t->h, t->I, t->made);
    if (t->made)
        TRY(make_hidden(*t, launch, stream));
    TRY(hidden(*t, launch, stream));
    TRY(weight(*t, dy, t->d, h, t->I, t->ddown, launch, stream));
    TRY(weight(*t, across(t->dp, t->I, true), t->I, x, t->d, t->dgate, launch, stream));
    TRY(weight(*t, across(t->dq, t->I, true), t->I, x, t->d, t->dup, launch, stream));
    return tokens(*t, launch, stream);
}
// [/products]

fmoe_status mlp_backward_tiles(mlp_backward_task *t, void *workspace, size_t bytes, cudaStream_t stream) {
    return run(t, workspace, bytes, launch_tiles, stream);
}

extern "C" bool cuda_mlp_backward_is_small(const void *args) {
    const fmoe_mlp_backward_args *a = (const fmoe_mlp_backward_args *)args;
    return 12.0 * (double)a->T * (double)a->d * (double)a->I <= NAIVE_FLOPS;
}

extern "C" fmoe_status cuda_mlp_backward_naive(const void *args, void *workspace, size_t bytes, void *stream) {
    mlp_backward_task t;
    TRY(mlp_backward_from_args(args, &t));
    return run(&t, workspace, bytes, launch_naive, (cudaStream_t)stream);
}

extern "C" fmoe_status cuda_mlp_backward_tiles(const void *args, void *workspace, size_t bytes, void *stream) {
    mlp_backward_task t;
    TRY(mlp_backward_from_args(args, &t));
    return run(&t, workspace, bytes, launch_tiles, (cudaStream_t)stream);
}
