/* The ops of cross-attention. */
#include "torch_device.h"
#include "torch_ops.h"

/* ---- pack_frames ---- */

enum { STATES, PACKED_LENGTHS, PACKING_TENSORS };
static const struct argument packing_arguments[PACKING_TENSORS] = {
    [STATES] = {"states", CACHE, 4, {AUDIOS, FRAMES, HEADS, DIM}},
    [PACKED_LENGTHS] = {"lengths", TORCH_DTYPE_int32, 1, {AUDIOS}},
};

static bool pack_frames(struct call *const call, const StableIValue *const numbers) {
  const int64_t bits = (int64_t)numbers[0], group = (int64_t)numbers[1];
  for (int i = 0; i < PACKING_TENSORS; i++)
    if (!accept(call, i, &packing_arguments[i], true)) return false;
  if (bits != 8 && bits != 4) return fail(call, "bits must be 8 or 4, got %lld", (long long)bits);
  const int64_t *const size = call->sizes;
  const int64_t channels = padded_channels(size[DIM]);
  const int64_t groups = group > 0 ? wkv_count_of(size[FRAMES], group) : 0;
  const int64_t codes_shape[] = {size[AUDIOS], size[HEADS], wkv_count_of(size[FRAMES], WKV_TILE), 2 * bits, channels};
  const int64_t scales_shape[] = {size[AUDIOS], size[HEADS], groups, 2, channels};
  void *codes, *scales;
  if (!is_group(call, group) || !needs_no_grad(call, packing_arguments, PACKING_TENSORS) ||
      !new_result(call, 0, 5, codes_shape, TORCH_DTYPE_uint8, &codes) ||
      !new_result(call, 1, 5, scales_shape, TORCH_DTYPE_float32, &scales))
    return false;
  struct wkv_packing packing = {
      .audios = size[AUDIOS],
      .heads = size[HEADS],
      .frames = size[FRAMES],
      .head_dim = size[DIM],
      .dtype = (enum wkv_dtype)call->cache_dtype,
      .bits = (int)bits,
      .group = group,
      .states = call->data[STATES],
      .lengths = call->data[PACKED_LENGTHS],
      .codes = codes,
      .scales = scales,
  };
  return device_pack(call, &packing);
}

/* ---- cross_attention ---- */

enum { QUERY, KEYS, VALUES, KEY_SCALES, VALUE_SCALES, OWNER, LENGTHS, BIAS, COUNTERS, CROSS_TENSORS };

/* clang-format off */
#define QUERY_ARGUMENT {"query", CACHE, 4, {ROWS, TOKENS, HEADS, DIM}}
#define OWNER_ARGUMENT {"owner", TORCH_DTYPE_int32, 1, {ROWS}}
#define LENGTHS_ARGUMENT {"lengths", TORCH_DTYPE_int32, 1, {AUDIOS}}
#define BIAS_ARGUMENT {"bias", TORCH_DTYPE_float32, 2, {AUDIOS, FRAMES}}
#define COUNTERS_ARGUMENT {"counters", TORCH_DTYPE_int32, 1, {COUNTED}}
/* clang-format on */

static const struct argument plain_arguments[CROSS_TENSORS] = {
    [QUERY] = QUERY_ARGUMENT,
    [KEYS] = {"keys", CACHE, 4, {AUDIOS, HEADS, FRAMES, DIM}},
    [VALUES] = {"values", CACHE, 4, {AUDIOS, HEADS, FRAMES, DIM}},
    [OWNER] = OWNER_ARGUMENT,
    [LENGTHS] = LENGTHS_ARGUMENT,
    [BIAS] = BIAS_ARGUMENT,
    [COUNTERS] = COUNTERS_ARGUMENT,
};
static const struct argument packed_arguments[CROSS_TENSORS] = {
    [QUERY] = QUERY_ARGUMENT,
    [KEYS] = {"keys", TORCH_DTYPE_uint8, 5, {AUDIOS, HEADS, TILES, STRIP, CHANNELS}},
    [VALUES] = {"values", TORCH_DTYPE_uint8, 5, {AUDIOS, HEADS, TILES, STRIP, CHANNELS}},
    [KEY_SCALES] = {"key_scales", TORCH_DTYPE_float32, 5, {AUDIOS, HEADS, GROUPS, PAIR, CHANNELS}},
    [VALUE_SCALES] = {"value_scales", TORCH_DTYPE_float32, 5, {AUDIOS, HEADS, GROUPS, PAIR, CHANNELS}},
    [OWNER] = OWNER_ARGUMENT,
    [LENGTHS] = LENGTHS_ARGUMENT,
    [BIAS] = BIAS_ARGUMENT,
    [COUNTERS] = COUNTERS_ARGUMENT,
};

static const struct argument mixed_arguments[CROSS_TENSORS] = {
    [QUERY] = QUERY_ARGUMENT,
    [KEYS] = {"keys", TORCH_DTYPE_uint8, 4, {AUDIOS, HEADS, TILES, TILE_BYTES}},
    [VALUES] = {"values", TORCH_DTYPE_uint8, 4, {AUDIOS, HEADS, TILES, TILE_BYTES}},
    [KEY_SCALES] = {"key_scales", TORCH_DTYPE_float32, 5, {AUDIOS, HEADS, GROUPS, PAIR, CHANNELS}},
    [VALUE_SCALES] = {"value_scales", TORCH_DTYPE_float32, 1, {CHANNELS}},
    [OWNER] = OWNER_ARGUMENT,
    [LENGTHS] = LENGTHS_ARGUMENT,
    [BIAS] = BIAS_ARGUMENT,
    [COUNTERS] = COUNTERS_ARGUMENT,
};

