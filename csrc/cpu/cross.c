/* Cross-attention over one cache for each audio: the queries of all its beams, and in the latent formats of all heads,
 * go over each block of frames together. Two ways to do a block, for caches of floats and for packed ones; the softmax
 * around them is the same. */
#include <stdbool.h>

#include "isa.h"
#include "softmax.h"
#ifdef WKV_AMX
#include "amx.h"
#endif

/* One part, head and range of frames being worked on. Queries are those of the part, counted from 0. */
struct work {
  const struct wkv_cross_attention *a;
  int64_t queries, length;           /* length: frames of the audio */
  int64_t head_dim, channels;        /* channels: head_dim, padded */
  const void *keys, *values;         /* of this head of this audio */
  const float *key_scales, *value_scales;
  float *query;   /* [queries, channels], scaled */
  float *logits;  /* [queries, WKV_BLOCK], then their exponentials */
  /* of a packed cache */
  float *folded;         /* [channels] */
  int32_t *query_codes;  /* [queries, channels / 4], four channels in each */
  int32_t *weight_codes; /* [queries, WKV_BLOCK / 4, 4], four frames in each, four times over; or in bfloat16 */
  float *sums[WKV_TOGETHER];   /* of each query: [channels] */
  float *totals[WKV_TOGETHER]; /* of each query: largest logit, sum of exponentials */
  float *weights[WKV_TOGETHER]; /* of each query: [frames], NULL if not wanted */
  float shrink[WKV_TOGETHER];  /* what the sums so far weigh beside this block */
  float added[WKV_TOGETHER];   /* the block's sum of exponentials */
};

INLINE void prefetch(const void *const p, const int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)p + i);
}

/* How many of the queries that are left go together: all if they are few, else the usual number. */
INLINE int64_t together(const int64_t left, const int most, const int usual) { return left <= most ? left : usual; }

/* function(count, ...), with a count that the compiler knows. */
#define COUNT_CASE(count, most, function, ...) \
  case count: \
    if (count <= most) function(count, __VA_ARGS__); \
    break;
#define FOR_COUNT(count, most, function, ...) \
  switch (count) { \
    COUNT_CASE(1, most, function, __VA_ARGS__) COUNT_CASE(2, most, function, __VA_ARGS__) \
    COUNT_CASE(3, most, function, __VA_ARGS__) COUNT_CASE(4, most, function, __VA_ARGS__) \
    COUNT_CASE(5, most, function, __VA_ARGS__) COUNT_CASE(6, most, function, __VA_ARGS__) \
    COUNT_CASE(7, most, function, __VA_ARGS__) COUNT_CASE(8, most, function, __VA_ARGS__) \
  }

/* ---- a block of floats ---- */

enum {
  SOME = W > 4 ? W / 4 : 1, /* queries that share a load of the cache; with W / SOME frames they fill W sums */
  ROWS = W / SOME,
  MOST = W > 8 ? 6 : SOME, /* queries that share a load of the values, if no more are left */
  PAIRS = 2 /* pairs of vectors of channels whose sums stay in registers */
};

/* Whether the products of queries and keys, and of weights and values, are left to instructions for bfloat16. Then a
 * query is held in bfloat16, which it was before, and the weights are rounded to it. */
INLINE bool in_bfloat16(const enum wkv_dtype dtype) { return MULTIPLIES_BFLOAT16 && dtype == WKV_BFLOAT16; }

/* The first n <= PAIR numbers at p as they are, two to a lane, then zeros. */
INLINE vu load_raw(const void *const p, const int64_t n) {
  vu x = {0};
  memcpy(&x, p, n == PAIR ? sizeof x : (size_t)n * 2);
  return x;
}

/* sums[i][r] += query i . row r, over n <= PAIR channels from d on; `sums` has room for `rows` of each query. */
INLINE void multiply_rows(const enum wkv_dtype dtype, vf *const sums, const int rows, const float *const queries,
                          const int64_t stride, const int some, const void *const *const row, const int count,
                          const int64_t d, const int64_t n) {
  if (in_bfloat16(dtype)) {
    vu key[ROWS];
    for (int r = 0; r < count; r++) key[r] = load_raw(at(dtype, row[r], d), n);
    for (int i = 0; i < some; i++) {
      const vu query = load_raw(at(dtype, queries + i * stride, d), PAIR);
      for (int r = 0; r < count; r++) sums[i * rows + r] = multiply_bfloat16(key[r], query, sums[i * rows + r]);
    }
    return;
  }
  struct pair key[ROWS];
  for (int r = 0; r < count; r++) key[r] = load_some(dtype, at(dtype, row[r], d), n);
  for (int i = 0; i < some; i++) {
    const vf a = load(queries + i * stride + d), b = load(queries + i * stride + d + W);
    for (int r = 0; r < count; r++)
      sums[i * rows + r] = multiply_add(b, key[r].b, multiply_add(a, key[r].a, sums[i * rows + r]));
  }
}

