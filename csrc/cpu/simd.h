/* W floats at a time, in the vector extensions that gcc and clang share. W and the few instructions that those
 * extensions cannot name are all that differs between instruction sets. */
#ifndef WHISPERKV_SIMD_H
#define WHISPERKV_SIMD_H
#include <stdint.h>
#include <string.h>

#include "../whisperkv.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX2__)
#define W 8
#else
#define W 4
#endif

/* Kernels are written once for all dtypes: the dtype is an argument that inlining turns into a constant. */
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W))); /* W float16 */
typedef uint8_t vb __attribute__((vector_size(W)));
typedef uint8_t vq __attribute__((vector_size(4 * W))); /* 4 bytes a lane */

INLINE int64_t least(const int64_t a, const int64_t b) { return a < b ? a : b; }

INLINE vf splat(const float x) { return x - (vf){0}; }
INLINE vu choose(const vi mask, const vu yes, const vu no) { return ((vu)mask & yes) | (~(vu)mask & no); }

/* b if either is NaN, as the instructions have it. */
INLINE vf larger(const vf a, const vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return (vf)choose(a > b, (vu)a, (vu)b);
#endif
}

INLINE vf smaller(const vf a, const vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return (vf)choose(a < b, (vu)a, (vu)b);
#endif
}

/* a * b + c. Spelled out, because -std=c11 forbids the compiler to contract. */
INLINE vf multiply_add(const vf a, const vf b, const vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

/* ---- storage formats ---- */

/* W floats from and to memory at any address. */
INLINE vf load(const float *const p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}

INLINE void store(float *const p, const vf x) { memcpy(p, &x, sizeof x); }

/* The bits of a bfloat16 in the upper half of each lane: to the nearest, ties to even; NaN to the quiet one. */
INLINE vu to_bfloat16(const vf x) {
  const vu bits = (vu)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return choose(x == x, rounded, (vu){0} + 0x7fc00000) & 0xffff0000;
}

INLINE vf from_float16(const vh x) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps((__m128i)x);
#elif defined(__aarch64__)
  return (vf)vcvt_f32_f16((float16x4_t)x);
#else
  const vu half = __builtin_convertvector(x, vu), size = (half & 0x7fff) << 13, rebias = (vu){0} + (112u << 23);
  const vu normal = size + rebias + ((vu)(size >= 0x7c00u << 13) & rebias); /* inf and NaN are rebiased twice */
  const vf tiny = (vf)(normal + (1u << 23)) - 0x1p-14f;                     /* subnormal halves, no subnormal floats */
  return (vf)(choose(size < 1u << 23, (vu)tiny, normal) | (half & 0x8000) << 16);
#endif
}

INLINE vh to_float16(const vf x) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  return (vh)vcvt_f16_f32((float32x4_t)x);
#else
  const vu bits = (vu)x, size = bits & 0x7fffffff;
  const vu normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  const vu tiny = (vu)((vf)size + 0.5f) - (126u << 23); /* the addition rounds a subnormal half in place */
  const vu huge = choose(size > 255u << 23, (vu){0} + 0x7e00, (vu){0} + 0x7c00);
  const vu finite = choose(size < 113u << 23, tiny, normal);
  return __builtin_convertvector(choose(size < 143u << 23, finite, huge) | (bits & 0x80000000) >> 16, vh);
#endif
}

INLINE int64_t size_of(const enum wkv_dtype dtype) { return dtype == WKV_FLOAT32 ? 4 : 2; }

INLINE const void *at(const enum wkv_dtype dtype, const void *const base, const int64_t index) {
  return (const char *)base + index * size_of(dtype);
}

INLINE void *at_mut(const enum wkv_dtype dtype, void *const base, const int64_t index) {
  return (char *)base + index * size_of(dtype);
}

/* 2 * W numbers of a cache. Two of bfloat16 fill a 32 bit lane and are split most cheaply into those at even places
 * and those at odd ones; of the other dtypes, a holds the first W. Loads and stores agree, and nothing between them
 * minds the order. */
struct pair {
  vf a, b;
};

enum { PAIR = 2 * W };

INLINE struct pair load_full(const enum wkv_dtype dtype, const void *const p) {
  vu both;
  vh halves[2];
  switch (dtype) {
    case WKV_BFLOAT16: memcpy(&both, p, sizeof both); return (struct pair){(vf)(both << 16), (vf)(both & 0xffff0000)};
    case WKV_FLOAT16:
      memcpy(&halves[0], p, sizeof halves[0]);
      memcpy(&halves[1], (const char *)p + sizeof halves[0], sizeof halves[1]);
      return (struct pair){from_float16(halves[0]), from_float16(halves[1])};
    default: return (struct pair){load(p), load((const float *)p + W)};
  }
}

INLINE void store_full(const enum wkv_dtype dtype, void *const p, const struct pair x) {
  const vu both = to_bfloat16(x.a) >> 16 | to_bfloat16(x.b);
  const vh halves[2] = {to_float16(x.a), to_float16(x.b)};
  switch (dtype) {
    case WKV_BFLOAT16: memcpy(p, &both, sizeof both); break;
    case WKV_FLOAT16: memcpy(p, halves, sizeof halves); break;
    default: store(p, x.a); store((float *)p + W, x.b);
  }
}

