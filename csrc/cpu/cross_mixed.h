/* A block of cross-attention over a cache of mixed bits: its codes become such of 8 bits, in memory nearby, and all
 * else is done to those. */
#ifndef WHISPERKV_CROSS_MIXED_H
#define WHISPERKV_CROSS_MIXED_H
#include "cross_codes.h"

enum { MIXED_BLOCK = WKV_BLOCK / 2 }; /* frames: they stay in the cache nearby */

/* What is added to the codes of so many bits, that their middle is that of 8. */
INLINE int lift(const int bits) { return middle(8) - middle(bits); }

/* W frames of a block of channels, those from `codes` on in each piece, as eight quads of 8 bits. */
INLINE void unpack_quads(const int bits, const uint8_t *codes, uint8_t *const to) {
  vi quads[WKV_CHANNELS / 4];
  for (int q = 0; q < WKV_CHANNELS / 4; q++) quads[q] = (vi){0} + lift(bits) * 0x01010101;
  for (int plane = 8, below = 0; plane > 0; plane /= 2) {
    if (!(bits & plane)) continue;
    const int together = 8 / plane;
    const uint32_t mask = ((1u << plane) - 1) * 0x01010101u;
    for (int p = 0; p < plane; p++) {
      vu x;
      memcpy(&x, codes + p * WKV_PIECE, sizeof x);
      for (int i = 0; i < together; i++) quads[p * together + i] += (vi)(((x >> (plane * i)) & mask) << below);
    }
    codes += plane * WKV_PIECE;
    below += plane;
  }
  for (int q = 0; q < WKV_CHANNELS / 4; q++) memcpy(to + q * WKV_PIECE, &quads[q], sizeof quads[q]);
}

#define UNPACK(bits) \
  case bits: \
    for (int64_t f = 0; f < WKV_TILE; f += W) unpack_quads(bits, from + f * 4, to + f * 4); \
    break;

/* Frames of one group. What is unpacked stands for least + step * (code + lift). */
static void unpack_block(const struct work *const w, const int64_t first, const int64_t frames) {
  const float *const bits_of = w->a->value_scales;
  const float *const step = w->mixed_scales + wkv_place_of_steps(w->channels, first / w->a->group);
  const float *const low = step + w->channels;
  for (int64_t d = 0; d < w->channels; d++) {
    w->unpacked_scales[d] = step[d];
    w->unpacked_scales[w->channels + d] = low[d] - step[d] * (float)lift((int)bits_of[d]);
  }
  for (int64_t f = 0; f < frames; f += WKV_TILE) {
    const uint8_t *from = w->mixed + (first + f) / WKV_TILE * w->a->tile_bytes;
    uint8_t *to = w->unpacked + wkv_place_of_codes(8, w->channels, f, 0);
    for (int64_t channel = 0; channel < w->channels; channel += WKV_CHANNELS) {
      const int bits = (int)bits_of[channel];
      switch (bits) { UNPACK(1) UNPACK(2) UNPACK(3) UNPACK(4) UNPACK(5) UNPACK(6) UNPACK(7) UNPACK(8) }
      from += wkv_bytes_of_block(bits);
      to += wkv_bytes_of_channels(8, WKV_CHANNELS);
    }
  }
}

static void begin_mixed(struct work *const w, const uint8_t *const codes, const float *const scales) {
  w->mixed = codes;
  w->mixed_scales = scales;
  w->keys = w->values = w->unpacked;
  w->key_scales = w->value_scales = w->unpacked_scales;
}

#endif
