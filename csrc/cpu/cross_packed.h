/* A block of cross-attention over a packed cache. */
#ifndef WHISPERKV_CROSS_PACKED_H
#define WHISPERKV_CROSS_PACKED_H
#include "cross_codes.h"
#ifdef WKV_AMX
#include "cross_amx.h"
#endif

enum {
  ABREAST = W > 8 ? 8 : 4,    /* queries whose integer sums are in registers over the keys */
  MIXED = W > 8 ? 4 : 2,      /* and over a strip of the values, */
  MIXED_MOST = W > 8 ? 5 : 2, /* or so many if no more are left */
  MOST_STRIPS = W / 4,        /* whose sums are in registers, of one query */
};

/* As together(), but divided evenly if they are many. */
INLINE int64_t evenly(const int64_t left, const int most, const int usual) {
  return left <= most ? left : wkv_count_of(left, wkv_count_of(left, usual));
}

INLINE void prefetch(const void *const p, const int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)p + i);
}

/* Integer products of `some` queries with W frames of a block of channels. */
INLINE void multiply_block(const int bits, const int some, const uint8_t *const codes, const int32_t *const query,
                           const int64_t quads, vu *const sums) {
  for (int half = 0; half < 2; half++) {
    vi x[WKV_STRIP / 4];
    load_strip(bits, half, false, codes, x);
    for (int q = 0; q < WKV_STRIP / 4; q++)
      for (int i = 0; i < some; i++)
        sums[i] = multiply_bytes(x[q], (vi){0} + query[i * quads + half * (WKV_STRIP / 4) + q], sums[i]);
  }
}

INLINE void score_tiles(const int some, const int bits, const int64_t channels, const int64_t tile_bytes,
                        const struct work *const w, const int64_t frames, const int64_t query) {
  const int32_t *const codes_of_query = w->query_codes + query * channels / 4;
  for (int64_t f = 0; f < frames; f += W) {
    const int64_t place = place_of_frame(tile_bytes, f);
    if (query == 0 && some > 1 && w->value_codes != w->key_codes && f % WKV_TILE == 0)
      prefetch(w->value_codes + place, tile_bytes);
    vu sums[ABREAST];
    for (int i = 0; i < some; i++) sums[i] = (vu){0};
    for (int64_t channel = 0; channel < channels; channel += WKV_CHANNELS) {
      const uint8_t *const codes = w->key_codes + place + place_of_block(bits, w, channel);
      FOR_BITS(bits_of_block(bits, w, channel), multiply_block, some, codes, codes_of_query + channel / 4, channels / 4,
               sums)
    }
    for (int i = 0; i < some; i++) store_logits(w, query + i, f, sums[i]);
  }
}

INLINE void score_codes(const int bits, const int64_t channels, const int64_t tile_bytes, const struct work *const w,
                        const int64_t frames) {
#ifdef WKV_AMX
  if (worth_tiles(w)) return score_on_tiles(bits, w, frames);
#endif
  for (int64_t query = 0, count; query < w->queries; query += count) {
    count = together(w->queries - query, ABREAST, ABREAST);
    FOR_COUNT(count, ABREAST, score_tiles, bits, channels, tile_bytes, w, frames, query)
  }
}

INLINE void repeat_weights(const int32_t *restrict const codes, const int64_t frames, int32_t *restrict const lanes) {
  for (int64_t i = 0; i < wkv_round_up(frames, WKV_TILE) / 4; i++)
    for (int lane = 0; lane < 4; lane++) lanes[4 * i + lane] = codes[i];
}

/* sums = shrink * sums + weights * values, for `some` queries and the channels of some strips, from the first or the
 * second half of a block on. */
INLINE void mix_block(const int bits, const int some, const int strips, const int64_t tile_bytes,
                      const struct work *const w, const int64_t frames, const struct line *const lines,
                      const int64_t query, const int64_t channel, const uint8_t *const codes) {
  vu sums[MOST_STRIPS * WKV_STRIP / 4][MIXED_MOST];
  for (int q = 0; q < strips * WKV_STRIP / 4; q++)
    for (int i = 0; i < some; i++) sums[q][i] = (vu){0};
  for (int64_t f = 0; f < frames; f += W) {
    const uint8_t *const tile = codes + place_of_frame(tile_bytes, f);
    for (int strip = 0; strip < strips; strip++) {
      vi x[WKV_STRIP / 4];
      const int64_t half = strips > 1 ? strip % 2 : channel / WKV_STRIP % 2;
      load_strip(bits, half, true, tile + strip / 2 * wkv_bytes_of_block(bits), x);
      for (int i = 0; i < some; i++) {
        vi weights;
        memcpy(&weights, w->weight_lanes + (query + i) * WKV_BLOCK + f, sizeof weights);
        for (int q = 0; q < WKV_STRIP / 4; q++) {
          vu *const sum = &sums[strip * WKV_STRIP / 4 + q][i];
          *sum = multiply_bytes(x[q], weights, *sum);
        }
      }
    }
  }
  for (int i = 0; i < some; i++)
    for (int q = 0; q < strips * WKV_STRIP / 4; q += W / 4) {
      vf parts[W / 4];
      for (int k = 0; k < W / 4; k++) parts[k] = __builtin_convertvector((vi)sums[q + k][i], vf);
      add_products(w, query + i, channel + 4 * q, lines[query + i], sum_channels(parts));
    }
}

INLINE void mix_strips(const int some, const int strips, const int bits, const int64_t tile_bytes,
                       const struct work *const w, const int64_t frames, const struct line *const lines,
                       const int64_t query, const int64_t channel) {
  const uint8_t *const codes = w->value_codes + place_of_block(bits, w, channel);
  FOR_BITS(bits_of_block(bits, w, channel), mix_block, some, strips, tile_bytes, w, frames, lines, query, channel,
           codes)
}

INLINE void mix_codes(const int bits, const int64_t channels, const int64_t tile_bytes, const struct work *const w,
                      const int64_t frames) {
  struct line lines[WKV_TOGETHER];
  for (int64_t q = 0; q < w->queries; q++) lines[q] = round_weights(w, q, frames);
#ifdef WKV_AMX
  if (worth_tiles(w)) return mix_on_tiles(bits, w, frames, lines);
#endif
  for (int64_t q = 0; q < w->queries; q++)
    repeat_weights(w->weight_codes + q * WKV_BLOCK / 4, frames, w->weight_lanes + q * WKV_BLOCK);
  /* Of narrow values a single query takes whole tiles, which reads them in the order that they stand in. */
  if (w->queries == 1 && bits != WKV_MIXED && channels == NARROW) {
    for (int64_t channel = 0; channel < NARROW; channel += MOST_STRIPS * WKV_STRIP)
      mix_strips(1, MOST_STRIPS, bits, tile_bytes, w, frames, lines, 0, channel);
    return;
  }
  for (int64_t channel = 0; channel < channels; channel += WKV_STRIP)
    for (int64_t query = 0, count; query < w->queries; query += count) {
      count = evenly(w->queries - query, MIXED_MOST, MIXED);
      FOR_COUNT(count, MIXED_MOST, mix_strips, 1, bits, tile_bytes, w, frames, lines, query, channel)
    }
}

#endif