/* The first n <= PAIR numbers at p, then zeros. Where n is the constant PAIR only the load remains. */
INLINE struct pair load_some(const enum wkv_dtype dtype, const void *const p, const int64_t n) {
  if (n == PAIR) return load_full(dtype, p);
  float padded[PAIR] = {0};
  memcpy(padded, p, (size_t)(n * size_of(dtype)));
  return load_full(dtype, padded);
}

INLINE void store_some(const enum wkv_dtype dtype, void *const p, const struct pair x, const int64_t n) {
  float padded[PAIR];
  store_full(dtype, padded, x);
  memcpy(p, padded, (size_t)(n * size_of(dtype)));
}

/* The first n <= W numbers at p in their own order, then zeros. */
INLINE vf load_in_order(const enum wkv_dtype dtype, const void *const p, const int64_t n) {
  vh half = {0};
  vf full = {0};
  memcpy(dtype == WKV_FLOAT32 ? (void *)&full : (void *)&half, p,
         n == W ? W * (size_t)size_of(dtype) : (size_t)(n * size_of(dtype)));
  switch (dtype) {
    case WKV_BFLOAT16: return (vf)(__builtin_convertvector(half, vu) << 16);
    case WKV_FLOAT16: return from_float16(half);
    default: return full;
  }
}

INLINE void store_in_order(const enum wkv_dtype dtype, void *const p, const vf x, const int64_t n) {
  const vh half = dtype == WKV_BFLOAT16 ? __builtin_convertvector(to_bfloat16(x) >> 16, vh) : to_float16(x);
  memcpy(p, dtype == WKV_FLOAT32 ? (const void *)&x : (const void *)&half,
         n == W ? W * (size_t)size_of(dtype) : (size_t)(n * size_of(dtype)));
}

/* ---- bytes ---- */

/* The lowest of each lane. */
INLINE vb lowest_bytes(const vi x) {
#ifdef __AVX512F__
  return (vb)_mm512_cvtepi32_epi8((__m512i)x);
#else
  return __builtin_convertvector(x, vb);
#endif
}

/* Each 32 bit lane: the products of its two 16 bit numbers, added up. */
INLINE vi multiply_16(const vi a, const vi b) {
#if defined(__AVX512BW__)
  return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  return (vi)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#else
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

/* Each 32 bit lane: sum + the products of its four bytes, those of a unsigned, those of b signed, added up. Exact, so
 * that all instruction sets agree; the sum is unsigned because it may wrap around on its way. */
INLINE vu multiply_bytes(const vi a, const vi b, const vu sum) {
#if defined(__AVX512VNNI__)
  return (vu)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
  typedef int16_t v16 __attribute__((vector_size(4 * W)));
  typedef uint16_t vu16 __attribute__((vector_size(4 * W)));
  const vu even = (vu)multiply_16(a & 0x00ff00ff, (vi)((v16)((vu16)b << 8) >> 8));
  return sum + even + (vu)multiply_16((vi)((vu16)a >> 8), (vi)((v16)b >> 8));
#endif
}

/* The same of sums that stand in the place of floats, as those of other products do: gcc, told of two types, would move
 * them between registers and memory all the time. */
INLINE vf multiply_bytes_in_place(const vi a, const vi b, vf sum) {
#if defined(__AVX512VNNI__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#else
  return (vf)multiply_bytes(a, b, (vu)sum);
#endif
}

/* Each 32 bit lane: sum + the products of its two bfloat16, added up. Instructions for it came with AVX512-BF16. */
#ifdef __AVX512BF16__
enum { MULTIPLIES_BFLOAT16 = 1 };
INLINE vf multiply_bfloat16(const vu a, const vu b, const vf sum) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#else
enum { MULTIPLIES_BFLOAT16 = 0 };
INLINE vf multiply_bfloat16(const vu a, const vu b, const vf sum) {
  const vf low = multiply_add((vf)(a << 16), (vf)(b << 16), sum);
  return multiply_add((vf)(a & 0xffff0000), (vf)(b & 0xffff0000), low);
}
#endif

/* ---- across lanes ---- */

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

#if W == 16
#define LANES(F, h) \
  F(0, h), F(1, h), F(2, h), F(3, h), F(4, h), F(5, h), F(6, h), F(7, h), F(8, h), F(9, h), F(10, h), F(11, h), \
      F(12, h), F(13, h), F(14, h), F(15, h)
#elif W == 8
#define LANES(F, h) F(0, h), F(1, h), F(2, h), F(3, h), F(4, h), F(5, h), F(6, h), F(7, h)
#else
#define LANES(F, h) F(0, h), F(1, h), F(2, h), F(3, h)
#endif

/* Lanes h apart are added; the sums of a go to the lanes without bit h, those of b to the lanes with it. */
#define FIRST(lane, h) (((lane) & ~(h)) | ((lane) & (h) ? W : 0))
#define SECOND(lane, h) ((lane) | (h) | ((lane) & (h) ? W : 0))
#define FOLD(h) \
  INLINE vf fold_##h(const vf a, const vf b) { \
    return SHUFFLE(a, b, LANES(FIRST, h)) + SHUFFLE(a, b, LANES(SECOND, h)); \
  }
