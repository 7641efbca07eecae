/* A decoder's step on the CPU: the kernels of all layers one after another, in memory that is taken once. */
#include <stdlib.h>
#include <string.h>

#include "torch_cpu.h"
#include "torch_step.h"

/* Memory for what lies between the kernels. */
struct room {
  float *normed, *query, *key, *value; /* [rows, width] */
  float *mixed;                        /* [rows, width]: what an attention says */
  float *hidden;                       /* [rows, hidden] */
  float *folded, *heard;               /* [rows, heads, width]: of latents, which have so many channels at most */
  float *weights;                      /* [rows, heads, slots]: of the policies that read them */
  uint32_t *ready;                     /* of rows, or of the rows of every head */
  struct wkv_step *steps;
  struct wkv_linear *by_head; /* [heads] */
};

/* ---- products ---- */

/* Where the rows of the inputs that come next are made ready, from row `first` of that place on. */
static struct wkv_rows rows_of(const struct step *const s, const struct room *const room, const float *const x,
                               const int64_t inputs, const int64_t stride, const int64_t first) {
  const int64_t ready_stride = wkv_ready_stride(s->format, inputs);
  return (struct wkv_rows){
      .rows = s->rows,
      .inputs = inputs,
      .format = s->format,
      .x = x,
      .stride = stride,
      .epsilon = s->epsilon,
      .ready = room->ready + first * ready_stride,
      .ready_stride = ready_stride,
      .steps = room->steps + first,
  };
}

static bool ready(struct call *const call, struct wkv_rows *const rows, const struct norm norm) {
  rows->norm_weight = norm.weight;
  rows->norm_bias = norm.bias;
  return make_rows_ready(call, rows);
}

static struct wkv_linear linear_of(const struct wkv_rows *const rows, const struct matrix matrix, const int64_t outputs,
                                   float *const output, const int64_t stride) {
  return (struct wkv_linear){
      .rows = rows->rows,
      .inputs = rows->inputs,
      .outputs = outputs,
      .format = rows->format,
      .ready = rows->ready,
      .ready_stride = rows->ready_stride,
      .steps = rows->steps,
      .weight = matrix.weight,
      .is_packed = matrix.is_packed,
      .bias = matrix.bias,
      .residual_rows = 1,
      .output = output,
      .output_stride = stride,
  };
}

/* x += matrix(from) */
static bool add_product(struct call *const call, const struct step *const s, const struct room *const room,
                        const float *const from, const int64_t inputs, const struct matrix matrix, float *const x) {
  struct wkv_rows rows = rows_of(s, room, from, inputs, inputs, 0);
  if (!ready(call, &rows, (struct norm){0})) return false;
  struct wkv_linear linear = linear_of(&rows, matrix, s->width, x, s->width);
  linear.residual = x;
  linear.residual_rows = s->rows;
  return multiply_all(call, &linear, 1);
}

/* ---- self-attention ---- */

static struct wkv_attention attention_of(const struct step *const s, const struct room *const room,
                                         const struct step_layer *const layer) {
  return (struct wkv_attention){
      .rows = s->rows,
      .tokens = 1,
      .heads = s->heads,
      .kv_heads = s->rank ? 1 : s->heads,
      .slots = s->slots,
      .head_dim = s->rank ? s->rank : s->width / s->heads,
      .dtype = WKV_FLOAT32,
      .query = s->rank ? room->folded : room->query,
      .key = room->key,
      .value = s->rank ? NULL : room->value,
      .keys = layer->keys,
      .values = layer->values,
      .cursor = layer->cursor,
      .sources = s->sources,
      .output = s->rank ? room->heard : room->mixed,
      .weights = room->weights,
      .scale = s->scale,
  };
}

/* Asked before the first layer, so that a step that is refused has written to no cache. */
static bool are_cursors_sound(struct call *const call, const struct step *const s, const struct room *const room) {
  for (int64_t i = 0; i < s->layers; i++) {
    const struct wkv_attention attention = attention_of(s, room, &s->layer[i]);
    if (!is_sound(call, &attention)) return false;
  }
  return true;
}

/* Each head's query times its keys' weights; what each head heard times its values' weights. The matrix of a head is a
 * part of the whole one. */
static bool multiply_heads(struct call *const call, const struct step *const s, const struct room *const room,
                           const float *const x, const int64_t inputs, const int64_t stride, const struct matrix matrix,
                           const int64_t outputs, float *const output, const int64_t output_stride) {
  const int64_t panels = outputs / WKV_PANEL * wkv_panel_words(s->format, inputs);
  for (int64_t h = 0; h < s->heads; h++) {
    struct wkv_rows rows = rows_of(s, room, x + h * inputs, inputs, stride, h * s->rows);
    struct matrix part = matrix;
    part.weight = matrix.is_packed ? (const void *)((const uint32_t *)matrix.weight + h * panels)
                                   : (const void *)((const float *)matrix.weight + h * outputs * inputs);
    part.bias = matrix.bias ? matrix.bias + h * outputs : NULL;
    if (!ready(call, &rows, (struct norm){0})) return false;
    room->by_head[h] = linear_of(&rows, part, outputs, output + h * outputs, output_stride);
  }
  return multiply_all(call, room->by_head, (int)s->heads);
}

