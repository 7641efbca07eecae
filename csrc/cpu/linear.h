/* The innermost loops of a linear: some rows and some outputs, whose sums stay in registers. */
#ifndef WHISPERKV_LINEAR_H
#define WHISPERKV_LINEAR_H
#include <stdbool.h>

#include "simd.h"

/* Rows whose sums fit in the registers beside what they are made of: over two vectors of a panel, and over four
 * outputs in place. */
#if W == 16
enum { ABREAST = 12, ROWS_IN_PLACE = 6 };
#elif W == 8
enum { ABREAST = 6, ROWS_IN_PLACE = 2 };
#else
enum { ABREAST = 4, ROWS_IN_PLACE = 2 };
#endif
enum { TWO = 2, FOUR = 4, AHEAD = 4 };

/* ---- what becomes of a sum ---- */

/* erf(x) within 3e-7: a quotient of polynomials, that of Eigen and XLA. */
INLINE vf error_function(const vf number) {
  const vf x = smaller(larger(number, splat(-4.0f)), splat(4.0f)), square = x * x;
  vf p = splat(-2.72614225801306e-10f), q = splat(-1.45660718464996e-05f);
  p = multiply_add(p, square, splat(2.77068142495902e-08f));
  p = multiply_add(p, square, splat(-2.10102402082508e-06f));
  p = multiply_add(p, square, splat(-5.69250639462346e-05f));
  p = multiply_add(p, square, splat(-7.34990630326855e-04f));
  p = multiply_add(p, square, splat(-2.95459980854025e-03f));
  p = multiply_add(p, square, splat(-1.60960333262415e-02f));
  q = multiply_add(q, square, splat(-2.13374055278905e-04f));
  q = multiply_add(q, square, splat(-1.68282697438203e-03f));
  q = multiply_add(q, square, splat(-7.37332916720468e-03f));
  q = multiply_add(q, square, splat(-1.42647390514189e-02f));
  return x * p / q;
}

INLINE vf gelu(const vf x) {
  const vf half = x * 0.5f;
  return multiply_add(half, error_function(x * 0.70710678f), half);
}

/* n sums of each of some rows, W at most, apart so many vectors, from output on. */
INLINE void finish_rows(const struct wkv_linear *const l, const int rows, const int64_t row, const int64_t output,
                        const vf *sums, const int apart, const int64_t n) {
  const vf bias = l->bias ? load_in_order(WKV_FLOAT32, l->bias + output, n) : (vf){0};
  int64_t residual_row = l->residual ? row % l->residual_rows : 0;
  for (int r = 0; r < rows; r++, sums += apart) {
    vf x = *sums + bias;
    if (l->activation == WKV_GELU) x = gelu(x);
    if (l->residual) x += load_in_order(WKV_FLOAT32, l->residual + residual_row * l->outputs + output, n);
    residual_row = residual_row + 1 < l->residual_rows ? residual_row + 1 : 0;
    store_in_order(WKV_FLOAT32, l->output + (row + r) * l->output_stride + output, x, n);
  }
}

/* Apart, so that a whole vector is known to be one: else each of them is a call of memcpy(). */
static __attribute__((noinline)) void finish_whole(const struct wkv_linear *const l, const int rows, const int64_t row,
                                                   const int64_t output, const vf *const sums, const int apart) {
  finish_rows(l, rows, row, output, sums, apart, W);
}

static __attribute__((noinline)) void finish_some(const struct wkv_linear *const l, const int rows, const int64_t row,
                                                  const int64_t output, const vf *const sums, const int apart,
                                                  const int64_t n) {
  finish_rows(l, rows, row, output, sums, apart, n);
}

static void finish(const struct wkv_linear *const l, const int rows, const int64_t row, const int64_t output,
                   const vf *const sums, const int apart) {
  const int64_t n = l->outputs - output;
  if (n >= W) finish_whole(l, rows, row, output, sums, apart);
  else if (n > 0) finish_some(l, rows, row, output, sums, apart, n);
}

/* ---- a panel ---- */

INLINE vu load_words(const uint32_t *const p) {
  vu x;
  memcpy(&x, p, sizeof x);
  return x;
}

