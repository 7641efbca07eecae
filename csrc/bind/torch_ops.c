/* Between torch and the ops: their registration, and the stack that arguments and results are passed on. */
#include "torch_ops.h"

#include <stdio.h>

#include "torch_device.h"

/* The tensors on the stack are ours to release; results go back on it. An error leaves as a C++ exception, so
 * nothing may be held by then. */
static void run(const struct torch_op *const op, StableIValue *const stack) {
  struct call call = {.cache_dtype = UNKNOWN, .device_index = UNKNOWN};
  for (int i = 0; i < SIZES; i++) call.sizes[i] = UNKNOWN;
  call.sizes[CURSORS] = WKV_CURSORS;
  call.sizes[PAIR] = 2;
  for (int i = 0; i < op->tensors; i++) call.tensors[i] = (AtenTensorHandle)(uintptr_t)stack[i];
  const bool done = op->run(&call, stack + op->tensors);
  for (int i = 0; i < op->tensors; i++) shim.aoti_torch_delete_tensor_object(call.tensors[i]);
  for (int i = 0; i < MAX_BORROWED && call.borrowed[i]; i++) shim.aoti_torch_delete_tensor_object(call.borrowed[i]);
  for (int i = 0; i < op->results; i++) {
    if (done) stack[i] = (StableIValue)(uintptr_t)call.results[i];
    else if (call.results[i]) shim.aoti_torch_delete_tensor_object(call.results[i]);
  }
  if (done) return;
  char message[ERROR_SIZE + 64];
  snprintf(message, sizeof message, "whisperkv::%s: %s", op->name, call.error);
  shim.aoti_torch_check(false, op->name, __FILE__, __LINE__, message);
}

#define RUN(name) \
  extern const struct torch_op name##_op; \
  static void run_##name(StableIValue *const stack, const uint64_t inputs, const uint64_t outputs) { \
    (void)inputs, (void)outputs; \
    run(&name##_op, stack); \
  }
TORCH_OPS(RUN)

#define ENTRY(name) {&name##_op, run_##name},
static const struct {
  const struct torch_op *op;
  torch_boxed_op run;
} ops[] = {TORCH_OPS(ENTRY)};

const char *torch_ops_register(const bool with_schemas) {
  TorchLibraryHandle schemas, kernels; /* never deleted: that would take the ops away again */
  if ((with_schemas && shim.aoti_torch_library_init_fragment("whisperkv", __FILE__, __LINE__, &schemas)) ||
      shim.aoti_torch_library_init_impl("whisperkv", device_key, __FILE__, __LINE__, &kernels))
    return "opening the namespace whisperkv";
  for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++)
    if ((with_schemas && shim.aoti_torch_library_def(schemas, ops[i].op->schema)) ||
        shim.torch_library_impl(kernels, ops[i].op->name, ops[i].run, TORCH_OLDEST))
      return ops[i].op->name;
  return NULL;
}
