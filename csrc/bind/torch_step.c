/* The op of a decoder's step. */
#include <stdlib.h>

#include "policy_table.h"
#include "torch_ops.h"
#include "torch_step.h"

enum { X, SOURCES, OWNER, LENGTHS, BIAS, STEP_TENSORS };
enum { CACHES, HEARD, WEIGHTS, STEP_LISTS };
static const struct argument tensors[STEP_TENSORS] = {
    [X] = {"x", TORCH_DTYPE_float32, 2, {ROWS, DIM}},
    [SOURCES] = {"sources", TORCH_DTYPE_int32, 2, {ROWS, SLOTS}},
    [OWNER] = {"owner", TORCH_DTYPE_int32, 1, {ROWS}},
    [LENGTHS] = {"lengths", TORCH_DTYPE_int32, 1, {AUDIOS}},
    [BIAS] = {"bias", TORCH_DTYPE_float32, 2, {AUDIOS, FRAMES}},
};

/* What the lists hold of each layer, in this order. HEAD is the size of a head. */
enum { KEYS, VALUES, CURSOR, POSITIONS, SCORES, CACHES_OF_LAYER };
static const struct argument caches[CACHES_OF_LAYER] = {
    [KEYS] = {"keys", TORCH_DTYPE_float32, 4, {ROWS, HEADS, SLOTS, HEAD}},
    [VALUES] = {"values", TORCH_DTYPE_float32, 4, {ROWS, HEADS, SLOTS, HEAD}},
    [CURSOR] = {"cursor", TORCH_DTYPE_int32, 2, {CURSORS, ROWS}},
    [POSITIONS] = {"positions", TORCH_DTYPE_int32, 2, {ROWS, SLOTS}},
    [SCORES] = {"scores", TORCH_DTYPE_float32, 2, {ROWS, SLOTS}},
};

static const struct argument latents = {"keys", TORCH_DTYPE_float32, 4, {ROWS, KV_HEADS, SLOTS, RANK}};

enum { AUDIO_KEYS, AUDIO_VALUES, KEY_SCALES, VALUE_SCALES, HEARD_OF_LAYER };
static const struct argument plain[HEARD_OF_LAYER] = {
    [AUDIO_KEYS] = {"audio keys", TORCH_DTYPE_float32, 4, {AUDIOS, AUDIO_HEADS, FRAMES, CHANNELS}},
    [AUDIO_VALUES] = {"audio values", TORCH_DTYPE_float32, 4, {AUDIOS, AUDIO_HEADS, FRAMES, CHANNELS}},
};
static const struct argument packed[HEARD_OF_LAYER] = {
    [AUDIO_KEYS] = {"audio keys", TORCH_DTYPE_uint8, 5, {AUDIOS, AUDIO_HEADS, TILES, STRIP, CHANNELS}},
    [AUDIO_VALUES] = {"audio values", TORCH_DTYPE_uint8, 5, {AUDIOS, AUDIO_HEADS, TILES, STRIP, CHANNELS}},
    [KEY_SCALES] = {"key scales", TORCH_DTYPE_float32, 5, {AUDIOS, AUDIO_HEADS, GROUPS, PAIR, CHANNELS}},
    [VALUE_SCALES] = {"value scales", TORCH_DTYPE_float32, 5, {AUDIOS, AUDIO_HEADS, GROUPS, PAIR, CHANNELS}},
};

static const struct argument mixed[HEARD_OF_LAYER] = {
    [AUDIO_KEYS] = {"audio keys", TORCH_DTYPE_uint8, 4, {AUDIOS, AUDIO_HEADS, TILES, TILE_BYTES}},
    [AUDIO_VALUES] = {"audio values", TORCH_DTYPE_uint8, 4, {AUDIOS, AUDIO_HEADS, TILES, TILE_BYTES}},
    [KEY_SCALES] = {"key scales", TORCH_DTYPE_float32, 5, {AUDIOS, AUDIO_HEADS, GROUPS, PAIR, CHANNELS}},
    [VALUE_SCALES] = {"value scales", TORCH_DTYPE_float32, 1, {CHANNELS}},
};

