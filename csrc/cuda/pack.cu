/* Frames of the encoder, or their keys and values, as codes of 8 or 4 bits. */
#include "portable.h"

namespace {

/* A block is one group of frames of one head of one audio, and 32 channels of it; a thread has one channel, and every
 * SHARERS-th frame of it. */
enum { SHARERS = 8, THREADS = WKV_CHANNELS * SHARERS };

template <class T, int BITS> __global__ void __launch_bounds__(THREADS) pack(const struct wkv_packing p) {
  __shared__ float lows[SHARERS][WKV_CHANNELS], highs[SHARERS][WKV_CHANNELS], spoils[SHARERS][WKV_CHANNELS];
  __shared__ uint8_t codes[WKV_TILE][WKV_CHANNELS];
  const int64_t padded = round_up(p.head_dim, WKV_CHANNELS), groups = count_of(p.frames, p.group);
  const int64_t tiles = count_of(p.frames, WKV_TILE), strips = padded / WKV_CHANNELS;
  const int64_t strip = blockIdx.x % strips, group = blockIdx.x / strips % groups;
  const int64_t matrix = blockIdx.x / strips / groups, audio = matrix / p.heads, head = matrix % p.heads;
  const int64_t first = group * p.group;
  const int lane = threadIdx.x % WKV_CHANNELS, sharer = threadIdx.x / WKV_CHANNELS, levels = (1 << BITS) - 1;
  const int64_t channel = strip * WKV_CHANNELS + lane, length = smaller(p.lengths[audio], p.frames);
  const int frames = (int)larger(smaller(length - first, p.group), 0);
  const int64_t stride = p.heads * p.head_dim;
  const T *const states = (const T *)p.states + (audio * p.frames + first) * stride + head * p.head_dim + channel;
  const bool exists = channel < p.head_dim;

  float low = INFINITY, high = -INFINITY, spoilt = 0; /* an infinity or NaN makes spoilt NaN */
  for (int frame = sharer; frame < frames && exists; frame += SHARERS) {
    const float x = to_float(states[frame * stride]);
    spoilt += x - x;
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  lows[sharer][lane] = low;
  highs[sharer][lane] = high;
  spoils[sharer][lane] = spoilt;
  __syncthreads();
  for (int i = 0; i < SHARERS; i++) {
    low = fminf(low, lows[i][lane]);
    high = fmaxf(high, highs[i][lane]);
    spoilt += spoils[i][lane];
  }
  float step = (high - low) * (1.0f / levels) + spoilt;
  if (frames == 0 || !exists) step = low = 0;
  if (sharer == 0) {
    float *const scales = p.scales + (matrix * groups + group) * 2 * padded + channel;
    scales[0] = step;
    scales[padded] = low;
  }

  const float inverse = step > 0 ? 1.0f / step : 0;
  const int64_t last = smaller(tiles, (first + p.group) / WKV_TILE);
  for (int64_t tile = first / WKV_TILE; tile < last; tile++) {
    for (int i = sharer; i < WKV_TILE; i += SHARERS) {
      const int64_t frame = tile * WKV_TILE + i - first;
      float code = 0;
      if (frame < frames && exists) code = fminf(fmaxf((to_float(states[frame * stride]) - low) * inverse, 0), levels);
      codes[i][lane] = (uint8_t)(code + 0.5f);
    }
    __syncthreads();
    /* Pieces of this tile that hold these channels, a byte a thread: [channels / 4, 16, 4], of 4 bits half. */
    uint8_t *const to = p.codes + (matrix * tiles + tile) * 2 * BITS * padded + strip * WKV_CHANNELS * 2 * BITS;
    for (int i = threadIdx.x; i < WKV_CHANNELS * 2 * BITS; i += THREADS) {
      const int quad = i / 64, frame = i / 4 % WKV_TILE, c = i % 4;
      to[i] = BITS == 8 ? codes[frame][4 * quad + c]
                        : (uint8_t)(codes[frame][8 * quad + c] | codes[frame][8 * quad + 4 + c] << 4);
    }
    __syncthreads();
  }
}

template <class T> const char *launch(const struct wkv_packing *const p, const cudaStream_t stream) {
  const dim3 grid(p->audios * p->heads * count_of(p->frames, p->group) * count_of(p->head_dim, WKV_CHANNELS));
  if (p->bits == 8) LAUNCH((pack<T, 8>), grid, dim3(THREADS), 0, stream, *p);
  else LAUNCH((pack<T, 4>), grid, dim3(THREADS), 0, stream, *p);
  return launch_error();
}

} // namespace

extern "C" const char *wkv_cuda_pack(const struct wkv_packing *const p, void *const stream) {
  return p->audios ? FOR_DTYPE(p->dtype, launch, p, (cudaStream_t)stream) : NULL;
}
