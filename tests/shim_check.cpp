// Whether csrc/bind/torch_shim.h says the same as the headers of the installed torch: compiles, or does not.
#define USE_CUDA // only declarations hang on it
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <type_traits>

#include "../csrc/bind/torch_shim.h"

#define SAME_FUNCTION(result, name, arguments) \
  static_assert(std::is_same_v<decltype(&::name), decltype(torch_shim::name)>, "prototype of " #name);
#define SAME_DTYPE(name) static_assert(std::is_same_v<decltype(::aoti_torch_dtype_##name()), int32_t>, #name);
#define SAME_DEVICE(name) static_assert(std::is_same_v<decltype(::aoti_torch_device_type_##name()), int32_t>, #name);

TORCH_FUNCTIONS(SAME_FUNCTION)
TORCH_CUDA_FUNCTIONS(SAME_FUNCTION)
TORCH_DTYPES(SAME_DTYPE)
TORCH_DEVICES(SAME_DEVICE)
static_assert(TORCH_OLDEST == TORCH_VERSION_2_10_0, "the number of a version");
