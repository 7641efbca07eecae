/* Checks of what an op was given, and what every op needs. */
#include "torch_call.h"

#include "torch_device.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define TEXT(name) #name,
static const char *const dtype_names[] = {TORCH_DTYPES(TEXT) "another dtype"};
static const char *const device_names[] = {TORCH_DEVICES(TEXT) "another device"};
#define SIZE_TEXT(size, name) name,
static const char *const size_names[SIZES] = {SIZE_NAMES(SIZE_TEXT)};

bool fail(struct call *const call, const char *const format, ...) {
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

bool is_empty(const struct call *const call, const int i) {
  int64_t dim, *sizes;
  bool empty = false;
  if (shim.aoti_torch_get_dim(call->tensors[i], &dim) || shim.aoti_torch_get_sizes(call->tensors[i], &sizes))
    return false;
  for (int64_t d = 0; d < dim; d++) empty |= !sizes[d];
  return empty;
}

/* Bytes of a number of a dtype that the ops take. */
static int bytes_of(const int dtype) {
  switch (dtype) {
    case TORCH_DTYPE_uint8:
    case TORCH_DTYPE_bool: return 1;
    case TORCH_DTYPE_bfloat16:
    case TORCH_DTYPE_float16: return 2;
    default: return 4;
  }
}

/* Where what is contiguous may begin: bytes are codes. */
static int alignment_of(const int dtype) { return dtype == TORCH_DTYPE_uint8 ? codes_alignment : bytes_of(dtype); }

bool accept(struct call *const call, const int i, const struct argument *const want, const bool is_read) {
  const AtenTensorHandle tensor = call->tensors[i];
  int32_t dtype_number, device_number, device_index;
  int64_t dim, *sizes;
  bool contiguous;
  if (shim.aoti_torch_get_dtype(tensor, &dtype_number) || shim.aoti_torch_get_device_type(tensor, &device_number) ||
      shim.aoti_torch_get_device_index(tensor, &device_index) || shim.aoti_torch_get_dim(tensor, &dim) ||
      shim.aoti_torch_get_sizes(tensor, &sizes) || shim.aoti_torch_is_contiguous(tensor, &contiguous) ||
      shim.aoti_torch_get_data_ptr(tensor, &call->data[i]))
    return fail(call, "%s must be an ordinary tensor that has memory", want->name);

  const int device = index_of(device_number, shim.devices, TORCH_DEVICE_COUNT);
  if (device != (int)device_type)
    return fail(call, "%s must be on %s, got %s", want->name, device_names[device_type], device_names[device]);
  if (call->device_index != UNKNOWN && device_index != call->device_index)
    return fail(call, "%s must be on %s:%d as the others, got %s:%d", want->name, device_names[device],
                call->device_index, device_names[device], device_index);

  const int dtype = index_of(dtype_number, shim.dtypes, TORCH_DTYPE_COUNT);
  const int wanted = want->dtype == CACHE ? call->cache_dtype : want->dtype;
  if (wanted == UNKNOWN ? dtype >= WKV_DTYPES : dtype != wanted)
    return fail(call, "%s must be %s, got %s", want->name,
                wanted == UNKNOWN ? "float32, bfloat16 or float16" : dtype_names[wanted], dtype_names[dtype]);

  if (!has_shape(call, want, dim, sizes)) return fail_shape(call, want, dim, sizes);
  const int64_t numbers = numbers_in(sizes, dim);
  if (numbers > MOST_NUMBERS)
    return fail(call, "%s must have 2^48 numbers at most, and its sides have more", want->name);
  if (is_read && !contiguous) return fail(call, "%s must be contiguous, got a strided view", want->name);
  if (is_read && (uintptr_t)call->data[i] % alignment_of(dtype))
    return fail(call, "%s must begin at a multiple of %d bytes, got a shifted view: clone() it", want->name,
                alignment_of(dtype));

  call->bytes[i] = is_read && !is_empty(call, i) ? (size_t)(numbers * bytes_of(dtype)) : 0;
  call->device_index = device_index;
  if (want->dtype == CACHE) call->cache_dtype = dtype;
  for (int64_t d = 0; d < dim; d++) call->sizes[want->shape[d]] = sizes[d];
  return true;
}

/* Of any number of sides; of those that are one long, there are no steps. */
static bool accept_strided(struct call *const call, const int i, const struct argument *const want,
                           int64_t steps[MAX_DIM]) {
  int64_t *strides, numbers = 1;
  if (!accept(call, i, want, false)) return false;
  if (shim.aoti_torch_get_strides(call->tensors[i], &strides)) return fail(call, "%s has no strides", want->name);
  const int last = want->dim - 1, bytes = bytes_of(want->dtype == CACHE ? call->cache_dtype : want->dtype);
  for (int d = 0; d <= last; d++) {
    const int64_t size = call->sizes[want->shape[d]];
    steps[d] = size > 1 ? strides[d] : 0;
    if (steps[d] < 0 || (d == last && size > 1 && steps[d] != 1))
      return fail(call, "%s must have rows whose numbers lie side by side, got a strided view: call contiguous()",
                  want->name);
    numbers = size && numbers ? numbers + (size - 1) * steps[d] : 0;
  }
  if ((uintptr_t)call->data[i] % bytes)
    return fail(call, "%s must begin at a multiple of %d bytes, got a shifted view: clone() it", want->name, bytes);
  call->bytes[i] = (size_t)numbers * bytes;
  return true;
}

bool accept_rows(struct call *const call, const int i, const struct argument *const want, int64_t *const stride) {
  int64_t steps[MAX_DIM];
  if (!accept_strided(call, i, want, steps)) return false;
  *stride = call->sizes[want->shape[0]] > 1 ? steps[0] : call->sizes[want->shape[1]];
  return true;
}

bool accept_view(struct call *const call, const int i, const struct argument *const want, struct wkv_view *const view) {
  int64_t steps[MAX_DIM];
  if (!accept_strided(call, i, want, steps)) return false;
  *view = (struct wkv_view){call->data[i], .row = steps[0], .head = steps[1], .token = steps[2]};
  return true;
}

bool are_apart(struct call *const call, const struct argument *const arguments, const int count,
               const unsigned written) {
  for (int i = 0; i < count; i++)
    for (int j = 0; written >> i & 1 && j < count; j++)
      if (i != j &&
          overlap((struct memory){call->data[i], call->bytes[i]}, (struct memory){call->data[j], call->bytes[j]}))
        return fail(call, "%s must have memory of its own, as it is written to, and shares some with %s",
                    arguments[i].name, arguments[j].name);
  return true;
}

int dtype_of(const struct call *const call, const int i) {
  int32_t number;
  if (shim.aoti_torch_get_dtype(call->tensors[i], &number)) return TORCH_DTYPE_COUNT;
  return index_of(number, shim.dtypes, TORCH_DTYPE_COUNT);
}

bool as_bool(const StableIValue value) {
  bool b;
  memcpy(&b, &value, sizeof b);
  return b;
}

double as_double(const StableIValue value) {
  double number;
  memcpy(&number, &value, sizeof number);
  return number;
}

/* The shim cannot say whether a tensor requires grad, but while gradients are on, a view of such a one is no leaf. */
static bool requires_grad(const AtenTensorHandle tensor) {
  AtenTensorHandle own;
  if (shim.aoti_torch_new_tensor_handle(tensor, &own)) return true;
  StableIValue stack[] = {(StableIValue)(uintptr_t)own};
  return shim.torch_call_dispatcher("aten::alias", "", stack, TORCH_OLDEST) ||
         shim.torch_call_dispatcher("aten::is_leaf", "", stack, TORCH_OLDEST) || !as_bool(stack[0]);
}

bool needs_no_grad(struct call *const call, const struct argument *const arguments, const int count) {
  if (!shim.aoti_torch_grad_mode_is_enabled()) return true;
  for (int i = 0; i < count; i++)
    if ((arguments[i].dtype == CACHE || arguments[i].dtype == TORCH_DTYPE_float32) && arguments[i].name &&
        requires_grad(call->tensors[i]))
      return fail(call, "%s requires grad, and no gradient can pass through a cache: call under torch.no_grad()",
                  arguments[i].name);
  return true;
}

static bool new_tensor(const struct call *const call, const int dim, const int64_t *const sizes, const int dtype,
                       AtenTensorHandle *const tensor, void **const data) {
  int64_t strides[MAX_DIM], stride = 1;
  if (numbers_in(sizes, dim) > MOST_NUMBERS) return false;
  for (int d = dim - 1; d >= 0; d--) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return !shim.aoti_torch_empty_strided(dim, sizes, strides, shim.dtypes[dtype], shim.devices[device_type],
                                        call->device_index, tensor) &&
         !shim.aoti_torch_get_data_ptr(*tensor, data);
}

bool new_result(struct call *const call, const int i, const int dim, const int64_t *const sizes, const int dtype,
                void **const data) {
  return new_tensor(call, dim, sizes, dtype, &call->results[i], data) || fail(call, "no memory for the result");
}

void *borrow(struct call *const call, const int64_t floats) {
  int i = 0;
  while (call->borrowed[i]) i++;
  void *data;
  return new_tensor(call, 1, &floats, TORCH_DTYPE_float32, &call->borrowed[i], &data) ? data : NULL;
}

bool is_within(struct call *const call, const char *const name, const int64_t number, const int64_t least,
               const int64_t most) {
  return (least <= number && number <= most) ||
         fail(call, "%s must be in %lld..%lld, got %lld", name, (long long)least, (long long)most, (long long)number);
}

bool is_group(struct call *const call, const int64_t group) {
  const bool is_sound = group > 0 && group <= INT32_MAX && group % WKV_TILE == 0;
  return (is_sound && (group % WKV_BLOCK == 0 || WKV_BLOCK % group == 0)) ||
         fail(call, "group must be 16, 32, 64, 128 or a multiple of 256 frames, got %lld", (long long)group);
}

bool is_finite(struct call *const call, const char *const name, const double number) {
  return isfinite((float)number) || fail(call, "%s must be finite, got %g", name, number);
}
