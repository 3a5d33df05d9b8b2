/* Where the layer's time goes on the GPU. */
#ifndef FMOE_GPU_STEPS_H
#define FMOE_GPU_STEPS_H

/* Times the layer up to the end of each step, in turn on one stream, one graph replay each, and shows the differences.
 * 0, or 2 with a message if the case cannot be run. Nothing where there is no GPU. */
int gpu_steps(const char *case_name);

#endif
