/* The ops of pruned caches. */
#include "torch_device.h"
#include "torch_ops.h"

/* Query heads share KV heads. */
static bool are_groups(struct call *const call) {
  const int64_t heads = call->sizes[HEADS], kv_heads = call->sizes[KV_HEADS];
  return is_within(call, "heads", heads, 1, WKV_MOST_HEADS) && is_within(call, "kv_heads", kv_heads, 1, heads) &&
         (heads % kv_heads == 0 || fail(call, "query must have heads that are a multiple of %lld kv_heads, got %lld",
                                        (long long)kv_heads, (long long)heads));
}

/* ---- gather_kept ---- */

enum { KEYS, VALUES, INDEX, STARTS, LENGTHS, KEPT_KEYS, KEPT_VALUES, GATHERING_TENSORS };
static const struct argument gathering_arguments[GATHERING_TENSORS] = {
    [KEYS] = {"keys", CACHE, 4, {ROWS, KV_HEADS, TOKENS, DIM}},
    [VALUES] = {"values", CACHE, 4, {ROWS, KV_HEADS, TOKENS, DIM}},
    [INDEX] = {"index", TORCH_DTYPE_int32, 3, {ROWS, KV_HEADS, MOST}},
    [STARTS] = {"starts", TORCH_DTYPE_int32, 2, {ROWS, KV_HEADS}},
    [LENGTHS] = {"lengths", TORCH_DTYPE_int32, 2, {ROWS, KV_HEADS}},
    [KEPT_KEYS] = {"kept_keys", CACHE, 2, {SLOTS, DIM}},
    [KEPT_VALUES] = {"kept_values", CACHE, 2, {SLOTS, DIM}},
};

static bool gather_kept(struct call *const call, const StableIValue *const numbers) {
  (void)numbers;
  struct wkv_view views[2];
  for (int i = 0; i < GATHERING_TENSORS; i++)
    if (i <= VALUES ? !accept_view(call, i, &gathering_arguments[i], &views[i])
                    : !accept(call, i, &gathering_arguments[i], true))
      return false;
  if (!are_apart(call, gathering_arguments, GATHERING_TENSORS, 1u << KEPT_KEYS | 1u << KEPT_VALUES) ||
      !needs_no_grad(call, gathering_arguments, GATHERING_TENSORS))
    return false;
  const int64_t *const size = call->sizes;
  struct wkv_gathering gathering = {
      .rows = size[ROWS],
      .kv_heads = size[KV_HEADS],
      .tokens = size[TOKENS],
      .most = size[MOST],
      .slots = size[SLOTS],
      .head_dim = size[DIM],
      .dtype = (enum wkv_dtype)call->cache_dtype,
      .keys = views[KEYS],
      .values = views[VALUES],
      .index = call->data[INDEX],
      .starts = call->data[STARTS],
      .lengths = call->data[LENGTHS],
      .kept_keys = call->data[KEPT_KEYS],
      .kept_values = call->data[KEPT_VALUES],
  };
  return device_gather(call, &gathering);
}

const struct torch_op gather_kept_op = {
    .name = "gather_kept",
    .schema =
        "gather_kept(Tensor keys, Tensor values, Tensor index, Tensor starts, Tensor lengths, Tensor(a!) kept_keys, "
        "Tensor(b!) kept_values) -> ()",
    .run = gather_kept,
    .tensors = GATHERING_TENSORS,
    .results = 0,
};

/* ---- ragged_attention ---- */

enum { QUERY, FLAT_KEYS, FLAT_VALUES, FLAT_STARTS, FLAT_LENGTHS, BIAS, RAGGED_TENSORS };
static const struct argument ragged_arguments[RAGGED_TENSORS] = {
    [QUERY] = {"query", CACHE, 4, {ROWS, HEADS, QUERIES, DIM}},
    [FLAT_KEYS] = {"keys", CACHE, 2, {SLOTS, DIM}},
    [FLAT_VALUES] = {"values", CACHE, 2, {SLOTS, DIM}},
    [FLAT_STARTS] = {"starts", TORCH_DTYPE_int32, 2, {ROWS, KV_HEADS}},
    [FLAT_LENGTHS] = {"lengths", TORCH_DTYPE_int32, 2, {ROWS, KV_HEADS}},
    [BIAS] = {"bias", TORCH_DTYPE_float32, 1, {SLOTS}},
};

