/* Self-attention of an encoder's head: a block of queries takes the logits of all frames, which become weights in their
 * place, and then the values. Both products are those of one loop over packed panels. */
#include "frames_pack.h"
#include "isa.h"
#include "softmax.h"

enum {
  AT_A_TIME = 64 /* lanes of weights, and the values that they meet, which stay in the nearest cache */
};

/* A block of queries being worked on. */
struct block {
  const struct wkv_encoder_attention *a;
  struct head head;
  int64_t first, queries;
  int64_t stride;            /* of weights */
  uint32_t *query;           /* [WKV_QUERIES, lanes] */
  float *tops;               /* [WKV_QUERIES, W]: largest logits of every W-th frame */
  float *weights;            /* [WKV_QUERIES, stride]: logits at first, lanes of weights in the end */
  float *sums;               /* [WKV_QUERIES, channels] */
  float factor[WKV_QUERIES]; /* products to logits */
  float total[WKV_QUERIES];  /* sum of the weights */
};

INLINE void load_queries(const enum wkv_precision precision, struct block *const b) {
  const struct wkv_encoder_attention *const a = b->a;
  for (int64_t q = 0; q < wkv_round_up(b->queries, ROWS); q++) {
    const float *const query = channels_of(a, &a->query, &b->head, b->first + least(q, b->queries - 1));
    const float unit = precision == WKV_IN_BYTES ? unit_of(query, a->head_dim) : 1;
    b->factor[q] = a->scale * unit;
    uint32_t *const row = b->query + q * b->head.lanes;
    for (int64_t d = 0, k = 0; k < b->head.lanes; d += per_vector(precision), k += W) {
      const vu lanes = fill_lanes(precision, query + d, a->head_dim - d, inverse_of(unit), MIDDLE);
      memcpy(row + k, &lanes, sizeof lanes);
    }
    store(b->tops + q * W, splat(-INFINITY));
  }
}

/* The logits of ROWS queries with `vectors` of frames. */
INLINE void score(const enum wkv_precision precision, const int vectors, const struct block *const b,
                  const int64_t query, const int64_t frame) {
  const struct head *const h = &b->head;
  const bool is_bytes = precision == WKV_IN_BYTES;
  vf sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < vectors; v++) sums[r][v] = is_bytes ? load((const float *)h->starts + frame + v * W) : (vf){0};
  multiply_panel(precision, vectors, b->query + query * h->lanes, h->lanes, h->keys + frame * h->lanes, h->lanes, sums);
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++) {
    vf top = load(b->tops + (query + r) * W);
    for (int v = 0; v < vectors; v++) {
      vf x = sums[r][v];
      if (is_bytes) x = __builtin_convertvector((vi)x, vf) * load(h->key_units + frame + v * W);
      x = multiply_add(x, splat(b->factor[query + r]), load(h->bias + frame + v * W));
      store(b->weights + (query + r) * b->stride + frame + v * W, x);
      top = larger(x, top);
    }
    store(b->tops + (query + r) * W, top);
  }
}

INLINE void score_all(const enum wkv_precision precision, const struct block *const b) {
  for (int64_t frame = 0; frame < b->head.padded; frame += PANEL)
    for (int64_t query = 0; query < b->queries; query += ROWS) switch (least(PANEL, b->head.padded - frame) / W) {
        case 1: score(precision, 1, b, query, frame); break;
        case 2: score(precision, 2, b, query, frame); break;
        case 3: score(precision, VECTORS > 2 ? 3 : 2, b, query, frame); break;
        default: score(precision, VECTORS, b, query, frame);
      }
}

/* e^(x - top) * 2^more to 1e-4, as two factors; nothing smaller than 2^-126. NaN stays NaN. */
struct power {
  vf fraction, whole;
};

