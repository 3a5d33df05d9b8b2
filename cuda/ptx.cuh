// The instructions that CUDA C++ has no name for, one function each: asynchronous copies, tensor-core operands and
// products (sm_80), barriers in shared memory, bulk tensor copies and warpgroup products (sm_90a).
#ifndef FMOE_PTX_CUH
#define FMOE_PTX_CUH

#include "device.cuh"

#include <cuda.h>
#include <stdint.h>

// Which parts of a file a compilation for one architecture has.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define HAS_MMA_SYNC 1
#else
#define HAS_MMA_SYNC 0
#endif
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HAS_WGMMA 1
#else
#define HAS_WGMMA 0
#endif

template <typename E> struct is_bf16 { static constexpr bool value = false; };
template <> struct is_bf16<__nv_bfloat16> { static constexpr bool value = true; };

__device__ inline unsigned shared_address(const void *pointer) {
    return (unsigned)__cvta_generic_to_shared(pointer);
}

// ---- The special function unit's approximations: 1e-7 off, what would be denormal is 0 ----

__device__ inline float fast_exp2(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
__device__ inline float fast_reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// ---- sm_80: asynchronous copies to shared memory ----

// 16 bytes past the first-level cache; zeros where the source is outside.
__device__ inline void copy_async_16(void *shared, const void *global, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(inside ? 16 : 0)
                 : "memory");
}

// Closes a group of copies ...
__device__ inline void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// ... and waits until at most so many of this thread's latest groups are still under way.
template <int GROUPS> __device__ inline void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// ---- sm_80: tensor cores, a warp at a time ----

// Four 8×8 matrices of 16-bit elements: lanes 8i to 8i + 7 name the rows of matrix i, and part i of every lane gets two
// neighbours of row lane / 4, columns 2 (lane mod 4) and the next.
__device__ inline void load_matrices(unsigned (&parts)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The way back (sm_90): the same parts to the same rows.
__device__ inline void store_matrices(void *row, const unsigned (&parts)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(parts[0]), "r"(parts[1]), "r"(parts[2]), "r"(parts[3])
                 : "memory");
}

// sums [16 × 8] += a [16 × 16] · b [16 × 8]
template <typename E>
__device__ inline void mma_16x8x16(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    if constexpr (is_bf16<E>::value)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- sm_90: one kernel's start under the end of the one before ----

// Both do nothing before sm_90. The next kernel, launched to overlap, may start once every block has said so or has
// ended.
__device__ inline void start_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel before has ended and its stores can be seen. Returns at once in an ordinary launch.
__device__ inline void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Launches so if asked to (sm_90 on), otherwise after the kernel before has ended.
template <typename... Parameters, typename... Arguments>
static inline fmoe_status launch_overlapping(const char *name, bool overlap, void (*kernel)(Parameters...),
                                             unsigned blocks, dim3 threads, size_t shared, cudaStream_t stream,
                                             Arguments... arguments) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks, config.blockDim = threads;
    config.dynamicSmemBytes = shared, config.stream = stream;
    config.attrs = &early, config.numAttrs = overlap ? 1 : 0;
    cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
    return launched(name);
}

// ---- sm_90: barriers in shared memory that copies can complete ----

