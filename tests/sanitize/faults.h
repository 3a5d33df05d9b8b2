/* Mistakes that compute-sanitizer has to report. */
#ifndef FAULTS_H
#define FAULTS_H

#ifdef __cplusplus
extern "C"
#endif
    /* Runs the mistake for a tool: memcheck, racecheck, initcheck or synccheck. Whether the device failed. */
    int
    run_fault(const char *tool);

#endif
