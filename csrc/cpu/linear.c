/* Products of rows and matrices.
 *
 * A packed matrix is read panel by panel: every word of a row is multiplied with the words of 32 outputs. A matrix in
 * the model's own order is read where it is, output by output, which is as fast for the few rows of a decode step. */
#include <math.h>

#include "isa.h"
#include "linear.h"

/* ---- pack_matrix ---- */

INLINE float number_at(const enum wkv_dtype dtype, const void *const base, const int64_t index) {
  return load_in_order(dtype, at(dtype, base, index), 1)[0];
}

/* The largest size among a row's numbers; infinite if one is not a number. */
static float size_of_row(const enum wkv_dtype dtype, const void *const row, const int64_t inputs) {
  float most = 0;
  for (int64_t i = 0; i < inputs; i++) {
    const float size = fabsf(number_at(dtype, row, i));
    most = size <= most ? most : size == size ? size : INFINITY;
  }
  return most;
}

INLINE uint32_t code_of(const float x, const float per_step) { return (uint32_t)((int32_t)rintf(x * per_step) + 128); }

/* One word of a panel. */
INLINE uint32_t word_of(const struct wkv_matrix_packing *const p, const int64_t output, const int64_t unit,
                        const float per_step) {
  const int64_t size = wkv_unit(p->format);
  uint32_t word = 0;
  for (int64_t i = 0; i < size; i++) {
    const int64_t input = unit * size + i;
    const bool is_inside = output < p->outputs && input < p->inputs;
    const float x = is_inside ? number_at(p->dtype, p->weight, output * p->inputs + input) : 0;
    vf splatted = splat(x);
    switch (p->format) {
      case WKV_AS_FLOAT32: memcpy(&word, &x, sizeof word); break;
      case WKV_AS_BFLOAT16: word |= to_bfloat16(splatted)[0] >> 16 << 16 * i; break;
      default: word |= code_of(x, per_step) << 8 * i;
    }
  }
  return word;
}

/* A panel of float32 as the model has it: rows and columns change places, W of both at a time. */
static void transpose_panel(const struct wkv_matrix_packing *const p, const int64_t panel, uint32_t *const to) {
  const uint32_t *const from = (const uint32_t *)p->weight + panel * WKV_PANEL * p->inputs;
  const int64_t whole = p->inputs / W * W;
  for (int64_t unit = 0; unit < whole; unit += W)
    for (int64_t i = 0; i < WKV_PANEL; i += W) {
      vu x[W];
      for (int row = 0; row < W; row++) x[row] = load_words(from + (i + row) * p->inputs + unit);
      transpose(x);
      for (int u = 0; u < W; u++) memcpy(to + (unit + u) * WKV_PANEL + i, &x[u], sizeof x[u]);
    }
  for (int64_t unit = whole; unit < p->inputs; unit++)
    for (int64_t i = 0; i < WKV_PANEL; i++) to[unit * WKV_PANEL + i] = from[i * p->inputs + unit];
}

static void pack_panel(const struct wkv_matrix_packing *const p, const int64_t panel, uint32_t *const panel_words) {
  const int64_t units = wkv_count_of(p->inputs, wkv_unit(p->format));
  for (int64_t i = 0; i < WKV_PANEL; i++) {
    const int64_t output = panel * WKV_PANEL + i;
    uint32_t *const to = panel_words + i;
    float step = 0;
    if (p->format == WKV_AS_INT8) {
      if (output < p->outputs)
        step = size_of_row(p->dtype, at(p->dtype, p->weight, output * p->inputs), p->inputs) / 127;
      memcpy(to + units * WKV_PANEL, &step, sizeof step);
    }
    /* Numbers that are not finite spoil their output through the step, and their codes are 0. */
    const float per_step = step > 0 && step < INFINITY ? 1 / step : 0;
    const bool is_spoilt = p->format == WKV_AS_INT8 && !(step < INFINITY);
    for (int64_t unit = 0; unit < units; unit++)
      to[unit * WKV_PANEL] = is_spoilt ? 0x80808080 : word_of(p, output, unit, per_step);
  }
}

