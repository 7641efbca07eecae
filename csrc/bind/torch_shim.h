/* Our own prototypes of LibTorch's stable C shim, only of what we use, so that no torch header is needed to build.
 * tests/test_shim.py holds them against the headers of the installed torch. */
#ifndef WHISPERKV_TORCH_SHIM_H
#define WHISPERKV_TORCH_SHIM_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
class TorchLibraryOpaque; /* a class in torch's headers */
#endif

typedef struct AtenTensorOpaque *AtenTensorHandle;
typedef struct TorchLibraryOpaque *TorchLibraryHandle;
typedef struct CUDAGuardOpaque *CUDAGuardHandle;
typedef struct StableListOpaque *StableListHandle;
typedef uint64_t StableIValue; /* one argument or result of an op: a tensor handle, or the bytes of a number */
typedef int32_t AOTITorchError;
typedef void (*torch_boxed_op)(StableIValue *stack, uint64_t inputs, uint64_t outputs);
typedef void (*torch_range_task)(int64_t begin, int64_t end, void *context);

#define TORCH_RELEASE(major, minor) ((uint64_t)(major) << 56 | (uint64_t)(minor) << 48)
#define TORCH_OLDEST TORCH_RELEASE(2, 10) /* 2.10 was the first with torch_library_impl and torch_parallel_for */

/* F(result, name, arguments) */
#define TORCH_FUNCTIONS(F) \
  F(uint64_t, aoti_torch_abi_version, (void)) \
  F(bool, aoti_torch_grad_mode_is_enabled, (void)) \
  F(AOTITorchError, aoti_torch_new_tensor_handle, (AtenTensorHandle, AtenTensorHandle *)) \
  F(AOTITorchError, aoti_torch_delete_tensor_object, (AtenTensorHandle)) \
  F(AOTITorchError, aoti_torch_get_data_ptr, (AtenTensorHandle, void **)) \
  F(AOTITorchError, aoti_torch_get_dim, (AtenTensorHandle, int64_t *)) \
  F(AOTITorchError, aoti_torch_get_sizes, (AtenTensorHandle, int64_t **)) \
  F(AOTITorchError, aoti_torch_get_strides, (AtenTensorHandle, int64_t **)) \
  F(AOTITorchError, aoti_torch_get_dtype, (AtenTensorHandle, int32_t *)) \
  F(AOTITorchError, aoti_torch_get_device_type, (AtenTensorHandle, int32_t *)) \
  F(AOTITorchError, aoti_torch_get_device_index, (AtenTensorHandle, int32_t *)) \
  F(AOTITorchError, aoti_torch_is_contiguous, (AtenTensorHandle, bool *)) \
  F(AOTITorchError, aoti_torch_empty_strided, \
    (int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, AtenTensorHandle *)) \
  F(AOTITorchError, aoti_torch_library_init_fragment, (const char *, const char *, uint32_t, TorchLibraryHandle *)) \
  F(AOTITorchError, aoti_torch_library_init_impl, \
    (const char *, const char *, const char *, uint32_t, TorchLibraryHandle *)) \
  F(AOTITorchError, aoti_torch_library_def, (TorchLibraryHandle, const char *)) \
  F(AOTITorchError, aoti_torch_delete_library_object, (TorchLibraryHandle)) \
  F(AOTITorchError, torch_library_impl, (TorchLibraryHandle, const char *, torch_boxed_op, uint64_t)) \
  F(AOTITorchError, torch_call_dispatcher, (const char *, const char *, StableIValue *, uint64_t)) \
  F(AOTITorchError, torch_list_size, (StableListHandle, size_t *)) \
  F(AOTITorchError, torch_list_get_item, (StableListHandle, size_t, StableIValue *)) \
  F(AOTITorchError, torch_delete_list, (StableListHandle)) \
  F(AOTITorchError, torch_parallel_for, (int64_t, int64_t, int64_t, torch_range_task, void *)) \
  F(void, aoti_torch_check, (bool, const char *, const char *, uint32_t, const char *))

/* Those of libtorch_cuda. */
#define TORCH_CUDA_FUNCTIONS(F) \
  F(AOTITorchError, aoti_torch_create_cuda_guard, (int32_t, CUDAGuardHandle *)) \
  F(AOTITorchError, aoti_torch_delete_cuda_guard, (CUDAGuardHandle)) \
  F(AOTITorchError, aoti_torch_get_current_cuda_stream, (int32_t, void **))

/* N(name): torch is asked for the number of each, by aoti_torch_dtype_<name> and aoti_torch_device_type_<name>.
 * The first three are those of enum wkv_dtype, in its order. */
#define TORCH_DTYPES(N) N(float32) N(bfloat16) N(float16) N(int32) N(float64) N(int64) N(int16) N(int8) N(uint8) N(bool)
#define TORCH_DEVICES(N) N(cpu) N(cuda) N(meta)

#define TORCH_DTYPE_NUMBER(name) TORCH_DTYPE_##name,
#define TORCH_DEVICE_NUMBER(name) TORCH_DEVICE_##name,
enum torch_dtype { TORCH_DTYPES(TORCH_DTYPE_NUMBER) TORCH_DTYPE_COUNT };
enum torch_device { TORCH_DEVICES(TORCH_DEVICE_NUMBER) TORCH_DEVICE_COUNT };

#define TORCH_FIELD(result, name, arguments) result(*name) arguments;
struct torch_shim {
  TORCH_FUNCTIONS(TORCH_FIELD)
  TORCH_CUDA_FUNCTIONS(TORCH_FIELD)
  int32_t dtypes[TORCH_DTYPE_COUNT], devices[TORCH_DEVICE_COUNT];
};

/* Filled by torch_shim_load, but for what torch_shim_load_cuda fills. */
extern struct torch_shim shim;

/* Finds the libtorch_cpu that the process has loaded. NULL, or what the user should do, written to error. */
const char *torch_shim_load(const char *path, char *error, size_t error_size);

/* The same for libtorch_cuda. */
const char *torch_shim_load_cuda(const char *path, char *error, size_t error_size);

#ifdef __cplusplus
}
#endif
#endif
