/* Cross-attention of heads of 64 channels in 16 bits, which every Whisper has. A warp goes over frames of its own and
 * waits for no other: it copies the next tile of keys and values, or of their codes, to shared memory while it works on
 * this one, and holds queries, logits, weights and sums in registers. At the end the warps' sums are added.
 *
 * Codes go to the tensor cores as codes.h says. The step of a channel goes into the query before, and into the sum of
 * the values after; what is the same for all frames of a group is added once. */
#ifndef WHISPERKV_CUDA_CROSS_HEADS_H
#define WHISPERKV_CUDA_CROSS_HEADS_H
#include "codes.h"
#include "ranges.h"
#include "tiles.h"

namespace heads {

enum {
  CHANNELS = 64,
  WARPS = 4,
  THREADS = WARPS * WARP,
  DEPTHS = CHANNELS / TILE_DEPTH,
  STAGES = 2, /* tiles of a warp: one is worked on while another is on its way */
};

template <class T_, int BITS_, int QUERIES_, bool IS_BIASED_> struct plan {
  typedef T_ T;
  enum {
    BITS = BITS_,
    IS_PACKED = BITS != 0,
    IS_BIASED = IS_BIASED_,
    QUERIES = QUERIES_,           /* worked on together: 8 or 16 */
    HALVES = QUERIES / 8,         /* of the tensor cores' rows */
    FRAMES = IS_PACKED ? 32 : 16, /* of a tile */
    COLUMNS = FRAMES / TILE_COLUMNS,
    PIECES = FRAMES * CHANNELS * (IS_PACKED ? BITS : 16) / 128, /* of the keys of a tile, or of its values */
    BLOCKS = QUERIES == 8 ? 4 : 2,                              /* that a multiprocessor has registers for */
  };
};

/* Everything in shared memory. */
template <class P> struct room {
  piece tiles[WARPS][STAGES][2][P::PIECES];     /* keys, values */
  float means[WARPS][P::QUERIES][CHANNELS + 4]; /* not yet divided by the totals */
  float top[WARPS][P::QUERIES], total[WARPS][P::QUERIES];
  int number[P::QUERIES];
  int found;
};

/* What a lane knows of its rows of queries: lane / 4, and 8 further. Logits are in units of log 2. */
template <class P> struct rows {
  typedef typename multiplied<typename P::T, P::BITS>::type M;
  left_tile<M> query[DEPTHS];
  float unit[P::HALVES], bias[P::HALVES];             /* logit = unit * product + bias */
  float top[P::HALVES], total[P::HALVES];             /* so far; the total of the frames that this lane holds */
  float flushed[P::HALVES];                           /* the top when sums were last added to the means */
  float sums[CHANNELS / TILE_COLUMNS][4], weights[4]; /* of values or codes, and of the weights they were given */
};

/* ---- what stands where ---- */

/* Piece n of a tile in shared memory, so that the lanes that read together meet no bank twice. */
template <class P> INLINE int place_of(const int n) { return P::IS_PACKED ? n ^ (n / 8 % 2) << 1 : n ^ n / 8 % 8; }

/* The channels of the i-th of four numbers that a lane has of a query, in the depth-th tile. */
template <class P> INLINE int channel_of(const int depth, const int lane, const int i) {
  const int quad = lane % 4, of_quad = i / 2 + i % 2 * 2;
  return P::BITS == 0   ? depth * 16 + quad * 2 + i % 2 + i / 2 * 8
         : P::BITS == 8 ? depth * 16 + quad * 4 + of_quad
                        : depth / 2 * 32 + quad * 8 + depth % 2 * 4 + of_quad;
}

/* The channel of sum s in a tile of the output. */
template <class P> INLINE int channel_of_sum(const int tile, const int lane, const int s) {
  const int column = column_of(lane, s);
  return P::BITS == 0 ? tile * 8 + column : P::BITS == 8 ? tile / 4 * 32 + column * 4 + tile % 4 : column * 8 + tile;
}

/* The frame of logit s in a column of tiles. */
template <class P> INLINE int frame_of(const int column, const int lane, const int s) {
  return P::BITS == 0 ? column * 8 + column_of(lane, s) : column / 2 * 16 + column_of(lane, s) * 2 + column % 2;
}

/* Of a code's high half the tensor cores see 16 times the code. */
template <class P> INLINE float enlarged(const int i) { return P::BITS == 4 && i ? 16.0f : 1.0f; }

/* ---- a tile's way to the tensor cores ---- */

template <class P>
INLINE void copy_tile(const struct wkv_cross_attention &a, const int64_t matrix, const int first, const int length,
                      const int lane, piece (*const to)[P::PIECES]) {
  /* pieces of frames that stand together */
  enum { OF_FRAMES = P::IS_PACKED ? 8 * P::BITS : 8, TOGETHER = P::IS_PACKED ? WKV_TILE : 1 };
  const int64_t tiles = P::IS_PACKED ? count_of(a.frames, WKV_TILE) : a.frames;
  const int64_t from = (matrix * tiles + first / TOGETHER) * OF_FRAMES + lane;
  const bool is_whole = first + P::FRAMES <= length;
#pragma unroll
  for (int i = 0; i < P::PIECES / WARP; i++) {
    const int n = i * WARP + lane, place = place_of<P>(n);
    const piece *const key = (const piece *)a.keys + from + i * WARP;
    const piece *const value = (const piece *)a.values + from + i * WARP;
    if (is_whole) {
      copy_piece(to[0] + place, key);
      copy_piece(to[1] + place, value);
    } else {
      const bool exists = first + n / OF_FRAMES * TOGETHER < length;
      copy_piece_or_zeros(to[0] + place, key, exists);
      copy_piece_or_zeros(to[1] + place, value, exists);
    }
  }
}

/* Products of the queries with the keys, not yet logits. */
template <class P>
INLINE void score(const struct rows<P> &r, const piece *const keys, const int lane, float (*const products)[4]) {
  typedef typename rows<P>::M M;
#pragma unroll
  for (int column = 0; column < P::COLUMNS; column++)
#pragma unroll
    for (int s = 0; s < 4; s++) products[column][s] = 0;
  if (!P::IS_PACKED) {
#pragma unroll
    for (int column = 0; column < P::COLUMNS; column++)
#pragma unroll
      for (int depth = 0; depth < DEPTHS; depth += 2) {
        right_tile<M> key[2];
        load_two_turned(key, keys + place_of<P>((column * 8 + lane % 8) * 8 + depth * 2 + lane / 8));
        multiply(products[column], r.query[depth], key[0]);
        multiply(products[column], r.query[depth + 1], key[1]);
      }
    return;
  }
  /* a word of each of two frames, of the quad (4 bits: two quads) of channels that this lane has of the queries */
  const two_words *const words = (const two_words *)(keys + place_of<P>(lane % 4 * 4 + lane / 8)) + lane / 4 % 2;
#pragma unroll
  for (int column = 0; column < P::COLUMNS; column += 2)
#pragma unroll
    for (int depth = 0; depth < DEPTHS; depth += P::BITS == 8 ? 1 : 2) {
      const two_words both = words[(column * 2 + depth) * P::BITS * 4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t word = both.word[i];
        right_tile<M> key;
        if (P::BITS == 8) {
          key.word[0] = even_codes(word);
          key.word[1] = odd_codes(word);
          multiply(products[column + i], r.query[depth], key);
        } else {
          key.word[0] = low_codes(word);
          key.word[1] = low_codes(word >> 8);
          multiply(products[column + i], r.query[depth], key);
          key.word[0] = high_codes(word);
          key.word[1] = high_codes(word >> 8);
          multiply(products[column + i], r.query[depth + 1], key);
        }
      }
    }
}

/* sums += weights * values, of 16 frames. */
template <class P>
INLINE void mix(struct rows<P> &r, const left_tile<typename rows<P>::M> &weights, const piece *const values,
                const int sixteen, const int lane) {
  typedef typename rows<P>::M M;
  if (!P::IS_PACKED) {
#pragma unroll
    for (int tile = 0; tile < CHANNELS / TILE_COLUMNS; tile += 2) {
      right_tile<M> value[2];
      load_two(value, values + place_of<P>((sixteen * 16 + lane % 16) * 8 + tile + lane / 16));
      multiply(r.sums[tile], weights, value[0]);
      multiply(r.sums[tile + 1], weights, value[1]);
    }
    return;
  }
  /* of four frames, a quad (4 bits: two quads) of channels */
  const piece *const pieces = values + place_of<P>(lane) + sixteen * 8 * P::BITS;
#pragma unroll
  for (int half = 0; half < P::BITS / 4; half++) {
    const piece codes = pieces[half * WARP];
#pragma unroll
    for (int i = 0; i < 4; i++) { /* channel of the quad */
      uint32_t words[2];
#pragma unroll
      for (int f = 0; f < 2; f++) words[f] = __byte_perm(codes.word[f], codes.word[f + 2], i < 2 ? 0x5410 : 0x7632);
      right_tile<M> value;
      if (P::BITS == 8) {
        for (int f = 0; f < 2; f++) value.word[f] = i % 2 ? odd_codes(words[f]) : even_codes(words[f]);
        multiply(r.sums[half * 4 + i], weights, value);
      } else {
        for (int f = 0; f < 2; f++) value.word[f] = low_codes(words[f] >> i % 2 * 8);
        multiply(r.sums[i], weights, value);
        for (int f = 0; f < 2; f++) value.word[f] = high_codes(words[f] >> i % 2 * 8);
        multiply(r.sums[i + 4], weights, value);
      }
    }
  }
  const uint32_t one = two_numbers<M>(1, 1);
  const right_tile<M> ones = {{one, one}};
  multiply(r.weights, weights, ones);
}

/* Logits of a tile, their exponentials and with these the values. */
template <class P>
INLINE void work(struct rows<P> &r, const struct wkv_cross_attention &a, const int64_t head, const int queries,
                 const int *const number, const piece (*const tile)[P::PIECES], const float *const bias,
                 const int first, const int length, const int lane) {
  typedef typename rows<P>::M M;
  float x[P::COLUMNS][4]; /* products, logits, weights */
  score<P>(r, tile[0], lane, x);
#pragma unroll
  for (int column = 0; column < P::COLUMNS; column++)
#pragma unroll
    for (int s = 0; s < 2 * P::HALVES; s++) x[column][s] = fmaf(x[column][s], r.unit[s / 2], r.bias[s / 2]);
  if (P::IS_BIASED)
#pragma unroll
    for (int column = 0; column < P::COLUMNS; column++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int frame = first + frame_of<P>(column, lane, i);
        const float more = frame < length ? bias[frame] * (1 / LOG_2) : 0;
        for (int half = 0; half < P::HALVES; half++) x[column][2 * half + i] += more;
      }
  if (first + P::FRAMES > length)
#pragma unroll
    for (int column = 0; column < P::COLUMNS; column++)
#pragma unroll
      for (int s = 0; s < 2 * P::HALVES; s++)
        if (first + frame_of<P>(column, lane, s) >= length) x[column][s] = -INFINITY;
  bool grown = false;
  float shrink[2] = {1, 1};
#pragma unroll
  for (int half = 0; half < P::HALVES; half++) {
    float top = r.top[half], total = 0;
#pragma unroll
    for (int column = 0; column < P::COLUMNS; column++)
#pragma unroll
      for (int s = 2 * half; s < 2 * half + 2; s++) top = fmaxf(top, x[column][s]);
    const int query = lane / 4 + 8 * half;
    if (a.weights && query < queries) {
      const int64_t row = number[query] / a.tokens, token = number[query] % a.tokens;
      float *const to = a.weights + ((row * a.heads + head) * a.tokens + token) * a.frames + first;
#pragma unroll
      for (int column = 0; column < P::COLUMNS; column++)
        for (int s = 2 * half; s < 2 * half + 2; s++)
          if (first + frame_of<P>(column, lane, s) < length) to[frame_of<P>(column, lane, s)] = x[column][s] * LOG_2;
    }
    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
    top = new_top(r.top[half], fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2)));
#pragma unroll
    for (int column = 0; column < P::COLUMNS; column++)
#pragma unroll
      for (int s = 2 * half; s < 2 * half + 2; s++) total += x[column][s] = power_of_2(x[column][s] - top);
    grown = grown || top > r.top[half];
    shrink[half] = power_of_2(r.top[half] - top);
    r.total[half] = fmaf(r.total[half], shrink[half], total);
    r.top[half] = top;
  }
  if (__any_sync(ALL_LANES, grown)) {
#pragma unroll
    for (int s = 0; s < 2 * P::HALVES; s++) {
#pragma unroll
      for (int i = 0; i < CHANNELS / TILE_COLUMNS; i++) r.sums[i][s] *= shrink[s / 2];
      r.weights[s] *= shrink[s / 2];
    }
  }
