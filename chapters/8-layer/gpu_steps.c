/* Where the layer's time goes on the GPU: a step's share is what the layer takes longer when it goes on to that step's
 * end. So each step finds in the caches what the ones before it have left there. */
#include "gpu_steps.h"

#include "../../cuda/layer/layer.h"
#include "../device.h"

#define STEPS 4

static const char *const names[STEPS] = {"router", "topk", "expert", "mlp"};

/* Nothing is compared here. */
static fmoe_status no_reference(fmoe_problem *p) {
    (void)p;
    return FMOE_OK;
}

static void show(const fmoe_problem *p, const fmoe_timing *until) {
    enum { BAR = 40 };
    printf("\nwhere the time goes  %s  (%s, one replay)\n", p->c.name, fmoe_device_get()->name);
    printf("  %-8s %10s %7s\n", "step", "median ms", "share");
    for (int i = 0; i < STEPS; i++) {
        double before = i > 0 ? until[i - 1].median_ms : 0, all = until[STEPS - 1].median_ms;
        double ms = until[i].median_ms > before ? until[i].median_ms - before : 0, share = ms / all;
        printf("  %-8s %10.4f %6.1f%%  %.*s\n", names[i], ms, 100 * share, (int)(share * BAR + 0.5),
               "########################################");
        fmoe_timing step = {.median_ms = ms, .min_ms = ms, .max_ms = ms, .runs = until[i].runs};
        fmoe_csv_row("layer_step", p->c.name, names[i], LEVEL_CORE, BACKEND_CUDA, p->c.dtype, step, 0, (fmoe_work){0});
    }
    printf("  %-8s %10.4f\n", "in turn", until[STEPS - 1].median_ms);
}

static fmoe_status time_steps(const fmoe_problem *p) {
    fmoe_timing until[STEPS];
    for (int i = 0; i < STEPS; i++) {
        fmoe_progress("%s: up to %s", p->c.name, names[i]);
        fmoe_status status = fmoe_device_time(&cuda_layer_until[i], p, &until[i]);
        if (status != FMOE_OK)
            return status;
    }
    fmoe_progress("%s", "");
    show(p, until);
    return FMOE_OK;
}

int gpu_steps(const char *case_name) {
    static fmoe_step step;
    fmoe_case c;
    fmoe_problem p = {0};
    if (!fmoe_device_get()->present)
        return 0;
    step = fmoe_step_layer;
    step.reference = no_reference;
    fmoe_status status = fmoe_case_parse(case_name, &c);
    if (status == FMOE_OK)
        status = fmoe_problem_new(&step, &c, fmoe_opt.seed, &p);
    if (status == FMOE_OK)
        status = time_steps(&p);
    if (status != FMOE_OK)
        fprintf(stderr, "%s: %s: %s\n", case_name, fmoe_status_name(status), fmoe_error_message());
    fmoe_problem_free(&p);
    return status == FMOE_OK ? 0 : 2;
}
