/* Whose queries a block of cross-attention works on. */
#ifndef WHISPERKV_CUDA_QUERIES_H
#define WHISPERKV_CUDA_QUERIES_H
#include "portable.h"

/* How many blocks share out the queries of an audio and head, of which each takes `most` at a time. */
static inline int lots_of(const struct wkv_cross_attention *const a, const int most) {
  const int64_t lots = count_of(count_of(a->rows * a->tokens, a->audios), most);
  return (int)(a->counters ? smaller(lots, a->lots) : lots);
}

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

/* The same by a block, all of whose threads have them then. */
INLINE int find_together(const struct wkv_cross_attention &a, const int64_t audio, const int skipped, const int most,
                         int *const number, int *const found) {
  if (threadIdx.x < WARP) {
    const int queries = find_queries(a, audio, threadIdx.x, skipped, most, number);
    if (threadIdx.x == 0) *found = queries;
  }
  __syncthreads();
  return *found;
}

/* Rows of no audio get zeros: owners cannot be checked without waiting for them. */
template <class T>
INLINE void clear_strays(const struct wkv_cross_attention &a, const int64_t head, const int thread, const int threads) {
  for (int64_t i = thread; i < a.rows * a.tokens; i += threads) {
    const int64_t row = i / a.tokens, owner = a.owner[row];
    if (owner >= 0 && owner < a.audios) continue;
    T *const output = (T *)a.output + (i * a.heads + head) * a.head_dim;
    for (int64_t d = 0; d < a.head_dim; d++) convert(0, output + d);
    const int64_t line = (row * a.heads + head) * a.tokens + i % a.tokens;
    for (int64_t f = 0; a.weights && f < a.frames; f++) a.weights[line * a.frames + f] = 0;
  }
}

#endif
