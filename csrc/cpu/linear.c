/* Products of rows and matrices.
 *
 * A packed matrix is read panel by panel: every word of a row is multiplied with the words of 32 outputs. A matrix in
 * the model's own order is read where it is, output by output, which is as fast for the few rows of a decode step. */
#include <math.h>

#include "isa.h"
#include "linear.h"
#include "linear_codes.h"

/* ---- pack_matrix ---- */

/* The numbers of one unit of an output, and zeros. */
INLINE vf unit_at(const struct wkv_matrix_packing *const p, const int64_t output, const int64_t unit,
                  const int64_t size) {
  const int64_t input = unit * size, n = least(size, p->inputs - input);
  return output < p->outputs ? load_in_order(p->dtype, at(p->dtype, p->weight, output * p->inputs + input), n)
                             : (vf){0};
}

/* One word of a panel. */
INLINE uint32_t word_of(const struct wkv_matrix_packing *const p, const int64_t output, const int64_t unit) {
  const vf numbers = unit_at(p, output, unit, wkv_unit(p->format));
  if (p->format == WKV_AS_FLOAT32) return ((vu)numbers)[0];
  const vu halves = to_bfloat16(numbers);
  return halves[0] >> 16 | halves[1];
}

/* The sizes of an output's units, WKV_PANEL words apart; whether all of its numbers are finite: else they are zeros. */
static bool measure(const struct wkv_matrix_packing *const p, const int64_t output, const int64_t units,
                    float *const sizes) {
  bool is_finite = true;
  for (int64_t unit = 0; unit < units; unit++) {
    const vf numbers = unit_at(p, output, unit, UNIT);
    float most = 0;
    for (int i = 0; i < UNIT; i++) {
      const float size = fabsf(numbers[i]);
      is_finite &= size < INFINITY;
      most = size > most ? size : most;
    }
    sizes[unit * WKV_PANEL] = most;
  }
  for (int64_t unit = 0; unit < units && !is_finite; unit++) sizes[unit * WKV_PANEL] = 0;
  return is_finite;
}

/* Part so of the codes of one unit, one byte each. */
INLINE uint32_t codes_of(const vf numbers, const float per_step, const int part) {
  const vi codes = rounded(numbers * per_step);
  uint32_t word = 0;
  for (int i = 0; i < UNIT; i++) word |= (uint32_t)(uint8_t)part_of(codes[i], part) << 8 * i;
  return word;
}

INLINE uint32_t sum_of_bytes(const uint32_t word) {
  int32_t sum = 0;
  for (int i = 0; i < UNIT; i++) sum += (int8_t)(word >> 8 * i);
  return (uint32_t)sum;
}