/* Weight, bias, weight, bias, ... */
enum {
  NORM_SELF,
  QUERY,
  KEY,
  VALUE,
  OUT,
  NORM_CROSS,
  CROSS_QUERY,
  CROSS_KEY,
  CROSS_VALUE,
  CROSS_OUT,
  NORM_HIDDEN,
  FIRST,
  SECOND,
  KEY_UP,
  WEIGHTS_OF_LAYER
};
static const struct argument vector = {"a bias or norm", TORCH_DTYPE_float32, 1, {OUTPUTS}};
static const struct argument matrix_in_place = {"a weight", TORCH_DTYPE_float32, 2, {OUTPUTS, INPUTS}};
static const struct argument panels = {"a weight", TORCH_DTYPE_int32, 2, {PANELS, WORDS}};

/* Tensors i and i + 1: so many numbers each. */
static bool take_norm(struct call *const call, const int i, struct norm *const norm) {
  call->sizes[OUTPUTS] = call->sizes[DIM];
  if (!accept(call, i, &vector, true) || !accept(call, i + 1, &vector, true)) return false;
  *norm = (struct norm){call->data[i], call->data[i + 1]};
  return true;
}

static bool take_matrix(struct call *const call, const enum wkv_format format, const int i, const int64_t outputs,
                        const int64_t inputs, const int64_t biases, struct matrix *const matrix) {
  int64_t *const size = call->sizes;
  const bool is_packed = dtype_of(call, i) == TORCH_DTYPE_int32, has_bias = !is_empty(call, i + 1);
  if (!is_packed && format != WKV_AS_FLOAT32) return fail(call, "weights must come from pack_matrix for this format");
  size[OUTPUTS] = outputs;
  size[INPUTS] = inputs;
  size[PANELS] = wkv_count_of(outputs, WKV_PANEL);
  size[WORDS] = wkv_panel_words(format, inputs);
  if (!accept(call, i, is_packed ? &panels : &matrix_in_place, true)) return false;
  size[OUTPUTS] = biases;
  if (has_bias && !accept(call, i + 1, &vector, true)) return false;
  *matrix = (struct matrix){call->data[i], has_bias ? call->data[i + 1] : NULL, is_packed};
  return true;
}

static bool is_whole(struct call *const call, const char *const name, const int64_t number, const int64_t unit) {
  return (number > 0 && number <= WKV_MOST_INPUTS && number % unit == 0) ||
         fail(call, "%s must be a multiple of %lld in 1..%lld, got %lld", name, (long long)unit,
              (long long)WKV_MOST_INPUTS, (long long)number);
}

/* The weights of keys and values, which each head takes its part of: where they are panels, it begins with one. What a
 * bias of the keys would add to all logits alike, softmax drops. */
static bool take_parts(struct call *const call, const struct step *const s, const int i,
                       struct step_layer *const layer) {
  const int64_t d = s->width, head = d / s->heads, latent = s->latent;
  const int key = i + 2 * CROSS_KEY, value = i + 2 * CROSS_VALUE;
  if (!is_empty(call, key + 1)) return fail(call, "the weights of the audio's keys must come without a bias");
  return take_matrix(call, s->format, key, s->heads * latent, head, d, &layer->cross_key) &&
         take_matrix(call, s->format, value, d, latent, d, &layer->cross_value) &&
         (!layer->cross_value.is_packed || is_whole(call, "a head of packed weights", head, WKV_PANEL));
}

/* The same of the self-attention's latents: what makes them of a state, and what makes keys and values of them. */
static bool take_latents(struct call *const call, const struct step *const s, const int i,
                         struct step_layer *const layer) {
  const int64_t d = s->width, head = d / s->heads, rank = s->rank;
  if (!is_empty(call, i + 2 * KEY_UP + 1)) return fail(call, "what makes keys of latents must come without a bias");
  return take_matrix(call, s->format, i + 2 * KEY, rank, d, rank, &layer->key) &&
         take_matrix(call, s->format, i + 2 * VALUE, d, rank, d, &layer->value) &&
         take_matrix(call, s->format, i + 2 * KEY_UP, s->heads * rank, head, d, &layer->key_up) &&
         (!layer->value.is_packed || is_whole(call, "a head of packed weights", head, WKV_PANEL)) &&
         (!layer->key_up.is_packed || is_whole(call, "the rank of packed weights", rank, WKV_PANEL));
}

