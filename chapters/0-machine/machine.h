/* The four demonstrations of chapter 0; each prints, the first one writes CSV rows too. */
#ifndef MACHINE_H
#define MACHINE_H

void show_ceilings(void);
void show_timing(void);
void show_error(void);
void show_floor(void);

#endif
