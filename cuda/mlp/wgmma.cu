// Rung: warpgroup products, fed by the copy engine, and the hidden units between them are written once. Both products
// are one kernel (both.cuh) where their tiles are many; otherwise two, and the second may share out its depth. Two also
// where `join` gives them a part of the multiprocessors: then the second is launched while the first ends.
#include "../../chapters/workspace.h"
#include "both.cuh"
#include "mlp.cuh"

// ---- Plan ----

#define MOST_PARTS 16

// Tiles of 128 × 256, or of 128 × 128 where the wide ones are too few for the GPU.
typedef struct {
    product_work work;
    bool narrow;
} wgmma_product;

typedef struct {
    wgmma_product hidden, output;
    bool both;     // in one kernel
    int clusters;  // at once, if so
    void *h;       // [T, I]
    float *parts;  // [output.work.splits, T, d], if there are several; or of both_job
    int *counters; // of both_job
} wgmma_plan;

// [fours]
// Where others gather from the L2 at the same time, blocks share B in clusters of four, if that makes no more tiles: a
// quarter less is read from there.
static void cluster_fours(wgmma_product *product) {
    product_work &work = product->work;
    if (!product->narrow && work.cluster == 2 && product_tiles_down(work) % 2 == 0)
        work.cluster = 4, work.band /= 2;
}
// [/fours]

static wgmma_product cheaper(const product_work &wide, const product_work &narrow) {
    bool is_narrow = product_clocks(narrow, 128) < product_clocks(wide, 256);
    return {is_narrow ? narrow : wide, is_narrow};
}

// The workspace has room for as many clusters as there can be, whatever `join` asks for.
static void carve_both(wgmma_plan *plan, void *workspace, size_t *used) {
    both_job most = both_job_of(plan->hidden.work, plan->output.work);
    most.split = min(multiprocessors() / 2, most.output.tiles);
    plan->parts = (float *)carve(workspace, used, (size_t)most.split * BOTH_PART * sizeof(float));
    plan->counters = (int *)carve(workspace, used, (size_t)both_counters(most) * sizeof(int));
}

static wgmma_plan wgmma_plan_of(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, size_t *used) {
    int64_t T = args->T, d = args->d, I = args->I;
    int blocks = join && join->blocks > 0 ? join->blocks : multiprocessors();
    wgmma_plan plan = {};
    product_work hidden = product_plan(T, I, d, 256, 1);
    hidden.paired = true;
    plan.hidden = cheaper(hidden, hidden);
    plan.output = cheaper(product_plan(T, d, I, 256, MOST_PARTS), product_plan(T, d, I, 128, MOST_PARTS));
    plan.hidden.work.blocks = plan.output.work.blocks = blocks;
    plan.clusters = blocks / 2;
    plan.h = carve(workspace, used, (size_t)(T * I) * 2);
    bool both = hidden.cluster == 2 && !plan.hidden.narrow && !plan.output.narrow && plan.output.work.splits == 1;
    plan.both = both && !(join && (join->ready || join->blocks > 0)) && plan.clusters > 0;
    if (join && join->blocks > 3)
        cluster_fours(&plan.hidden), cluster_fours(&plan.output);
    if (!plan.both)
        plan.hidden.work.early = product_last_band(plan.hidden.work, plan.hidden.narrow ? 128 : 256);
    if (both) {
        carve_both(&plan, workspace, used);
        return plan;
    }
    size_t parts = plan.output.work.splits > 1 ? (size_t)plan.output.work.splits : 0;
    plan.parts = (float *)carve(workspace, used, parts * (size_t)(T * d) * sizeof(float));
    return plan;
}

// [hidden]
// h = silu(x · gateᵀ) ⊙ (x · upᵀ): one product whose tiles have as many columns of gate as of up.
template <typename E, int COLUMNS>
static fmoe_status describe_hidden(const fmoe_mlp_args *args, const wgmma_plan &plan, product_maps *maps,
                                   store_swiglu<E> *epilogue) {
    int64_t T = args->T, d = args->d, I = args->I;
    int cluster = plan.hidden.work.cluster;
    TRY(describe_a<false>("x", &maps->a[0], args->dtype, args->x, T, d, d));
    TRY((describe_b<false, COLUMNS>("gate_proj.weight", &maps->b[0], args->dtype, args->gate, I, d, d, cluster)));
    TRY((describe_b<false, COLUMNS>("up_proj.weight", &maps->b[1], args->dtype, args->up, I, d, d, cluster)));
    return describe_matrix("the hidden units", &epilogue->h, args->dtype, plan.h, T, I, 64);
}

