/* Products of small matrices in shared memory, by one warp: 16 x 16 times 16 x 8, on the tensor cores where the numbers
 * have 16 bits. A lane holds four of the sums: rows lane / 4 and 8 further, columns lane % 4 * 2 and the next. */
#ifndef WHISPERKV_CUDA_TILES_H
#define WHISPERKV_CUDA_TILES_H
#include "portable.h"

enum { TILE_ROWS = 16, TILE_COLUMNS = 8, TILE_DEPTH = 16 };

INLINE int row_of(const int lane, const int sum) { return lane / 4 + sum / 2 * 8; }
INLINE int column_of(const int lane, const int sum) { return lane % 4 * 2 + sum % 2; }

/* ---- 16 bits: what the lanes hold of a left matrix (16 x 16) and a right one (16 x 8), two numbers in a word ---- */

template <class T> struct left_tile {
  uint32_t word[4];
};
template <class T> struct right_tile {
  uint32_t word[2];
};

INLINE uint32_t two_at(const void *const p) { return *(const uint32_t *)p; }

/* Rows of `from` are rows of the left matrix. */
template <class T> INLINE void load(left_tile<T> *const to, const T *const from, const int stride, const int lane) {
  const T *const first = from + lane / 4 * stride + lane % 4 * 2;
  to->word[0] = two_at(first);
  to->word[1] = two_at(first + 8 * stride);
  to->word[2] = two_at(first + 8);
  to->word[3] = two_at(first + 8 * stride + 8);
}

/* Rows of `from` are columns of the right matrix. */
template <class T>
INLINE void load_turned(right_tile<T> *const to, const T *const from, const int stride, const int lane) {
  const T *const first = from + lane / 4 * stride + lane % 4 * 2;
  to->word[0] = two_at(first);
  to->word[1] = two_at(first + 8);
}

/* Rows of `from` are rows of the right matrix. */
template <class T> INLINE void load(right_tile<T> *const to, const T *const from, const int stride, const int lane) {
  const T *const row = from + lane % 16 * stride;
#ifdef CUDASHIM
  uint64_t rows[WARP];
  cudashim::meet(~0u, (uint64_t)(uintptr_t)row, [&](const uint64_t *const all) { memcpy(rows, all, sizeof rows); });
  for (int i = 0; i < 2; i++) {
    const uint16_t *const even = (const uint16_t *)rows[8 * i + lane % 4 * 2];
    const uint16_t *const odd = (const uint16_t *)rows[8 * i + lane % 4 * 2 + 1];
    to->word[i] = even[lane / 4] | (uint32_t)odd[lane / 4] << 16;
  }
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(to->word[0]), "=r"(to->word[1])
               : "r"((uint32_t)__cvta_generic_to_shared(row))
               : "memory");
#endif
}

/* Four squares of 8 x 8 at once, a word of each: lane i names row i % 8 of square i / 8. A lane gets numbers
 * lane % 4 * 2 and the next of row lane / 4; turned, of that column. */
#ifdef CUDASHIM
struct four_words {
  uint32_t word[4];
};
INLINE struct four_words words_of_squares(const void *const row, const bool is_turned) {
  const uint16_t *rows[WARP];
  const int lane = threadIdx.x % WARP, x = lane / 4, y = lane % 4 * 2;
  struct four_words words;
  cudashim::meet(~0u, (uint64_t)(uintptr_t)row, [&](const uint64_t *const all) { memcpy(rows, all, sizeof rows); });
  for (int i = 0; i < 4; i++) {
    const uint16_t *const *const square = rows + 8 * i;
    words.word[i] = is_turned ? square[y][x] | (uint32_t)square[y + 1][x] << 16 : two_at(square[x] + y);
  }
  return words;
}
#define FOUR_SQUARES(a, b, c, d, row, turning) \
  const struct four_words words = words_of_squares(row, sizeof(turning) > 1); \
  a = words.word[0], b = words.word[1], c = words.word[2], d = words.word[3]
#else
#define FOUR_SQUARES(a, b, c, d, row, turning) \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" turning ".shared.b16 {%0, %1, %2, %3}, [%4];" \
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d) \
               : "r"((uint32_t)__cvta_generic_to_shared(row)) \
               : "memory")
