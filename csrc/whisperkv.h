/* The one contract between bindings and kernels: plain structs of pointers and sizes. Shapes in brackets are
 * row-major and contiguous. A row is one sequence being decoded: one audio, or one beam of it. */
#ifndef WHISPERKV_H
#define WHISPERKV_H
#include <stddef.h>
#include <stdint.h>

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
 * The cursor is read, not moved: score_evict, or the caller, moves it. */
struct wkv_attention {
  int64_t rows, tokens, heads, slots, head_dim;
  enum wkv_dtype dtype;              /* of query, key, value, keys, values, output */
  const void *query, *key, *value;   /* [rows, tokens, heads, head_dim] */
  void *keys, *values;               /* [rows, heads, slots, head_dim] */
  const int32_t *cursor;             /* [WKV_CURSORS, rows] */
  void *output;                      /* [rows, tokens, heads, head_dim] */
  float *weights;                    /* [rows, heads, tokens, slots], dead slots 0; NULL if not wanted */
  float scale;                       /* of the query, applied in float32 */
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
  enum wkv_dtype dtype;       /* of keys */
  const float *weights;       /* [rows, heads, tokens, slots] */
  const void *keys;           /* [rows, heads, slots, head_dim] */
  int32_t *cursor;            /* [WKV_CURSORS, rows] */
  int32_t *positions;         /* [rows, slots]; of live slots only */
  float *scores;              /* [rows, slots]; of live slots only */
  int policy;                 /* number in WKV_POLICIES */
  int64_t budget, recent;     /* slots in use at most; newest tokens that are safe, the next one included */
  float decay;
};

/* One instruction set's kernels. Work items are independent and each is done by one thread in a fixed order, so the
 * bits do not depend on how the items are shared out. */
struct wkv_cpu_kernels {
  const char *isa;
  /* items [begin, end) of rows * heads */
  void (*compact_attention)(const struct wkv_attention *, int64_t begin, int64_t end);
  /* items [begin, end) of rows */
  void (*score_evict)(const struct wkv_eviction *, int64_t begin, int64_t end);
};

/* The kernels for this machine, or for the instruction set named ("portable", "avx2", "avx512"); NULL with a
 * reason written to error if that one is unknown or not supported here. isa NULL or "" means the best. */
const struct wkv_cpu_kernels *wkv_cpu_select(const char *isa, char *error, size_t error_size);

/* NULL if the cursor is sound for this call, else what is wrong, written to error. CPU pointers only. */
const char *wkv_check_cursor(const int32_t *cursor, int64_t rows, int64_t tokens, int64_t slots, char *error,
                             size_t error_size);

#endif
