/* The torch ops: every argument is checked here, once, then the kernels run on plain structs. */
#include "torch_ops.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "../policies.h"
#include "torch_shim.h"

static const struct wkv_cpu_kernels *kernels;

#define TEXT(name) #name,
static const char *const dtype_names[] = {TORCH_DTYPES(TEXT) "another dtype"};
static const char *const device_names[] = {TORCH_DEVICES(TEXT) "another device"};

#define POLICY_READS(name, attention, key_norm) {attention, key_norm},
static const struct {
  bool attention, key_norm;
} policies[] = {WKV_POLICIES(POLICY_READS)};

enum { POLICIES = sizeof policies / sizeof policies[0] };

/* ---- what an op was given, and what it may be given ---- */

enum size { ROWS, TOKENS, HEADS, SLOTS, DIM, CURSORS, SIZES };
static const char *const size_names[SIZES] = {"rows", "tokens", "heads", "slots", "dim", "cursors"};

enum { UNKNOWN = -1, MAX_DIM = 4, MAX_TENSORS = 6, MAX_RESULTS = 2, ERROR_SIZE = 512, CACHE = TORCH_DTYPE_COUNT };

struct argument {
  const char *name;
  int dtype; /* CACHE: one that the kernels know, the same for all such arguments */
  int dim;
  enum size shape[MAX_DIM];
};

/* One call of an op: its tensors, and what those accepted so far say about the others. */
struct call {
  AtenTensorHandle tensors[MAX_TENSORS], results[MAX_RESULTS];
  void *data[MAX_TENSORS];
  int64_t sizes[SIZES];
  int cache_dtype;
  char error[ERROR_SIZE];
};

__attribute__((format(printf, 2, 3))) static bool fail(struct call *const call, const char *const format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(call->error, sizeof call->error, format, values);
  va_end(values);
  return false;
}

static bool has_shape(const struct call *const call, const struct argument *const want, const int64_t dim,
                      const int64_t *const sizes) {
  bool same = dim == want->dim;
  for (int i = 0; same && i < want->dim; i++) {
    const int64_t known = call->sizes[want->shape[i]];
    same = known == UNKNOWN ? sizes[i] > 0 || want->shape[i] == ROWS : sizes[i] == known;
  }
  return same;
}

static bool fail_shape(struct call *const call, const struct argument *const want, const int64_t dim,
                       const int64_t *const sizes) {
  char allowed[192] = "", given[192] = "";
  bool empty = false;
  for (int i = 0, end = 0; i < want->dim; i++) {
    const enum size side = want->shape[i];
    end += snprintf(allowed + end, sizeof allowed - end, "%s%s", i ? ", " : "", size_names[side]);
    if (call->sizes[side] != UNKNOWN)
      end += snprintf(allowed + end, sizeof allowed - end, "=%lld", (long long)call->sizes[side]);
  }
  for (int64_t i = 0, end = 0; i < dim && end < (int64_t)sizeof given; i++) {
    end += snprintf(given + end, sizeof given - end, "%s%lld", i ? ", " : "", (long long)sizes[i]);
    empty |= !sizes[i];
  }
  return fail(call, "%s must be [%s]%s, got [%s]", want->name, allowed, empty ? ", no side but rows empty" : "", given);
}

static int index_of(const int32_t number, const int32_t *const numbers, const int count) {
  int i = 0;
  while (i < count && numbers[i] != number) i++;
  return i;
}

/* Checks argument i of a call. One that the op does not read lends its shape alone: it may be an expanded scalar. */
static bool accept(struct call *const call, const int i, const struct argument *const want, const bool is_read) {
  const AtenTensorHandle tensor = call->tensors[i];
  int32_t dtype_number, device_number;
  int64_t dim, *sizes;
  bool contiguous;
  if (shim.aoti_torch_get_dtype(tensor, &dtype_number) || shim.aoti_torch_get_device_type(tensor, &device_number) ||
      shim.aoti_torch_get_dim(tensor, &dim) || shim.aoti_torch_get_sizes(tensor, &sizes) ||
      shim.aoti_torch_is_contiguous(tensor, &contiguous) || shim.aoti_torch_get_data_ptr(tensor, &call->data[i]))
    return fail(call, "%s must be an ordinary tensor that has memory", want->name);

  const int device = index_of(device_number, shim.devices, TORCH_DEVICE_COUNT);
  if (device != TORCH_DEVICE_cpu) return fail(call, "%s must be on cpu, got %s", want->name, device_names[device]);

  const int dtype = index_of(dtype_number, shim.dtypes, TORCH_DTYPE_COUNT);
  const int wanted = want->dtype == CACHE ? call->cache_dtype : want->dtype;
  if (wanted == UNKNOWN ? dtype >= WKV_DTYPES : dtype != wanted)
    return fail(call, "%s must be %s, got %s", want->name,
                wanted == UNKNOWN ? "float32, bfloat16 or float16" : dtype_names[wanted], dtype_names[dtype]);

  if (!has_shape(call, want, dim, sizes)) return fail_shape(call, want, dim, sizes);
  if (is_read && !contiguous) return fail(call, "%s must be contiguous, got a strided view", want->name);

  if (want->dtype == CACHE) call->cache_dtype = dtype;
  for (int64_t d = 0; d < dim; d++) call->sizes[want->shape[d]] = sizes[d];
  return true;
}