FOLD(1)
FOLD(2)
#if W > 4
FOLD(4)
#endif
#if W > 8
FOLD(8)
#endif

/* Lane i of the result is the sum of the lanes of x[i]. Overwrites x. */
INLINE vf sum_each(vf x[W]) {
#if W > 8
  for (int i = 0; i < 8; i++) x[i] = fold_8(x[i], x[i + 8]);
#endif
#if W > 4
  for (int i = 0; i < 4; i++) x[i] = fold_4(x[i], x[i + 4]);
#endif
  for (int i = 0; i < 2; i++) x[i] = fold_2(x[i], x[i + 2]);
  return fold_1(x[0], x[1]);
}

/* The first step of exchanging lanes and vectors: those of every two vectors h apart. */
#define EXCHANGE(h) \
  INLINE void exchange_##h(vu x[W]) { \
    for (int i = 0; i < W; i++) { \
      if (i & h) continue; \
      const vu a = x[i], b = x[i | h]; \
      x[i] = SHUFFLE(a, b, LANES(FIRST, h)); \
      x[i | h] = SHUFFLE(a, b, LANES(SECOND, h)); \
    } \
  }
EXCHANGE(1)
EXCHANGE(2)
#if W > 4
EXCHANGE(4)
#endif
#if W > 8
EXCHANGE(8)
#endif

/* Lane i of vector k becomes lane k of vector i. */
INLINE void transpose(vu x[W]) {
  exchange_1(x);
  exchange_2(x);
#if W > 4
  exchange_4(x);
#endif
#if W > 8
  exchange_8(x);
#endif
}

/* Four lanes hold four bytes each: bytes and lanes change places. */
#define BYTE(lane, h) \
  (lane) / 4 * 16 + (lane) % 4, (lane) / 4 * 16 + (lane) % 4 + 4, (lane) / 4 * 16 + (lane) % 4 + 8, \
      (lane) / 4 * 16 + (lane) % 4 + 12
INLINE vi transpose_bytes(const vi x) {
#ifdef __clang__
  return (vi)__builtin_shufflevector((vq)x, (vq)x, LANES(BYTE, 0));
#else
  return (vi)__builtin_shuffle((vq)x, (vq){LANES(BYTE, 0)});
#endif
}

/* Lanes 4 * i + j of x[q] hold parts of channel j. Lane 4 * q + j of the result is their sum. Overwrites x. */
INLINE vf sum_channels(vf x[W / 4]) {
#if W > 8
  x[0] = fold_8(x[0], x[2]);
  x[1] = fold_8(x[1], x[3]);
#endif
#if W > 4
  x[0] = fold_4(x[0], x[1]);
#endif
  return x[0];
}

INLINE float sum_of(vf x) {
#if W > 8
  x = fold_8(x, x);
#endif
#if W > 4
  x = fold_4(x, x);
#endif
  x = fold_2(x, x);
  return fold_1(x, x)[0];
}

INLINE int32_t sum_of_integers(const vi x) {
  int32_t sum = x[0];
  for (int i = 1; i < W; i++) sum += x[i];
  return sum;
}

#define LARGER(x, h) larger(SHUFFLE(x, x, LANES(FIRST, h)), SHUFFLE(x, x, LANES(SECOND, h)))

INLINE float largest_of(vf x) {
#if W > 8
  x = LARGER(x, 8);
#endif
#if W > 4
  x = LARGER(x, 4);
#endif
  x = LARGER(x, 2);
  return LARGER(x, 1)[0];
}

/* exp(x) for x <= 0, to 1e-7 of its value (the polynomial is that of Cephes); 0 below -87, where floats grow
 * subnormal; NaN stays NaN. */
INLINE vf exponential(const vf x) {
  const float round = 0x1.8p23f; /* added and taken away it leaves an integer, which meanwhile fills the low bits */
  const vf shifted = multiply_add(x, splat(1.44269504f), splat(round)), n = shifted - round;
  const vf r = multiply_add(n, splat(2.12194440e-4f), multiply_add(n, splat(-0.693359375f), x)); /* x - n log 2 */
  vf p = splat(1.9875691500e-4f);
  p = multiply_add(p, r, splat(1.3981999507e-3f));
  p = multiply_add(p, r, splat(8.3334519073e-3f));
  p = multiply_add(p, r, splat(4.1665795894e-2f));
  p = multiply_add(p, r, splat(1.6666665459e-1f));
  p = multiply_add(p, r, splat(5.0000001201e-1f));
  p = multiply_add(p, r * r, r) + 1.0f;
  const vf power = (vf)(((vu)shifted + 127) << 23); /* 2^n */
  return (vf)choose(x < -87.0f, (vu){0}, (vu)(p * power));
}

#endif