/* A packed cache is as large as `frames` and `group` say. */
static bool fits(struct call *const call, const bool is_mixed, const int64_t frames, const int64_t group) {
  int64_t *const size = call->sizes;
  const int64_t channels = padded_channels(size[DIM]);
  if (is_mixed && call->data[KEYS] != call->data[VALUES])
    return fail(call, "keys and values of mixed bits must be the same tensor");
  if (!is_mixed && size[STRIP] != 16 && size[STRIP] != 8)
    return fail(call, "keys must have 16 bytes (8 bits) or 8 bytes (4 bits) a tile and channel, got %lld",
                (long long)size[STRIP]);
  if (size[DIM] > WKV_MOST_CHANNELS)
    return fail(call, "query must have at most %d channels a head for a packed cache, got %lld", WKV_MOST_CHANNELS,
                (long long)size[DIM]);
  if (size[CHANNELS] != channels)
    return fail(call, "keys must have %lld channels for queries of %lld, got %lld", (long long)channels,
                (long long)size[DIM], (long long)size[CHANNELS]);
  if (size[TILES] != wkv_count_of(frames, WKV_TILE) || size[GROUPS] != wkv_count_of(frames, group))
    return fail(call, "%lld frames in groups of %lld are %lld tiles and %lld groups, got %lld and %lld",
                (long long)frames, (long long)group, (long long)wkv_count_of(frames, WKV_TILE),
                (long long)wkv_count_of(frames, group), (long long)size[TILES], (long long)size[GROUPS]);
  return true;
}

static bool cross_attention(struct call *const call, const StableIValue *const numbers) {
  const bool is_packed = dtype_of(call, KEYS) == TORCH_DTYPE_uint8;
  int64_t dim = 0;
  const bool is_mixed = is_packed && !shim.aoti_torch_get_dim(call->tensors[KEYS], &dim) && dim == 4;
  const struct argument *const arguments = is_mixed ? mixed_arguments : is_packed ? packed_arguments : plain_arguments;
  const int64_t frames = (int64_t)numbers[0], group = (int64_t)numbers[1];
  const double scale = as_double(numbers[2]);
  const bool want_weights = as_bool(numbers[3]);
  if (is_packed && !is_within(call, "frames", frames, 1, INT32_MAX)) return false;
  if (is_packed) call->sizes[FRAMES] = frames;
  for (int i = 0; i < CROSS_TENSORS; i++) {
    const bool is_left_out = (i == BIAS || i == COUNTERS) && is_empty(call, i);
    if (arguments[i].name && !is_left_out && !accept(call, i, &arguments[i], true)) return false;
  }
  if (is_packed && (!is_group(call, group) || !fits(call, is_mixed, frames, group))) return false;
  const int64_t *const size = call->sizes, none = 0;
  const int64_t output_shape[] = {size[ROWS], size[TOKENS], size[HEADS], size[DIM]};
  const int64_t weights_shape[] = {size[ROWS], size[HEADS], size[TOKENS], size[FRAMES]};
  void *output, *weights;
  if (!is_finite(call, "scale", scale) || !are_apart(call, arguments, CROSS_TENSORS, 1u << COUNTERS) ||
      !needs_no_grad(call, arguments, CROSS_TENSORS) ||
      !new_result(call, 0, 4, output_shape, call->cache_dtype, &output) ||
      !new_result(call, 1, want_weights ? 4 : 1, want_weights ? weights_shape : &none, TORCH_DTYPE_float32, &weights))
    return false;
  struct wkv_cross_attention attention = {
      .rows = size[ROWS],
      .tokens = size[TOKENS],
      .heads = size[HEADS],
      .head_dim = size[DIM],
      .audios = size[AUDIOS],
      .frames = size[FRAMES],
      .dtype = (enum wkv_dtype)call->cache_dtype,
      .bits = is_mixed    ? WKV_MIXED
              : is_packed ? (int)size[STRIP] / 2
                          : 0,
      .tile_bytes = is_mixed ? size[TILE_BYTES] : 0,
      .group = group,
      .query = call->data[QUERY],
      .keys = call->data[KEYS],
      .values = call->data[VALUES],
      .key_scales = call->data[KEY_SCALES],
      .value_scales = call->data[VALUE_SCALES],
      .owner = call->data[OWNER],
      .lengths = call->data[LENGTHS],
      .bias = call->data[BIAS],
      .output = output,
      .weights = want_weights ? weights : NULL,
      .scale = (float)scale,
      .counters = call->data[COUNTERS],
      .lots = size[COUNTED] / (size[AUDIOS] * size[HEADS]),
  };
  return device_attend_cross(call, &attention);
}

const struct torch_op pack_frames_op = {
    .name = "pack_frames",
    .schema = "pack_frames(Tensor states, Tensor lengths, int bits, SymInt group) -> (Tensor, Tensor)",
    .run = pack_frames,
    .tensors = PACKING_TENSORS,
    .results = 2,
};

/* bias: float32 [audios, frames], added to each frame's logit, for every format; empty: none.
 * counters: zeros, which they are again when the call is done; one for each audio and head, or a few where there are
 * many queries. Calls that may run at the same time need their own. The CPU has no use for them, and they may be left
 * empty; on CUDA another kernel is launched then. */
const struct torch_op cross_attention_op = {
    .name = "cross_attention",
    .schema =
        "cross_attention(Tensor query, Tensor keys, Tensor values, Tensor key_scales, Tensor value_scales, "
        "Tensor owner, Tensor lengths, Tensor bias, Tensor(a!) counters, SymInt frames, SymInt group, float scale, "
        "bool want_weights) -> (Tensor, Tensor)",
    .run = cross_attention,
    .tensors = CROSS_TENSORS,
    .results = 2,
};
