/* A block of cross-attention over a cache of floats. */
#ifndef WHISPERKV_CROSS_FLOATS_H
#define WHISPERKV_CROSS_FLOATS_H
#include "cross.h"

enum {
  SOME = W > 4 ? W / 4 : 1, /* queries that share a load of the cache; with W / SOME frames they fill W sums */
  ROWS = W / SOME,
  MOST = W > 8 ? 6 : SOME, /* queries that share a load of the values, if no more are left */
  PAIRS = 2,               /* pairs of vectors of channels whose sums stay in registers */
  AHEAD = 16384            /* bytes */
};

/* Asks for what comes so much later: processors foresee steady reads alone, and here they stop and go. It pays only for
 * a cache that comes from memory. */
INLINE void fetch_ahead(const bool is_far, const void *const p, const int64_t bytes) {
  for (int64_t b = 0; is_far && b < bytes; b += 64) __builtin_prefetch((const void *)((uintptr_t)p + AHEAD + b), 0, 2);
}

/* Whether the products of queries and keys, and of exponentials and values, are left to instructions for bfloat16.
 * Then both are rounded to it. */
INLINE bool in_bfloat16(const enum wkv_dtype dtype) { return MULTIPLIES_BFLOAT16 && dtype == WKV_BFLOAT16; }

/* A query as its cache wants it. */
INLINE void load_query(const enum wkv_dtype dtype, const bool packed, const void *const from, const int64_t head_dim,
                       const float scale, const struct work *const w, const int64_t query) {
  for (int64_t d = 0; d < w->channels; d += PAIR) {
    const int64_t n = least(PAIR, head_dim - d), place = query * w->channels + d;
    struct pair x = {0};
    if (n > 0 && !packed) x = load_some(dtype, at(dtype, from, d), n);
    if (n > 0 && packed) x.a = load_in_order(dtype, at(dtype, from, d), least(n, W));
    if (n > W && packed) x.b = load_in_order(dtype, at(dtype, from, d + W), n - W);
    x = (struct pair){x.a * scale, x.b * scale};
    if (in_bfloat16(dtype) && !packed) {
      store_full(dtype, w->rounded_query + place, x);
    } else {
      store(w->query + place, x.a);
      store(w->query + place + W, x.b);
    }
  }
}

/* The first n <= PAIR numbers at p as they are, two to a lane, then zeros. */
INLINE vu load_raw(const void *const p, const int64_t n) {
  vu x = {0};
  memcpy(&x, p, n == PAIR ? sizeof x : (size_t)n * 2);
  return x;
}

/* sums[i][r] += query i . row r, over n <= PAIR channels from d on; `sums` has room for `rows` of each query. Queries
 * are rounded ones or floats, as the dtype wants them. */
INLINE void multiply_rows(const enum wkv_dtype dtype, vf *const sums, const int rows, const void *const queries,
                          const int64_t stride, const int some, const void *const *const row, const int count,
                          const int64_t d, const int64_t n) {
  if (in_bfloat16(dtype)) {
    vu key[ROWS];
    for (int r = 0; r < count; r++) key[r] = load_raw(at(dtype, row[r], d), n);
    for (int i = 0; i < some; i++) {
      const vu x = load_raw((const uint16_t *)queries + i * stride + d, PAIR);
      for (int r = 0; r < count; r++) sums[i * rows + r] = multiply_bfloat16(key[r], x, sums[i * rows + r]);
    }
    return;
  }
  struct pair key[ROWS];
  for (int r = 0; r < count; r++) key[r] = load_some(dtype, at(dtype, row[r], d), n);
  for (int i = 0; i < some; i++) {
    const float *const query = queries;
    const vf a = load(query + i * stride + d), b = load(query + i * stride + d + W);
    for (int r = 0; r < count; r++)
      sums[i * rows + r] = multiply_add(b, key[r].b, multiply_add(a, key[r].a, sums[i * rows + r]));
  }
}

/* The logits of `some` queries with W / some frames. Frames past the end are taken for the last one. Narrow rows are
 * read one after the other, as the prefetchers of processors expect; of wide ones, several share a load of a query. */
INLINE void score_some(const enum wkv_dtype dtype, const bool is_narrow, const bool is_far, const struct work *const w,
                       const int64_t query, const int some, const int64_t frame, const int64_t frames,
                       const int64_t place, const bool at_the_end) {
  const int64_t head_dim = w->head_dim;
  const int rows = W / some, count = some == 1 || is_narrow ? 1 : rows;
  const void *const queries = in_bfloat16(dtype) ? (const void *)(w->rounded_query + query * w->channels)
                                                 : w->query + query * w->channels;
  vf sums[W];
  for (int i = 0; i < W; i++) sums[i] = (vf){0};
#pragma GCC unroll 16
  for (int from = 0; from < rows; from += count) {
    if (is_narrow) __asm__ volatile("" ::: "memory"); /* or the compiler would read many rows at once */
    const void *row[ROWS];
    for (int r = 0; r < count; r++)
      row[r] = at(dtype, w->keys, (frame + (at_the_end ? least(from + r, frames - 1) : from + r)) * head_dim);
    int64_t d = 0;
    for (; d + PAIR <= head_dim; d += PAIR) {
      for (int r = 0; r < count; r++) fetch_ahead(is_far, at(dtype, row[r], d), PAIR * size_of(dtype));
      multiply_rows(dtype, sums + from, rows, queries, w->channels, some, row, count, d, PAIR);
    }
    if (d < head_dim) multiply_rows(dtype, sums + from, rows, queries, w->channels, some, row, count, d, head_dim - d);
  }
  const vf logits = sum_each(sums);
  for (int i = 0; i < some; i++)
    memcpy(w->logits + (query + i) * WKV_BLOCK + place, (const float *)&logits + i * rows,
           (size_t)rows * sizeof(float));
}

