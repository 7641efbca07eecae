/* Self-attention over the slots of the cache, and eviction from it. */
#include <stdbool.h>

#include "../policies.h"
#include "isa.h"
#include "softmax.h"

enum {
  BLOCK = 512,   /* slots of one softmax step: all of Whisper's 448, and 2 kB of stack */
  PIECE = 256,   /* channels of one pass; a head of Whisper's has 64 */
  TOGETHER = 16, /* keys whose sums across lanes are formed at once */
  ABREAST = 4    /* values added up in registers before their sum goes back to memory */
};

/* What was checked before a kernel ran, another thread may have written since: it is read into variables and checked
 * again there, and the compiler may not read it a second time. */
#define READ_BY_NOW __asm__ volatile("" ::: "memory")

/* ---- compact_attention ---- */

INLINE void clear(vf *const sums, const int64_t channels) {
  for (int64_t d = 0; d < channels; d += PAIR) sums[d / W] = sums[d / W + 1] = (vf){0};
}

/* Where slots start, start + 1, ... of a head are, counted in numbers from where the row's own slot `start` is. */
INLINE void find_slots(const struct wkv_attention *const a, const int64_t head_dim, const int64_t row,
                       const int64_t first_new, const int64_t start, const int64_t slots, int64_t *const places) {
  const int64_t new_end = least(slots, first_new + a->tokens - start), whole_row = a->kv_heads * a->slots * head_dim;
  const int32_t rows = (int32_t)a->rows, own = (int32_t)row;
  int32_t sources[BLOCK];
  memcpy(sources, a->sources + row * a->slots + start, (size_t)slots * sizeof *sources);
  READ_BY_NOW;
  for (int64_t i = 0; i < slots; i++) sources[i] = sources[i] >= 0 && sources[i] < rows ? sources[i] : own;
  for (int64_t i = first_new > start ? first_new - start : 0; i < new_end; i++) sources[i] = own;
  for (int64_t i = 0; i < slots; i++) places[i] = i * head_dim + (sources[i] - row) * whole_row;
}

/* The same, where no table says otherwise. */
INLINE int64_t place_of(const int64_t *const places, const int64_t slot, const int64_t head_dim) {
  return places ? places[slot] : slot * head_dim;
}

/* sums += factors[i] * x[i] for first <= i < first + count, over n <= PAIR channels of the x at their places. */
INLINE void add_pairs(const enum wkv_dtype dtype, vf *const sums, const float *const factors, const void *const x,
                      const int64_t first, const int count, const int64_t *const places, const int64_t head_dim,
                      const int64_t n) {
  struct pair sum = {sums[0], sums[1]};
  for (int64_t i = first; i < first + count; i++) {
    const struct pair p = load_some(dtype, at(dtype, x, place_of(places, i, head_dim)), n);
    sum.a = multiply_add(splat(factors[i]), p.a, sum.a);
    sum.b = multiply_add(splat(factors[i]), p.b, sum.b);
  }
  sums[0] = sum.a;
  sums[1] = sum.b;
}

/* The same over all channels. */
INLINE void add_multiples(const enum wkv_dtype dtype, vf *const sums, const float *const factors, const void *const x,
                          const int64_t first, const int count, const int64_t *const places, const int64_t head_dim,
                          const int64_t channels) {
  int64_t d = 0;
  for (; d + PAIR <= channels; d += PAIR)
    add_pairs(dtype, sums + d / W, factors, at(dtype, x, d), first, count, places, head_dim, PAIR);
  if (d < channels)
    add_pairs(dtype, sums + d / W, factors, at(dtype, x, d), first, count, places, head_dim, channels - d);
}

/* sum + query . key over n <= PAIR channels, in W partial sums. */
INLINE vf multiply_pair(const enum wkv_dtype dtype, const vf *const query, const void *const key, const int64_t n,
                        const vf sum) {
  const struct pair k = load_some(dtype, key, n);
  return multiply_add(query[1], k.b, multiply_add(query[0], k.a, sum));
}

/* query . key over all channels, in W partial sums. */
INLINE vf multiply_key(const enum wkv_dtype dtype, const vf *const query, const void *const key,
                       const int64_t channels) {
  vf sum = {0};
  int64_t d = 0;
  for (; d + PAIR <= channels; d += PAIR) sum = multiply_pair(dtype, query + d / W, at(dtype, key, d), PAIR, sum);
  return d < channels ? multiply_pair(dtype, query + d / W, at(dtype, key, d), channels - d, sum) : sum;
}

