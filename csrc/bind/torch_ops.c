/* Between torch and the ops: their registration, and the stack that arguments and results are passed on. */
#include "torch_ops.h"

#include <stdio.h>
#include <stdlib.h>

#include "torch_device.h"

/* Tensors on the stack and in its lists are ours to release. */
static int count_tensors(const struct torch_op *const op, const StableIValue *const stack, size_t *const sizes) {
  int count = op->tensors;
  for (int i = 0; i < op->lists; i++) {
    if (shim.torch_list_size((StableListHandle)(uintptr_t)stack[op->tensors + i], &sizes[i])) sizes[i] = 0;
    count += (int)sizes[i];
  }
  return count;
}

static bool take_tensors(const struct torch_op *const op, const StableIValue *const stack, const size_t *const sizes,
                         struct call *const call) {
  int next = 0;
  bool done = true;
  for (; next < op->tensors; next++) call->tensors[next] = (AtenTensorHandle)(uintptr_t)stack[next];
  for (int i = 0; i < op->lists; i++) {
    const StableListHandle list = (StableListHandle)(uintptr_t)stack[op->tensors + i];
    call->first[i] = next;
    call->count[i] = (int)sizes[i];
    for (size_t item = 0; item < sizes[i]; item++, next++) {
      StableIValue value = 0;
      done &= !shim.torch_list_get_item(list, item, &value);
      call->tensors[next] = (AtenTensorHandle)(uintptr_t)value;
    }
    shim.torch_delete_list(list);
  }
  return done || fail(call, "torch does not give its lists away");
}

/* Results go back on the stack. An error leaves as a C++ exception, so nothing may be held by then. */
static void run(const struct torch_op *const op, StableIValue *const stack) {
  enum { FEW = 10 };
  AtenTensorHandle few_tensors[FEW];
  void *few_data[FEW], *memory = NULL;
  size_t few_bytes[FEW], sizes[MAX_LISTS];
  struct call call = {
      .tensors = few_tensors, .data = few_data, .bytes = few_bytes, .cache_dtype = UNKNOWN, .device_index = UNKNOWN};
  for (int i = 0; i < SIZES; i++) call.sizes[i] = UNKNOWN;
  call.sizes[CURSORS] = WKV_CURSORS;
  call.sizes[PAIR] = 2;
  const int count = count_tensors(op, stack, sizes);
  if (count > FEW) {
    memory = malloc((size_t)count * (sizeof *call.tensors + sizeof *call.data + sizeof *call.bytes));
    if (!memory) abort(); /* a few kilobytes: what holds the tensors could not be released otherwise */
    call.tensors = memory;
    call.data = (void **)(call.tensors + count);
    call.bytes = (size_t *)(call.data + count);
  }
  for (int i = 0; i < count; i++) call.data[i] = NULL, call.bytes[i] = 0;
  const bool done = take_tensors(op, stack, sizes, &call) && op->run(&call, stack + op->tensors + op->lists);
  for (int i = 0; i < count; i++)
    if (call.tensors[i]) shim.aoti_torch_delete_tensor_object(call.tensors[i]);
  free(memory);
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
