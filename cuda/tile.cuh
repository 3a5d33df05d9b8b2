// What kernels that multiply tiles share: where an element lies in a swizzled tile, and how the host describes a matrix
// to the copy engine.
#ifndef FMOE_TILE_CUH
#define FMOE_TILE_CUH

#include "ptx.cuh"

// [swizzle]
// A tile of 16-bit elements has rows of 64, 128 bytes: all 32 banks. Eight rows read at the same column would meet in
// the same four banks, so the eight 16-byte pieces of row r change places: piece p lies where p xor (r mod 8) would.
// The copy engine writes tiles so when it is asked for its 128-byte swizzle, and wgmma reads them so.
#define TILE_DEPTH 64 // elements of k in a tile's row

__device__ inline int tile_at(int row, int piece) {
    return row * TILE_DEPTH + ((piece ^ (row & 7)) * 8);
}
// [/swizzle]

// The 16 × 16 elements at (row, 16 · step) of a swizzled tile as the left operand of mma_16x8x16 ...
template <typename E> __device__ inline void load_left(unsigned (&parts)[4], const E *tile, int row, int step) {
    int lane = threadIdx.x % WARP;
    load_matrices(parts, tile + tile_at(row + lane % 16, 2 * step + lane / 16));
}

// ... and as two right operands: parts 0 and 1 are rows (keys) row to row + 7, parts 2 and 3 the eight after them.
template <typename E> __device__ inline void load_right(unsigned (&parts)[4], const E *tile, int row, int step) {
    int lane = threadIdx.x % WARP;
    load_matrices(parts, tile + tile_at(row + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
}

// Two neighbours rounded to the storage type, packed as the tensor cores take and give them.
template <typename E> __device__ inline unsigned round_pair(float a, float b) {
    if constexpr (is_bf16<E>::value) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
        return *(unsigned *)&pair;
    } else {
        __half2 pair = __floats2half2_rn(a, b);
        return *(unsigned *)&pair;
    }
}

// ---- Host: a matrix [rows, columns] of 16-bit elements for copy_box and store_box, in boxes of box_rows × 64 ----

// The copy engine wants rows that start at multiples of 16 bytes, so `pitch`, the elements from row to row, is a
// multiple of 8. cuTensorMapEncodeTiled belongs to the driver, which the program is not linked with: the runtime knows
// where it is.
typedef CUresult encode_tensor_map_fn(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                      const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                      CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// fetch: how much at once the L2 asks memory for.
static inline fmoe_status describe_part(const char *name, CUtensorMap *map, fmoe_dtype dtype, const void *matrix,
                                        int64_t rows, int64_t columns, int64_t pitch, int box_rows,
                                        CUtensorMapL2promotion fetch) {
    void *encode = NULL;
    cudaDriverEntryPointQueryResult found;
    TRY(cuda_call("cuTensorMapEncodeTiled", cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000,
                                                                             cudaEnableDefault, &found)));
    if (!encode)
        return fmoe_fail(FMOE_UNSUPPORTED, "the driver has no cuTensorMapEncodeTiled");
    cuuint64_t sizes[] = {(cuuint64_t)columns, (cuuint64_t)rows}, bytes[] = {(cuuint64_t)pitch * 2};
    cuuint32_t box[] = {TILE_DEPTH, (cuuint32_t)box_rows}, steps[] = {1, 1};
    CUresult result = ((encode_tensor_map_fn *)encode)(
        map, dtype == FMOE_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, (void *)matrix,
        sizes, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, fetch,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? FMOE_OK
                                  : fmoe_fail(FMOE_CUDA, "cuTensorMapEncodeTiled of %s: error %d", name, (int)result);
}

static inline fmoe_status describe_matrix(const char *name, CUtensorMap *map, fmoe_dtype dtype, const void *matrix,
                                          int64_t rows, int64_t columns, int box_rows) {
    return describe_part(name, map, dtype, matrix, rows, columns, columns, box_rows,
                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}

#endif
