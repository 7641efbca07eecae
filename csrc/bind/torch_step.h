/* A decoder's step: one new token a row, through all layers. */
#ifndef WHISPERKV_TORCH_STEP_H
#define WHISPERKV_TORCH_STEP_H
#include "torch_call.h"

struct norm {
  const float *weight, *bias;
};

struct matrix {
  const void *weight;
  const float *bias;
  bool is_packed;
};

struct step_layer {
  struct norm before_self, before_cross, before_hidden;
  struct matrix query, key, value, out;
  struct matrix key_up; /* of latents: each head's [rank, head_dim]; key is [rank, width] then, and value
                           each head's [head_dim, rank] */
  struct matrix cross_query, cross_out;
  struct matrix cross_key, cross_value; /* of the latent formats; each head's: [latent, head_dim], [head_dim, latent] */
  struct matrix first, second;
  void *keys, *values;
  int32_t *cursor, *positions;
  float *scores;
  const void *audio_keys, *audio_values;
  const float *key_scales, *value_scales;
};

struct step {
  int64_t rows, layers, width, heads, hidden, slots, audios, frames; /* no audios: no cross-attention */
  enum wkv_format format;
  float epsilon, scale;
  const float *x; /* [rows, width] */
  float *output;  /* [rows, width] */
  const int32_t *sources, *owner, *lengths;
  const float *bias; /* [audios, frames], or NULL */
  int bits;          /* of what the audios are held in */
  int64_t group, tile_bytes;
  bool is_latent;
  int64_t latent; /* channels of an audio's frames, if so */
  int64_t rank;   /* of the latents in the self-attention's cache; 0: it holds keys and values */
  int policy;     /* -1: nothing is evicted */
  int64_t budget, recent;
  float decay;
  struct step_layer *layer; /* [layers] */
  struct norm last;
};

bool device_step(struct call *, const struct step *);

#endif