static AtenTensorHandle as_tensor(const StableIValue value) { return (AtenTensorHandle)(uintptr_t)value; }
static StableIValue from_tensor(const AtenTensorHandle tensor) { return (StableIValue)(uintptr_t)tensor; }

static bool as_bool(const StableIValue value) {
  bool b;
  memcpy(&b, &value, sizeof b);
  return b;
}

static double as_double(const StableIValue value) {
  double number;
  memcpy(&number, &value, sizeof number);
  return number;
}

/* The shim cannot say whether a tensor requires grad, but while gradients are on, a view of such a one is no leaf. */
static bool requires_grad(const AtenTensorHandle tensor) {
  AtenTensorHandle own;
  if (shim.aoti_torch_new_tensor_handle(tensor, &own)) return true;
  StableIValue stack[] = {from_tensor(own)};
  return shim.torch_call_dispatcher("aten::alias", "", stack, TORCH_OLDEST) ||
         shim.torch_call_dispatcher("aten::is_leaf", "", stack, TORCH_OLDEST) || !as_bool(stack[0]);
}

static bool needs_no_grad(struct call *const call, const struct argument *const arguments, const int count) {
  if (!shim.aoti_torch_grad_mode_is_enabled()) return true;
  for (int i = 0; i < count; i++)
    if (arguments[i].dtype != TORCH_DTYPE_int32 && requires_grad(call->tensors[i]))
      return fail(call, "%s requires grad, and no gradient can pass through a cache: call under torch.no_grad()",
                  arguments[i].name);
  return true;
}

/* A new contiguous tensor, the i-th result of the call. */
static bool new_result(struct call *const call, const int i, const int dim, const int64_t *const sizes,
                       const int dtype, void **const data) {
  int64_t strides[MAX_DIM], stride = 1;
  for (int d = dim - 1; d >= 0; d--) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  AtenTensorHandle *const result = &call->results[i];
  const int32_t cpu = shim.devices[TORCH_DEVICE_cpu];
  return (!shim.aoti_torch_empty_strided(dim, sizes, strides, shim.dtypes[dtype], cpu, 0, result) &&
          !shim.aoti_torch_get_data_ptr(*result, data)) ||
         fail(call, "no memory for the result");
}

static bool is_within(struct call *const call, const char *const name, const int64_t number, const int64_t least,
                      const int64_t most) {
  return (least <= number && number <= most) ||
         fail(call, "%s must be in %lld..%lld, got %lld", name, (long long)least, (long long)most, (long long)number);
}

static bool is_finite(struct call *const call, const char *const name, const double number) {
  return isfinite((float)number) || fail(call, "%s must be finite, got %g", name, number);
}

static bool is_sound(struct call *const call, const int32_t *const cursor, const int64_t slots) {
  return !wkv_check_cursor(cursor, call->sizes[ROWS], call->sizes[TOKENS], slots, call->error, sizeof call->error);
}

enum { WORTH_A_THREAD = 1 << 17 }; /* numbers of the cache to read, below which waking a thread costs more */

/* Which thread does an item does not change its bits. */
static bool share_out(struct call *const call, const int64_t items, const double numbers_per_item,
                      const torch_range_task task, void *const context) {
  const int64_t items_per_thread = 1 + (int64_t)(WORTH_A_THREAD / numbers_per_item);
  if (items <= items_per_thread) return task(0, items, context), true;
  return !shim.torch_parallel_for(0, items, items_per_thread, task, context) ||
         fail(call, "torch could not share out the work");
}

/* ---- compact_attention ---- */

