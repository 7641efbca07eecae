/* What packing the heads of an encoder and attending over them share. Numbers are multiplied in lanes of 32 bits, each
 * of which holds one float, two bfloat16 or four bytes that are neighbours in the sum. */
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

/* Logits count in powers of e or, where that is exact enough, of 2. */
INLINE float base_of(const enum wkv_precision precision) { return precision == WKV_IN_FLOAT32 ? 1 : 1.44269504f; }

/* Frames whose weights fill the lanes of a vector: lane i holds those of frames i, i + W, ... of them. */
INLINE int64_t per_vector(const enum wkv_precision precision) { return per_lane(precision) * W; }

/* A packed head. Both matrices stand in panels of PANEL columns, lane after lane. Of the last of the keys
 * only what is padded is there: from the length on, up to a multiple of per_vector, all is 0 and the bias -inf. */
struct head {
  int64_t audio, number;         /* of this head in its audio */
  int64_t length, padded;        /* frames in use */
  int64_t lanes, channels;       /* lanes of a query; channels: head_dim, padded */
  uint32_t *keys;                /* [panels of frames, lanes, PANEL] */
  uint32_t *values;              /* [panels of channels, padded / per_lane, PANEL] */
  float *bias;                   /* [padded] */
  /* of bytes */
  float *key_units, *value_units; /* [padded] and [channels]: what one of their codes is worth */
  uint32_t *starts;              /* [padded]: where sums of products start, so that MIDDLE drops out */
};

INLINE struct head packed_head(const enum wkv_precision precision, const struct wkv_encoder_attention *const a,
                               const int64_t item) {
  const int64_t audio = (a->first_head + item) / a->heads;
  const int64_t length = a->lengths ? a->lengths[audio] : a->frames;
  struct head h = {.audio = audio,
                   .number = (a->first_head + item) % a->heads,
                   .length = length,
                   .padded = wkv_round_up(length, per_vector(precision)),
                   .lanes = wkv_count_of(a->head_dim, per_lane(precision)),
                   .channels = wkv_round_up(a->head_dim, PANEL)};
  h.keys = a->packed + item * wkv_encoder_packed(a);
  h.values = h.keys + wkv_round_up(h.padded, PANEL) * h.lanes;
  h.bias = (float *)(h.values + h.padded / per_lane(precision) * h.channels);
  h.key_units = h.bias + h.padded;
  h.starts = (uint32_t *)(h.key_units + h.padded);
  h.value_units = h.key_units + 2 * h.padded;
  return h;
}

/* sum + the products of two lanes. Bytes of a are unsigned; their sums are whole numbers in the place of floats. */
INLINE vf multiply_lanes(const enum wkv_precision precision, const vu a, const vu b, const vf sum) {
  switch (precision) {
    case WKV_IN_FLOAT32: return multiply_add((vf)a, (vf)b, sum);
    case WKV_IN_BFLOAT16: return multiply_bfloat16(a, b, sum);
    default: return (vf)multiply_bytes((vi)a, (vi)b, (vu)sum);
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

/* What one code is worth if the largest of n numbers is to be 127; NaN if one of them is not finite. */
INLINE float unit_of(const float *const x, const int64_t n) {
  vf top = {0}, spoilt = {0};
  for (int64_t i = 0; i < n; i += W) {
    const vf some = load_in_order(WKV_FLOAT32, x + i, least(W, n - i));
    top = larger(larger(some, -some), top);
    spoilt = multiply_add(some, splat(0), spoilt);
  }
  return largest_of(top) * (1.0f / 127) + sum_of(spoilt);
}

INLINE float inverse_of(const float unit) { return unit > 0 ? 1 / unit : 0; }

/* The nearest whole number in the low byte, beside bits that are always the same. */
INLINE vu nearest(const vf x) { return (vu)(x + 0x1.8p23f); }

/* The first n <= per_vector numbers at x in W lanes, then zeros. Bytes are x * inverse + middle. */
INLINE vu fill_lanes(const enum wkv_precision precision, const float *const x, const int64_t n, const float inverse,
                     const uint8_t middle) {
  if (precision == WKV_IN_FLOAT32) return (vu)load_in_order(WKV_FLOAT32, x, n);
  vu lanes = {0};
  for (int64_t i = 0; i < n; i += W) {
    const vf some = load_in_order(WKV_FLOAT32, x + i, least(W, n - i));
    if (precision == WKV_IN_BFLOAT16) {
      store_in_order(WKV_BFLOAT16, (uint16_t *)&lanes + i, some, W);
    } else {
      const vb codes = __builtin_convertvector(nearest(some * inverse) + middle, vb);
      memcpy((uint8_t *)&lanes + i, &codes, sizeof codes);
    }
  }
  return lanes;
}

#endif
