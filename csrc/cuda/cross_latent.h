/* Cross-attention over a latent cache in 16 bits, which is keys and values in one and as wide as the model. A block
 * goes over tiles of 16 frames with up to 24 queries (all heads of a beam or more); the next tile is on its way
 * meanwhile. Each warp has units of 32 channels: of these it holds the queries and the output in registers. Its
 * part of the logits goes to shared memory, where they are added and become weights.
 *
 * Codes go to the tensor cores as codes.h says; those of mixed bits are unpacked to 8 first, by the warp that has their
 * channels. Sums are kept in units of the step of the group of frames that is at work, and change their units with the
 * group. */
#ifndef WHISPERKV_CUDA_CROSS_LATENT_H
#define WHISPERKV_CUDA_CROSS_LATENT_H
#include "codes.h"
#include "queries.h"
#include "tiles.h"

namespace latent {

enum {
  WARPS = 8,
  THREADS = WARPS * WARP,
  UNIT = 32, /* channels */
  UNITS = 5, /* of a warp at most */
  WIDEST = UNITS * UNIT * WARPS,
  FRAMES = 16, /* of a tile */
  COLUMNS = 3, /* of eight queries */
  QUERIES = COLUMNS * TILE_COLUMNS,
  LINE = FRAMES + 4, /* of logits in shared memory, so that lanes that write together meet no bank twice */
};

template <class T_, int BITS_> struct plan {
  typedef T_ T;
  typedef typename multiplied<T, BITS_>::type M;
  enum {
    IS_MIXED = BITS_ == WKV_MIXED,
    BITS = IS_MIXED ? 8 : BITS_,
    IS_PACKED = BITS != 0,
    BYTES = IS_PACKED ? 2 * BITS : 2 * FRAMES, /* of a channel in a tile */
  };
};

/* Everything in shared memory; the tiles come after it, and before them one of mixed bits as it is unpacked. */
template <class P> struct __align__(16) room {
  float parts[WARPS][QUERIES][LINE]; /* of the logits */
  typename P::M weights[QUERIES][FRAMES];
  float units[WARPS][QUERIES], biases[WARPS][QUERIES]; /* logit = unit * product + bias */
  float steps[WIDEST];                                 /* of codes: what the output's numbers are counted in */
  float shrink[QUERIES], of_group[QUERIES]; /* what sums so far weigh now; the weights of a group of frames together */
  float top[QUERIES], total[QUERIES];
  int number[QUERIES];
  int found;
};

/* What does not change over a block. */
struct block {
  int64_t matrix, head;
  const float *bias;               /* of the audio's frames, or NULL */
  int dim, length, queries, units; /* units: of this warp */
  int lane, warp;
  int found[UNITS]; /* of mixed bits: 16 times the first piece of each unit in a tile, and its bits */
};

/* What a lane holds: of the queries, channels along the depth of the tensor cores; of the output, channels in rows. */
template <class P> struct held {
  right_tile<typename P::M> query[UNITS][2][COLUMNS];
  float sums[UNITS][2][COLUMNS][4];
};

/* ---- what stands where. Rows of logits are frames, in an order that suits the codes ---- */

INLINE int unit_of(const struct block &b, const int unit) { return b.warp + unit * WARPS; }

/* The i-th of four numbers of a query that a lane has in half a unit. */
template <class P> INLINE int channel_of(const int half, const int lane, const int i) {
  const int quad = lane % 4, of_quad = i / 2 + i % 2 * 2;
  return P::BITS == 0   ? half * 16 + quad * 2 + i % 2 + i / 2 * 8
         : P::BITS == 8 ? half * 16 + quad * 4 + of_quad
                        : quad * 8 + half * 4 + of_quad;
}

/* The row of sum s of the output in half a unit. */
template <class P> INLINE int channel_of_sum(const int half, const int lane, const int s) {
  const int row = lane / 4, next = s / 2;
  return P::BITS == 0   ? half * 16 + row + next * 8
         : P::BITS == 8 ? row * 4 + half * 2 + next
                        : row % 4 * 8 + row / 4 * 4 + half * 2 + next;
}

/* The frame that is the n-th in shared memory. */
template <class P> INLINE int frame_of(const int n) { return P::IS_PACKED ? n : n / 2 + n % 2 * 8; }

INLINE int place_of_codes(const int n) { return n ^ (n / 8 % 2) << 1; }

/* What the tensor cores see of a code is so many times as much, in the rows of the output. */
template <class P> INLINE float enlarged(const int lane) { return P::BITS == 4 && lane / 16 ? 16.0f : 1.0f; }

/* ---- a tile ---- */

template <class P>
INLINE void copy_tile(const struct block &b, const struct wkv_cross_attention &a, const int first, piece *const to) {
  if (P::IS_MIXED) {
    const int pieces = (int)(a.tile_bytes / sizeof(piece));
    const int64_t tile = b.matrix * count_of(a.frames, WKV_TILE) + first / WKV_TILE;
    const piece *const from = (const piece *)a.keys + tile * pieces;
    for (int n = threadIdx.x; n < pieces; n += THREADS) copy_piece(to + n, from + n);
    return;
  }
  if (P::IS_PACKED) {
    const int pieces = b.dim * P::BYTES / (int)sizeof(piece);
    const int64_t tile = b.matrix * count_of(a.frames, WKV_TILE) + first / WKV_TILE;
    const piece *const from = (const piece *)a.keys + tile * pieces;
    for (int n = threadIdx.x; n < pieces; n += THREADS) copy_piece(to + place_of_codes(n), from + n);
    return;
  }
  const int pieces = b.dim / 8; /* of a frame */
  for (int frame = b.warp; frame < FRAMES; frame += WARPS) {
    const piece *const from = (const piece *)a.keys + (b.matrix * a.frames + first + frame) * pieces + b.lane;
    piece *const place = to + frame * pieces + (b.lane ^ frame % 8);
    const bool exists = first + frame < b.length;
    for (int n = 0; n < pieces - b.lane; n += WARP) copy_piece_or_zeros(place + n, from + n, exists);
  }
}

/* This warp's units of mixed bits. */
INLINE void unpack_units(const struct block &b, const piece *const tile, piece *const to) {
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    if (u >= b.units) break;
    to[place_of_codes(unit_of(b, u) * UNIT + b.lane)] = unpack_piece(b.found[u] % 16, tile + b.found[u] / 16, b.lane);
  }
  __syncwarp();
}

