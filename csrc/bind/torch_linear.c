/* The ops of matrices. */
#include "torch_device.h"
#include "torch_ops.h"

static bool is_format(struct call *const call, const int64_t format) {
  return is_within(call, "format", format, 0, WKV_FORMATS - 1);
}

/* ---- pack_matrix ---- */

static const struct argument packing_arguments[] = {{"weight", CACHE, 2, {OUTPUTS, INPUTS}}};

static bool pack_matrix(struct call *const call, const StableIValue *const numbers) {
  const int64_t format = (int64_t)numbers[0], *const size = call->sizes;
  if (!is_format(call, format) || !accept(call, 0, packing_arguments, true) ||
      !needs_no_grad(call, packing_arguments, 1) || !is_within(call, "inputs", size[INPUTS], 1, WKV_MOST_INPUTS))
    return false;
  struct wkv_matrix_packing packing = {
      .outputs = size[OUTPUTS],
      .inputs = size[INPUTS],
      .dtype = (enum wkv_dtype)call->cache_dtype,
      .format = (enum wkv_format)format,
      .weight = call->data[0],
  };
  const int64_t shape[] = {wkv_count_of(size[OUTPUTS], WKV_PANEL), wkv_panel_words(packing.format, size[INPUTS])};
  return new_result(call, 0, 2, shape, TORCH_DTYPE_int32, (void **)&packing.panels) &&
         device_pack_matrix(call, &packing);
}

/* ---- linear ---- */

enum { X, NORM_WEIGHT, NORM_BIAS, WEIGHT, BIAS, RESIDUAL, LINEAR_TENSORS };
static const struct argument linear_arguments[LINEAR_TENSORS] = {
    [X] = {"x", TORCH_DTYPE_float32, 2, {ROWS, INPUTS}},
    [NORM_WEIGHT] = {"norm_weight", TORCH_DTYPE_float32, 1, {INPUTS}},
    [NORM_BIAS] = {"norm_bias", TORCH_DTYPE_float32, 1, {INPUTS}},
    [WEIGHT] = {"weight", TORCH_DTYPE_float32, 2, {OUTPUTS, INPUTS}},
    [BIAS] = {"bias", TORCH_DTYPE_float32, 1, {OUTPUTS}},
    [RESIDUAL] = {"residual", TORCH_DTYPE_float32, 2, {OTHER_ROWS, OUTPUTS}},
};
static const struct argument panels_argument = {"weight", TORCH_DTYPE_int32, 2, {PANELS, WORDS}};

/* The weight is the model's own, or panels for so many outputs. */
static bool accept_weight(struct call *const call, const bool is_packed, const enum wkv_format format,
                          const int64_t outputs) {
  int64_t *const size = call->sizes;
  if (!is_packed) {
    if (format != WKV_AS_FLOAT32) return fail(call, "weight must come from pack_matrix for this format");
    size[OUTPUTS] = outputs;
    return accept(call, WEIGHT, &linear_arguments[WEIGHT], true);
  }
  size[PANELS] = wkv_count_of(outputs, WKV_PANEL);
  size[WORDS] = wkv_panel_words(format, size[INPUTS]);
  size[OUTPUTS] = outputs;
  return accept(call, WEIGHT, &panels_argument, true);
}

static bool linear(struct call *const call, const StableIValue *const numbers) {
  const int64_t format = (int64_t)numbers[0], outputs = (int64_t)numbers[1], activation = (int64_t)numbers[3];
  const double epsilon = as_double(numbers[2]);
  const bool is_packed = dtype_of(call, WEIGHT) == TORCH_DTYPE_int32;
  const bool has_norm = !is_empty(call, NORM_WEIGHT), has_bias = !is_empty(call, BIAS);
  const bool has_residual = !is_empty(call, RESIDUAL);
  int64_t stride;
  if (!is_format(call, format) || !is_within(call, "outputs", outputs, 1, INT32_MAX) ||
      !is_within(call, "activation", activation, 0, WKV_ACTIVATIONS - 1) || !is_finite(call, "epsilon", epsilon) ||
      !accept_rows(call, X, &linear_arguments[X], &stride) ||
      !is_within(call, "inputs", call->sizes[INPUTS], 1, WKV_MOST_INPUTS) ||
      !accept_weight(call, is_packed, (enum wkv_format)format, outputs))
    return false;
  const bool is_given[LINEAR_TENSORS] = {
      [NORM_WEIGHT] = has_norm, [NORM_BIAS] = has_norm, [BIAS] = has_bias, [RESIDUAL] = has_residual};
  for (int i = 0; i < LINEAR_TENSORS; i++)
    if (is_given[i] && !accept(call, i, &linear_arguments[i], true)) return false;
  const int64_t *const size = call->sizes, shape[] = {size[ROWS], outputs};
  void *output;
  if (!needs_no_grad(call, linear_arguments, LINEAR_TENSORS) ||
      !new_result(call, 0, 2, shape, TORCH_DTYPE_float32, &output))
    return false;
  const struct wkv_rows rows = {
      .rows = size[ROWS],
      .inputs = size[INPUTS],
      .format = (enum wkv_format)format,
      .x = call->data[X],
      .stride = stride,
      .norm_weight = has_norm ? call->data[NORM_WEIGHT] : NULL,
      .norm_bias = has_norm ? call->data[NORM_BIAS] : NULL,
      .epsilon = (float)epsilon,
  };
  const struct wkv_linear linear = {
      .rows = size[ROWS],
      .inputs = size[INPUTS],
      .outputs = outputs,
      .format = (enum wkv_format)format,
      .weight = call->data[WEIGHT],
      .is_packed = is_packed,
      .bias = has_bias ? call->data[BIAS] : NULL,
      .activation = (enum wkv_activation)activation,
      .residual = has_residual ? call->data[RESIDUAL] : NULL,
      .residual_rows = has_residual ? size[OTHER_ROWS] : 1,
      .output = output,
      .output_stride = outputs,
  };
  return device_linear(call, &rows, &linear);
}

const struct torch_op pack_matrix_op = {
    .name = "pack_matrix",
    .schema = "pack_matrix(Tensor weight, int format) -> Tensor",
    .run = pack_matrix,
    .tensors = 1,
    .results = 1,
};

const struct torch_op linear_op = {
    .name = "linear",
    .schema =
        "linear(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, Tensor residual, "
        "int format, SymInt outputs, float epsilon, int activation) -> Tensor",
    .run = linear,
    .tensors = LINEAR_TENSORS,
    .results = 1,
};