#pragma unroll
  for (int sixteen = 0; sixteen < P::FRAMES / 16; sixteen++) {
    left_tile<M> weights = {};
#pragma unroll
    for (int i = 0; i < 2 * P::HALVES; i++) {
      const int half = P::HALVES == 1 ? 0 : i % 2, column = sixteen * 2 + (P::HALVES == 1 ? i : i / 2);
      weights.word[half + (column % 2) * 2] = two_numbers<M>(x[column][2 * half], x[column][2 * half + 1]);
    }
    mix<P>(r, weights, tile[1], sixteen, lane);
  }
}

/* ---- once for each group of codes, or once ---- */

/* The queries as the tensor cores take them. With codes, in units of their largest number, which float16 holds. */
template <class P>
INLINE void load_queries(struct rows<P> &r, const struct wkv_cross_attention &a, const int64_t head, const int queries,
                         const int *const number, const float *const scales, const int lane) {
  typedef typename P::T T;
  typedef typename rows<P>::M M;
  const float scale = a.scale / LOG_2;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int query = lane / 4 + 8 * half;
    const bool exists = half < P::HALVES && query < queries;
    const T *const from = (const T *)a.query + (exists ? number[query] * a.heads + head : 0) * CHANNELS;
    float x[DEPTHS][4], largest = 0, bias = 0;
#pragma unroll
    for (int depth = 0; depth < DEPTHS; depth++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int channel = channel_of<P>(depth, lane, i);
        x[depth][i] = exists ? to_float(from[channel]) : 0;
        if (!P::IS_PACKED) continue;
        bias = fmaf(x[depth][i], scales[CHANNELS + channel], bias);
        x[depth][i] *= scales[channel];
        largest = fmaxf(largest, fabsf(x[depth][i]));
      }
    float unit = 1, inverse = 1, rounded = 0;
    if (P::IS_PACKED) {
      largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
      if (largest > FLT_MIN * 4) unit = largest, inverse = 1 / largest;
    }
#pragma unroll
    for (int depth = 0; depth < DEPTHS; depth++)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float less = inverse / enlarged<P>(depth % 2);
        const uint32_t two = two_numbers<M>(x[depth][i] * less, x[depth][i + 1] * less);
        r.query[depth].word[half + i] = two;
        if (P::IS_PACKED) rounded += first_of<M>(two) + second_of<M>(two);
      }
    if (P::IS_PACKED) {
      bias = fmaf(-1024 * unit, rounded, bias);
      bias += __shfl_xor_sync(ALL_LANES, bias, 1);
      bias += __shfl_xor_sync(ALL_LANES, bias, 2);
    }
    if (half < P::HALVES) r.unit[half] = unit * scale, r.bias[half] = bias * scale;
  }
}

