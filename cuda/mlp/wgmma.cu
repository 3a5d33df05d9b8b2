// Rung: warpgroup products, fed by the copy engine: two kernels, and the hidden units between them are written once.
#include "../../chapters/workspace.h"
#include "../product.cuh"
#include "mlp.cuh"

// [swiglu]
// silu(p) · q of two pairs. The special function unit, 8 clocks an instruction, is what the epilogue waits for, so two
// values share one reciprocal: 1/a = b · 1/(ab). The bound keeps ab finite and is not reached by any p whose silu a
// 16-bit sum could see. All of it is off by 2e-7 or so: no digit of a 16-bit type.
__device__ inline void swiglu_two(const float *p, const float *q, float *h) {
    float a = 1 + fast_exp2(fminf(p[0] * -1.44269504f, 60)), b = 1 + fast_exp2(fminf(p[1] * -1.44269504f, 60));
    float r = fast_reciprocal(a * b);
    h[0] = p[0] * q[0] * (b * r);
    h[1] = p[1] * q[1] * (a * r);
}

// A thread's first sums are gate's, and the others up's in the same places: no value has to move. h is rounded once,
// which the second product's operand must be anyway.
template <typename E> struct store_swiglu {
    static constexpr int STAGING = 2 * PRODUCT_PANEL * 2;
    CUtensorMap h; // in boxes of 64 rows

    template <int SUMS> __device__ void operator()(const product_place &at, float (&sums)[SUMS], char *staging) const {
        float parts[SUMS / 64][32];
#pragma unroll
        for (int i = 0; i < SUMS / 2; i += 2)
            swiglu_two(sums + i, sums + SUMS / 2 + i, parts[i / 32] + i % 32);
        store_panels(at, &h, at.column, parts, (E *)staging);
    }
};
// [/swiglu]

// ---- Plan ----

#define MOST_PARTS 16

// Tiles of 128 × 256, or of 128 × 128 where the wide ones are too few for the GPU.
typedef struct {
    product_work work;
    bool narrow;
} wgmma_product;

typedef struct {
    wgmma_product hidden, output;
    void *h;      // [T, I]
    float *parts; // [output.work.splits, T, d], if there are several
} wgmma_plan;

static wgmma_product cheaper(const product_work &wide, const product_work &narrow) {
    bool is_narrow = product_clocks(narrow, 128) < product_clocks(wide, 256);
    return {is_narrow ? narrow : wide, is_narrow};
}

static wgmma_plan wgmma_plan_of(const fmoe_mlp_args *args, int blocks, void *workspace, size_t *used) {
    int64_t T = args->T, d = args->d, I = args->I;
    wgmma_plan plan;
    product_work hidden = product_plan(T, I, d, 256, 1);
    hidden.paired = true;
    plan.hidden = cheaper(hidden, hidden);
    plan.output = cheaper(product_plan(T, d, I, 256, MOST_PARTS), product_plan(T, d, I, 128, MOST_PARTS));
    plan.hidden.work.blocks = plan.output.work.blocks = blocks;
    plan.output.work.ready = product_early(&plan.hidden.work, plan.hidden.narrow ? 128 : 256);
    size_t parts = plan.output.work.splits > 1 ? (size_t)plan.output.work.splits : 0;
    plan.h = carve(workspace, used, (size_t)(T * I) * 2);
    plan.parts = (float *)carve(workspace, used, parts * (size_t)(T * d) * sizeof(float));
    return plan;
}

