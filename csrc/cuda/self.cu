/* Self-attention over the slots of the cache, and eviction from it. */
#include "../policies.h"
#include "portable.h"

namespace {

enum {
  THREADS = 128,
  WARPS = THREADS / WARP,
  NUMBERS = 8,               /* of a key or value that a thread takes at once */
  LANES = 8,                 /* threads that share a key, or a strip of the values */
  STRIP = LANES * NUMBERS,   /* channels: a head of Whisper's has 64 */
  SHARERS = THREADS / LANES, /* of the slots */
  TOGETHER = 4,              /* slots of one sharer whose keys are on their way at once */
};

/* n <= NUMBERS numbers, zeros after them. */
template <class T> INLINE void load(const T *const from, const int64_t n, const bool aligned, float *const to) {
  if (n >= NUMBERS && aligned) {
    union {
      piece pieces[sizeof(T) * NUMBERS / sizeof(piece)];
      T numbers[NUMBERS];
    } x;
#pragma unroll
    for (int i = 0; i < (int)(sizeof(T) * NUMBERS / sizeof(piece)); i++) x.pieces[i] = ((const piece *)from)[i];
#pragma unroll
    for (int i = 0; i < NUMBERS; i++) to[i] = to_float(x.numbers[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < NUMBERS; i++) to[i] = i < n ? to_float(from[i]) : 0;
}

/* Over the block, in a fixed order; every thread gets it. */
__device__ float reduce(float x, const bool to_largest) {
  __shared__ float of_warps[WARPS];
  x = to_largest ? largest_of_warp(x) : sum_of_warp(x);
  __syncthreads(); /* of_warps may still be read from the time before */
  if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = x;
  __syncthreads();
  x = of_warps[0];
  for (int i = 1; i < WARPS; i++) x = to_largest ? fmaxf(x, of_warps[i]) : x + of_warps[i];
  return x;
}

/* ---- compact_attention: a block is one head of one row. Those that share a KV head all write the same numbers to it,
 * each before it reads them. ---- */

template <class T, bool BY_TABLE>
__global__ void __launch_bounds__(THREADS) attend(const struct wkv_attention a, const bool aligned) {
  DYNAMIC_SHARED(room);
  float *const logits = (float *)room, *const query = logits + a.slots, *const sums = query + a.head_dim;
  int32_t *const away = (int32_t *)(sums + SHARERS * STRIP); /* of each slot: how many rows on it is held */
  const int64_t head = blockIdx.x % a.heads, row = blockIdx.x / a.heads, dim = a.head_dim;
  const int thread = threadIdx.x, lane = thread % LANES, sharer = thread / LANES;
  const int64_t kv_head = head / (a.heads / a.kv_heads);
  T *const keys = (T *)a.keys + (row * a.kv_heads + kv_head) * a.slots * dim;
  T *const values = a.values ? (T *)a.values + (row * a.kv_heads + kv_head) * a.slots * dim : keys;
  int64_t live = a.cursor[WKV_LIVE * a.rows + row], slot = a.cursor[WKV_SLOT * a.rows + row];
  const int64_t seen = a.cursor[WKV_SEEN * a.rows + row];
  for (int64_t s = thread; BY_TABLE && s < a.slots; s += THREADS) {
    const int64_t source = a.sources[row * a.slots + s];
    const bool is_new = s >= slot && s < slot + a.tokens;
    away[s] = (int32_t)(!is_new && source >= 0 && source < a.rows ? source - row : 0);
  }
  const int64_t whole_row = a.kv_heads * a.slots * dim;

  for (int64_t token = 0; token < a.tokens; token++) {
    const int64_t from = ((row * a.tokens + token) * a.heads + head) * dim;
    T *const output = (T *)a.output + from;
    float *const weights = a.weights ? a.weights + ((row * a.heads + head) * a.tokens + token) * a.slots : NULL;
    /* A cursor cannot be checked without waiting for it: one that is not sound gets the answer of padding. */
    if (seen + token < 0 || slot < 0 || slot >= a.slots || live < 0 || live > a.slots) {
      for (int64_t d = thread; d < dim; d += THREADS) convert(0, output + d);
      for (int64_t s = thread; weights && s < a.slots; s += THREADS) weights[s] = 0;
      continue;
    }
    const int64_t kv_from = ((row * a.tokens + token) * a.kv_heads + kv_head) * dim;
    for (int64_t d = thread; d < dim; d += THREADS) {
      keys[slot * dim + d] = ((const T *)a.key)[kv_from + d];
      if (a.values) values[slot * dim + d] = ((const T *)a.value)[kv_from + d];
      query[d] = to_float(((const T *)a.query)[from + d]) * a.scale;
    }
    slot++;
    live = slot > live ? slot : live;
    __syncthreads();

    float top = -FLT_MAX; /* finite, so that logits of -inf weigh 0 and are not subtracted from each other */
    for (int64_t first = 0; first < live; first += SHARERS * TOGETHER) {
      float sums_of[TOGETHER] = {0};
      for (int64_t d = lane * NUMBERS; d < dim; d += STRIP)
#pragma unroll
        for (int t = 0; t < TOGETHER; t++) {
          const int64_t s = first + t * SHARERS + sharer;
          float key[NUMBERS];
          const T *const held = BY_TABLE && s < live ? keys + away[s] * whole_row : keys;
          load(held + s * dim + d, s < live ? dim - d : 0, aligned, key);
          for (int i = 0; i < NUMBERS && d + i < dim; i++) sums_of[t] = fmaf(query[d + i], key[i], sums_of[t]);
        }
      for (int t = 0; t < TOGETHER; t++) {
        const int64_t s = first + t * SHARERS + sharer;
        const float logit = sum_of_warp(sums_of[t], LANES);
        if (s < live && lane == 0) logits[s] = logit;
        if (s < live) top = fmaxf(top, logit);
      }
    }
    top = reduce(top, true);
    float total = 0;
    for (int64_t s = thread; s < live; s += THREADS) total += logits[s] = expf(logits[s] - top);
    total = reduce(total, false);

    for (int64_t start = 0; start < dim; start += STRIP) {
      const int64_t d = start + lane * NUMBERS;
      float sum[NUMBERS] = {0};
#pragma unroll 4
      for (int64_t s = sharer; s < live && d < dim; s += SHARERS) {
        float value[NUMBERS];
        const T *const held = BY_TABLE ? values + away[s] * whole_row : values;
        load(held + s * dim + d, dim - d, aligned, value);
        for (int i = 0; i < NUMBERS; i++) sum[i] = fmaf(logits[s], value[i], sum[i]);
      }
      for (int i = 0; i < NUMBERS; i++) sums[sharer * STRIP + lane * NUMBERS + i] = sum[i];
      __syncthreads();
      if (thread < STRIP && start + thread < dim) {
        float all = 0;
        for (int i = 0; i < SHARERS; i++) all += sums[i * STRIP + thread];
        convert(all / total, output + start + thread);
      }
      __syncthreads();
    }
    for (int64_t s = thread; weights && s < a.slots; s += THREADS) weights[s] = s < live ? logits[s] / total : 0;
    __syncthreads(); /* logits and query are written anew */
  }
}

template <class T> const char *launch_attend(const struct wkv_attention *const a, const cudaStream_t stream) {
  const bool aligned = a->head_dim * sizeof(T) % sizeof(piece) == 0 && (uintptr_t)a->keys % sizeof(piece) == 0 &&
                       (uintptr_t)a->values % sizeof(piece) == 0;
  const size_t table = a->sources ? a->slots * sizeof(int32_t) : 0;
  const size_t shared = (a->slots + a->head_dim + SHARERS * STRIP) * sizeof(float) + table;
  const auto kernel = a->sources ? attend<T, true> : attend<T, false>;
  const char *const refused = allow_shared((const void *)kernel, shared);
  if (refused) return refused;
  LAUNCH(kernel, dim3(a->rows * a->heads), dim3(THREADS), shared, stream, *a, aligned);
  return launch_error();
}

/* ---- score_evict: a block is one row ---- */

/* Squared length of the key in a slot, over all heads. */
template <class T> __device__ float key_norm(const struct wkv_eviction &e, const int64_t row, const int64_t slot) {
  float sum = 0;
  for (int64_t i = threadIdx.x; i < e.heads * e.head_dim; i += THREADS) {
    const int64_t head = i / e.head_dim, d = i % e.head_dim;
    const float x = to_float(((const T *)e.keys)[((row * e.heads + head) * e.slots + slot) * e.head_dim + d]);
    sum = fmaf(x, x, sum);
  }
  return reduce(sum, false);
}

__device__ float apply(const int policy, const struct wkv_token token) {
  int number = 0;
#define APPLY(name, reads_attention, reads_key_norm) \
  if (policy == number++) return wkv_##name(token);
  WKV_POLICIES(APPLY)
  return 0;
}

__device__ bool reads_attention(const int policy) {
  int number = 0;
#define READS_ATTENTION(name, attention, key_norm) \
  if (policy == number++) return attention;
  WKV_POLICIES(READS_ATTENTION)
  return false;
}

__device__ bool reads_key_norm(const int policy) {
  int number = 0;
#define READS_KEY_NORM(name, attention, key_norm) \
  if (policy == number++) return key_norm;
  WKV_POLICIES(READS_KEY_NORM)
  return false;
}

/* What stands in the way of evicting a slot; the least goes first. */
enum reluctance { EVICTABLE, NOT_A_NUMBER, RECENT, PINNED, DEAD };

struct candidate {
  int reluctance;
  float score;
  int32_t age; /* the lower the older; reversed among pinned tokens */
  int32_t slot;
};

__device__ bool goes_before(const struct candidate &a, const struct candidate &b) {
  return a.reluctance != b.reluctance ? a.reluctance < b.reluctance
         : a.score != b.score         ? a.score < b.score
         : a.age != b.age             ? a.age < b.age
                                      : a.slot < b.slot;
}

/* The candidate that goes first, over the block; the first thread gets it. */
__device__ struct candidate first_of_block(struct candidate first) {
  __shared__ struct candidate of_warps[WARPS];
  for (int lane = WARP / 2; lane; lane /= 2) {
    struct candidate other;
    other.reluctance = __shfl_xor_sync(ALL_LANES, first.reluctance, lane);
    other.score = __shfl_xor_sync(ALL_LANES, first.score, lane);
    other.age = __shfl_xor_sync(ALL_LANES, first.age, lane);
    other.slot = __shfl_xor_sync(ALL_LANES, first.slot, lane);
    if (goes_before(other, first)) first = other;
  }
  __syncthreads();
  if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = first;
  __syncthreads();
  for (int i = 0; i < WARPS && threadIdx.x == 0; i++)
    if (goes_before(of_warps[i], first)) first = of_warps[i];
  return first;
}

template <class T> __global__ void __launch_bounds__(THREADS) evict(const struct wkv_eviction e) {
  __shared__ int64_t chosen;
  const int64_t row = blockIdx.x, pinned = e.cursor[WKV_PINNED * e.rows + row];
  int32_t *const cursor = e.cursor + row, *const positions = e.positions + row * e.slots;
  float *const scores = e.scores + row * e.slots;
  int64_t live = cursor[WKV_LIVE * e.rows], slot = cursor[WKV_SLOT * e.rows], seen = cursor[WKV_SEEN * e.rows];
  __syncthreads(); /* all have read the cursor before the first thread writes it */
  if (slot < 0 || slot >= e.slots || live < 0 || live > e.slots) return;

  for (int64_t token = 0; token < e.tokens; token++) {
    if (seen >= 0 && slot < e.slots) {
      if (threadIdx.x == 0) positions[slot] = (int32_t)seen;
      live = slot + 1 > live ? slot + 1 : live;
      const float norm = reads_key_norm(e.policy) ? key_norm<T>(e, row, slot) : 0;
      __syncthreads();
      for (int64_t s = threadIdx.x; s < live; s += THREADS) {
        float attention = 0;
        for (int64_t head = 0; head < e.heads && reads_attention(e.policy); head++)
          attention += e.weights[((row * e.heads + head) * e.tokens + token) * e.slots + s];
        struct wkv_token t;
        t.is_new = s == slot;
        t.score = t.is_new ? 0 : scores[s];
        t.attention = attention;
        t.key_norm = t.is_new ? norm : 0;
        t.position = (float)positions[s];
        t.decay = e.decay;
        scores[s] = apply(e.policy, t);
      }
    }
    seen++;
    slot = live;
    if (live < e.budget) continue;
    struct candidate first = {DEAD, 0, INT32_MAX, INT32_MAX};
    for (int64_t s = threadIdx.x; s < live; s += THREADS) { /* those that this thread has scored */
      const int64_t position = positions[s];
      struct candidate next;
      next.reluctance = position < pinned            ? PINNED
                        : position > seen - e.recent ? RECENT
                        : scores[s] != scores[s]     ? NOT_A_NUMBER
                                                     : EVICTABLE;
      next.score = next.reluctance == EVICTABLE ? scores[s] : 0;
      next.age = (int32_t)(next.reluctance == PINNED ? -position : position);
      next.slot = (int32_t)s;
      if (goes_before(next, first)) first = next;
    }
    first = first_of_block(first);
    if (threadIdx.x == 0) chosen = first.slot;
    __syncthreads();
    slot = chosen;
    __syncthreads();
  }
  if (threadIdx.x > 0) return;
  cursor[WKV_LIVE * e.rows] = (int32_t)live;
  cursor[WKV_SLOT * e.rows] = (int32_t)slot;
  cursor[WKV_SEEN * e.rows] = (int32_t)seen;
}

template <class T> const char *launch_evict(const struct wkv_eviction *const e, const cudaStream_t stream) {
  LAUNCH(evict<T>, dim3(e->rows), dim3(THREADS), 0, stream, *e);
  return launch_error();
}

} // namespace

extern "C" const char *wkv_cuda_compact_attention(const struct wkv_attention *const a, void *const stream) {
  return a->rows ? FOR_DTYPE(a->dtype, launch_attend, a, (cudaStream_t)stream) : NULL;
}

extern "C" const char *wkv_cuda_score_evict(const struct wkv_eviction *const e, void *const stream) {
  return e->rows ? FOR_DTYPE(e->dtype, launch_evict, e, (cudaStream_t)stream) : NULL;
}
