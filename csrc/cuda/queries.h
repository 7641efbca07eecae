/* Whose queries a block of cross-attention works on. */
#ifndef WHISPERKV_CUDA_QUERIES_H
#define WHISPERKV_CUDA_QUERIES_H
#include "portable.h"

/* The numbers (row * tokens + token) of the queries of an audio from the skipped-th on, `most` of them, by one warp.
 * Returns how many there are. */
INLINE int find_queries(const struct wkv_cross_attention &a, const int64_t audio, const int lane, const int skipped,
                        const int most, int *const number) {
  int before = 0; /* rows of this audio so far */
  for (int64_t first = 0; first < a.rows; first += WARP) {
    const int64_t row = first + lane;
    const bool is_ours = row < a.rows && a.owner[row] == audio;
    const unsigned ours = __ballot_sync(ALL_LANES, is_ours);
    const int place = before + __popc(ours & ((1u << lane) - 1));
    before += __popc(ours);
    for (int token = 0; is_ours && token < a.tokens; token++) {
      const int64_t query = place * a.tokens + token - skipped;
      if (query >= 0 && query < most) number[query] = (int)(row * a.tokens + token);
    }
  }
  const int64_t left = before * a.tokens - skipped;
  return (int)smaller(left, most);
}

/* Rows of no audio get zeros: owners cannot be checked without waiting for them. */
template <class T>
INLINE void clear_strays(const struct wkv_cross_attention &a, const int64_t head, const int thread, const int threads) {
  for (int64_t i = thread; i < a.rows * a.tokens; i += threads) {
    const int64_t owner = a.owner[i / a.tokens];
    for (int64_t d = 0; d < a.head_dim && (owner < 0 || owner >= a.audios); d++)
      convert(0, (T *)a.output + (i * a.heads + head) * a.head_dim + d);
  }
}

#endif