INLINE struct power power(const vf x, const float top, const float more) {
  const float log_of_e = 1.44269504f;
  const vf y = larger(splat(-126), multiply_add(x - top, splat(log_of_e), splat(more)));
  const vf shifted = y + 0x1.8p23f, r = y - (shifted - 0x1.8p23f);
  vf p = multiply_add(r, splat(0.05550411f), splat(0.24022651f));
  p = multiply_add(multiply_add(p, r, splat(0.69314718f)), r, splat(1));
  return (struct power){p, (vf)(((vu)shifted + 127) << 23)};
}

/* Logits become weights, two to a lane. Returns their sum. */
INLINE float soften_bfloat16(const struct block *const b, const int64_t query, const float top) {
  float *const logits = b->weights + query * b->stride;
  vf sum = {0};
  for (int64_t f = 0, k = 0; f < b->head.padded; f += 2 * W, k += W) {
    vu lanes = {0};
    for (int j = 0; j < 2; j++) {
      const struct power w = power(load(logits + f + j * W), top, 0);
      const vf weight = w.fraction * w.whole;
      const vu rounded = (vu)weight + 0x8000;
      sum += weight;
      lanes |= j ? rounded & 0xffff0000 : rounded >> 16;
    }
    memcpy(logits + k, &lanes, sizeof lanes);
  }
  return sum_of(sum);
}

/* Four to a lane, the largest 254, so that there is room for what is left over. A code is the one nearest to the weight
 * and what rounding left over of the frame before, so that many small weights are not lost. */
INLINE float soften_bytes(const struct block *const b, const int64_t query, const float top) {
  float *const logits = b->weights + query * b->stride;
  const float log_of_largest = 7.98868469f; /* to the base of 2 */
  vf left[4] = {{0}, {0}, {0}, {0}};
  vu sum = {0};
  for (int64_t f = 0, k = 0; f < b->head.padded; f += 4 * W, k += W) {
    vu lanes = (vu){0} - ((vu)splat(0x1.8p23f)) * 0x01010101u;
    for (int j = 0; j < 4; j++) {
      const struct power w = power(load(logits + f + j * W), top, log_of_largest);
      const vf wanted = multiply_add(w.fraction, w.whole, left[j]), shifted = wanted + 0x1.8p23f;
      left[j] = wanted - (shifted - 0x1.8p23f);
      lanes += (vu)shifted << 8 * j;
    }
    sum = multiply_bytes((vi)lanes, (vi){0} + 0x01010101, sum);
    memcpy(logits + k, &lanes, sizeof lanes);
  }
  const vf spoilt = (left[0] + left[1] + left[2] + left[3]) * 0;
  return sum_of(__builtin_convertvector((vi)sum, vf) + spoilt);
}

INLINE float soften(const enum wkv_precision precision, const struct block *const b, const int64_t query) {
  const float top = largest_of(load(b->tops + query * W));
  switch (precision) {
    case WKV_IN_FLOAT32: return exponentiate(b->weights + query * b->stride, b->head.padded, top);
    case WKV_IN_BFLOAT16: return soften_bfloat16(b, query, top);
    default: return soften_bytes(b, query, top);
  }
}

/* sums = weights * values, for ROWS queries and a panel of channels. */
INLINE void mix(const enum wkv_precision precision, const int vectors, const struct block *const b, const int64_t query,
                const int64_t channel, const int64_t first, const int64_t lanes) {
  vf sums[ROWS][VECTORS];
  float *const kept = b->sums + query * b->head.channels + channel;
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < vectors; v++) sums[r][v] = first ? load(kept + r * b->head.channels + v * W) : (vf){0};
  const int64_t all = b->head.padded / per_lane(precision);
  multiply_panel(precision, vectors, (const uint32_t *)b->weights + query * b->stride + first, b->stride,
                 b->head.values + channel * all + first * PANEL, lanes, sums);
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < vectors; v++) store(kept + r * b->head.channels + v * W, sums[r][v]);
}

