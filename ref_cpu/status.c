/* Statuses, messages, and the checks of arguments that every step makes before it touches memory. */
#include "check.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static _Thread_local char message[512];

const char *fmoe_error_message(void) {
    return message;
}

fmoe_status fmoe_fail(fmoe_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return status;
}

const char *fmoe_status_name(fmoe_status status) {
    switch (status) {
    case FMOE_OK:
        return "ok";
    case FMOE_NULL_POINTER:
        return "null pointer";
    case FMOE_BAD_SIZE:
        return "bad size";
    case FMOE_BAD_TOPK:
        return "bad top-k";
    case FMOE_OVERFLOW:
        return "overflow";
    case FMOE_BATCH_OF_ONE:
        return "batch of one";
    case FMOE_BAD_INDEX:
        return "bad index";
    case FMOE_UNSUPPORTED:
        return "unsupported";
    case FMOE_OUT_OF_MEMORY:
        return "out of memory";
    case FMOE_BAD_WORKSPACE:
        return "bad workspace";
    case FMOE_IO:
        return "input/output";
    case FMOE_BAD_FILE:
        return "bad file";
    case FMOE_CUDA:
        return "cuda";
    }
    return "unknown status";
}

fmoe_status fmoe_check_size(const char *name, int64_t value) {
    if (value < 1)
        return fmoe_fail(FMOE_BAD_SIZE, "%s = %lld is below 1", name, (long long)value);
    return FMOE_OK;
}

fmoe_status fmoe_check_tokens(int64_t T) {
    if (T < 0)
        return fmoe_fail(FMOE_BAD_SIZE, "tokens = %lld is below 0", (long long)T);
    return FMOE_OK;
}

fmoe_status fmoe_check_topk(int64_t K, const char *limit_name, int64_t limit) {
    if (K < 1)
        return fmoe_fail(FMOE_BAD_TOPK, "num_experts_per_tok = %lld is below 1", (long long)K);
    if (K > limit)
        return fmoe_fail(FMOE_BAD_TOPK, "num_experts_per_tok = %lld exceeds %s = %lld", (long long)K, limit_name,
                         (long long)limit);
    return FMOE_OK;
}

fmoe_status fmoe_check_shape(const char *row_name, int64_t rows, const char *column_name, int64_t columns) {
    if (rows > FMOE_MAX_ELEMENTS / columns)
        return fmoe_fail(FMOE_OVERFLOW, "%s × %s = %lld × %lld exceeds %lld elements", row_name, column_name,
                         (long long)rows, (long long)columns, (long long)FMOE_MAX_ELEMENTS);
    return FMOE_OK;
}

fmoe_status fmoe_check_pairs(int64_t T, int64_t K) {
    if (T > 0 && K > 0 && T > INT32_MAX / K)
        return fmoe_fail(FMOE_OVERFLOW, "tokens × num_experts_per_tok = %lld × %lld exceeds %lld, the largest position",
                         (long long)T, (long long)K, (long long)INT32_MAX);
    return FMOE_OK;
}

fmoe_status fmoe_check_pointer(const char *name, const void *pointer, int64_t count) {
    if (!pointer && count > 0)
        return fmoe_fail(FMOE_NULL_POINTER, "%s is NULL and should hold %lld elements", name, (long long)count);
    return FMOE_OK;
}

fmoe_status fmoe_check_experts(int64_t N) {
    TRY(fmoe_check_size("num_experts", N));
    if (N > INT32_MAX)
        return fmoe_fail(FMOE_OVERFLOW, "num_experts = %lld exceeds %lld, the largest 32-bit index", (long long)N,
                         (long long)INT32_MAX);
    return FMOE_OK;
}

fmoe_status fmoe_check_indices(int64_t T, int64_t K, const int32_t *indices, const char *limit_name, int64_t limit) {
    for (int64_t i = 0; i < T * K; i++)
        if (indices[i] < 0 || indices[i] >= limit)
            return fmoe_fail(FMOE_BAD_INDEX, "indices[%lld, %lld] = %d is outside [0, %s = %lld)", (long long)(i / K),
                             (long long)(i % K), indices[i], limit_name, (long long)limit);
    return FMOE_OK;
}

void *fmoe_allocate(int64_t count, size_t size) {
    return malloc(count > 0 ? (size_t)count * size : 1);
}

fmoe_status fmoe_no_memory(int64_t count, size_t size) {
    return fmoe_fail(FMOE_OUT_OF_MEMORY, "no memory for %lld temporary elements of %zu bytes", (long long)count, size);
}

double fmoe_dot(int64_t count, const float *a, const float *b) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++)
        sum += (double)a[i] * b[i];
    return sum;
}
