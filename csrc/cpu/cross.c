/* Cross-attention over one cache for each audio: the queries of all its beams, and in the latent formats of all heads,
 * go over each block of frames together. Two ways to do a block, for caches of floats and for packed ones; the softmax
 * around them is the same. */
#include "cross_floats.h"
#include "cross_mixed.h"
#include "cross_packed.h"
#include "isa.h"

INLINE void attend(const enum wkv_dtype dtype, const int bits, const bool is_narrow, struct work *const w,
                   const int64_t first_block, const int64_t last_block, const int64_t block) {
  for (int64_t b = first_block; b < last_block; b++) {
    const int64_t first = b * block, frames = least(block, w->length - first);
    if (frames <= 0) return;
    const int64_t place = w->mixed ? 0 : first;
    if (w->mixed) unpack_block(w, first, frames);
    if (bits) score_codes(bits, w, place, frames);
    else score_floats(dtype, is_narrow, false, w, first, frames);
    for (int64_t q = 0; q < w->queries; q++) soften(w, q, first, frames);
    if (bits) mix_codes(bits, is_narrow, w, place, frames);
    else mix_floats(dtype, false, w, first, frames);
  }
}

/* ---- an item of work: see struct wkv_cross_attention ---- */

INLINE void *take(char **const scratch, const size_t bytes) {
  void *const taken = *scratch;
  *scratch += bytes;
  return taken;
}

/* No more than wkv_cross_scratch says. */
INLINE void take_buffers(const enum wkv_dtype dtype, const int bits, struct work *const w, char *scratch) {
  const size_t channels = (size_t)w->channels;
  if (in_bfloat16(dtype) && !bits) {
    w->rounded_query = take(&scratch, WKV_TOGETHER * channels * sizeof *w->rounded_query);
    w->rounded_exponentials = take(&scratch, WKV_TOGETHER * WKV_BLOCK / 2 * sizeof *w->rounded_exponentials);
  } else {
    w->query = take(&scratch, WKV_TOGETHER * channels * sizeof *w->query);
  }
  w->logits = w->exponentials = take(&scratch, WKV_TOGETHER * WKV_BLOCK * sizeof *w->logits);
  if (!bits) return;
  w->folded = take(&scratch, channels * sizeof *w->folded);
  w->query_codes = take(&scratch, WKV_TOGETHER * channels);
  w->weight_codes = take(&scratch, WKV_TOGETHER * WKV_BLOCK);
  w->weight_lanes = take(&scratch, WKV_TOGETHER * WKV_BLOCK * sizeof *w->weight_lanes);
  if (w->a->bits != WKV_MIXED) return;
  w->unpacked_scales = take(&scratch, 2 * channels * sizeof *w->unpacked_scales);
  w->unpacked = take(&scratch, WKV_BLOCK * channels);
}

INLINE void attend_item(const enum wkv_dtype dtype, const int bits, const bool is_narrow,
                        const struct wkv_cross_attention *const a, void *const scratch, const int64_t item) {
  const int64_t split = item % a->splits, head = item / a->splits % a->heads;
  const struct wkv_together part = a->part[item / a->splits / a->heads];
  const int64_t head_dim = is_narrow ? NARROW : a->head_dim, channels = wkv_round_up(head_dim, WKV_CHANNELS);
  const int64_t matrix = part.audio * a->heads + head, tiled = wkv_round_up(a->frames, WKV_TILE);
  const int64_t bytes = bits ? wkv_place_of_codes(bits, channels, tiled, 0) : a->frames * head_dim * size_of(dtype);
  struct work w = {.a = a,
                   .queries = part.queries,
                   .length = a->lengths[part.audio],
                   .head_dim = head_dim,
                   .channels = channels,
                   .keys = (const char *)a->keys + matrix * bytes,
                   .values = (const char *)a->values + matrix * bytes,
                   .bias = a->bias ? a->bias + part.audio * a->frames : NULL};
  take_buffers(dtype, bits, &w, scratch);
  const bool is_mixed = a->bits == WKV_MIXED;
  const int64_t first = bits ? wkv_place_of_steps(channels, matrix * wkv_count_of(a->frames, a->group)) : 0;
  if (is_mixed) {
    const uint8_t *const codes = (const uint8_t *)a->keys + matrix * (tiled / WKV_TILE) * a->tile_bytes;
    begin_mixed(&w, codes, a->key_scales + first);
  } else if (bits) {
    w.key_scales = a->key_scales + first;
    w.value_scales = a->value_scales + first;
  }
  for (int64_t q = 0; q < part.queries; q++) {
    const int64_t query = part.first + q, place = (split * a->rows * a->tokens + query) * a->heads + head;
    load_query(dtype, bits, at(dtype, a->query, (query * a->heads + head) * head_dim), head_dim, a->scale, &w, q);
    w.sums[q] = memset(a->sums + place * channels, 0, (size_t)channels * sizeof(float));
    w.totals[q] = a->totals + place * 2;
    w.totals[q][0] = -FLT_MAX; /* finite, so that logits of -inf weigh 0 and are not subtracted from each other */
    w.totals[q][1] = 0;
    const int64_t row = query / a->tokens, token = query % a->tokens;
    w.kept_logits[q] = a->weights ? a->weights + ((row * a->heads + head) * a->tokens + token) * a->frames : NULL;
  }
  /* A block of wide frames is smaller, so that it stays in the cache nearby. */
  const int64_t block = bits             ? least(a->group, is_mixed ? MIXED_BLOCK : WKV_BLOCK)
                        : head_dim > 128 ? WKV_BLOCK / 4
                                         : WKV_BLOCK;
  const int64_t blocks = wkv_count_of(a->frames, block);
  attend(dtype, bits, is_narrow, &w, blocks * split / a->splits, blocks * (split + 1) / a->splits, block);
}