INLINE vu multiply_word(const enum wkv_format format, const vu weights, const uint32_t word, const vu sum) {
  const vu x = word - (vu){0};
  switch (format) {
    case WKV_AS_FLOAT32: return (vu)multiply_add((vf)weights, (vf)x, (vf)sum);
    case WKV_AS_BFLOAT16: return (vu)multiply_bfloat16(weights, x, (vf)sum);
    default: return multiply_bytes((vi)weights, (vi)x, sum);
  }
}

/* A row's sum of products of codes, as a number. */
INLINE vf number_of(const struct wkv_step step, const vu sum, const vf steps) {
  return __builtin_convertvector((vi)(sum - step.extra), vf) * (steps * step.step);
}

/* Each row's sums over two vectors of a panel. */
INLINE void multiply_rows(const enum wkv_format format, const int rows, const uint32_t *const x, const int64_t stride,
                          const uint32_t *weights, const int64_t units, vu kept[ABREAST][TWO]) {
  vu sums[ABREAST][TWO];
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = (vu){0};
  for (int64_t unit = 0; unit < units; unit++, weights += WKV_PANEL) {
    const vu a = load_words(weights), b = load_words(weights + W);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      const uint32_t word = x[r * stride + unit];
      sums[r][0] = multiply_word(format, a, word, sums[r][0]);
      sums[r][1] = multiply_word(format, b, word, sums[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++) kept[r][0] = sums[r][0], kept[r][1] = sums[r][1];
}

/* ---- what is entered again ---- */

/* Two vectors of a panel of fine codes. */
struct again {
  const uint32_t *panel, *codes; /* from the first lane on */
  uint32_t place[WKV_REPEATS];
};

INLINE struct again again_of(const uint32_t *const panel, const int64_t units, const int64_t column) {
  const uint32_t *const places = panel + units * WKV_PANEL;
  struct again again = {panel + column, places + WKV_PANEL + column, {0}};
  for (int e = 0; e < WKV_REPEATS; e++) {
    const uint32_t place = places[e];
    again.place[e] = place < units ? place : 0; /* whoever made the panel */
  }
  return again;
}

/* A word of x and signed codes of the panel: the former is made unsigned, and what that adds is taken away by adding
 * the offset of the codes. */
enum { SIGNS = (int32_t)0x80808080 };

INLINE vu multiply_signed(const uint32_t word, const vu codes, const vu sum) {
  return multiply_bytes((vi){0} + ((int32_t)word ^ SIGNS), (vi)codes, sum);
}

INLINE vu offset_of(const vu codes) { return -multiply_bytes((vi){0} + SIGNS, (vi)codes, (vu){0}); }

INLINE bool is_among(const uint32_t place, const uint32_t *const places) {
  bool found = false;
  for (int e = 0; e < WKV_REPEATS; e++) found |= place == places[e];
  return found;
}

/* What of a row's own units the panel enters again too. */
static __attribute__((noinline)) void multiply_shared(const uint32_t *const own, const struct again *const again,
                                                      vu sums[TWO]) {
  for (int q = 0; q < WKV_REPEATS; q++)
    for (int e = 0; e < WKV_REPEATS; e++)
      for (int v = 0; v < TWO && own[WKV_REPEATS + q] == again->place[e]; v++) {
        const vu codes = load_words(again->codes + e * WKV_PANEL + v * W);
        sums[v] = multiply_signed(own[q], codes, sums[v] + offset_of(codes));
      }
}

INLINE void multiply_again(const int rows, const uint32_t *const x, const int64_t stride, const int64_t units,
                           const struct again *const again, vu kept[ABREAST][TWO]) {
  vu codes[WKV_REPEATS][TWO], offset[TWO] = {{0}, {0}};
#pragma GCC unroll 4
  for (int e = 0; e < WKV_REPEATS; e++)
#pragma GCC unroll 2
    for (int v = 0; v < TWO; v++) {
      codes[e][v] = load_words(again->codes + e * WKV_PANEL + v * W);
      offset[v] += offset_of(codes[e][v]);
    }
  for (int r = 0; r < rows; r++) {
    const uint32_t *const row = x + r * stride, *const own = row + units;
    vu sums[TWO] = {kept[r][0] + offset[0], kept[r][1] + offset[1]};
    bool is_shared = false;
#pragma GCC unroll 4
    for (int e = 0; e < WKV_REPEATS; e++) {
      const uint32_t place = own[WKV_REPEATS + e], *const there = again->panel + place * WKV_PANEL;
      is_shared |= is_among(place, again->place);
#pragma GCC unroll 2
      for (int v = 0; v < TWO; v++) {
        sums[v] = multiply_signed(row[again->place[e]], codes[e][v], sums[v]);
        sums[v] = multiply_bytes((vi)load_words(there + v * W), (vi){0} + (int32_t)own[e], sums[v]);
      }
    }
    if (is_shared) multiply_shared(own, again, sums);
    kept[r][0] = sums[0], kept[r][1] = sums[1];
  }
}

INLINE void panel_rows(const struct wkv_linear *const l, const enum wkv_format format, const int rows,
                       const int64_t row, const int64_t panel) {
  const int64_t units = wkv_count_of(l->inputs, wkv_unit(format)), stride = l->ready_stride;
  const int64_t words_of_panel = wkv_panel_words(format, l->inputs);
  const uint32_t *const words = (const uint32_t *)l->weight + panel * words_of_panel;
  const uint32_t *const x = l->ready + row * stride;
  for (int64_t column = 0; column < WKV_PANEL; column += TWO * W) {
    vu kept[ABREAST][TWO];
    multiply_rows(format, rows, x, stride, words + column, units, kept);
    if (format == WKV_AS_FINE_INT8) {
      const struct again again = again_of(words, units, column);
      multiply_again(rows, x, stride, units, &again, kept);
    }
    for (int v = 0; v < TWO; v++) {
      const int64_t output = panel * WKV_PANEL + column + v * W;
      if (wkv_is_int8(format)) {
        const vf steps = (vf)load_words(words + words_of_panel - WKV_PANEL + column + v * W);
        for (int r = 0; r < rows; r++) kept[r][v] = (vu)number_of(l->steps[row + r], kept[r][v], steps);
      }
      finish(l, rows, row, output, (const vf *)&kept[0][v], TWO);
    }
  }
}

/* ---- a matrix in place ---- */

/* Sums of products of some rows with four outputs, in W lanes each. What comes next is asked for in the order in which
 * it lies in memory: four streams that end so soon are beyond what the machine foresees by itself. */
INLINE void multiply_outputs(const int rows, const float *const x, const int64_t stride, const float *const *const w,
                             const int64_t inputs, const bool is_first, vf kept[][W]) {
  const int64_t whole = inputs / W * W;
  vf sums[ROWS_IN_PLACE][FOUR];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int o = 0; o < FOUR; o++) sums[r][o] = (vf){0};
  for (int64_t k = 0; k < whole; k += W) {
    if (is_first)
#pragma GCC unroll 4
      for (int o = 0; o < FOUR; o++) __builtin_prefetch(w[0] + FOUR * (AHEAD * inputs + k) + o * W, 0, 2);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const vf number = load(x + r * stride + k);
#pragma GCC unroll 4
      for (int o = 0; o < FOUR; o++) sums[r][o] = multiply_add(load(w[o] + k), number, sums[r][o]);
    }
  }
  if (whole < inputs) {
    const int64_t n = inputs - whole;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const vf number = load_in_order(WKV_FLOAT32, x + r * stride + whole, n);
#pragma GCC unroll 4
      for (int o = 0; o < FOUR; o++)
        sums[r][o] = multiply_add(load_in_order(WKV_FLOAT32, w[o] + whole, n), number, sums[r][o]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int o = 0; o < FOUR; o++) kept[r][o] = sums[r][o];
}

/* W outputs, four at a time. */
INLINE void outputs_in_place(const struct wkv_linear *const l, const int rows, const int64_t row, const int64_t output,
                             const bool is_first) {
  const float *const x = (const float *)l->ready + row * l->ready_stride;
  vf kept[ROWS_IN_PLACE][W];
  for (int o = 0; o < W; o += FOUR) {
    const float *w[FOUR]; /* past the last output, that again: its sums are not kept */
    for (int i = 0; i < FOUR; i++) w[i] = (const float *)l->weight + least(output + o + i, l->outputs - 1) * l->inputs;
    multiply_outputs(rows, x, l->ready_stride, w, l->inputs, is_first, (vf(*)[W])(&kept[0][o]));
  }
  for (int r = 0; r < rows; r++) kept[r][0] = sum_each(kept[r]);
  finish(l, rows, row, output, &kept[0][0], W);
}

#endif
