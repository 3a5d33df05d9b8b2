// The statistics of a batch in one pass over x, and the norm made of them.
#include "../ptx.cuh"
#include "router.cuh"

#define ROW_THREADS 16 // threads along a row, 16 bytes each
#define SLOTS       16 // tokens that a block has in hand at a time
#define JOIN_UNITS  32 // hidden units a block of the join has
#define JOIN_SLICES 16 // threads that share a unit's blocks

// [block-statistics]
// Sums of x − shift and of its square over 64 tokens, where shift is the first of them: a value from among them keeps
// the sums of the size of the deviations, wherever the mean lies.
// Launch: 256 threads for 64 tokens by 16 · 16 bytes of columns. Shared memory: 8 KB (float32) or 16 KB. Traffic: x
// once, 16 bytes a load, four of them and the shift's under way in each thread; 12 bytes are written for 64 elements.
template <typename E, bool WIDE>
__global__ void __launch_bounds__(ROW_THREADS *SLOTS)
    statistics_kernel(int64_t T, int64_t d, const E *x, float *shifts, float *sums, float *squares) {
    constexpr int wide = pack16<E>::count, columns = ROW_THREADS * wide, turns = STATISTICS_TOKENS / SLOTS;
    __shared__ alignas(16) float part_sums[SLOTS][columns], part_squares[SLOTS][columns];
    start_next_kernel();

    unsigned column_blocks = (unsigned)((d + columns - 1) / columns);
    int64_t block = blockIdx.x / column_blocks, first = block * STATISTICS_TOKENS;
    int64_t first_column = (int64_t)(blockIdx.x % column_blocks) * columns;
    int slot = threadIdx.x / ROW_THREADS, offset = threadIdx.x % ROW_THREADS * wide;
    // [deviations]
    uint4 shift = load_pack<E, WIDE>(x + first * d, first_column + offset, d), in[turns];
    for (int i = 0; i < turns; i++) {
        int64_t t = first + slot + i * SLOTS;
        in[i] = t < T ? load_pack<E, WIDE>(x + t * d, first_column + offset, d) : shift;
    }
    pack16<float> sum[wide / 4] = {}, square[wide / 4] = {}; // float32 by fours: 16-byte stores
    for (int i = 0; i < turns; i++)
        for (int c = 0; c < wide; c++) {
            float deviation = to_f32(unpack<E>(in[i]).at[c]) - to_f32(unpack<E>(shift).at[c]);
            sum[c / 4].at[c % 4] += deviation;
            square[c / 4].at[c % 4] = fmaf(deviation, deviation, square[c / 4].at[c % 4]);
        }
    // [/deviations]
    for (int i = 0; i < wide / 4; i++) {
        *(pack16<float> *)&part_sums[slot][offset + 4 * i] = sum[i];
        *(pack16<float> *)&part_squares[slot][offset + 4 * i] = square[i];
    }
    __syncthreads();

    int64_t column = first_column + threadIdx.x;
    if (threadIdx.x >= columns || column >= d)
        return;
    float all = 0, all_squares = 0;
    for (int s = 0; s < SLOTS; s++) {
        all += part_sums[s][threadIdx.x];
        all_squares += part_squares[s][threadIdx.x];
    }
    shifts[block * d + column] = to_f32(x[first * d + column]);
    sums[block * d + column] = all;
    squares[block * d + column] = all_squares;
}
// [/block-statistics]

// Every thread of a unit gets the sum over its slices, added in their order.
__device__ inline double sum_slices(double value) {
    __shared__ double parts[JOIN_SLICES][JOIN_UNITS];
    __syncthreads();
    parts[threadIdx.y][threadIdx.x] = value;
    __syncthreads();
    double sum = 0;
    for (int s = 0; s < JOIN_SLICES; s++)
        sum += parts[s][threadIdx.x];
    return sum;
}

