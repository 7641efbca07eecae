/* Where the ops run. A module is made for one device: torch_cpu.c or torch_cuda.c defines all of this. */
#ifndef WHISPERKV_TORCH_DEVICE_H
#define WHISPERKV_TORCH_DEVICE_H
#include "torch_call.h"

/* Of its tensors, and the name that torch's dispatcher has for it. */
extern const enum torch_device device_type;
extern const char *const device_key;

/* The codes of packed caches begin at a multiple of so many bytes. */
extern const int codes_alignment;

/* Makes the kernels ready: what they are called, or NULL with a reason written to error. */
const char *device_start(char *error, size_t error_size);

/* The work of the ops. What the pointers lead to has not been looked at yet; false with the error written to call. */
bool device_attend(struct call *, const struct wkv_attention *);
bool device_evict(struct call *, const struct wkv_eviction *);
bool device_pack(struct call *, const struct wkv_packing *);
/* Plans it and takes the memory for that. */
bool device_attend_cross(struct call *, struct wkv_cross_attention *);
/* On the CPU alone. */
bool device_attend_frames(struct call *, struct wkv_encoder_attention *);

/* Matrices. rows says what x is, and linear what becomes of it; the rest is taken care of. */
bool device_pack_matrix(struct call *, const struct wkv_matrix_packing *);
bool device_linear(struct call *, const struct wkv_rows *, const struct wkv_linear *);
/* Pruned caches. What these need beside is taken care of. */
bool device_gather(struct call *, struct wkv_gathering *);
bool device_attend_ragged(struct call *, struct wkv_ragged_attention *);
bool device_receive(struct call *, struct wkv_received *);

/* Takes the memory for it. */
bool device_choose(struct call *, struct wkv_choice *);

#endif
