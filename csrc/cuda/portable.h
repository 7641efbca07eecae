/* What the kernels need of CUDA, so that the same sources also run on a CPU: tests/cuda/cudashim.h stands in for the
 * toolkit there. A number of a cache is one of three types; all arithmetic is in float. */
#ifndef WHISPERKV_CUDA_PORTABLE_H
#define WHISPERKV_CUDA_PORTABLE_H
#include <float.h>
#include <math.h>
#include <stdint.h>

#include "../whisperkv.h"

#ifdef CUDASHIM
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  ((void)stream, cudashim::launch(grid, block, shared, kernel, __VA_ARGS__))
#define DYNAMIC_SHARED(name) char *name = cudashim::B.dyn
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#endif

#define INLINE static __device__ __forceinline__

#define EVERYWHERE static __host__ __device__ inline

enum { WARP = 32 };
#define ALL_LANES 0xffffffffu

EVERYWHERE int64_t count_of(const int64_t n, const int64_t unit) { return (n + unit - 1) / unit; }
EVERYWHERE int64_t round_up(const int64_t n, const int64_t unit) { return count_of(n, unit) * unit; }
EVERYWHERE int64_t smaller(const int64_t a, const int64_t b) { return a < b ? a : b; }
EVERYWHERE int64_t larger(const int64_t a, const int64_t b) { return a > b ? a : b; }

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

#ifdef CUDASHIM
INLINE float float_of(const uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
INLINE uint32_t bits_of(const float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
INLINE float to_float(const bfloat16 x) { return float_of((uint32_t)x.bits << 16); }
INLINE float to_float(const float16 x) {
  _Float16 half;
  memcpy(&half, &x, sizeof half);
  return (float)half;
}
INLINE void convert(const float x, bfloat16 *const to) {
  const uint32_t bits = bits_of(x);
  to->bits = x == x ? (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fff;
}
INLINE void convert(const float x, float16 *const to) {
  const _Float16 half = (_Float16)x;
  memcpy(to, &half, sizeof half);
}
#else
INLINE float to_float(const bfloat16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
INLINE float to_float(const float16 x) { return __half2float(__ushort_as_half(x.bits)); }
INLINE void convert(const float x, bfloat16 *const to) { to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
INLINE void convert(const float x, float16 *const to) { to->bits = __half_as_ushort(__float2half_rn(x)); }
#endif
INLINE float to_float(const float x) { return x; }
INLINE void convert(const float x, float *const to) { *to = x; }

template <class A, class B> constexpr bool is_same = false;
template <class A> constexpr bool is_same<A, A> = true;

/* Two numbers of 16 bits in a word, the first in its low half. */
template <class T> INLINE uint32_t two_numbers(const float first, const float second) {
#ifdef CUDASHIM
  T two[2];
  convert(first, two);
  convert(second, two + 1);
  return two[0].bits | (uint32_t)two[1].bits << 16;
#else
  uint32_t two;
  if (is_same<T, float16>) asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(two) : "f"(first), "f"(second));
  else asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(two) : "f"(first), "f"(second));
  return two;
#endif
}
template <class T> INLINE float first_of(const uint32_t two) { return to_float(T{(uint16_t)two}); }
template <class T> INLINE float second_of(const uint32_t two) { return to_float(T{(uint16_t)(two >> 16)}); }

/* word & mask | bits, in one instruction. */
INLINE uint32_t masked_or(const uint32_t word, const uint32_t mask, const uint32_t bits) {
#ifdef CUDASHIM
  return (word & mask) | bits;
#else
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
#endif
}

INLINE float power_of_2(const float x) {
#ifdef CUDASHIM
  return exp2f(x);
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#endif
}
#define LOG_2 0.693147180559945309f

/* What exponentials are counted from, in units of log 2, once a logit of `top` is met. It stays where it is until
 * weights would be larger than 2^8, which float16 has room for: sums need seldom be counted anew. */
INLINE float new_top(const float before, const float top) { return top > before + 8 ? top : before; }

/* Sixteen bytes at once. */
struct __align__(16) piece {
  uint32_t word[4];
};

struct __align__(8) two_words {
  uint32_t word[2];
};
struct __align__(8) pair {
  float first, second;
};

/* Into shared memory, without waiting: copies become visible to a thread that has called copies_but(n) with no more
 * than n groups begun since, and to the others after the next __syncthreads. */
INLINE void copy_piece(void *const to, const void *const from) {
#ifdef CUDASHIM
  cudashim::copy(to, from, sizeof(piece));
#else
  const uint32_t address = (uint32_t)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#endif
}
/* Zeros where there is nothing to copy. */
INLINE void copy_piece_or_zeros(void *const to, const void *const from, const bool exists) {
#ifdef CUDASHIM
  static const piece zeros = {};
  cudashim::copy(to, exists ? from : &zeros, sizeof(piece));
#else
  const uint32_t address = (uint32_t)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(exists ? 16 : 0)
               : "memory");
#endif
}
INLINE void end_of_copies(void) { /* a group ends here */
#ifdef CUDASHIM
  cudashim::end_of_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int GROUPS> INLINE void copies_but(void) { /* all but the newest groups are there */
#ifdef CUDASHIM
  cudashim::copies_but(GROUPS);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

INLINE float sum_of_warp(float x, const int lanes = WARP) {
  for (int lane = lanes / 2; lane; lane /= 2) x += __shfl_xor_sync(ALL_LANES, x, lane);
  return x;
}
INLINE float largest_of_warp(float x) {
  for (int lane = WARP / 2; lane; lane /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lane));
  return x;
}

/* A kernel may use more than 48 kB of shared memory only if it says so. NULL, or why not. */
static inline const char *allow_shared(const void *const kernel, const size_t bytes) {
#ifdef CUDASHIM
  return (void)kernel, bytes > 227 << 10 ? "too much shared memory" : NULL;
#else
  if (bytes <= 48 << 10) return NULL;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (error == cudaSuccess) return NULL;
  cudaGetLastError(); /* it is told here, and not again by the next launch */
  return "the heads are too wide for this GPU's shared memory in this dtype: use float16 or bfloat16";
#endif
}

/* NULL, or what CUDA says of the launch before. */
static inline const char *launch_error(void) {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? NULL : cudaGetErrorString(error);
}

/* Calls function<T>(...) for the type of a cache. */
#define FOR_DTYPE(dtype, function, ...) \
  ((dtype) == WKV_FLOAT32    ? function<float>(__VA_ARGS__) \
   : (dtype) == WKV_BFLOAT16 ? function<bfloat16>(__VA_ARGS__) \
                             : function<float16>(__VA_ARGS__))

#endif