static bool attend_latents(struct call *const call, const struct step *const s, const struct room *const room,
                           const struct step_layer *const layer, float *const x) {
  const int64_t width = s->width, head_dim = width / s->heads, whole = s->heads * s->rank;
  struct wkv_rows rows = rows_of(s, room, x, width, width, 0);
  const struct wkv_linear projections[] = {linear_of(&rows, layer->query, width, room->query, width),
                                           linear_of(&rows, layer->key, s->rank, room->key, s->rank)};
  const struct wkv_attention attention = attention_of(s, room, layer);
  return ready(call, &rows, layer->before_self) && multiply_all(call, projections, 2) &&
         multiply_heads(call, s, room, room->query, head_dim, width, layer->key_up, s->rank, room->folded, whole) &&
         attend_sound(call, &attention) &&
         multiply_heads(call, s, room, room->heard, s->rank, whole, layer->value, head_dim, room->mixed, width) &&
         add_product(call, s, room, room->mixed, width, layer->out, x);
}

static bool attend_self(struct call *const call, const struct step *const s, const struct room *const room,
                        const struct step_layer *const layer, float *const x) {
  if (s->rank) return attend_latents(call, s, room, layer, x);
  struct wkv_rows rows = rows_of(s, room, x, s->width, s->width, 0);
  const struct wkv_linear projections[] = {linear_of(&rows, layer->query, s->width, room->query, s->width),
                                           linear_of(&rows, layer->key, s->width, room->key, s->width),
                                           linear_of(&rows, layer->value, s->width, room->value, s->width)};
  const struct wkv_attention attention = attention_of(s, room, layer);
  return ready(call, &rows, layer->before_self) && multiply_all(call, projections, 3) &&
         attend_sound(call, &attention) && add_product(call, s, room, room->mixed, s->width, layer->out, x);
}

/* The cursor moves on, by what the policy says or to the next free slot. */
static bool move_on(struct call *const call, const struct step *const s, const struct room *const room,
                    const struct step_layer *const layer) {
  if (s->policy < 0) {
    for (int64_t row = 0; row < s->rows; row++) {
      const int32_t seen = layer->cursor[WKV_SEEN * s->rows + row] + 1, live = seen > 0 ? seen : 0;
      layer->cursor[WKV_SEEN * s->rows + row] = seen;
      layer->cursor[WKV_LIVE * s->rows + row] = layer->cursor[WKV_SLOT * s->rows + row] = live;
    }
    return true;
  }
  const struct wkv_eviction eviction = {
      .rows = s->rows,
      .tokens = 1,
      .heads = s->heads,
      .slots = s->slots,
      .head_dim = s->width / s->heads,
      .dtype = WKV_FLOAT32,
      .weights = room->weights,
      .keys = layer->keys,
      .cursor = layer->cursor,
      .positions = layer->positions,
      .scores = layer->scores,
      .policy = s->policy,
      .budget = s->budget,
      .recent = s->recent,
      .decay = s->decay,
  };
  return device_evict(call, &eviction);
}

/* ---- cross-attention ---- */

static bool attend_cross(struct call *const call, const struct step *const s, const struct room *const room,
                         const struct step_layer *const layer, struct wkv_cross_attention *const audio,
                         float *const x) {
  const int64_t width = s->width, latent = s->latent, whole = s->heads * latent, head_dim = width / s->heads;
  struct wkv_rows rows = rows_of(s, room, x, width, width, 0);
  const struct wkv_linear projection = linear_of(&rows, layer->cross_query, width, room->query, width);
  audio->keys = layer->audio_keys;
  audio->values = layer->audio_values;
  if (s->bits != WKV_MIXED) { /* of which there are copies, the same for all layers */
    audio->key_scales = layer->key_scales;
    audio->value_scales = layer->value_scales;
  }
  if (!ready(call, &rows, layer->before_cross) || !multiply_all(call, &projection, 1)) return false;
  if (s->is_latent) {
    audio->query = room->folded;
    audio->output = room->heard;
    if (!multiply_heads(call, s, room, room->query, head_dim, width, layer->cross_key, latent, room->folded, whole) ||
        !run_cross(call, audio) ||
        !multiply_heads(call, s, room, room->heard, latent, whole, layer->cross_value, head_dim, room->mixed, width))
      return false;
  } else {
    audio->query = room->query;
    audio->output = room->mixed;
    if (!run_cross(call, audio)) return false;
  }
  return add_product(call, s, room, room->mixed, width, layer->cross_out, x);
}

/* ---- the rest ---- */

