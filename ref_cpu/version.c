/* The version that the library was built as. */
#include "fmoe_version.h"

#define TEXT_OF(number) #number
#define TEXT(number)    TEXT_OF(number)

const char *fmoe_version(void) {
    return TEXT(FMOE_VERSION_MAJOR) "." TEXT(FMOE_VERSION_MINOR) "." TEXT(FMOE_VERSION_PATCH);
}
