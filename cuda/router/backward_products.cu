// The two products of the router's backward pass, in float32, by tiles of shared memory and registers. Both have a tile
// of 128 rows by 128 columns for a block and of 8 by 8 for a thread; they differ in what their rows are.
#include "backward.cuh"

#define PRODUCT_THREADS 256
#define ROWS            128
#define COLUMNS         128
#define DEPTH           8

// Rows of a are four floats longer than they need be: where threads place a transposed piece, no two meet in a bank.
typedef struct {
    float a[DEPTH][ROWS + 4], b[DEPTH][COLUMNS];
} tile_pair;

// Four neighbours of a row, in one load where rows begin at multiples of four elements (WIDE). Zeros beyond the end.
template <typename E> struct alignas(4 * sizeof(E)) four { E at[4]; };

template <typename E, bool WIDE> __device__ four<E> load_four(const E *row, int64_t column, int64_t columns) {
    four<E> f;
#pragma unroll
    for (int i = 0; i < 4; i++)
        f.at[i] = from_f32<E>(0);
    if constexpr (WIDE) {
        if (column < columns)
            f = *(const four<E> *)(row + column);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (column + i < columns)
                f.at[i] = row[column + i];
    }
    return f;
}

template <typename E, bool WIDE> __device__ void store_four(four<E> f, E *row, int64_t column, int64_t columns) {
    if constexpr (WIDE) {
        if (column >= columns)
            return;
        // __stwb is an ordinary store that the compiler leaves in one piece.
        if constexpr (sizeof(E) == sizeof(float))
            __stwb((float4 *)(row + column), {f.at[0], f.at[1], f.at[2], f.at[3]});
        else
            __stwb((uint2 *)(row + column), *(const uint2 *)f.at);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (column + i < columns)
                row[column + i] = f.at[i];
    }
}

// Four keys of a token from key j of 2n on: their gradients in dz, which has the sides one after the other.
template <bool WIDE> __device__ four<float> load_dz(const router_backward_job &job, int64_t t, int64_t j) {
    if constexpr (WIDE) {
        int64_t side = j >= job.n, inside = t < job.T && j < 2 * job.n;
        return load_four<float, true>(job.dlogits + (side * job.T + t) * job.n, j - side * job.n, inside ? job.n : 0);
    } else {
        four<float> f;
#pragma unroll
        for (int i = 0; i < 4; i++, j++) {
            int64_t side = j >= job.n, inside = t < job.T && j < 2 * job.n;
            f.at[i] = inside ? job.dlogits[(side * job.T + t) * job.n + j - side * job.n] : 0;
        }
        return f;
    }
}

// [backward-multiply]
// A thread's 8 rows by 8 columns, both in two groups of four: four 16-byte loads feed 64 multiply-adds.
__device__ inline void multiply(const tile_pair *tiles, float (&sums)[8][8]) {
    int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll
    for (int k = 0; k < DEPTH; k++) {
        four<float> a[2] = {*(const four<float> *)&tiles->a[k][row],
                            *(const four<float> *)&tiles->a[k][row + ROWS / 2]};
        four<float> b[2] = {*(const four<float> *)&tiles->b[k][column],
                            *(const four<float> *)&tiles->b[k][column + COLUMNS / 2]};
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int c = 0; c < 8; c++)
                sums[i][c] = fmaf(a[i / 4].at[i % 4], b[c / 4].at[c % 4], sums[i][c]);
    }
}
// [/backward-multiply]

// Where the rows and the two groups of columns of a thread's tile lie in the block's.
__device__ inline int row_of(int i) {
    return i / 4 * (ROWS / 2) + threadIdx.x / 16 * 4 + i % 4;
}
__device__ inline int columns_of(int group) {
    return group * (COLUMNS / 2) + threadIdx.x % 16 * 4;
}

// ---- dgate = dzᵀ · x̂: rows are keys, columns hidden units, and the sum runs over the tokens of a slice

// What a thread brings: of token threadIdx.x / 32 four keys and four hidden units.
template <typename E> struct gate_in_flight {
    four<float> dz;
    four<E> x;
};

template <typename E, bool WIDE>
__device__ void fetch_for_gate(const router_backward_job &job, const E *x, int64_t t, int64_t end, int64_t key,
                               int64_t unit, gate_in_flight<E> *in) {
    t += threadIdx.x / 32;
    in->dz = load_dz<WIDE>(job, t < end ? t : job.T, key + threadIdx.x % 32 * 4);
    in->x = load_four<E, WIDE>(x + t * job.d, unit + threadIdx.x % 32 * 4, t < end ? job.d : 0);
}

// x is normalised on its way into shared memory, by the one thread that brings it.
template <typename E>
__device__ void place_for_gate(const gate_in_flight<E> &in, const float (*norm)[COLUMNS], bool inside,
                               tile_pair *tiles) {
    int k = threadIdx.x / 32, place = threadIdx.x % 32 * 4;
    *(four<float> *)&tiles->a[k][place] = in.dz;
    four<float> x_hat, center = *(const four<float> *)&norm[0][place], scale = *(const four<float> *)&norm[1][place],
                       offset = *(const four<float> *)&norm[2][place];
#pragma unroll
    for (int i = 0; i < 4; i++)
        x_hat.at[i] = inside ? normalised(to_f32(in.x.at[i]), center.at[i], scale.at[i], offset.at[i]) : 0;
    *(four<float> *)&tiles->b[k][place] = x_hat;
}