/* The logits of `some` queries with W / some frames. Frames past the end are taken for the last one. Narrow rows are
 * read one after the other, as the prefetchers of processors expect; of wide ones, several share a load of a query. */
INLINE void score_some(const enum wkv_dtype dtype, const struct work *const w, const int64_t query, const int some,
                       const int64_t frame, const int64_t frames, const int64_t place, const bool at_the_end) {
  const int64_t head_dim = w->head_dim;
  const bool is_narrow = __builtin_constant_p(head_dim);
  const int rows = W / some, count = some == 1 || is_narrow ? 1 : rows;
  const float *const queries = w->query + query * w->channels;
  vf sums[W];
  for (int i = 0; i < W; i++) sums[i] = (vf){0};
#pragma GCC unroll 16
  for (int from = 0; from < rows; from += count) {
    if (is_narrow) __asm__ volatile("" ::: "memory"); /* or the compiler would read many rows at once */
    const void *row[ROWS];
    for (int r = 0; r < count; r++)
      row[r] = at(dtype, w->keys, (frame + (at_the_end ? least(from + r, frames - 1) : from + r)) * head_dim);
    int64_t d = 0;
    for (; d + PAIR <= head_dim; d += PAIR)
      multiply_rows(dtype, sums + from, rows, queries, w->channels, some, row, count, d, PAIR);
    if (d < head_dim)
      multiply_rows(dtype, sums + from, rows, queries, w->channels, some, row, count, d, head_dim - d);
  }
  const vf logits = sum_each(sums);
  for (int i = 0; i < some; i++)
    memcpy(w->logits + (query + i) * WKV_BLOCK + place, (const float *)&logits + i * rows,
           (size_t)rows * sizeof(float));
}

INLINE void score_floats(const enum wkv_dtype dtype, const struct work *const w, const int64_t first,
                         const int64_t frames) {
  for (int64_t f = 0; f < frames; f += W) {
    const int64_t left = frames - f;
    int64_t query = 0;
    for (; query + SOME <= w->queries && SOME > 1; query += SOME)
      for (int64_t r = 0; r < W && r < left; r += ROWS)
        if (left - r >= ROWS) score_some(dtype, w, query, SOME, first + f + r, left - r, f + r, false);
        else score_some(dtype, w, query, SOME, first + f + r, left - r, f + r, true);
    for (; query < w->queries; query++)
      if (left >= W) score_some(dtype, w, query, 1, first + f, left, f, false);
      else score_some(dtype, w, query, 1, first + f, left, f, true);
  }
}