enum { QUERY, KEY, VALUE, KEYS, VALUES, CURSOR, ATTENTION_TENSORS };
static const struct argument attention_arguments[ATTENTION_TENSORS] = {
    [QUERY] = {"query", CACHE, 4, {ROWS, TOKENS, HEADS, DIM}},
    [KEY] = {"key", CACHE, 4, {ROWS, TOKENS, HEADS, DIM}},
    [VALUE] = {"value", CACHE, 4, {ROWS, TOKENS, HEADS, DIM}},
    [KEYS] = {"keys", CACHE, 4, {ROWS, HEADS, SLOTS, DIM}},
    [VALUES] = {"values", CACHE, 4, {ROWS, HEADS, SLOTS, DIM}},
    [CURSOR] = {"cursor", TORCH_DTYPE_int32, 2, {CURSORS, ROWS}},
};

static void attend(const int64_t begin, const int64_t end, void *const attention) {
  kernels->compact_attention(attention, begin, end);
}

static bool compact_attention(struct call *const call, const StableIValue *const numbers) {
  for (int i = 0; i < ATTENTION_TENSORS; i++)
    if (!accept(call, i, &attention_arguments[i], true)) return false;
  const double scale = as_double(numbers[0]);
  const bool want_weights = as_bool(numbers[1]);
  const int64_t *const size = call->sizes, none = 0;
  const int64_t output_shape[] = {size[ROWS], size[TOKENS], size[HEADS], size[DIM]};
  const int64_t weights_shape[] = {size[ROWS], size[HEADS], size[TOKENS], size[SLOTS]};
  void *output, *weights;
  if (!is_finite(call, "scale", scale) || !needs_no_grad(call, attention_arguments, ATTENTION_TENSORS) ||
      !is_sound(call, call->data[CURSOR], size[SLOTS]) ||
      !new_result(call, 0, 4, output_shape, call->cache_dtype, &output) ||
      !new_result(call, 1, want_weights ? 4 : 1, want_weights ? weights_shape : &none, TORCH_DTYPE_float32, &weights))
    return false;
  struct wkv_attention attention = {
      .rows = size[ROWS],
      .tokens = size[TOKENS],
      .heads = size[HEADS],
      .slots = size[SLOTS],
      .head_dim = size[DIM],
      .dtype = (enum wkv_dtype)call->cache_dtype,
      .query = call->data[QUERY],
      .key = call->data[KEY],
      .value = call->data[VALUE],
      .keys = call->data[KEYS],
      .values = call->data[VALUES],
      .cursor = call->data[CURSOR],
      .output = output,
      .weights = want_weights ? weights : NULL,
      .scale = (float)scale,
  };
  return share_out(call, size[ROWS] * size[HEADS], 2.0 * size[TOKENS] * size[SLOTS] * size[DIM], attend, &attention);
}

/* ---- score_evict ---- */

enum { SEEN_WEIGHTS, SEEN_KEYS, MOVED_CURSOR, POSITIONS, SCORES, EVICTION_TENSORS };
static const struct argument eviction_arguments[EVICTION_TENSORS] = {
    [SEEN_WEIGHTS] = {"weights", TORCH_DTYPE_float32, 4, {ROWS, HEADS, TOKENS, SLOTS}},
    [SEEN_KEYS] = {"keys", CACHE, 4, {ROWS, HEADS, SLOTS, DIM}},
    [MOVED_CURSOR] = {"cursor", TORCH_DTYPE_int32, 2, {CURSORS, ROWS}},
    [POSITIONS] = {"positions", TORCH_DTYPE_int32, 2, {ROWS, SLOTS}},
    [SCORES] = {"scores", TORCH_DTYPE_float32, 2, {ROWS, SLOTS}},
};

static void evict(const int64_t begin, const int64_t end, void *const eviction) {
  kernels->score_evict(eviction, begin, end);
}

