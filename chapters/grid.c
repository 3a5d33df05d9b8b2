/* The test grid of every step, for plugins: sizes that fill no tile, no tokens, one of everything, skewed routings. The
 * names go without a storage type; each is tried in all that the plugin takes. */
#include "doors.h"
#include "program.h"

#include "../ref_cpu/check.h"

#include <math.h>
#include <string.h>

typedef struct {
    const char *op;
    bool typed; /* the step's tensors come in three storage types */
    const char *cases[16];
} grid;

static const grid grids[] = {
    {"router",
     true,
     {"T0-d7-n3", "T0-d7-n3-train", "T1-d72-n33", "T3-d7-n13", "T65-d7-n13-train", "T29-d72-n13-train",
      "T130-d1000-n1-train", "T67-d1000-n5", "T520-d33-n20", "T257-d64-n128-train", "T193-d16-n320-train"}},
    {"topk",
     true,
     {"T0-n3-K2-normal", "T29-n13-K6-normal-norm", "T3-n2-K4-normal", "T3-n13-K169-normal", "T5-n128-K64-normal",
      "T3-n128-K64-normal-norm", "T2-n320-K512-normal-norm", "T1-n320-K17-normal", "T1-n65-K4225-normal",
      "T2-n129-K65-normal", "T64-n128-K64-trained"}},
    {"schedule",
     false,
     {"T0-N9-K3-uniform", "T1-N1-K1-uniform", "T5-N4-K4-uniform", "T29-N170-K6-normal", "T300-N1000-K64-uniform",
      "T300-N1000-K64-hot", "T40-N70000-K2-uniform", "T1023-N300-K2-hot", "T64-N257-K4-normal", "T4097-N3-K1-hot",
      "T500-N16384-K64-trained"}},
    {"expert",
     true,
     {"T0-d7-N5-K2-uniform", "T1-d64-N64-K8-normal", "T3-d33-N9-K9-uniform", "T5-d17-N3-K3-hot",
      "T13-d33-N17-K17-uniform", "T29-d72-N170-K6-normal", "T29-d72-N170-K6-hot", "T241-d5-N99-K40-uniform",
      "T2-d300-N259-K100-uniform", "T600-d16-N7-K2-hot", "T7-d130-N1000-K20-uniform", "T64-d16-N16384-K64-trained"}},
    {"mlp",
     true,
     {"T0-d7-I5", "T1-d64-I33", "T3-d33-I72", "T7-d72-I7", "T8-d257-I100", "T16-d100-I33", "T64-d72-I100",
      "T65-d100-I257", "T6-d300-I600", "T33-d1-I40"}},
    {"layer",
     true,
     {"T0-d3-I2-N9-K2-normal", "T3-d13-I5-N12-K9-normal-norm", "T4-d33-I17-N50-K6-normal", "T1-d72-I100-N170-K6-normal",
      "T2-d72-I100-N170-K6-normal-norm", "T64-d24-I9-N64-K8-normal-train-norm", "T65-d24-I9-N64-K8-normal-train",
      "T67-d31-I40-N300-K5-normal-train", "T131-d16-I33-N36-K20-normal-norm"}},
    {"router_backward",
     true,
     {"T0-d7-n3-train", "T1-d72-n33", "T65-d7-n13-train", "T29-d72-n13", "T130-d200-n1-train", "T520-d33-n20",
      "T300-d72-n128-train", "T257-d64-n128"}},
    {"topk_backward",
     true,
     {"T0-n3-K2-normal", "T3-n5-K1-normal-norm", "T7-n13-K6-normal", "T7-n13-K6-normal-norm",
      "T29-n17-K289-normal-norm", "T5-n40-K100-normal-norm", "T64-n33-K16-normal", "T64-n128-K64-trained"}},
    {"expert_backward",
     true,
     {"T0-d7-N5-K2-uniform", "T3-d33-N9-K9-uniform", "T29-d72-N170-K6-normal", "T29-d72-N170-K6-hot",
      "T257-d17-N7-K2-hot", "T1030-d9-N3-K1-hot", "T40-d16-N600-K3-uniform", "T7-d130-N1000-K20-uniform",
      "T64-d16-N16384-K64-trained"}},
    {"mlp_backward",
     true,
     {"T0-d5-I7", "T1-d40-I33", "T3-d33-I17", "T13-d40-I33", "T65-d17-I100", "T30-d66-I35", "T100-d33-I50"}},
    {"layer_forward_backward",
     true,
     {"T0-d5-I4-N9-K2-normal-train", "T29-d72-I50-N170-K6-normal-train-norm", "T29-d72-I50-N170-K6-normal-train",
      "T29-d72-I50-N170-K6-normal-norm", "T40-d65-I33-N100-K100-normal-train", "T300-d20-I17-N26-K5-normal"}},
};

const char *const *grid_cases(const char *op, bool *typed) {
    static const char *const none[] = {NULL};
    for (size_t i = 0; i < sizeof grids / sizeof *grids; i++)
        if (!strcmp(grids[i].op, op)) {
            *typed = grids[i].typed;
            return grids[i].cases;
        }
    *typed = false;
    return none;
}

/* A case that cannot be drawn here (trained routing, when its file is not) is not the plugin's fault. */
static door_result check_case(plugin *p, const fmoe_step *step, const char *name) {
    fmoe_case c;
    fmoe_problem problem;
    fmoe_status status = fmoe_case_parse(name, &c);
    if (status == FMOE_OK)
        status = fmoe_problem_new(step, &c, fmoe_opt.seed, &problem);
    if (status != FMOE_OK) {
        door_result r = {.verdict = DOOR_NO_CASE};
        snprintf(r.why, sizeof r.why, "%.390s", fmoe_error_message());
        return r;
    }
    door_result r = plugin_check(p, &problem, false);
    fmoe_problem_free(&problem);
    return r;
}

/* A kernel that hangs at three cases in a row is not waited for at all the others. */
enum { PATIENCE = 3 };

static door_result give_up(void) {
    door_result r = {.verdict = DOOR_GONE, .error = INFINITY};
    snprintf(r.why, sizeof r.why, "not tried: the last %d cases ended its process", PATIENCE);
    return r;
}

static bool is_failure(door_verdict verdict) {
    return verdict != DOOR_RIGHT && verdict != DOOR_UNSUPPORTED && verdict != DOOR_NO_CASE;
}

int plugin_grid(plugin *p, const fmoe_step *step, grid_visitor *each, void *context) {
    bool typed;
    int failed = 0, gone = 0;
    for (const char *const *name = grid_cases(step->op, &typed); *name; name++)
        for (fmoe_dtype dtype = FMOE_F32; dtype <= (typed ? FMOE_BF16 : FMOE_F32); dtype++) {
            char full[96];
            snprintf(full, sizeof full, "%s-%s", *name, fmoe_dtype_name(dtype));
            fmoe_progress("%s: %s", p->about.name, full);
            door_result r = gone < PATIENCE ? check_case(p, step, full) : give_up();
            fmoe_progress("%s", "");
            gone = r.verdict == DOOR_GONE ? gone + 1 : 0;
            failed += is_failure(r.verdict);
            each(full, &r, context);
        }
    return failed;
}
