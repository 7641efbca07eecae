/* What the ops on the CPU have together. */
#ifndef WHISPERKV_TORCH_CPU_H
#define WHISPERKV_TORCH_CPU_H
#include "torch_device.h"

extern const struct wkv_cpu_kernels *cpu_kernels;

/* Which thread does an item does not change its bits. */
bool share_out(struct call *, int64_t items, double numbers_per_item, torch_range_task, void *context);

/* The same of work that needs so many bytes beside: each thread takes its own. */
typedef void scratch_task(const void *problem, void *scratch, int64_t begin, int64_t end);
bool share_out_with_scratch(struct call *, int64_t items, double numbers_per_item, scratch_task *, const void *problem,
                            size_t bytes);

/* Whether compact_attention may read what it is given, and the work of it once that is known. */
bool is_sound(struct call *, const struct wkv_attention *);
bool attend_sound(struct call *, const struct wkv_attention *);

/* Makes rows ready to be multiplied. */
bool make_rows_ready(struct call *, struct wkv_rows *);

/* Several products of the same rows, as one. */
bool multiply_all(struct call *, const struct wkv_linear *, int count);

/* The owner of each row, then the length of each audio, both sound: copies, because another thread may write to the
 * tensors during the call. NULL with the error written to call. */
int32_t *copy_checked(struct call *, const int32_t *owner, int64_t rows, const int32_t *lengths, int64_t audios,
                      int64_t frames);

/* Of mixed bits, these are sound: a copy of them, for as long as the call runs. */
bool copy_mixed(struct call *, struct wkv_cross_attention *);

/* Takes the memory that a planned call needs, until it is let go; owner and lengths are sound. */
bool plan_cross(struct call *, struct wkv_cross_attention *);
bool run_cross(struct call *, struct wkv_cross_attention *);
void end_cross(struct wkv_cross_attention *);

#endif
