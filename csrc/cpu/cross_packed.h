/* A block of cross-attention over a packed cache. */
#ifndef WHISPERKV_CROSS_PACKED_H
#define WHISPERKV_CROSS_PACKED_H
#include "cross_codes.h"
#ifdef WKV_AMX
#include "cross_amx.h"
#endif

enum {
  ABREAST = W > 8 ? 8 : 4,    /* queries whose integer sums are in registers over the keys */
  MIXED = W > 8 ? 4 : 2,      /* and over the values, */
  MIXED_MOST = W > 8 ? 5 : 2, /* or so many if no more are left */
  MOST_QUADS = W              /* quads of channels whose sums are in registers, of one query */
};

INLINE void prefetch(const void *const p, const int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)p + i);
}

/* Integer products of `some` queries with W frames, those from `codes` on in each piece of the tile. */
INLINE void multiply_tile(const int bits, const struct work *const w, const uint8_t *const codes,
                          const int32_t *const query, const int some, vu *const sums) {
  const int64_t quads = w->channels / 4;
  for (int i = 0; i < some; i++) sums[i] = (vu){0};
  if (bits == 8) {
    for (int64_t q = 0; q < quads; q++) {
      const vi x = load_quad(bits, codes, q);
      for (int i = 0; i < some; i++) sums[i] = multiply_bytes(x, (vi){0} + query[i * quads + q], sums[i]);
    }
  } else {
    for (int64_t q = 0; q < quads; q += 2) {
      const vi x = load_quad(bits, codes, q), low = low_halves(x), high = high_halves(x);
      for (int i = 0; i < some; i++) {
        sums[i] = multiply_bytes(low, (vi){0} + query[i * quads + q], sums[i]);
        sums[i] = multiply_bytes(high, (vi){0} + query[i * quads + q + 1], sums[i]);
      }
    }
  }
}

INLINE void score_tiles(const int some, const int bits, const struct work *const w, const int64_t first,
                        const int64_t frames, const struct line *const lines, const int64_t query) {
  const int64_t from = wkv_place_of_codes(bits, w->channels, first, 0);
  for (int64_t f = 0; f < frames; f += W) {
    const int64_t place = from + wkv_place_of_codes(bits, w->channels, f, 0);
    if (query == 0 && some > 1 && w->values != w->keys && f % WKV_TILE == 0)
      prefetch((const char *)w->values + place, wkv_bytes_of_channels(bits, w->channels));
    vu sums[ABREAST];
    multiply_tile(bits, w, (const uint8_t *)w->keys + place, w->query_codes + query * w->channels / 4, some, sums);
    for (int i = 0; i < some; i++) store_logits(w, query + i, f, lines[query + i], sums[i]);
  }
}

INLINE void score_codes(const int bits, const struct work *const w, const int64_t first, const int64_t frames) {
  const float *const step = w->key_scales + wkv_place_of_steps(w->channels, first / w->a->group);
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

INLINE void repeat_weights(const int32_t *restrict const codes, const int64_t frames, int32_t *restrict const lanes) {
  for (int64_t i = 0; i < wkv_round_up(frames, WKV_TILE) / 4; i++)
    for (int lane = 0; lane < 4; lane++) lanes[4 * i + lane] = codes[i];
}

/* sums = shrink * sums + weights * values, for `some` queries and 4 * quads channels, a multiple of 16. */
INLINE void mix_strip(const int some, const int bits, const struct work *const w, const int64_t first,
                      const int64_t frames, const struct line *const lines, const int64_t query, const int64_t channel,
                      const int quads) {
  const uint8_t *const tiles = (const uint8_t *)w->values + wkv_place_of_codes(bits, w->channels, first, channel);
  vu sums[MOST_QUADS][MIXED_MOST];
  for (int q = 0; q < quads; q++)
    for (int i = 0; i < some; i++) sums[q][i] = (vu){0};
  for (int64_t f = 0; f < frames; f += W) {
    const uint8_t *const codes = tiles + wkv_place_of_codes(bits, w->channels, f, 0);
    vi weights[MIXED_MOST];
    for (int i = 0; i < some; i++)
      memcpy(&weights[i], w->weight_lanes + (query + i) * WKV_BLOCK + f, sizeof weights[i]);
    for (int q = 0; q < quads; q += 2) {
      vi x[2];
      if (bits == 8) {
        x[0] = transpose_bytes(load_quad(bits, codes, q));
        x[1] = transpose_bytes(load_quad(bits, codes, q + 1));
      } else {
        const vi both = transpose_bytes(load_quad(bits, codes, q));
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
      for (int k = 0; k < W / 4; k++) parts[k] = __builtin_convertvector((vi)sums[q + k][i], vf);
      add_products(bits, w, query + i, first, c, lines[query + i], sum_channels(parts));
    }
  }
}

/* Of narrow values a single query takes whole tiles, which reads them in the order that they stand in. */
INLINE void mix_codes(const int bits, const bool is_narrow, const struct work *const w, const int64_t first,
                      const int64_t frames) {
  const int alone = is_narrow ? MOST_QUADS : 4;
  struct line lines[WKV_TOGETHER];
  for (int64_t q = 0; q < w->queries; q++) lines[q] = round_weights(bits, w, q, frames);
#ifdef WKV_AMX
  if (worth_tiles(w)) return mix_on_tiles(bits, w, first, frames, lines);
#endif
  for (int64_t q = 0; q < w->queries; q++)
    repeat_weights(w->weight_codes + q * WKV_BLOCK / 4, frames, w->weight_lanes + q * WKV_BLOCK);
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

#endif