INLINE void score_floats(const enum wkv_dtype dtype, const bool is_narrow, const bool is_far,
                         const struct work *const w, const int64_t first, const int64_t frames) {
  for (int64_t f = 0; f < frames; f += W) {
    const int64_t left = frames - f;
    int64_t query = 0;
    for (; query + SOME <= w->queries && SOME > 1; query += SOME)
      for (int64_t r = 0; r < W && r < left; r += ROWS)
        if (left - r >= ROWS)
          score_some(dtype, is_narrow, is_far, w, query, SOME, first + f + r, left - r, f + r, false);
        else score_some(dtype, is_narrow, is_far, w, query, SOME, first + f + r, left - r, f + r, true);
    for (; query < w->queries; query++)
      if (left >= W) score_some(dtype, is_narrow, is_far, w, query, 1, first + f, left, f, false);
      else score_some(dtype, is_narrow, is_far, w, query, 1, first + f, left, f, true);
  }
}

/* sums = shrink * sums + exponentials * values, for `some` queries and 2 * pairs vectors of channels. */
INLINE void mix_some(const int some, const enum wkv_dtype dtype, const bool is_far, const struct work *const w,
                     const int64_t query, const int64_t first, const int64_t frames, const int64_t channel,
                     const int pairs, const int64_t n) {
  const int64_t head_dim = w->head_dim;
  vf sums[MOST][2 * PAIRS];
  for (int i = 0; i < some; i++)
    for (int p = 0; p < 2 * pairs; p++) sums[i][p] = load(w->sums[query + i] + channel + p * W) * w->shrink[query + i];
  if (in_bfloat16(dtype)) {
    for (int64_t f = 0; f < frames; f += 2) {
      const void *const row = at(dtype, w->values, (first + f) * head_dim + channel);
      const void *const next = at(dtype, row, f + 1 < frames ? head_dim : 0); /* the last may be alone: weight 0 */
      fetch_ahead(is_far, row, pairs * PAIR * size_of(dtype));
      fetch_ahead(is_far, next, pairs * PAIR * size_of(dtype));
      vu even[PAIRS], odd[PAIRS]; /* channels, of both rows */
      for (int p = 0; p < pairs; p++) {
        const int64_t m = pairs == 1 ? n : PAIR;
        const vu x = load_raw(at(dtype, row, p * PAIR), m), y = load_raw(at(dtype, next, p * PAIR), m);
        even[p] = (x & 0xffff) | y << 16;
        odd[p] = x >> 16 | (y & 0xffff0000);
      }
      for (int i = 0; i < some; i++) {
        const vu weight = (vu){0} + w->rounded_exponentials[((query + i) * WKV_BLOCK + f) / 2];
        for (int p = 0; p < pairs; p++) {
          sums[i][2 * p] = multiply_bfloat16(even[p], weight, sums[i][2 * p]);
          sums[i][2 * p + 1] = multiply_bfloat16(odd[p], weight, sums[i][2 * p + 1]);
        }
      }
    }
  } else {
    for (int64_t f = 0; f < frames; f++) {
      const void *const row = at(dtype, w->values, (first + f) * head_dim + channel);
      fetch_ahead(is_far, row, pairs * PAIR * size_of(dtype));
      struct pair value[PAIRS];
      for (int p = 0; p < pairs; p++) value[p] = load_some(dtype, at(dtype, row, p * PAIR), pairs == 1 ? n : PAIR);
      for (int i = 0; i < some; i++) {
        const vf weight = splat(w->exponentials[(query + i) * WKV_BLOCK + f]);
        for (int p = 0; p < pairs; p++) {
          sums[i][2 * p] = multiply_add(weight, value[p].a, sums[i][2 * p]);
          sums[i][2 * p + 1] = multiply_add(weight, value[p].b, sums[i][2 * p + 1]);
        }
      }
    }
  }
  for (int i = 0; i < some; i++)
    for (int p = 0; p < 2 * pairs; p++) store(w->sums[query + i] + channel + p * W, sums[i][p]);
}

INLINE void mix_channels(const enum wkv_dtype dtype, const bool is_far, const struct work *const w, const int64_t first,
                         const int64_t frames, const int64_t channel, const int pairs, const int64_t n) {
  for (int64_t query = 0, count; query < w->queries; query += count) {
    count = together(w->queries - query, MOST, SOME);
    FOR_COUNT(count, MOST, mix_some, dtype, is_far, w, query, first, frames, channel, pairs, n)
  }
}

INLINE void mix_floats(const enum wkv_dtype dtype, const bool is_far, const struct work *const w, const int64_t first,
                       const int64_t frames) {
  const int64_t head_dim = w->head_dim;
  if (in_bfloat16(dtype))
    for (int64_t q = 0; q < w->queries; q++)
      for (int64_t f = 0; f < frames; f += W)
        store_in_order(dtype, w->rounded_exponentials + (q * WKV_BLOCK + f) / 2,
                       load(w->exponentials + q * WKV_BLOCK + f), W);
  int64_t channel = 0;
  for (; channel + PAIRS * PAIR <= head_dim; channel += PAIRS * PAIR)
    mix_channels(dtype, is_far, w, first, frames, channel, PAIRS, PAIR);
  for (; channel < head_dim; channel += PAIR)
    mix_channels(dtype, is_far, w, first, frames, channel, 1, least(PAIR, head_dim - channel));
}

#endif
