/* Codes of 8 bits for the rows of a product: of x, and of a matrix. */
#ifndef WHISPERKV_LINEAR_CODES_H
#define WHISPERKV_LINEAR_CODES_H
#include <math.h>
#include <stdbool.h>

#include "simd.h"

enum { LARGEST_CODE = 127, UNIT = 4 };

/* The units that are entered again. */
struct repeats {
  int64_t unit[WKV_REPEATS];
  float step; /* what makes all numbers fit into their codes */
};

/* How often a unit is among the first so many. */
INLINE int times(const struct repeats *const repeats, const int count, const int64_t unit) {
  int found = 0;
  for (int e = 0; e < count; e++) found += repeats->unit[e] == unit;
  return found;
}

/* A code of any size as what it is in place `part` of the places that share it. */
INLINE int32_t part_of(int32_t code, const int part) {
  int32_t own = 0;
  for (int i = 0; i <= part; i++, code -= own)
    own = code > LARGEST_CODE ? LARGEST_CODE : code < -LARGEST_CODE ? -LARGEST_CODE : code;
  return own;
}

/* To the nearest integer, ties to even, as long as it has no more than 22 bits. */
INLINE vi rounded(const vf number) {
  const float round = 0x1.8p23f;
  return (vi)((vu)(number + round) - (vu)splat(round));
}

/* ---- a row ---- */

/* The first of the largest of some sizes; places after the last are 0 up to a multiple of W. */
INLINE int64_t first_largest(const float *const sizes, const int64_t count) {
  vf most = splat(-1.0f);
  vi place = {0}, at = {0};
  for (int lane = 0; lane < W; lane++) at[lane] = lane;
  const vi first = at;
  for (int64_t i = 0; i < count; i += W, at += W) {
    const vf size = load(sizes + i);
    place = (vi)choose(size > most, (vu)at, (vu)place);
    most = (vf)choose(size > most, (vu)size, (vu)most);
  }
  int64_t found = first[0];
  float largest = -1;
  for (int lane = 0; lane < W; lane++)
    if (most[lane] > largest || (most[lane] == largest && place[lane] < found))
      found = place[lane], largest = most[lane];
  return found < count ? found : 0;
}

/* The sizes of a row's units; each unit that is entered again, so many times in all, is as much smaller. */
INLINE struct repeats repeat_largest(float *const sizes, const int64_t units, const int count) {
  struct repeats repeats;
  float whole[WKV_REPEATS];
  for (int64_t i = units; i % W; i++) sizes[i] = 0;
  for (int e = 0; e < count; e++) {
    const int64_t unit = first_largest(sizes, units);
    whole[e] = sizes[unit];
    for (int i = e - 1; i >= 0; i--)
      if (repeats.unit[i] == unit) whole[e] = whole[i];
    repeats.unit[e] = unit;
    sizes[unit] = whole[e] / (float)(times(&repeats, e + 1, unit) + 1);
  }
  repeats.step = sizes[first_largest(sizes, units)] / LARGEST_CODE;
  return repeats;
}

/* ---- a panel of a matrix ---- */

/* Of each output of a panel: the unit that holds up its step, its size, and the next size. */
struct limits {
  float first[WKV_PANEL], second[WKV_PANEL];
  int32_t unit[WKV_PANEL];
};

static void find_limits(const float *const sizes, const int64_t units, struct limits *const limits) {
  for (int i = 0; i < WKV_PANEL; i++) limits->first[i] = limits->second[i] = 0, limits->unit[i] = 0;
  for (int64_t unit = 0; unit < units; unit++)
    for (int i = 0; i < WKV_PANEL; i += W) {
      const vf size = load(sizes + unit * WKV_PANEL + i), first = load(limits->first + i);
      const vi is_first = size > first;
      vu own;
      memcpy(&own, limits->unit + i, sizeof own);
      own = choose(is_first, (vu){0} + (uint32_t)unit, own);
      memcpy(limits->unit + i, &own, sizeof own);
      store(limits->second + i, larger((vf)choose(is_first, (vu)first, (vu)size), load(limits->second + i)));
      store(limits->first + i, larger(size, first));
    }
}

/* By how much the steps of the outputs that a unit holds up become smaller, all together, if it is entered again. */
INLINE float gain_of(const struct limits *const limits, const int64_t unit, const int entered) {
  float gain = 0;
  for (int i = 0; i < WKV_PANEL; i++) {
    if (limits->unit[i] != unit || !(limits->first[i] > 0)) continue;
    const float own = limits->first[i] * (float)entered / (float)(entered + 1), next = limits->second[i];
    gain += 1 - (own > next ? own : next) / limits->first[i];
  }
  return gain;
}

/* The sizes of a panel's units, [units, WKV_PANEL]; those of units that are entered again, so many times in all, become
 * as much smaller. */
static struct repeats repeat_most_helpful(float *const sizes, const int64_t units, const int count) {
  struct repeats repeats;
  float whole[WKV_REPEATS][WKV_PANEL];
  struct limits limits;
  for (int e = 0; e < count; e++) {
    find_limits(sizes, units, &limits);
    float most = -1;
    for (int i = 0; i < WKV_PANEL; i++) {
      const int64_t unit = limits.unit[i];
      const float gain = gain_of(&limits, unit, times(&repeats, e, unit) + 1);
      if (gain > most) most = gain, repeats.unit[e] = unit;
    }
    const int64_t unit = repeats.unit[e];
    memcpy(whole[e], sizes + unit * WKV_PANEL, sizeof whole[e]);
    for (int i = e - 1; i >= 0; i--)
      if (repeats.unit[i] == unit) memcpy(whole[e], whole[i], sizeof whole[e]);
    const float entered = (float)(times(&repeats, e + 1, unit) + 1);
    for (int i = 0; i < WKV_PANEL; i++) sizes[unit * WKV_PANEL + i] = whole[e][i] / entered;
  }
  return repeats;
}

#endif