/* sums = shrink * sums + weights * values, for `some` queries and 2 * pairs vectors of channels. */
INLINE void mix_some(const int some, const enum wkv_dtype dtype, const struct work *const w, const int64_t query,
                     const int64_t first, const int64_t frames, const int64_t channel, const int pairs,
                     const int64_t n) {
  const int64_t head_dim = w->head_dim;
  const float *const weights = w->logits + query * WKV_BLOCK;
  vf sums[MOST][2 * PAIRS];
  for (int i = 0; i < some; i++)
    for (int p = 0; p < 2 * pairs; p++) sums[i][p] = load(w->sums[query + i] + channel + p * W) * w->shrink[query + i];
  if (in_bfloat16(dtype)) {
    for (int64_t f = 0; f < frames; f += 2) {
      const void *const row = at(dtype, w->values, (first + f) * head_dim + channel);
      const void *const next = at(dtype, row, f + 1 < frames ? head_dim : 0); /* the last may be alone: weight 0 */
      vu even[PAIRS], odd[PAIRS]; /* channels, of both rows */
      for (int p = 0; p < pairs; p++) {
        const int64_t m = pairs == 1 ? n : PAIR;
        const vu x = load_raw(at(dtype, row, p * PAIR), m), y = load_raw(at(dtype, next, p * PAIR), m);
        even[p] = (x & 0xffff) | y << 16;
        odd[p] = x >> 16 | (y & 0xffff0000);
      }
      for (int i = 0; i < some; i++) {
        const vu weight = (vu){0} + (uint32_t)w->weight_codes[(query + i) * WKV_BLOCK + f / 2];
        for (int p = 0; p < pairs; p++) {
          sums[i][2 * p] = multiply_bfloat16(even[p], weight, sums[i][2 * p]);
          sums[i][2 * p + 1] = multiply_bfloat16(odd[p], weight, sums[i][2 * p + 1]);
        }
      }
    }
  } else {
    for (int64_t f = 0; f < frames; f++) {
      struct pair value[PAIRS];
      for (int p = 0; p < pairs; p++)
        value[p] = load_some(dtype, at(dtype, w->values, (first + f) * head_dim + channel + p * PAIR),
                             pairs == 1 ? n : PAIR);
      for (int i = 0; i < some; i++) {
        const vf weight = splat(weights[i * WKV_BLOCK + f]);
        for (int p = 0; p < pairs; p++) {
          sums[i][2 * p] = multiply_add(weight, value[p].a, sums[i][2 * p]);
          sums[i][2 * p + 1] = multiply_add(weight, value[p].b, sums[i][2 * p + 1]);
        }
      }
    }
  }
  for (int i = 0; i < some; i++)
    for (int p = 0; p < 2 * pairs; p++) store(w->sums[query + i] + channel + p * W, sums[i][p]);
}

INLINE void mix_channels(const enum wkv_dtype dtype, const struct work *const w, const int64_t first,
                         const int64_t frames, const int64_t channel, const int pairs, const int64_t n) {
  for (int64_t query = 0, count; query < w->queries; query += count) {
    count = together(w->queries - query, MOST, SOME);
    FOR_COUNT(count, MOST, mix_some, dtype, w, query, first, frames, channel, pairs, n)
  }
}

INLINE void mix_floats(const enum wkv_dtype dtype, const struct work *const w, const int64_t first,
                       const int64_t frames) {
  const int64_t head_dim = w->head_dim;
  if (in_bfloat16(dtype))
    for (int64_t q = 0; q < w->queries; q++)
      for (int64_t f = 0; f < frames; f += W)
        store_in_order(dtype, at_mut(dtype, w->weight_codes + q * WKV_BLOCK, f), load(w->logits + q * WKV_BLOCK + f),
                       W);
  int64_t channel = 0;
  for (; channel + PAIRS * PAIR <= head_dim; channel += PAIRS * PAIR)
    mix_channels(dtype, w, first, frames, channel, PAIRS, PAIR);
  for (; channel < head_dim; channel += PAIR)
    mix_channels(dtype, w, first, frames, channel, 1, least(PAIR, head_dim - channel));
}

/* ---- a packed block ---- */

enum {
  ABREAST = W > 8 ? 8 : 4, /* queries whose integer sums are in registers over the keys */
  MIXED = W > 8 ? 4 : 2,   /* and over the values, */
  MIXED_MOST = W > 8 ? 5 : 2, /* or so many if no more are left */
  MOST_QUADS = W           /* quads of channels whose sums are in registers, of one query */
};

/* Codes are multiplied less this, which is added back exactly, so that rounding errors of queries and weights meet
 * small numbers. */
INLINE int middle(const int bits) { return 1 << (bits - 1); }

/* x / step as signed bytes, step such that the largest becomes 127; returns step and the sum of the codes. */
INLINE float round_bytes(const float *const x, const int64_t n, int8_t *const codes, int32_t *const sum) {
  vf top = {0};
  for (int64_t i = 0; i < n; i += W) top = larger(larger(load(x + i), -load(x + i)), top);
  const float step = largest_of(top) * (1.0f / 127);
  const vf inverse = splat(step > 0 ? 1 / step : 0);
  vi total = {0};
  for (int64_t i = 0; i < n; i += W) {
    const vf scaled = smaller(larger(load(x + i) * inverse, splat(-127)), splat(127)); /* NaN: -127 */
    const float round = 0x1.8p23f; /* added it leaves the nearest integer in the low bits */
    const vi code = (vi)(scaled + round) - (vi)splat(round);
    const vb bytes = __builtin_convertvector(code, vb);
    memcpy(codes + i, &bytes, sizeof bytes);
    total += code;
  }
  int32_t all = total[0];
  for (int i = 1; i < W; i++) all += total[i];
  *sum = all;
  return step;
}

