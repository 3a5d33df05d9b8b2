/* What a running sentence tells the parent process: a struct in a file that both have mapped, so that it is still there
 * after a crash. literate.c writes it in the test's process, main.c reads it in the parent. */
#ifndef REPORT_H
#define REPORT_H

#include "literate.h"

#define REPORT_PATH "LITERATE_REPORT" /* the environment variable with the file's path */

struct attempt {
    char names[64];
    int num_sizes; /* 0: nothing tried, or a sentence without sizes */
    int64_t size[MAX_SIZES];
    uint64_t seed;
};

struct report {
    int64_t cases;         /* how many held */
    struct attempt trying; /* set before each call of a property */
    bool failed;
    struct attempt found; /* the smallest counterexample so far */
    char message[1024];
};

struct sentence {
    int chapter, number;
    needs what;
    const char *text, *why, *against;
    struct criterion_test *test;
};

#define MAX_SENTENCES 512
extern struct sentence sentences[MAX_SENTENCES];
extern int num_sentences;

#endif
