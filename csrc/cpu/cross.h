/* What the ways to attend over a block of frames share. */
#ifndef WHISPERKV_CROSS_H
#define WHISPERKV_CROSS_H
#include <stdbool.h>

#include "softmax.h"

enum { NARROW = 64 }; /* channels of a head of every Whisper */

/* What products of codes are worth: offset + unit * (products - those of the middles, which have this sum). */
struct line {
  float offset, unit;
  int32_t sum;
};

/* A block of channels of mixed bits: how many, and where it begins in a tile. */
struct place {
  int64_t bits, byte;
};

/* One part, head and range of frames being worked on. Queries are those of the part, counted from 0. */
struct work {
  const struct wkv_cross_attention *a;
  int64_t queries, length;          /* length: frames of the audio */
  int64_t head_dim, channels;       /* channels: head_dim, padded */
  const void *keys, *values;        /* of this head of this audio */
  const float *bias;                /* [frames] of the audio; NULL if there is none */
  float *query;                     /* [queries, channels], scaled */
  float *logits, *exponentials;     /* [queries, WKV_BLOCK] of a block: the ones become the others, in their place */
  float *sums[WKV_TOGETHER];        /* of each query: [channels] */
  float *totals[WKV_TOGETHER];      /* of each query: largest logit, sum of exponentials */
  float *kept_logits[WKV_TOGETHER]; /* of each query: [frames], to be made weights in the end; NULL if not wanted */
  float shrink[WKV_TOGETHER];       /* what the sums so far weigh beside this block */
  float added[WKV_TOGETHER];        /* the block's sum of exponentials */
  /* of a cache in bfloat16, where there are instructions to multiply it: then there is no query */
  uint16_t *rounded_query;        /* [queries, channels]; it was in bfloat16 before */
  uint32_t *rounded_exponentials; /* [queries, WKV_BLOCK / 2], two frames in each */
  /* of a packed cache */
  const float *key_scales, *value_scales;
  float *middles; /* [channels]: half of how many codes there are. They are multiplied less it, which is added
                   * back exactly, so that rounding errors of queries and weights meet small numbers */
  struct line lines[WKV_TOGETHER]; /* of the queries, in the group that the block is of */
  float *folded;                   /* [channels]: a query times the steps of the keys */
  int32_t *query_codes;            /* [queries, channels / 4], four channels in each */
  int32_t *weight_codes;           /* [queries, WKV_BLOCK / 4], four frames in each, then zeros */
  int32_t *weight_lanes;           /* [queries, WKV_BLOCK / 4, 4], each of these four times over */
  int64_t tile_bytes;              /* from one tile to the next */
  struct place *places;            /* of mixed bits: of each block of channels */
  /* of the block of frames, if the cache is packed */
  const uint8_t *key_codes, *value_codes;
  const float *key_steps, *value_steps; /* [2, channels]: steps, leasts */
};

/* Logits of a block become exponentials; the sums so far are to shrink whenever it holds a larger one. */
INLINE void soften(struct work *const w, const int64_t query, const int64_t first, const int64_t frames) {
  float *const logits = w->logits + query * WKV_BLOCK, *const totals = w->totals[query];
  const int64_t padded = wkv_round_up(frames, WKV_TILE);
  if (w->bias) add(logits, w->bias + first, frames);
  if (w->kept_logits[query]) memcpy(w->kept_logits[query] + first, logits, (size_t)frames * sizeof *logits);
  for (int64_t f = frames; f < padded; f++) logits[f] = -INFINITY;
  const float top = largest(logits, padded, totals[0]);
  w->shrink[query] = exponential(splat(totals[0] - top))[0];
  w->added[query] = exponentiate(logits, padded, top);
  totals[0] = top;
  totals[1] = totals[1] * w->shrink[query] + w->added[query];
}

/* How many of the queries that are left go together: all if they are few, else the usual number. */
INLINE int64_t together(const int64_t left, const int most, const int usual) { return left <= most ? left : usual; }

/* function(count, ...), with a count that the compiler knows. */
#define COUNT_CASE(count, most, function, ...) \
  case count: \
    if (count <= most) function(count, __VA_ARGS__); \
    break;
#define FOR_COUNT(count, most, function, ...) \
  switch (count) { \
    COUNT_CASE(1, most, function, __VA_ARGS__) \
    COUNT_CASE(2, most, function, __VA_ARGS__) \
    COUNT_CASE(3, most, function, __VA_ARGS__) \
    COUNT_CASE(4, most, function, __VA_ARGS__) \
    COUNT_CASE(5, most, function, __VA_ARGS__) \
    COUNT_CASE(6, most, function, __VA_ARGS__) \
    COUNT_CASE(7, most, function, __VA_ARGS__) \
    COUNT_CASE(8, most, function, __VA_ARGS__) \
  }

#endif