/* The four lanes of each channel and each frame of a piece of a tile: 64 bytes, or half of that with 4 bits. */
INLINE vi load_codes(const uint8_t *const codes) {
  vi x;
  memcpy(&x, codes, sizeof x);
  return x;
}

INLINE vi low_halves(const vi x) { return x & 0x0f0f0f0f; }
INLINE vi high_halves(const vi x) { return (vi)((vu)x >> 4) & 0x0f0f0f0f; }

/* Integer products of `some` queries with W frames, those from `codes` on in each piece of the tile. */
INLINE void multiply_tile(const int bits, const struct work *const w, const uint8_t *const codes,
                          const int32_t *const query, const int some, vi *const sums) {
  const int64_t quads = w->channels / 4;
  for (int i = 0; i < some; i++) sums[i] = (vi){0};
  if (bits == 8) {
    for (int64_t q = 0; q < quads; q++) {
      const vi x = load_codes(codes + q * 64);
      for (int i = 0; i < some; i++) sums[i] = multiply_bytes(x, (vi){0} + query[i * quads + q], sums[i]);
    }
  } else {
    for (int64_t q = 0; q < quads; q += 2) {
      const vi x = load_codes(codes + q * 32), low = low_halves(x), high = high_halves(x);
      for (int i = 0; i < some; i++) {
        sums[i] = multiply_bytes(low, (vi){0} + query[i * quads + q], sums[i]);
        sums[i] = multiply_bytes(high, (vi){0} + query[i * quads + q + 1], sums[i]);
      }
    }
  }
}

/* logit = offset + unit * (products of the codes - middles) */
struct line {
  float offset, unit;
  int32_t middles;
};

/* Folds the steps of the keys into a query, and rounds it. */
INLINE struct line fold_query(const int bits, const struct work *const w, const int64_t query, const float *const step,
                              const float *const low) {
  const float *const x = w->query + query * w->channels;
  vf offset = {0};
  for (int64_t d = 0; d < w->channels; d += W) {
    const vf q = load(x + d), s = load(step + d);
    offset = multiply_add(q, multiply_add(s, splat((float)middle(bits)), load(low + d)), offset);
    store(w->folded + d, q * s);
  }
  int32_t sum;
  const float unit = round_bytes(w->folded, w->channels, (int8_t *)(w->query_codes + query * w->channels / 4), &sum);
  return (struct line){sum_of(offset), unit, sum * middle(bits)};
}

INLINE void store_logits(const struct work *const w, const int64_t query, const int64_t place, const struct line line,
                         const vi products) {
  store(w->logits + query * WKV_BLOCK + place,
        multiply_add(__builtin_convertvector(products - line.middles, vf), splat(line.unit), splat(line.offset)));
}

INLINE void score_tiles(const int some, const int bits, const struct work *const w, const int64_t first,
                        const int64_t frames, const struct line *const lines, const int64_t query) {
  const int64_t quads = w->channels / 4, tile = w->channels * 2 * bits, from = first / WKV_TILE * tile;
  for (int64_t f = 0; f < frames; f += W) {
    const int64_t place = from + f / WKV_TILE * tile;
    if (query == 0 && w->values != w->keys && w->queries > 1 && f % WKV_TILE == 0)
      prefetch((const char *)w->values + place, tile);
    vi sums[ABREAST];
    multiply_tile(bits, w, (const uint8_t *)w->keys + place + f % WKV_TILE * 4, w->query_codes + query * quads, some,
                  sums);
    for (int i = 0; i < some; i++) store_logits(w, query + i, f, lines[query + i], sums[i]);
  }
}

/* sums = shrink * sums + weights * values for W channels, of the products of their codes. */
INLINE void add_products(const int bits, const struct work *const w, const int64_t query, const int64_t first,
                         const int64_t channel, const struct line line, const vf products) {
  const float *const step = w->value_scales + first / w->a->group * 2 * w->channels + channel;
  float *const sums = w->sums[query] + channel;
  const vf s = load(step), base = multiply_add(s, splat((float)middle(bits)), load(step + w->channels));
  const vf scaled = (products - (float)line.middles) * line.unit;
  store(sums, multiply_add(scaled, s, multiply_add(base, splat(line.offset), load(sums) * w->shrink[query])));
}