INLINE void mix_all(const enum wkv_precision precision, const struct block *const b) {
  const int64_t all = b->head.padded / per_lane(precision);
  for (int64_t channel = 0; channel < b->head.channels; channel += PANEL)
    for (int64_t first = 0; first < all; first += AT_A_TIME)
      for (int64_t query = 0; query < b->queries; query += ROWS)
        mix(precision, VECTORS, b, query, channel, first, least(AT_A_TIME, all - first));
}

INLINE void store_outputs(const enum wkv_precision precision, const struct block *const b, float *output) {
  const struct wkv_encoder_attention *const a = b->a;
  for (int64_t q = 0; q < b->queries; q++, output += a->heads * a->head_dim)
    for (int64_t d = 0; d < a->head_dim; d += W) {
      vf x = load(b->sums + q * b->head.channels + d) / b->total[q];
      if (precision == WKV_IN_BYTES) {
        const vf sum = __builtin_convertvector((vi)load(b->sums + q * b->head.channels + d), vf);
        x = multiply_add(sum / b->total[q], load(b->head.value_units + d), load(b->head.value_middles + d));
      }
      store_in_order(WKV_FLOAT32, output + d, x, least(W, a->head_dim - d));
    }
}

INLINE void attend_block(const enum wkv_precision precision, const struct wkv_encoder_attention *const a,
                         uint32_t *const scratch, const int64_t item) {
  const int64_t blocks = wkv_count_of(a->frames, WKV_QUERIES);
  struct block b = {.a = a, .head = packed_head(precision, a, item / blocks), .first = item % blocks * WKV_QUERIES};
  b.queries = least(WKV_QUERIES, b.head.length - b.first);
  float *const output = a->output + ((b.head.audio * a->frames + b.first) * a->heads + b.head.number) * a->head_dim;
  const int64_t end = least(WKV_QUERIES, a->frames - b.first);
  for (int64_t q = b.queries > 0 ? b.queries : 0; q < end; q++)
    memset(output + q * a->heads * a->head_dim, 0, (size_t)a->head_dim * sizeof *output);
  if (b.queries <= 0) return;
  b.stride = b.head.padded + W; /* or rows would meet in the same places of a cache */
  b.query = scratch;
  b.tops = (float *)(b.query + WKV_QUERIES * b.head.lanes);
  b.weights = b.tops + WKV_QUERIES * W;
  b.sums = b.weights + WKV_QUERIES * b.stride;
  load_queries(precision, &b);
  score_all(precision, &b);
  for (int64_t q = 0; q < b.queries; q++) b.total[q] = soften(precision, &b, q);
  mix_all(precision, &b);
  store_outputs(precision, &b, output);
}

/* ---- for each precision ---- */

#define IN(precision) \
  static void pack_##precision(const struct wkv_encoder_attention *const a, const int64_t item) { \
    pack_head(WKV_IN_##precision, a, item); \
  } \
  static void attend_##precision(const struct wkv_encoder_attention *const a, void *const scratch, \
                                 const int64_t item) { \
    attend_block(WKV_IN_##precision, a, scratch, item); \
  }
IN(FLOAT32)
IN(BFLOAT16)
IN(BYTES)

typedef void pack_function(const struct wkv_encoder_attention *, int64_t item);
typedef void attend_function(const struct wkv_encoder_attention *, void *scratch, int64_t item);
static pack_function *const pack_in[WKV_PRECISIONS] = {pack_FLOAT32, pack_BFLOAT16, pack_BYTES};
static attend_function *const attend_in[WKV_PRECISIONS] = {attend_FLOAT32, attend_BFLOAT16, attend_BYTES};

void ON_ISA(wkv_encoder_pack)(const struct wkv_encoder_attention *const a, const int64_t begin, const int64_t end) {
  for (int64_t item = begin; item < end; item++) pack_in[a->precision](a, item);
}

void ON_ISA(wkv_encoder_attention)(const struct wkv_encoder_attention *const a, void *const scratch,
                                   const int64_t begin, const int64_t end) {
  for (int64_t item = begin; item < end; item++) attend_in[a->precision](a, scratch, item);
}
