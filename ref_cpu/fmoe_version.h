/* Which flashmoe.c this is. The shared libraries' names carry the same numbers: while MAJOR is 0 a new MINOR may change
 * what a function takes, from 1.0 on only a new MAJOR may. A new PATCH changes no function. */
#ifndef FMOE_VERSION_H
#define FMOE_VERSION_H

#define FMOE_VERSION_MAJOR 0
#define FMOE_VERSION_MINOR 1
#define FMOE_VERSION_PATCH 0

/* For #if: FMOE_VERSION >= FMOE_MAKE_VERSION(0, 2, 0). */
#define FMOE_MAKE_VERSION(major, minor, patch) ((major)*1000000 + (minor)*1000 + (patch))
#define FMOE_VERSION                           FMOE_MAKE_VERSION(FMOE_VERSION_MAJOR, FMOE_VERSION_MINOR, FMOE_VERSION_PATCH)

#ifdef __cplusplus
extern "C" {
#endif

/* The version of the library that is linked, as "0.1.0"; the macros are those of the header that was compiled against.
 */
const char *fmoe_version(void);

#ifdef __cplusplus
}
#endif
#endif