/* The sums so far go to the means, and start again from nothing. */
template <class P>
INLINE void flush(struct rows<P> &r, float (*const means)[CHANNELS + 4], const float *const scales, const int lane) {
  float shrink[P::HALVES];
#pragma unroll
  for (int half = 0; half < P::HALVES; half++) {
    shrink[half] = power_of_2(r.flushed[half] - r.top[half]);
    r.flushed[half] = r.top[half];
  }
#pragma unroll
  for (int tile = 0; tile < CHANNELS / TILE_COLUMNS; tile++)
#pragma unroll
    for (int s = 0; s < 2 * P::HALVES; s++) {
      const int channel = channel_of_sum<P>(tile, lane, s);
      float *const mean = &means[row_of(lane, s)][channel], sum = r.sums[tile][s];
      if (P::IS_PACKED) {
        const float step = scales[channel] / enlarged<P>(tile / 4), least = scales[CHANNELS + channel];
        sum = fmaf(step, sum - 1024 * r.weights[s], least * r.weights[s]);
      }
      *mean = fmaf(*mean, shrink[s / 2], sum);
      r.sums[tile][s] = 0;
    }
#pragma unroll
  for (int s = 0; s < 4; s++) r.weights[s] = 0;
}

/* ---- a block ---- */

/* The frames of a warp. */
template <class P>
INLINE void go_over(const struct wkv_cross_attention &a, room<P> *const memory, const int64_t matrix,
                    const int64_t head, const int queries, const int begin, const int end, const int length) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t groups = P::IS_PACKED ? count_of(a.frames, a.group) : 1;
  const float *const key_scales = a.key_scales + matrix * groups * 2 * CHANNELS;
  const float *const value_scales = a.value_scales + matrix * groups * 2 * CHANNELS;
  const float *const bias = a.bias + (P::IS_BIASED ? matrix / a.heads * a.frames : 0);
  rows<P> r = {};
  for (int half = 0; half < P::HALVES; half++) r.top[half] = r.flushed[half] = -FLT_MAX; /* finite: inf - inf is NaN */
  for (int tile = 0; tile < CHANNELS / TILE_COLUMNS; tile++)
    for (int s = 0; s < 2 * P::HALVES; s++) memory->means[warp][row_of(lane, s)][channel_of_sum<P>(tile, lane, s)] = 0;

  if (begin < end) copy_tile<P>(a, matrix, begin, length, lane, memory->tiles[warp][0]);
  end_of_copies();
  if (!P::IS_PACKED) load_queries<P>(r, a, head, queries, memory->number, NULL, lane);
  const int frames_of_group = (int)smaller(a.group, INT32_MAX);
  int stage = 0, group = 0, end_of_group = begin;
  for (int first = begin; first < end; first += P::FRAMES, stage ^= 1) {
    if (first + P::FRAMES < end)
      copy_tile<P>(a, matrix, first + P::FRAMES, length, lane, memory->tiles[warp][stage ^ 1]);
    end_of_copies();
    if (P::IS_PACKED && first >= end_of_group) {
      if (first > begin) flush<P>(r, memory->means[warp], value_scales + group * 2 * CHANNELS, lane);
      group = first / frames_of_group;
      end_of_group = (group + 1) * frames_of_group;
      load_queries<P>(r, a, head, queries, memory->number, key_scales + group * 2 * CHANNELS, lane);
    }
    copies_but<1>();
    __syncwarp();
    work<P>(r, a, head, queries, memory->number, memory->tiles[warp][stage], bias, first, length, lane);
    __syncwarp(); /* or a lane copies over what another still reads */
  }
  copies_but<0>();
  if (begin < end) flush<P>(r, memory->means[warp], value_scales + group * 2 * CHANNELS, lane);