// A block of 256 threads for 128 keys by 128 hidden units of one slice of tokens. Shared memory: 18 KB, two pairs of
// tiles and the norm; while one is multiplied the next is loaded into registers. Traffic: dz once for every 128 hidden
// units and x once for every 128 keys, mostly from the L2; a slice of dgate is written once. [gate-product]
template <typename E, bool WIDE>
__global__ void __launch_bounds__(PRODUCT_THREADS, 2)
    gate_product_kernel(router_backward_job job, int64_t slice_tokens, const E *x) {
    __shared__ alignas(16) tile_pair tiles[2];
    __shared__ alignas(16) float norm[3][COLUMNS];
    int64_t unit = (int64_t)blockIdx.x * COLUMNS, key = (int64_t)blockIdx.y * ROWS, slice = blockIdx.z;
    int64_t begin = slice * slice_tokens, end = begin + slice_tokens < job.T ? begin + slice_tokens : job.T;
    float sums[8][8] = {}, dz_sum = 0;
    if (threadIdx.x < COLUMNS) {
        int64_t h = unit + threadIdx.x < job.d ? unit + threadIdx.x : job.d - 1;
        norm[0][threadIdx.x] = job.norm.center[h];
        norm[1][threadIdx.x] = job.norm.scale[h];
        norm[2][threadIdx.x] = job.norm.offset[h];
    }
    gate_in_flight<E> in;
    fetch_for_gate<E, WIDE>(job, x, begin, end, key, unit, &in);
    __syncthreads();
    for (int64_t t = begin, turn = 0; t < end; t += DEPTH, turn ^= 1) {
        place_for_gate(in, norm, t + threadIdx.x / 32 < end, &tiles[turn]);
        __syncthreads();
        if (t + DEPTH < end)
            fetch_for_gate<E, WIDE>(job, x, t + DEPTH, end, key, unit, &in);
        multiply(&tiles[turn], sums);
        if (blockIdx.x == 0 && threadIdx.x < ROWS) // a column of x̂ that is 1 everywhere, so to speak
            for (int k = 0; k < DEPTH; k++)
                dz_sum += tiles[turn].a[k][threadIdx.x];
    }
    float *out = job.dgate_slices + slice * job.keys * job.d;
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int group = 0; group < 2; group++) {
            const float *f = sums[i] + 4 * group;
            int64_t j = key + row_of(i);
            if (j < 2 * job.n)
                store_four<float, WIDE>({f[0], f[1], f[2], f[3]}, out + j * job.d, unit + columns_of(group), job.d);
        }
    if (blockIdx.x == 0 && threadIdx.x < ROWS && key + threadIdx.x < 2 * job.n)
        job.dz_sums[slice * 2 * job.n + key + threadIdx.x] = dz_sum;
}
// [/gate-product]

static bool is_wide(const router_backward_job &job) {
    return job.n % 4 == 0 && job.d % 4 == 0;
}

template <typename E, bool WIDE>
static fmoe_status gate_product(const router_backward_job &job, const void *x, cudaStream_t stream) {
    dim3 blocks((unsigned)ceil_div(job.d, COLUMNS), (unsigned)ceil_div(2 * job.n, ROWS), (unsigned)job.slices);
    int64_t slice_tokens = ceil_div(ceil_div(job.T, job.slices), DEPTH) * DEPTH;
    gate_product_kernel<E, WIDE><<<blocks, PRODUCT_THREADS, 0, stream>>>(job, slice_tokens, (const E *)x);
    return launched("gate_product_kernel");
}

fmoe_status router_gate_product(const router_backward_job &job, fmoe_dtype dtype, const void *x, cudaStream_t stream) {
    WITH_DTYPE(dtype, E, return (is_wide(job) ? gate_product<E, true> : gate_product<E, false>)(job, x, stream));
}

// ---- dx̂ = dz · gate: rows are tokens, columns hidden units, and the sum runs over all keys

// What a thread brings: four keys of token threadIdx.x / 2, and of key threadIdx.x / 32 four hidden units.
template <typename E> struct x_in_flight {
    four<float> dz;
    four<E> gate;
};

template <typename E, bool WIDE>
__device__ void fetch_for_x(const router_backward_job &job, const E *gate, int64_t token, int64_t key, int64_t unit,
                            x_in_flight<E> *in) {
    int64_t row = key + threadIdx.x / 32;
    in->dz = load_dz<WIDE>(job, token + threadIdx.x / 2, key + threadIdx.x % 2 * 4);
    in->gate = load_four<E, WIDE>(gate + row * job.d, unit + threadIdx.x % 32 * 4, row < 2 * job.n ? job.d : 0);
}

