/* Put before every file that clang-tidy reads. Its analyzer sees one file at a time and would take a failure to
 * possibly return FMOE_OK, so that every path after a failed check looked open. */
#ifndef TIDY_H
#define TIDY_H

#include "../ref_cpu/check.h"

#define fmoe_fail(status, ...) (fmoe_fail(status, __VA_ARGS__), (status))
#define fmoe_no_memory(...)    (fmoe_no_memory(__VA_ARGS__), FMOE_OUT_OF_MEMORY)

#endif