__device__ inline void barrier_init(uint64_t *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// After the inits: other threads and the copy engine see the barriers.
__device__ inline void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void barrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and the phase ends only after so many bytes were copied as well.
__device__ inline void barrier_arrive_expecting(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Until the phase of that parity (0, 1, 0, ...) has ended.
__device__ inline void barrier_wait(uint64_t *barrier, int parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

// Arrives at the barrier of the same place in block `rank` of the cluster.
__device__ inline void barrier_arrive_in(uint64_t *barrier, unsigned rank) {
    asm volatile("{\n"
                 ".reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
                 "}" ::"r"(shared_address(barrier)),
                 "r"(rank)
                 : "memory");
}

// Threads of some warps of a block wait for one another; barrier 0 is __syncthreads'.
__device__ inline void barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Arrives there and goes on.
__device__ inline void barrier_leave(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- Counters in memory by which blocks of a grid wait for each other (sm_70) ----

// Adds, after everything that this thread has stored or, through a barrier, has seen ...
__device__ inline void add_release(int *counter, int value) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// ... and waits for a sum, before everything that follows.
__device__ inline void wait_acquire(const int *counter, int sum) {
    int value;
    do
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    while (value < sum);
}

// ---- sm_90: clusters, blocks on neighbouring multiprocessors that reach one another's shared memory ----

__device__ inline unsigned cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of all blocks of the cluster.
__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\n"
                 "barrier.cluster.wait.aligned;" ::
                     : "memory");
}

// Four bytes to the same place in block `rank` of the cluster, completing on the barrier of the same place there.
__device__ inline void store_in_completing(int *place, int value, uint64_t *barrier, unsigned rank) {
    asm volatile("{\n"
                 ".reg .b32 there, done;\n"
                 "mapa.shared::cluster.u32 there, %0, %3;\n"
                 "mapa.shared::cluster.u32 done, %2, %3;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %1, [done];\n"
                 "}" ::"r"(shared_address(place)),
                 "r"(value), "r"(shared_address(barrier)), "r"(rank)
                 : "memory");
}

// ---- sm_90: copies by the copy engine, completing on a barrier ----

// The box whose corner is (column, row) of a matrix; what lies outside the matrix arrives as zeros.
__device__ inline void copy_box(void *shared, const CUtensorMap *map, int column, int row, uint64_t *barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
                 "[%4];" ::"r"(shared_address(shared)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
                 : "memory");
}

// The same into all blocks of the cluster that the mask's bits name, at the same place in each and completing on the
// barrier at the same place in each.
__device__ inline void copy_box_to_cluster(void *shared, const CUtensorMap *map, int column, int row, uint64_t *barrier,
                                           int mask) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
                 "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"((short)mask)
                 : "memory");
}

// The map will be used soon.
__device__ inline void expect_map(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of shared memory to a matrix; what would lie outside the matrix is left out. The thread that stored commits a
// group of boxes and waits: until at most so many groups still have to be read from shared memory, or until all is
// written.
__device__ inline void store_box(const CUtensorMap *map, int column, int row, const void *shared) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
                 "r"(row), "r"(shared_address(shared))
                 : "memory");
}
__device__ inline void store_box_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int GROUPS> __device__ inline void store_box_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(GROUPS) : "memory");
}
__device__ inline void store_box_wait() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// What this thread stored in shared memory by ordinary means, before the copy engine or wgmma reads it: then a barrier.
__device__ inline void shared_stores_done() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Between what the copy engine does in global memory and what ordinary instructions do there, on both sides: after
// store_box_wait, before others are told; and after being told, before the copies that read it.
__device__ inline void copies_and_others() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// A multiple of 16 bytes, both ends aligned to 16.
__device__ inline void copy_bulk(void *shared, const void *global, int bytes, uint64_t *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// ---- sm_90a: tensor cores, four warps at a time ----

// Orders the registers that were written before with the products that follow.
__device__ inline void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int GROUPS> __device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

// An operand in shared memory: rows of 64 16-bit elements along k, swizzled over 128 bytes (tile.cuh), its start at a
// multiple of 1,024 bytes; 8 rows are 1,024 bytes. k advances by 16 elements with + 2.
__device__ inline uint64_t wgmma_operand(const void *tile) {
    uint64_t address = (shared_address(tile) & 0x3ffff) >> 4, eight_rows = 1024 >> 4, swizzle_128 = 1;
    return address | 1ull << 16 | eight_rows << 32 | swizzle_128 << 62;
}

// The same with k from row to row: 64 rows of k, each 64 neighbours along the operand's other side, also swizzled over
// 128 bytes; the next 64 neighbours lie 8,192 bytes further. k advances by 16 with + 128.
__device__ inline uint64_t wgmma_operand_transposed(const void *tile) {
    uint64_t address = (shared_address(tile) & 0x3ffff) >> 4, eight_k = 1024 >> 4, panel = 8192 >> 4, swizzle_128 = 1;
    return address | panel << 16 | eight_k << 32 | swizzle_128 << 62;
}

// A warpgroup's registers a thread from now on; all its warps say so. The block as a whole must not get more than it
// was launched with.
template <int COUNT> __device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

#define WGMMA_8(s, i)                                                                                                  \
    "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), "+f"(s[i + 4]), "+f"(s[i + 5]), "+f"(s[i + 6]),        \
        "+f"(s[i + 7])
#define WGMMA_64x128x16(types, sums, a, b)                                                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." types " "                                              \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                             \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                    \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                    \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                   \
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;"                                                              \
                 : WGMMA_8(sums, 0), WGMMA_8(sums, 8), WGMMA_8(sums, 16), WGMMA_8(sums, 24), WGMMA_8(sums, 32),        \
                   WGMMA_8(sums, 40), WGMMA_8(sums, 48), WGMMA_8(sums, 56)                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// sums [64 × 128] += a [64 × 16] · bᵀ, b [128 × 16]: a in registers, warp w of the four has rows 16w to 16w + 15 as in
// mma_16x8x16; sums 4j to 4j + 3 are that product's for keys 8j to 8j + 7. Runs on after the instruction.
template <typename E> __device__ inline void wgmma_64x128x16(float (&sums)[64], const unsigned (&a)[4], uint64_t b) {
    if constexpr (is_bf16<E>::value)
        WGMMA_64x128x16("bf16.bf16", sums, a, b);
    else
        WGMMA_64x128x16("f16.f16", sums, a, b);
}

#define WGMMA_FROM_SHARED_128(types, sums, a, b, add, ta, tb)                                                          \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                                      \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." types " {"                                             \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                              \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                    \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                    \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                   \
                 "%64, %65, add, 1, 1, %67, %68;\n}"                                                                   \
                 : WGMMA_8(sums, 0), WGMMA_8(sums, 8), WGMMA_8(sums, 16), WGMMA_8(sums, 24), WGMMA_8(sums, 32),        \
                   WGMMA_8(sums, 40), WGMMA_8(sums, 48), WGMMA_8(sums, 56)                                             \
                 : "l"(a), "l"(b), "r"((int)(add)), "n"(ta), "n"(tb))
