/* The torch ops of namespace whisperkv. */
#ifndef WHISPERKV_TORCH_OPS_H
#define WHISPERKV_TORCH_OPS_H
#include "torch_call.h"

struct torch_op {
  const char *name, *schema;
  bool (*run)(struct call *, const StableIValue *numbers); /* numbers: what follows the tensors on the stack */
  int tensors, results, lists;                             /* on the stack, the lists of tensors follow the tensors */
};

/* O(name): torch_self.c, torch_cross.c, torch_frames.c, torch_choose.c, torch_linear.c, torch_prune.c and torch_step.c
 * define name##_op. */
#define TORCH_OPS(O) \
  O(compact_attention) \
  O(score_evict) \
  O(pack_frames) \
  O(cross_attention) \
  O(encoder_attention) \
  O(pack_matrix) \
  O(linear) \
  O(decoder_step) \
  O(gather_kept) \
  O(ragged_attention) \
  O(attention_received) \
  O(choose_tokens)

/* Registers their schemas, if told to, and their kernels for the device of this module, for the life of the process;
 * torch_shim_load comes first. NULL, or the step that failed. */
const char *torch_ops_register(bool with_schemas);

#endif
