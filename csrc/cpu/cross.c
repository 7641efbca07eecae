/* Cross-attention over one cache for each audio: the queries of all its beams, and in the latent formats of all heads,
 * go over each block of frames together. Two ways to do a block, for caches of floats and for packed ones; the softmax
 * around them is the same. */
#include "cross_floats.h"
#include "cross_packed.h"
#include "isa.h"

/* What is done to a block of each kind of packed cache, compiled once; the width of a head, known to the compiler,
 * makes the inner loops straight lines. */
struct way {
  void (*score)(const struct work *, int64_t frames), (*mix)(const struct work *, int64_t frames);
};

#define WAY(name, bits, channels, tile_bytes) \
  static __attribute__((noinline)) void score_##name(const struct work *const w, const int64_t frames) { \
    score_codes(bits, channels, tile_bytes, w, frames); \
  } \
  static __attribute__((noinline)) void mix_##name(const struct work *const w, const int64_t frames) { \
    mix_codes(bits, channels, tile_bytes, w, frames); \
  } \
  static const struct way way_##name = {score_##name, mix_##name};
WAY(narrow_8, 8, NARROW, wkv_bytes_of_channels(8, NARROW))
WAY(narrow_4, 4, NARROW, wkv_bytes_of_channels(4, NARROW))
WAY(wide_8, 8, w->channels, wkv_bytes_of_channels(8, w->channels))
WAY(wide_4, 4, w->channels, wkv_bytes_of_channels(4, w->channels))
WAY(mixed, WKV_MIXED, w->channels, w->tile_bytes)

INLINE const struct way *way_of(const int bits, const bool is_narrow) {
  if (bits == WKV_MIXED) return &way_mixed;
  if (is_narrow) return bits == 8 ? &way_narrow_8 : &way_narrow_4;
  return bits == 8 ? &way_wide_8 : &way_wide_4;
}

/* Where a block of a packed cache stands; queries are folded once for all blocks of a group. */
INLINE void begin_block(struct work *const w, const int64_t first, const bool is_first) {
  const int64_t place = place_of_frame(w->tile_bytes, first),
                steps = wkv_place_of_steps(w->channels, first / w->a->group);
  w->key_codes = (const uint8_t *)w->keys + place;
  w->value_codes = (const uint8_t *)w->values + place;
  w->key_steps = w->key_scales + steps;
  w->value_steps = w->value_scales + steps;
  if (!is_first && first % w->a->group) return;
  for (int64_t q = 0; q < w->queries; q++) w->lines[q] = fold_query(w, q);
}