#pragma unroll
  for (int half = 0; half < P::HALVES; half++) {
    float total = r.total[half];
    total += __shfl_xor_sync(ALL_LANES, total, 1);
    total += __shfl_xor_sync(ALL_LANES, total, 2);
    if (lane % 4) continue;
    memory->top[warp][lane / 4 + 8 * half] = r.top[half];
    memory->total[warp][lane / 4 + 8 * half] = total;
  }
}

/* The warps' sums together. */
template <class P>
INLINE void store(const struct wkv_cross_attention &a, const room<P> *const memory, const int64_t head,
                  const int64_t split, const int queries) {
  const int channel = threadIdx.x % CHANNELS;
  for (int query = threadIdx.x / CHANNELS; query < queries; query += THREADS / CHANNELS) {
    float top = memory->top[0][query], total = 0, mean = 0;
    for (int warp = 1; warp < WARPS; warp++) top = fmaxf(top, memory->top[warp][query]);
    for (int warp = 0; warp < WARPS; warp++) {
      const float weight = power_of_2(memory->top[warp][query] - top);
      total = fmaf(weight, memory->total[warp][query], total);
      mean = fmaf(weight, memory->means[warp][query][channel], mean);
    }
    const int64_t item = memory->number[query] * a.heads + head;
    if (!a.sums) {
      convert(mean / total, (typename P::T *)a.output + item * CHANNELS + channel);
      continue;
    }
    const int64_t line = split * a.rows * a.tokens * a.heads + item;
    a.sums[line * CHANNELS + channel] = mean;
    if (channel > 0) continue;
    a.totals[2 * line] = top * LOG_2;
    a.totals[2 * line + 1] = total;
  }
}

