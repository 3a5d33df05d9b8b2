/* Exercise 7.1, solution: the prices as measured on one core, and a third one, for the tiles of a grid row. */
#include "7-strategies/exercises/earlier.h"

/* Nanoseconds of one core. */
static const double ns_element = 0.22;        /* of a gathered row, multiplied and added */
static const double ns_operation = 0.010;     /* of a tile of all experts */
static const double ns_row_operation = 0.012; /* of a tile of one grid row, whose tokens are gathered */

static strategy choose(const fmoe_expert_args *a) {
    double T = (double)a->T, N = (double)a->N, K = (double)a->K, d = (double)a->d, n = (double)fmoe_num_keys(a->N);
    double token = 2 * T * K * d * ns_element;
    double dense = 4 * T * N * d * ns_operation;
    double rows = 2 * T * strategy_rows_a_token(a) * n * d * ns_row_operation + T * K * d * ns_element;
    return token <= dense && token <= rows ? STRATEGY_TOKEN : dense <= rows ? STRATEGY_DENSE : STRATEGY_ROWS;
}

static fmoe_status chosen_way(const void *args, void *workspace, size_t workspace_bytes, void *stream) {
    return strategies[choose(args)].run(args, workspace, workspace_bytes, stream);
}

static size_t needed(const void *args) {
    return strategies[choose(args)].workspace(args);
}

const fmoe_plugin fmoe_plugin_rung = {
    .version = FMOE_STEPS_VERSION, .step = "expert", .name = "my chooser", .run = chosen_way, .workspace = needed};
