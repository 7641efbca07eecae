/* The steps of a softmax over floats in memory. */
#ifndef WHISPERKV_SOFTMAX_H
#define WHISPERKV_SOFTMAX_H
#include <float.h>
#include <math.h>

#include "simd.h"

INLINE float largest(const float *const x, const int64_t n, const float floor) {
  vf top = splat(floor);
  for (int64_t s = 0; s < n; s += W) top = larger(load(x + s), top);
  return largest_of(top);
}

/* x = exp(x - top); returns the sum. */
INLINE float exponentiate(float *const x, const int64_t slots, const float top) {
  vf sum = {0};
  for (int64_t s = 0; s < slots; s += W) {
    const vf e = exponential(load(x + s) - top);
    store(x + s, e);
    sum += e;
  }
  return sum_of(sum);
}

INLINE void add(float *restrict const x, const float *restrict const more, const int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] += more[i];
}

INLINE void multiply(float *const x, const int64_t n, const float factor) {
  for (int64_t i = 0; i < n; i++) x[i] *= factor;
}

#endif
