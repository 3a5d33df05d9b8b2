// The shared MLP's way back: the entry point, the checks and the workspace of all rungs.
//
//   dh = dy · down     dp = dh ⊙ silu'(p) ⊙ q     dq = dh ⊙ silu(p)     h = silu(p) ⊙ q
//   dx = dp · gate + dq · up     dgate = dpᵀ · x     dup = dqᵀ · x     ddown = dyᵀ · h
//
// Six products as large as the forward pass's three, between operands that lie either way round.
#include "mlp_backward.cuh"

#include "../../chapters/workspace.h"

size_t mlp_backward_lay_out(mlp_backward_task *a, int parts, void *workspace) {
    size_t used = 0, bytes = (size_t)a->T * (size_t)a->I * fmoe_dtype_size(a->middle);
    a->dp = carve(workspace, &used, bytes);
    a->dq = carve(workspace, &used, bytes);
    if (a->made) {
        a->h = carve(workspace, &used, bytes);
        a->h_by_p = carve(workspace, &used, bytes);
        a->h_by_q = carve(workspace, &used, bytes);
    }
    a->parts = (float *)carve(workspace, &used, (size_t)parts * (size_t)(a->T * a->d) * sizeof(float));
    return used;
}

// ---- Checks

static fmoe_status check_sizes(int64_t T, int64_t d, int64_t I, fmoe_dtype dtype) {
    TRY(fmoe_check_tokens(T));
    TRY(fmoe_check_size("hidden_size", d));
    TRY(fmoe_check_size("intermediate_size", I));
    TRY(check_dtype(dtype));
    TRY(fmoe_check_shape("tokens", T, "hidden_size", d));
    TRY(fmoe_check_shape("intermediate_size", I, "hidden_size", d));
    return fmoe_check_shape("tokens", T, "intermediate_size", I);
}

static fmoe_status check(const fmoe_mlp_backward_args *a) {
    TRY(check_sizes(a->T, a->d, a->I, a->dtype));
    TRY(fmoe_check_pointer("x", a->x, a->T * a->d));
    TRY(fmoe_check_pointer("gate_proj.weight", a->gate, a->I * a->d));
    TRY(fmoe_check_pointer("up_proj.weight", a->up, a->I * a->d));
    TRY(fmoe_check_pointer("down_proj.weight", a->down, a->d * a->I));
    TRY(fmoe_check_pointer("dy", a->dy, a->T * a->d));
    if (!a->h && !a->h_by_p && !a->h_by_q)
        return FMOE_OK;
    TRY(fmoe_check_pointer("h", a->h, a->T * a->I));
    TRY(fmoe_check_pointer("h_by_p", a->h_by_p, a->T * a->I));
    return fmoe_check_pointer("h_by_q", a->h_by_q, a->T * a->I);
}

static mlp_backward_task task_of(const fmoe_mlp_backward_args *a) {
    mlp_backward_task task = {};
    task.T = a->T, task.d = a->d, task.I = a->I, task.dtype = a->dtype;
    task.x = a->x, task.gate = a->gate, task.up = a->up, task.down = a->down, task.dy = a->dy;
    task.h = a->h, task.h_by_p = a->h_by_p, task.h_by_q = a->h_by_q, task.made = !a->h;
    task.dx = a->dx, task.dgate = a->dgate, task.dup = a->dup, task.ddown = a->ddown;
    return task;
}

fmoe_status mlp_backward_from_args(const void *args, mlp_backward_task *task) {
    TRY(check((const fmoe_mlp_backward_args *)args));
    *task = task_of((const fmoe_mlp_backward_args *)args);
    return FMOE_OK;
}

extern "C" size_t cuda_mlp_backward_f32_bytes(const void *args) {
    mlp_backward_task task = task_of((const fmoe_mlp_backward_args *)args);
    task.middle = FMOE_F32;
    return mlp_backward_lay_out(&task, 0, NULL);
}

extern "C" size_t cuda_mlp_backward_wgmma_bytes(const void *args) {
    mlp_backward_task task = task_of((const fmoe_mlp_backward_args *)args);
    task.middle = task.dtype;
    return mlp_backward_lay_out(&task, mlp_backward_parts(task), NULL);
}

// ---- No tokens

static fmoe_status clear(const mlp_backward_task &a, void *gradient, cudaStream_t stream) {
    size_t bytes = (size_t)(a.d * a.I) * (a.wide ? sizeof(float) : fmoe_dtype_size(a.dtype));
    return gradient && !a.accumulate ? cuda_call("clearing a gradient", cudaMemsetAsync(gradient, 0, bytes, stream))
                                     : FMOE_OK;
}

fmoe_status mlp_backward_no_tokens(const mlp_backward_task &a, cudaStream_t stream) {
    TRY(clear(a, a.dgate, stream));
    TRY(clear(a, a.dup, stream));
    return clear(a, a.ddown, stream);
}

// ---- The entry point

extern "C" bool cuda_mlp_backward_16_bit(const void *args) {
    const fmoe_mlp_backward_args *a = (const fmoe_mlp_backward_args *)args;
    return a->dtype != FMOE_F32 && a->d % 8 == 0 && a->I % 8 == 0 && a->T <= INT32_MAX / 2 && a->d <= INT32_MAX / 2 &&
           a->I <= INT32_MAX / 4;
}

static bool by_warpgroups(const fmoe_mlp_backward_args *args) {
    return cuda_mlp_backward_16_bit(args) && fmoe_cuda_level() >= LEVEL_HOPPER;
}

extern "C" fmoe_status fmoe_cuda_mlp_backward(int64_t T, int64_t d, int64_t I, fmoe_dtype dtype, const void *x,
                                              const void *gate, const void *up, const void *down, const void *h,
                                              const void *h_by_p, const void *h_by_q, const void *dy, fmoe_write write,
                                              fmoe_dtype gradient_dtype, void *dx, void *dgate, void *dup, void *ddown,
                                              void *workspace, size_t workspace_bytes, void *stream) {
    fmoe_mlp_backward_args args = {T, d, I, dtype, x, gate, up, down, h, h_by_p, h_by_q, dy, dx, dgate, dup, ddown};
    mlp_backward_task task;
    TRY(mlp_backward_from_args(&args, &task));
    if (gradient_dtype != dtype && gradient_dtype != FMOE_F32)
        return fmoe_fail(FMOE_UNSUPPORTED, "gradient_dtype = %d is neither dtype = %s nor f32", (int)gradient_dtype,
                         fmoe_dtype_name(dtype));
    task.accumulate = write == FMOE_ACCUMULATE, task.wide = task.wide_dx = gradient_dtype != dtype;
    return by_warpgroups(&args) ? mlp_backward_wgmma(&task, workspace, workspace_bytes, (cudaStream_t)stream)
                                : mlp_backward_tiles(&task, workspace, workspace_bytes, (cudaStream_t)stream);
}

extern "C" size_t fmoe_cuda_mlp_backward_workspace(int64_t T, int64_t d, int64_t I, fmoe_dtype dtype, bool kept) {
    fmoe_mlp_backward_args args = {};
    if (check_sizes(T, d, I, dtype) != FMOE_OK) // fmoe_cuda_mlp_backward says what is wrong
        return 0;
    args.T = T, args.d = d, args.I = I, args.dtype = dtype;
    args.h = kept ? &args : NULL; // any pointer will do
    return by_warpgroups(&args) ? cuda_mlp_backward_wgmma_bytes(&args) : cuda_mlp_backward_f32_bytes(&args);
}