/* Grid: audios, heads and splits, and for each of these `lots` blocks, which share out its queries. */
template <class P>
__global__ void __launch_bounds__(THREADS, P::BLOCKS) attend(const struct wkv_cross_attention a, const int lots) {
  DYNAMIC_SHARED(memory_of_block);
  room<P> *const memory = (room<P> *)memory_of_block;
  const int lot = blockIdx.x % lots, warp = threadIdx.x / WARP;
  const int64_t place = blockIdx.x / lots, split = place % a.splits, matrix = place / a.splits;
  const int64_t audio = matrix / a.heads, head = matrix % a.heads;
  const int length = a.lengths[audio] < a.frames ? a.lengths[audio] : (int)a.frames;
  const int64_t tiles = count_of(length, P::FRAMES), parts = a.splits * WARPS, part = split * WARPS + warp;
  const int begin = (int)(tiles * part / parts) * P::FRAMES, end = (int)(tiles * (part + 1) / parts) * P::FRAMES;
  if (audio == 0 && lot == 0 && split == 0) clear_strays<typename P::T>(a, head, threadIdx.x, THREADS);
  for (int skipped = lot * P::QUERIES;; skipped += lots * P::QUERIES) {
    const int queries = find_together(a, audio, skipped, P::QUERIES, memory->number, &memory->found);
    if (queries <= 0) break;
    go_over<P>(a, memory, matrix, head, queries, begin, end, length);
    __syncthreads();
    store<P>(a, memory, head, split, queries);
    __syncthreads(); /* the numbers of the queries are found anew */
  }
  finish_lot<typename P::T, P::QUERIES>(a, matrix, lot, lots, memory->number, &memory->found);
}

