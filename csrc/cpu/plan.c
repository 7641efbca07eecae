/* What is settled before a kernel runs: whether cursors and owners may be trusted, and who does what. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#include "../packed.h"

const char *wkv_check_cursor(const int32_t *const cursor, const int64_t rows, const int64_t tokens, const int64_t slots,
                             char *const error, const size_t error_size) {
  for (int64_t row = 0; row < rows; row++) {
    const long long live = cursor[WKV_LIVE * rows + row], slot = cursor[WKV_SLOT * rows + row];
    const long long seen = cursor[WKV_SEEN * rows + row];
    const long long padding = seen < 0 ? -seen : 0;
    const long long written = tokens > padding ? tokens - padding : 0;
    const char *const wrong = live < 0 || live > slots            ? "live must be in 0..slots"
                              : slot < 0 || slot > live           ? "slot must be in 0..live"
                              : tokens > 1 && slot != live        ? "slot must be live for more than one token"
                              : written && written > slots - slot ? "the new tokens do not fit"
                              : seen > INT32_MAX - tokens         ? "the positions of the new tokens must be below 2^31"
                                                                  : NULL;
    if (!wrong) continue;
    snprintf(error, error_size, "cursor of row %lld: %s (live %lld, slot %lld, seen %lld, tokens %lld, slots %lld)",
             (long long)row, wrong, live, slot, seen, (long long)tokens, (long long)slots);
    return error;
  }
  return NULL;
}

/* Whether a call that begins in slot `first` may write this one. */
static bool is_new(const struct wkv_attention *const a, const int64_t first, const int64_t slot) {
  return slot >= first && slot - first < a->tokens;
}

const char *wkv_check_sources(const struct wkv_attention *const a, char *const error, const size_t error_size) {
  if (!a->sources) return NULL;
  /* read one by one, as another thread may write them */
  const volatile int32_t *const sources = a->sources, *const all_live = a->cursor + WKV_LIVE * a->rows;
  const volatile int32_t *const first_new = a->cursor + WKV_SLOT * a->rows;
  int64_t settled = a->slots; /* what comes before it is written by no row */
  for (int64_t row = 0; row < a->rows; row++) settled = first_new[row] < settled ? first_new[row] : settled;
  for (int64_t row = 0; row < a->rows; row++) {
    const int64_t live = all_live[row], first = first_new[row];
    for (int64_t slot = 0; slot < live && slot < a->slots; slot++) {
      const int64_t source = sources[row * a->slots + slot];
      const bool is_row = source >= 0 && source < a->rows;
      if (is_row && (slot < settled || source == row || !is_new(a, first_new[source], slot))) continue;
      if (is_new(a, first, slot)) continue; /* the table is not asked */
      snprintf(error, error_size,
               is_row ? "sources of row %lld, slot %lld: row %lld is just writing that slot"
                      : "sources of row %lld, slot %lld: must be one of the rows, got %lld",
               (long long)row, (long long)slot, (long long)source);
      return error;
    }
  }
  return NULL;
}

const char *wkv_check_owners(const int32_t *const owner, const int64_t rows, const int32_t *const lengths,
                             const int64_t audios, const int64_t frames, char *const error, const size_t error_size) {
  for (int64_t row = 0; row < rows; row++)
    if (owner[row] < 0 || owner[row] >= audios) {
      snprintf(error, error_size, "owner of row %lld must be one of %lld audios, got %d", (long long)row,
               (long long)audios, owner[row]);
      return error;
    }
  for (int64_t audio = 0; audio < audios; audio++)
    if (lengths[audio] < 1 || lengths[audio] > frames) {
      snprintf(error, error_size, "length of audio %lld must be in 1..%lld frames, got %d", (long long)audio,
               (long long)frames, lengths[audio]);
      return error;
    }
  return NULL;
}