static bool take_weights(struct call *const call, struct step *const s) {
  const int64_t d = s->width, h = s->hidden;
  for (int64_t i = 0; i < s->layers; i++) {
    struct step_layer *const layer = &s->layer[i];
    const int at = call->first[WEIGHTS] + (int)(2 * WEIGHTS_OF_LAYER * i);
#define NORM(which, norm) take_norm(call, at + 2 * which, &layer->norm)
#define MATRIX(which, outputs, inputs, biases, matrix) \
  take_matrix(call, s->format, at + 2 * which, outputs, inputs, biases, &layer->matrix)
    if (s->rank ? !take_latents(call, s, at, layer) : !MATRIX(KEY, d, d, d, key) || !MATRIX(VALUE, d, d, d, value))
      return false;
    if (!NORM(NORM_SELF, before_self) || !MATRIX(QUERY, d, d, d, query) || !MATRIX(OUT, d, d, d, out) ||
        !NORM(NORM_HIDDEN, before_hidden) || !MATRIX(FIRST, h, d, h, first) || !MATRIX(SECOND, d, h, d, second))
      return false;
    if (s->audios && (!NORM(NORM_CROSS, before_cross) || !MATRIX(CROSS_QUERY, d, d, d, cross_query) ||
                      !MATRIX(CROSS_OUT, d, d, d, cross_out)))
      return false;
    if (s->is_latent && !take_parts(call, s, at, layer)) return false;
#undef NORM
#undef MATRIX
  }
  return take_norm(call, call->first[WEIGHTS] + (int)(2 * WEIGHTS_OF_LAYER * s->layers), &s->last);
}

static bool take_caches(struct call *const call, struct step *const s) {
  for (int64_t i = 0; i < s->layers; i++) {
    struct step_layer *const layer = &s->layer[i];
    const int at = call->first[CACHES] + (int)(CACHES_OF_LAYER * i);
    const bool is_latent = is_empty(call, at + VALUES) && !is_empty(call, at + KEYS); /* which have no values */
    if (is_latent) call->sizes[KV_HEADS] = 1;
    for (int c = 0; c < (s->policy < 0 ? POSITIONS : CACHES_OF_LAYER); c++)
      if (!(is_latent && c == VALUES) && !accept(call, at + c, is_latent && c == KEYS ? &latents : &caches[c], true))
        return false;
    if (i > 0 && is_latent != (s->rank > 0)) return fail(call, "the layers must all hold latents, or none");
    s->rank = is_latent ? call->sizes[RANK] : 0;
    layer->keys = call->data[at + KEYS];
    layer->values = is_latent ? NULL : call->data[at + VALUES];
    layer->cursor = call->data[at + CURSOR];
    layer->positions = s->policy < 0 ? NULL : call->data[at + POSITIONS];
    layer->scores = s->policy < 0 ? NULL : call->data[at + SCORES];
  }
  return true;
}

/* Of mixed bits all layers read the same latents, as keys and as values. */
static bool are_one(struct call *const call, const struct step *const s) {
  const struct step_layer *const first = &s->layer[0];
  for (int64_t i = 0; i < s->layers; i++) {
    const struct step_layer *const layer = &s->layer[i];
    if (layer->audio_keys != first->audio_keys || layer->audio_values != first->audio_keys ||
        layer->key_scales != first->key_scales || layer->value_scales != first->value_scales)
      return fail(call, "audio keys and values of mixed bits must be the same tensor in all layers");
  }
  return true;
}

