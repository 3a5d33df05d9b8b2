/* A table's lines: one a rung, the same columns for what is measured here and for what was recorded elsewhere. */
#include "program.h"

#include <math.h>
#include <string.h>

static bool has_library;

/* "×" takes one column of the terminal and two bytes, so the header is typed out rather than padded. */
void table_header(const char *base, bool library) {
    has_library = library;
    printf("  %-22s %-8s %12s   × before  %*s× %s%s   of floor   error\n", "rung", "level", "median ms",
           9 - (int)strlen(base), "", base, library ? "  × library" : "");
}

/* A number that may be unknown, right-aligned. */
static void ratio(double value, int width) {
    if (!(value > 0) || isinf(value))
        printf("%*s", width, "-");
    else if (value >= 999.5)
        printf("%*.0f", width, value);
    else
        printf("%*.*f", width, value >= 9.995 ? 1 : value >= 0.0995 ? 2 : 3, value);
}

void table_line(const table_row *row) {
    printf("  %-22s %-8s %12.4f", row->name, row->level, row->ms);
    ratio(row->before_ms / row->ms, 11);
    ratio(row->base_ms / row->ms, 13);
    if (has_library)
        ratio(row->library_ms / row->ms, 11);
    double share = 100 * row->floor_ms / row->ms;
    if (share > 0)
        printf("%9.*f %%", share < 9.95, share);
    else
        printf("%11s", "-");
    char error[16] = "-";
    if (isfinite(row->error))
        snprintf(error, sizeof error, row->error > 0 ? "%.1e" : "0", row->error);
    printf("   %-7s %s\n", error, row->verdict);
}

void table_note(const char *name, const char *level, const char *note) {
    printf("  %-22s %-8s   %s\n", name, level, note);
}