INLINE void attend(const enum wkv_dtype dtype, const bool is_packed, const bool is_narrow, struct work *const w,
                   const int64_t first_block, const int64_t last_block, const int64_t block) {
  const struct way *const way = way_of(w->a->bits, is_narrow);
  for (int64_t b = first_block; b < last_block; b++) {
    const int64_t first = b * block, frames = least(block, w->length - first);
    if (frames <= 0) return;
    if (is_packed) begin_block(w, first, b == first_block);
    if (is_packed) way->score(w, frames);
    else score_floats(dtype, is_narrow, false, w, first, frames);
    for (int64_t q = 0; q < w->queries; q++) soften(w, q, first, frames);
    if (is_packed) way->mix(w, frames);
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
INLINE void take_buffers(const enum wkv_dtype dtype, const bool is_packed, struct work *const w, char *scratch) {
  const size_t channels = (size_t)w->channels;
  if (in_bfloat16(dtype) && !is_packed) {
    w->rounded_query = take(&scratch, WKV_TOGETHER * channels * sizeof *w->rounded_query);
    w->rounded_exponentials = take(&scratch, WKV_TOGETHER * WKV_BLOCK / 2 * sizeof *w->rounded_exponentials);
  } else {
    w->query = take(&scratch, WKV_TOGETHER * channels * sizeof *w->query);
  }
  w->logits = w->exponentials = take(&scratch, WKV_TOGETHER * WKV_BLOCK * sizeof *w->logits);
  if (!is_packed) return;
  if (w->a->bits == WKV_MIXED) w->places = take(&scratch, channels / WKV_CHANNELS * sizeof *w->places);
  w->middles = take(&scratch, channels * sizeof *w->middles);
  w->folded = take(&scratch, channels * sizeof *w->folded);
  w->query_codes = take(&scratch, WKV_TOGETHER * channels);
  w->weight_codes = take(&scratch, WKV_TOGETHER * WKV_BLOCK);
  w->weight_lanes = take(&scratch, WKV_TOGETHER * WKV_BLOCK * sizeof *w->weight_lanes);
}

/* What the cache's codes are. */
INLINE void find_codes(struct work *const w) {
  const struct wkv_cross_attention *const a = w->a;
  const bool is_mixed = a->bits == WKV_MIXED;
  w->tile_bytes = is_mixed ? a->tile_bytes : wkv_bytes_of_channels(a->bits, w->channels);
  for (int64_t channel = 0, byte = 0; channel < w->channels; channel += WKV_CHANNELS) {
    const int bits = is_mixed ? (int)a->value_scales[channel] : a->bits;
    if (is_mixed) w->places[channel / WKV_CHANNELS] = (struct place){bits, byte};
    byte += wkv_bytes_of_block(bits);
    for (int64_t d = 0; d < WKV_CHANNELS; d += W) store(w->middles + channel + d, splat((float)(1 << (bits - 1))));
  }
}

INLINE void attend_item(const enum wkv_dtype dtype, const bool is_packed, const bool is_narrow,
                        const struct wkv_cross_attention *const a, void *const scratch, const int64_t item) {
  const int64_t split = item % a->splits, head = item / a->splits % a->heads;
  const struct wkv_together part = a->part[item / a->splits / a->heads];
  const int64_t head_dim = is_narrow ? NARROW : a->head_dim, channels = wkv_round_up(head_dim, WKV_CHANNELS);
  const int64_t matrix = part.audio * a->heads + head;
  struct work w = {.a = a,
                   .queries = part.queries,
                   .length = a->lengths[part.audio],
                   .head_dim = head_dim,
                   .channels = channels,
                   .bias = a->bias ? a->bias + part.audio * a->frames : NULL};
  take_buffers(dtype, is_packed, &w, scratch);
  int64_t bytes = a->frames * head_dim * size_of(dtype);
  if (is_packed) {
    const int64_t first = wkv_place_of_steps(channels, matrix * wkv_count_of(a->frames, a->group));
    w.key_scales = a->key_scales + first;
    w.value_scales = (a->bits == WKV_MIXED ? a->key_scales : a->value_scales) + first;
    find_codes(&w);
    bytes = place_of_frame(w.tile_bytes, wkv_round_up(a->frames, WKV_TILE));
  }
  w.keys = (const char *)a->keys + matrix * bytes;
  w.values = (const char *)a->values + matrix * bytes;
  for (int64_t q = 0; q < part.queries; q++) {
    const int64_t query = part.first + q, place = (split * a->rows * a->tokens + query) * a->heads + head;
    load_query(dtype, is_packed, at(dtype, a->query, (query * a->heads + head) * head_dim), head_dim, a->scale, &w, q);
    w.sums[q] = memset(a->sums + place * channels, 0, (size_t)channels * sizeof(float));
    w.totals[q] = a->totals + place * 2;
    w.totals[q][0] = -FLT_MAX; /* finite, so that logits of -inf weigh 0 and are not subtracted from each other */
    w.totals[q][1] = 0;
    const int64_t row = query / a->tokens, token = query % a->tokens;
    w.kept_logits[q] = a->weights ? a->weights + ((row * a->heads + head) * a->tokens + token) * a->frames : NULL;
  }
  /* A block of wide frames is smaller, so that it stays in the cache nearby. */
  const int64_t block = is_packed ? least(a->group, WKV_BLOCK) : head_dim > 128 ? WKV_BLOCK / 4 : WKV_BLOCK;
  const int64_t blocks = wkv_count_of(a->frames, block);
  attend(dtype, is_packed, is_narrow, &w, blocks * split / a->splits, blocks * (split + 1) / a->splits, block);
}

typedef void attend_function(const struct wkv_cross_attention *, void *scratch, int64_t item);

/* Known to the compiler, the width of a head makes the inner loops straight lines. */
#define ATTEND(dtype, name, is_packed) \
  static void attend_##dtype##_##name(const struct wkv_cross_attention *const a, void *const scratch, \
                                      const int64_t item) { \
    if (a->head_dim == NARROW) attend_item(WKV_##dtype, is_packed, true, a, scratch, item); \
    else attend_item(WKV_##dtype, is_packed, false, a, scratch, item); \
  }
#define ATTEND_IN(dtype) ATTEND(dtype, floats, false) ATTEND(dtype, codes, true)
ATTEND_IN(FLOAT32)
ATTEND_IN(BFLOAT16)
ATTEND_IN(FLOAT16)

#define ENTRIES(name) {attend_FLOAT32_##name, attend_BFLOAT16_##name, attend_FLOAT16_##name}
static attend_function *const attend_floats[WKV_DTYPES] = ENTRIES(floats);
static attend_function *const attend_codes[WKV_DTYPES] = ENTRIES(codes);

void ON_ISA(wkv_cross_attention)(const struct wkv_cross_attention *const a, void *const scratch, const int64_t begin,
                                 const int64_t end) {
  attend_function *const attend_one = (a->bits ? attend_codes : attend_floats)[a->dtype];
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