const char *wkv_check_mixed(const float *const bits, const int64_t channels, const int64_t tile_bytes,
                            char *const error, const size_t error_size) {
  int64_t bytes = 0;
  for (int64_t c = 0; c < channels; c++) {
    const float first = bits[c / WKV_CHANNELS * WKV_CHANNELS];
    const bool is_whole = bits[c] >= 1 && bits[c] <= 8 && (float)(int)bits[c] == bits[c];
    if (!is_whole || bits[c] != first) {
      snprintf(error, error_size,
               "value_scales: bits of channel %lld must be one of 1..8 and the same for %d channels, got %g",
               (long long)c, WKV_CHANNELS, bits[c]);
      return error;
    }
    if (c % WKV_CHANNELS == 0) bytes += wkv_bytes_of_block((int)bits[c]);
  }
  if (bytes == tile_bytes) return NULL;
  snprintf(error, error_size, "keys must have %lld bytes a tile for these bits, got %lld", (long long)bytes,
           (long long)tile_bytes);
  return error;
}

static int64_t least(const int64_t a, const int64_t b) { return a < b ? a : b; }

void wkv_cross_plan(struct wkv_cross_attention *const a) {
  a->parts = 0;
  for (int64_t row = 0, end; row < a->rows; row = end) {
    for (end = row + 1; end < a->rows && a->owner[end] == a->owner[row];) end++;
    for (int64_t first = row * a->tokens; first < end * a->tokens; first += WKV_TOGETHER)
      a->part[a->parts++] = (struct wkv_together){a->owner[row], first, least(WKV_TOGETHER, end * a->tokens - first)};
  }
  const int64_t items = a->parts * a->heads, blocks = wkv_count_of(a->frames, WKV_BLOCK);
  a->splits = items ? least(blocks, wkv_count_of(WKV_ITEMS_WANTED, items)) : 1;
}

size_t wkv_cross_scratch(const struct wkv_cross_attention *const a) {
  const size_t channels = (size_t)wkv_round_up(a->head_dim, WKV_CHANNELS);
  /* Of a packed cache, which needs most: queries, logits, the middles of codes, one query with the steps folded in, the
   * codes of queries and weights, those of weights four times over, and where blocks of mixed bits begin. */
  return sizeof(float) * (WKV_TOGETHER * (channels + WKV_BLOCK) + 2 * channels) +
         WKV_TOGETHER * (channels + WKV_BLOCK) + sizeof(int32_t) * WKV_TOGETHER * WKV_BLOCK +
         2 * sizeof(int64_t) * (channels / WKV_CHANNELS);
}

/* ---- pruned caches ---- */

const char *wkv_check_kept(const int32_t *const starts, const int32_t *const lengths, const int64_t rows,
                           const int64_t kv_heads, const int64_t most, const int64_t slots, char *const error,
                           const size_t error_size) {
  for (int64_t i = 0; i < rows * kv_heads; i++) {
    const bool is_long = lengths[i] < 0 || lengths[i] > most;
    const int64_t last = slots - lengths[i];
    if (!is_long && starts[i] >= 0 && starts[i] <= last) continue;
    snprintf(error, error_size, "%s of row %lld, head %lld must be in 0..%lld%s, got %d", is_long ? "length" : "start",
             (long long)(i / kv_heads), (long long)(i % kv_heads), (long long)(is_long ? most : last),
             is_long ? "" : " to leave room for its slots", is_long ? lengths[i] : starts[i]);
    return error;
  }
  return NULL;
}

/* Where a head's slots begin, and which it is. */
static int by_start(const void *const one, const void *const other) {
  const int64_t a = *(const int64_t *)one, b = *(const int64_t *)other;
  return (a > b) - (a < b);
}

static const char *check_ranges(const struct wkv_gathering *const g, int64_t *const order, char *const error,
                                const size_t error_size) {
  const int64_t heads = g->rows * g->kv_heads;
  int64_t used = 0;
  for (int64_t i = 0; i < heads; i++)
    if (g->lengths[i]) order[used++] = (int64_t)g->starts[i] * heads + i;
  qsort(order, (size_t)used, sizeof *order, by_start);
  for (int64_t i = 1; i < used; i++) {
    const int64_t one = order[i - 1] % heads, other = order[i] % heads;
    if (g->starts[one] + (int64_t)g->lengths[one] <= g->starts[other]) continue;
    snprintf(error, error_size,
             "starts give slot %d to row %lld, head %lld and to row %lld, head %lld: each must have slots of its own",
             g->starts[other], (long long)(one / g->kv_heads), (long long)(one % g->kv_heads),
             (long long)(other / g->kv_heads), (long long)(other % g->kv_heads));
    return error;
  }
  return NULL;
}