/* This warp's part of the logits. */
template <class P>
INLINE void score(const struct block &b, const struct held<P> &h, const piece *const tile, room<P> *const memory) {
  typedef typename P::M M;
  float products[COLUMNS][4] = {};
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    if (u >= b.units) break;
    left_tile<M> frames[2];
    if (!P::IS_PACKED) {
      const piece *const row = tile + b.lane % 16 * (b.dim / 8);
#pragma unroll
      for (int half = 0; half < 2; half++)
        load_squares(frames[half], row + ((b.warp * 4 + half * 2 + b.lane / 16) ^ b.lane % 8) + u * 4 * WARPS);
    } else {
      const int first = unit_of(b, u) * UNIT * P::BYTES / (int)sizeof(piece);
      const two_words *const at = (const two_words *)(tile + place_of_codes(b.lane % 4 * 4 + b.lane / 8) + first);
      const two_words both = at[b.lane / 4 % 2], more = at[b.lane / 4 % 2 + (P::BITS == 8 ? 32 : 0)];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t word = both.word[i], other = more.word[i]; /* of 4 bits the same */
        frames[0].word[i] = P::BITS == 8 ? even_codes(word) : low_codes(word);
        frames[0].word[i + 2] = P::BITS == 8 ? odd_codes(word) : low_codes(word >> 8);
        frames[1].word[i] = P::BITS == 8 ? even_codes(other) : high_codes(word);
        frames[1].word[i + 2] = P::BITS == 8 ? odd_codes(other) : high_codes(word >> 8);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int column = 0; column < COLUMNS; column++)
        multiply(products[column], frames[half], h.query[u][half][column]);
  }
#pragma unroll
  for (int column = 0; column < COLUMNS; column++)
#pragma unroll
    for (int s = 0; s < 2; s++) {
      const int query = column * TILE_COLUMNS + column_of(b.lane, s);
      const float unit = P::IS_PACKED ? memory->units[b.warp][query] : 1;
      const float bias = P::IS_PACKED ? memory->biases[b.warp][query] : 0;
      const pair two = {fmaf(products[column][s], unit, bias), fmaf(products[column][s + 2], unit, bias)};
      *(pair *)&memory->parts[b.warp][query][b.lane / 4 * 2] = two;
    }
}

