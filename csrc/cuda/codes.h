/* Codes on the tensor cores, without being unpacked. A byte placed under the exponent of 1024 is the float16
 * 1024 + code (of high halves of bytes, 1024 + 16 * code), so a word of codes becomes numbers in an instruction for
 * each two. The kernels put right what that adds: it is the same for all frames of a group. So that a lane finds what
 * it holds of a tile in one word, channels and frames stand in an order of their own, the same on both sides of a
 * product. */
#ifndef WHISPERKV_CUDA_CODES_H
#define WHISPERKV_CUDA_CODES_H
#include "portable.h"

#define UNDER_1024 0x64006400u

/* What the tensor cores multiply: codes are float16 whatever the model's dtype. */
template <class T, int BITS> struct multiplied {
  typedef float16 type;
};
template <class T> struct multiplied<T, 0> {
  typedef T type;
};

/* Codes of bytes 0 and 2 (1 and 3) of a word. */
INLINE uint32_t even_codes(const uint32_t word) { return __byte_perm(word, UNDER_1024, 0x7270); }
INLINE uint32_t odd_codes(const uint32_t word) { return __byte_perm(word, UNDER_1024, 0x7371); }
INLINE uint32_t low_codes(const uint32_t word) { return masked_or(word, 0x000f000f, UNDER_1024); }
INLINE uint32_t high_codes(const uint32_t word) { return masked_or(word, 0x00f000f0, UNDER_1024); }

#endif
