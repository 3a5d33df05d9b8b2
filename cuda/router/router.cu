// The router's checks, its workspace, and the choice among its rungs.
#include "router.cuh"

#include "../../chapters/workspace.h"

router_scratch router_carve(const fmoe_router_args *args, bool stores_x_hat, void *workspace, size_t *used) {
    router_scratch s;
    s.padded = ceil_div(args->d, NORM_PAD) * NORM_PAD;
    s.blocks = args->training ? ceil_div(args->T, STATISTICS_TOKENS) : 0;
    size_t row = (size_t)args->d * sizeof(float), partials = row * (size_t)s.blocks;
    s.norm.center = (float *)carve(workspace, used, (size_t)s.padded * sizeof(float));
    s.norm.scale = (float *)carve(workspace, used, (size_t)s.padded * sizeof(float));
    s.norm.offset = (float *)carve(workspace, used, (size_t)s.padded * sizeof(float));
    s.shifts = (float *)carve(workspace, used, partials);
    s.sums = (float *)carve(workspace, used, partials);
    s.squares = (float *)carve(workspace, used, partials);
    s.x_hat = (float *)carve(workspace, used, stores_x_hat ? row * (size_t)args->T : 0);
    return s;
}

static size_t bytes_of(const void *arguments, bool stores_x_hat) {
    size_t used = 0;
    router_carve((const fmoe_router_args *)arguments, stores_x_hat, NULL, &used);
    return used;
}

extern "C" size_t cuda_router_x_hat_bytes(const void *args) {
    return bytes_of(args, true);
}

extern "C" size_t cuda_router_bytes(const void *args) {
    return bytes_of(args, false);
}

extern "C" bool cuda_router_16_bit(const void *arguments) {
    const fmoe_router_args *args = (const fmoe_router_args *)arguments;
    return args->dtype != FMOE_F32 && args->d % 8 == 0 && args->T <= INT32_MAX && args->d <= INT32_MAX &&
           args->n <= INT32_MAX / 2;
}

static fmoe_status check_sizes(const fmoe_router_args *args) {
    TRY(fmoe_check_tokens(args->T));
    TRY(fmoe_check_size("hidden_size", args->d));
    TRY(fmoe_check_size("num_keys", args->n));
    TRY(check_dtype(args->dtype));
    TRY(fmoe_check_shape("tokens", args->T, "hidden_size", args->d));
    TRY(fmoe_check_shape("num_keys", args->n, "hidden_size", args->d));
    TRY(fmoe_check_shape("tokens", args->T, "num_keys", args->n));
    if (args->training && args->T == 1)
        return fmoe_fail(FMOE_BATCH_OF_ONE, "tokens = 1 is below 2, which the unbiased variance needs in training");
    return FMOE_OK;
}

fmoe_status router_check(const fmoe_router_args *args, const void *workspace, size_t bytes, size_t needed) {
    TRY(check_sizes(args));
    TRY(fmoe_check_pointer("x", args->x, args->T * args->d));
    TRY(fmoe_check_pointer("router_gate.weight", args->gate, 2 * args->n * args->d));
    TRY(fmoe_check_pointer("router_norm.running_mean", args->running_mean, args->d));
    TRY(fmoe_check_pointer("router_norm.running_var", args->running_var, args->d));
    TRY(fmoe_check_pointer("router_logits", args->logits, 2 * args->T * args->n));
    return args->T == 0 ? FMOE_OK : check_workspace(workspace, bytes, needed);
}

fmoe_status router_check_16_bit(const fmoe_router_args *args) {
    if (!cuda_router_16_bit(args))
        return fmoe_fail(FMOE_UNSUPPORTED, "%s with hidden_size = %lld: 16-bit types and multiples of 8 only",
                         fmoe_dtype_name(args->dtype), (long long)args->d);
    return FMOE_OK;
}

// The rungs' order of preference; all of them need the same workspace.
static fmoe_rung_fn *best_rung(const fmoe_router_args *args) {
    int level = cuda_router_16_bit(args) ? fmoe_cuda_level() : LEVEL_CORE;
    return level >= LEVEL_HOPPER ? cuda_router_wgmma : level >= LEVEL_ADVANCED ? cuda_router_split : cuda_router_tiles;
}

extern "C" fmoe_status fmoe_cuda_router(bool training, int64_t T, int64_t d, int64_t n, fmoe_dtype dtype, const void *x,
                                        const void *gate, float *running_mean, float *running_var, float *logits,
                                        float *log_probs, void *workspace, size_t workspace_bytes, void *stream) {
    fmoe_router_args args = {T, d, n, training, dtype, x, gate, running_mean, running_var, logits, log_probs};
    TRY(check_sizes(&args));
    return best_rung(&args)(&args, workspace, workspace_bytes, stream);
}

extern "C" size_t fmoe_cuda_router_workspace(bool training, int64_t T, int64_t d, int64_t n, fmoe_dtype dtype) {
    fmoe_router_args args = {};
    args.T = T, args.d = d, args.n = n, args.training = training, args.dtype = dtype;
    return check_sizes(&args) == FMOE_OK ? cuda_router_bytes(&args) : 0;
}