template <typename E, int COLUMNS>
static fmoe_status hidden_units(const fmoe_mlp_args *args, const wgmma_plan &plan, cudaStream_t stream) {
    product_maps maps = {};
    store_swiglu<E> epilogue = {};
    TRY((describe_hidden<E, COLUMNS>(args, plan, &maps, &epilogue)));
    return product_launch<E, COLUMNS, false, false>("the hidden units' product_kernel", plan.hidden.work, maps,
                                                    epilogue, false, stream);
}
// [/hidden]

// [output]
// y = h · downᵀ + add. Where the tiles of y are too few for the GPU, several blocks share one, each a part of the sum,
// and a last kernel adds the parts in order.
template <typename E, int COLUMNS>
static fmoe_status describe_output(const fmoe_mlp_args *args, const wgmma_plan &plan, product_maps *maps) {
    int64_t T = args->T, d = args->d, I = args->I;
    TRY(describe_a<false>("the hidden units", &maps->a[0], args->dtype, plan.h, T, I, I));
    return describe_b<false, COLUMNS>("down_proj.weight", &maps->b[0], args->dtype, args->down, d, I, I,
                                      plan.output.work.cluster);
}

template <typename E, int COLUMNS>
static fmoe_status output(const fmoe_mlp_args *args, const mlp_join *join, const wgmma_plan &plan,
                          cudaStream_t stream) {
    int64_t T = args->T, d = args->d;
    const product_work &work = plan.output.work;
    product_addend addend = {mlp_add(join), true};
    product_maps maps = {};
    float *sum = join ? join->sum : NULL;
    bool overlap;
    TRY((describe_output<E, COLUMNS>(args, plan, &maps)));
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
static fmoe_status both(const fmoe_mlp_args *args, const mlp_join *join, const wgmma_plan &plan, cudaStream_t stream) {
    int T = (int)args->T, d = (int)args->d;
    both_job job = both_job_of(plan.hidden.work, plan.output.work);
    both_maps maps = {};
    store_swiglu<E> hidden = {};
    job.counters = plan.counters, job.parts = plan.parts;
    both_share(&job, plan.clusters);
    TRY((describe_hidden<E, 256>(args, plan, &maps.hidden, &hidden)));
    TRY((describe_output<E, 256>(args, plan, &maps.output)));
    if (join && join->sum)
        return both_launch<E>(job, maps, hidden, store_sums{join->sum, T, d}, plan.clusters, stream);
    store_rounded<E> rounded = {{}, {mlp_add(join), true}, T, d};
    TRY(describe_matrix("y", &rounded.to, args->dtype, args->y, T, d, 64));
    return both_launch<E>(job, maps, hidden, rounded, plan.clusters, stream);
}

template <typename E>
static fmoe_status run(const fmoe_mlp_args *args, const mlp_join *join, const wgmma_plan &plan, cudaStream_t stream) {
    if (plan.both)
        return both<E>(args, join, plan, stream);
    TRY((plan.hidden.narrow ? hidden_units<E, 128> : hidden_units<E, 256>)(args, plan, stream));
    return (plan.output.narrow ? output<E, 128> : output<E, 256>)(args, join, plan, stream);
}

fmoe_status mlp_wgmma_into(const fmoe_mlp_args *args, const mlp_join *join, void *workspace, size_t bytes,
                           cudaStream_t stream) {
    size_t used = 0;
    TRY(mlp_check(args, workspace, bytes, 0));
    TRY(mlp_check_16_bit(args));
    wgmma_plan plan = wgmma_plan_of(args, join, workspace, &used);
    TRY(check_workspace(workspace, bytes, used));
    if (args->T == 0)
        return FMOE_OK;
    return args->dtype == FMOE_F16 ? run<__half>(args, join, plan, stream)
                                   : run<__nv_bfloat16>(args, join, plan, stream);
}

extern "C" size_t cuda_mlp_wgmma_workspace(const void *arguments) {
    size_t used = 0;
    wgmma_plan_of((const fmoe_mlp_args *)arguments, NULL, NULL, &used);
    return used;
}

extern "C" fmoe_status cuda_mlp_wgmma(const void *arguments, void *workspace, size_t bytes, void *stream) {
    return mlp_wgmma_into((const fmoe_mlp_args *)arguments, NULL, workspace, bytes, (cudaStream_t)stream);
}