static bool ragged_attention(struct call *const call, const StableIValue *const numbers) {
  const double scale = as_double(numbers[0]);
  const bool has_bias = !is_empty(call, BIAS);
  struct wkv_view query;
  if (!accept_view(call, QUERY, &ragged_arguments[QUERY], &query)) return false;
  for (int i = FLAT_KEYS; i < RAGGED_TENSORS; i++)
    if ((i != BIAS || has_bias) && !accept(call, i, &ragged_arguments[i], true)) return false;
  const int64_t *const size = call->sizes, shape[] = {size[ROWS], size[QUERIES], size[HEADS], size[DIM]};
  void *output;
  if (!is_finite(call, "scale", scale) || !are_groups(call) ||
      !is_within(call, "queries", size[QUERIES], 1, WKV_MOST_QUERIES) ||
      !needs_no_grad(call, ragged_arguments, RAGGED_TENSORS) ||
      !new_result(call, 0, 4, shape, call->cache_dtype, &output))
    return false;
  struct wkv_ragged_attention attention = {
      .rows = size[ROWS],
      .heads = size[HEADS],
      .kv_heads = size[KV_HEADS],
      .queries = size[QUERIES],
      .slots = size[SLOTS],
      .head_dim = size[DIM],
      .dtype = (enum wkv_dtype)call->cache_dtype,
      .query = query,
      .keys = call->data[FLAT_KEYS],
      .values = call->data[FLAT_VALUES],
      .starts = call->data[FLAT_STARTS],
      .lengths = call->data[FLAT_LENGTHS],
      .bias = has_bias ? call->data[BIAS] : NULL,
      .output = output,
      .scale = (float)scale,
  };
  return device_attend_ragged(call, &attention);
}

/* bias: float32 [slots], or empty: none. */
const struct torch_op ragged_attention_op = {
    .name = "ragged_attention",
    .schema =
        "ragged_attention(Tensor query, Tensor keys, Tensor values, Tensor starts, Tensor lengths, Tensor bias, "
        "float scale) -> Tensor",
    .run = ragged_attention,
    .tensors = RAGGED_TENSORS,
    .results = 1,
};

/* ---- attention_received ---- */

enum { SOME_QUERIES, POSITIONS, ALL_KEYS, VISIBLE, RECEIVED_TENSORS };
static const struct argument received_arguments[RECEIVED_TENSORS] = {
    [SOME_QUERIES] = {"query", CACHE, 4, {ROWS, HEADS, QUERIES, DIM}},
    [POSITIONS] = {"positions", TORCH_DTYPE_int32, 1, {QUERIES}},
    [ALL_KEYS] = {"keys", CACHE, 4, {ROWS, KV_HEADS, TOKENS, DIM}},
    [VISIBLE] = {"visible", TORCH_DTYPE_uint8, 2, {ROWS, TOKENS}},
};
static const struct argument visible_argument = {"visible", TORCH_DTYPE_bool, 2, {ROWS, TOKENS}};

static bool attention_received(struct call *const call, const StableIValue *const numbers) {
  const double scale = as_double(numbers[0]);
  const bool is_bool = dtype_of(call, VISIBLE) == TORCH_DTYPE_bool;
  struct wkv_view query, keys;
  int64_t visible_row;
  if (!accept_view(call, SOME_QUERIES, &received_arguments[SOME_QUERIES], &query) ||
      !accept(call, POSITIONS, &received_arguments[POSITIONS], true) ||
      !accept_view(call, ALL_KEYS, &received_arguments[ALL_KEYS], &keys) ||
      !accept_rows(call, VISIBLE, is_bool ? &visible_argument : &received_arguments[VISIBLE], &visible_row))
    return false;
  const int64_t *const size = call->sizes, shape[] = {size[ROWS], size[KV_HEADS], size[TOKENS]};
  void *received;
  if (!is_finite(call, "scale", scale) || !are_groups(call) || !is_within(call, "tokens", size[TOKENS], 1, INT32_MAX) ||
      !needs_no_grad(call, received_arguments, RECEIVED_TENSORS) ||
      !new_result(call, 0, 3, shape, TORCH_DTYPE_float32, &received))
    return false;
  struct wkv_received r = {
      .rows = size[ROWS],
      .heads = size[HEADS],
      .kv_heads = size[KV_HEADS],
      .queries = size[QUERIES],
      .tokens = size[TOKENS],
      .head_dim = size[DIM],
      .dtype = (enum wkv_dtype)call->cache_dtype,
      .query = query,
      .positions = call->data[POSITIONS],
      .keys = keys,
      .visible = call->data[VISIBLE],
      .visible_row = visible_row,
      .received = received,
      .scale = (float)scale,
  };
  return device_receive(call, &r);
}

/* visible: uint8 or bool [rows, tokens], 0 of what is left padding. */
const struct torch_op attention_received_op = {
    .name = "attention_received",
    .schema = "attention_received(Tensor query, Tensor positions, Tensor keys, Tensor visible, float scale) -> Tensor",
    .run = attention_received,
    .tensors = RECEIVED_TENSORS,
    .results = 1,
};
