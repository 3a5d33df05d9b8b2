/* Chapter 0: your machine. */
#include "machine.h"

#include "../device.h"
#include "../program.h"

#include <stdlib.h>
#include <string.h>

static bool only_ceilings;

static bool option(int argc, char **argv, int *i) {
    (void)argc;
    if (!strcmp(argv[*i], "--slug")) {
        puts(fmoe_device_get()->present ? fmoe_device_get()->slug : machine_slug());
        exit(0);
    }
    only_ceilings = !strcmp(argv[*i], "--ceilings");
    return only_ceilings;
}

static int before(void) {
    show_ceilings();
    show_gpu_ceilings();
    if (only_ceilings)
        return 0;
    show_timing();
    show_gpu_timing();
    show_error();
    show_floor();
    return 0;
}

int main(int argc, char **argv) {
    fmoe_chapter chapter = {
        .number = 0,
        .title = "your machine: timing, ceilings, error, floors",
        .before = before,
        .option = option,
        .option_help =
            "  --ceilings       only measure the ceilings\n"
            "  --slug           only print the name of this machine's folder, or of its GPU's, under plots/data\n",
        .gnuplot = "gather.gp",
    };
    return fmoe_chapter_main(&chapter, argc, argv);
}
