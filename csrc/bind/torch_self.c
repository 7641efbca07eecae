/* The ops of self-attention. */
#include <string.h>

#include "policy_table.h"
#include "torch_device.h"
#include "torch_ops.h"

/* ---- compact_attention ---- */

enum { QUERY, KEY, VALUE, KEYS, VALUES, CURSOR, SOURCES, ATTENTION_TENSORS };
static const struct argument attention_arguments[ATTENTION_TENSORS] = {
    [QUERY] = {"query", CACHE, 4, {ROWS, TOKENS, HEADS, DIM}},
    [KEY] = {"key", CACHE, 4, {ROWS, TOKENS, KV_HEADS, DIM}},
    [VALUE] = {"value", CACHE, 4, {ROWS, TOKENS, KV_HEADS, DIM}},
    [KEYS] = {"keys", CACHE, 4, {ROWS, KV_HEADS, SLOTS, DIM}},
    [VALUES] = {"values", CACHE, 4, {ROWS, KV_HEADS, SLOTS, DIM}},
    [CURSOR] = {"cursor", TORCH_DTYPE_int32, 2, {CURSORS, ROWS}},
    [SOURCES] = {"sources", TORCH_DTYPE_int32, 2, {ROWS, SLOTS}},
};

static bool compact_attention(struct call *const call, const StableIValue *const numbers) {
  const int given = is_empty(call, SOURCES) ? SOURCES : ATTENTION_TENSORS;
  /* Latents have no values. Where rows are none, keys are empty too. */
  const bool is_latent = is_empty(call, VALUES) && !is_empty(call, KEYS);
  for (int i = 0; i < given; i++) {
    if (i == KEY && !is_latent) call->sizes[KV_HEADS] = call->sizes[HEADS];
    if (is_latent && (i == VALUE || i == VALUES)) continue;
    if (!accept(call, i, &attention_arguments[i], true)) return false;
  }
  if (is_latent && call->sizes[HEADS] % call->sizes[KV_HEADS])
    return fail(call, "query must have heads that are a multiple of %lld kv_heads, got %lld",
                (long long)call->sizes[KV_HEADS], (long long)call->sizes[HEADS]);
  const double scale = as_double(numbers[0]);
  const bool want_weights = as_bool(numbers[1]);
  const int64_t *const size = call->sizes, none = 0;
  const int64_t output_shape[] = {size[ROWS], size[TOKENS], size[HEADS], size[DIM]};
  const int64_t weights_shape[] = {size[ROWS], size[HEADS], size[TOKENS], size[SLOTS]};
  void *output, *weights;
  if (!is_finite(call, "scale", scale) || !are_apart(call, attention_arguments, given, 1u << KEYS | 1u << VALUES) ||
      !needs_no_grad(call, attention_arguments, given) ||
      !new_result(call, 0, 4, output_shape, call->cache_dtype, &output) ||
      !new_result(call, 1, want_weights ? 4 : 1, want_weights ? weights_shape : &none, TORCH_DTYPE_float32, &weights))
    return false;
  struct wkv_attention attention = {
      .rows = size[ROWS],
      .tokens = size[TOKENS],
      .heads = size[HEADS],
      .kv_heads = size[KV_HEADS],
      .slots = size[SLOTS],
      .head_dim = size[DIM],
      .dtype = (enum wkv_dtype)call->cache_dtype,
      .query = call->data[QUERY],
      .key = call->data[KEY],
      .value = call->data[VALUE],
      .keys = call->data[KEYS],
      .values = is_latent ? NULL : call->data[VALUES],
      .cursor = call->data[CURSOR],
      .sources = call->data[SOURCES],
      .output = output,
      .weights = want_weights ? weights : NULL,
      .scale = (float)scale,
  };
  return device_attend(call, &attention);
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

static bool score_evict(struct call *const call, const StableIValue *const numbers) {
  const int64_t policy = (int64_t)numbers[0], budget = (int64_t)numbers[1], recent = (int64_t)numbers[2];
  const double decay = as_double(numbers[3]);
  if (!is_within(call, "policy", policy, 0, POLICIES - 1)) return false;
  const bool is_read[EVICTION_TENSORS] = {[SEEN_WEIGHTS] = policies[policy].reads_attention,
                                          [SEEN_KEYS] = policies[policy].reads_key_norm,
                                          [MOVED_CURSOR] = true,
                                          [POSITIONS] = true,
                                          [SCORES] = true};
  for (int i = 0; i < EVICTION_TENSORS; i++)
    if (!accept(call, i, &eviction_arguments[i], is_read[i])) return false;
  const int64_t *const size = call->sizes;
  if (!is_within(call, "budget", budget, 1, size[SLOTS]) || !is_within(call, "recent", recent, 1, INT32_MAX) ||
      !is_finite(call, "decay", decay) ||
      !are_apart(call, eviction_arguments, EVICTION_TENSORS, 1u << MOVED_CURSOR | 1u << POSITIONS | 1u << SCORES) ||
      !needs_no_grad(call, eviction_arguments, EVICTION_TENSORS))
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
  return device_evict(call, &eviction);
}

const struct torch_op compact_attention_op = {
    .name = "compact_attention",
    .schema =
        "compact_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor cursor, "
        "Tensor sources, float scale, bool want_weights) -> (Tensor, Tensor)",
    .run = compact_attention,
    .tensors = ATTENTION_TENSORS,
    .results = 2,
};

const struct torch_op score_evict_op = {
    .name = "score_evict",
    .schema =
        "score_evict(Tensor weights, Tensor keys, Tensor(a!) cursor, Tensor(b!) positions, Tensor(c!) scores, "
        "int policy, SymInt budget, SymInt recent, float decay) -> ()",
    .run = score_evict,
    .tensors = EVICTION_TENSORS,
    .results = 0,
};
