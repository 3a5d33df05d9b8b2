// The MLP's checks, its workspace, and the choice among its rungs.
#include "mlp.cuh"

extern "C" size_t cuda_mlp_hidden_bytes(const void *arguments) {
    const fmoe_mlp_args *args = (const fmoe_mlp_args *)arguments;
    return (size_t)args->T * (size_t)args->I * fmoe_dtype_size(args->dtype);
}

// ---- What a rung takes

#define NAIVE_FLOPS 3e10 // about a tenth of a second

extern "C" bool cuda_mlp_is_small(const void *arguments) {
    const fmoe_mlp_args *args = (const fmoe_mlp_args *)arguments;
    return 6.0 * (double)args->T * (double)args->d * (double)args->I <= NAIVE_FLOPS;
}

extern "C" bool cuda_mlp_fits_int(const void *arguments) {
    const fmoe_mlp_args *args = (const fmoe_mlp_args *)arguments;
    return args->T <= INT32_MAX && args->d <= INT32_MAX && args->I <= INT32_MAX / 2;
}

// Rows of x, gate, up (d elements) and of down and the hidden units (I) that are multiples of `bytes`.
static bool rows_of(const fmoe_mlp_args *args, int64_t bytes) {
    int64_t size = (int64_t)fmoe_dtype_size(args->dtype);
    return args->d * size % bytes == 0 && args->I * size % bytes == 0;
}

// The library's products of gate and up are rounded before they meet, one rounding more than the error's limit has room
// for in few outputs.
extern "C" bool cuda_mlp_cublas_takes(const void *arguments) {
    const fmoe_mlp_args *args = (const fmoe_mlp_args *)arguments;
    return (args->dtype == FMOE_F32 || args->T * args->d >= 512) && cuda_mlp_fits_int(args);
}

extern "C" bool cuda_mlp_16_bit(const void *arguments) {
    const fmoe_mlp_args *args = (const fmoe_mlp_args *)arguments;
    return args->dtype != FMOE_F32 && rows_of(args, 16) && cuda_mlp_fits_int(args);
}

extern "C" bool cuda_mlp_few_rows(const void *arguments) {
    const fmoe_mlp_args *args = (const fmoe_mlp_args *)arguments;
    return args->T <= MLP_FEW_ROWS && rows_of(args, 16) && cuda_mlp_fits_int(args);
}

extern "C" bool cuda_mlp_fragments_take(const void *arguments) {
    const fmoe_mlp_args *args = (const fmoe_mlp_args *)arguments;
    return args->T <= MLP_FRAGMENT_TOKENS && args->dtype != FMOE_F32 && rows_of(args, 64) && cuda_mlp_fits_int(args);
}

extern "C" bool cuda_mlp_few(const void *arguments) {
    const fmoe_mlp_args *args = (const fmoe_mlp_args *)arguments;
    return args->T <= MLP_FEW_TOKENS && cuda_mlp_16_bit(args);
}

// ---- Checks

static fmoe_status check_sizes(const fmoe_mlp_args *args) {
    TRY(fmoe_check_tokens(args->T));
    TRY(fmoe_check_size("hidden_size", args->d));
    TRY(fmoe_check_size("intermediate_size", args->I));
    TRY(check_dtype(args->dtype));
    TRY(fmoe_check_shape("tokens", args->T, "hidden_size", args->d));
    TRY(fmoe_check_shape("intermediate_size", args->I, "hidden_size", args->d));
    return fmoe_check_shape("tokens", args->T, "intermediate_size", args->I);
}

fmoe_status mlp_check(const fmoe_mlp_args *args, const void *workspace, size_t bytes, size_t needed) {
    TRY(check_sizes(args));
    TRY(fmoe_check_pointer("x", args->x, args->T * args->d));
    TRY(fmoe_check_pointer("gate_proj.weight", args->gate, args->I * args->d));
    TRY(fmoe_check_pointer("up_proj.weight", args->up, args->I * args->d));
    TRY(fmoe_check_pointer("down_proj.weight", args->down, args->d * args->I));
    TRY(fmoe_check_pointer("y", args->y, args->T * args->d));
    return args->T == 0 ? FMOE_OK : check_workspace(workspace, bytes, needed);
}

fmoe_status mlp_check_rows(const fmoe_mlp_args *args, bool supported, const char *limits) {
    if (!supported)
        return fmoe_fail(FMOE_UNSUPPORTED, "%s with tokens = %lld, hidden_size = %lld, intermediate_size = %lld: %s",
                         fmoe_dtype_name(args->dtype), (long long)args->T, (long long)args->d, (long long)args->I,
                         limits);
    return FMOE_OK;
}

fmoe_status mlp_check_16_bit(const fmoe_mlp_args *args) {
    return mlp_check_rows(args, cuda_mlp_16_bit(args), "16-bit types and multiples of 8 only");
}

// ---- The choice

typedef struct {
    mlp_into *run;
    fmoe_workspace_fn *workspace;
} mlp_rung;

static bool by_fragments(const fmoe_mlp_args *args) {
    return cuda_mlp_fragments_take(args) && args->T > 1 && fmoe_cuda_level() >= LEVEL_ADVANCED;
}

bool mlp_by_rows(const fmoe_mlp_args *args) {
    return cuda_mlp_few_rows(args) && !by_fragments(args);
}

// [choice]
static mlp_rung best_rung(const fmoe_mlp_args *args) {
    int level = fmoe_cuda_level();
    if (by_fragments(args))
        return {mlp_fragments_into, cuda_mlp_hidden_bytes};
    if (mlp_by_rows(args))
        return {mlp_rows_into, cuda_mlp_hidden_bytes};
    if (cuda_mlp_few(args) && level >= LEVEL_HOPPER)
        return {mlp_few_tokens_into, cuda_mlp_hidden_bytes};
    if (cuda_mlp_16_bit(args) && level >= LEVEL_HOPPER)
        return {mlp_wgmma_into, cuda_mlp_wgmma_workspace};
    if (cuda_mlp_16_bit(args) && level >= LEVEL_ADVANCED)
        return {mlp_mma_sync_into, cuda_mlp_hidden_bytes};
    return {mlp_tiles_into, cuda_mlp_hidden_bytes};
}
// [/choice]

extern "C" fmoe_status cuda_mlp_into(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, size_t bytes,
                                     void *stream) {
    TRY(check_sizes(args));
    return best_rung(args).run(args, join, workspace, bytes, (cudaStream_t)stream);
}

extern "C" fmoe_status fmoe_cuda_mlp(int64_t T, int64_t d, int64_t I, fmoe_dtype dtype, const void *x, const void *gate,
                                     const void *up, const void *down, void *y, void *workspace, size_t workspace_bytes,
                                     void *stream) {
    fmoe_mlp_args args = {T, d, I, dtype, x, gate, up, down, y};
    return cuda_mlp_into(&args, NULL, workspace, workspace_bytes, stream);
}

extern "C" size_t fmoe_cuda_mlp_workspace(int64_t T, int64_t d, int64_t I, fmoe_dtype dtype) {
    fmoe_mlp_args args = {T, d, I, dtype, NULL, NULL, NULL, NULL, NULL};
    return check_sizes(&args) == FMOE_OK ? best_rung(&args).workspace(&args) : 0;
}
