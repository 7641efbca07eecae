/* Finding LibTorch's stable C shim in the process that has imported torch. */
#define _GNU_SOURCE /* RTLD_NOLOAD */
#include "torch_shim.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

struct torch_shim torch;

#define FUNCTION_PLACE(result, name, arguments) {#name, offsetof(struct torch_shim, name)},
static const struct {
  const char *name;
  size_t offset;
} functions[] = {TORCH_FUNCTIONS(FUNCTION_PLACE)};

#define TEXT(name) #name,
static const char *const dtypes[] = {TORCH_DTYPES(TEXT)};
static const char *const devices[] = {TORCH_DEVICES(TEXT)};

#define OLDEST "2.10"
#define UPGRADE "pip install -U torch"

/* Asks torch for its number of a dtype or device. */
static bool ask(void *const library, const char *const kind, const char *const name, int32_t *const number) {
  char symbol[64];
  snprintf(symbol, sizeof symbol, "aoti_torch_%s_%s", kind, name);
  int32_t (*get)(void);
  *(void **)&get = dlsym(library, symbol);
  if (get) *number = get();
  return get;
}

/* NULL, or the first name that torch does not have. */
static const char *find_all(void *const library) {
  for (size_t i = 0; i < sizeof functions / sizeof functions[0]; i++) {
    void *const function = dlsym(library, functions[i].name);
    if (!function) return functions[i].name;
    memcpy((char *)&torch + functions[i].offset, &function, sizeof function);
  }
  for (int i = 0; i < TORCH_DTYPE_COUNT; i++)
    if (!ask(library, "dtype", dtypes[i], &torch.dtypes[i])) return dtypes[i];
  for (int i = 0; i < TORCH_DEVICE_COUNT; i++)
    if (!ask(library, "device_type", devices[i], &torch.devices[i])) return devices[i];
  return NULL;
}

const char *torch_shim_load(const char *const path, char *const error, const size_t error_size) {
  /* Never loads a library: a second torch in one process would not know the first one's tensors. */
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  if (!library) {
    const bool elsewhere = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    snprintf(error, error_size,
             elsewhere ? "torch runs on another libtorch_cpu than %s: keep one installation of torch"
                       : "libtorch_cpu is not loaded: import torch first (looked for %s)",
             path);
    return error;
  }
  uint64_t (*abi_version)(void);
  *(void **)&abi_version = dlsym(library, "aoti_torch_abi_version");
  const uint64_t version = abi_version ? abi_version() : 0;
  if (version < TORCH_OLDEST) {
    char found[32] = "an older one";
    if (version) snprintf(found, sizeof found, "%d.%d", (int)(version >> 56), (int)(version >> 48 & 255));
    snprintf(error, error_size, "whisperkv needs torch >= " OLDEST ", found %s: " UPGRADE, found);
    return error;
  }
  const char *const missing = find_all(library);
  if (missing) snprintf(error, error_size, "torch at %s has no %s, which whisperkv needs: " UPGRADE, path, missing);
  return missing ? error : NULL;
}