/* logits[s] += scale * query . keys[s] over the channels of one piece. */
INLINE void score_slots(const enum wkv_dtype dtype, float *const logits, const void *const query, const float scale,
                        const void *const keys, const int64_t slots, const int64_t *const places,
                        const int64_t head_dim, const int64_t channels) {
  vf scaled[PIECE / W];
  clear(scaled, channels);
  add_multiples(dtype, scaled, &scale, query, 0, 1, NULL, head_dim, channels);
  for (int64_t start = 0; start < slots; start += TOGETHER) {
    const int64_t count = least(TOGETHER, slots - start);
    vf sums[TOGETHER];
    for (int64_t i = 0; i < count; i++)
      sums[i] = multiply_key(dtype, scaled, at(dtype, keys, place_of(places, start + i, head_dim)), channels);
    for (int64_t i = count; i < TOGETHER; i++) sums[i] = (vf){0};
    for (int64_t i = 0; i < TOGETHER; i += W) {
      float *const logit = logits + start + i;
      store(logit, load(logit) + sum_each(sums + i));
    }
  }
}

/* One head of one token attends over the live slots, its own from first_new on; of the output it forms the channels of
 * one piece. Softmax block by block: the sums so far are rescaled whenever a later block holds a larger logit. */
INLINE void attend(const enum wkv_dtype dtype, const struct wkv_attention *const a, const int64_t head_dim,
                   const int64_t row, const int64_t first_new, const bool by_table, const void *const query,
                   const void *const keys, const void *const values, const int64_t live, void *const output,
                   const int64_t channels, float *const weights) {
  vf sums[PIECE / W];
  clear(sums, channels);
  float total = 0, top = -FLT_MAX; /* finite, so that logits of -inf weigh 0 and are not subtracted from each other */
  for (int64_t start = 0; start < live; start += BLOCK) {
    float block[BLOCK];
    const int64_t slots = least(BLOCK, live - start), padded = wkv_round_up(slots, TOGETHER);
    int64_t found[BLOCK], *const places = by_table ? found : NULL;
    if (by_table) find_slots(a, head_dim, row, first_new, start, slots, places);
    for (int64_t s = 0; s < padded; s++) block[s] = 0;
    for (int64_t d = 0; d < head_dim; d += PIECE)
      score_slots(dtype, block, at(dtype, query, d), a->scale, at(dtype, keys, start * head_dim + d), slots, places,
                  head_dim, least(PIECE, head_dim - d));
    for (int64_t s = slots; s < padded; s++) block[s] = -INFINITY;

    const float higher = largest(block, padded, top), shrink = exponential(splat(top - higher))[0];
    top = higher;
    total = total * shrink + exponentiate(block, padded, top);
    for (int64_t d = 0; d < channels; d += PAIR) {
      sums[d / W] *= shrink;
      sums[d / W + 1] *= shrink;
    }
    const void *const block_values = at(dtype, values, start * head_dim);
    int64_t s = 0;
    for (; s + ABREAST <= slots; s += ABREAST)
      add_multiples(dtype, sums, block, block_values, s, ABREAST, places, head_dim, channels);
    for (; s < slots; s++) add_multiples(dtype, sums, block, block_values, s, 1, places, head_dim, channels);
    if (weights) {
      multiply(weights, start, shrink);
      memcpy(weights + start, block, (size_t)slots * sizeof(float));
    }
  }
  for (int64_t d = 0; d < channels; d += PAIR) {
    const struct pair mean = {sums[d / W] * (1 / total), sums[d / W + 1] * (1 / total)};
    store_some(dtype, at_mut(dtype, output, d), mean, least(PAIR, channels - d));
  }
  if (weights) {
    multiply(weights, live, 1 / total);
    memset(weights + live, 0, (size_t)(a->slots - live) * sizeof(float));
  }
}

/* One head of one token over the slots of its KV head. */
INLINE void attend_head(const enum wkv_dtype dtype, const struct wkv_attention *const a, const int64_t head_dim,
                        const int64_t row, const int64_t token, const int64_t head, const int64_t first_new,
                        const void *const keys, const void *const values, const int64_t live) {
  const int64_t from = ((row * a->tokens + token) * a->heads + head) * head_dim;
  const void *const query = at(dtype, a->query, from);
  void *const output = at_mut(dtype, a->output, from);
  float *const weights = a->weights ? a->weights + ((row * a->heads + head) * a->tokens + token) * a->slots : NULL;
  for (int64_t d = 0; d < head_dim; d += PIECE)
    if (a->sources) /* known to the compiler, what is without a table has no places to look up */
      attend(dtype, a, head_dim, row, first_new, true, query, keys, at(dtype, values, d), live,
             at_mut(dtype, output, d), least(PIECE, head_dim - d), weights);
    else
      attend(dtype, a, head_dim, row, first_new, false, query, keys, at(dtype, values, d), live,
             at_mut(dtype, output, d), least(PIECE, head_dim - d), weights);
}