static bool score_evict(struct call *const call, const StableIValue *const numbers) {
  const int64_t policy = (int64_t)numbers[0], budget = (int64_t)numbers[1], recent = (int64_t)numbers[2];
  const double decay = as_double(numbers[3]);
  if (!is_within(call, "policy", policy, 0, POLICIES - 1)) return false;
  const bool is_read[EVICTION_TENSORS] = {[SEEN_WEIGHTS] = policies[policy].attention,
                                          [SEEN_KEYS] = policies[policy].key_norm,
                                          [MOVED_CURSOR] = true, [POSITIONS] = true, [SCORES] = true};
  for (int i = 0; i < EVICTION_TENSORS; i++)
    if (!accept(call, i, &eviction_arguments[i], is_read[i])) return false;
  const int64_t *const size = call->sizes;
  if (!is_within(call, "budget", budget, 1, size[SLOTS]) || !is_within(call, "recent", recent, 1, INT32_MAX) ||
      !is_finite(call, "decay", decay) || !needs_no_grad(call, eviction_arguments, EVICTION_TENSORS) ||
      /* several tokens were appended one after another, so none but the last may call for an eviction */
      !is_sound(call, call->data[MOVED_CURSOR], size[TOKENS] > 1 ? budget : size[SLOTS]))
    return false;
  struct wkv_eviction eviction = {
      .rows = size[ROWS],
      .tokens = size[TOKENS],
      .heads = size[HEADS],
      .slots = size[SLOTS],
      .head_dim = size[DIM],
      .dtype = (enum wkv_dtype)call->cache_dtype,
      .weights = call->data[SEEN_WEIGHTS],
      .keys = call->data[SEEN_KEYS],
      .cursor = call->data[MOVED_CURSOR],
      .positions = call->data[POSITIONS],
      .scores = call->data[SCORES],
      .policy = (int)policy,
      .budget = budget,
      .recent = recent,
      .decay = (float)decay,
  };
  return share_out(call, size[ROWS], 1.0 * size[TOKENS] * size[SLOTS] * (size[HEADS] + 1), evict, &eviction);
}

/* ---- between torch and the ops ---- */

struct op {
  const char *name, *schema;
  bool (*run)(struct call *, const StableIValue *numbers); /* what follows the tensors on the stack */
  int tensors, results;
};

static const struct op attention_op = {
    "whisperkv::compact_attention",
    "compact_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor cursor, "
    "float scale, bool want_weights) -> (Tensor, Tensor)",
    compact_attention, ATTENTION_TENSORS, 2};

static const struct op eviction_op = {
    "whisperkv::score_evict",
    "score_evict(Tensor weights, Tensor keys, Tensor(a!) cursor, Tensor(b!) positions, Tensor(c!) scores, int policy, "
    "SymInt budget, SymInt recent, float decay) -> ()",
    score_evict, EVICTION_TENSORS, 0};

/* The tensors on the stack are ours to release; results go back on it. An error leaves as a C++ exception, so
 * nothing may be held by then. */
static void run(const struct op *const op, StableIValue *const stack) {
  struct call call = {.cache_dtype = UNKNOWN};
  for (int i = 0; i < SIZES; i++) call.sizes[i] = UNKNOWN;
  call.sizes[CURSORS] = WKV_CURSORS;
  for (int i = 0; i < op->tensors; i++) call.tensors[i] = as_tensor(stack[i]);
  const bool done = op->run(&call, stack + op->tensors);
  for (int i = 0; i < op->tensors; i++) shim.aoti_torch_delete_tensor_object(call.tensors[i]);
  for (int i = 0; i < op->results; i++) {
    if (done) stack[i] = from_tensor(call.results[i]);
    else if (call.results[i]) shim.aoti_torch_delete_tensor_object(call.results[i]);
  }
  if (done) return;
  char message[ERROR_SIZE + 64];
  snprintf(message, sizeof message, "%s: %s", op->name, call.error);
  shim.aoti_torch_check(false, op->name, __FILE__, __LINE__, message);
}

static void run_attention(StableIValue *const stack, const uint64_t inputs, const uint64_t outputs) {
  (void)inputs, (void)outputs;
  run(&attention_op, stack);
}

static void run_eviction(StableIValue *const stack, const uint64_t inputs, const uint64_t outputs) {
  (void)inputs, (void)outputs;
  run(&eviction_op, stack);
}

const char *torch_ops_register(const struct wkv_cpu_kernels *const chosen) {
  kernels = chosen;
  TorchLibraryHandle schemas, cpu; /* never deleted: that would take the ops away again */
  if (shim.aoti_torch_library_init_fragment("whisperkv", __FILE__, __LINE__, &schemas) ||
      shim.aoti_torch_library_init_impl("whisperkv", "CPU", __FILE__, __LINE__, &cpu))
    return "opening the namespace whisperkv";
  if (shim.aoti_torch_library_def(schemas, attention_op.schema) ||
      shim.torch_library_impl(cpu, "compact_attention", run_attention, TORCH_OLDEST))
    return attention_op.name;
  if (shim.aoti_torch_library_def(schemas, eviction_op.schema) ||
      shim.torch_library_impl(cpu, "score_evict", run_eviction, TORCH_OLDEST))
    return eviction_op.name;
  return NULL;
}
