/* Figures: gnuplot scripts of plots/, drawn from the chapter's CSV, in the terminal and as an SVG beside the CSV. */
#include "program.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Text inside a single-quoted string of gnuplot inside a double-quoted one of the shell: only harmless characters. */
static bool is_plain(const char *text) {
    return strspn(text, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/._-+ ,:()²·") == strlen(text);
}

static bool have_gnuplot(void) {
    return system("command -v gnuplot >/dev/null 2>&1") == 0;
}

/* svg is "" for the terminal. False if gnuplot failed. */
static bool run_script(const fmoe_chapter *chapter, const char *script, const char *csv, const char *svg) {
    char command[2048], ops[256] = "";
    for (const fmoe_ladder *ladder = chapter->ladders; ladder && ladder->step; ladder++) {
        size_t used = strlen(ops);
        snprintf(ops + used, sizeof ops - used, "%s%s", used ? " " : "", ladder->step->op);
    }
    snprintf(command, sizeof command,
             "LC_ALL=C.UTF-8 gnuplot -e \"csv='%s'; svg='%s'; ops='%s'; title='Chapter %d: %s'\" plots/%s 2>&1", csv,
             svg, ops, chapter->number, chapter->title, script);
    return system(command) == 0;
}

/* build/results/chapter3.csv and "-gather" make build/results/chapter3-gather.svg. */
static void svg_path(const char *csv, const char *suffix, char *svg, size_t size) {
    size_t length = strlen(csv);
    if (length > 4 && !strcmp(csv + length - 4, ".csv"))
        length -= 4;
    snprintf(svg, size, "%.*s%s.svg", (int)length, csv, suffix);
}

static void draw(const fmoe_chapter *chapter, const char *script, const char *csv, const char *suffix) {
    char svg[512], path[512];
    svg_path(csv, suffix, svg, sizeof svg);
    snprintf(path, sizeof path, "plots/%s", script);
    if (access(path, R_OK)) {
        printf("No %s here (run from the repository's root): its figure is skipped.\n", path);
        return;
    }
    fflush(stdout);
    if (run_script(chapter, script, csv, "") && run_script(chapter, script, csv, svg))
        printf("figure:       %s\n", svg);
    else
        printf("gnuplot could not draw %s from %s.\n", path, csv);
}

void draw_chapter(const fmoe_chapter *chapter, const char *csv_path) {
    if (!have_gnuplot()) {
        printf("gnuplot is not installed: figures are skipped.\n");
        return;
    }
    if (!is_plain(csv_path) || !is_plain(chapter->title)) {
        printf("'%s' has characters that gnuplot's command line does not take: figures are skipped.\n", csv_path);
        return;
    }
    if (chapter->ladders && chapter->ladders->step)
        draw(chapter, "ladder.gp", csv_path, "");
    if (chapter->gnuplot) {
        char suffix[64];
        snprintf(suffix, sizeof suffix, "-%.*s", (int)strcspn(chapter->gnuplot, "."), chapter->gnuplot);
        draw(chapter, chapter->gnuplot, csv_path, suffix);
    }
}
