/* Cross-attention over one cache for each audio: the launches, and the kernel that takes what cross_heads.h and
 * cross_latent.h do not: float32, and widths and groups that no Whisper has. Its block takes one head of
 * one audio over a range of frames: the queries of all beams (and in the latent formats of all heads) go over each tile
 * of frames together, sixteen of them for the tensor cores. What is packed becomes numbers of the model's dtype on its
 * way to shared memory. */
#include "cross_heads.h"
#include "cross_latent.h"
#include "ranges.h"
#include "tiles.h"

namespace {

enum {
  QUERIES = TILE_ROWS, /* that a block works on together */
  NARROW = 64,         /* channels of a head of Whisper's */
  NARROW_BLOCKS = 528, /* wanted at least, or the frames are split: a few for each multiprocessor of a large GPU */
  WIDE_BLOCKS = 264,
  LATENT_BLOCKS = 132, /* at most, unless there is more work without a split */
};

/* How a block works. */
template <class T_, int BITS_, int FRAMES_, int TILES_, int WARPS_, int BLOCKS_> struct plan {
  typedef T_ T;
  enum {
    BITS = BITS_,
    IS_MIXED = BITS_ == WKV_MIXED,
    FRAMES = FRAMES_, /* worked on at a time */
    TILES = TILES_,   /* of the output that a warp has in its registers */
    WARPS = WARPS_,   /* at most */
    BLOCKS = BLOCKS_, /* that a multiprocessor has registers for */
    COLUMNS = FRAMES / TILE_COLUMNS,
    CHANNELS = TILES * WARPS * TILE_COLUMNS,
    PAD = sizeof(piece) / sizeof(T), /* so that rows begin in different banks */
    LINE = FRAMES + 8,               /* of logits, for the same end */
  };
};

template <class T, int BITS> using narrow = plan<T, BITS, 64, 2, 4, 5>;
template <class T, int BITS> using wide = plan<T, BITS, 16, 20, 8, 1>; /* a latent one: all channels of the model */

/* Everything in shared memory. */
template <class P> struct room {
  typedef typename P::T T;
  T *query;                    /* [QUERIES, channels + PAD] */
  T *tiles[2];                 /* of keys and values [FRAMES, channels + PAD]; in the latent formats the same memory */
  float *logits;               /* [slices, QUERIES, LINE]: of a part of the channels each */
  T *weights;                  /* [QUERIES, FRAMES + PAD] */
  float *top, *total, *shrink; /* [QUERIES]: largest logit, sum of exponentials, what the sums so far weigh now */
  int *number;                 /* [QUERIES]: row * tokens + token of each query */
  size_t bytes;

  __host__ __device__ room(char *const memory, const int channels, const bool apart, const int slices) : bytes(0) {
    const size_t row = channels + P::PAD;
    take(memory, &query, QUERIES * row);
    take(memory, &tiles[0], P::FRAMES * row);
    if (apart) take(memory, &tiles[1], P::FRAMES * row);
    else tiles[1] = tiles[0];
    take(memory, &logits, (size_t)slices * QUERIES * P::LINE);
    take(memory, &weights, QUERIES * (P::FRAMES + P::PAD));
    take(memory, &top, QUERIES);
    take(memory, &total, QUERIES);
    take(memory, &shrink, QUERIES);
    take(memory, &number, QUERIES);
  }

  template <class N> __host__ __device__ void take(char *const memory, N **const place, const size_t count) {
    *place = (N *)(memory + bytes); /* an integer in between would lose that it is shared memory */
    bytes += (count * sizeof(N) + sizeof(piece) - 1) / sizeof(piece) * sizeof(piece);
  }
};

/* What does not change over a block. */
struct block {
  int64_t audio, head, split, matrix; /* matrix: audio * heads + head */
  int length, first, end;             /* frames of the audio, and the range of them to go over */
  int dim, channels;                  /* channels: dim, padded for the tiles */
  int slices;                         /* of the channels, whose logits are formed by different warps */
  int thread, threads, lane, warp, warps;
};

/* ---- from global to shared memory ---- */

/* Frames of floats; those past the end become zeros, and so do channels past dim. */
template <class P>
__device__ void stage_floats(const struct block &b, const void *const cache, const int64_t frames, const int first,
                             const bool aligned, typename P::T *const to) {
  typedef typename P::T T;
  enum { NUMBERS = sizeof(piece) / sizeof(T) };
  const T *const from = (const T *)cache + (b.matrix * frames + first) * b.dim;
  const int count = b.channels / NUMBERS, stride = b.channels + P::PAD;
  for (int i = b.thread; i < P::FRAMES * count; i += b.threads) {
    const int frame = i / count, d = i % count * NUMBERS;
    T *const place = to + frame * stride + d;
    const bool exists = first + frame < b.length;
    if (aligned && exists && d < b.dim) {
      copy_piece(place, from + (int64_t)frame * b.dim + d);
      continue;
    }
    for (int n = 0; n < NUMBERS; n++)
      if (exists && d + n < b.dim) place[n] = from[(int64_t)frame * b.dim + d + n];
      else convert(0, place + n);
  }
}

/* Frames of codes: a thread takes those of four frames and a quad of channels, or two quads of 4 bits. */
template <class P>
__device__ void stage_codes(const struct block &b, const uint8_t *const codes, const float *const scales,
                            const int64_t frames, const int64_t group, const int first, typename P::T *const to) {
  typedef typename P::T T;
  enum { QUADS = P::BITS == 8 ? 1 : 2, FOURS = WKV_TILE / 4 };
  const int packed = (int)round_up(b.dim, WKV_CHANNELS), pieces = packed / (4 * QUADS);
  const int64_t tiles = count_of(frames, WKV_TILE), groups = count_of(frames, group);
  const int stride = b.channels + P::PAD;
  for (int i = b.thread; i < P::FRAMES * pieces / 4; i += b.threads) {
    const int four = i % FOURS, quad = i / FOURS % pieces, tile = i / FOURS / pieces;
    const int frame = tile * WKV_TILE + four * 4, channel = quad * 4 * QUADS;
    if (channel >= b.channels) continue;
    T *const place = to + frame * stride + channel;
    if (first + frame >= b.length) { /* of the others past the end, the codes are 0 and the weights will be */
      for (int f = 0; f < 4; f++)
        for (int c = 0; c < 4 * QUADS; c++) convert(0, place + f * stride + c);
      continue;
    }
    const uint8_t *const from = codes + ((b.matrix * tiles + first / WKV_TILE + tile) * pieces + quad) * WKV_TILE * 4;
    const piece some = ((const piece *)from)[four];
    const float *const step = scales + (b.matrix * groups + (first + frame) / group) * 2 * packed + channel;
    const float *const least = step + packed;
    for (int q = 0; q < QUADS; q++)
      for (int f = 0; f < 4; f++)
        for (int c = 0; c < 4; c++) {
          const uint32_t code = P::BITS == 8 ? some.word[f] >> 8 * c & 255 : some.word[f] >> (8 * c + 4 * q) & 15;
          convert(fmaf((float)code, step[4 * q + c], least[4 * q + c]), place + f * stride + 4 * q + c);
        }
  }
}

/* The same of mixed bits: a warp takes a block of channels at a time. */
template <class P>
__device__ void stage_mixed(const struct block &b, const struct wkv_cross_attention &a, const int first,
                            typename P::T *const to) {
  const int packed = (int)round_up(b.dim, WKV_CHANNELS), stride = b.channels + P::PAD;
  const int channel = b.lane / 4 * 4, frame = b.lane % 4 * 4; /* of the block and of the tile */
  const bool exists = first + frame < b.length;
  const int64_t tile = b.matrix * count_of(a.frames, WKV_TILE) + first / WKV_TILE;
  const uint8_t *const from = (const uint8_t *)a.keys + tile * a.tile_bytes;
  const int64_t group = b.matrix * count_of(a.frames, a.group) + (first + frame) / a.group;
  static_assert((int)P::FRAMES == WKV_TILE, "a tile is staged at a time");
  int64_t start = 0;
  for (int block = 0, c0 = channel; block < packed / WKV_CHANNELS; block++, c0 += WKV_CHANNELS) {
    const int bits = bits_of_block(a, block * WKV_CHANNELS, start);
    if (block % b.warps == b.warp && c0 < b.channels) {
      const piece some = exists ? unpack_piece(bits, (const piece *)(from + start), b.lane) : piece{};
      const float *const step = a.key_scales + group * 2 * packed + c0, *const least = step + packed;
      for (int f = 0; f < 4; f++)
        for (int c = 0; c < 4; c++) {
          const float code = (float)(some.word[f] >> 8 * c & 255);
          convert(exists ? fmaf(code, step[c], least[c]) : 0, to + (frame + f) * stride + c0 + c);
        }
    }
    start += wkv_bytes_of_block(bits);
  }
}

template <class P>
__device__ void stage(const struct block &b, const struct wkv_cross_attention &a, const bool values, const int first,
                      const bool aligned, typename P::T *const to) {
  const void *const cache = values ? a.values : a.keys;
  const float *const scales = values ? a.value_scales : a.key_scales;
  if constexpr (P::IS_MIXED) stage_mixed<P>(b, a, first, to);
  else if (P::BITS != 0) stage_codes<P>(b, (const uint8_t *)cache, scales, a.frames, a.group, first, to);
  else stage_floats<P>(b, cache, a.frames, first, aligned, to);
}

template <class P>
__device__ void load_queries(const struct block &b, const struct wkv_cross_attention &a, const int queries,
                             const room<P> &r) {
  typedef typename P::T T;
  const int stride = b.channels + P::PAD;
  for (int i = b.thread; i < QUERIES * b.channels; i += b.threads) {
    const int query = i / b.channels, d = i % b.channels;
    T *const place = r.query + query * stride + d;
    const bool exists = query < queries && d < b.dim;
    const int64_t item = exists ? (int64_t)r.number[query] * a.heads + b.head : 0;
    if (exists) *place = ((const T *)a.query)[item * b.dim + d];
    else convert(0, place);
  }
}

/* ---- a tile of frames ---- */

/* Logits, not yet scaled. A warp forms one column of tiles over one slice of the channels. */
template <class P> __device__ void score(const struct block &b, const room<P> &r) {
  typedef typename P::T T;
  const int stride = b.channels + P::PAD, depths = b.channels / TILE_DEPTH;
  for (int unit = b.warp; unit < P::COLUMNS * b.slices; unit += b.warps) {
    const int column = unit % P::COLUMNS, slice = unit / P::COLUMNS;
    float sums[4] = {0};
    for (int k = depths * slice / b.slices; k < depths * (slice + 1) / b.slices; k++) {
      left_tile<T> query;
      right_tile<T> keys;
      load(&query, r.query + k * TILE_DEPTH, stride, b.lane);
      load_turned(&keys, r.tiles[0] + column * TILE_COLUMNS * stride + k * TILE_DEPTH, stride, b.lane);
      multiply(sums, query, keys);
    }
    float *const logits = r.logits + slice * QUERIES * P::LINE + column * TILE_COLUMNS + column_of(b.lane, 0);
    for (int s = 0; s < 4; s += 2) *(pair *)(logits + row_of(b.lane, s) * P::LINE) = {sums[s], sums[s + 1]};
  }
}

/* Exponentials of a tile's logits, a query to a warp; the sums so far are to shrink whenever it holds a larger one. */
template <class P>
__device__ void soften(const struct block &b, const struct wkv_cross_attention &a, const int queries, const int first,
                       const room<P> &r) {
  enum { EACH = (P::FRAMES + WARP - 1) / WARP };
  for (int query = b.warp; query < queries; query += b.warps) {
    float logit[EACH], top = r.top[query];
    for (int i = 0; i < EACH; i++) {
      const int frame = b.lane + i * WARP;
      logit[i] = -INFINITY;
      if (frame >= P::FRAMES || first + frame >= b.length) continue;
      float sum = 0;
      for (int slice = 0; slice < b.slices; slice++) sum += r.logits[(slice * QUERIES + query) * P::LINE + frame];
      logit[i] = sum * a.scale;
      if (a.bias) logit[i] += a.bias[b.audio * a.frames + first + frame];
      top = fmaxf(top, logit[i]);
      if (a.weights) {
        const int64_t row = r.number[query] / a.tokens, token = r.number[query] % a.tokens;
        a.weights[((row * a.heads + b.head) * a.tokens + token) * a.frames + first + frame] = logit[i];
      }
    }
    top = largest_of_warp(top);
    float sum = 0;
    for (int i = 0; i < EACH; i++) {
      const int frame = b.lane + i * WARP;
      const float weight = expf(logit[i] - top);
      if (frame < P::FRAMES) convert(weight, r.weights + query * (P::FRAMES + P::PAD) + frame);
      sum += weight;
    }
    sum = sum_of_warp(sum);
    if (b.lane > 0) continue;
    const float shrink = expf(r.top[query] - top);
    r.shrink[query] = shrink;
    r.top[query] = top;
    r.total[query] = r.total[query] * shrink + sum;
  }
}

/* sums = shrink * sums + weights * values; a warp has every warps-th tile of channels. */
template <class P> __device__ void mix(const struct block &b, const room<P> &r, float (*const sums)[4]) {
  typedef typename P::T T;
  const int stride = b.channels + P::PAD;
  const float shrink[] = {r.shrink[row_of(b.lane, 0)], r.shrink[row_of(b.lane, 2)]};
#pragma unroll
  for (int t = 0; t < P::TILES; t++)
#pragma unroll
    for (int s = 0; s < 4; s++) sums[t][s] *= shrink[s / 2];
  for (int k = 0; k < P::FRAMES; k += TILE_DEPTH) {
    left_tile<T> weights;
    load(&weights, r.weights + k, P::FRAMES + P::PAD, b.lane);
#pragma unroll
    for (int t = 0; t < P::TILES; t++) {
      const int channel = (b.warp + t * b.warps) * TILE_COLUMNS;
      if (channel < b.channels) {
        right_tile<T> values;
        load(&values, r.tiles[1] + k * stride + channel, stride, b.lane);
        multiply(sums[t], weights, values);
      }
    }
  }
}

/* The means of the values, or what ranges.h makes them of. */
template <class P>
__device__ void store(const struct block &b, const struct wkv_cross_attention &a, const int queries, const room<P> &r,
                      const float (*const sums)[4]) {
  typedef typename P::T T;
  const int64_t padded = round_up(a.head_dim, WKV_CHANNELS), before = b.split * a.rows * a.tokens * a.heads;
#pragma unroll
  for (int t = 0; t < P::TILES; t++)
#pragma unroll
    for (int s = 0; s < 4; s++) {
      const int query = row_of(b.lane, s), channel = (b.warp + t * b.warps) * TILE_COLUMNS + column_of(b.lane, s);
      if (query >= queries || channel >= b.dim) continue;
      const int64_t item = (int64_t)r.number[query] * a.heads + b.head;
      if (a.sums) a.sums[(before + item) * padded + channel] = sums[t][s];
      else convert(sums[t][s] / r.total[query], (T *)a.output + item * b.dim + channel);
    }
  for (int query = b.thread; query < queries && a.sums; query += b.threads) {
    float *const totals = a.totals + 2 * (before + (int64_t)r.number[query] * a.heads + b.head);
    totals[0] = r.top[query];
    totals[1] = r.total[query];
  }
}

/* Some queries of the audio over the block's range. Keys of the next tile are on their way while the values of this one
 * are mixed, and values while their keys are scored. */
template <class P>
__device__ void attend_some(const struct block &b, const struct wkv_cross_attention &a, const int queries,
                            const bool apart, const bool aligned, const room<P> &r) {
  float sums[P::TILES][4] = {};
  load_queries<P>(b, a, queries, r);
  for (int query = b.thread; query < QUERIES; query += b.threads) {
    r.top[query] = -FLT_MAX; /* finite, so that logits of -inf weigh 0 and are not subtracted from each other */
    r.total[query] = 0;
    r.shrink[query] = 0;
  }
  for (int i = b.thread; i < QUERIES * (P::FRAMES + P::PAD); i += b.threads) convert(0, r.weights + i);
  if (b.first < b.end) stage<P>(b, a, false, b.first, aligned, r.tiles[0]);
  end_of_copies();
  for (int first = b.first; first < b.end; first += P::FRAMES) {
    const int next = first + P::FRAMES;
    if (apart) stage<P>(b, a, true, first, aligned, r.tiles[1]);
    end_of_copies();
    copies_but<1>();
    __syncthreads();
    score<P>(b, r);
    __syncthreads();
    if (apart && next < b.end) stage<P>(b, a, false, next, aligned, r.tiles[0]);
    end_of_copies();
    soften<P>(b, a, queries, first, r);
    copies_but<1>();
    __syncthreads();
    mix<P>(b, r, sums);
    __syncthreads();
    if (!apart && next < b.end) {
      stage<P>(b, a, false, next, aligned, r.tiles[0]);
      end_of_copies();
    }
  }
  __syncthreads();
  store<P>(b, a, queries, r, sums);
}

/* Grid: audios, heads and splits, and for each of these `lots` blocks, which share out its queries. */
template <class P>
__global__ void __launch_bounds__(P::WARPS *WARP, P::BLOCKS)
    attend(const struct wkv_cross_attention a, const int lots, const int slices, const bool aligned) {
  DYNAMIC_SHARED(memory);
  __shared__ int found;
  const int lot = blockIdx.x % lots;
  const int64_t place = blockIdx.x / lots, tiles = count_of(a.frames, P::FRAMES);
  struct block b;
  b.split = place % a.splits;
  b.matrix = place / a.splits;
  b.audio = b.matrix / a.heads;
  b.head = b.matrix % a.heads;
  b.length = a.lengths[b.audio] < a.frames ? a.lengths[b.audio] : (int)a.frames;
  b.first = (int)(tiles * b.split / a.splits) * P::FRAMES;
  b.end = (int)(tiles * (b.split + 1) / a.splits) * P::FRAMES;
  if (b.end > b.length) b.end = b.length;
  b.dim = (int)a.head_dim;
  b.channels = (int)round_up(b.dim, TILE_DEPTH);
  b.slices = slices;
  b.thread = threadIdx.x;
  b.threads = blockDim.x;
  b.lane = b.thread % WARP;
  b.warp = b.thread / WARP;
  b.warps = b.threads / WARP;
  if (b.audio == 0 && lot == 0 && b.split == 0) clear_strays<typename P::T>(a, b.head, b.thread, b.threads);
  const bool apart = a.keys != a.values;
  const room<P> r(memory, b.channels, apart, slices);
  for (int skipped = lot * QUERIES;; skipped += lots * QUERIES) {
    const int queries = find_together(a, b.audio, skipped, QUERIES, r.number, &found);
    if (queries <= 0) break;
    attend_some<P>(b, a, queries, apart, aligned, r);
    __syncthreads(); /* the numbers of the queries are found anew */
  }
  finish_lot<typename P::T, QUERIES>(a, b.matrix, lot, lots, r.number, &found);
}

/* ---- launches ---- */

bool is_wide(const struct wkv_cross_attention *const a) { return a->head_dim > NARROW || a->bits == WKV_MIXED; }

template <class P> const char *launch_plan(const struct wkv_cross_attention *const a, const cudaStream_t stream) {
  const int channels = (int)round_up(a->head_dim, TILE_DEPTH), depths = channels / TILE_DEPTH;
  const int warps = smaller(P::WARPS, channels / TILE_COLUMNS); /* none without a tile of the output */
  const int slices = larger(1, smaller(warps / P::COLUMNS, depths));
  const int lots = lots_of(a, QUERIES);
  const bool aligned = a->head_dim * sizeof(typename P::T) % sizeof(piece) == 0 &&
                       ((uintptr_t)a->keys | (uintptr_t)a->values) % sizeof(piece) == 0;
  const room<P> r(NULL, channels, a->keys != a->values, slices);
  if (channels > P::CHANNELS) return "heads are too wide: there are CUDA kernels for up to 1280 channels";
  const char *const refused = allow_shared((const void *)attend<P>, r.bytes);
  if (refused) return refused;
  const dim3 grid(a->audios * a->heads * a->splits * lots);
  LAUNCH(attend<P>, grid, dim3(warps * WARP), r.bytes, stream, *a, lots, slices, aligned);
  return launch_error();
}

template <class T, int BITS>
const char *launch_bits(const struct wkv_cross_attention *const a, const cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if constexpr (BITS != WKV_MIXED)
      if (heads::can(a)) return heads::launch<T, BITS>(a, stream);
    if (latent::can(a)) return latent::launch<T, BITS>(a, stream);
  }
  if constexpr (BITS == WKV_MIXED) return launch_plan<wide<T, BITS>>(a, stream);
  else return is_wide(a) ? launch_plan<wide<T, BITS>>(a, stream) : launch_plan<narrow<T, BITS>>(a, stream);
}

