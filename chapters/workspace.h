/* Parts of a rung's workspace. */
#ifndef FMOE_WORKSPACE_H
#define FMOE_WORKSPACE_H

#include <stddef.h>

/* The next part of a workspace, at a multiple of 256 bytes. With NULL for the workspace only the sizes add up, so that
 * one layout function says both where things lie and how much room they need. */
static inline void *carve(void *workspace, size_t *used, size_t bytes) {
    void *part = workspace ? (char *)workspace + *used : NULL;
    *used += (bytes + 255) / 256 * 256;
    return part;
}

#endif
