/* Files for kernels that live elsewhere (Triton, PyTorch, JAX): a case with its inputs and expected results, gradients
 * included, written as safetensors; and a file in which somebody filled in results, checked.
 *
 * Metadata: step, case, seed. Tensors: in.NAME as stored; expected.NAME, in float32 where it is a float; out.NAME, the
 * results to check, in float32 or in the case's type. Names and shapes are those of steps.h. A step's gradients belong
 * to the same inputs and to in.dy (or in.dweights, in.dlogits, whose name says what they are gradients of). */
#ifndef FMOE_VERIFY_H
#define FMOE_VERIFY_H

#include "chapter.h"

/* A step at a case and, where it has them, its gradients, on the same inputs (verify_case.c). */
typedef struct {
    const fmoe_step *step;
    int count;
    fmoe_problem parts[2];
} verify_case;

fmoe_status verify_case_new(const fmoe_step *step, const fmoe_case *c, uint64_t seed, verify_case *v);
void verify_case_free(verify_case *v);
/* The argument as an input (what it is before a run) or as an output, and the part it belongs to. NULL: there is none.
 * What the way back keeps from the forward pass is neither: it can be computed. */
const fmoe_argument *verify_find(const verify_case *v, const char *name, bool output, const fmoe_problem **part);
bool verify_is_input(const verify_case *v, int part, const fmoe_argument *a);

/* The status to exit with: 0, 1 if a result is over its limit, 2 if the file cannot be used. case_name may be NULL: the
 * chapter's first quick case, or what the file says. */
int verify_dump(const fmoe_chapter *chapter, const char *path, const char *case_name);
int verify_file(const fmoe_chapter *chapter, const char *path, const char *case_name);

#endif