#ifdef WKV_AMX
/* ---- the same on AMX tiles, where many queries share a cache: the products are the same to the bit ---- */

INLINE bool worth_tiles(const struct work *const w) { return w->queries >= 8 && w->channels % AMX_BYTES == 0; }

/* 16 quads of channels of a tile of frames, and of 8 bits in any case. */
INLINE const void *quads_of_tile(const int bits, const uint8_t *const codes, const int64_t channel,
                                 uint8_t *const room) {
  if (bits == 8) return codes + channel * WKV_TILE;
  for (int pair = 0; pair < 8; pair++) {
    const vi x = load_codes(codes + channel * WKV_TILE / 2 + pair * 64), both[] = {low_halves(x), high_halves(x)};
    memcpy(room + pair * 128, both, sizeof both);
  }
  return room;
}

static void score_on_tiles(const int bits, const struct work *const w, const int64_t first, const int64_t frames,
                           const struct line *const lines) {
  const struct amx_shape shape = amx_shape(w->queries);
  const int64_t tile = w->channels * 2 * bits;
  uint8_t room[AMX_ROWS * AMX_BYTES];
  vi products[WKV_TOGETHER];
  amx_start(&shape);
  for (int64_t f = 0; f < frames; f += WKV_TILE) {
    const uint8_t *const codes = (const uint8_t *)w->keys + (first + f) / WKV_TILE * tile;
    amx_clear(AMX_SUMS);
    if (w->queries > AMX_ROWS) amx_clear(AMX_MORE_SUMS);
    for (int64_t channel = 0; channel < w->channels; channel += AMX_BYTES) {
      const char *const queries = (const char *)w->query_codes + channel;
      amx_load(AMX_CACHE, quads_of_tile(bits, codes, channel, room), AMX_BYTES);
      amx_load(AMX_QUERIES, queries, w->channels);
      amx_multiply(AMX_SUMS, AMX_QUERIES, AMX_CACHE);
      if (w->queries <= AMX_ROWS) continue;
      amx_load(AMX_MORE_QUERIES, queries + AMX_ROWS * w->channels, w->channels);
      amx_multiply(AMX_MORE_SUMS, AMX_MORE_QUERIES, AMX_CACHE);
    }
    amx_store(AMX_SUMS, products, AMX_BYTES);
    if (w->queries > AMX_ROWS) amx_store(AMX_MORE_SUMS, products + AMX_ROWS, AMX_BYTES);
    for (int64_t q = 0; q < w->queries; q++) store_logits(w, q, f, lines[q], products[q]);
  }
  amx_stop();
}

/* 16 channels of 64 frames, four frames to a lane: what a tile of the cache must be to be multiplied by weights. */
INLINE void turn(const int bits, const uint8_t *const codes, const int64_t tile, const int64_t tiles,
                 uint8_t *const to) {
  for (int64_t t = 0; t < AMX_BYTES / WKV_TILE; t++) {
    vi x[4] = {0};
    for (int q = 0; q < 4 && t < tiles; q++) {
      if (bits == 8) x[q] = load_codes(codes + t * tile + q * 64);
      else if (q % 2) x[q] = high_halves(x[q - 1]), x[q - 1] = low_halves(x[q - 1]);
      else x[q] = load_codes(codes + t * tile + q * 32);
    }
    for (int q = 0; q < 4; q++) {
      const vi turned = transpose_bytes(x[q]);
      for (int quad = 0; quad < 4; quad++)
        memcpy(to + (4 * t + quad) * AMX_BYTES + q * 16, (const char *)&turned + quad * 16, 16);
    }
  }
}