const char *wkv_check_gathering(const struct wkv_gathering *const g, int64_t *const order, char *const error,
                                const size_t error_size) {
  const volatile int32_t *const index = g->index; /* another thread may write it */
  if (check_ranges(g, order, error, error_size)) return error;
  for (int64_t head = 0; head < g->rows * g->kv_heads; head++)
    for (int64_t i = 0; i < g->lengths[head]; i++) {
      const int32_t token = index[head * g->most + i];
      if (token >= 0 && token < g->tokens) continue;
      snprintf(error, error_size, "index %lld of row %lld, head %lld must be one of %lld tokens, got %d", (long long)i,
               (long long)(head / g->kv_heads), (long long)(head % g->kv_heads), (long long)g->tokens, token);
      return error;
    }
  return NULL;
}

const char *wkv_check_positions(const int32_t *const positions, const int64_t queries, const int64_t tokens,
                                char *const error, const size_t error_size) {
  for (int64_t query = 0; query < queries; query++)
    if (positions[query] < 0 || positions[query] >= tokens) {
      snprintf(error, error_size, "positions of query %lld must be one of %lld tokens, got %d", (long long)query,
               (long long)tokens, positions[query]);
      return error;
    }
  return NULL;
}

void wkv_ragged_plan(struct wkv_ragged_attention *const a) {
  a->range = WKV_RANGE * wkv_ragged_lots(a); /* so that the sums take as much memory as the queries of one lot */
  a->ranges = 0;
  for (int64_t head = 0; head < a->rows * a->kv_heads; head++) {
    const int64_t its = wkv_count_of(a->lengths[head], a->range);
    a->first[head] = a->ranges;
    for (int64_t i = 0; a->owner && i < its; i++) a->owner[a->ranges + i] = head;
    a->ranges += its;
  }
  a->first[a->rows * a->kv_heads] = a->ranges;
}

size_t wkv_ragged_scratch(const struct wkv_ragged_attention *const a) {
  const size_t channels = (size_t)wkv_round_up(a->head_dim, WKV_CHANNELS);
  return sizeof(float) * (WKV_TOGETHER + 1) * (channels + WKV_BLOCK + WKV_BLOCK / 2);
}

/* Instruction sets differ in how many frames and channels stand side by side: 64 at most. */
enum { SIDE_BY_SIDE = 64 };

int64_t wkv_encoder_packed(const struct wkv_encoder_attention *const a) {
  const int64_t frames = wkv_round_up(a->frames, SIDE_BY_SIDE), channels = wkv_round_up(a->head_dim, SIDE_BY_SIDE);
  return 2 * frames * channels + 3 * frames + 2 * channels; /* beside keys and values what bytes need, and the bias */
}

int64_t wkv_encoder_scratch(const struct wkv_encoder_attention *const a) {
  const int64_t frames = wkv_round_up(a->frames, SIDE_BY_SIDE), channels = wkv_round_up(a->head_dim, SIDE_BY_SIDE);
  const int64_t queries = channels, largest = SIDE_BY_SIDE, weights = frames + SIDE_BY_SIDE, sums = channels;
  return WKV_QUERIES * (queries + largest + weights + sums);
}

int64_t wkv_received_tokens(const struct wkv_received *const r) { return wkv_round_up(r->tokens, SIDE_BY_SIDE); }

int64_t wkv_received_packed(const struct wkv_received *const r) {
  const int64_t tokens = wkv_received_tokens(r), channels = wkv_round_up(r->head_dim, SIDE_BY_SIDE);
  return tokens * channels + tokens; /* the keys, and which are seen */
}

size_t wkv_received_scratch(const struct wkv_received *const r) {
  const int64_t tokens = wkv_received_tokens(r), channels = wkv_round_up(r->head_dim, SIDE_BY_SIDE);
  const int64_t blocks = wkv_count_of(tokens, WKV_BLOCK);
  return sizeof(float) * (size_t)(WKV_CHUNK * (channels + tokens + 2 * SIDE_BY_SIDE + blocks));
}