typedef void attend_function(const struct wkv_cross_attention *, void *scratch, int64_t item);

/* Known to the compiler, the width of a head makes the inner loops straight lines. */
#define ATTEND(dtype, bits) \
  static void attend_##dtype##_##bits(const struct wkv_cross_attention *const a, void *const scratch, \
                                      const int64_t item) { \
    if (a->head_dim == NARROW) attend_item(WKV_##dtype, bits, true, a, scratch, item); \
    else attend_item(WKV_##dtype, bits, false, a, scratch, item); \
  }
#define ATTEND_IN(dtype) ATTEND(dtype, 0) ATTEND(dtype, 8) ATTEND(dtype, 4)
ATTEND_IN(FLOAT32)
ATTEND_IN(BFLOAT16)
ATTEND_IN(FLOAT16)

#define ENTRIES(bits) {attend_FLOAT32_##bits, attend_BFLOAT16_##bits, attend_FLOAT16_##bits}
static attend_function *const attend_0[WKV_DTYPES] = ENTRIES(0);
static attend_function *const attend_8[WKV_DTYPES] = ENTRIES(8);
static attend_function *const attend_4[WKV_DTYPES] = ENTRIES(4);

void ON_ISA(wkv_cross_attention)(const struct wkv_cross_attention *const a, void *const scratch, const int64_t begin,
                                 const int64_t end) {
  const bool is_of_8 = a->bits == 8 || a->bits == WKV_MIXED; /* as which the others are read once they are unpacked */
  attend_function *const attend_one = (is_of_8 ? attend_8 : a->bits ? attend_4 : attend_0)[a->dtype];
  for (int64_t item = begin; item < end; item++) attend_one(a, scratch, item);
}

/* ---- the ranges of frames together ---- */

INLINE void finish(const enum wkv_dtype dtype, const struct wkv_cross_attention *const a, const int64_t item) {
  const int64_t channels = wkv_round_up(a->head_dim, WKV_CHANNELS), items = a->rows * a->tokens * a->heads;
  float top = -FLT_MAX, total = 0, share[WKV_ITEMS_WANTED];
  for (int64_t s = 0; s < a->splits; s++) {
    const float its = a->totals[2 * (s * items + item)];
    top = its > top ? its : top;
  }
  for (int64_t s = 0; s < a->splits; s++) {
    const float *const totals = a->totals + 2 * (s * items + item);
    share[s] = exponential(splat(totals[0] - top))[0];
    total += totals[1] * share[s];
  }
  void *const output = at_mut(dtype, a->output, item * a->head_dim);
  for (int64_t d = 0; d < a->head_dim; d += PAIR) {
    struct pair sum = {0};
    for (int64_t s = 0; s < a->splits; s++) {
      const float *const sums = a->sums + (s * items + item) * channels + d;
      sum.a = multiply_add(load(sums), splat(share[s] / total), sum.a);
      sum.b = multiply_add(load(sums + W), splat(share[s] / total), sum.b);
    }
    const int64_t n = least(PAIR, a->head_dim - d);
    if (!a->bits) store_some(dtype, at_mut(dtype, output, d), sum, n);
    else store_in_order(dtype, at_mut(dtype, output, d), sum.a, least(W, n));
    if (a->bits && n > W) store_in_order(dtype, at_mut(dtype, output, d + W), sum.b, n - W);
  }
  if (!a->weights) return;
  const int64_t head = item % a->heads, token = item / a->heads % a->tokens, row = item / a->heads / a->tokens;
  const int64_t length = a->lengths[a->owner[row]];
  float *const weights = a->weights + ((row * a->heads + head) * a->tokens + token) * a->frames;
  for (int64_t f = 0; f < length; f++) weights[f] = exponential(splat(weights[f] - top))[0] / total;
  memset(weights + length, 0, (size_t)(a->frames - length) * sizeof *weights);
}

#define FINISH(dtype) \
  static void finish_##dtype(const struct wkv_cross_attention *const a, const int64_t item) { \
    finish(WKV_##dtype, a, item); \
  }
FINISH(FLOAT32)
FINISH(BFLOAT16)
FINISH(FLOAT16)

typedef void finish_function(const struct wkv_cross_attention *, int64_t item);
static finish_function *const finish_in[WKV_DTYPES] = {finish_FLOAT32, finish_BFLOAT16, finish_FLOAT16};

void ON_ISA(wkv_cross_finish)(const struct wkv_cross_attention *const a, const int64_t begin, const int64_t end) {
  for (int64_t item = begin; item < end; item++) finish_in[a->dtype](a, item);
}
