/* The sums of the ranges of frames, made into one result: by the last block of those that make them, which saves a
 * launch, or by a kernel of its own where they are many bytes. In either the order is that of the ranges, whichever
 * block comes last, and so are the bits. */
#ifndef WHISPERKV_CUDA_RANGES_H
#define WHISPERKV_CUDA_RANGES_H
#include "queries.h"

/* One head of one query, by so many threads. */
template <class T>
INLINE void add_ranges(const struct wkv_cross_attention &a, const int64_t item, const int thread, const int threads) {
  const int64_t items = a.rows * a.tokens * a.heads, padded = round_up(a.head_dim, WKV_CHANNELS);
  const float *const sums = a.sums + item * padded, *const totals = a.totals + 2 * item;
  T *const output = (T *)a.output + item * a.head_dim;
  float top = -FLT_MAX, total = 0;
  for (int64_t s = 0; s < a.splits; s++) top = fmaxf(top, totals[2 * s * items]);
  for (int64_t s = 0; s < a.splits; s++) total += totals[2 * s * items + 1] * expf(totals[2 * s * items] - top);
  for (int64_t d = thread; d < a.head_dim; d += threads) {
    float sum = 0;
    for (int64_t s = 0; s < a.splits; s++)
      sum = fmaf(sums[s * items * padded + d], expf(totals[2 * s * items] - top), sum);
    convert(sum / total, output + d);
  }
  if (!a.weights) return;
  const int64_t head = item % a.heads, token = item / a.heads % a.tokens, row = item / a.heads / a.tokens;
  const int64_t length = a.lengths[a.owner[row]];
  float *const weights = a.weights + ((row * a.heads + head) * a.tokens + token) * a.frames;
  for (int64_t f = thread; f < a.frames; f += threads) weights[f] = f < length ? expf(weights[f] - top) / total : 0;
}

/* Whether this block is the last of `blocks` that count themselves here: then it sees what the others have written, and
 * the counter is 0 again. */
INLINE bool comes_last(uint32_t *const counter, const int64_t blocks) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence(); /* after the barrier, for all threads of the block */
    is_last = atomicInc(counter, (uint32_t)blocks - 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

/* At the end of a block, whose queries are those of its lot. */
template <class T, int MOST>
INLINE void finish_lot(const struct wkv_cross_attention &a, const int64_t matrix, const int lot, const int lots,
                       int *const number, int *const found) {
  if (!a.sums || !a.counters || !comes_last(a.counters + matrix * lots + lot, a.splits)) return;
  for (int skipped = lot * MOST;; skipped += lots * MOST) {
    const int queries = find_together(a, matrix / a.heads, skipped, MOST, number, found);
    if (queries <= 0) return;
    for (int query = threadIdx.x / WARP; query < queries; query += blockDim.x / WARP)
      add_ranges<T>(a, (int64_t)number[query] * a.heads + matrix % a.heads, threadIdx.x % WARP, WARP);
    __syncthreads(); /* the numbers of the queries are found anew */
  }
}

enum { FINISH_THREADS = 128 };

/* The kernel: a block is one head of one query. Rows of no audio have their zeros. */
template <class T> __global__ void __launch_bounds__(FINISH_THREADS) finish(const struct wkv_cross_attention a) {
  const int64_t audio = a.owner[blockIdx.x / a.heads / a.tokens];
  if (audio >= 0 && audio < a.audios) add_ranges<T>(a, blockIdx.x, threadIdx.x, FINISH_THREADS);
}

#endif
