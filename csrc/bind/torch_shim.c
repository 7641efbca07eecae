/* Finding LibTorch's stable C shim in the process that has imported torch. */
#define _GNU_SOURCE /* RTLD_NOLOAD */
#include "torch_shim.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

struct torch_shim shim;

#define FUNCTION_PLACE(result, name, arguments) {#name, offsetof(struct torch_shim, name)},
static const struct {
  const char *name;
  size_t offset;
} functions[] = {TORCH_FUNCTIONS(FUNCTION_PLACE)}, cuda_functions[] = {TORCH_CUDA_FUNCTIONS(FUNCTION_PLACE)};

#define DTYPE_SYMBOL(name) "aoti_torch_dtype_" #name,
#define DEVICE_SYMBOL(name) "aoti_torch_device_type_" #name,
static const char *const dtypes[] = {TORCH_DTYPES(DTYPE_SYMBOL)};
static const char *const devices[] = {TORCH_DEVICES(DEVICE_SYMBOL)};

#define UPGRADE "pip install -U torch"

/* Sets a function pointer, given by its address; NULL if the library has no such function. */
static bool find(void *const library, const char *const name, void *const function) {
  void *const found = dlsym(library, name);
  memcpy(function, &found, sizeof found);
  return found;
}

/* Calls a function that returns a number; false if the library has none of that name. */
static bool ask(void *const library, const char *const name, int32_t *const number) {
  int32_t (*function)(void);
  if (!find(library, name, &function)) return false;
  *number = function();
  return true;
}

/* Fills the shim. NULL, or the first name that torch does not have. */
static const char *find_all(void *const library) {
  for (size_t i = 0; i < sizeof functions / sizeof functions[0]; i++)
    if (!find(library, functions[i].name, (char *)&shim + functions[i].offset)) return functions[i].name;
  for (int i = 0; i < TORCH_DTYPE_COUNT; i++)
    if (!ask(library, dtypes[i], &shim.dtypes[i])) return dtypes[i];
  for (int i = 0; i < TORCH_DEVICE_COUNT; i++)
    if (!ask(library, devices[i], &shim.devices[i])) return devices[i];
  return NULL;
}

const char *torch_shim_load(const char *const path, char *const error, const size_t error_size) {
  /* Nothing is loaded here: a second libtorch in the process would not know the first one's tensors. Some
   * distributions keep it outside torch's folder, so its plain name is tried as well. */
  void *library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  if (!library) library = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
  if (!library) {
    snprintf(error, error_size, "libtorch_cpu is not loaded: import torch first (looked for %s)", path);
    return error;
  }
  uint64_t (*abi_version)(void);
  const uint64_t version = find(library, "aoti_torch_abi_version", &abi_version) ? abi_version() : 0;
  if (version < TORCH_OLDEST) {
    char found[32] = "an older one";
    if (version) snprintf(found, sizeof found, "%d.%d", (int)(version >> 56), (int)(version >> 48 & 255));
    snprintf(error, error_size, "whisperkv needs torch >= 2.10, found %s: " UPGRADE, found);
    return error;
  }
  const char *const missing = find_all(library);
  if (missing) snprintf(error, error_size, "torch at %s has no %s, which whisperkv needs: " UPGRADE, path, missing);
  return missing ? error : NULL;
}

const char *torch_shim_load_cuda(const char *const path, char *const error, const size_t error_size) {
  void *library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  if (!library) library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  if (!library) {
    snprintf(error, error_size, "this torch has no CUDA (looked for %s): install one that has", path);
    return error;
  }
  for (size_t i = 0; i < sizeof cuda_functions / sizeof cuda_functions[0]; i++)
    if (!find(library, cuda_functions[i].name, (char *)&shim + cuda_functions[i].offset)) {
      snprintf(error, error_size, "torch at %s has no %s, which whisperkv needs: " UPGRADE, path,
               cuda_functions[i].name);
      return error;
    }
  return NULL;
}
