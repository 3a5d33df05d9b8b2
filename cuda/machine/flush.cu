// Emptying the L2, so that a timed call finds its inputs where a real caller's would be: in memory.
#include "bench.cuh"

#define FLUSH_THREADS 512
#define FLUSH_BLOCKS  1024

// Reads the buffer once. Launch: up to 1,024 blocks of 512 threads, neighbours read neighbouring 16 bytes. Shared
// memory: none. Traffic: the buffer from memory, nothing written: what is written would stay in the L2 as lines that a
// later call must first put back. The compiler keeps the loads because their sum decides about a store; it happens only
// if the sum is one number in four billion, and `written` may then change by one bit that nobody reads.
// [flush]
static __global__ void __launch_bounds__(FLUSH_THREADS) read_all(const uint4 *buffer, size_t count, unsigned *written) {
    unsigned sum = 0;
    size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        uint4 v = __ldcg(buffer + i);
        sum ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == NEVER)
        *written = sum;
}
// [/flush]

extern "C" fmoe_status cuda_flush_l2(const void *buffer, size_t bytes, void *stream) {
    TRY(fmoe_check_pointer("buffer", buffer, (int64_t)bytes));
    size_t count = bytes / sizeof(uint4);
    if (count == 0)
        return FMOE_OK;
    int64_t blocks = ceil_div((int64_t)count, FLUSH_THREADS);
    read_all<<<(unsigned)(blocks < FLUSH_BLOCKS ? blocks : FLUSH_BLOCKS), FLUSH_THREADS, 0, (cudaStream_t)stream>>>(
        (const uint4 *)buffer, count, (unsigned *)buffer);
    return launched("read_all");
}
