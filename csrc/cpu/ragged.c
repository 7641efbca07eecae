/* What is done with a flat cache of kept tokens: they are gathered, and attended over. The queries of a group go over
 * each block of their slots together, as those of an audio do in cross-attention. */
#include "cross_floats.h"
#include "isa.h"

/* ---- gathering ---- */

struct token {
  const char *key, *value; /* NULL: there is none */
};

/* The i-th to be kept of a head. It may be none: another thread can write to the index once it is checked. */
INLINE struct token token_of(const struct wkv_gathering *const g, const int64_t head, const int64_t i) {
  const int64_t row = head / g->kv_heads, its = head % g->kv_heads;
  const int64_t token = ((const volatile int32_t *)g->index)[head * g->most + i];
  const struct wkv_view *const k = &g->keys, *const v = &g->values;
  if (token < 0 || token >= g->tokens) return (struct token){0};
  return (struct token){at(g->dtype, k->data, row * k->row + its * k->head + token * k->token),
                        at(g->dtype, v->data, row * v->row + its * v->head + token * v->token)};
}

void ON_ISA(wkv_gather_kept)(const struct wkv_gathering *const g, const int64_t begin, const int64_t end) {
  enum { SOON = 8 }; /* tokens that are asked for before they are copied: no processor foresees where they stand */
  const int64_t blocks = wkv_count_of(g->most, WKV_BLOCK);
  const size_t bytes = (size_t)(g->head_dim * size_of(g->dtype));
  for (int64_t item = begin; item < end; item++) {
    const int64_t head = item / blocks, first = item % blocks * WKV_BLOCK;
    const int64_t last = least(first + WKV_BLOCK, g->lengths[head]);
    for (int64_t i = first; i < last; i++) {
      const struct token soon = token_of(g, head, least(i + SOON, last - 1)), token = token_of(g, head, i);
      for (size_t b = 0; soon.key && b < bytes; b += 64) {
        __builtin_prefetch(soon.key + b);
        __builtin_prefetch(soon.value + b);
      }
      const int64_t slot = (g->starts[head] + i) * g->head_dim;
      if (!token.key) continue;
      memcpy(at_mut(g->dtype, g->kept_keys, slot), token.key, bytes);
      memcpy(at_mut(g->dtype, g->kept_values, slot), token.value, bytes);
    }
  }
}

/* ---- attention ---- */

/* One KV head, some queries of its group, and a range of its slots. Slots are numbered within the head. */
struct part {
  const struct wkv_ragged_attention *a;
  int64_t group, length;
  int64_t head;        /* row * kv_heads + head */
  int64_t first_query; /* query * group + head */
  int64_t line;        /* of the sums: where the queries of this range begin */
};

/* Slots that a query sees; 0 or less: none. */
INLINE int64_t seen_by(const struct part *const p, const int64_t query) {
  return p->length - (p->a->queries - 1 - query / p->group);
}

/* `count` of the queries of w, from the first-th on. */
INLINE struct work some_queries(const enum wkv_dtype dtype, const struct work *const w, const int64_t first,
                                const int64_t count) {
  struct work some = *w;
  some.queries = count;
  some.logits = some.exponentials = w->logits + first * WKV_BLOCK;
  if (in_bfloat16(dtype)) {
    some.rounded_query += first * w->channels;
    some.rounded_exponentials += first * WKV_BLOCK / 2;
  } else {
    some.query += first * w->channels;
  }
  for (int64_t q = 0; q < count; q++) {
    some.sums[q] = w->sums[first + q];
    some.totals[q] = w->totals[first + q];
  }
  return some;
}

/* Queries that are scored: one more, of zeros or of another token, if that saves going over the keys once for each of
 * a few. */
INLINE int64_t scored(const int64_t queries) { return SOME > 2 && queries % SOME == SOME - 1 ? queries + 1 : queries; }

INLINE void attend_block(const enum wkv_dtype dtype, const bool is_narrow, const float scale, struct work *const w,
                         const int64_t first, const int64_t slots) {
  const int64_t queries = w->queries;
  w->queries = scored(queries);
  score_floats(dtype, is_narrow, true, w, first, slots);
  w->queries = queries;
  for (int64_t q = 0; q < w->queries; q++) {
    multiply(w->logits + q * WKV_BLOCK, slots, scale);
    soften(w, q, first, slots);
  }
  mix_floats(dtype, true, w, first, slots);
}

