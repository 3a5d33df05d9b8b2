/* --predict: whoever guesses before looking learns more from the figure. */
#include "program.h"

#include <stdlib.h>
#include <string.h>

static struct {
    char rung[64];
    double guess_ms, measured_ms;
} guesses[64];
static int num_guesses;
static bool ended; /* no more input */

/* "12", "12 ms" or "3x" (over the rung before). 0 if it is none of them. */
static double read_guess(const char *text, double before_ms) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || !(value > 0))
        return 0;
    end += strspn(end, " ");
    size_t length = strcspn(end, " \n");
    if (length == 0 || (length == 2 && !strncmp(end, "ms", 2)))
        return value;
    bool times = (length == 1 && *end == 'x') || (length == 2 && !strncmp(end, "×", 2));
    return times && before_ms > 0 ? before_ms / value : 0;
}

void predict_ask(const fmoe_rung *rung, double before_ms) {
    if (ended || num_guesses == sizeof guesses / sizeof guesses[0])
        return;
    fmoe_progress("%s", "");
    if (rung->idea)
        printf("  %s: %s\n", rung->name, rung->idea);
    double guess = 0;
    while (guess == 0) {
        char line[64];
        printf("  your guess for %s, in ms%s (Enter passes): ", rung->name,
               before_ms > 0 ? " or as a speed-up over the rung before, like 3x" : "");
        fflush(stdout);
        if (!fgets(line, sizeof line, stdin)) {
            printf("\n");
            ended = true;
            return;
        }
        if (line[strspn(line, " ")] == '\n')
            return;
        guess = read_guess(line, before_ms);
        if (guess == 0)
            printf("  not a guess: %s", line);
    }
    snprintf(guesses[num_guesses].rung, sizeof guesses[0].rung, "%s", rung->name);
    guesses[num_guesses].guess_ms = guess;
    guesses[num_guesses++].measured_ms = 0;
}

void predict_measured(const char *rung_name, double ms) {
    if (num_guesses && !strcmp(guesses[num_guesses - 1].rung, rung_name))
        guesses[num_guesses - 1].measured_ms = ms;
}

void predict_compare(void) {
    for (int i = 0; i < num_guesses; i++) {
        double guess = guesses[i].guess_ms, measured = guesses[i].measured_ms;
        if (measured > 0)
            printf("  %-22s you guessed %.4g ms, it took %.4g ms: %.2f times %s\n", guesses[i].rung, guess, measured,
                   measured > guess ? measured / guess : guess / measured, measured > guess ? "more" : "less");
    }
    num_guesses = 0;
}
