/* How much attention keys receive. A chunk of queries takes the logits of all keys that it sees, block by block; they
 * become exponentials in their place, counted from the largest so far, and once all blocks are done it is known what
 * each weighs. So nothing is larger than a chunk times the keys, and every product is done once. */
#include "frames.h"
#include "isa.h"
#include "softmax.h"

/* Floats, or two bfloat16 to a lane where there are instructions to multiply them. */
INLINE enum wkv_precision precision_of(const enum wkv_dtype dtype) {
  return MULTIPLIES_BFLOAT16 && dtype == WKV_BFLOAT16 ? WKV_IN_BFLOAT16 : WKV_IN_FLOAT32;
}

/* The first n channels at p in W lanes, then zeros. */
INLINE vu lanes_of(const enum wkv_dtype dtype, const void *const p, const int64_t n) {
  vu x = {0};
  if (n <= 0) return x;
  if (precision_of(dtype) == WKV_IN_FLOAT32) return (vu)load_in_order(dtype, p, least(n, W));
  memcpy(&x, p, n >= 2 * W ? sizeof x : (size_t)n * 2);
  return x;
}

/* A KV head being worked on. */
struct keys {
  int64_t row, number;   /* of this head in its row */
  int64_t padded, lanes; /* tokens, lanes of a key */
  uint32_t *panels;      /* [padded / PANEL, lanes, PANEL] */
  int32_t *is_seen;      /* [padded]: all bits, or none of hidden keys and of those past the end */
};

INLINE struct keys packed_keys(const enum wkv_dtype dtype, const struct wkv_received *const r, const int64_t item) {
  const int64_t head = r->first_head + item, padded = wkv_received_tokens(r);
  struct keys k = {.row = head / r->kv_heads,
                   .number = head % r->kv_heads,
                   .padded = padded,
                   .lanes = wkv_count_of(r->head_dim, per_vector(precision_of(dtype))) * W};
  k.panels = r->packed + item * wkv_received_packed(r);
  k.is_seen = (int32_t *)k.panels + padded * k.lanes;
  return k;
}

/* ---- packing ---- */

/* W keys. Those past the end are the last one again: nobody sees them. */
INLINE void pack_some(const enum wkv_dtype dtype, const struct wkv_received *const r, const struct keys *const k,
                      const int64_t token) {
  uint32_t *const panel = k->panels + token / PANEL * PANEL * k->lanes + token % PANEL;
  const void *key[W];
  for (int i = 0; i < W; i++)
    key[i] = at(dtype, r->keys.data,
                k->row * r->keys.row + k->number * r->keys.head + least(token + i, r->tokens - 1) * r->keys.token);
  const int64_t step = per_vector(precision_of(dtype));
  for (int64_t d = 0, lane = 0; lane < k->lanes; d += step, lane += W) {
    vu x[W];
    for (int i = 0; i < W; i++) x[i] = lanes_of(dtype, at(dtype, key[i], d), r->head_dim - d);
    transpose(x);
    for (int i = 0; i < W; i++) memcpy(panel + (lane + i) * PANEL, &x[i], sizeof x[i]);
  }
}

INLINE void pack_block(const enum wkv_dtype dtype, const struct wkv_received *const r, const int64_t item) {
  const int64_t blocks = wkv_count_of(wkv_received_tokens(r), WKV_BLOCK);
  const struct keys k = packed_keys(dtype, r, item / blocks);
  const int64_t first = item % blocks * WKV_BLOCK, last = least(first + WKV_BLOCK, k.padded);
  const uint8_t *const visible = r->visible + k.row * r->visible_row;
  for (int64_t token = first; token < last; token++) k.is_seen[token] = token < r->tokens && visible[token] ? -1 : 0;
  for (int64_t token = first; token < last; token += W) pack_some(dtype, r, &k, token);
}

/* ---- the attention of a chunk of queries ---- */

struct chunk {
  const struct wkv_received *r;
  struct keys keys;
  int64_t queries, padded; /* padded: to a multiple of ROWS */
  int64_t furthest;        /* keys that one of them sees */
  int64_t wide, stride;    /* from one query to the next, of exponentials to those of the next; blocks */
  int64_t blocks;
  uint32_t *query;         /* [WKV_CHUNK, wide] */
  float *exponentials;     /* [WKV_CHUNK, stride]: logits at first */
  float *tops;             /* [WKV_CHUNK, blocks]: what the exponentials of a block are counted from; then what
                              they weigh */
  int32_t seen[WKV_CHUNK]; /* keys that a query sees, from the first on; 0: it does not count */
  float top[WKV_CHUNK], total[WKV_CHUNK];
};