/* Of heads of any width, compiled once for each dtype. */
#define ATTEND_ANY(dtype) \
  static __attribute__((noinline)) void attend_any_##dtype(const float scale, struct work *const w, \
                                                           const int64_t first, const int64_t slots) { \
    attend_block(WKV_##dtype, false, scale, w, first, slots); \
  }
ATTEND_ANY(FLOAT32)
ATTEND_ANY(BFLOAT16)
ATTEND_ANY(FLOAT16)

typedef void block_function(float scale, struct work *, int64_t first, int64_t slots);
static block_function *const attend_any[WKV_DTYPES] = {attend_any_FLOAT32, attend_any_BFLOAT16, attend_any_FLOAT16};

/* The last tokens see different slots: those of one token at a time, so that nobody reads what he does not see. */
INLINE void attend_last(const enum wkv_dtype dtype, const struct part *const p, const struct work *const w,
                        const int64_t first, const int64_t slots) {
  for (int64_t q = 0, end; q < w->queries; q = end) {
    const int64_t query = p->first_query + q, seen = least(seen_by(p, query) - first, slots);
    end = least(q + p->group - query % p->group, w->queries);
    if (seen <= 0) continue;
    struct work some = some_queries(dtype, w, q, end - q);
    attend_any[dtype](p->a->scale, &some, first, seen);
  }
}

INLINE void *take(char **const scratch, const size_t bytes) {
  void *const taken = *scratch;
  *scratch += bytes;
  return taken;
}

/* No more than wkv_ragged_scratch says. */
INLINE void take_buffers(const enum wkv_dtype dtype, struct work *const w, char *scratch) {
  const size_t channels = (size_t)w->channels;
  if (in_bfloat16(dtype)) {
    w->rounded_query = take(&scratch, (WKV_TOGETHER + 1) * channels * sizeof *w->rounded_query);
    w->rounded_exponentials = take(&scratch, WKV_TOGETHER * WKV_BLOCK / 2 * sizeof *w->rounded_exponentials);
    memset(w->rounded_query + w->queries * w->channels, 0, channels * sizeof *w->rounded_query);
  } else {
    w->query = take(&scratch, (WKV_TOGETHER + 1) * channels * sizeof *w->query);
    memset(w->query + w->queries * w->channels, 0, channels * sizeof *w->query);
  }
  w->logits = w->exponentials = take(&scratch, (WKV_TOGETHER + 1) * WKV_BLOCK * sizeof *w->logits);
}

/* width: of a head if the compiler is to know it, or 0. */
INLINE void attend_item(const enum wkv_dtype dtype, const int64_t width, const struct wkv_ragged_attention *const a,
                        void *const scratch, const int64_t item) {
  const int64_t head_dim = width ? width : a->head_dim;
  const int64_t lots = wkv_ragged_lots(a), range = item / lots, head = a->owner[range];
  const int64_t group = a->heads / a->kv_heads, channels = wkv_round_up(head_dim, WKV_CHANNELS);
  const struct part p = {.a = a,
                         .group = group,
                         .length = a->lengths[head],
                         .head = head,
                         .first_query = item % lots * WKV_TOGETHER,
                         .line = range * a->queries * group};
  struct work w = {.queries = least(WKV_TOGETHER, a->queries * group - p.first_query),
                   .head_dim = head_dim,
                   .channels = channels,
                   .keys = at(dtype, a->keys, a->starts[head] * head_dim),
                   .values = at(dtype, a->values, a->starts[head] * head_dim),
                   .bias = a->bias ? a->bias + a->starts[head] : NULL};
  take_buffers(dtype, &w, scratch);
  const int64_t row = head / a->kv_heads, first_head = head % a->kv_heads * group;
  for (int64_t q = 0; q < w.queries; q++) {
    const int64_t query = p.first_query + q, line = p.line + query;
    const int64_t place = row * a->query.row + (first_head + query % group) * a->query.head +
                          query / group * a->query.token;
    load_query(dtype, false, at(dtype, a->query.data, place), head_dim, 1, &w, q);
    w.sums[q] = memset(a->sums + line * channels, 0, (size_t)channels * sizeof(float));
    w.totals[q] = a->totals + line * 2;
    w.totals[q][0] = -FLT_MAX; /* finite, so that logits of -inf weigh 0 and are not subtracted from each other */
    w.totals[q][1] = 0;
  }
  /* A block of wide heads is smaller, so that it stays in the cache nearby. */
  const int64_t block = head_dim > 128 ? WKV_BLOCK / 4 : WKV_BLOCK;
  const int64_t begin = (range - a->first[head]) * a->range, end = least(begin + a->range, p.length);
  for (int64_t first = begin; first < end; first += block) {
    const int64_t slots = least(block, end - first);
    if (seen_by(&p, p.first_query) < first + slots) attend_last(dtype, &p, &w, first, slots);
    else if (width) attend_block(dtype, width == NARROW, a->scale, &w, first, slots);
    else attend_any[dtype](a->scale, &w, first, slots);
  }
}

/* Known to the compiler, the width of a head makes the inner loops straight lines, which are twice as fast. */
enum { WIDE = 128 };
#define ATTEND(dtype) \
  static void attend_##dtype(const struct wkv_ragged_attention *const a, void *const scratch, const int64_t item) { \
    switch (a->head_dim) { \
      case NARROW: attend_item(WKV_##dtype, NARROW, a, scratch, item); break; \
      case WIDE: attend_item(WKV_##dtype, WIDE, a, scratch, item); break; \
      default: attend_item(WKV_##dtype, 0, a, scratch, item); \
    } \
  }
ATTEND(FLOAT32)
ATTEND(BFLOAT16)
ATTEND(FLOAT16)

typedef void attend_function(const struct wkv_ragged_attention *, void *scratch, int64_t item);
static attend_function *const attend_in[WKV_DTYPES] = {attend_FLOAT32, attend_BFLOAT16, attend_FLOAT16};

void ON_ISA(wkv_ragged_attention)(const struct wkv_ragged_attention *const a, void *const scratch, const int64_t begin,
                                  const int64_t end) {
  for (int64_t item = begin; item < end; item++) attend_in[a->dtype](a, scratch, item);
}

/* ---- the ranges of slots together ---- */

/* What each range of one query weighs takes the place of what its exponentials were counted from. */
INLINE void weigh_ranges(const int64_t first, const int64_t last, const int64_t stride, float *const totals) {
  float top = -FLT_MAX, total = 0;
  for (int64_t r = first; r < last; r++) top = totals[r * stride] > top ? totals[r * stride] : top;
  for (int64_t r = first; r < last; r++) {
    totals[r * stride] = exponential(splat(totals[r * stride] - top))[0];
    total += totals[r * stride + 1] * totals[r * stride];
  }
  for (int64_t r = first; r < last; r++) totals[r * stride] /= total;
}

INLINE void finish(const enum wkv_dtype dtype, const struct wkv_ragged_attention *const a, const int64_t item) {
  const int64_t group = a->heads / a->kv_heads, channels = wkv_round_up(a->head_dim, WKV_CHANNELS);
  const int64_t number = item % a->heads, query = item / a->heads % a->queries, row = item / a->heads / a->queries;
  const int64_t head = row * a->kv_heads + number / group, line = query * group + number % group;
  const int64_t lines = a->queries * group, first = a->first[head], last = a->first[head + 1];
  void *const output = at_mut(dtype, a->output, item * a->head_dim);
  if (a->lengths[head] - (a->queries - 1 - query) <= 0) {
    memset(output, 0, (size_t)(a->head_dim * size_of(dtype)));
    return;
  }
  float *const totals = a->totals + 2 * line;
  weigh_ranges(first, last, 2 * lines, totals);
  for (int64_t d = 0; d < a->head_dim; d += PAIR) {
    struct pair sum = {0};
    for (int64_t r = first; r < last; r++) {
      const float *const sums = a->sums + (r * lines + line) * channels + d;
      sum.a = multiply_add(load(sums), splat(totals[2 * r * lines]), sum.a);
      sum.b = multiply_add(load(sums + W), splat(totals[2 * r * lines]), sum.b);
    }
    store_some(dtype, at_mut(dtype, output, d), sum, least(PAIR, a->head_dim - d));
  }
}

#define FINISH(dtype) \
  static void finish_##dtype(const struct wkv_ragged_attention *const a, const int64_t item) { \
    finish(WKV_##dtype, a, item); \
  }
FINISH(FLOAT32)
FINISH(BFLOAT16)
FINISH(FLOAT16)

typedef void finish_function(const struct wkv_ragged_attention *, int64_t item);
static finish_function *const finish_in[WKV_DTYPES] = {finish_FLOAT32, finish_BFLOAT16, finish_FLOAT16};

void ON_ISA(wkv_ragged_finish)(const struct wkv_ragged_attention *const a, const int64_t begin, const int64_t end) {
  for (int64_t item = begin; item < end; item++) finish_in[a->dtype](a, item);
}