void ON_ISA(wkv_pack_matrix)(const struct wkv_matrix_packing *const p, const int64_t begin, const int64_t end) {
  for (int64_t panel = begin; panel < end; panel++) {
    uint32_t *const to = p->panels + panel * wkv_panel_words(p->format, p->inputs);
    const bool is_copy = p->format == WKV_AS_FLOAT32 && p->dtype == WKV_FLOAT32;
    if (is_copy && (panel + 1) * WKV_PANEL <= p->outputs) transpose_panel(p, panel, to);
    else pack_panel(p, panel, to);
  }
}

/* ---- make_ready ---- */

struct norm {
  float mean, by;
};

INLINE vf input_at(const struct wkv_rows *const r, const float *const x, const struct norm norm, const int64_t i,
                   const int64_t n) {
  const vf number = load_in_order(WKV_FLOAT32, x + i, n);
  if (!r->norm_weight) return number;
  const vf weight = load_in_order(WKV_FLOAT32, r->norm_weight + i, n);
  return multiply_add((number - norm.mean) * norm.by, weight, load_in_order(WKV_FLOAT32, r->norm_bias + i, n));
}

static struct norm norm_of(const struct wkv_rows *const r, const float *const x) {
  if (!r->norm_weight) return (struct norm){0, 1};
  const int64_t whole = r->inputs / W * W;
  vf sum = {0}, squares = {0};
  float rest = 0;
  for (int64_t i = 0; i < whole; i += W) sum += load(x + i);
  for (int64_t i = whole; i < r->inputs; i++) rest += x[i];
  const float mean = (sum_of(sum) + rest) / (float)r->inputs;
  rest = 0;
  for (int64_t i = 0; i < whole; i += W) squares = multiply_add(load(x + i) - mean, load(x + i) - mean, squares);
  for (int64_t i = whole; i < r->inputs; i++) rest += (x[i] - mean) * (x[i] - mean);
  return (struct norm){mean, 1 / sqrtf((sum_of(squares) + rest) / (float)r->inputs + r->epsilon)};
}

/* The low bytes of W lanes. */
INLINE void store_bytes(void *const to, const vi codes) {
#ifdef __AVX512F__
  _mm_storeu_si128(to, _mm512_cvtepi32_epi8((__m512i)codes));
#else
  const vb bytes = __builtin_convertvector((vu)codes & 255, vb);
  memcpy(to, &bytes, sizeof bytes);
#endif
}

struct extent {
  vf most, spoilt;
};

INLINE struct extent widen(const struct extent extent, const vf number) {
  const vf size = (vf)((vu)number & 0x7fffffff);
  return (struct extent){larger(size, extent.most), extent.spoilt + size * 0.0f}; /* NaN, if it is not finite */
}

INLINE vi round_some(const vf number, const float per_step, int8_t *const to) {
  const float round = 0x1.8p23f; /* added and taken away, to the nearest integer */
  const vi codes = (vi)((vu)(number * per_step + round) - (vu)splat(round));
  store_bytes(to, codes);
  return codes;
}

static void round_row(const struct wkv_rows *const r, const float *const x, const struct norm norm, int8_t *const to,
                      struct wkv_step *const step) {
  const int64_t whole = r->inputs / W * W, rest = r->inputs - whole;
  struct extent extent = {{0}, {0}};
  for (int64_t i = 0; i < whole; i += W) extent = widen(extent, input_at(r, x, norm, i, W));
  if (rest) extent = widen(extent, input_at(r, x, norm, whole, rest));
  const float largest = largest_of(extent.most), per_step = largest > 0 ? 127 / largest : 0;
  vu sum = {0};
  for (int64_t i = 0; i < whole; i += W) sum += (vu)round_some(input_at(r, x, norm, i, W), per_step, to + i);
  if (rest) sum += (vu)round_some(input_at(r, x, norm, whole, rest), per_step, to + whole);
  uint32_t total = 0; /* may wrap around where a number is not finite: its code is anything */
  for (int i = 0; i < W; i++) total += (uint32_t)sum[i];
  *step = (struct wkv_step){largest / 127 + sum_of(extent.spoilt), total * 128};
}