/* Of the queries that half a warp has: in units of log 2. */
struct softening {
  float top[2], total[2], of_group[2]; /* the sums of a lane's own frames */
};

INLINE float sum_of_half(float x) {
  for (int lane = FRAMES / 2; lane; lane /= 2) x += __shfl_xor_sync(ALL_LANES, x, lane);
  return x;
}

/* The parts together, and their weights. */
template <class P>
INLINE void soften(const struct block &b, const struct wkv_cross_attention &a, struct softening &w, const int first,
                   const bool ends_group, room<P> *const memory) {
  typedef typename P::M M;
  const int n = threadIdx.x % FRAMES, frame = first + frame_of<P>(n);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int query = threadIdx.x / FRAMES + i * (THREADS / FRAMES);
    if (b.warp * 2 + i * (THREADS / FRAMES) >= b.queries) break; /* the whole warp */
    float logit = 0;
#pragma unroll
    for (int part = 0; part < WARPS; part++) logit += memory->parts[part][query][n];
    logit *= a.scale / LOG_2;
    if (b.bias && frame < b.length) logit += b.bias[frame] * (1 / LOG_2);
    if (a.weights && query < b.queries && frame < b.length) {
      const int64_t row = memory->number[query] / a.tokens, token = memory->number[query] % a.tokens;
      a.weights[((row * a.heads + b.head) * a.tokens + token) * a.frames + frame] = logit * LOG_2;
    }
    if (frame >= b.length) logit = -INFINITY;
    float top = fmaxf(w.top[i], logit);
    for (int lane = FRAMES / 2; lane; lane /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, lane));
    top = new_top(w.top[i], top);
    const float shrink = power_of_2(w.top[i] - top), weight = power_of_2(logit - top);
    M number;
    convert(weight, &number);
    w.top[i] = top;
    w.total[i] = fmaf(w.total[i], shrink, weight);
    w.of_group[i] = fmaf(w.of_group[i], shrink, to_float(number));
    memory->weights[query][n / 4 * 4 + n % 2 * 2 + n / 2 % 2] = number; /* as the tensor cores take four */
    if (n == 0) memory->shrink[query] = shrink;
    if (!ends_group) continue;
    const float of_group = sum_of_half(w.of_group[i]);
    if (n == 0) memory->of_group[query] = of_group;
    w.of_group[i] = 0;
  }
}

/* sums = shrink * sums + values * weights. */
template <class P>
INLINE void mix(const struct block &b, struct held<P> &h, const piece *const tile, const room<P> *const memory) {
  typedef typename P::M M;
  float shrink[COLUMNS][2];
  right_tile<M> weights[COLUMNS];
  bool grown = false;
#pragma unroll
  for (int column = 0; column < COLUMNS; column++) {
    const pair two = *(const pair *)&memory->shrink[column * TILE_COLUMNS + column_of(b.lane, 0)];
    shrink[column][0] = two.first;
    shrink[column][1] = two.second;
    grown = grown || two.first != 1 || two.second != 1;
    const M *const four = memory->weights[column * TILE_COLUMNS + b.lane / 4] + b.lane % 4 * 4;
    const two_words words = *(const two_words *)four;
    weights[column].word[0] = words.word[0];
    weights[column].word[1] = words.word[1];
  }
  if (__any_sync(ALL_LANES, grown))
#pragma unroll
    for (int u = 0; u < UNITS; u++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int column = 0; column < COLUMNS; column++)
#pragma unroll
          for (int s = 0; s < 4; s++) h.sums[u][half][column][s] *= shrink[column][s % 2];
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    if (u >= b.units) break;
    left_tile<M> values[2];
    if (!P::IS_PACKED) {
      const int frame = b.lane % 8 + b.lane / 16 * 8;
      const piece *const row = tile + frame * (b.dim / 8);
#pragma unroll
      for (int half = 0; half < 2; half++)
        load_squares_turned(values[half],
                            row + ((b.warp * 4 + half * 2 + b.lane / 8 % 2) ^ b.lane % 8) + u * 4 * WARPS);
    } else {
      const int quad = b.lane / 4 % (P::BITS == 8 ? 8 : 4);
      const int first = unit_of(b, u) * UNIT * P::BYTES / (int)sizeof(piece);
      const piece codes = tile[place_of_codes(quad * 4 + b.lane % 4) + first];
      const uint32_t mask = P::BITS == 8 ? 0x00ff00ff : b.lane / 16 ? 0x00f000f0 : 0x000f000f;
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int f = 0; f < 2; f++) {
          const uint32_t two = __byte_perm(codes.word[f], codes.word[f + 2], half ? 0x7632 : 0x5410);
          values[half].word[2 * f] = P::BITS == 8 ? even_codes(two) : masked_or(two, mask, UNDER_1024);
          values[half].word[2 * f + 1] = P::BITS == 8 ? odd_codes(two) : masked_or(two >> 8, mask, UNDER_1024);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int column = 0; column < COLUMNS; column++) multiply(h.sums[u][half][column], values[half], weights[column]);
  }
}

