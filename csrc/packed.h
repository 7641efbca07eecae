/* Where the numbers of a packed cache stand, as struct wkv_packing lays them out: read by C and CUDA alike. Whoever
 * means a matrix of several counts frames and groups from the first one's on: each fills whole tiles. */
#ifndef WHISPERKV_PACKED_H
#define WHISPERKV_PACKED_H
#include "whisperkv.h"

#ifdef __CUDACC__
#define WKV_PLACE static __host__ __device__ inline
#else
#define WKV_PLACE static inline
#endif

/* Bytes of so many channels of a tile; of all of them, from one tile to the next. */
WKV_PLACE int64_t wkv_bytes_of_channels(int bits, int64_t channels) { return channels * 2 * bits; }

/* The byte of a frame's codes, from a channel on that begins a piece. Those of its tile's next frames follow. */
WKV_PLACE int64_t wkv_place_of_codes(int bits, int64_t channels, int64_t frame, int64_t channel) {
  return frame / WKV_TILE * wkv_bytes_of_channels(bits, channels) + wkv_bytes_of_channels(bits, channel) +
         frame % WKV_TILE * 4;
}

/* ---- codes of mixed bits ----
 *
 * Of a tile, the blocks of WKV_CHANNELS channels follow one another, each with 1 to 8 bits a code. A block's codes are
 * cut into planes of 8, 4, 2 or 1 bits, those that its number of bits is the sum of, and the widest comes first: it has
 * the lowest bits of a code, the next one those above. A plane of so many bits is so many pieces of 64 bytes, like
 * those of 8 or 4 bits: frame by frame four bytes, each with the same frame's codes of channels four apart, the first
 * lowest. */
enum { WKV_PIECE = WKV_TILE * 4, WKV_STRIP = WKV_CHANNELS / 2 };

/* Bytes of a block in a tile. */
WKV_PLACE int64_t wkv_bytes_of_block(int bits) { return (int64_t)bits * WKV_PIECE; }

/* The float of a group's first step. Its leasts begin `channels` later. */
WKV_PLACE int64_t wkv_place_of_steps(int64_t channels, int64_t group) { return group * 2 * channels; }

#endif