static void mix_on_tiles(const int bits, const struct work *const w, const int64_t first, const int64_t frames,
                         const struct line *const lines) {
  const struct amx_shape shape = amx_shape(w->queries);
  const int64_t tile = w->channels * 2 * bits, tiles = wkv_count_of(frames, WKV_TILE);
  uint8_t room[AMX_ROWS * AMX_BYTES];
  vi products[WKV_TOGETHER];
  amx_start(&shape);
  for (int64_t channel = 0; channel < w->channels; channel += 16) {
    const uint8_t *const codes = (const uint8_t *)w->values + first / WKV_TILE * tile + channel * 2 * bits;
    amx_clear(AMX_SUMS);
    if (w->queries > AMX_ROWS) amx_clear(AMX_MORE_SUMS);
    for (int64_t t = 0; t < tiles; t += AMX_BYTES / WKV_TILE) {
      const char *const weights = (const char *)w->weight_codes + t * WKV_TILE;
      turn(bits, codes + t * tile, tile, tiles - t, room);
      amx_load(AMX_CACHE, room, AMX_BYTES);
      amx_load(AMX_QUERIES, weights, WKV_BLOCK);
      amx_multiply(AMX_SUMS, AMX_QUERIES, AMX_CACHE);
      if (w->queries <= AMX_ROWS) continue;
      amx_load(AMX_MORE_QUERIES, weights + AMX_ROWS * WKV_BLOCK, WKV_BLOCK);
      amx_multiply(AMX_MORE_SUMS, AMX_MORE_QUERIES, AMX_CACHE);
    }
    amx_store(AMX_SUMS, products, AMX_BYTES);
    if (w->queries > AMX_ROWS) amx_store(AMX_MORE_SUMS, products + AMX_ROWS, AMX_BYTES);
    for (int64_t q = 0; q < w->queries; q++)
      add_products(bits, w, q, first, channel, lines[q], __builtin_convertvector(products[q], vf));
  }
  amx_stop();
}
#endif

INLINE void score_codes(const int bits, const struct work *const w, const int64_t first, const int64_t frames) {
  const float *const step = w->key_scales + first / w->a->group * 2 * w->channels;
  struct line lines[WKV_TOGETHER];
  for (int64_t q = 0; q < w->queries; q++) lines[q] = fold_query(bits, w, q, step, step + w->channels);
#ifdef WKV_AMX
  if (worth_tiles(w)) return score_on_tiles(bits, w, first, frames, lines);
#endif
  for (int64_t query = 0, count; query < w->queries; query += count) {
    count = together(w->queries - query, ABREAST, ABREAST);
    FOR_COUNT(count, ABREAST, score_tiles, bits, w, first, frames, lines, query)
  }
}

/* Weights as codes, every four frames repeated for four lanes; for tiles one after the other, and zeros to the end. */
INLINE struct line round_weights(const int bits, const struct work *const w, const int64_t query,
                                 const int64_t frames) {
  int32_t codes[WKV_BLOCK / 4] = {0}, sum;
  const float unit = round_bytes(w->logits + query * WKV_BLOCK, wkv_round_up(frames, WKV_TILE), (int8_t *)codes, &sum);
  const struct line line = {w->added[query], unit, sum * middle(bits)};
#ifdef WKV_AMX
  if (worth_tiles(w)) return memcpy(w->weight_codes + query * WKV_BLOCK / 4, codes, sizeof codes), line;
#endif
  int32_t *const repeated = w->weight_codes + query * WKV_BLOCK;
  for (int64_t i = 0; i < wkv_round_up(frames, WKV_TILE) / 4; i++)
    for (int lane = 0; lane < 4; lane++) repeated[4 * i + lane] = codes[i];
  return line;
}

/* sums = shrink * sums + weights * values, for `some` queries and 4 * quads channels, a multiple of 16. */
INLINE void mix_strip(const int some, const int bits, const struct work *const w, const int64_t first,
                      const int64_t frames, const struct line *const lines, const int64_t query,
                      const int64_t channel, const int quads) {
  const int64_t tile = w->channels * 2 * bits;
  const uint8_t *const tiles = (const uint8_t *)w->values + first / WKV_TILE * tile + channel * 2 * bits;
  vi sums[MOST_QUADS][MIXED_MOST];
  for (int q = 0; q < quads; q++)
    for (int i = 0; i < some; i++) sums[q][i] = (vi){0};
  for (int64_t f = 0; f < frames; f += W) {
    const uint8_t *const codes = tiles + f / WKV_TILE * tile + f % WKV_TILE * 4;
    vi weights[MIXED_MOST];
    for (int i = 0; i < some; i++)
      memcpy(&weights[i], w->weight_codes + (query + i) * WKV_BLOCK + f, sizeof weights[i]);
    for (int q = 0; q < quads; q += 2) {
      vi x[2];
      if (bits == 8) {
        x[0] = transpose_bytes(load_codes(codes + q * 64));
        x[1] = transpose_bytes(load_codes(codes + q * 64 + 64));
      } else {
        const vi both = transpose_bytes(load_codes(codes + q * 32));
        x[0] = low_halves(both);
        x[1] = high_halves(both);
      }
      for (int k = 0; k < 2; k++)
        for (int i = 0; i < some; i++) sums[q + k][i] = multiply_bytes(x[k], weights[i], sums[q + k][i]);
    }
  }
  for (int i = 0; i < some; i++) {
    for (int q = 0; q < quads; q += W / 4) {
      const int64_t c = channel + 4 * q;
      vf parts[W / 4];
      for (int k = 0; k < W / 4; k++) parts[k] = __builtin_convertvector(sums[q + k][i], vf);
      add_products(bits, w, query + i, first, c, lines[query + i], sum_channels(parts));
    }
  }
}