/* ---- once for each group of codes, or once ---- */

/* The queries as the tensor cores take them. With codes, in units of the largest number that this warp has of one. */
template <class P>
INLINE void load_queries(const struct block &b, const struct wkv_cross_attention &a, const float *const scales,
                         struct held<P> &h, room<P> *const memory) {
  typedef typename P::T T;
  typedef typename P::M M;
#pragma unroll
  for (int column = 0; column < COLUMNS; column++) {
    const int query = column * TILE_COLUMNS + b.lane / 4;
    const bool exists = query < b.queries;
    const T *const from = (const T *)a.query + (exists ? memory->number[query] * a.heads + b.head : 0) * b.dim;
    float largest = 0, bias = 0, rounded = 0, unit = 1, inverse = 1;
    if (P::IS_PACKED) {
      for (int i = 0; i < b.units * 8 && exists; i++) {
        const int channel = unit_of(b, i / 8) * UNIT + channel_of<P>(i / 4 % 2, b.lane, i % 4);
        const float x = to_float(from[channel]);
        bias = fmaf(x, scales[b.dim + channel], bias);
        largest = fmaxf(largest, fabsf(x * scales[channel]));
      }
      largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
      if (largest > FLT_MIN * 4) unit = largest, inverse = 1 / largest;
    }
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      if (u >= b.units) break;
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          float x[2];
          for (int j = 0; j < 2; j++) {
            const int channel = unit_of(b, u) * UNIT + channel_of<P>(half, b.lane, i + j);
            x[j] = exists ? to_float(from[channel]) : 0;
            if (P::IS_PACKED) x[j] *= scales[channel] * (P::BITS == 4 && half ? inverse / 16 : inverse);
          }
          const uint32_t two = two_numbers<M>(x[0], x[1]);
          h.query[u][half][column].word[i / 2] = two;
          if (P::IS_PACKED) rounded += first_of<M>(two) + second_of<M>(two);
        }
    }
    if (P::IS_PACKED) {
      bias = fmaf(-1024 * unit, rounded, bias);
      bias += __shfl_xor_sync(ALL_LANES, bias, 1);
      bias += __shfl_xor_sync(ALL_LANES, bias, 2);
      if (b.lane % 4 == 0) memory->units[b.warp][query] = unit, memory->biases[b.warp][query] = bias;
    }
  }
  __syncwarp();
}

/* The end of a group: what its `least` and the 1024 above each code come to. */
template <class P>
INLINE void close_group(const struct block &b, const float *const scales, struct held<P> &h,
                        const room<P> *const memory) {
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    if (u >= b.units) break;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int s = 0; s < 4; s++) {
        const int channel = unit_of(b, u) * UNIT + channel_of_sum<P>(half, b.lane, s);
        const float more = scales[b.dim + channel] / memory->steps[channel] - 1024;
#pragma unroll
        for (int column = 0; column < COLUMNS; column++) {
          const float weight = memory->of_group[column * TILE_COLUMNS + column_of(b.lane, s)];
          h.sums[u][half][column][s] = fmaf(more, weight, h.sums[u][half][column][s]);
        }
      }
  }
}