// [hidden]
// h = silu(x · gateᵀ) ⊙ (x · upᵀ): one product whose tiles have as many columns of gate as of up.
template <typename E, int COLUMNS>
static fmoe_status hidden_units(const fmoe_mlp_args *args, const wgmma_plan &plan, cudaStream_t stream) {
    int64_t T = args->T, d = args->d, I = args->I;
    product_maps maps = {};
    store_swiglu<E> epilogue = {};
    TRY(describe_a<false>("x", &maps.a[0], args->dtype, args->x, T, d, d));
    TRY((describe_b<false, COLUMNS>("gate_proj.weight", &maps.b[0], args->dtype, args->gate, I, d, d)));
    TRY((describe_b<false, COLUMNS>("up_proj.weight", &maps.b[1], args->dtype, args->up, I, d, d)));
    TRY(describe_matrix("the hidden units", &epilogue.h, args->dtype, plan.h, T, I, 64));
    return product_launch<E, COLUMNS, false, false>("the hidden units' product_kernel", plan.hidden.work, maps,
                                                    epilogue, false, stream);
}
// [/hidden]

// [output]
// y = h · downᵀ + add. Where the tiles of y are too few for the GPU, several blocks share one, each a part of the sum,
// and a last kernel adds the parts in order.
template <typename E, int COLUMNS>
static fmoe_status output(const fmoe_mlp_args *args, const mlp_join *join, const wgmma_plan &plan,
                          cudaStream_t stream) {
    int64_t T = args->T, d = args->d, I = args->I;
    const product_work &work = plan.output.work;
    product_addend addend = {mlp_add(join), true};
    product_maps maps = {};
    float *sum = join ? join->sum : NULL;
    bool overlap;
    TRY(describe_a<false>("the hidden units", &maps.a[0], args->dtype, plan.h, T, I, I));
    TRY((describe_b<false, COLUMNS>("down_proj.weight", &maps.b[0], args->dtype, args->down, d, I, I)));
    TRY(mlp_wait(join, stream, &overlap));
    if (work.splits > 1 || sum) {
        store_sums sums = {work.splits > 1 ? plan.parts : sum, (int)T, (int)d};
        TRY((product_launch<E, COLUMNS, false, false>("the sums' product_kernel", work, maps, sums, overlap, stream)));
        if (work.splits == 1)
            return FMOE_OK;
        return sum ? add_parts(plan.parts, work.splits, T * d, addend, sum, true, stream)
                   : add_parts(plan.parts, work.splits, T * d, addend, (E *)args->y, true, stream);
    }
    store_rounded<E> epilogue = {{}, addend, (int)T, (int)d};
    TRY(describe_matrix("y", &epilogue.to, args->dtype, args->y, T, d, 64));
    return product_launch<E, COLUMNS, false, false>("the output's product_kernel", work, maps, epilogue, overlap,
                                                    stream);
}
// [/output]

template <typename E>
static fmoe_status run(const fmoe_mlp_args *args, const mlp_join *join, const wgmma_plan &plan, cudaStream_t stream) {
    TRY((plan.hidden.narrow ? hidden_units<E, 128> : hidden_units<E, 256>)(args, plan, stream));
    return (plan.output.narrow ? output<E, 128> : output<E, 256>)(args, join, plan, stream);
}

fmoe_status mlp_wgmma_into(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, size_t bytes,
                           cudaStream_t stream) {
    size_t used = 0;
    TRY(mlp_check(args, workspace, bytes, 0));
    TRY(mlp_check_16_bit(args));
    wgmma_plan plan = wgmma_plan_of(args, join ? join->blocks : 0, workspace, &used);
    TRY(check_workspace(workspace, bytes, used));
    if (args->T == 0)
        return FMOE_OK;
    return args->dtype == FMOE_F16 ? run<__half>(args, join, plan, stream)
                                   : run<__nv_bfloat16>(args, join, plan, stream);
}

extern "C" size_t cuda_mlp_wgmma_workspace(const void *arguments) {
    size_t used = 0;
    wgmma_plan_of((const fmoe_mlp_args *)arguments, 0, NULL, &used);
    return used;
}

extern "C" fmoe_status cuda_mlp_wgmma(const void *arguments, void *workspace, size_t bytes, void *stream) {
    return mlp_wgmma_into((const fmoe_mlp_args *)arguments, NULL, workspace, bytes, (cudaStream_t)stream);
}
