/* The torch ops of namespace whisperkv. */
#ifndef WHISPERKV_TORCH_OPS_H
#define WHISPERKV_TORCH_OPS_H
#include "../whisperkv.h"

/* Registers them for the life of the process; torch_shim_load comes first. NULL, or the step that failed. */
const char *torch_ops_register(const struct wkv_cpu_kernels *kernels);

#endif