/* One KV head of one row, token after token. */
INLINE void attend_row(const enum wkv_dtype dtype, const struct wkv_attention *const a, const int64_t head_dim,
                       const int64_t row, const int64_t kv_head) {
  const int64_t size = head_dim * size_of(dtype); /* bytes of one head of one token */
  const int64_t group = a->heads / a->kv_heads, first = kv_head * group;
  char *const keys = (char *)a->keys + (row * a->kv_heads + kv_head) * a->slots * size;
  char *const values = a->values ? (char *)a->values + (row * a->kv_heads + kv_head) * a->slots * size : keys;
  int64_t live = a->cursor[WKV_LIVE * a->rows + row], slot = a->cursor[WKV_SLOT * a->rows + row];
  const int64_t seen = a->cursor[WKV_SEEN * a->rows + row], first_new = slot;
  READ_BY_NOW;

  for (int64_t token = 0; token < a->tokens; token++) {
    const int64_t from = ((row * a->tokens + token) * a->kv_heads + kv_head) * size;
    if (seen + token < 0 || slot < 0 || slot >= a->slots || live < 0 || live > a->slots) {
      memset((char *)a->output + ((row * a->tokens + token) * a->heads + first) * size, 0, (size_t)(group * size));
      for (int64_t head = first; a->weights && head < first + group; head++)
        memset(a->weights + ((row * a->heads + head) * a->tokens + token) * a->slots, 0,
               (size_t)a->slots * sizeof(float));
      continue;
    }
    memcpy(keys + slot * size, (const char *)a->key + from, (size_t)size);
    if (a->values) memcpy(values + slot * size, (const char *)a->value + from, (size_t)size);
    slot++;
    live = slot > live ? slot : live;
    for (int64_t head = first; head < first + group; head++)
      attend_head(dtype, a, head_dim, row, token, head, first_new, keys, values, live);
  }
}

typedef void attend_function(const struct wkv_attention *, int64_t row, int64_t head);

#define ATTEND(dtype, size, head_dim) \
  static void attend_##dtype##_##size(const struct wkv_attention *const a, const int64_t row, const int64_t head) { \
    attend_row(WKV_##dtype, a, head_dim, row, head); \
  }
#define ATTEND_IN(dtype) ATTEND(dtype, 64, 64) ATTEND(dtype, any, a->head_dim)
ATTEND_IN(FLOAT32)
ATTEND_IN(BFLOAT16)
ATTEND_IN(FLOAT16)

/* Every Whisper has heads of 64 channels: known to the compiler, that makes the inner loops straight lines. */
static attend_function *const attend_64[WKV_DTYPES] = {attend_FLOAT32_64, attend_BFLOAT16_64, attend_FLOAT16_64};
static attend_function *const attend_any[WKV_DTYPES] = {attend_FLOAT32_any, attend_BFLOAT16_any, attend_FLOAT16_any};

void ON_ISA(wkv_compact_attention)(const struct wkv_attention *const a, const int64_t begin, const int64_t end) {
  attend_function *const attend_item = (a->head_dim == 64 ? attend_64 : attend_any)[a->dtype];
  for (int64_t item = begin; item < end; item++) attend_item(a, item / a->kv_heads, item % a->kv_heads);
}

/* ---- score_evict ---- */

/* Squared length of the key in a slot, over all heads. */
static float key_norm(const struct wkv_eviction *const e, const int64_t row, const int64_t slot) {
  vf sum = {0};
  for (int64_t head = 0; head < e->heads; head++) {
    const void *const key = at(e->dtype, e->keys, ((row * e->heads + head) * e->slots + slot) * e->head_dim);
    for (int64_t d = 0; d < e->head_dim; d += PAIR) {
      const struct pair k = load_some(e->dtype, at(e->dtype, key, d), least(PAIR, e->head_dim - d));
      sum = multiply_add(k.a, k.a, multiply_add(k.b, k.b, sum));
    }
  }
  return sum_of(sum);
}

