/* The op of the searches. */
#include "torch_device.h"
#include "torch_ops.h"

enum { ALL_SCORES, ADDED, CHOICE_TENSORS };
static const struct argument choice_arguments[CHOICE_TENSORS] = {
    [ALL_SCORES] = {"scores", TORCH_DTYPE_float32, 3, {AUDIOS, BEAMS, VOCABULARY}},
    [ADDED] = {"added", TORCH_DTYPE_float32, 2, {AUDIOS, BEAMS}},
};

static bool choose_tokens(struct call *const call, const StableIValue *const numbers) {
  const int64_t count = (int64_t)numbers[0];
  for (int i = 0; i < CHOICE_TENSORS; i++)
    if (!accept(call, i, &choice_arguments[i], true)) return false;
  const int64_t *const size = call->sizes;
  const int64_t shape[] = {size[AUDIOS], count};
  void *values, *places;
  if (!is_within(call, "count", count, 1, size[BEAMS] * size[VOCABULARY]) ||
      !needs_no_grad(call, choice_arguments, CHOICE_TENSORS) ||
      !new_result(call, 0, 2, shape, TORCH_DTYPE_float32, &values) ||
      !new_result(call, 1, 2, shape, TORCH_DTYPE_int64, &places))
    return false;
  struct wkv_choice choice = {
      .audios = size[AUDIOS],
      .beams = size[BEAMS],
      .vocabulary = size[VOCABULARY],
      .count = count,
      .scores = call->data[ALL_SCORES],
      .added = call->data[ADDED],
      .values = values,
      .places = places,
  };
  return device_choose(call, &choice);
}

const struct torch_op choose_tokens_op = {
    .name = "choose_tokens",
    .schema = "choose_tokens(Tensor scores, Tensor added, int count) -> (Tensor, Tensor)",
    .run = choose_tokens,
    .tensors = CHOICE_TENSORS,
    .results = 2,
};