static bool take_audios(struct call *const call, struct step *const s, const int64_t frames) {
  int64_t *const size = call->sizes;
  const bool is_packed = dtype_of(call, call->first[HEARD]) == TORCH_DTYPE_uint8;
  int64_t sides = 0;
  const bool is_mixed = is_packed && !shim.aoti_torch_get_dim(call->tensors[call->first[HEARD]], &sides) && sides == 4;
  const struct argument *const arguments = is_mixed ? mixed : is_packed ? packed : plain;
  if (is_mixed && !s->is_latent) return fail(call, "audio keys of mixed bits are of latents");
  size[AUDIO_HEADS] = s->is_latent ? 1 : s->heads;
  const int64_t dim = s->is_latent ? s->width : s->width / s->heads;
  if (!is_mixed) size[CHANNELS] = is_packed ? padded_channels(dim) : dim;
  size[FRAMES] = frames;
  size[TILES] = wkv_count_of(frames, WKV_TILE);
  size[GROUPS] = is_packed ? wkv_count_of(frames, s->group) : 0;
  if (!accept(call, OWNER, &tensors[OWNER], true) || !accept(call, LENGTHS, &tensors[LENGTHS], true) ||
      (!is_empty(call, BIAS) && !accept(call, BIAS, &tensors[BIAS], true)))
    return false;
  for (int64_t i = 0; i < s->layers; i++) {
    struct step_layer *const layer = &s->layer[i];
    const int at = call->first[HEARD] + (int)(HEARD_OF_LAYER * i);
    for (int c = 0; c < HEARD_OF_LAYER; c++)
      if (arguments[c].name && !accept(call, at + c, &arguments[c], true)) return false;
    layer->audio_keys = call->data[at + AUDIO_KEYS];
    layer->audio_values = call->data[at + AUDIO_VALUES];
    layer->key_scales = is_packed ? call->data[at + KEY_SCALES] : NULL;
    layer->value_scales = is_packed ? call->data[at + VALUE_SCALES] : NULL;
  }
  if (is_packed && !is_mixed && size[STRIP] != 16 && size[STRIP] != 8)
    return fail(call, "audio keys must have 16 or 8 bytes a tile and channel, got %lld", (long long)size[STRIP]);
  if (is_mixed && !are_one(call, s)) return false;
  if (is_mixed && (size[CHANNELS] > s->width || size[CHANNELS] % WKV_CHANNELS))
    return fail(call, "key scales must have a multiple of %d channels, %lld at most, got %lld", WKV_CHANNELS,
                (long long)s->width, (long long)size[CHANNELS]);
  s->latent = is_mixed ? size[CHANNELS] : s->width;
  s->tile_bytes = is_mixed ? size[TILE_BYTES] : 0;
  s->bits = is_mixed ? WKV_MIXED : is_packed ? (int)size[STRIP] / 2 : 0;
  s->audios = size[AUDIOS];
  s->frames = frames;
  s->owner = call->data[OWNER];
  s->lengths = call->data[LENGTHS];
  s->bias = is_empty(call, BIAS) ? NULL : call->data[BIAS];
  return true;
}

static const char *name_of(const struct call *const call, const int i) {
  if (i < STEP_TENSORS) return tensors[i].name;
  if (i < call->first[HEARD]) return caches[(i - call->first[CACHES]) % CACHES_OF_LAYER].name;
  return i < call->first[WEIGHTS] ? packed[(i - call->first[HEARD]) % HEARD_OF_LAYER].name : "a weight";
}

/* What a layer writes shares no memory with what another one writes, nor with anything that is read. */
static bool are_caches_apart(struct call *const call) {
  const int first = call->first[CACHES], after = first + call->count[CACHES];
  const int count = call->first[WEIGHTS] + call->count[WEIGHTS];
  for (int i = first; i < after; i++)
    for (int j = 0; j < count; j++)
      if (i != j &&
          overlap((struct memory){call->data[i], call->bytes[i]}, (struct memory){call->data[j], call->bytes[j]}))
        return fail(call, "%s must have memory of its own, as it is written to, and shares some with %s",
                    name_of(call, i), name_of(call, j));
  return true;
}