/* The start of one: sums are counted in its steps. A constant channel keeps the step it had; its codes are 0. */
template <class P>
INLINE void open_group(const struct block &b, const float *const scales, const bool is_first, struct held<P> &h,
                       room<P> *const memory) {
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    if (u >= b.units) break;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int next = 0; next < 2; next++) {
        const int channel = unit_of(b, u) * UNIT + channel_of_sum<P>(half, b.lane, 2 * next);
        const float before = is_first ? 1 : memory->steps[channel], step = scales[channel] / enlarged<P>(b.lane);
        const float now = step == 0 ? before : step;
        __syncwarp();
        if (b.lane % 4 == 0) memory->steps[channel] = now;
#pragma unroll
        for (int column = 0; column < COLUMNS; column++)
#pragma unroll
          for (int s = 2 * next; s < 2 * next + 2; s++) h.sums[u][half][column][s] *= before / now;
      }
  }
  __syncwarp();
}

/* ---- a block ---- */

template <class P>
INLINE void store(const struct block &b, const struct wkv_cross_attention &a, const int64_t split,
                  const struct held<P> &h, const room<P> *const memory) {
#pragma unroll
  for (int column = 0; column < COLUMNS; column++)
#pragma unroll
    for (int second = 0; second < 2; second++) {
      const int query = column * TILE_COLUMNS + column_of(b.lane, second);
      if (query >= b.queries) continue;
      const int64_t item = memory->number[query] * a.heads + b.head, line = split * a.rows * a.tokens * a.heads + item;
      const float total = memory->total[query];
      if (a.sums && b.warp == 0 && b.lane < 4) {
        a.totals[2 * line] = memory->top[query] * LOG_2;
        a.totals[2 * line + 1] = total;
      }
#pragma unroll
      for (int u = 0; u < UNITS; u++) {
        if (u >= b.units) break;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int s = second; s < 4; s += 2) {
            const int channel = unit_of(b, u) * UNIT + channel_of_sum<P>(half, b.lane, s);
            const float sum = h.sums[u][half][column][s] * (P::IS_PACKED ? memory->steps[channel] : 1);
            if (a.sums) a.sums[line * b.dim + channel] = sum;
            else convert(sum / total, (typename P::T *)a.output + item * b.dim + channel);
          }
      }
    }
}

/* Some queries over the tiles of the block. */
template <class P>
INLINE void attend_some(const struct block &b, const struct wkv_cross_attention &a, const int64_t split,
                        const int begin, const int end, room<P> *const memory) {
  struct held<P> h = {};
  struct softening w = {{-FLT_MAX, -FLT_MAX}, {0, 0}, {0, 0}}; /* finite, or -inf would be subtracted from itself */
  piece *const unpacked = (piece *)(memory + 1);
  piece *const tiles = unpacked + (P::IS_MIXED ? b.dim * P::BYTES / (int)sizeof(piece) : 0);
  const int pieces = P::IS_MIXED ? (int)(a.tile_bytes / sizeof(piece)) : b.dim * P::BYTES / (int)sizeof(piece);
  const int64_t groups = P::IS_PACKED ? count_of(a.frames, a.group) : 1;
  const int frames_of_group = P::IS_PACKED ? (int)smaller(a.group, INT32_MAX - FRAMES) : INT32_MAX - FRAMES;
  const float *scales = a.key_scales + (b.matrix * groups + begin / frames_of_group) * 2 * b.dim;
  for (int i = threadIdx.x; i < QUERIES * FRAMES; i += THREADS) convert(0, &memory->weights[0][0] + i);
  for (int i = threadIdx.x; i < QUERIES; i += THREADS) memory->shrink[i] = 1, memory->of_group[i] = 0;
  if (begin < end) copy_tile<P>(b, a, begin, tiles);
  end_of_copies();
  if (!P::IS_PACKED) load_queries<P>(b, a, NULL, h, memory);
  int stage = 0;
  for (int first = begin; first < end; first += FRAMES, stage ^= 1) {
    const bool is_first = first == begin, ends_group = first + FRAMES >= end || (first + FRAMES) % frames_of_group == 0;
    copies_but<0>();
    __syncthreads();
    if (first + FRAMES < end) copy_tile<P>(b, a, first + FRAMES, tiles + (stage ^ 1) * pieces);
    end_of_copies();
    if (P::IS_PACKED && (is_first || first % frames_of_group == 0)) {
      if (!is_first) scales += 2 * b.dim;
      load_queries<P>(b, a, scales, h, memory);
      open_group<P>(b, scales, is_first, h, memory);
    }
    const piece *tile = tiles + stage * pieces;
    if (P::IS_MIXED) {
      unpack_units(b, tile, unpacked);
      tile = unpacked;
    }
    score<P>(b, h, tile, memory);
    __syncthreads();
    soften<P>(b, a, w, first, ends_group, memory);
    __syncthreads();
    mix<P>(b, h, tile, memory);
    if (P::IS_PACKED && ends_group) close_group<P>(b, scales, h, memory);
  }
  copies_but<0>();
  for (int i = 0; i < 2; i++) {
    const int query = threadIdx.x / FRAMES + i * (THREADS / FRAMES);
    const float total = sum_of_half(w.total[i]);
    if (query >= QUERIES || threadIdx.x % FRAMES > 0) continue;
    memory->top[query] = w.top[i];
    memory->total[query] = total;
  }
  __syncthreads();
  if (P::IS_PACKED && begin >= end) open_group<P>(b, scales, true, h, memory); /* no sums, but they have a unit */
  store<P>(b, a, split, h, memory);
}

