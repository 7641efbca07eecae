/* Keys and values of an encoder's head as panels: see struct head. */
#ifndef WHISPERKV_FRAMES_PACK_H
#define WHISPERKV_FRAMES_PACK_H
#include <math.h>

#include "frames.h"

/* The channels of one head in one frame. */
INLINE const float *channels_of(const struct wkv_encoder_attention *const a, const struct wkv_heads *const heads,
                                const struct head *const h, const int64_t frame) {
  return heads->data + h->audio * heads->audio + frame * heads->frame + h->number * a->head_dim;
}

INLINE void pack_bias(const enum wkv_precision precision, const struct wkv_encoder_attention *const a,
                      const struct head *const h) {
  for (int64_t f = 0; f < h->padded; f++)
    h->bias[f] = f >= h->length ? -INFINITY : a->bias ? a->bias[h->audio * a->frames + f] * base_of(precision) : 0;
}

INLINE void pack_keys(const enum wkv_precision precision, const struct wkv_encoder_attention *const a,
                      const struct head *const h) {
  for (int64_t f = 0; f < h->padded; f++) {
    const float *const key = channels_of(a, &a->key, h, least(f, h->length - 1));
    uint32_t *const column = h->keys + f / PANEL * PANEL * h->lanes + f % PANEL;
    const float unit = precision == WKV_IN_BYTES ? unit_of(key, a->head_dim) : 0;
    vu sum = {0};
    for (int64_t d = 0, k = 0; k < h->lanes; d += per_vector(precision), k += W) {
      vu lanes = fill_lanes(precision, key + d, least(per_vector(precision), a->head_dim - d), inverse_of(unit), 0);
      if (f >= h->length) lanes = (vu){0};
      if (precision == WKV_IN_BYTES) sum = multiply_bytes((vi){0} + 0x01010101, (vi)lanes, sum);
      for (int64_t i = 0; i < W && k + i < h->lanes; i++) column[(k + i) * PANEL] = lanes[i];
    }
    if (precision != WKV_IN_BYTES) continue;
    h->key_units[f] = unit;
    h->starts[f] = 0;
    for (int i = 0; i < W; i++) h->starts[f] -= MIDDLE * sum[i];
  }
}

/* What codes of W channels are worth; NaN where a number is not finite. */
INLINE vf units_of_channels(const struct wkv_encoder_attention *const a, const struct head *const h,
                            const int64_t channel, const int64_t n) {
  vf top = {0}, spoilt = {0};
  for (int64_t f = 0; f < h->length; f++) {
    const vf x = load_in_order(WKV_FLOAT32, channels_of(a, &a->value, h, f) + channel, n);
    top = larger(larger(x, -x), top);
    spoilt = multiply_add(x, splat(0), spoilt);
  }
  return top * (1.0f / 127) + spoilt;
}

/* W channels of a vector's frames, which stand in its lanes as their weights do. */
INLINE void pack_values_of(const enum wkv_precision precision, const struct wkv_encoder_attention *const a,
                           const struct head *const h, const int64_t channel, const int64_t n) {
  uint32_t *const column = h->values + channel / PANEL * PANEL * (h->padded / per_lane(precision)) + channel % PANEL;
  vf inverse = {0};
  if (precision == WKV_IN_BYTES) {
    const vf units = units_of_channels(a, h, channel, n);
    store(h->value_units + channel, units);
    inverse = (vf)choose(units > 0, (vu)(1 / units), (vu){0});
  }
  for (int64_t k = 0; k < h->padded / per_lane(precision); k++) {
    const int64_t first = k / W * per_vector(precision) + k % W;
    vu lanes = {0};
    for (int j = 0; j < per_lane(precision) && first + j * W < h->length; j++) {
      const vf x = load_in_order(WKV_FLOAT32, channels_of(a, &a->value, h, first + j * W) + channel, n);
      switch (precision) {
        case WKV_IN_FLOAT32: lanes = (vu)x; break;
        case WKV_IN_BFLOAT16: lanes |= to_bfloat16(x) >> (j ? 0 : 16); break;
        default: lanes |= (nearest(x * inverse) & 0xff) << 8 * j;
      }
    }
    memcpy(column + k * PANEL, &lanes, sizeof lanes);
  }
}

INLINE void pack_head(const enum wkv_precision precision, const struct wkv_encoder_attention *const a,
                      const int64_t item) {
  const struct head h = packed_head(precision, a, item);
  pack_bias(precision, a, &h);
  pack_keys(precision, a, &h);
  for (int64_t channel = 0; channel < h.channels; channel += W) {
    const int64_t n = least(W, a->head_dim - channel);
    pack_values_of(precision, a, &h, channel, n > 0 ? n : 0);
  }
}

#endif
