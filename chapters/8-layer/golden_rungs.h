/* --golden FILE --backend cuda. */
#ifndef FMOE_GOLDEN_RUNGS_H
#define FMOE_GOLDEN_RUNGS_H

/* Runs every rung of the layer's GPU ladder on a golden file and compares with the file's results: a line a rung. Of a
 * file of router logits alone, every rung of the top-k's, against the reference's choice.
 * 0 if all are within their limits, 1 if one is not, 2 if there is no GPU or the file is bad. */
int golden_rungs(const char *path);

#endif