static bool decoder_step(struct call *const call, const StableIValue *const numbers) {
  const int64_t format = (int64_t)numbers[0], heads = (int64_t)numbers[1], hidden = (int64_t)numbers[2];
  const int64_t frames = (int64_t)numbers[3], group = (int64_t)numbers[4], policy = (int64_t)numbers[6];
  const int64_t budget = (int64_t)numbers[7], recent = (int64_t)numbers[8];
  const double decay = as_double(numbers[9]), epsilon = as_double(numbers[10]), scale = as_double(numbers[11]);
  const int64_t layers = call->count[WEIGHTS] / (2 * WEIGHTS_OF_LAYER);
  int64_t *const size = call->sizes;
  if (shim.aoti_torch_grad_mode_is_enabled()) return fail(call, "has no gradients: call under torch.no_grad()");
  if (!is_within(call, "format", format, 0, WKV_FORMATS - 1) || !is_within(call, "heads", heads, 1, 1024) ||
      !is_within(call, "policy", policy, -1, POLICIES - 1) || !is_finite(call, "decay", decay) ||
      !is_finite(call, "epsilon", epsilon) || !is_finite(call, "scale", scale) ||
      !is_whole(call, "hidden", hidden, WKV_PANEL) || !accept(call, X, &tensors[X], true) ||
      !is_whole(call, "width", size[DIM], WKV_PANEL) || !is_whole(call, "width", size[DIM], heads))
    return false;
  if (layers < 1 || call->count[WEIGHTS] != 2 * (WEIGHTS_OF_LAYER * layers + 1) ||
      call->count[CACHES] != CACHES_OF_LAYER * layers ||
      (call->count[HEARD] && call->count[HEARD] != HEARD_OF_LAYER * layers))
    return fail(call, "the lists must be of the same layers, got %d, %d and %d tensors", call->count[CACHES],
                call->count[HEARD], call->count[WEIGHTS]);
  struct step s = {
      .rows = size[ROWS],
      .layers = layers,
      .width = size[DIM],
      .heads = heads,
      .hidden = hidden,
      .audios = call->count[HEARD] > 0, /* how many is not known yet */
      .format = (enum wkv_format)format,
      .epsilon = (float)epsilon,
      .scale = (float)scale,
      .group = group,
      .is_latent = as_bool(numbers[5]),
      .latent = size[DIM], /* of an audio with mixed bits it is less */
      .policy = (int)policy,
      .budget = budget,
      .recent = recent,
      .decay = (float)decay,
      .x = call->data[X],
      .layer = calloc((size_t)layers, sizeof *s.layer),
  };
  if (!s.layer) return fail(call, "no memory for %lld layers", (long long)layers);
  size[HEADS] = heads;
  size[HEAD] = s.width / heads;
  bool done = take_caches(call, &s);
  s.slots = size[SLOTS];
  done = done && (!s.rank || is_within(call, "rank", s.rank, 1, s.width));
  done = done && (is_empty(call, SOURCES) || accept(call, SOURCES, &tensors[SOURCES], true));
  s.sources = done && !is_empty(call, SOURCES) ? call->data[SOURCES] : NULL;
  done = done && (policy < 0 ||
                  (is_within(call, "budget", budget, 1, s.slots) && is_within(call, "recent", recent, 1, INT32_MAX)));
  done = done && (!s.audios || (is_within(call, "frames", frames, 1, INT32_MAX) && is_group(call, group) &&
                                take_audios(call, &s, frames)));
  const int64_t shape[] = {s.rows, s.width};
  done = done && take_weights(call, &s) && are_caches_apart(call) &&
         new_result(call, 0, 2, shape, TORCH_DTYPE_float32, (void **)&s.output) && device_step(call, &s);
  free(s.layer);
  return done;
}

const struct torch_op decoder_step_op = {
    .name = "decoder_step",
    .schema =
        "decoder_step(Tensor x, Tensor sources, Tensor owner, Tensor lengths, Tensor bias, Tensor(a!)[] caches, "
        "Tensor[] heard, Tensor[] weights, int format, int heads, int hidden, SymInt frames, SymInt group, "
        "bool is_latent, int policy, SymInt budget, SymInt recent, float decay, float epsilon, float scale) -> Tensor",
    .run = decoder_step,
    .tensors = STEP_TENSORS,
    .results = 1,
    .lists = STEP_LISTS,
};
