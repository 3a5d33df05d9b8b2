/* Four strategies for one expert step, and the rule that chooses between them (chapter 7). */
#ifndef FMOE_STRATEGIES_H
#define FMOE_STRATEGIES_H

#include "../steps.h"

typedef enum {
    STRATEGY_TOKEN,  /* a row of either table a pair, token by token (chapter 1) */
    STRATEGY_EXPERT, /* the same pairs, expert by expert (chapters 4 and 5) */
    STRATEGY_DENSE,  /* every token with every expert, the chosen pairs picked from the tiles */
    STRATEGY_ROWS,   /* a token with all n experts of each grid row that it chose from, then as by token */
    NUM_STRATEGIES
} strategy;

extern const char *const strategy_names[NUM_STRATEGIES]; /* "token", ...: the rungs' names too */

/* What the model says a strategy costs, in microseconds of one core. Finite, positive for T > 0. */
double strategy_cost_us(strategy s, const fmoe_expert_args *a);

/* The cheapest by the model; of equals the first. Depends on T, N, K, d, dtype and from_router, and on nothing else:
 * not on the indices, not on the number of threads, not on the machine's mood. So the same call takes the same way,
 * and gives the same bits, every time. */
strategy strategy_choose(const fmoe_expert_args *a);

/* The model's guess of how many of the n grid rows hold a token's K experts. */
double strategy_rows_a_token(const fmoe_expert_args *a);

/* What Cartesian rows counts while it groups: (token, grid row) groups and the products of a token with an expert that
 * their dense tiles hold. The workspace is cartesian_rows's. */
typedef struct {
    int64_t groups, products;
} row_counts;
fmoe_status count_rows(const fmoe_expert_args *a, void *workspace, row_counts *counts);

fmoe_rung_fn dense_under_a_mask, cartesian_rows, chooser;
fmoe_workspace_fn dense_workspace, rows_workspace, chooser_workspace;

#endif
