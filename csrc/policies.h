/* Every eviction policy: what a kept token is worth. The slot worth least is overwritten first.
 *
 * A policy is one function of a token and one line of WKV_POLICIES, read by C and CUDA alike. It is called for
 * every live slot after every new token and returns the slot's new score. Pinned and recent tokens are protected
 * by the caller, so a policy never sees which they are. */
#ifndef WHISPERKV_POLICIES_H
#define WHISPERKV_POLICIES_H

#ifdef __CUDACC__
#define WKV_POLICY static __host__ __device__ inline float
#else
#define WKV_POLICY static inline float
#endif

struct wkv_token {
  float score;     /* what the policy returned last time; 0 for a new token */
  float attention; /* what the newest token's query gave this slot, summed over heads */
  float key_norm;  /* squared length of the key over all heads; set for a new token only */
  float position;  /* place in the transcript, 0 for the first token of the prompt */
  float decay;
  int is_new; /* this token was written in this step */
};

/* Attention received so far, older steps counting less: what later tokens looked at stays. */
WKV_POLICY wkv_heavy_hitter(struct wkv_token t) { return t.decay * t.score + t.attention; }

/* Keys of small norm draw the most attention, so they stay. Needs no attention weights. */
WKV_POLICY wkv_magnitude(struct wkv_token t) { return t.is_new ? -t.key_norm : t.score; }

/* The oldest goes first. */
WKV_POLICY wkv_window(struct wkv_token t) { return t.position; }

/* P(name, reads_attention, reads_key_norm); the order is the number that the ops take. */
#define WKV_POLICIES(P) \
  P(heavy_hitter, 1, 0) \
  P(magnitude, 0, 1) \
  P(window, 0, 0)

#endif
