/* The best of a search's scores: one look at each, and only those that may be among the best are looked at again. */
#include <math.h>
#include <stdbool.h>

#include "isa.h"
#include "simd.h"

/* The order of torch.topk, and of torch.argmax among equals: NaN is the largest, and what comes first goes first. */
INLINE bool goes_before(const struct wkv_chosen a, const struct wkv_chosen b) {
  const bool a_is_nan = isnan(a.value), b_is_nan = isnan(b.value);
  if (a_is_nan || b_is_nan) return a_is_nan && (!b_is_nan || a.place < b.place);
  return a.value != b.value ? a.value > b.value : a.place < b.place;
}

/* Into the best so far, in their order; returns how many of `most` there are then. */
INLINE int64_t enter(struct wkv_chosen *const best, const int64_t found, const int64_t most,
                     const struct wkv_chosen next) {
  if (found == most && !goes_before(next, best[most - 1])) return found;
  int64_t i = found < most ? found : most - 1;
  for (; i > 0 && goes_before(next, best[i - 1]); i--) best[i] = best[i - 1];
  best[i] = next;
  return found < most ? found + 1 : most;
}

INLINE bool any(const vi mask) {
  uint64_t words[W / 2], all = 0;
  memcpy(words, &mask, sizeof words);
  for (int i = 0; i < W / 2; i++) all |= words[i];
  return all;
}

static int64_t best_of_beam(const struct wkv_choice *const c, const int64_t row, const int64_t most,
                            struct wkv_chosen *const best) {
  enum { TOGETHER = 8 * W };
  const float *const scores = c->scores + row * c->vocabulary, added = c->added[row];
  const int64_t first = row % c->beams * c->vocabulary;
  int64_t found = 0;
  for (int64_t start = 0; start < c->vocabulary; start += TOGETHER) {
    const int64_t end = least(start + TOGETHER, c->vocabulary);
    if (found == most && end - start == TOGETHER) {
      const vf last = splat(best[most - 1].value);
      vi candidates = {0};
      for (int i = 0; i < TOGETHER; i += W) candidates |= ~(load(scores + start + i) + added <= last);
      if (!any(candidates)) continue;
    }
    for (int64_t i = start; i < end; i++)
      found = enter(best, found, most, (struct wkv_chosen){scores[i] + added, first + i});
  }
  return found;
}

void ON_ISA(wkv_choose)(const struct wkv_choice *const c, const int64_t begin, const int64_t end) {
  for (int64_t row = begin; row < end; row++)
    best_of_beam(c, row, least(c->count, c->vocabulary), c->chosen + row * c->count);
}

void ON_ISA(wkv_choose_finish)(const struct wkv_choice *const c, const int64_t begin, const int64_t end) {
  const int64_t each = least(c->count, c->vocabulary);
  for (int64_t audio = begin; audio < end; audio++) {
    struct wkv_chosen *const best = c->chosen + audio * c->beams * c->count; /* those of the first beam go on */
    int64_t found = each;
    for (int64_t beam = 1; beam < c->beams; beam++)
      for (int64_t i = 0; i < each; i++) found = enter(best, found, c->count, best[beam * c->count + i]);
    for (int64_t i = 0; i < c->count; i++) {
      c->values[audio * c->count + i] = best[i].value;
      c->places[audio * c->count + i] = best[i].place;
    }
  }
}
