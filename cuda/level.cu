// What this build and the current device can run together.
#include "device.cuh"

#include <stdlib.h>
#include <string.h>

// The levels' code is there if the list of architectures that make was given ("75 80 90a") has one for this device:
// sm_90a runs on 9.0 alone, the others on their own major version from their minor on, and 80 is kept as PTX for all
// above.
static bool runs_on(const char *arch, int capability) {
    char *end;
    int of_code = (int)strtol(arch, &end, 10);
    if (*end == 'a')
        return of_code == capability;
    return of_code <= capability && (of_code / 10 == capability / 10 || of_code == 80);
}

static bool has_code(int capability, int at_least) {
    for (const char *arch = FMOE_ARCHS; *arch; arch += strcspn(arch, " "), arch += *arch == ' ')
        if (atoi(arch) >= at_least && runs_on(arch, capability))
            return true;
    return false;
}

extern "C" int fmoe_cuda_level(void) {
    int device, major, minor;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
        cudaGetLastError(); // forgotten: it is this function's answer
        return -1;
    }
    int capability = 10 * major + minor;
    if (capability == 90 && strstr(FMOE_ARCHS, "90a"))
        return 2;
    return has_code(capability, 80) ? 1 : has_code(capability, 75) ? 0 : -1;
}
