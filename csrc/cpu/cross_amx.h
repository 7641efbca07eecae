/* A block of cross-attention over a packed cache on AMX tiles, where many queries share it: the products are the same
 * to the bit. */
#ifndef WHISPERKV_CROSS_AMX_H
#define WHISPERKV_CROSS_AMX_H
#include "amx.h"
#include "cross_codes.h"

INLINE bool worth_tiles(const struct work *const w) { return w->queries >= 8 && w->channels % AMX_BYTES == 0; }

INLINE void unpack_block(const int bits, const uint8_t *const codes, uint8_t *const room) {
  for (int half = 0; half < 2; half++) {
    vi quads[WKV_STRIP / 4];
    load_strip(bits, half, false, codes, quads);
    memcpy(room + half * (int)sizeof quads, quads, sizeof quads);
  }
}

/* 16 quads of channels of a tile of frames, as bytes. */
INLINE const void *quads_of_tile(const int bits, const struct work *const w, const uint8_t *const codes,
                                 const int64_t channel, uint8_t *const room) {
  if (bits == 8) return codes + place_of_block(bits, w, channel);
  for (int64_t c = 0; c < AMX_BYTES; c += WKV_CHANNELS) {
    const uint8_t *const its = codes + place_of_block(bits, w, channel + c);
    FOR_BITS(bits_of_block(bits, w, channel + c), unpack_block, its, room + c / 4 * AMX_BYTES)
  }
  return room;
}

static void score_on_tiles(const int bits, const struct work *const w, const int64_t frames) {
  const struct amx_shape shape = amx_shape(w->queries);
  uint8_t room[AMX_ROWS * AMX_BYTES];
  vu products[WKV_TOGETHER];
  amx_start(&shape);
  for (int64_t f = 0; f < frames; f += WKV_TILE) {
    const uint8_t *const codes = w->key_codes + place_of_frame(w->tile_bytes, f);
    amx_clear(AMX_SUMS);
    if (w->queries > AMX_ROWS) amx_clear(AMX_MORE_SUMS);
    for (int64_t channel = 0; channel < w->channels; channel += AMX_BYTES) {
      const char *const queries = (const char *)w->query_codes + channel;
      amx_load(AMX_CACHE, quads_of_tile(bits, w, codes, channel, room), AMX_BYTES);
      amx_load(AMX_QUERIES, queries, w->channels);
      amx_multiply(AMX_SUMS, AMX_QUERIES, AMX_CACHE);
      if (w->queries <= AMX_ROWS) continue;
      amx_load(AMX_MORE_QUERIES, queries + AMX_ROWS * w->channels, w->channels);
      amx_multiply(AMX_MORE_SUMS, AMX_MORE_QUERIES, AMX_CACHE);
    }
    amx_store(AMX_SUMS, products, AMX_BYTES);
    if (w->queries > AMX_ROWS) amx_store(AMX_MORE_SUMS, products + AMX_ROWS, AMX_BYTES);
    for (int64_t q = 0; q < w->queries; q++) store_logits(w, q, f, products[q]);
  }
  amx_stop();
}

/* 16 channels of 64 frames, four frames to a lane: what a tile of the cache must be to be multiplied by weights. */
INLINE void turn(const int bits, const struct work *const w, const uint8_t *const codes, const int64_t half,
                 const int64_t tiles, uint8_t *const to) {
  for (int64_t t = 0; t < AMX_BYTES / WKV_TILE; t++) {
    vi x[4] = {0};
    if (t < tiles) load_strip(bits, half, true, codes + t * w->tile_bytes, x);
    for (int q = 0; q < 4; q++)
      for (int quad = 0; quad < 4; quad++)
        memcpy(to + (4 * t + quad) * AMX_BYTES + q * 16, (const char *)&x[q] + quad * 16, 16);
  }
}

static void mix_on_tiles(const int bits, const struct work *const w, const int64_t frames,
                         const struct line *const lines) {
  const struct amx_shape shape = amx_shape(w->queries);
  const int64_t tiles = wkv_count_of(frames, WKV_TILE);
  uint8_t room[AMX_ROWS * AMX_BYTES];
  vu products[WKV_TOGETHER];
  amx_start(&shape);
  for (int64_t channel = 0; channel < w->channels; channel += WKV_STRIP) {
    amx_clear(AMX_SUMS);
    if (w->queries > AMX_ROWS) amx_clear(AMX_MORE_SUMS);
    for (int64_t t = 0; t < tiles; t += AMX_BYTES / WKV_TILE) {
      const uint8_t *const codes = w->value_codes + t * w->tile_bytes + place_of_block(bits, w, channel);
      const char *const weights = (const char *)w->weight_codes + t * WKV_TILE;
      FOR_BITS(bits_of_block(bits, w, channel), turn, w, codes, channel / WKV_STRIP % 2, tiles - t, room)
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
      add_products(w, q, channel, lines[q], __builtin_convertvector((vi)products[q], vf));
  }
  amx_stop();
}

#endif