template <typename E> __device__ void place_for_x(const x_in_flight<E> &in, tile_pair *tiles) {
    four<float> gate;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        tiles->a[threadIdx.x % 2 * 4 + i][threadIdx.x / 2] = in.dz.at[i];
        gate.at[i] = to_f32(in.gate.at[i]);
    }
    *(four<float> *)&tiles->b[threadIdx.x / 32][threadIdx.x % 32 * 4] = gate;
}

// The means of dx̂ and of dx̂ · x̂ over the tokens, for the hidden units of a block: the shares of all groups of keys.
__device__ inline void add_means(const router_backward_job &job, int64_t unit, float (*means)[COLUMNS]) {
    int which = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS; // 256 threads for two means of 128 hidden units
    float sum = 0;
    if (unit + column < job.d && job.training)
#pragma unroll 4
        for (int64_t group = 0; group < job.key_groups; group++)
            sum += job.means[(2 * group + which) * job.d + unit + column];
    means[which][column] = sum / (float)job.T;
}

// What the norm makes of a thread's dx̂ in four neighbouring columns: both means come off, in training, and the hidden
// unit's scale is applied. All of x is on its way before the first row is finished.
// [norm-backward]
template <typename E, typename G, bool WIDE>
__device__ void finish_columns(const router_backward_job &job, const E *x, int64_t token, int64_t h, const float *mean,
                               const float *mean_x_hat, const float (&dx_hat)[8][8], int first, G *dx) {
    four<E> in[8];
    float center[4] = {}, scale[4], offset[4] = {};
#pragma unroll
    for (int i = 0; i < 8 && job.training; i++)
        in[i] = load_four<E, WIDE>(x + (token + row_of(i)) * job.d, h, token + row_of(i) < job.T ? job.d : 0);
#pragma unroll
    for (int c = 0; c < 4; c++) {
        int64_t unit = h + c < job.d ? h + c : job.d - 1;
        center[c] = job.norm.center[unit], scale[c] = job.norm.scale[unit], offset[c] = job.norm.offset[unit];
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        four<G> out;
#pragma unroll
        // [norm-last-line]
        for (int c = 0; c < 4; c++) {
            float gradient = dx_hat[i][first + c];
            if (job.training)
                gradient -= mean[c] + mean_x_hat[c] * normalised(to_f32(in[i].at[c]), center[c], scale[c], offset[c]);
            out.at[c] = from_f32<G>(gradient * scale[c]);
        }
        // [/norm-last-line]
        if (token + row_of(i) < job.T)
            store_four<G, WIDE>(out, dx + (token + row_of(i)) * job.d, h, job.d);
    }
}
// [/norm-backward]

// A block of 256 threads for 128 tokens by 128 hidden units. Shared memory: 17 KB, two pairs of tiles and the means.
// Traffic: dz once for every 128 hidden units and the gate once for every 128 tokens, mostly from the L2; x (in
// training) and dx once. [x-product]
template <typename E, typename G, bool WIDE>
__global__ void __launch_bounds__(PRODUCT_THREADS, 2)
    x_product_kernel(router_backward_job job, const E *x, const E *gate, G *dx) {
    __shared__ alignas(16) tile_pair tiles[2];
    __shared__ float means[2][COLUMNS];
    int64_t token = (int64_t)blockIdx.x * ROWS, unit = (int64_t)blockIdx.y * COLUMNS;
    float sums[8][8] = {};
    x_in_flight<E> in;
    fetch_for_x<E, WIDE>(job, gate, token, 0, unit, &in);
    add_means(job, unit, means);
    for (int64_t j = 0, turn = 0; j < 2 * job.n; j += DEPTH, turn ^= 1) {
        place_for_x(in, &tiles[turn]);
        __syncthreads();
        if (j + DEPTH < 2 * job.n)
            fetch_for_x<E, WIDE>(job, gate, token, j + DEPTH, unit, &in);
        multiply(&tiles[turn], sums);
    }
#pragma unroll
    for (int group = 0; group < 2; group++) {
        int column = columns_of(group);
        finish_columns<E, G, WIDE>(job, x, token, unit + column, means[0] + column, means[1] + column, sums, 4 * group,
                                   dx);
    }
}
// [/x-product]

template <typename E, typename G, bool WIDE>
static fmoe_status x_product(const router_backward_job &job, const void *x, const void *gate, void *dx,
                             cudaStream_t stream) {
    dim3 blocks((unsigned)ceil_div(job.T, ROWS), (unsigned)ceil_div(job.d, COLUMNS));
    x_product_kernel<E, G, WIDE><<<blocks, PRODUCT_THREADS, 0, stream>>>(job, (const E *)x, (const E *)gate, (G *)dx);
    return launched("x_product_kernel");
}

fmoe_status router_x_product(const router_backward_job &job, fmoe_dtype dtype, const void *x, const void *gate,
                             fmoe_dtype gradient_dtype, void *dx, cudaStream_t stream) {
    bool wide = is_wide(job);
    WITH_DTYPE(dtype, E, {
        if (gradient_dtype == FMOE_F32)
            return (wide ? x_product<E, float, true> : x_product<E, float, false>)(job, x, gate, dx, stream);
        return (wide ? x_product<E, E, true> : x_product<E, E, false>)(job, x, gate, dx, stream);
    });
}