/* The policy scores every live slot of a row after a token was written to new_slot. */
INLINE void score(float (*const policy)(struct wkv_token), const bool reads_attention, const bool reads_key_norm,
                  const struct wkv_eviction *const e, const int64_t row, const int64_t token, const int64_t live,
                  const int64_t new_slot) {
  const int32_t *const positions = e->positions + row * e->slots;
  float *const scores = e->scores + row * e->slots;
  const float norm = reads_key_norm ? key_norm(e, row, new_slot) : 0;
  scores[new_slot] = 0;
  for (int64_t start = 0; start < live; start += BLOCK) {
    const int64_t slots = least(BLOCK, live - start);
    float attention[BLOCK] = {0};
    for (int64_t head = 0; reads_attention && head < e->heads; head++) {
      const float *const weights = e->weights + ((row * e->heads + head) * e->tokens + token) * e->slots + start;
      for (int64_t s = 0; s < slots; s++) attention[s] += weights[s];
    }
    for (int64_t s = 0; s < slots; s++) {
      const bool is_new = start + s == new_slot;
      scores[start + s] = policy((struct wkv_token){.score = scores[start + s],
                                                    .attention = attention[s],
                                                    .key_norm = is_new ? norm : 0,
                                                    .position = (float)positions[start + s],
                                                    .decay = e->decay,
                                                    .is_new = is_new});
    }
  }
}

typedef void score_function(const struct wkv_eviction *, int64_t row, int64_t token, int64_t live, int64_t new_slot);

#define SCORE(name, reads_attention, reads_key_norm) \
  static void score_##name(const struct wkv_eviction *const e, const int64_t row, const int64_t token, \
                           const int64_t live, const int64_t new_slot) { \
    score(wkv_##name, reads_attention, reads_key_norm, e, row, token, live, new_slot); \
  }
WKV_POLICIES(SCORE)

#define SCORE_ENTRY(name, reads_attention, reads_key_norm) score_##name,
static score_function *const score_with[] = {WKV_POLICIES(SCORE_ENTRY)};

/* What stands in the way of evicting a slot; the least goes first. */
enum reluctance { EVICTABLE, NOT_A_NUMBER, RECENT, PINNED };

struct candidate {
  enum reluctance reluctance;
  float score;
  int64_t age; /* the lower the older; reversed among pinned tokens */
};

INLINE bool goes_before(const struct candidate a, const struct candidate b) {
  return a.reluctance != b.reluctance ? a.reluctance < b.reluctance
         : a.score != b.score         ? a.score < b.score
                                      : a.age < b.age;
}

/* The slot of the next token, which stands at position seen. */
static int64_t next_slot(const struct wkv_eviction *const e, const int64_t row, const int64_t live, const int64_t seen,
                         const int64_t pinned) {
  if (live < e->budget) return live;
  const int32_t *const positions = e->positions + row * e->slots;
  const float *const scores = e->scores + row * e->slots;
  int64_t chosen = 0;
  struct candidate first = {.reluctance = PINNED, .age = INT64_MAX};
  for (int64_t slot = 0; slot < live; slot++) {
    const int64_t position = positions[slot];
    const enum reluctance reluctance = position < pinned              ? PINNED
                                       : position > seen - e->recent  ? RECENT
                                       : scores[slot] != scores[slot] ? NOT_A_NUMBER
                                                                      : EVICTABLE;
    const struct candidate next = {reluctance, reluctance == EVICTABLE ? scores[slot] : 0,
                                   reluctance == PINNED ? -position : position};
    if (!goes_before(next, first)) continue;
    first = next;
    chosen = slot;
  }
  return chosen;
}

void ON_ISA(wkv_score_evict)(const struct wkv_eviction *const e, const int64_t begin, const int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    int32_t *const cursor = e->cursor + row;
    int64_t live = cursor[WKV_LIVE * e->rows], slot = cursor[WKV_SLOT * e->rows], seen = cursor[WKV_SEEN * e->rows];
    const int64_t pinned = cursor[WKV_PINNED * e->rows];
    READ_BY_NOW;
    if (slot < 0 || live < 0 || live > e->slots) continue;
    const int64_t padding = seen < 0 ? least(-seen, e->tokens) : 0;
    seen += padding;
    if (padding) slot = next_slot(e, row, live, seen, pinned);
    for (int64_t token = padding; token < e->tokens; token++) {
      if (slot < e->slots) {
        e->positions[row * e->slots + slot] = (int32_t)seen;
        live = slot + 1 > live ? slot + 1 : live;
        score_with[e->policy](e, row, token, live, slot);
      }
      seen++;
      slot = next_slot(e, row, live, seen, pinned);
    }
    cursor[WKV_LIVE * e->rows] = (int32_t)live;
    cursor[WKV_SLOT * e->rows] = (int32_t)slot;
    cursor[WKV_SEEN * e->rows] = (int32_t)seen;
  }
}
