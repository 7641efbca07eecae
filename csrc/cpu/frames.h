/* What packing the heads of an encoder and attending over them share. Numbers are multiplied in lanes of 32 bits, each
 * of which holds one float, two bfloat16 or four bytes, whose products are added up. */
#ifndef WHISPERKV_FRAMES_H
#define WHISPERKV_FRAMES_H
#include <stdbool.h>

#include "simd.h"

#if W > 8 || defined(__aarch64__)
enum { VECTORS = 4 }; /* with ROWS they fill most of 32 registers */
#else
enum { VECTORS = 2 }; /* of 16 */
#endif
enum {
  ROWS = 6,
  PANEL = VECTORS * W,
  MIDDLE = 128 /* is added to the codes of queries, which are multiplied as unsigned bytes */
};

INLINE int per_lane(const enum wkv_precision precision) {
  return precision == WKV_IN_FLOAT32 ? 1 : precision == WKV_IN_BFLOAT16 ? 2 : 4;
}

/* Numbers that fill the lanes of a vector: lane i holds number i, i + W, ... of them. */
INLINE int64_t per_vector(const enum wkv_precision precision) { return per_lane(precision) * W; }

/* A packed head. Both matrices stand in panels of PANEL columns, lane after lane; of the keys' last panel only what
 * is padded is there. What no frame stands for is 0, with a bias of -inf. */
struct head {
  int64_t audio, number;   /* of this head in its audio */
  int64_t length, padded;  /* frames in use; padded: to a multiple of per_vector */
  int64_t lanes, channels; /* lanes of a query; channels: head_dim, padded */
  uint32_t *keys;          /* [panels of frames, lanes, PANEL] */
  uint32_t *values;        /* [panels of channels, padded / per_lane, PANEL] */
  float *bias;             /* [padded] */
  /* of bytes */
  float *key_units, *value_units; /* [padded] and [channels]: what one of their codes is worth */
  float *value_middles;           /* [channels]: what codes of 0 stand for */
  uint32_t *starts;               /* [padded]: where sums of products start, so that MIDDLE drops out */
};

/* The frame that is packed in a place. Of bytes, those that a lane sees one after the other are neighbours: what
 * rounding the weight of one leaves over goes to the next, whose value is much the same. */
INLINE int64_t frame_at(const enum wkv_precision precision, const struct head *const h, const int64_t place) {
  if (precision != WKV_IN_BYTES) return place;
  const int64_t together = per_vector(precision);
  return place % together * (h->padded / together) + place / together;
}

INLINE struct head packed_head(const enum wkv_precision precision, const struct wkv_encoder_attention *const a,
                               const int64_t item) {
  const int64_t audio = (a->first_head + item) / a->heads;
  const int64_t length = a->lengths ? a->lengths[audio] : a->frames;
  struct head h = {.audio = audio,
                   .number = (a->first_head + item) % a->heads,
                   .length = length,
                   .padded = wkv_round_up(length, per_vector(precision)),
                   .lanes = wkv_count_of(a->head_dim, per_vector(precision)) * W,
                   .channels = wkv_round_up(a->head_dim, PANEL)};
  h.keys = a->packed + item * wkv_encoder_packed(a);
  h.values = h.keys + wkv_round_up(h.padded, PANEL) * h.lanes;
  h.bias = (float *)(h.values + h.padded / per_lane(precision) * h.channels);
  h.key_units = h.bias + h.padded;
  h.starts = (uint32_t *)(h.key_units + h.padded);
  h.value_units = h.key_units + 2 * h.padded;
  h.value_middles = h.value_units + h.channels;
  return h;
}

/* sum + the products of two lanes. Bytes of a are unsigned; their sums are whole numbers in the place of floats. */
INLINE vf multiply_lanes(const enum wkv_precision precision, const vu a, const vu b, const vf sum) {
  switch (precision) {
    case WKV_IN_FLOAT32: return multiply_add((vf)a, (vf)b, sum);
    case WKV_IN_BFLOAT16: return multiply_bfloat16(a, b, sum);
    default: return multiply_bytes_in_place((vi)a, (vi)b, sum);
  }
}

/* sums += rows times a panel, of which `vectors` are wanted. */
INLINE void multiply_panel(const enum wkv_precision precision, const int vectors, const uint32_t *const rows,
                           const int64_t stride, const uint32_t *const panel, const int64_t lanes,
                           vf sums[ROWS][VECTORS]) {
  for (int64_t k = 0; k < lanes; k++) {
    vu column[VECTORS];
    for (int v = 0; v < vectors; v++) memcpy(&column[v], panel + k * PANEL + v * W, sizeof column[v]);
    for (int r = 0; r < ROWS; r++) {
      const vu x = (vu){0} + rows[r * stride + k];
      for (int v = 0; v < vectors; v++) sums[r][v] = multiply_lanes(precision, x, column[v], sums[r][v]);
    }
  }
}

/* The first n numbers at p, W at most, then zeros. */
INLINE vf load_first(const float *const p, const int64_t n) {
  if (n >= W) return load(p);
  vf x = {0};
  if (n > 0) memcpy(&x, p, (size_t)n * sizeof *p);
  return x;
}

/* What one code is worth if the largest of n numbers is to be 127; NaN if one of them is not finite. */
INLINE float unit_of(const float *const x, const int64_t n) {
  vf top = {0}, spoilt = {0};
  for (int64_t i = 0; i < n; i += W) {
    const vf some = load_first(x + i, n - i);
    top = larger(larger(some, -some), top);
    spoilt = multiply_add(some, splat(0), spoilt);
  }
  return largest_of(top) * (1.0f / 127) + sum_of(spoilt);
}

INLINE float inverse_of(const float unit) { return unit > 0 ? 1 / unit : 0; }

/* The nearest whole number in the low byte, beside bits that are always the same. */
INLINE vu nearest(const vf x) { return (vu)(x + 0x1.8p23f); }

/* W numbers as part j of their lanes. Bytes are numbers of units + middle. */
INLINE vu part_of_lanes(const enum wkv_precision precision, const vf x, const int j, const uint8_t middle) {
  switch (precision) {
    case WKV_IN_FLOAT32: return (vu)x;
    case WKV_IN_BFLOAT16: return to_bfloat16(x) >> (j ? 0 : 16);
    default: return ((nearest(x) + middle) & 0xff) << 8 * j;
  }
}

/* The first n <= per_vector channels at x, times `factor`, in W lanes; then zeros. */
INLINE vu fill_lanes(const enum wkv_precision precision, const float *const x, const int64_t n, const float factor,
                     const uint8_t middle) {
  vu lanes = {0};
  for (int j = 0; j < per_lane(precision); j++)
    lanes |= part_of_lanes(precision, load_first(x + j * W, n - j * W) * factor, j, middle);
  return lanes;
}

#endif
