/* A table's lines: one a rung, the same columns for what is measured here and for what was recorded elsewhere. */
#include "program.h"

#include <math.h>
#include <string.h>

/* "×" takes one column of the terminal and two bytes, so the header is typed out rather than padded. */
void table_header(const char *base) {
    printf("  %-22s %-8s %12s   × before %11s%s  × library   of floor   error\n", "rung", "level", "median ms", "× ",
           base);
}

/* A number that may be unknown, right-aligned. */
static void ratio(double value, int width) {
    if (!(value > 0) || isinf(value))
        printf("%*s", width, "-");
    else if (value >= 999.5)
        printf("%*.0f", width, value);
    else if (value >= 9.995)
        printf("%*.1f", width, value);
    else
        printf("%*.2f", width, value);
}

void table_line(const table_row *row) {
    printf("  %-22s %-8s %12.4f", row->name, row->level, row->ms);
    ratio(row->before_ms / row->ms, 11);
    ratio(row->base_ms / row->ms, 13);
    ratio(row->library_ms / row->ms, 11);
    double share = 100 * row->floor_ms / row->ms;
    if (share > 0)
        printf("%9.*f %%", share < 9.95, share);
    else
        printf("%11s", "-");
    if (isfinite(row->error))
        printf("   %.1e", row->error);
    printf("%s%s\n", isfinite(row->error) ? " " : "   ", row->verdict);
}

void table_note(const char *name, const char *level, const char *note) {
    printf("  %-22s %-8s   %s\n", name, level, note);
}