template <class T> const char *launch(const struct wkv_cross_attention *const a, const cudaStream_t stream) {
  const char *const failed = a->bits == 8   ? launch_bits<T, 8>(a, stream)
                             : a->bits == 4 ? launch_bits<T, 4>(a, stream)
                             : a->bits == 0 ? launch_bits<T, 0>(a, stream)
                                            : launch_bits<T, WKV_MIXED>(a, stream);
  if (failed || !a->sums || a->counters) return failed;
  LAUNCH(finish<T>, dim3(a->rows * a->tokens * a->heads), dim3(FINISH_THREADS), 0, stream, *a);
  return launch_error();
}

} // namespace

extern "C" void wkv_cuda_cross_plan(struct wkv_cross_attention *const a) {
  if (is_wide(a) || a->lots < 1) a->counters = NULL; /* the last block alone would be long over so many bytes */
  const int64_t least_frames = is_wide(a) ? 32 : 64; /* of a range, or adding the ranges up costs more than it brings */
  const int64_t ranges = count_of(a->frames, least_frames), blocks = a->audios * a->heads;
  if (latent::can(a)) { /* whole rounds of blocks, one to a multiprocessor: sums of more ranges would cost more */
    const int64_t lots = count_of(count_of(a->rows * a->tokens, larger(a->audios, 1)), latent::QUERIES);
    a->splits = larger(1, smaller(ranges, LATENT_BLOCKS / larger(blocks * lots, 1)));
    return;
  }
  a->splits = smaller(ranges, count_of(is_wide(a) ? WIDE_BLOCKS : NARROW_BLOCKS, blocks));
}

extern "C" const char *wkv_cuda_cross_attention(const struct wkv_cross_attention *const a, void *const stream) {
  return a->rows && a->tokens ? FOR_DTYPE(a->dtype, launch, a, (cudaStream_t)stream) : NULL;
}