static bool think(struct call *const call, const struct step *const s, const struct room *const room,
                  const struct step_layer *const layer, float *const x) {
  struct wkv_rows rows = rows_of(s, room, x, s->width, s->width, 0);
  struct wkv_linear first = linear_of(&rows, layer->first, s->hidden, room->hidden, s->hidden);
  first.activation = WKV_GELU;
  return ready(call, &rows, layer->before_hidden) && multiply_all(call, &first, 1) &&
         add_product(call, s, room, room->hidden, s->hidden, layer->second, x);
}

static bool norm_last(struct call *const call, const struct step *const s, float *const x) {
  struct wkv_rows rows = {.rows = s->rows,
                          .inputs = s->width,
                          .format = WKV_AS_FLOAT32,
                          .x = x,
                          .stride = s->width,
                          .epsilon = s->epsilon,
                          .ready = (uint32_t *)s->output,
                          .ready_stride = s->width};
  return ready(call, &rows, s->last);
}

static bool run(struct call *const call, const struct step *const s, const struct room *const room,
                struct wkv_cross_attention *const audio, float *const x) {
  for (int64_t i = 0; i < s->layers; i++) {
    const struct step_layer *const layer = &s->layer[i];
    if (!attend_self(call, s, room, layer, x) || !move_on(call, s, room, layer) ||
        (s->audios && !attend_cross(call, s, room, layer, audio, x)) || !think(call, s, room, layer, x))
      return false;
  }
  return norm_last(call, s, x);
}

static int64_t larger_of(const int64_t a, const int64_t b) { return a > b ? a : b; }

/* Pieces of one block, each at a whole line of memory; with no block, only what they take together. */
static float *piece(char *const block, int64_t *const bytes, const int64_t numbers) {
  float *const at = (float *)((uintptr_t)block + (uintptr_t)*bytes);
  *bytes += wkv_round_up(numbers * (int64_t)sizeof(float), 64);
  return at;
}

static int64_t furnish(const struct step *const s, char *const block, struct room *const room, float **const x) {
  const int64_t rows = s->rows, width = rows * s->width, by_head = s->is_latent || s->rank ? rows * s->heads : 0;
  const int64_t widest = larger_of(s->width, s->hidden);
  int64_t bytes = 0;
  *x = piece(block, &bytes, width);
  room->query = piece(block, &bytes, width);
  room->key = piece(block, &bytes, width);
  room->value = piece(block, &bytes, width);
  room->mixed = piece(block, &bytes, width);
  room->hidden = piece(block, &bytes, rows * s->hidden);
  room->folded = piece(block, &bytes, by_head * s->width);
  room->heard = piece(block, &bytes, by_head * s->width);
  room->weights = piece(block, &bytes, s->policy < 0 ? 0 : rows * s->heads * s->slots);
  room->ready = (uint32_t *)piece(
      block, &bytes,
      larger_of(rows * wkv_ready_stride(s->format, widest), by_head * wkv_ready_stride(s->format, s->width)));
  room->steps = (struct wkv_step *)piece(block, &bytes, 2 * larger_of(rows, by_head));
  room->by_head = (struct wkv_linear *)piece(block, &bytes, s->heads * (int64_t)sizeof *room->by_head / 4);
  if (s->policy < 0) room->weights = NULL;
  return bytes;
}

bool device_step(struct call *const call, const struct step *const s) {
  if (s->rows == 0) return true;
  struct room room;
  float *x;
  const int64_t bytes = furnish(s, NULL, &room, &x);
  char *const block = aligned_alloc(64, (size_t)bytes);
  if (!block) return fail(call, "no memory for a step of %lld rows", (long long)s->rows);
  furnish(s, block, &room, &x);
  memcpy(x, s->x, (size_t)(s->rows * s->width) * sizeof *x);

  int32_t *const owner = s->audios ? copy_checked(call, s->owner, s->rows, s->lengths, s->audios, s->frames) : NULL;
  struct wkv_cross_attention audio = {
      .rows = s->rows,
      .tokens = s->is_latent ? s->heads : 1,
      .heads = s->is_latent ? 1 : s->heads,
      .head_dim = s->is_latent ? s->latent : s->width / s->heads,
      .audios = s->audios,
      .frames = s->frames,
      .dtype = WKV_FLOAT32,
      .bits = s->bits,
      .group = s->group,
      .tile_bytes = s->tile_bytes,
      .key_scales = s->layer[0].key_scales,
      .value_scales = s->layer[0].value_scales,
      .owner = owner,
      .lengths = owner ? owner + s->rows : NULL,
      .bias = s->bias,
      .scale = s->scale,
  };
  const bool is_planned = owner && copy_mixed(call, &audio) && plan_cross(call, &audio);
  const bool done = (!s->audios || is_planned) && are_cursors_sound(call, s, &room) && run(call, s, &room, &audio, x);
  if (owner) end_cross(&audio);
  free(owner);
  free(block);
  return done;
}
