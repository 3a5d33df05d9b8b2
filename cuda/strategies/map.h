/* What chapter 7's crossover map asks of the GPU: each strategy's time at one number of tokens and of experts a token.
 */
#ifndef FMOE_CUDA_STRATEGIES_MAP_H
#define FMOE_CUDA_STRATEGIES_MAP_H

#include "../../chapters/chapter.h"
#include "strategies.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CUDA_MAP_RUNS  9
#define CUDA_MAP_CHECK 4 /* tokens whose output is compared with the reference's */

/* Holds what all cells share: random tokens and tables in bfloat16, which are drawn on the device. */
typedef struct cuda_map cuda_map;
fmoe_status cuda_map_open(int64_t most_tokens, int64_t d, int64_t N, cuda_map **map);
void cuda_map_close(cuda_map *map);

typedef struct {
    bool fits[CUDA_NUM_STRATEGIES];
    fmoe_timing timing[CUDA_NUM_STRATEGIES]; /* as performance is measured everywhere, of CUDA_MAP_RUNS calls */
    double error[CUDA_NUM_STRATEGIES];       /* over CUDA_MAP_CHECK tokens */
    cuda_strategy choice;
} cuda_map_cell;

/* logits [2, T, n] on the host, of whose pairs each token takes the K best; NULL: every index is drawn uniformly. */
fmoe_status cuda_map_measure(cuda_map *map, int64_t T, int64_t K, const float *logits, cuda_map_cell *cell);

#ifdef __cplusplus
}
#endif
#endif
