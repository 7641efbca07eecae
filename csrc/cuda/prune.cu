/* Caches of speech LLMs, whose tokens are pruned for each layer and KV head. What says where heads and tokens stand is
 * read by the device and cannot be checked first: a head whose own is not sound has nothing. */
#include "portable.h"

namespace {

enum {
  THREADS = 128,
  WARPS = THREADS / WARP,
  TOKENS = 32 * WARPS,    /* that a block gathers */
  TILE = WARP,            /* keys in shared memory: a lane has one */
  QUERIES = 16,           /* in shared memory, of the attention that keys receive */
  EACH = QUERIES / WARPS, /* of these has a warp */
  BLOCKS_WANTED = 512,    /* enough to keep a GPU busy: fewer are split over the slots */
  MOST_RANGES = 64
};

template <class T>
INLINE const T *token_of(const struct wkv_view &v, const int64_t row, const int64_t head, const int64_t token) {
  return (const T *)v.data + row * v.row + head * v.head + token * v.token;
}

/* Slots of a head that is in the cache. */
INLINE int64_t length_of(const int32_t *const starts, const int32_t *const lengths, const int64_t head,
                         const int64_t most, const int64_t slots) {
  const int64_t start = starts[head], length = lengths[head];
  return start >= 0 && length >= 0 && length <= most && start + length <= slots ? length : 0;
}

/* ---- gather_kept: a warp takes one token after another ---- */

template <class T> __global__ void __launch_bounds__(THREADS) gather(const struct wkv_gathering g) {
  const int64_t blocks = count_of(g.most, TOKENS), head = blockIdx.x / blocks, first = blockIdx.x % blocks * TOKENS;
  const int64_t row = head / g.kv_heads, its = head % g.kv_heads;
  const int64_t last = smaller(first + TOKENS, length_of(g.starts, g.lengths, head, g.most, g.slots));
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  for (int64_t i = first + warp; i < last; i += WARPS) {
    const int64_t token = g.index[head * g.most + i], place = (g.starts[head] + i) * g.head_dim;
    if (token < 0 || token >= g.tokens) continue;
    const T *const key = token_of<T>(g.keys, row, its, token), *const value = token_of<T>(g.values, row, its, token);
    for (int64_t d = lane; d < g.head_dim; d += WARP) {
      ((T *)g.kept_keys)[place + d] = key[d];
      ((T *)g.kept_values)[place + d] = value[d];
    }
  }
}

template <class T> const char *launch_gather(const struct wkv_gathering *const g, const cudaStream_t stream) {
  const int64_t blocks = g->rows * g->kv_heads * count_of(g->most, TOKENS);
  LAUNCH(gather<T>, dim3((unsigned)blocks), dim3(THREADS), 0, stream, *g);
  return launch_error();
}

/* ---- ragged_attention: a block is one query of all heads of a group, and one range of what they see ---- */

/* Slots that a query sees. */
INLINE int64_t seen_by(const struct wkv_ragged_attention &a, const int64_t head, const int64_t query) {
  return larger(length_of(a.starts, a.lengths, head, a.slots, a.slots) - (a.queries - 1 - query), 0);
}

/* Of each head of the group: where exponentials are counted from, their sum, and what the sums so far weigh. */
struct softmax {
  float top, total, shrink;
};

static size_t shared_of(const struct wkv_ragged_attention &a) {
  const size_t group = (size_t)(a.heads / a.kv_heads), dim = (size_t)a.head_dim;
  return (2 * TILE * (dim + 1) + group * (2 * dim + TILE)) * sizeof(float) + group * sizeof(struct softmax);
}

template <class T> __global__ void __launch_bounds__(THREADS) attend(const struct wkv_ragged_attention a) {
  DYNAMIC_SHARED(room);
  const int64_t dim = a.head_dim, wide = dim + 1; /* so that lanes read from different banks */
  const int group = (int)(a.heads / a.kv_heads), thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
  float *const keys = (float *)room, *const values = keys + TILE * wide;            /* [TILE, wide] */
  float *const queries = values + TILE * wide, *const sums = queries + group * dim; /* [group, dim] */
  float *const weights = sums + group * dim;                                        /* [group, TILE] */
  struct softmax *const of = (struct softmax *)(weights + group * TILE);
  const int64_t range = blockIdx.x % a.ranges, query = blockIdx.x / a.ranges % a.queries;
  const int64_t head = blockIdx.x / a.ranges / a.queries, row = head / a.kv_heads;
  const int64_t first_head = head % a.kv_heads * group;
  const int64_t seen = seen_by(a, head, query), start = a.starts[head];
  const int64_t first = seen * range / a.ranges, last = seen * (range + 1) / a.ranges;

  for (int64_t i = thread; i < group * dim; i += THREADS) {
    queries[i] = to_float(token_of<T>(a.query, row, first_head + i / dim, query)[i % dim]);
    sums[i] = 0;
  }
  for (int h = thread; h < group; h += THREADS) {
    of[h].top = -FLT_MAX; /* finite, so that logits of -inf weigh 0 and are not subtracted from each other */
    of[h].total = 0;
  }
  __syncthreads();
  for (int64_t slot = first; slot < last; slot += TILE) {
    const int count = (int)smaller(TILE, last - slot);
    const int64_t from = (start + slot) * dim;
    for (int64_t i = thread; i < count * dim; i += THREADS) {
      keys[i / dim * wide + i % dim] = to_float(((const T *)a.keys)[from + i]);
      values[i / dim * wide + i % dim] = to_float(((const T *)a.values)[from + i]);
    }
    __syncthreads();
    for (int h = warp; h < group; h += WARPS) {
      float logit = 0;
      for (int64_t d = 0; d < dim && lane < count; d++)
        logit = fmaf(queries[h * dim + d], keys[lane * wide + d], logit);
      logit *= a.scale;
      if (a.bias && lane < count) logit += a.bias[start + slot + lane];
      const float before = of[h].top, top = fmaxf(before, largest_of_warp(lane < count ? logit : -FLT_MAX));
      const float weight = lane < count ? expf(logit - top) : 0, sum = sum_of_warp(weight);
      weights[h * TILE + lane] = weight;
      __syncwarp(); /* all have read what the first lane now writes */
      if (lane > 0) continue;
      of[h].shrink = expf(before - top);
      of[h].total = of[h].total * of[h].shrink + sum;
      of[h].top = top;
    }
    __syncthreads();
    for (int64_t i = thread; i < group * dim; i += THREADS) {
      const int64_t h = i / dim, d = i % dim;
      float sum = sums[i] * of[h].shrink;
      for (int s = 0; s < count; s++) sum = fmaf(weights[h * TILE + s], values[s * wide + d], sum);
      sums[i] = sum;
    }
    __syncthreads();
  }
  const int64_t line = ((range * a.rows + row) * a.queries + query) * a.heads + first_head;
  for (int64_t i = thread; i < group * dim; i += THREADS) a.sums[line * dim + i] = sums[i];
  for (int h = thread; h < group; h += THREADS) {
    a.totals[2 * (line + h)] = of[h].top;
    a.totals[2 * (line + h) + 1] = of[h].total;
  }
}

/* The ranges of one query and head, in their order. */
template <class T> __global__ void __launch_bounds__(THREADS) finish(const struct wkv_ragged_attention a) {
  const int64_t item = blockIdx.x, items = a.rows * a.queries * a.heads, group = a.heads / a.kv_heads;
  const int64_t row = item / a.heads / a.queries, query = item / a.heads % a.queries;
  const int64_t head = row * a.kv_heads + item % a.heads / group;
  const float *const totals = a.totals + 2 * item;
  float top = -FLT_MAX, total = 0;
  for (int64_t r = 0; r < a.ranges; r++) top = fmaxf(top, totals[2 * r * items]);
  for (int64_t r = 0; r < a.ranges; r++) total += totals[2 * r * items + 1] * expf(totals[2 * r * items] - top);
  const bool sees = seen_by(a, head, query) > 0;
  for (int64_t d = threadIdx.x; d < a.head_dim; d += THREADS) {
    float sum = 0;
    for (int64_t r = 0; r < a.ranges; r++)
      sum = fmaf(a.sums[(r * items + item) * a.head_dim + d], expf(totals[2 * r * items] - top), sum);
    convert(sees ? sum / total : 0, (T *)a.output + item * a.head_dim + d);
  }
}

template <class T> const char *launch_attend(const struct wkv_ragged_attention *const a, const cudaStream_t stream) {
  const char *const refused = allow_shared((const void *)attend<T>, shared_of(*a));
  if (refused) return refused;
  LAUNCH(attend<T>, dim3((unsigned)(a->rows * a->kv_heads * a->queries * a->ranges)), dim3(THREADS), shared_of(*a),
         stream, *a);
  LAUNCH(finish<T>, dim3((unsigned)(a->rows * a->queries * a->heads)), dim3(THREADS), 0, stream, *a);
  return launch_error();
}

/* ---- attention_received: what each query counts its exponentials from, and then for each key their sum ---- */

static size_t shared_of(const struct wkv_received &r) {
  return (size_t)(QUERIES * r.head_dim + TILE * (r.head_dim + 1)) * sizeof(float);
}

/* What the threads of a block share: some queries of a group, numbered query * group + head, and some keys. */
struct shared {
  float *queries; /* [QUERIES, head_dim] */
  float *keys;    /* [TILE, head_dim + 1] */
  int64_t *seen;  /* [QUERIES]: keys from the first on; 0: it does not count */
};

template <class T>
INLINE void load_queries(const struct wkv_received &r, const struct shared &s, const int64_t head,
                         const int64_t first) {
  const int64_t row = head / r.kv_heads, group = r.heads / r.kv_heads, dim = r.head_dim;
  const int64_t count = smaller(QUERIES, r.queries * group - first);
  for (int64_t i = threadIdx.x; i < QUERIES * dim; i += THREADS) {
    const int64_t number = first + smaller(i / dim, count - 1);
    s.queries[i] = to_float(
        token_of<T>(r.query, row, head % r.kv_heads * group + number % group, number / group)[i % dim]);
  }
  for (int q = threadIdx.x; q < QUERIES; q += THREADS) {
    const int64_t position = q < count ? r.positions[(first + q) / group] : -1;
    const bool counts = position >= 0 && position < r.tokens && r.visible[row * r.visible_row + position];
    s.seen[q] = counts ? position + 1 : 0;
  }
}

template <class T>
INLINE void load_keys(const struct wkv_received &r, const struct shared &s, const int64_t head, const int64_t first) {
  const int64_t row = head / r.kv_heads, dim = r.head_dim, count = smaller(TILE, r.tokens - first);
  for (int64_t i = threadIdx.x; i < TILE * dim; i += THREADS) {
    const int64_t key = smaller(i / dim, count - 1);
    s.keys[i / dim * (dim + 1) + i % dim] = to_float(token_of<T>(r.keys, row, head % r.kv_heads, first + key)[i % dim]);
  }
}

/* The logits of this warp's queries with this lane's key. */
INLINE void score(const struct wkv_received &r, const struct shared &s, float logits[EACH]) {
  const float *const key = s.keys + threadIdx.x % WARP * (r.head_dim + 1);
  const float *const queries = s.queries + threadIdx.x / WARP * EACH * r.head_dim;
  for (int e = 0; e < EACH; e++) logits[e] = 0;
  for (int64_t d = 0; d < r.head_dim; d++)
    for (int e = 0; e < EACH; e++) logits[e] = fmaf(queries[e * r.head_dim + d], key[d], logits[e]);
  for (int e = 0; e < EACH; e++) logits[e] *= r.scale;
}

/* Keys that one of the queries sees. */
INLINE int64_t furthest(const struct shared &s) {
  int64_t most = 0;
  for (int q = 0; q < QUERIES; q++) most = larger(most, s.seen[q]);
  return most;
}

#define SHARE(r, name) \
  DYNAMIC_SHARED(room); \
  __shared__ int64_t seen_by_queries[QUERIES]; \
  const struct shared name = {(float *)room, (float *)room + QUERIES * r.head_dim, seen_by_queries}

/* A block is some queries of a group: it goes over the keys. */
template <class T> __global__ void __launch_bounds__(THREADS) measure(const struct wkv_received r) {
  SHARE(r, s);
  const int64_t numbers = r.queries * (r.heads / r.kv_heads), lots = count_of(numbers, QUERIES);
  const int64_t head = blockIdx.x / lots, first = blockIdx.x % lots * QUERIES;
  const int lane = threadIdx.x % WARP, mine = threadIdx.x / WARP * EACH;
  const uint8_t *const visible = r.visible + head / r.kv_heads * r.visible_row;
  float top[EACH], total[EACH];
  for (int e = 0; e < EACH; e++) top[e] = -FLT_MAX, total[e] = 0;
  load_queries<T>(r, s, head, first);
  __syncthreads();
  const int64_t last = furthest(s);
  for (int64_t tile = 0; tile < last; tile += TILE) {
    load_keys<T>(r, s, head, tile);
    __syncthreads();
    float logits[EACH];
    score(r, s, logits);
    const int64_t key = tile + lane;
    for (int e = 0; e < EACH; e++) {
      const bool is_seen = key < s.seen[mine + e] && visible[key];
      const float before = top[e];
      top[e] = fmaxf(before, largest_of_warp(is_seen ? logits[e] : -FLT_MAX));
      total[e] = total[e] * expf(before - top[e]) + sum_of_warp(is_seen ? expf(logits[e] - top[e]) : 0);
    }
    __syncthreads(); /* the keys are loaded anew */
  }
  for (int e = 0; e < EACH && lane == 0; e++) {
    if (first + mine + e >= numbers) break;
    float *const sums = r.sums + 2 * (head * numbers + first + mine + e);
    sums[0] = top[e];
    sums[1] = total[e];
  }
}

/* A block is some keys: it goes over the queries. */
template <class T> __global__ void __launch_bounds__(THREADS) add_up(const struct wkv_received r) {
  SHARE(r, s);
  __shared__ float of_warps[WARPS][TILE];
  const int64_t numbers = r.queries * (r.heads / r.kv_heads), tiles = count_of(r.tokens, TILE);
  const int64_t head = blockIdx.x / tiles, tile = blockIdx.x % tiles * TILE;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t key = tile + lane;
  const bool is_visible = key < r.tokens && r.visible[head / r.kv_heads * r.visible_row + key];
  float sum = 0;
  load_keys<T>(r, s, head, tile);
  for (int64_t first = 0; first < numbers; first += QUERIES) {
    load_queries<T>(r, s, head, first);
    __syncthreads();
    if (furthest(s) > tile) {
      float logits[EACH];
      score(r, s, logits);
      for (int e = 0; e < EACH; e++) {
        if (!is_visible || key >= s.seen[warp * EACH + e]) continue;
        const float *const sums = r.sums + 2 * (head * numbers + first + warp * EACH + e);
        sum += expf(logits[e] - sums[0]) / sums[1];
      }
    }
    __syncthreads(); /* the queries are loaded anew */
  }
  of_warps[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || key >= r.tokens) return;
  sum = 0;
  for (int w = 0; w < WARPS; w++) sum += of_warps[w][lane];
  r.received[head * r.tokens + key] = sum;
}

template <class T> const char *launch_receive(const struct wkv_received *const r, const cudaStream_t stream) {
  const int64_t heads = r->rows * r->kv_heads, numbers = r->queries * (r->heads / r->kv_heads);
  const size_t bytes = shared_of(*r);
  const char *const refused = allow_shared((const void *)measure<T>, bytes);
  if (refused || allow_shared((const void *)add_up<T>, bytes)) return refused;
  LAUNCH(measure<T>, dim3((unsigned)(heads * count_of(numbers, QUERIES))), dim3(THREADS), bytes, stream, *r);
  LAUNCH(add_up<T>, dim3((unsigned)(heads * count_of(r->tokens, TILE))), dim3(THREADS), bytes, stream, *r);
  return launch_error();
}

} // namespace

extern "C" const char *wkv_cuda_gather_kept(const struct wkv_gathering *const g, void *const stream) {
  return g->rows ? FOR_DTYPE(g->dtype, launch_gather, g, (cudaStream_t)stream) : NULL;
}

extern "C" void wkv_cuda_ragged_plan(struct wkv_ragged_attention *const a) {
  const int64_t blocks = a->rows * a->kv_heads * a->queries;
  a->ranges = larger(smaller(smaller(BLOCKS_WANTED / blocks, MOST_RANGES), count_of(a->slots, 2 * TILE)), 1);
}

extern "C" const char *wkv_cuda_ragged_attention(const struct wkv_ragged_attention *const a, void *const stream) {
  return a->rows ? FOR_DTYPE(a->dtype, launch_attend, a, (cudaStream_t)stream) : NULL;
}

extern "C" const char *wkv_cuda_attention_received(const struct wkv_received *const r, void *const stream) {
  return r->rows ? FOR_DTYPE(r->dtype, launch_receive, r, (cudaStream_t)stream) : NULL;
}
