/* Golden files: a layer's inputs and weights with results computed elsewhere, in float64, from the same stored values.
 *
 * Metadata: num_experts_per_tok, norm_topk_prob, training; batch, seq_len, hidden_size, intermediate_size, num_experts
 * and hidden_act if the file has them. Tensors: x [..., d]; the weights under their state-dict names; the running
 * buffers, with ".before" appended or not. Results, each optional: y, router_logits, scores, indices,
 * router_norm.running_mean.after and running_var.after; and from dy (optional): dx and grad.<weight>.
 *
 * A file of router logits alone (num_experts_per_tok in its metadata) has its top-k checked against all n² pairs. */
#ifndef FMOE_GOLDEN_H
#define FMOE_GOLDEN_H

#include "../ref_cpu/fmoe.h"

typedef struct {
    char name[64], shape[64];
    double error, limit;
    bool ok;
    char note[128]; /* what the error is, where it is not the usual one; or "" */
} golden_line;

typedef struct {
    char configuration[256];
    int num_lines;
    golden_line lines[24];
} golden_report;

/* Runs the reference forward and backward on the file and compares with every result that the file holds. A result
 * over its limit is a line that is not ok; a file that cannot be used is a status with a message. */
fmoe_status golden_check(const char *path, golden_report *report);

/* The same for a file that is open already. */
fmoe_status golden_check_file(const fmoe_file *file, const char *path, golden_report *report);

bool golden_passed(const golden_report *report);

#endif
