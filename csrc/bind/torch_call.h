/* One call of a torch op: what it was given, and what it may be given. */
#ifndef WHISPERKV_TORCH_CALL_H
#define WHISPERKV_TORCH_CALL_H
#include <stdbool.h>

#include "../whisperkv.h"
#include "memory.h"
#include "torch_shim.h"

/* The sides of tensors that must be the same in a call, or be as the call says, and how messages name them. */
#define SIZE_NAMES(S) \
  S(ROWS, "rows") \
  S(TOKENS, "tokens") \
  S(HEADS, "heads") \
  S(SLOTS, "slots") \
  S(DIM, "dim") \
  S(CURSORS, "cursors") \
  S(AUDIOS, "audios") \
  S(FRAMES, "frames") \
  S(TILES, "tiles") \
  S(STRIP, "strip") \
  S(CHANNELS, "channels") \
  S(GROUPS, "groups") \
  S(PAIR, "2") \
  S(TILE_BYTES, "tile bytes") \
  S(COUNTED, "counters") \
  S(INPUTS, "inputs") \
  S(OUTPUTS, "outputs") \
  S(PANELS, "panels") \
  S(WORDS, "words") \
  S(OTHER_ROWS, "other rows") \
  S(HEAD, "head") \
  S(AUDIO_HEADS, "audio heads") \
  S(BEAMS, "beams") \
  S(VOCABULARY, "vocabulary") \
  S(KV_HEADS, "kv_heads") \
  S(MOST, "most") \
  S(QUERIES, "queries") \
  S(RANK, "rank")
#define SIZE(size, name) size,
enum size { SIZE_NAMES(SIZE) SIZES };

enum { UNKNOWN = -1, CACHE = TORCH_DTYPE_COUNT };
enum { MAX_DIM = 5, MAX_LISTS = 3, MAX_RESULTS = 2, MAX_BORROWED = 3, ERROR_SIZE = 512 };

struct argument {
  const char *name;
  int dtype; /* CACHE: one that the kernels know, the same for all such arguments */
  int dim;
  enum size shape[MAX_DIM];
};

/* Its tensors, those in lists after the others, and what those accepted so far say about the rest. */
struct call {
  AtenTensorHandle *tensors, results[MAX_RESULTS], borrowed[MAX_BORROWED];
  void **data;
  size_t *bytes;                          /* 0 of those that are not read */
  int first[MAX_LISTS], count[MAX_LISTS]; /* of each list: which tensors are in it */
  int64_t sizes[SIZES];
  int cache_dtype, device_index; /* UNKNOWN, until a tensor says */
  CUDAGuardHandle guard;         /* while a kernel is launched */
  char error[ERROR_SIZE];
};

/* Writes the error; returns false, as all that follow do when they refuse. */
__attribute__((format(printf, 2, 3))) bool fail(struct call *, const char *format, ...);

/* Checks tensor i of a call. One that the op does not read lends its shape alone: it may be an expanded scalar. */
bool accept(struct call *, int i, const struct argument *, bool is_read);

/* The same of one whose rows may lie apart, each whole: [rows, numbers], so many numbers from one to the next. */
bool accept_rows(struct call *, int i, const struct argument *, int64_t *stride);

/* The same of four sides, of which the last alone must lie side by side. */
bool accept_view(struct call *, int i, const struct argument *, struct wkv_view *);

/* Of the tensors accepted, those that the op writes (a bit of `written` each) share memory with no other. */
bool are_apart(struct call *, const struct argument *, int count, unsigned written);

/* Whether tensor i has no elements, which stands for none where one may be left out. */
bool is_empty(const struct call *, int i);

/* Of a tensor that may be one of several dtypes: its place in TORCH_DTYPES. */
int dtype_of(const struct call *, int i);

bool needs_no_grad(struct call *, const struct argument *, int count);
bool is_within(struct call *, const char *name, int64_t number, int64_t least, int64_t most);
bool is_finite(struct call *, const char *name, double number);

/* Frames of a packed cache that share a step. */
bool is_group(struct call *, int64_t group);

/* A new contiguous tensor, the i-th result of the call. */
bool new_result(struct call *, int i, int dim, const int64_t *sizes, int dtype, void **data);

/* Memory for as long as the call runs: two more tensors, released with it. NULL if there is none. */
void *borrow(struct call *, int64_t floats);

/* Of a head in a packed cache, and in the sums of its ranges of frames. */
static inline int64_t padded_channels(const int64_t head_dim) { return wkv_round_up(head_dim, WKV_CHANNELS); }

bool as_bool(StableIValue);
double as_double(StableIValue);

#endif
