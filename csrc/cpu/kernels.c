/* The CPU kernels, compiled once per instruction set with -DWKV_ISA=portable, avx2 or avx512. */
#include <float.h>
#include <math.h>
#include <stdbool.h>

#include "../policies.h"
#include "simd.h"

enum {
  BLOCK = 512,             /* slots of one softmax step: all of Whisper's 448, and 2 kB of stack */
  PIECE = 256,             /* output channels of one pass; any head of Whisper's has 64 */
  TOGETHER = W > 8 ? W : 8 /* slots read side by side, so that sums across lanes and query loads are shared */
};

INLINE int64_t least(const int64_t a, const int64_t b) { return a < b ? a : b; }

/* ---- compact_attention ---- */

/* sums[i] += query . keys[i] over the n <= W channels from d on. */
INLINE void add_products(const enum wkv_dtype dtype, vf sums[TOGETHER], const void *const query, const float scale,
                         const void *const keys[TOGETHER], const int64_t d, const int64_t n) {
  const vf q = scale * load(dtype, at(dtype, query, d), n);
  for (int i = 0; i < TOGETHER; i++) sums[i] = fma_(q, load(dtype, at(dtype, keys[i], d), n), sums[i]);
}

/* logits[s] = scale * query . keys[s] for s < slots, padded with -inf to a multiple of TOGETHER.
 * Returns the largest, not less than floor. */
INLINE float score_slots(const enum wkv_dtype dtype, float *const logits, const void *const query, const float scale,
                         const void *const keys, const int64_t slots, const int64_t head_dim, const float floor) {
  vf top = splat(floor);
  for (int64_t s = 0; s < slots; s += TOGETHER) {
    vf sums[TOGETHER] = {0};
    const void *key[TOGETHER]; /* past the end the last slot is read again */
    for (int i = 0; i < TOGETHER; i++) key[i] = at(dtype, keys, least(s + i, slots - 1) * head_dim);
    int64_t d = 0;
    for (; d + W <= head_dim; d += W) add_products(dtype, sums, query, scale, key, d, W);
    if (d < head_dim) add_products(dtype, sums, query, scale, key, d, head_dim - d);
    for (int i = 0; i < TOGETHER; i += W) {
      const vf logit = sum_each(sums + i);
      top = larger(logit, top);
      store(WKV_FLOAT32, logits + s + i, logit, W);
    }
  }
  for (int64_t s = slots; s % TOGETHER; s++) logits[s] = -INFINITY;
  return largest_of(top);
}

/* x = exp(x - top); returns the sum. */
INLINE float exponentiate(float *const x, const int64_t slots, const float top) {
  vf sum = {0};
  for (int64_t s = 0; s < slots; s += W) {
    const vf e = exp_(load(WKV_FLOAT32, x + s, W) - top);
    store(WKV_FLOAT32, x + s, e, W);
    sum += e;
  }
  return sum_of(sum);
}

/* output += weights[i] * values[i] over count slots. */
INLINE void add_values(const enum wkv_dtype dtype, vf *const output, const float *const weights,
                       const void *const values, const int count, const int64_t stride, const int64_t channels) {
  for (int64_t d = 0; d < channels; d += W) {
    vf sum = output[d / W];
    if (d + W <= channels)
      for (int i = 0; i < count; i++)
        sum = fma_(splat(weights[i]), load(dtype, at(dtype, values, i * stride + d), W), sum);
    else
      for (int i = 0; i < count; i++)
        sum = fma_(splat(weights[i]), load(dtype, at(dtype, values, i * stride + d), channels - d), sum);
    output[d / W] = sum;
  }
}

INLINE void multiply(float *const x, const int64_t n, const float factor) {
  for (int64_t i = 0; i < n; i++) x[i] *= factor;
}

/* One head of one token attends over the live slots; of the output it forms the channels of one piece.
 * Softmax block by block: the sums so far are rescaled whenever a later block holds a larger logit. */
INLINE void attend(const enum wkv_dtype dtype, const struct wkv_attention *const a, const void *const query,
                   const void *const keys, const void *const values, const int64_t live, void *const output,
                   const int64_t channels, float *const weights) {
  vf sums[PIECE / W] = {0};
  float total = 0, top = -FLT_MAX; /* finite, so that logits of -inf weigh 0 and are not subtracted from each other */
  for (int64_t start = 0; start < live; start += BLOCK) {
    float block[BLOCK];
    const int64_t slots = least(BLOCK, live - start), padded = (slots + W - 1) / W * W;
    const float higher = score_slots(dtype, block, query, a->scale, at(dtype, keys, start * a->head_dim), slots,
                                     a->head_dim, top);
    const float shrink = exp_(splat(top - higher))[0];
    top = higher;
    total = total * shrink + exponentiate(block, padded, top);
    for (int i = 0; i < PIECE / W; i++) sums[i] *= shrink;

    const void *const block_values = at(dtype, values, start * a->head_dim);
    int64_t s = 0;
    for (; s + 8 <= slots; s += 8)
      add_values(dtype, sums, block + s, at(dtype, block_values, s * a->head_dim), 8, a->head_dim, channels);
    for (; s < slots; s++)
      add_values(dtype, sums, block + s, at(dtype, block_values, s * a->head_dim), 1, a->head_dim, channels);
    if (weights) {
      multiply(weights, start, shrink);
      memcpy(weights + start, block, (size_t)slots * sizeof(float));
    }
  }
  for (int64_t d = 0; d < channels; d += W)
    store(dtype, at_mut(dtype, output, d), sums[d / W] * (1 / total), least(W, channels - d));
  if (weights) {
    multiply(weights, live, 1 / total);
    memset(weights + live, 0, (size_t)(a->slots - live) * sizeof(float));
  }
}