#define WGMMA_FROM_SHARED_256(types, sums, a, b, add, ta, tb)                                                          \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"                                                     \
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32." types " {"                                             \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                              \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                    \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                    \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                    \
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                    \
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                    \
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "        \
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "   \
                 "%128, %129, add, 1, 1, %131, %132;\n}"                                                               \
                 : WGMMA_8(sums, 0), WGMMA_8(sums, 8), WGMMA_8(sums, 16), WGMMA_8(sums, 24), WGMMA_8(sums, 32),        \
                   WGMMA_8(sums, 40), WGMMA_8(sums, 48), WGMMA_8(sums, 56), WGMMA_8(sums, 64), WGMMA_8(sums, 72),      \
                   WGMMA_8(sums, 80), WGMMA_8(sums, 88), WGMMA_8(sums, 96), WGMMA_8(sums, 104), WGMMA_8(sums, 112),    \
                   WGMMA_8(sums, 120)                                                                                  \
                 : "l"(a), "l"(b), "r"((int)(add)), "n"(ta), "n"(tb))

// sums [64 × N] += a [64 × 16] · bᵀ, b [N × 16], both in shared memory, N = 128 or 256; without add the sums start from
// nothing. Laid out as above. Runs on after the instruction.
template <typename E, bool A_TRANSPOSED, bool B_TRANSPOSED, int SUMS>
__device__ inline void wgmma_from_shared(float (&sums)[SUMS], uint64_t a, uint64_t b, bool add) {
    static_assert(SUMS == 64 || SUMS == 128, "N is 128 or 256");
    if constexpr (is_bf16<E>::value && SUMS == 128)
        WGMMA_FROM_SHARED_256("bf16.bf16", sums, a, b, add, A_TRANSPOSED, B_TRANSPOSED);
    else if constexpr (is_bf16<E>::value)
        WGMMA_FROM_SHARED_128("bf16.bf16", sums, a, b, add, A_TRANSPOSED, B_TRANSPOSED);
    else if constexpr (SUMS == 128)
        WGMMA_FROM_SHARED_256("f16.f16", sums, a, b, add, A_TRANSPOSED, B_TRANSPOSED);
    else
        WGMMA_FROM_SHARED_128("f16.f16", sums, a, b, add, A_TRANSPOSED, B_TRANSPOSED);
}

// After wgmma_wait: the compiler must not read the sums before it.
template <int SUMS> __device__ inline void wgmma_arrived(float (&sums)[SUMS]) {
    for (int i = 0; i < SUMS; i++)
        asm volatile("" : "+f"(sums[i])::"memory");
}

#endif