// [join]
// The blocks' sums were taken around different shifts; moved to the common mean they can be added. For two blocks this
// is Chan's formula, for all of them at once it needs one division instead of one a block.
// Launch: 32 hidden units by 16 slices of the blocks. Shared memory: 4 KB. Traffic: 12 bytes for 64 elements of x.
__global__ void __launch_bounds__(JOIN_UNITS *JOIN_SLICES)
    join_kernel(int64_t T, int64_t d, router_scratch s, float *running_mean, float *running_var) {
    start_next_kernel();
    wait_for_kernel_before();
    int64_t h = (int64_t)blockIdx.x * JOIN_UNITS + threadIdx.x;
    int64_t column = h < d ? h : d - 1;
    // [common-mean]
    double origin = s.shifts[column], total = 0, around_mean = 0;
#pragma unroll 4
    for (int64_t block = threadIdx.y; block < s.blocks; block += JOIN_SLICES) {
        int64_t left = T - block * STATISTICS_TOKENS;
        double count = (double)(left < STATISTICS_TOKENS ? left : STATISTICS_TOKENS);
        total += count * (s.shifts[block * d + column] - origin) + s.sums[block * d + column];
    }
    double mean = origin + sum_slices(total) / (double)T;
#pragma unroll 4
    for (int64_t block = threadIdx.y; block < s.blocks; block += JOIN_SLICES) {
        int64_t left = T - block * STATISTICS_TOKENS;
        double count = (double)(left < STATISTICS_TOKENS ? left : STATISTICS_TOKENS);
        double step = s.shifts[block * d + column] - mean;
        around_mean += s.squares[block * d + column] + step * (2 * (double)s.sums[block * d + column] + count * step);
    }
    around_mean = sum_slices(around_mean);
    // [/common-mean]
    if (threadIdx.y > 0)
        return;
    if (h >= d) {
        s.norm.center[h] = s.norm.scale[h] = s.norm.offset[h] = 0;
        return;
    }
    if (running_mean) { // NULL where the forward pass has moved them: on the way back
        double keep = 1 - FMOE_NORM_MOMENTUM, unbiased = around_mean / (double)(T - 1);
        running_mean[h] = (float)(keep * running_mean[h] + FMOE_NORM_MOMENTUM * mean);
        running_var[h] = (float)(keep * running_var[h] + FMOE_NORM_MOMENTUM * unbiased);
    }
    set_norm(s.norm, h, mean, around_mean / (double)T);
}
// [/join]

// Launch: a thread a hidden unit. Shared memory: none. Traffic: 8 bytes read and 12 written a unit.
__global__ void running_kernel(int64_t d, router_norm norm, const float *running_mean, const float *running_var) {
    start_next_kernel();
    int64_t h = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; // below padded: a multiple of the block's size
    if (h < d)
        set_norm(norm, h, running_mean[h], running_var[h]);
    else
        norm.center[h] = norm.scale[h] = norm.offset[h] = 0;
}

template <typename E, bool WIDE>
static fmoe_status sum_blocks(const fmoe_router_args *args, router_scratch s, cudaStream_t stream) {
    int64_t column_blocks = ceil_div(args->d, ROW_THREADS * (int64_t)pack16<E>::count);
    statistics_kernel<E, WIDE><<<(unsigned)(s.blocks * column_blocks), ROW_THREADS * SLOTS, 0, stream>>>(
        args->T, args->d, (const E *)args->x, s.shifts, s.sums, s.squares);
    return launched("statistics_kernel");
}

fmoe_status router_set_norm(const fmoe_router_args *args, router_scratch s, bool overlap, cudaStream_t stream) {
    if (!args->training) {
        running_kernel<<<(unsigned)(s.padded / NORM_PAD), NORM_PAD, 0, stream>>>(args->d, s.norm, args->running_mean,
                                                                                 args->running_var);
        return launched("running_kernel");
    }
    WITH_DTYPE(args->dtype, E,
               TRY((rows_are_wide<E>(args->d) ? sum_blocks<E, true> : sum_blocks<E, false>)(args, s, stream)));
    dim3 threads(JOIN_UNITS, JOIN_SLICES);
    return launch_overlapping("join_kernel", overlap, join_kernel, (unsigned)(s.padded / JOIN_UNITS), threads, 0,
                              stream, args->T, args->d, s, args->running_mean, args->running_var);
}
