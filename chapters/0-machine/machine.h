/* The demonstrations of chapter 0; each prints, those of ceilings and of the GPU write CSV rows too. */
#ifndef MACHINE_H
#define MACHINE_H

void show_ceilings(void);
void show_timing(void);
void show_error(void);
void show_floor(void);

/* On the GPU; one line where there is none, with the ceilings that were recorded on another machine. */
void show_gpu_ceilings(void);
void show_gpu_timing(void);

#endif
