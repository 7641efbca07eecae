/* Whether the kernels here can run at all. */
#include "portable.h"

namespace {
__global__ void nothing(void) {}
} // namespace

extern "C" const char *wkv_cuda_probe(void) {
  struct cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, (const void *)nothing);
  cudaGetLastError(); /* it is told here, and not again by the next launch */
  return error == cudaSuccess ? NULL : cudaGetErrorString(error);
}