/* Of narrow values a single query takes whole tiles, which reads them in the order that they stand in. */
INLINE void mix_codes(const int bits, const struct work *const w, const int64_t first, const int64_t frames) {
  const int alone = __builtin_constant_p(w->channels) ? MOST_QUADS : 4;
  struct line lines[WKV_TOGETHER];
  for (int64_t q = 0; q < w->queries; q++) lines[q] = round_weights(bits, w, q, frames);
#ifdef WKV_AMX
  if (worth_tiles(w)) return mix_on_tiles(bits, w, first, frames, lines);
#endif
  if (w->queries == 1) {
    for (int64_t channel = 0; channel < w->channels; channel += 4 * alone)
      mix_strip(1, bits, w, first, frames, lines, 0, channel, alone);
    return;
  }
  for (int64_t channel = 0; channel < w->channels; channel += 16)
    for (int64_t query = 0, count; query < w->queries; query += count) {
      count = together(w->queries - query, MIXED_MOST, MIXED);
      FOR_COUNT(count, MIXED_MOST, mix_strip, bits, w, first, frames, lines, query, channel, 4)
    }
}

/* ---- softmax, block by block ---- */

/* Exponentials of a block's logits; the sums so far are to shrink whenever it holds a larger one. */
INLINE void soften(struct work *const w, const int64_t query, const int64_t first, const int64_t frames) {
  float *const logits = w->logits + query * WKV_BLOCK, *const totals = w->totals[query];
  const int64_t padded = wkv_round_up(frames, WKV_TILE);
  if (w->weights[query]) memcpy(w->weights[query] + first, logits, (size_t)frames * sizeof *logits);
  for (int64_t f = frames; f < padded; f++) logits[f] = -INFINITY;
  const float top = largest(logits, padded, totals[0]);
  w->shrink[query] = exponential(splat(totals[0] - top))[0];
  w->added[query] = exponentiate(logits, padded, top);
  totals[0] = top;
  totals[1] = totals[1] * w->shrink[query] + w->added[query];
}

INLINE void attend(const enum wkv_dtype dtype, const int bits, struct work *const w, const int64_t first_block,
                   const int64_t last_block, const int64_t block) {
  for (int64_t b = first_block; b < last_block; b++) {
    const int64_t first = b * block, frames = least(block, w->length - first);
    if (frames <= 0) return;
    if (bits) score_codes(bits, w, first, frames);
    else score_floats(dtype, w, first, frames);
    for (int64_t q = 0; q < w->queries; q++) soften(w, q, first, frames);
    if (bits) mix_codes(bits, w, first, frames);
    else mix_floats(dtype, w, first, frames);
  }
}

INLINE void load_query(const enum wkv_dtype dtype, const bool packed, const void *const from, const int64_t head_dim,
                       const float scale, float *const to, const int64_t channels) {
  for (int64_t d = 0; d < channels; d += PAIR) {
    const int64_t n = least(PAIR, head_dim - d);
    struct pair x = {0};
    if (n > 0 && !packed) x = load_some(dtype, at(dtype, from, d), n);
    if (n > 0 && packed) x.a = load_in_order(dtype, at(dtype, from, d), least(n, W));
    if (n > W && packed) x.b = load_in_order(dtype, at(dtype, from, d + W), n - W);
    x = (struct pair){x.a * scale, x.b * scale};
    if (in_bfloat16(dtype) && !packed) {
      store_full(dtype, at_mut(dtype, to, d), x);
    } else {
      store(to + d, x.a);
      store(to + d + W, x.b);
    }
  }
}

