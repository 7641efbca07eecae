/* The op of the encoder's self-attention. */
#include "torch_device.h"
#include "torch_ops.h"

enum { QUERY, KEY, VALUE, BIAS, LENGTHS, TENSORS };

static const struct argument arguments[TENSORS] = {
    [QUERY] = {"query", TORCH_DTYPE_float32, 4, {AUDIOS, FRAMES, HEADS, DIM}},
    [KEY] = {"key", TORCH_DTYPE_float32, 4, {AUDIOS, FRAMES, HEADS, DIM}},
    [VALUE] = {"value", TORCH_DTYPE_float32, 4, {AUDIOS, FRAMES, HEADS, DIM}},
    [BIAS] = {"bias", TORCH_DTYPE_float32, 2, {AUDIOS, FRAMES}},
    [LENGTHS] = {"lengths", TORCH_DTYPE_int32, 1, {AUDIOS}},
};

/* A tensor that may be a part of a wider projection: its frames lie apart, but each is in one piece. */
static bool accept_heads(struct call *const call, const int i, struct wkv_heads *const heads) {
  int64_t *strides;
  if (!accept(call, i, &arguments[i], false)) return false;
  const int64_t *const size = call->sizes;
  if (shim.aoti_torch_get_strides(call->tensors[i], &strides) || (size[DIM] > 1 && strides[3] != 1) ||
      (size[HEADS] > 1 && strides[2] != size[DIM]))
    return fail(call, "%s must have heads that are contiguous in each frame, got another order", arguments[i].name);
  if ((uintptr_t)call->data[i] % sizeof(float))
    return fail(call, "%s must begin at a multiple of 4 bytes, got a shifted view: clone() it", arguments[i].name);
  *heads = (struct wkv_heads){call->data[i], .frame = strides[1], .audio = strides[0]};
  return true;
}

static bool encoder_attention(struct call *const call, const StableIValue *const numbers) {
  const double scale = as_double(numbers[0]);
  const int64_t precision = (int64_t)numbers[1];
  struct wkv_heads heads[3];
  for (int i = QUERY; i <= VALUE; i++)
    if (!accept_heads(call, i, &heads[i])) return false;
  const bool has_bias = !is_empty(call, BIAS), has_lengths = !is_empty(call, LENGTHS);
  if ((has_bias && !accept(call, BIAS, &arguments[BIAS], true)) ||
      (has_lengths && !accept(call, LENGTHS, &arguments[LENGTHS], true)))
    return false;
  const int64_t *const size = call->sizes, shape[] = {size[AUDIOS], size[FRAMES], size[HEADS], size[DIM]};
  void *output;
  if (!is_finite(call, "scale", scale) || !is_within(call, "precision", precision, 0, WKV_PRECISIONS - 1) ||
      !is_within(call, "frames", size[FRAMES], 1, WKV_MOST_SUMMED) ||
      !is_within(call, "dim", size[DIM], 1, WKV_MOST_SUMMED) || !needs_no_grad(call, arguments, TENSORS) ||
      !new_result(call, 0, 4, shape, TORCH_DTYPE_float32, &output))
    return false;
  struct wkv_encoder_attention attention = {
      .audios = size[AUDIOS],
      .frames = size[FRAMES],
      .heads = size[HEADS],
      .head_dim = size[DIM],
      .precision = (enum wkv_precision)precision,
      .query = heads[QUERY],
      .key = heads[KEY],
      .value = heads[VALUE],
      .bias = has_bias ? call->data[BIAS] : NULL,
      .lengths = has_lengths ? call->data[LENGTHS] : NULL,
      .output = output,
      .scale = (float)scale,
  };
  return device_attend_frames(call, &attention);
}

const struct torch_op encoder_attention_op = {
    .name = "encoder_attention",
    .schema =
        "encoder_attention(Tensor query, Tensor key, Tensor value, Tensor bias, Tensor lengths, float scale, "
        "int precision) -> Tensor",
    .run = encoder_attention,
    .tensors = TENSORS,
    .results = 1,
};
