/* The ops on the CPU: what tensors say is checked, and torch's threads share out the items of work. */
#include <stdlib.h>
#include <string.h>

#include "torch_device.h"
#include "torch_ops.h"

const enum torch_device device_type = TORCH_DEVICE_cpu;
const char *const device_key = "CPU";
const int codes_alignment = 1;

static const struct wkv_cpu_kernels *kernels;

const char *device_start(char *const error, const size_t error_size) {
  kernels = wkv_cpu_select(getenv("WHISPERKV_ISA"), error, error_size);
  return kernels ? kernels->isa : NULL;
}

enum { WORTH_A_THREAD = 1 << 17 }; /* numbers of the cache to read, below which waking a thread costs more */

/* Which thread does an item does not change its bits. */
static bool share_out(struct call *const call, const int64_t items, const double numbers_per_item,
                      const torch_range_task task, void *const context) {
  const int64_t items_per_thread = 1 + (int64_t)(WORTH_A_THREAD / numbers_per_item);
  if (items <= items_per_thread) return task(0, items, context), true;
  return !shim.torch_parallel_for(0, items, items_per_thread, task, context) ||
         fail(call, "torch could not share out the work");
}

/* ---- self-attention ---- */

static void attend(const int64_t begin, const int64_t end, void *const attention) {
  kernels->compact_attention(attention, begin, end);
}

bool device_attend(struct call *const call, const struct wkv_attention *const a) {
  return !wkv_check_cursor(a->cursor, a->rows, a->tokens, a->slots, call->error, sizeof call->error) &&
         !wkv_check_sources(a, call->error, sizeof call->error) &&
         share_out(call, a->rows * a->heads, 2.0 * a->tokens * a->slots * a->head_dim, attend, (void *)a);
}

static void evict(const int64_t begin, const int64_t end, void *const eviction) {
  kernels->score_evict(eviction, begin, end);
}

bool device_evict(struct call *const call, const struct wkv_eviction *const e) {
  /* several tokens were appended one after another, so none but the last may call for an eviction */
  const int64_t slots = e->tokens > 1 ? e->budget : e->slots;
  return !wkv_check_cursor(e->cursor, e->rows, e->tokens, slots, call->error, sizeof call->error) &&
         share_out(call, e->rows, 1.0 * e->tokens * e->slots * (e->heads + 1.0), evict, (void *)e);
}

/* ---- cross-attention ---- */

static void pack(const int64_t begin, const int64_t end, void *const packing) { kernels->pack(packing, begin, end); }

/* The owner of each row, then the length of each audio, both sound: copies, because another thread may write to the
 * tensors during the call. NULL with the error written to call. */
static int32_t *copy_checked(struct call *const call, const int32_t *const owner, const int64_t rows,
                             const int32_t *const lengths, const int64_t audios, const int64_t frames) {
  int32_t *const copy = malloc((size_t)(rows + audios) * sizeof *copy);
  if (!copy) return fail(call, "no memory for %lld owners and lengths", (long long)(rows + audios)), NULL;
  if (rows) memcpy(copy, owner, (size_t)rows * sizeof *copy);
  memcpy(copy + rows, lengths, (size_t)audios * sizeof *copy);
  if (!wkv_check_owners(copy, rows, copy + rows, audios, frames, call->error, sizeof call->error)) return copy;
  free(copy);
  return NULL;
}

bool device_pack(struct call *const call, const struct wkv_packing *const p) {
  const int64_t items = p->audios * p->heads * wkv_count_of(p->frames, p->group);
  int32_t *const lengths = copy_checked(call, NULL, 0, p->lengths, p->audios, p->frames);
  struct wkv_packing packing = *p;
  packing.lengths = lengths;
  const bool done = lengths && share_out(call, items, 2.0 * p->group * p->head_dim, pack, &packing);
  free(lengths);
  return done;
}

struct sharing {
  struct wkv_cross_attention *attention;
  size_t scratch;
  bool no_memory;
};

static void attend_cross(const int64_t begin, const int64_t end, void *const context) {
  struct sharing *const sharing = context;
  void *const scratch = aligned_alloc(64, (size_t)wkv_round_up((int64_t)sharing->scratch, 64));
  if (scratch) kernels->cross_attention(sharing->attention, scratch, begin, end);
  else sharing->no_memory = true;
  free(scratch);
}

static void finish_cross(const int64_t begin, const int64_t end, void *const context) {
  const struct sharing *const sharing = context;
  kernels->cross_finish(sharing->attention, begin, end);
}

static bool attend_planned(struct call *const call, struct wkv_cross_attention *const a) {
  const int64_t channels = padded_channels(a->head_dim);
  const int64_t queries = a->rows * a->tokens;
  if (queries == 0) return true;
  struct sharing sharing = {a, wkv_cross_scratch(a), false};
  a->part = malloc((size_t)queries * sizeof *a->part);
  if (a->part) wkv_cross_plan(a);
  const int64_t lines = a->splits * queries * a->heads;
  a->sums = aligned_alloc(64, (size_t)(lines * channels) * sizeof *a->sums); /* channels are whole lines of memory */
  a->totals = malloc((size_t)lines * 2 * sizeof *a->totals);
  bool done = (a->part && a->sums && a->totals) ||
              fail(call, "no memory for the sums of %lld queries", (long long)queries);
  if (done) {
    const double numbers = 2.0 * queries * a->heads * a->frames * a->head_dim;
    const int64_t items = a->parts * a->heads * a->splits;
    done = share_out(call, items, numbers / (double)items, attend_cross, &sharing) &&
           share_out(call, queries * a->heads, (double)(a->splits * channels), finish_cross, &sharing);
  }
  if (done && sharing.no_memory) done = fail(call, "no memory for a thread's scratch");
  free(a->part);
  free(a->sums);
  free(a->totals);
  return done;
}

bool device_attend_cross(struct call *const call, struct wkv_cross_attention *const a) {
  int32_t *const owner = copy_checked(call, a->owner, a->rows, a->lengths, a->audios, a->frames);
  a->owner = owner;
  a->lengths = owner ? owner + a->rows : NULL;
  const bool done = owner && attend_planned(call, a);
  free(owner);
  return done;
}

/* ---- the choice of tokens ---- */

static void choose(const int64_t begin, const int64_t end, void *const choice) { kernels->choose(choice, begin, end); }

bool device_choose(struct call *const call, struct wkv_choice *const c) {
  const int64_t rows = c->audios * c->beams;
  c->chosen = malloc((size_t)(rows * c->count) * sizeof *c->chosen);
  const bool done = c->chosen ? share_out(call, rows, (double)c->vocabulary, choose, c)
                              : fail(call, "no memory for the best of %lld beams", (long long)rows);
  if (done) kernels->choose_finish(c, 0, c->audios);
  free(c->chosen);
  return done;
}
