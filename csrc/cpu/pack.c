/* Frames of the encoder, or their keys and values, as codes of 8 or 4 bits. */
#include "../packed.h"
#include "isa.h"
#include "simd.h"

enum { QUADS = WKV_CHANNELS / 4 };

/* Step and least of W channels, over the frames of one group. A channel with a NaN or an infinity gets a step of
 * NaN. */
INLINE void measure(const enum wkv_dtype dtype, const void *const states, const int64_t frames, const int64_t stride,
                    const int64_t n, const int levels, vf *const step, vf *const low) {
  vf lowest = load_in_order(dtype, states, n), highest = lowest, spoilt = lowest - lowest;
  for (int64_t frame = 1; frame < frames; frame++) {
    const vf x = load_in_order(dtype, at(dtype, states, frame * stride), n);
    spoilt += x - x;
    lowest = (vf)choose(x < lowest, (vu)x, (vu)lowest);
    highest = (vf)choose(x > highest, (vu)x, (vu)highest);
  }
  *step = (highest - lowest) * (1.0f / levels) + spoilt;
  *low = lowest;
}

/* One group of frames of one head of one audio. */
INLINE void pack_group(const enum wkv_dtype dtype, const int bits, const struct wkv_packing *const p,
                       const int64_t audio, const int64_t head, const int64_t group) {
  const int64_t channels = wkv_round_up(p->head_dim, WKV_CHANNELS), groups = wkv_count_of(p->frames, p->group);
  const int64_t first = group * p->group, stride = p->heads * p->head_dim, matrix = audio * p->heads + head;
  const int64_t tiled = wkv_round_up(p->frames, WKV_TILE);
  float *const scales = p->scales + wkv_place_of_steps(channels, matrix * groups + group);
  uint8_t *const codes = p->codes + wkv_place_of_codes(bits, channels, matrix * tiled + first, 0);
  memset(scales, 0, (size_t)(2 * channels) * sizeof *scales);
  memset(codes, 0, (size_t)wkv_place_of_codes(bits, channels, least(tiled - first, p->group), 0));
  const int64_t frames = least(p->lengths[audio] - first, p->group);
  if (frames <= 0) return;

  const int levels = (1 << bits) - 1;
  const void *const states = at(dtype, p->states, (audio * p->frames + first) * stride + head * p->head_dim);
  for (int64_t channel = 0; channel < p->head_dim; channel += WKV_CHANNELS) {
    vf inverse[WKV_CHANNELS / W], lows[WKV_CHANNELS / W];
    for (int64_t c = 0; c < WKV_CHANNELS; c += W) {
      vf step = {0}, low = {0};
      const int64_t n = least(W, p->head_dim - channel - c);
      if (n > 0) measure(dtype, at(dtype, states, channel + c), frames, stride, n, levels, &step, &low);
      store(scales + channel + c, step);
      store(scales + channels + channel + c, low);
      inverse[c / W] = (vf)choose(step > 0, (vu)(1.0f / step), (vu){0});
      lows[c / W] = low;
    }
    for (int64_t frame = 0; frame < frames; frame++) {
      uint32_t quads[QUADS];
      for (int64_t c = 0; c < WKV_CHANNELS; c += W) {
        const int64_t n = least(W, p->head_dim - channel - c);
        if (n <= 0) {
          memset((char *)quads + c, 0, W);
          continue;
        }
        const vf x = load_in_order(dtype, at(dtype, states, frame * stride + channel + c), n);
        const vf code = smaller(larger((x - lows[c / W]) * inverse[c / W], splat(0)), splat((float)levels));
        const vb bytes = __builtin_convertvector(__builtin_convertvector(code + 0.5f, vi), vb);
        memcpy((char *)quads + c, &bytes, W);
      }
      uint8_t *const place = codes + wkv_place_of_codes(bits, channels, frame, channel);
      for (int q = 0; q < QUADS; q += bits == 8 ? 1 : 2) {
        const uint32_t code = bits == 8 ? quads[q] : quads[q] | quads[q + 1] << 4;
        memcpy(place + wkv_bytes_of_channels(bits, 4 * q), &code, sizeof code);
      }
    }
  }
}

#define PACK(dtype, bits) \
  static void pack_##dtype##_##bits(const struct wkv_packing *const p, const int64_t audio, const int64_t head, \
                                    const int64_t group) { \
    pack_group(WKV_##dtype, bits, p, audio, head, group); \
  }
#define PACK_IN(dtype) PACK(dtype, 8) PACK(dtype, 4)
PACK_IN(FLOAT32)
PACK_IN(BFLOAT16)
PACK_IN(FLOAT16)

typedef void pack_function(const struct wkv_packing *, int64_t audio, int64_t head, int64_t group);
static pack_function *const pack_8[WKV_DTYPES] = {pack_FLOAT32_8, pack_BFLOAT16_8, pack_FLOAT16_8};
static pack_function *const pack_4[WKV_DTYPES] = {pack_FLOAT32_4, pack_BFLOAT16_4, pack_FLOAT16_4};

void ON_ISA(wkv_pack)(const struct wkv_packing *const p, const int64_t begin, const int64_t end) {
  const int64_t groups = wkv_count_of(p->frames, p->group);
  pack_function *const pack = (p->bits == 8 ? pack_8 : pack_4)[p->dtype];
  for (int64_t item = begin; item < end; item++)
    pack(p, item / groups / p->heads, item / groups % p->heads, item % groups);
}