INLINE void convert_row(const struct wkv_rows *const r, const enum wkv_dtype dtype, const float *const x,
                        const struct norm norm, void *const to) {
  const int64_t whole = r->inputs / W * W, rest = r->inputs - whole;
  for (int64_t i = 0; i < whole; i += W) store_in_order(dtype, at_mut(dtype, to, i), input_at(r, x, norm, i, W), W);
  if (rest) store_in_order(dtype, at_mut(dtype, to, whole), input_at(r, x, norm, whole, rest), W);
}

void ON_ISA(wkv_make_ready)(const struct wkv_rows *const r, const int64_t begin, const int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const float *const x = r->x + row * r->stride;
    uint32_t *const ready = r->ready + row * r->ready_stride;
    const struct norm norm = norm_of(r, x);
    switch (r->format) {
      case WKV_AS_FLOAT32: convert_row(r, WKV_FLOAT32, x, norm, ready); break;
      case WKV_AS_BFLOAT16: convert_row(r, WKV_BFLOAT16, x, norm, ready); break;
      default: round_row(r, x, norm, (int8_t *)ready, &r->steps[row]);
    }
  }
}

/* ---- linear ---- */

/* Rows [row, last) and the outputs of a panel. */
INLINE void multiply_panel(const struct wkv_linear *const l, const enum wkv_format format, int64_t row,
                           const int64_t last, const int64_t panel) {
  for (; row + ABREAST <= last; row += ABREAST) panel_rows(l, format, ABREAST, row, panel);
  switch (last - row) {
#define CASE(n) case n: if (n < ABREAST) panel_rows(l, format, n, row, panel); break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11)
    default: break;
  }
}

INLINE void multiply_in_place(const struct wkv_linear *const l, int64_t row, const int64_t last, const int64_t panel) {
  const int64_t end = least((panel + 1) * WKV_PANEL, l->outputs);
  for (int64_t output = panel * WKV_PANEL; output < end; output += W) {
    for (int64_t r = row; r < last; r += ROWS_IN_PLACE)
      switch (last - r) {
        case 1: outputs_in_place(l, 1, r, output, r == row); break;
        case 2: outputs_in_place(l, 2, r, output, r == row); break;
        case 3: outputs_in_place(l, least(3, ROWS_IN_PLACE), r, output, r == row); break;
        case 4: outputs_in_place(l, least(4, ROWS_IN_PLACE), r, output, r == row); break;
        case 5: outputs_in_place(l, least(5, ROWS_IN_PLACE), r, output, r == row); break;
        default: outputs_in_place(l, ROWS_IN_PLACE, r, output, r == row);
      }
  }
}

void ON_ISA(wkv_linear)(const struct wkv_linear *const l, const int64_t begin, const int64_t end) {
  const int64_t panels = wkv_count_of(l->outputs, WKV_PANEL);
  for (int64_t item = begin; item < end; item++) {
    const int64_t row = item / panels * WKV_SWATH, last = least(row + WKV_SWATH, l->rows), panel = item % panels;
    if (!l->is_packed) multiply_in_place(l, row, last, panel);
    else if (l->format == WKV_AS_FLOAT32) multiply_panel(l, WKV_AS_FLOAT32, row, last, panel);
    else if (l->format == WKV_AS_BFLOAT16) multiply_panel(l, WKV_AS_BFLOAT16, row, last, panel);
    else multiply_panel(l, WKV_AS_INT8, row, last, panel);
  }
}