/* The numbers of the queries: query * group + head. Those that fill the last rows are the last one again, and see
 * nothing. */
INLINE void load_queries(const enum wkv_dtype dtype, struct chunk *const c, const int64_t first) {
  const struct wkv_received *const r = c->r;
  const int64_t group = r->heads / r->kv_heads, step = per_vector(precision_of(dtype));
  c->padded = wkv_round_up(c->queries, ROWS);
  c->furthest = 0;
  for (int64_t q = 0; q < c->padded; q++) {
    const int64_t number = first + least(q, c->queries - 1), position = r->positions[number / group];
    const int64_t place = c->keys.row * r->query.row + (c->keys.number * group + number % group) * r->query.head +
                          number / group * r->query.token;
    const void *const query = at(dtype, r->query.data, place);
    for (int64_t d = 0, lane = 0; lane < c->keys.lanes; d += step, lane += W) {
      const vu x = lanes_of(dtype, at(dtype, query, d), r->head_dim - d);
      memcpy(c->query + q * c->wide + lane, &x, sizeof x);
    }
    c->seen[q] = q < c->queries && c->keys.is_seen[position] ? (int32_t)position + 1 : 0;
    c->furthest = c->seen[q] > c->furthest ? c->seen[q] : c->furthest;
    c->top[q] = -FLT_MAX; /* finite, so that logits of -inf weigh 0 and are not subtracted from each other */
    c->total[q] = 0;
  }
}

/* The logits of ROWS queries with a panel of keys; -inf where they do not see one. */
INLINE void score(const enum wkv_precision precision, const struct chunk *const c, const int64_t query,
                  const int64_t token) {
  vf sums[ROWS][VECTORS];
  vi number, seen[VECTORS];
  for (int i = 0; i < W; i++) number[i] = i;
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) sums[r][v] = (vf){0};
  multiply_panel(precision, VECTORS, c->query + query * c->wide, c->wide, c->keys.panels + token * c->keys.lanes,
                 c->keys.lanes, sums);
  for (int v = 0; v < VECTORS; v++) memcpy(&seen[v], c->keys.is_seen + token + v * W, sizeof seen[v]);
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) {
      const vi is_before = number < (vi){0} + (int32_t)(c->seen[query + r] - token - v * W);
      const vf logits = (vf)choose(seen[v] & is_before, (vu)(sums[r][v] * c->r->scale), (vu)splat(-INFINITY));
      store(c->exponentials + (query + r) * c->stride + token + v * W, logits);
    }
}

INLINE void soften(struct chunk *const c, const int64_t query, const int64_t first, const int64_t keys) {
  float *const x = c->exponentials + query * c->stride + first;
  const float top = largest(x, keys, c->top[query]);
  const float before = c->total[query] * exponential(splat(c->top[query] - top))[0];
  c->total[query] = before + exponentiate(x, keys, top);
  c->tops[query * c->blocks + first / WKV_BLOCK] = c->top[query] = top;
}

/* A query whose weights are not numbers has none to give, wherever it looks. */
INLINE void spoil(const struct chunk *const c, const int64_t query) {
  float *const x = c->exponentials + query * c->stride;
  for (int64_t k = 0; k < c->seen[query]; k++) x[k] = c->keys.is_seen[k] ? NAN : 0;
}

INLINE void weigh(const struct chunk *const c, const int64_t query) {
  const bool counts = c->seen[query] > 0, is_sound = c->total[query] > 0;
  float *const tops = c->tops + query * c->blocks;
  for (int64_t b = 0; b * WKV_BLOCK < c->furthest; b++)
    tops[b] = !counts ? 0 : is_sound ? exponential(splat(tops[b] - c->top[query]))[0] / c->total[query] : 1;
  if (counts && !is_sound) spoil(c, query);
}

INLINE void add_up(const struct chunk *const c, float *const sums) {
  for (int64_t first = 0; first < c->furthest; first += WKV_BLOCK) {
    const int64_t last = least(first + WKV_BLOCK, c->keys.padded);
    const float *const weight = c->tops + first / WKV_BLOCK;
    for (int64_t k = first; k < last; k += W) {
      vf sum = load(sums + k);
      for (int64_t q = 0; q < c->queries; q++)
        sum = multiply_add(load(c->exponentials + q * c->stride + k), splat(weight[q * c->blocks]), sum);
      store(sums + k, sum);
    }
  }
}

