/* Codes on the tensor cores, without being unpacked. A byte placed under the exponent of 1024 is the float16
 * 1024 + code (of high halves of bytes, 1024 + 16 * code), so a word of codes becomes numbers in an instruction for
 * each two. The kernels put right what that adds: it is the same for all frames of a group. So that a lane finds what
 * it holds of a tile in one word, channels and frames stand in an order of their own, the same on both sides of a
 * product. */
#ifndef WHISPERKV_CUDA_CODES_H
#define WHISPERKV_CUDA_CODES_H
#include "../packed.h"
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

/* ---- codes of mixed bits, which become such of 8 in shared memory ---- */

/* Bits of the block of channels that begins at one, and at a byte of a tile. They cannot be checked without waiting
 * for them: a block that is not sound has 0 bits, and its codes are 0. */
INLINE int bits_of_block(const struct wkv_cross_attention &a, const int channel, const int64_t start) {
  const float bits = a.value_scales[channel];
  return bits >= 1 && bits <= 8 && start + wkv_bytes_of_block((int)bits) <= a.tile_bytes ? (int)bits : 0;
}

/* One of the 32 pieces that a block's codes of a tile are as 8 bits each: four frames of a quad of channels. */
INLINE piece unpack_piece(const int bits, const piece *from, const int n) {
  const int quad = n / 4, four = n % 4;
  int below = 0;
  piece codes = {};
#pragma unroll
  for (int plane = 8; plane > 0; plane /= 2) {
    if (!(bits & plane)) continue;
    const int together = 8 / plane;
    const piece some = from[quad / together * 4 + four];
#pragma unroll
    for (int f = 0; f < 4; f++)
      codes.word[f] |= (some.word[f] >> quad % together * plane & ((1u << plane) - 1) * 0x01010101u) << below;
    from += plane * (WKV_PIECE / (int)sizeof(piece));
    below += plane;
  }
  return codes;
}

#endif
