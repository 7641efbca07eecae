/* Keys and values of an encoder's head as panels: see struct head. */
#ifndef WHISPERKV_FRAMES_PACK_H
#define WHISPERKV_FRAMES_PACK_H
#include <math.h>

#include "frames.h"

/* The channels of one head in one frame, or in the last one. */
INLINE const float *channels_of(const struct wkv_encoder_attention *const a, const struct wkv_heads *const heads,
                                const struct head *const h, const int64_t frame) {
  return heads->data + h->audio * heads->audio + least(frame, h->length - 1) * heads->frame + h->number * a->head_dim;
}

INLINE void pack_bias(const enum wkv_precision precision, const struct wkv_encoder_attention *const a,
                      const struct head *const h) {
  for (int64_t place = 0; place < h->padded; place++) {
    const int64_t frame = frame_at(precision, h, place);
    h->bias[place] = frame >= h->length ? -INFINITY : a->bias ? a->bias[h->audio * a->frames + frame] : 0;
  }
}

/* The keys of W places. */
INLINE void pack_keys_of(const enum wkv_precision precision, const struct wkv_encoder_attention *const a,
                         const struct head *const h, const int64_t place) {
  uint32_t *const panel = h->keys + place / PANEL * PANEL * h->lanes + place % PANEL;
  const float *key[W];
  float units[W];
  int64_t channels[W];
  for (int i = 0; i < W; i++) {
    const int64_t frame = frame_at(precision, h, place + i);
    key[i] = channels_of(a, &a->key, h, frame);
    channels[i] = frame < h->length ? a->head_dim : 0;
    units[i] = precision == WKV_IN_BYTES ? unit_of(key[i], a->head_dim) : 1;
  }
  vu sum = {0};
  for (int64_t d = 0, k = 0; k < h->lanes; d += per_vector(precision), k += W) {
    vu x[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) x[i] = fill_lanes(precision, key[i] + d, channels[i] - d, inverse_of(units[i]), 0);
    transpose(x);
    for (int i = 0; i < W; i++) {
      memcpy(panel + (k + i) * PANEL, &x[i], sizeof x[i]);
      if (precision == WKV_IN_BYTES) sum = multiply_bytes((vi){0} + 0x01010101, (vi)x[i], sum);
    }
  }
  if (precision != WKV_IN_BYTES) return;
  memcpy(h->key_units + place, units, sizeof units);
  sum *= -MIDDLE;
  memcpy(h->starts + place, &sum, sizeof sum);
}

/* The middle of W channels, which codes count from, and what they are worth; NaN where a number is not finite. */
INLINE void measure_channels(const struct wkv_encoder_attention *const a, const struct head *const h,
                             const int64_t channel) {
  vf top = splat(-INFINITY), low = splat(INFINITY), spoilt = {0};
  for (int64_t f = 0; f < h->length; f++) {
    const vf x = load_first(channels_of(a, &a->value, h, f) + channel, a->head_dim - channel);
    top = larger(x, top);
    low = smaller(x, low);
    spoilt = multiply_add(x, splat(0), spoilt);
  }
  store(h->value_middles + channel, top * 0.5f + low * 0.5f);
  store(h->value_units + channel, (top * 0.5f - low * 0.5f) * (1.0f / 127) + spoilt);
}

/* W channels of a vector's frames, which stand in its lanes as their weights do. */
INLINE void pack_values_of(const enum wkv_precision precision, const struct wkv_encoder_attention *const a,
                           const struct head *const h, const int64_t channel) {
  uint32_t *const column = h->values + channel / PANEL * PANEL * (h->padded / per_lane(precision)) + channel % PANEL;
  vf middle = {0}, factor = splat(1);
  if (precision == WKV_IN_BYTES) {
    measure_channels(a, h, channel);
    const vf units = load(h->value_units + channel);
    middle = load(h->value_middles + channel);
    factor = (vf)choose(units > 0, (vu)(1 / units), (vu){0});
  }
  for (int64_t k = 0; k < h->padded / per_lane(precision); k++) {
    const int64_t first = k / W * per_vector(precision) + k % W;
    vu lanes = {0};
    for (int j = 0; j < per_lane(precision); j++) {
      const int64_t frame = frame_at(precision, h, first + j * W);
      if (frame >= h->length) continue;
      const vf x = load_first(channels_of(a, &a->value, h, frame) + channel, a->head_dim - channel);
      lanes |= part_of_lanes(precision, (x - middle) * factor, j, 0);
    }
    memcpy(column + k * PANEL, &lanes, sizeof lanes);
  }
}

INLINE void pack_head(const enum wkv_precision precision, const struct wkv_encoder_attention *const a,
                      const int64_t item) {
  const struct head h = packed_head(precision, a, item);
  pack_bias(precision, a, &h);
  for (int64_t place = 0; place < h.padded; place += W) pack_keys_of(precision, a, &h, place);
  for (int64_t channel = 0; channel < h.channels; channel += W) pack_values_of(precision, a, &h, channel);
}

#endif
