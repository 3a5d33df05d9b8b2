#include "openblas.h"

#include <dlfcn.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

static openblas_sgemm_fn *sgemm;
static void (*set_threads)(int);

bool openblas_available(void) {
    static bool tried;
    if (tried)
        return sgemm && set_threads;
    tried = true;
    /* It picks its kernels for this processor, unless the environment names another one: no fair baseline then. */
    unsetenv("OPENBLAS_CORETYPE");
    void *library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return false;
    /* ISO C has no cast from an object pointer to a function pointer; POSIX promises that the bytes are the same. */
    void *symbol = dlsym(library, "cblas_sgemm");
    memcpy(&sgemm, &symbol, sizeof symbol);
    symbol = dlsym(library, "openblas_set_num_threads");
    memcpy(&set_threads, &symbol, sizeof symbol);
    return sgemm && set_threads;
}

openblas_sgemm_fn *openblas_sgemm(void) {
    set_threads(omp_get_max_threads());
    return sgemm;
}
