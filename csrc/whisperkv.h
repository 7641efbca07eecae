/* The one contract between bindings and kernels: plain structs of pointers and sizes. Shapes in brackets are
 * row-major and contiguous. A row is one sequence being decoded: one audio, or one beam of it. */
#ifndef WHISPERKV_H
#define WHISPERKV_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus /* CUDA's compiler */
extern "C" {
#endif

enum wkv_dtype { WKV_FLOAT32, WKV_BFLOAT16, WKV_FLOAT16, WKV_DTYPES };

/* Where each row stands: int32 [WKV_CURSORS, rows]. */
enum wkv_cursor {
  WKV_LIVE,   /* slots in use, always 0..live-1 */
  WKV_SLOT,   /* the slot that the next token takes: live (append), or a used one (overwrite) */
  WKV_SEEN,   /* position of the next token; negative while left padding is passed over */
  WKV_PINNED, /* tokens at positions below this are never evicted */
  WKV_CURSORS
};

/* New tokens enter the cache and attend over it.
 *
 * Token t of row r has position seen[r] + t. A negative position is padding: it enters no slot, its output and
 * weights are 0. The others are written to slot[r], slot[r] + 1, ... and each attends over the live slots up to
 * and including its own. More than one token may only append (slot == live); a single one may overwrite.
 * The cursor is read, not moved: score_evict, or the caller, moves it.
 *
 * Beams that trade places need not move their slots: slot s of row r is read where sources[r, s] says, in slot s of
 * that row, which may not be one that this call writes. New tokens go to the row itself, whatever the table says, and
 * are read there. The bits are those of slots that were moved.
 *
 * Latents are keys and values in one: heads / kv_heads query heads share those of a KV head, and there are no
 * values. */
struct wkv_attention {
  int64_t rows, tokens, heads, kv_heads, slots, head_dim;
  enum wkv_dtype dtype;    /* of query, key, value, keys, values, output */
  const void *query;       /* [rows, tokens, heads, head_dim] */
  const void *key, *value; /* [rows, tokens, kv_heads, head_dim]; of latents value is NULL */
  void *keys, *values;     /* [rows, kv_heads, slots, head_dim]; of latents values is NULL */
  const int32_t *cursor;   /* [WKV_CURSORS, rows] */
  const int32_t *sources;  /* [rows, slots]: the row that holds each slot; NULL: its own */
  void *output;            /* [rows, tokens, heads, head_dim] */
  float *weights;          /* [rows, heads, tokens, slots], dead slots 0; NULL if not wanted */
  float scale;             /* of the query, applied in float32 */
};

/* The cache moves on by the tokens that compact_attention has just written.
 *
 * For each token in turn: note its position, let the policy score every live slot, and choose the slot of the next
 * token: the first free one while live < budget, else the live slot of the lowest score (ties: the oldest) that is
 * neither pinned nor among the recent - 1 newest; if every slot is protected, the oldest unpinned one, and if all
 * are pinned, the newest. NaN scores lose to any number. Tokens that came together were appended, so more than one
 * must fit the budget: live + tokens <= budget. */
struct wkv_eviction {
  int64_t rows, tokens, heads, slots, head_dim;
  enum wkv_dtype dtype;   /* of keys */
  const float *weights;   /* [rows, heads, tokens, slots] */
  const void *keys;       /* [rows, heads, slots, head_dim] */
  int32_t *cursor;        /* [WKV_CURSORS, rows] */
  int32_t *positions;     /* [rows, slots]; of live slots only */
  float *scores;          /* [rows, slots]; of live slots only */
  int policy;             /* number in WKV_POLICIES */
  int64_t budget, recent; /* slots in use at most; newest tokens that are safe, the next one included */
  float decay;
};

/* How many units hold n, and n rounded up to a multiple of the unit. */
static inline int64_t wkv_count_of(int64_t n, int64_t unit) { return n / unit + (n % unit != 0); }
static inline int64_t wkv_round_up(int64_t n, int64_t unit) { return wkv_count_of(n, unit) * unit; }

/* ---- cross-attention: one cache for each audio, however many rows decode it ---- */

enum {
  WKV_TILE = 16,         /* frames that stand side by side in a packed cache */
  WKV_CHANNELS = 32,     /* packed channels are padded to a multiple of this */
  WKV_BLOCK = 256,       /* frames that are worked on at a time; a group divides it or is a multiple of it */
  WKV_TOGETHER = 32,     /* queries of one audio and head that one work item takes */
  WKV_ITEMS_WANTED = 32, /* enough to keep many threads busy: fewer are split over the frames */
  /* Packed channels of a head at most. A query's codes, within 127, times a frame's less their middle, within 128, are
   * added up in 32 bits. */
  WKV_MOST_CHANNELS = INT32_MAX / (127 * 128) / WKV_CHANNELS * WKV_CHANNELS,
  WKV_MIXED = -1 /* in the place of bits: each block of WKV_CHANNELS channels has its own, see packed.h */
};

/* Frames become codes of 8 or 4 bits: number = least + step * code, for each channel in groups of frames.
 *
 * The codes of 16 frames and 4 channels fill 64 bytes, frame by frame: [tiles, channels / 4, 16, 4]. Of 4 bits, such
 * a piece holds 8 channels, the first 4 in the low halves: [tiles, channels / 8, 16, 4]. An infinity or NaN spoils its
 * own channel and group, nothing else. Frames from lengths[audio] on are not read, and their codes are 0. */
struct wkv_packing {
  int64_t audios, heads, frames, head_dim;
  enum wkv_dtype dtype;   /* of states */
  int bits;               /* 8 or 4 */
  int64_t group;          /* frames that share a step */
  const void *states;     /* [audios, frames, heads, head_dim] */
  const int32_t *lengths; /* [audios] */
  uint8_t *codes;         /* [audios, heads, tiles, 2 * bits, channels] bytes; channels: head_dim, padded */
  float *scales;          /* [audios, heads, groups, 2, channels]: step, least */
};

/* Consecutive rows of one audio are worked on together: at most WKV_TOGETHER of their queries. */
struct wkv_together {
  int64_t audio, first, queries; /* queries are numbered row * tokens + token */
};

/* Every token of every row attends over all frames of its audio. Keys and values may be the same memory. */
struct wkv_cross_attention {
  int64_t rows, tokens, heads, head_dim, audios, frames;
  enum wkv_dtype dtype;                   /* of query, output, and of a cache that is not packed */
  int bits;                               /* 8 or 4 of a packed cache, or WKV_MIXED, else 0 */
  int64_t group;                          /* of a packed cache */
  const void *query;                      /* [rows, tokens, heads, head_dim] */
  const void *keys, *values;              /* [audios, heads, frames, head_dim], or codes */
  const float *key_scales, *value_scales; /* of a packed cache; of mixed bits keys and values are the same memory, and
                                             the latter are [channels]: the bits of each */
  int64_t tile_bytes;                     /* of mixed bits: from one tile of a head to the next */
  const int32_t *owner;                   /* [rows]: the audio of each row */
  const int32_t *lengths;                 /* [audios]: frames in use, 1 or more */
  const float *bias; /* [audios, frames]: added to the logits, log n where a frame stands for n; or NULL */
  void *output;      /* [rows, tokens, heads, head_dim] */
  float *weights;    /* [rows, heads, tokens, frames], 0 from lengths on; NULL if not wanted */
  float scale;       /* of the query, which in bfloat16 may be rounded again */

  /* Made by the plan of the device, but for the memory. It depends on the sizes (on the CPU on the owners too) and
   * never on the number of threads, and so do the bits. */
  int64_t parts, splits;     /* an item is one part and head over one of `splits` ranges of frames */
  struct wkv_together *part; /* [rows * tokens] at most; of the CPU */
  float *sums;               /* [splits, rows * tokens, heads, channels]; NULL in CUDA if nothing is split */
  float *totals;             /* [splits, rows * tokens, heads, 2]: where exponentials are counted from, their sum */

  /* Of CUDA: with counters the block that is the last to reach its own adds up the ranges, without them a kernel that
   * comes after. The bits are the same. */
  uint32_t *counters; /* [audios, heads, lots]: 0 before the call and after it; or NULL */
  int64_t lots;
};

/* ---- matrices: output = activation(x weight^T + bias) + residual ---- */

/* How the numbers of a matrix are read. Sums are in float32, of 8 bit codes in 32 bit integers. */
enum wkv_format { WKV_AS_FLOAT32, WKV_AS_BFLOAT16, WKV_AS_INT8, WKV_AS_FINE_INT8, WKV_FORMATS };

enum {
  WKV_PANEL = 32,                           /* outputs that stand side by side in a packed matrix */
  WKV_SWATH = 192,                          /* rows of x that one work item takes */
  WKV_MOST_INPUTS = INT32_MAX / (255 * 128) /* whose codes' products are added up in 32 bits */
};

/* Numbers of 8 bits are codes times a step, and the largest of a row takes the codes of all others. Fine ones: four
 * inputs that hold such, a unit, are entered again, as often as it helps most, and share its code. A row of x enters
 * some units of its own again, a panel of a matrix some of its. */
enum { WKV_REPEATS = 4 };

/* A packed matrix: [panels, words of a panel], in the order in which it is read: memory is foreseen only so. Words of
 * 32 bits, for each unit those of 32 outputs: one float32, two bfloat16, or four codes of 8 bits plus 128. Of the
 * latter then come the 32 steps, and of fine ones before these
 *   [32]               which units are entered again, the first WKV_REPEATS words
 *   [WKV_REPEATS, 32]  their codes, signed */
static inline int wkv_is_int8(const enum wkv_format format) { return format >= WKV_AS_INT8; }
static inline int64_t wkv_unit(const enum wkv_format format) {
  return format == WKV_AS_FLOAT32 ? 1 : format == WKV_AS_BFLOAT16 ? 2 : 4;
}
static inline int64_t wkv_panel_words(const enum wkv_format format, const int64_t inputs) {
  const int64_t more = format == WKV_AS_FINE_INT8 ? WKV_REPEATS + 2 : wkv_is_int8(format);
  return (wkv_count_of(inputs, wkv_unit(format)) + more) * WKV_PANEL;
}

struct wkv_matrix_packing {
  int64_t outputs, inputs;
  enum wkv_dtype dtype; /* of weight */
  enum wkv_format format;
  const void *weight; /* [outputs, inputs] */
  uint32_t *panels;
};

/* Rows of numbers made ready to be multiplied: normed if there is a norm, then converted to the matrix's format. */
struct wkv_rows {
  int64_t rows, inputs;
  enum wkv_format format;
  const float *x;                       /* [rows, inputs] */
  int64_t stride;                       /* numbers from one row of x to the next */
  const float *norm_weight, *norm_bias; /* [inputs]; NULL: no layer norm */
  float epsilon;
  uint32_t *ready; /* [rows, ready_stride] words; of fine int8 [WKV_REPEATS] codes of the units that
                      are entered again come after the row, and which these are */
  int64_t ready_stride;
  struct wkv_step *steps; /* [rows]; of int8 */
};
struct wkv_step {
  float step;     /* number = step * code */
  uint32_t extra; /* what the 128 in every code of a matrix adds to the row's sums */
};

/* Words from one row to the next: not a power of two, which would have all rows share a few lines of the cache. */
static inline int64_t wkv_ready_stride(const enum wkv_format format, const int64_t inputs) {
  const int64_t more = format == WKV_AS_FINE_INT8 ? 2 * WKV_REPEATS : 0;
  return wkv_round_up(wkv_count_of(inputs, wkv_unit(format)) + more, 16) + 16;
}

enum wkv_activation { WKV_NO_ACTIVATION, WKV_GELU, WKV_ACTIVATIONS };

struct wkv_linear {
  int64_t rows, inputs, outputs;
  enum wkv_format format;
  const uint32_t *ready; /* [rows, ready_stride], and of int8 the steps: from wkv_rows */
  int64_t ready_stride;
  const struct wkv_step *steps;
  const void *weight; /* float32 [outputs, inputs] as the model has it, or panels */
  int is_packed;
  const float *bias; /* [outputs], or NULL */
  enum wkv_activation activation;
  const float *residual; /* [residual_rows, outputs], again and again, or NULL; may be output itself */
  int64_t residual_rows;
  float *output; /* [rows, output_stride] */
  int64_t output_stride;
};

/* Work items of a linear. */
static inline int64_t wkv_linear_items(const struct wkv_linear *const l) {
  return wkv_count_of(l->rows, WKV_SWATH) * wkv_count_of(l->outputs, WKV_PANEL);
}

/* ---- self-attention of the encoder: every frame of an audio attends over all of them ---- */

/* How queries, keys, values and the weights of frames are multiplied. */
enum wkv_precision {
  WKV_IN_FLOAT32,
  WKV_IN_BFLOAT16, /* all four are rounded to it, and the products added up in float32 */
  WKV_IN_BYTES,    /* 8 bits: queries and keys a frame at a time, values a channel at a time; sums are exact */
  WKV_PRECISIONS
};

/* Those of one head stand together: [audios, frames, heads, head_dim], but with steps of their own, in floats, from
 * frame to frame and from audio to audio. */
struct wkv_heads {
  const float *data;
  int64_t frame, audio;
};

/* Keys and values are packed first, those of a few heads at a time. Heads are numbered audio * heads + head. */
struct wkv_encoder_attention {
  int64_t audios, frames, heads, head_dim;
  enum wkv_precision precision;
  struct wkv_heads query, key, value;
  const float *bias;      /* [audios, frames]: added to the logits of each frame; NULL: none */
  const int32_t *lengths; /* [audios]: frames in use, 1 or more; what comes after is not seen and gives 0. NULL: all */
  float *output;          /* [audios, frames, heads, head_dim] */
  float scale;            /* of the logits, before the bias */
  int64_t first_head;     /* of those that are packed now */
  uint32_t *packed;       /* wkv_encoder_packed() numbers for each of them, at a multiple of 64 bytes */
};

enum {
  WKV_QUERIES = 48,         /* frames that one work item attends from */
  WKV_PACKED_HEADS = 8,     /* heads that are packed at a time, so that they stay in a cache */
  WKV_MOST_SUMMED = 1 << 16 /* frames, and channels of a head: so many products of bytes are added up in 32 bits */
};

/* ---- caches of speech LLMs, whose tokens are pruned for each layer and head ----
 *
 * Query heads come in groups of heads / kv_heads that share a KV head. What a layer keeps stands in a flat cache: KV
 * head h of row r owns lengths[r, h] slots from starts[r, h] on, and what comes behind them is room for more. */

/* [rows, heads, tokens, dim], with steps of their own, in numbers, but from channel to channel. */
struct wkv_view {
  const void *data;
  int64_t row, head, token;
};

/* Token index[r, h, i] of a whole cache goes to the i-th slot of head h of row r. */
struct wkv_gathering {
  int64_t rows, kv_heads, tokens, most, slots, head_dim;
  enum wkv_dtype dtype;
  struct wkv_view keys, values;    /* [rows, kv_heads, tokens, head_dim] */
  const int32_t *index;            /* [rows, kv_heads, most], the first lengths[r, h] of each */
  const int32_t *starts, *lengths; /* [rows, kv_heads] */
  void *kept_keys, *kept_values;   /* [slots, head_dim] */
};

/* The queries are the last tokens of a row: query j sees all slots of its head but the last queries - 1 - j. One that
 * sees none gives zeros. */
struct wkv_ragged_attention {
  int64_t rows, heads, kv_heads, queries, slots, head_dim;
  enum wkv_dtype dtype;
  struct wkv_view query;           /* [rows, heads, queries, head_dim] */
  const void *keys, *values;       /* [slots, head_dim] */
  const int32_t *starts, *lengths; /* [rows, kv_heads] */
  const float *bias;               /* [slots]: added to the logits, once they are scaled; NULL: none */
  void *output;                    /* [rows, queries, heads, head_dim] */
  float scale;

  /* Made by the plan of the device, but for the memory. The slots of a KV head are worked on in ranges. On the CPU
   * their length depends on the number of queries alone, and the queries of a group are numbered query * group + head.
   * CUDA cuts what a query sees of each head into `ranges`; its sums are [ranges, rows, queries, heads, head_dim]. */
  int64_t range;  /* slots */
  int64_t ranges; /* of all KV heads */
  int64_t *first; /* [rows * kv_heads + 1]: the first range of each KV head */
  int64_t *owner; /* [ranges]: the KV head of each, row * kv_heads + head */
  float *sums;    /* [ranges, queries of a group, channels] */
  float *totals;  /* [ranges, queries of a group, 2]: where exponentials are counted from, their sum */
};

/* How much attention keys receive: the weights of a softmax, summed over some queries and the heads of a group. Query j
 * sees the visible ones of keys 0..positions[j]; if that last one is hidden, the query does not count. */
struct wkv_received {
  int64_t rows, heads, kv_heads, queries, tokens, head_dim;
  enum wkv_dtype dtype;
  struct wkv_view query;    /* [rows, heads, queries, head_dim] */
  const int32_t *positions; /* [queries] */
  struct wkv_view keys;     /* [rows, kv_heads, tokens, head_dim] */
  const uint8_t *visible;   /* [rows, tokens], each row by itself: 0: hidden */
  int64_t visible_row;      /* from one to the next */
  float *received;          /* [rows, kv_heads, tokens] */
  float scale;

  /* The keys of some KV heads are packed at a time, and the queries of a group, numbered query * group + head, are
   * worked on in lots. */
  int64_t first_head; /* row * kv_heads + head */
  uint32_t *packed;   /* wkv_received_packed() numbers for each of them, at a multiple of 64 bytes */
  float *sums;        /* [heads, lots, wkv_received_tokens()]: of each lot. Of CUDA: [rows, kv_heads, queries
                         of a group, 2]: where exponentials are counted from, their sum */
};

enum {
  WKV_RANGE = 512,       /* slots that are worked on at a time; more if there are many queries */
  WKV_LOT = 192,         /* queries */
  WKV_CHUNK = 24,        /* queries of a lot that are worked on at a time */
  WKV_MOST_HEADS = 4096, /* query heads */
  WKV_MOST_QUERIES = 1 << 16
};

/* So many lots share the queries of a group. */
static inline int64_t wkv_ragged_lots(const struct wkv_ragged_attention *const a) {
  return wkv_count_of(a->queries * (a->heads / a->kv_heads), WKV_TOGETHER);
}
static inline int64_t wkv_received_lots(const struct wkv_received *const r) {
  return wkv_count_of(r->queries * (r->heads / r->kv_heads), WKV_LOT);
}

/* ---- the choice of tokens, on the CPU alone ---- */

/* A score, and where it stands among those of an audio: beam * vocabulary + token. */
struct wkv_chosen {
  float value;
  int64_t place;
};

/* The largest scores of each audio, all its beams taken together, in order: NaN before all numbers, and of equal ones
 * that of the first place. The same bits come out as those of scores + added. */
struct wkv_choice {
  int64_t audios, beams, vocabulary;
  int64_t count;             /* of each audio, at most all */
  const float *scores;       /* [audios, beams, vocabulary] */
  const float *added;        /* [audios, beams]: to all scores of a beam */
  struct wkv_chosen *chosen; /* [audios, beams, count]: of each beam, if it has so many */
  float *values;             /* [audios, count] */
  int64_t *places;           /* [audios, count] */
};

/* ---- on the CPU ---- */

/* Numbers of 32 bits that a packed head takes, and that a thread needs beside. */
int64_t wkv_encoder_packed(const struct wkv_encoder_attention *);
int64_t wkv_encoder_scratch(const struct wkv_encoder_attention *);

/* Fills range, ranges, first and, if it is not NULL, owner. */
void wkv_ragged_plan(struct wkv_ragged_attention *);

/* Bytes that one thread needs beside. */
size_t wkv_ragged_scratch(const struct wkv_ragged_attention *);

/* Tokens, padded; numbers of 32 bits that the keys of a head take when packed; bytes that a thread needs beside. */
int64_t wkv_received_tokens(const struct wkv_received *);
int64_t wkv_received_packed(const struct wkv_received *);
size_t wkv_received_scratch(const struct wkv_received *);

/* NULL if all heads are in the cache with at most so many slots each, else what is wrong, written to error. CPU
 * pointers only, as of what follows. */
const char *wkv_check_kept(const int32_t *starts, const int32_t *lengths, int64_t rows, int64_t kv_heads, int64_t most,
                           int64_t slots, char *error, size_t error_size);

/* The same of tokens that go to slots of their own; the heads are in the cache. `order` has room for rows * kv_heads
 * numbers. */
const char *wkv_check_gathering(const struct wkv_gathering *, int64_t *order, char *error, size_t error_size);

/* The same of the positions of queries. */
const char *wkv_check_positions(const int32_t *positions, int64_t queries, int64_t tokens, char *error,
                                size_t error_size);

/* Fills parts, splits and part. */
void wkv_cross_plan(struct wkv_cross_attention *);

/* Bytes that one thread needs beside. */
size_t wkv_cross_scratch(const struct wkv_cross_attention *);

/* NULL if every row has an audio and every audio a frame, else what is wrong, written to error. CPU pointers only. */
const char *wkv_check_owners(const int32_t *owner, int64_t rows, const int32_t *lengths, int64_t audios, int64_t frames,
                             char *error, size_t error_size);

/* The same of the bits of channels: each block has one number of them, and they fill the bytes of a tile. */
const char *wkv_check_mixed(const float *bits, int64_t channels, int64_t tile_bytes, char *error, size_t error_size);

/* One instruction set's kernels: name and arguments. Work items are independent and each is done by one thread in a
 * fixed order, so the bits do not depend on how the items are shared out. Items [begin, end) are
 *   compact_attention  of rows * kv_heads
 *   score_evict        of rows
 *   pack               of audios * heads * groups
 *   cross_attention    of parts * heads * splits
 *   cross_finish       of rows * tokens * heads, when those are done
 *   pack_matrix        of panels
 *   make_ready         of rows
 *   linear             as wkv_linear_items says
 *   encoder_pack       of the heads that are packed now
 *   encoder_attention  of these heads times the blocks of WKV_QUERIES frames, when those are done
 *   gather_kept        of rows * kv_heads times the blocks of WKV_BLOCK in `most`
 *   ragged_attention   of ranges * wkv_ragged_lots()
 *   ragged_finish      of rows * queries * heads, when those are done
 *   received_pack      of the heads that are packed now times the blocks of WKV_BLOCK tokens
 *   attention_received of these heads * wkv_received_lots(), when those are done
 *   received_finish    of these heads times the blocks of WKV_BLOCK tokens, when those are done
 *   choose             of audios * beams
 *   choose_finish      of audios, when those are done */
#define WKV_CPU_KERNELS(KERNEL) \
  KERNEL(compact_attention, (const struct wkv_attention *, int64_t begin, int64_t end)) \
  KERNEL(score_evict, (const struct wkv_eviction *, int64_t begin, int64_t end)) \
  KERNEL(pack, (const struct wkv_packing *, int64_t begin, int64_t end)) \
  KERNEL(cross_attention, (const struct wkv_cross_attention *, void *scratch, int64_t begin, int64_t end)) \
  KERNEL(cross_finish, (const struct wkv_cross_attention *, int64_t begin, int64_t end)) \
  KERNEL(pack_matrix, (const struct wkv_matrix_packing *, int64_t begin, int64_t end)) \
  KERNEL(make_ready, (const struct wkv_rows *, int64_t begin, int64_t end)) \
  KERNEL(linear, (const struct wkv_linear *, int64_t begin, int64_t end)) \
  KERNEL(encoder_pack, (const struct wkv_encoder_attention *, int64_t begin, int64_t end)) \
  KERNEL(encoder_attention, (const struct wkv_encoder_attention *, void *scratch, int64_t begin, int64_t end)) \
  KERNEL(gather_kept, (const struct wkv_gathering *, int64_t begin, int64_t end)) \
  KERNEL(ragged_attention, (const struct wkv_ragged_attention *, void *scratch, int64_t begin, int64_t end)) \
  KERNEL(ragged_finish, (const struct wkv_ragged_attention *, int64_t begin, int64_t end)) \
  KERNEL(received_pack, (const struct wkv_received *, int64_t begin, int64_t end)) \
  KERNEL(attention_received, (const struct wkv_received *, void *scratch, int64_t begin, int64_t end)) \
  KERNEL(received_finish, (const struct wkv_received *, int64_t begin, int64_t end)) \
  KERNEL(choose, (const struct wkv_choice *, int64_t begin, int64_t end)) \
  KERNEL(choose_finish, (const struct wkv_choice *, int64_t begin, int64_t end))

#define WKV_KERNEL_FIELD(name, arguments) void(*name) arguments;
struct wkv_cpu_kernels {
  const char *isa;
  WKV_CPU_KERNELS(WKV_KERNEL_FIELD)
};

/* The kernels for this machine, or for the instruction set named ("portable", "avx2", "avx512", "avx512_vnni",
 * "avx512_bf16", "amx"); NULL with a reason written to error if that one is unknown or not supported here. isa NULL or
 * "" means the best. */
const struct wkv_cpu_kernels *wkv_cpu_select(const char *isa, char *error, size_t error_size);

/* NULL if the cursor is sound for this call, else what is wrong, written to error. CPU pointers only. Another thread
 * may still write it, so the kernels check it where they read it: a row whose own is not sound gets zeros. */
const char *wkv_check_cursor(const int32_t *cursor, int64_t rows, int64_t tokens, int64_t slots, char *error,
                             size_t error_size);

/* The same of the table of sources, if there is one; the cursor is sound. */
const char *wkv_check_sources(const struct wkv_attention *, char *error, size_t error_size);

/* ---- on a GPU: the whole of a problem, whose pointers are the device's, on a cudaStream_t ----
 *
 * They return NULL, or what CUDA says is wrong. They wait for nothing and take no memory, so that a graph can capture
 * them. Cursors, owners and lengths are read by the device and cannot be checked first: a row whose own are not sound
 * gets zeros, and nothing is written where it does not belong. */

/* NULL if there are kernels for the current device and its driver, compiled as the others are. */
const char *wkv_cuda_probe(void);

const char *wkv_cuda_compact_attention(const struct wkv_attention *, void *stream);
const char *wkv_cuda_score_evict(const struct wkv_eviction *, void *stream);
const char *wkv_cuda_pack(const struct wkv_packing *, void *stream);
/* Fills splits; counters that it would not use become NULL. */
void wkv_cuda_cross_plan(struct wkv_cross_attention *);
const char *wkv_cuda_cross_attention(const struct wkv_cross_attention *, void *stream);

const char *wkv_cuda_gather_kept(const struct wkv_gathering *, void *stream);
/* Fills ranges. */
void wkv_cuda_ragged_plan(struct wkv_ragged_attention *);
const char *wkv_cuda_ragged_attention(const struct wkv_ragged_attention *, void *stream);
const char *wkv_cuda_attention_received(const struct wkv_received *, void *stream);

#ifdef __cplusplus
}
#endif
#endif
