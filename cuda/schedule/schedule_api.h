/* The entry point of the schedule step. */
#ifndef FMOE_CUDA_SCHEDULE_API_H
#define FMOE_CUDA_SCHEDULE_API_H

#include "../../ref_cpu/fmoe.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Step: schedule (chapter 4) ---------------------------------------------------------------------------------- */

#define FMOE_CUDA_MAX_EXPERTS (1 << 22)

/* Expert-major order of the T·K pairs: offsets [N+1], pairs [T·K], rising within an expert. indices [T, K]: repeated
 * ones included. Notes bad indices: such a pair is in no expert's list, offsets[N] counts the good ones, and pairs from
 * there on are -1. N ≤ FMOE_CUDA_MAX_EXPERTS. */
fmoe_status fmoe_cuda_schedule(int64_t T, int64_t K, int64_t N, const int32_t *indices, int32_t *offsets,
                               int32_t *pairs, void *workspace, size_t workspace_bytes, void *stream);
size_t fmoe_cuda_schedule_workspace(int64_t T, int64_t K, int64_t N);

#ifdef __cplusplus
}
#endif
#endif
