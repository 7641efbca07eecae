/* A block of cross-attention over a packed cache on AMX tiles, where many queries share it: the products are the same
 * to the bit. */
#ifndef WHISPERKV_CROSS_AMX_H
#define WHISPERKV_CROSS_AMX_H
#include "amx.h"
#include "cross_codes.h"

INLINE bool worth_tiles(const struct work *const w) { return w->queries >= 8 && w->channels % AMX_BYTES == 0; }

/* 16 quads of channels of a tile of frames, and of 8 bits in any case. */
INLINE const void *quads_of_tile(const int bits, const uint8_t *const codes, const int64_t channel,
                                 uint8_t *const room) {
  const uint8_t *const from = codes + wkv_bytes_of_channels(bits, channel);
  if (bits == 8) return from;
  for (int quad = 0; quad < 16; quad += 2) {
    const vi x = load_quad(bits, from, quad), both[] = {low_halves(x), high_halves(x)};
    memcpy(room + quad * AMX_BYTES, both, sizeof both);
  }
  return room;
}

static void score_on_tiles(const int bits, const struct work *const w, const int64_t first, const int64_t frames,
                           const struct line *const lines) {
  const struct amx_shape shape = amx_shape(w->queries);
  uint8_t room[AMX_ROWS * AMX_BYTES];
  vu products[WKV_TOGETHER];
  amx_start(&shape);
  for (int64_t f = 0; f < frames; f += WKV_TILE) {
    const uint8_t *const codes = (const uint8_t *)w->keys + wkv_place_of_codes(bits, w->channels, first + f, 0);
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
INLINE void turn(const int bits, const uint8_t *const codes, const int64_t channels, const int64_t tiles,
                 uint8_t *const to) {
  for (int64_t t = 0; t < AMX_BYTES / WKV_TILE; t++) {
    const uint8_t *const tile = codes + wkv_place_of_codes(bits, channels, t * WKV_TILE, 0);
    vi x[4] = {0};
    for (int q = 0; q < 4 && t < tiles; q++) {
      if (bits == 8) x[q] = load_quad(bits, tile, q);
      else if (q % 2) x[q] = high_halves(x[q - 1]), x[q - 1] = low_halves(x[q - 1]);
      else x[q] = load_quad(bits, tile, q);
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
  const int64_t tiles = wkv_count_of(frames, WKV_TILE);
  uint8_t room[AMX_ROWS * AMX_BYTES];
  vu products[WKV_TOGETHER];
  amx_start(&shape);
  for (int64_t channel = 0; channel < w->channels; channel += 16) {
    amx_clear(AMX_SUMS);
    if (w->queries > AMX_ROWS) amx_clear(AMX_MORE_SUMS);
    for (int64_t t = 0; t < tiles; t += AMX_BYTES / WKV_TILE) {
      const int64_t place = wkv_place_of_codes(bits, w->channels, first + t * WKV_TILE, channel);
      const char *const weights = (const char *)w->weight_codes + t * WKV_TILE;
      turn(bits, (const uint8_t *)w->values + place, w->channels, tiles - t, room);
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
      add_products(bits, w, q, first, channel, lines[q], __builtin_convertvector((vi)products[q], vf));
  }
  amx_stop();
}

#endif
