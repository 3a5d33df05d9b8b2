/* Exercise 7.2, starter, right: the rung "cartesian rows" as it stands. Every group of a token and a grid row goes into
 * a tile, whether it has a hundred pairs or one. */
#include "7-strategies/exercises/earlier.h"

static fmoe_status mixed(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    const fmoe_expert_args *a = args;
    cartesian s;
    (void)workspace_bytes, (void)stream;
    lay_out_rows(a, workspace, &s);
    TRY(group_rows(a, &s));
    int64_t runs = (a->T + RUN - 1) / RUN;
    bool failed = false;
#pragma omp parallel reduction(|| : failed)
    {
        int64_t me = omp_get_thread_num();
        float *buffers = s.buffers + me * (1 + ROWS) * a->d;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t row = 0; row < s.b.count; row++)
            for (int64_t run = 0; run < runs; run++)
                failed |= row_run(a, &s, row, run, s.tiles + me * RUN * s.b.width,
                                  s.gemm_scratch + me * (int64_t)s.gemm_bytes) != FMOE_OK;
#pragma omp for schedule(dynamic, 8)
        for (int64_t t = 0; t < a->T; t++)
            token_output(a, t, s.activations + t * a->K, buffers);
    }
    return failed ? FMOE_BAD_WORKSPACE : FMOE_OK;
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "expert", .name = "rows", .run = mixed, .workspace = rows_workspace};