/* One head of one row, token after token. */
INLINE void attend_row(const enum wkv_dtype dtype, const struct wkv_attention *const a, const int64_t row,
                       const int64_t head) {
  const int64_t size = a->head_dim * size_of(dtype); /* bytes of one head of one token */
  char *const keys = (char *)a->keys + (row * a->heads + head) * a->slots * size;
  char *const values = (char *)a->values + (row * a->heads + head) * a->slots * size;
  int64_t live = a->cursor[WKV_LIVE * a->rows + row], slot = a->cursor[WKV_SLOT * a->rows + row];
  const int64_t seen = a->cursor[WKV_SEEN * a->rows + row];

  for (int64_t token = 0; token < a->tokens; token++) {
    const int64_t from = ((row * a->tokens + token) * a->heads + head) * size;
    char *const output = (char *)a->output + from;
    float *const weights = a->weights ? a->weights + ((row * a->heads + head) * a->tokens + token) * a->slots : NULL;
    if (seen + token < 0) {
      memset(output, 0, (size_t)size);
      if (weights) memset(weights, 0, (size_t)a->slots * sizeof(float));
      continue;
    }
    memcpy(keys + slot * size, (const char *)a->key + from, (size_t)size);
    memcpy(values + slot * size, (const char *)a->value + from, (size_t)size);
    slot++;
    live = slot > live ? slot : live;
    for (int64_t d = 0; d < a->head_dim; d += PIECE)
      attend(dtype, a, (const char *)a->query + from, keys, at(dtype, values, d), live, at_mut(dtype, output, d),
             least(PIECE, a->head_dim - d), weights);
  }
}

static void attend_float32(const struct wkv_attention *const a, const int64_t row, const int64_t head) {
  attend_row(WKV_FLOAT32, a, row, head);
}

static void attend_bfloat16(const struct wkv_attention *const a, const int64_t row, const int64_t head) {
  attend_row(WKV_BFLOAT16, a, row, head);
}

static void attend_float16(const struct wkv_attention *const a, const int64_t row, const int64_t head) {
  attend_row(WKV_FLOAT16, a, row, head);
}

static void compact_attention(const struct wkv_attention *const a, const int64_t begin, const int64_t end) {
  static void (*const attend_in[WKV_DTYPES])(const struct wkv_attention *, int64_t, int64_t) = {
      [WKV_FLOAT32] = attend_float32, [WKV_BFLOAT16] = attend_bfloat16, [WKV_FLOAT16] = attend_float16};
  for (int64_t item = begin; item < end; item++) attend_in[a->dtype](a, item / a->heads, item % a->heads);
}

/* ---- score_evict ---- */

/* Squared length of the key in a slot, over all heads. */
static float key_norm(const struct wkv_eviction *const e, const int64_t row, const int64_t slot) {
  float norm = 0;
  for (int64_t head = 0; head < e->heads; head++) {
    const void *const key = at(e->dtype, e->keys, ((row * e->heads + head) * e->slots + slot) * e->head_dim);
    vf sum = {0};
    for (int64_t d = 0; d < e->head_dim; d += W) {
      const vf k = load(e->dtype, at(e->dtype, key, d), least(W, e->head_dim - d));
      sum = fma_(k, k, sum);
    }
    norm += sum_of(sum);
  }
  return norm;
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
    const enum reluctance reluctance = position < pinned                 ? PINNED
                                       : position > seen - e->recent     ? RECENT
                                       : scores[slot] != scores[slot]    ? NOT_A_NUMBER
                                                                         : EVICTABLE;
    const struct candidate next = {reluctance, reluctance == EVICTABLE ? scores[slot] : 0,
                                   reluctance == PINNED ? -position : position};
    if (!goes_before(next, first)) continue;
    first = next;
    chosen = slot;
  }
  return chosen;
}

static void score_evict(const struct wkv_eviction *const e, const int64_t begin, const int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    int32_t *const cursor = e->cursor + row;
    int64_t live = cursor[WKV_LIVE * e->rows], slot = cursor[WKV_SLOT * e->rows], seen = cursor[WKV_SEEN * e->rows];
    const int64_t pinned = cursor[WKV_PINNED * e->rows];
    for (int64_t token = 0; token < e->tokens; token++) {
      if (seen >= 0) {
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

/* ---- the one symbol of this object ---- */

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

extern const struct wkv_cpu_kernels JOIN(wkv_cpu_, WKV_ISA);
const struct wkv_cpu_kernels JOIN(wkv_cpu_, WKV_ISA) = {TEXT(WKV_ISA), compact_attention, score_evict};
