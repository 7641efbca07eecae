/* Cross-attention over a packed cache: what is done to codes, whichever instructions then multiply them. Queries and
 * exponentials become codes too, and the products of codes are exact. */
#ifndef WHISPERKV_CROSS_CODES_H
#define WHISPERKV_CROSS_CODES_H
#include "../packed.h"
#include "cross.h"

/* Codes are multiplied less this, which is added back exactly, so that rounding errors of queries and weights meet
 * small numbers. */
INLINE int middle(const int bits) { return 1 << (bits - 1); }

/* x / step as signed bytes, step such that the largest becomes 127; returns step and the sum of the codes. */
INLINE float round_bytes(const float *const x, const int64_t n, int8_t *const codes, int32_t *const sum) {
  vf top = {0};
  for (int64_t i = 0; i < n; i += W) top = larger(larger(load(x + i), -load(x + i)), top);
  const float step = largest_of(top) * (1.0f / 127);
  const vf inverse = splat(step > 0 ? 1 / step : 0);
  vi total = {0};
  for (int64_t i = 0; i < n; i += W) {
    const vf scaled = smaller(larger(load(x + i) * inverse, splat(-127)), splat(127)); /* NaN: -127 */
    const float round = 0x1.8p23f; /* added it leaves the nearest integer in the low bits */
    const vi code = (vi)(scaled + round) - (vi)splat(round);
    const vb bytes = __builtin_convertvector(code, vb);
    memcpy(codes + i, &bytes, sizeof bytes);
    total += code;
  }
  int32_t all = total[0];
  for (int i = 1; i < W; i++) all += total[i];
  *sum = all;
  return step;
}

/* logit = offset + unit * (products of the codes - middles) */
struct line {
  float offset, unit;
  int32_t middles;
};

/* Folds the steps of the keys into a query, and rounds it. */
INLINE struct line fold_query(const int bits, const struct work *const w, const int64_t query, const float *const step,
                              const float *const low) {
  const float *const x = w->query + query * w->channels;
  vf offset = {0};
  for (int64_t d = 0; d < w->channels; d += W) {
    const vf q = load(x + d), s = load(step + d);
    offset = multiply_add(q, multiply_add(s, splat((float)middle(bits)), load(low + d)), offset);
    store(w->folded + d, q * s);
  }
  int32_t sum;
  const float unit = round_bytes(w->folded, w->channels, (int8_t *)(w->query_codes + query * w->channels / 4), &sum);
  return (struct line){sum_of(offset), unit, sum * middle(bits)};
}

/* The weights of a block are its exponentials; of frames that it lacks they are 0. */
INLINE struct line round_weights(const int bits, const struct work *const w, const int64_t query,
                                 const int64_t frames) {
  const int64_t padded = wkv_round_up(frames, WKV_TILE);
  int8_t *const codes = (int8_t *)(w->weight_codes + query * WKV_BLOCK / 4);
  int32_t sum;
  const float unit = round_bytes(w->exponentials + query * WKV_BLOCK, padded, codes, &sum);
  if (padded < WKV_BLOCK) memset(codes + padded, 0, (size_t)(WKV_BLOCK - padded));
  return (struct line){w->added[query], unit, sum * middle(bits)};
}

/* A quad of channels, or two of 4 bits, and as many frames as there are lanes. */
INLINE vi load_quad(const int bits, const uint8_t *const codes, const int64_t quad) {
  vi x;
  memcpy(&x, codes + wkv_bytes_of_channels(bits, 4 * quad), sizeof x);
  return x;
}

/* The two quads of 4 bits. */
INLINE vi low_halves(const vi x) { return x & 0x0f0f0f0f; }
INLINE vi high_halves(const vi x) { return (vi)((vu)x >> 4) & 0x0f0f0f0f; }

/* The products alone may be beyond 32 bits, with many channels; less their middles they are not. */
INLINE void store_logits(const struct work *const w, const int64_t query, const int64_t place, const struct line line,
                         const vu products) {
  const vf centred = __builtin_convertvector((vi)(products - (uint32_t)line.middles), vf);
  store(w->logits + query * WKV_BLOCK + place, multiply_add(centred, splat(line.unit), splat(line.offset)));
}

/* sums = shrink * sums + weights * values for W channels, of the products of their codes. */
INLINE void add_products(const int bits, const struct work *const w, const int64_t query, const int64_t first,
                         const int64_t channel, const struct line line, const vf products) {
  const float *const step = w->value_scales + wkv_place_of_steps(w->channels, first / w->a->group) + channel;
  float *const sums = w->sums[query] + channel;
  const vf s = load(step), base = multiply_add(s, splat((float)middle(bits)), load(step + w->channels));
  const vf scaled = (products - (float)line.middles) * line.unit;
  store(sums, multiply_add(scaled, s, multiply_add(base, splat(line.offset), load(sums) * w->shrink[query])));
}

#endif