INLINE void receive_chunk(const enum wkv_dtype dtype, struct chunk *const c, const int64_t first, float *const sums) {
  load_queries(dtype, c, first);
  for (int64_t block = 0; block < c->furthest; block += WKV_BLOCK) {
    const int64_t keys = least(WKV_BLOCK, c->keys.padded - block);
    for (int64_t token = block; token < block + keys; token += PANEL)
      for (int64_t query = 0; query < c->padded; query += ROWS) score(precision_of(dtype), c, query, token);
    for (int64_t q = 0; q < c->queries; q++) soften(c, q, block, keys);
  }
  for (int64_t q = 0; q < c->queries; q++) weigh(c, q);
  add_up(c, sums);
}

/* Late queries see more keys than early ones: lots are taken from both ends, so that threads get as much to do. */
INLINE int64_t lot_of(const int64_t item, const int64_t lots) { return item % 2 ? lots - 1 - item / 2 : item / 2; }

INLINE void receive_lot(const enum wkv_dtype dtype, const struct wkv_received *const r, uint32_t *const scratch,
                        const int64_t item) {
  const int64_t lots = wkv_received_lots(r), lot = lot_of(item % lots, lots), tokens = wkv_received_tokens(r);
  const int64_t queries = r->queries * (r->heads / r->kv_heads), end = least((lot + 1) * WKV_LOT, queries);
  struct chunk c = {.r = r, .keys = packed_keys(dtype, r, item / lots)};
  c.wide = c.keys.lanes + W; /* or queries would meet in the same places of a cache */
  c.stride = tokens + W;
  c.blocks = wkv_count_of(tokens, WKV_BLOCK);
  c.query = scratch;
  c.exponentials = (float *)(c.query + WKV_CHUNK * c.wide);
  c.tops = c.exponentials + WKV_CHUNK * c.stride;
  float *const sums = memset(r->sums + (item / lots * lots + lot) * tokens, 0, (size_t)tokens * sizeof *sums);
  for (int64_t first = lot * WKV_LOT; first < end; first += WKV_CHUNK) {
    c.queries = least(WKV_CHUNK, end - first);
    receive_chunk(dtype, &c, first, sums);
  }
}

/* ---- for each dtype ---- */

#define IN(dtype) \
  static void pack_##dtype(const struct wkv_received *const r, const int64_t item) { \
    pack_block(WKV_##dtype, r, item); \
  } \
  static void receive_##dtype(const struct wkv_received *const r, void *const scratch, const int64_t item) { \
    receive_lot(WKV_##dtype, r, scratch, item); \
  }
IN(FLOAT32)
IN(BFLOAT16)
IN(FLOAT16)

typedef void pack_function(const struct wkv_received *, int64_t item);
typedef void receive_function(const struct wkv_received *, void *scratch, int64_t item);
static pack_function *const pack_in[WKV_DTYPES] = {pack_FLOAT32, pack_BFLOAT16, pack_FLOAT16};
static receive_function *const receive_in[WKV_DTYPES] = {receive_FLOAT32, receive_BFLOAT16, receive_FLOAT16};

void ON_ISA(wkv_received_pack)(const struct wkv_received *const r, const int64_t begin, const int64_t end) {
  for (int64_t item = begin; item < end; item++) pack_in[r->dtype](r, item);
}

void ON_ISA(wkv_attention_received)(const struct wkv_received *const r, void *const scratch, const int64_t begin,
                                    const int64_t end) {
  for (int64_t item = begin; item < end; item++) receive_in[r->dtype](r, scratch, item);
}

/* The sums of all lots, in their order. */
void ON_ISA(wkv_received_finish)(const struct wkv_received *const r, const int64_t begin, const int64_t end) {
  const int64_t tokens = wkv_received_tokens(r), lots = wkv_received_lots(r), blocks = wkv_count_of(tokens, WKV_BLOCK);
  for (int64_t item = begin; item < end; item++) {
    const int64_t head = item / blocks, first = item % blocks * WKV_BLOCK, last = least(first + WKV_BLOCK, r->tokens);
    float *const received = r->received + (r->first_head + head) * r->tokens;
    for (int64_t k = first; k < last; k += W) {
      vf sum = {0};
      for (int64_t lot = 0; lot < lots; lot++) sum += load(r->sums + (head * lots + lot) * tokens + k);
      store_in_order(WKV_FLOAT32, received + k, sum, least(W, last - k));
    }
  }
}