template <class P> const char *launch_plan(const struct wkv_cross_attention *const a, const cudaStream_t stream) {
  const int lots = lots_of(a, P::QUERIES);
  const char *const refused = allow_shared((const void *)attend<P>, sizeof(room<P>));
  if (refused) return refused;
  const dim3 grid(a->audios * a->heads * a->splits * lots);
  LAUNCH(attend<P>, grid, dim3(THREADS), sizeof(room<P>), stream, *a, lots);
  return launch_error();
}

template <class T, int BITS, bool IS_BIASED>
const char *launch_some(const struct wkv_cross_attention *const a, const cudaStream_t stream) {
  const bool few = count_of(a->rows * a->tokens, a->audios) <= 8;
  return few ? launch_plan<plan<T, BITS, 8, IS_BIASED>>(a, stream)
             : launch_plan<plan<T, BITS, 16, IS_BIASED>>(a, stream);
}

template <class T, int BITS>
const char *launch(const struct wkv_cross_attention *const a, const cudaStream_t stream) {
  return a->bias ? launch_some<T, BITS, true>(a, stream) : launch_some<T, BITS, false>(a, stream);
}

/* Whether it can: a group must hold whole tiles, and pieces must be aligned. */
inline bool can(const struct wkv_cross_attention *const a) {
  return a->dtype != WKV_FLOAT32 && a->head_dim == CHANNELS && (a->bits == 0 || a->group % 32 == 0) &&
         ((uintptr_t)a->keys | (uintptr_t)a->values) % sizeof(piece) == 0;
}

} // namespace heads
#endif