/* One item of work: see struct wkv_cross_attention. */
INLINE void attend_item(const enum wkv_dtype dtype, const int bits, const int64_t head_dim,
                        const struct wkv_cross_attention *const a, float *const scratch, const int64_t item) {
  const int64_t split = item % a->splits, head = item / a->splits % a->heads;
  const struct wkv_together part = a->part[item / a->splits / a->heads];
  const int64_t channels = wkv_round_up(head_dim, WKV_CHANNELS), matrix = part.audio * a->heads + head;
  const int64_t groups = bits ? wkv_count_of(a->frames, a->group) : 0;
  const int64_t bytes = bits ? wkv_count_of(a->frames, WKV_TILE) * channels * 2 * bits
                             : a->frames * head_dim * size_of(dtype);
  struct work w = {.a = a, .queries = part.queries, .length = a->lengths[part.audio],
                   .head_dim = head_dim, .channels = channels,
                   .keys = (const char *)a->keys + matrix * bytes, .values = (const char *)a->values + matrix * bytes,
                   .query = scratch};
  w.logits = w.query + WKV_TOGETHER * channels;
  w.folded = w.logits + WKV_TOGETHER * WKV_BLOCK;
  w.query_codes = (int32_t *)(w.folded + channels);
  w.weight_codes = w.query_codes + WKV_TOGETHER * channels / 4;
  if (bits) {
    w.key_scales = a->key_scales + matrix * groups * 2 * channels;
    w.value_scales = a->value_scales + matrix * groups * 2 * channels;
  }
  for (int64_t q = 0; q < part.queries; q++) {
    const int64_t query = part.first + q, place = (split * a->rows * a->tokens + query) * a->heads + head;
    load_query(dtype, bits, at(dtype, a->query, (query * a->heads + head) * head_dim), head_dim, a->scale,
               w.query + q * channels, channels);
    w.sums[q] = memset(a->sums + place * channels, 0, (size_t)channels * sizeof(float));
    w.totals[q] = a->totals + place * 2;
    w.totals[q][0] = -FLT_MAX; /* finite, so that logits of -inf weigh 0 and are not subtracted from each other */
    w.totals[q][1] = 0;
    const int64_t row = query / a->tokens, token = query % a->tokens;
    w.weights[q] = a->weights ? a->weights + ((row * a->heads + head) * a->tokens + token) * a->frames : NULL;
  }
  /* A block of wide frames is smaller, so that it stays in the cache nearby. */
  const int64_t block = bits ? least(a->group, WKV_BLOCK) : head_dim > 128 ? WKV_BLOCK / 4 : WKV_BLOCK;
  const int64_t blocks = wkv_count_of(a->frames, block);
  attend(dtype, bits, &w, blocks * split / a->splits, blocks * (split + 1) / a->splits, block);
}

typedef void attend_function(const struct wkv_cross_attention *, float *scratch, int64_t item);

/* Every Whisper has heads of 64 channels: known to the compiler, that makes the inner loops straight lines. */
#define ATTEND(dtype, bits) \
  static void attend_##dtype##_##bits(const struct wkv_cross_attention *const a, float *const scratch, \
                                      const int64_t item) { \
    if (a->head_dim == 64) attend_item(WKV_##dtype, bits, 64, a, scratch, item); \
    else attend_item(WKV_##dtype, bits, a->head_dim, a, scratch, item); \
  }
#define ATTEND_IN(dtype) ATTEND(dtype, 0) ATTEND(dtype, 8) ATTEND(dtype, 4)
ATTEND_IN(FLOAT32)
ATTEND_IN(BFLOAT16)
ATTEND_IN(FLOAT16)

#define ENTRIES(bits) {attend_FLOAT32_##bits, attend_BFLOAT16_##bits, attend_FLOAT16_##bits}
static attend_function *const attend_0[WKV_DTYPES] = ENTRIES(0), *const attend_8[WKV_DTYPES] = ENTRIES(8),
                       *const attend_4[WKV_DTYPES] = ENTRIES(4);

void ON_ISA(wkv_cross_attention)(const struct wkv_cross_attention *const a, void *const scratch, const int64_t begin,
                                 const int64_t end) {
  attend_function *const attend_one = (a->bits == 8 ? attend_8 : a->bits ? attend_4 : attend_0)[a->dtype];
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