/* Where the units of this warp are in a tile of mixed bits. */
INLINE void find_units(struct block &b, const struct wkv_cross_attention &a) {
  int64_t start = 0;
#pragma unroll
  for (int u = 0; u < UNITS; u++)
    for (int warp = 0; warp < WARPS && (u * WARPS + warp) * UNIT < b.dim; warp++) {
      const int bits = bits_of_block(a, (u * WARPS + warp) * UNIT, start);
      if (warp == b.warp) b.found[u] = (int)(start / sizeof(piece)) * 16 + bits;
      start += wkv_bytes_of_block(bits);
    }
}

/* Grid: audios, heads and splits, and for each of these `lots` blocks, which share out its queries. */
template <class P>
__global__ void __launch_bounds__(THREADS, 1) attend(const struct wkv_cross_attention a, const int lots) {
  DYNAMIC_SHARED(memory_of_block);
  room<P> *const memory = (room<P> *)memory_of_block;
  const int lot = blockIdx.x % lots;
  const int64_t place = blockIdx.x / lots, split = place % a.splits;
  struct block b;
  b.matrix = place / a.splits;
  b.head = b.matrix % a.heads;
  b.dim = (int)a.head_dim;
  b.lane = threadIdx.x % WARP;
  b.warp = threadIdx.x / WARP;
  b.units = (b.dim / UNIT - b.warp + WARPS - 1) / WARPS;
  if (P::IS_MIXED) find_units(b, a);
  const int64_t audio = b.matrix / a.heads;
  b.bias = a.bias ? a.bias + audio * a.frames : NULL;
  b.length = a.lengths[audio] < a.frames ? a.lengths[audio] : (int)a.frames;
  const int64_t tiles = count_of(b.length, FRAMES);
  const int begin = (int)(tiles * split / a.splits) * FRAMES, end = (int)(tiles * (split + 1) / a.splits) * FRAMES;
  if (audio == 0 && lot == 0 && split == 0) clear_strays<typename P::T>(a, b.head, threadIdx.x, THREADS);
  for (int skipped = lot * QUERIES;; skipped += lots * QUERIES) {
    b.queries = find_together(a, audio, skipped, QUERIES, memory->number, &memory->found);
    if (b.queries <= 0) return;
    attend_some<P>(b, a, split, begin, end, memory);
    __syncthreads(); /* the numbers of the queries are found anew */
  }
}

template <class T, int BITS>
const char *launch(const struct wkv_cross_attention *const a, const cudaStream_t stream) {
  typedef plan<T, BITS> P;
  const int lots = lots_of(a, QUERIES);
  const size_t tile = a->head_dim * P::BYTES;
  const size_t bytes = sizeof(room<P>) + (P::IS_MIXED ? tile + 2 * a->tile_bytes : 2 * tile);
  const char *const refused = allow_shared((const void *)attend<P>, bytes);
  if (refused) return refused;
  LAUNCH(attend<P>, dim3(a->audios * a->heads * a->splits * lots), dim3(THREADS), bytes, stream, *a, lots);
  return launch_error();
}

/* Whether it can. */
inline bool can(const struct wkv_cross_attention *const a) {
  const bool fits = a->bits == WKV_MIXED ? a->head_dim % UNIT == 0 : a->head_dim > 64 && a->head_dim % 64 == 0;
  return a->dtype != WKV_FLOAT32 && a->keys == a->values && a->head_dim <= WIDEST && fits &&
         (uintptr_t)a->keys % sizeof(piece) == 0;
}

} // namespace latent
#endif
