/* Cross-attention over a packed cache: what is done to codes, whichever instructions then multiply them. Queries and
 * exponentials become codes too, and the products of codes are exact. */
#ifndef WHISPERKV_CROSS_CODES_H
#define WHISPERKV_CROSS_CODES_H
#include "../packed.h"
#include "cross.h"

/* x / step as signed bytes, step such that the largest becomes 127; returns step and the sum of the codes, times
 * integers if they are given. */
INLINE float round_bytes(const float *const x, const float *const times, const int64_t n, int8_t *const codes,
                         int32_t *const sum) {
  vf top = {0};
  for (int64_t i = 0; i < n; i += W) top = larger(larger(load(x + i), -load(x + i)), top);
  const float step = largest_of(top) * (1.0f / 127);
  const vf inverse = splat(step > 0 ? 1 / step : 0);
  vi total = {0};
  for (int64_t i = 0; i < n; i += W) {
    const vf scaled = smaller(larger(load(x + i) * inverse, splat(-127)), splat(127)); /* NaN: -127 */
    const float round = 0x1.8p23f; /* added it leaves the nearest integer in the low bits */
    const vi code = (vi)(scaled + round) - (vi)splat(round);
    const vb bytes = lowest_bytes(code);
    memcpy(codes + i, &bytes, sizeof bytes);
    total += times ? code * __builtin_convertvector(load(times + i), vi) : code;
  }
  *sum = sum_of_integers(total);
  return step;
}

/* Folds the steps of the keys into a query, and rounds it. */
INLINE struct line fold_query(const struct work *const w, const int64_t query) {
  const float *const x = w->query + query * w->channels, *const step = w->key_steps, *const low = step + w->channels;
  vf offset = {0};
  for (int64_t d = 0; d < w->channels; d += W) {
    const vf q = load(x + d), s = load(step + d);
    offset = multiply_add(q, multiply_add(s, load(w->middles + d), load(low + d)), offset);
    store(w->folded + d, q * s);
  }
  struct line line = {.offset = sum_of(offset)};
  int8_t *const codes = (int8_t *)(w->query_codes + query * w->channels / 4);
  line.unit = round_bytes(w->folded, w->middles, w->channels, codes, &line.sum);
  return line;
}

/* The weights of a block are its exponentials; of frames that it lacks they are 0. */
INLINE struct line round_weights(const struct work *const w, const int64_t query, const int64_t frames) {
  const int64_t padded = wkv_round_up(frames, WKV_TILE);
  int8_t *const codes = (int8_t *)(w->weight_codes + query * WKV_BLOCK / 4);
  struct line line = {.offset = w->added[query]};
  line.unit = round_bytes(w->exponentials + query * WKV_BLOCK, NULL, padded, codes, &line.sum);
  if (padded < WKV_BLOCK) memset(codes + padded, 0, (size_t)(WKV_BLOCK - padded));
  return line;
}

/* Bits from the from-th on, in the place of those from the to-th on. */
INLINE vu shifted(const vu x, const int from, const int to) { return from > to ? x >> (from - to) : x << (to - from); }

/* The bits that a plane holds of the quads of a strip. */
INLINE void load_plane(const int plane, const int below, const int64_t half, const bool is_turned,
                       const uint8_t *const codes, vi quads[WKV_STRIP / 4]) {
  const vu mask = (vu){0} + (((1u << plane) - 1) << below) * 0x01010101u;
  const uint8_t *piece = codes + (below + half * plane / 2) * WKV_PIECE; /* of 1 bit there is one for both halves */
  vu x = {0};
  for (int q = 0; q < WKV_STRIP / 4; q++) {
    const int place = q % (8 / plane);
    if (place == 0) {
      memcpy(&x, piece, sizeof x);
      if (is_turned) x = (vu)transpose_bytes((vi)x);
      if (plane == 1) x >>= 4 * (uint32_t)half;
      piece += WKV_PIECE;
    }
    const vu its = plane == 8 ? x : shifted(x, plane * place, below) & mask;
    quads[q] = below ? quads[q] | (vi)its : (vi)its;
  }
}

/* The quads of a strip, the first or the second half of a block, as bytes: those of W frames, from `codes` on in each
 * piece. If it is turned, bytes and lanes of each have changed places, see transpose_bytes. */
INLINE void load_strip(const int bits, const int64_t half, const bool is_turned, const uint8_t *const codes,
                       vi quads[WKV_STRIP / 4]) {
  if (bits & 8) load_plane(8, 0, half, is_turned, codes, quads);
  if (bits & 4) load_plane(4, 0, half, is_turned, codes, quads);
  if (bits & 2) load_plane(2, bits & 4, half, is_turned, codes, quads);
  if (bits & 1) load_plane(1, bits & 6, half, is_turned, codes, quads);
}

/* function(bits, ...), with bits that the compiler knows. */
#define BITS_CASE(bits, function, ...) \
  case bits: function(bits, __VA_ARGS__); break;
#define FOR_BITS(bits, function, ...) \
  switch (bits) { \
    BITS_CASE(1, function, __VA_ARGS__) \
    BITS_CASE(2, function, __VA_ARGS__) \
    BITS_CASE(3, function, __VA_ARGS__) \
    BITS_CASE(4, function, __VA_ARGS__) \
    BITS_CASE(5, function, __VA_ARGS__) \
    BITS_CASE(6, function, __VA_ARGS__) \
    BITS_CASE(7, function, __VA_ARGS__) \
    BITS_CASE(8, function, __VA_ARGS__) \
    default: __builtin_unreachable(); /* they were checked */ \
  }

/* Of a block: how many bits, and where it is in a tile. */
INLINE int bits_of_block(const int bits, const struct work *const w, const int64_t channel) {
  return bits == WKV_MIXED ? (int)w->places[channel / WKV_CHANNELS].bits : bits;
}

INLINE int64_t place_of_block(const int bits, const struct work *const w, const int64_t channel) {
  return bits == WKV_MIXED ? w->places[channel / WKV_CHANNELS].byte
                           : wkv_bytes_of_channels(bits, channel / WKV_CHANNELS * WKV_CHANNELS);
}

INLINE int64_t place_of_frame(const int64_t tile_bytes, const int64_t frame) {
  return frame / WKV_TILE * tile_bytes + frame % WKV_TILE * 4;
}

/* The products alone may be beyond 32 bits, with many channels; less their middles they are not. */
INLINE void store_logits(const struct work *const w, const int64_t query, const int64_t place, const vu products) {
  const struct line *const line = &w->lines[query];
  const vf centred = __builtin_convertvector((vi)(products - (uint32_t)line->sum), vf);
  store(w->logits + query * WKV_BLOCK + place, multiply_add(centred, splat(line->unit), splat(line->offset)));
}

/* sums = shrink * sums + weights * values for W channels, of the products of their codes. */
INLINE void add_products(const struct work *const w, const int64_t query, const int64_t channel, const struct line line,
                         const vf products) {
  const float *const step = w->value_steps + channel;
  float *const sums = w->sums[query] + channel;
  const vf s = load(step), middle = load(w->middles + channel);
  const vf base = multiply_add(s, middle, load(step + w->channels));
  const vf scaled = multiply_add(middle, splat(-(float)line.sum), products) * line.unit;
  store(sums, multiply_add(scaled, s, multiply_add(base, splat(line.offset), load(sums) * w->shrink[query])));
}

#endif