#endif

/* A left tile: its upper and lower half, then the same of the depths from 8 on. */
template <class T> INLINE void load_squares(left_tile<T> &to, const void *const row) {
  FOUR_SQUARES(to.word[0], to.word[1], to.word[2], to.word[3], row, "");
}
template <class T> INLINE void load_squares_turned(left_tile<T> &to, const void *const row) {
  FOUR_SQUARES(to.word[0], to.word[1], to.word[2], to.word[3], row, ".trans");
}

/* Two right tiles; turned here are rows that are columns, as above. */
template <class T> INLINE void load_two_turned(right_tile<T> *const to, const void *const row) {
  FOUR_SQUARES(to[0].word[0], to[0].word[1], to[1].word[0], to[1].word[1], row, "");
}
template <class T> INLINE void load_two(right_tile<T> *const to, const void *const row) {
  FOUR_SQUARES(to[0].word[0], to[0].word[1], to[1].word[0], to[1].word[1], row, ".trans");
}

#ifdef CUDASHIM
template <class T> INLINE void multiply(float *const sums, const left_tile<T> &a, const right_tile<T> &b) {
  uint64_t left[2][WARP], right[WARP]; /* of all lanes: the words of depths up to 7 and from 8 on */
  for (int i = 0; i < 2; i++)
    cudashim::meet(~0u, a.word[2 * i] | (uint64_t)a.word[2 * i + 1] << 32,
                   [&](const uint64_t *const all) { memcpy(left[i], all, sizeof left[i]); });
  cudashim::meet(~0u, b.word[0] | (uint64_t)b.word[1] << 32,
                 [&](const uint64_t *const all) { memcpy(right, all, sizeof right); });
  const int lane = threadIdx.x % WARP;
  for (int s = 0; s < 4; s++)
    for (int k = 0; k < TILE_DEPTH; k++) {
      const int high = k / 8, word = k % 8 / 2, half = k % 2 * 16;
      T x, y;
      x.bits = (uint16_t)(left[high][row_of(lane, s) % 8 * 4 + word] >> (s / 2 * 32 + half));
      y.bits = (uint16_t)(right[column_of(lane, s) * 4 + word] >> (high * 32 + half));
      sums[s] += to_float(x) * to_float(y);
    }
}
#else
#define MULTIPLY(T, name) \
  INLINE void multiply(float *const sums, const left_tile<T> &a, const right_tile<T> &b) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, " \
                 "{%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) \
                 : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]), "r"(b.word[1])); \
  }
MULTIPLY(bfloat16, "bf16")
MULTIPLY(float16, "f16")
#endif

/* ---- float32: no tensor core is exact enough; a lane reads what it needs ---- */

template <> struct left_tile<float> {
  const float *row[2]; /* of this lane's sums */
};
template <> struct right_tile<float> {
  const float *column; /* the first of this lane's two */
  int along, across;   /* to the next number of a column, to the next column */
};

INLINE void load(left_tile<float> *const to, const float *const from, const int stride, const int lane) {
  to->row[0] = from + row_of(lane, 0) * stride;
  to->row[1] = from + row_of(lane, 2) * stride;
}
INLINE void load_turned(right_tile<float> *const to, const float *const from, const int stride, const int lane) {
  to->column = from + column_of(lane, 0) * stride;
  to->along = 1;
  to->across = stride;
}
INLINE void load(right_tile<float> *const to, const float *const from, const int stride, const int lane) {
  to->column = from + column_of(lane, 0);
  to->along = stride;
  to->across = 1;
}

INLINE void multiply(float *const sums, const left_tile<float> &a, const right_tile<float> &b) {
#pragma unroll 4
  for (int k = 0; k < TILE_DEPTH; k++) {
    const float x[] = {a.row[0][k], a.row[1][k]};
    const float y[] = {b.column[k * b.along], b.column[k * b.along + b.across]};
#pragma unroll
    for (int s = 0; s < 4; s++) sums[s] = fmaf(x[s / 2], y[s % 2], sums[s]);
  }
}

#endif
