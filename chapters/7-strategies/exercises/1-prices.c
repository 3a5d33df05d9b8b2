/* Exercise 7.1, starter, right: a chooser of three strategies by two prices. They are those of a machine with tensor
 * cores, where an operation of a tile costs a hundredth of an element of a gathered row. */
#include "7-strategies/exercises/earlier.h"

/* Nanoseconds of one core. */
static const double ns_element = 0.05;     /* of a gathered row, multiplied and added */
static const double ns_operation = 0.0005; /* of a dense tile */

static strategy choose(const fmoe_expert_args *a) {
    double T = (double)a->T, N = (double)a->N, K = (double)a->K, d = (double)a->d, n = (double)fmoe_num_keys(a->N);
    double token = 2 * T * K * d * ns_element;
    double dense = 4 * T * N * d * ns_operation;
    double rows = 2 * T * strategy_rows_a_token(a) * n * d * ns_operation + T * K * d * ns_element;
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