/* The sizes first stand where the codes will. */
static void pack_codes(const struct wkv_matrix_packing *const p, const int64_t panel, uint32_t *const words) {
  const int64_t units = wkv_count_of(p->inputs, UNIT);
  const int count = p->format == WKV_AS_FINE_INT8 ? WKV_REPEATS : 0;
  float *const sizes = (float *)words, *const steps = sizes + wkv_panel_words(p->format, p->inputs) - WKV_PANEL;
  uint32_t *const places = words + units * WKV_PANEL, *const again = places + WKV_PANEL;
  bool is_finite[WKV_PANEL];
  for (int64_t i = 0; i < WKV_PANEL; i++) is_finite[i] = measure(p, panel * WKV_PANEL + i, units, sizes + i);
  const struct repeats repeats = repeat_most_helpful(sizes, units, count);
  for (int i = 0; i < WKV_PANEL; i++) {
    float most = 0;
    for (int64_t unit = 0; unit < units; unit++)
      most = sizes[unit * WKV_PANEL + i] > most ? sizes[unit * WKV_PANEL + i] : most;
    steps[i] = most / LARGEST_CODE;
  }
  for (int64_t i = 0; i < WKV_PANEL; i++) {
    /* Numbers that are not finite spoil their output through the step, and their codes are 0. */
    const float per_step = steps[i] > 0 ? 1 / steps[i] : 0;
    const int64_t output = is_finite[i] ? panel * WKV_PANEL + i : p->outputs;
    for (int64_t unit = 0; unit < units; unit++)
      words[unit * WKV_PANEL + i] = codes_of(unit_at(p, output, unit, UNIT), per_step, 0) ^ 0x80808080;
    for (int e = 0; e < count; e++) {
      const vf numbers = unit_at(p, output, repeats.unit[e], UNIT);
      again[e * WKV_PANEL + i] = codes_of(numbers, per_step, times(&repeats, e + 1, repeats.unit[e]));
    }
    if (!is_finite[i]) steps[i] = INFINITY;
  }
  for (int i = 0; i < WKV_PANEL && count; i++) places[i] = i < count ? (uint32_t)repeats.unit[i] : 0;
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

static void pack_panel(const struct wkv_matrix_packing *const p, const int64_t panel, uint32_t *const to) {
  const int64_t units = wkv_count_of(p->inputs, wkv_unit(p->format));
  for (int64_t i = 0; i < WKV_PANEL; i++)
    for (int64_t unit = 0; unit < units; unit++) to[unit * WKV_PANEL + i] = word_of(p, panel * WKV_PANEL + i, unit);
}

void ON_ISA(wkv_pack_matrix)(const struct wkv_matrix_packing *const p, const int64_t begin, const int64_t end) {
  for (int64_t panel = begin; panel < end; panel++) {
    uint32_t *const to = p->panels + panel * wkv_panel_words(p->format, p->inputs);
    const bool is_copy = p->format == WKV_AS_FLOAT32 && p->dtype == WKV_FLOAT32;
    if (wkv_is_int8(p->format)) pack_codes(p, panel, to);
    else if (is_copy && (panel + 1) * WKV_PANEL <= p->outputs) transpose_panel(p, panel, to);
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

#define PARTNER(lane, h) ((lane) ^ (h))
#define FIRST_OF_UNIT(lane, h) ((lane) * UNIT % W)

/* The sizes of the units of W numbers; zeros, or NaN if a number is not finite. */
INLINE vf store_sizes(float *const to, const vf numbers) {
  enum { UNITS = W / UNIT };
  vf size = (vf)((vu)numbers & 0x7fffffff);
  const vf spoilt = size * 0.0f;
  size = larger(size, SHUFFLE(size, size, LANES(PARTNER, 1)));
  size = larger(size, SHUFFLE(size, size, LANES(PARTNER, 2)));
  size = SHUFFLE(size, size, LANES(FIRST_OF_UNIT, 0));
  memcpy(to, &size, UNITS * sizeof *to);
  return spoilt;
}

/* Rounds W numbers to codes; their sum. */
INLINE vi round_some(const vf number, const float per_step, int8_t *const to) {
  const vf largest = splat(LARGEST_CODE);
  const vi codes = rounded(smaller(larger(number * per_step, -largest), largest));
  store_bytes(to, codes);
  return codes;
}

/* The sizes first stand where the codes will. */
static void round_row(const struct wkv_rows *const r, const int count, const float *const x, const struct norm norm,
                      uint32_t *const ready, struct wkv_step *const step) {
  const int64_t whole = r->inputs / W * W, rest = r->inputs - whole, units = wkv_count_of(r->inputs, UNIT);
  float *const sizes = (float *)ready;
  vf spoilt = {0};
  for (int64_t i = 0; i < whole; i += W) spoilt += store_sizes(sizes + i / UNIT, input_at(r, x, norm, i, W));
  if (rest) spoilt += store_sizes(sizes + whole / UNIT, input_at(r, x, norm, whole, rest));
  const struct repeats repeats = repeat_largest(sizes, units, count);
  const float per_step = repeats.step > 0 ? 1 / repeats.step : 0;
  int8_t *const to = (int8_t *)ready;
  vi sum = {0};
  for (int64_t i = 0; i < whole; i += W) sum += round_some(input_at(r, x, norm, i, W), per_step, to + i);
  if (rest) sum += round_some(input_at(r, x, norm, whole, rest), per_step, to + whole);
  uint32_t total = 0;
  for (int i = 0; i < W; i++) total += (uint32_t)sum[i];
  for (int e = 0; e < count; e++) {
    const int64_t unit = repeats.unit[e], i = unit * UNIT;
    const vf numbers = input_at(r, x, norm, i, least(UNIT, r->inputs - i));
    ready[units + e] = codes_of(numbers, per_step, times(&repeats, e + 1, unit));
    ready[units + WKV_REPEATS + e] = (uint32_t)unit;
    total += sum_of_bytes(ready[units + e]);
  }
  *step = (struct wkv_step){repeats.step + sum_of(spoilt), total * 128};
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
      case WKV_AS_INT8: round_row(r, 0, x, norm, ready, &r->steps[row]); break;
      default: round_row(r, WKV_REPEATS, x, norm, ready, &r->steps[row]);
    }
  }
}

/* ---- linear ---- */

/* Rows [row, last) and the outputs of a panel. */
INLINE void multiply_panel(const struct wkv_linear *const l, const enum wkv_format format, int64_t row,
                           const int64_t last, const int64_t panel) {
  for (; row + ABREAST <= last; row += ABREAST) panel_rows(l, format, ABREAST, row, panel);
  switch (last - row) {
#define CASE(n) \
  case n: \
    if (n < ABREAST) panel_rows(l, format, n, row, panel); \
    break;
    CASE(1)
    CASE(2)
    CASE(3)
    CASE(4)
    CASE(5)
    CASE(6)
    CASE(7)
    CASE(8)
    CASE(9)
    CASE(10)
    CASE(11)
    default: break;
  }
}

INLINE void multiply_in_place(const struct wkv_linear *const l, int64_t row, const int64_t last, const int64_t panel) {
  const int64_t end = least((panel + 1) * WKV_PANEL, l->outputs);
  for (int64_t output = panel * WKV_PANEL; output < end; output += W) {
    for (int64_t r = row; r < last; r += ROWS_IN_PLACE) {
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
}

void ON_ISA(wkv_linear)(const struct wkv_linear *const l, const int64_t begin, const int64_t end) {
  const int64_t panels = wkv_count_of(l->outputs, WKV_PANEL);
  for (int64_t item = begin; item < end; item++) {
    const int64_t row = item / panels * WKV_SWATH, last = least(row + WKV_SWATH, l->rows), panel = item % panels;
    if (!l->is_packed) multiply_in_place(l, row, last, panel);
    else if (l->format == WKV_AS_FLOAT32) multiply_panel(l, WKV_AS_FLOAT32, row, last, panel);
    else if (l->format == WKV_AS_BFLOAT16) multiply_panel(l, WKV_AS_BFLOAT16, row, last, panel);
    else if (l->format == WKV_AS_INT8) multiply_panel(l, WKV_AS_INT8, row, last, panel);
    else multiply_panel(l, WKV_AS_FINE_INT8, row, last, panel);
  }
}
