/* The ops on the CPU: what tensors say is checked, and torch's threads share out the items of work. */
#define _DEFAULT_SOURCE /* madvise */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "torch_cpu.h"
#include "torch_ops.h"

const enum torch_device device_type = TORCH_DEVICE_cpu;
const char *const device_key = "CPU";
const int codes_alignment = 1;

const struct wkv_cpu_kernels *cpu_kernels;

const char *device_start(char *const error, const size_t error_size) {
  cpu_kernels = wkv_cpu_select(getenv("WHISPERKV_ISA"), error, error_size);
  return cpu_kernels ? cpu_kernels->isa : NULL;
}

enum { WORTH_A_THREAD = 1 << 17 }; /* numbers of the cache to read, below which waking a thread costs more */

bool share_out(struct call *const call, const int64_t items, const double numbers_per_item, const torch_range_task task,
               void *const context) {
  const int64_t items_per_thread = 1 + (int64_t)(WORTH_A_THREAD / numbers_per_item);
  if (items <= items_per_thread) return task(0, items, context), true;
  return !shim.torch_parallel_for(0, items, items_per_thread, task, context) ||
         fail(call, "torch could not share out the work");
}

struct with_scratch {
  scratch_task *task;
  const void *problem;
  size_t bytes;
  bool no_memory;
};

static void run_with_scratch(const int64_t begin, const int64_t end, void *const context) {
  struct with_scratch *const work = context;
  void *const scratch = aligned_alloc(64, (size_t)wkv_round_up((int64_t)work->bytes, 64));
  if (scratch) work->task(work->problem, scratch, begin, end);
  else work->no_memory = true;
  free(scratch);
}

bool share_out_with_scratch(struct call *const call, const int64_t items, const double numbers_per_item,
                            scratch_task *const task, const void *const problem, const size_t bytes) {
  struct with_scratch work = {task, problem, bytes, false};
  return share_out(call, items, numbers_per_item, run_with_scratch, &work) &&
         (!work.no_memory || fail(call, "no memory for a thread's scratch"));
}

/* ---- self-attention ---- */

static void attend(const int64_t begin, const int64_t end, void *const attention) {
  cpu_kernels->compact_attention(attention, begin, end);
}

bool is_sound(struct call *const call, const struct wkv_attention *const a) {
  return !wkv_check_cursor(a->cursor, a->rows, a->tokens, a->slots, call->error, sizeof call->error) &&
         !wkv_check_sources(a, call->error, sizeof call->error);
}

bool attend_sound(struct call *const call, const struct wkv_attention *const a) {
  const double group = (double)(a->heads / a->kv_heads);
  return share_out(call, a->rows * a->kv_heads, 2.0 * group * a->tokens * a->slots * a->head_dim, attend, (void *)a);
}

bool device_attend(struct call *const call, const struct wkv_attention *const a) {
  return is_sound(call, a) && attend_sound(call, a);
}

static void evict(const int64_t begin, const int64_t end, void *const eviction) {
  cpu_kernels->score_evict(eviction, begin, end);
}

bool device_evict(struct call *const call, const struct wkv_eviction *const e) {
  /* several tokens were appended one after another, so none but the last may call for an eviction */
  const int64_t slots = e->tokens > 1 ? e->budget : e->slots;
  return !wkv_check_cursor(e->cursor, e->rows, e->tokens, slots, call->error, sizeof call->error) &&
         share_out(call, e->rows, 1.0 * e->tokens * e->slots * (e->heads + 1.0), evict, (void *)e);
}

/* ---- cross-attention ---- */

static void pack(const int64_t begin, const int64_t end, void *const packing) {
  cpu_kernels->pack(packing, begin, end);
}

int32_t *copy_checked(struct call *const call, const int32_t *const owner, const int64_t rows,
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

static void attend_cross(const void *const attention, void *const scratch, const int64_t begin, const int64_t end) {
  cpu_kernels->cross_attention(attention, scratch, begin, end);
}

static void finish_cross(const int64_t begin, const int64_t end, void *const attention) {
  cpu_kernels->cross_finish(attention, begin, end);
}

bool plan_cross(struct call *const call, struct wkv_cross_attention *const a) {
  const int64_t queries = a->rows * a->tokens;
  a->sums = a->totals = NULL;
  a->part = malloc((size_t)queries * sizeof *a->part);
  if (a->part) wkv_cross_plan(a);
  const int64_t lines = a->splits * queries * a->heads, channels = padded_channels(a->head_dim);
  if (a->part) a->sums = aligned_alloc(64, (size_t)(lines * channels) * sizeof *a->sums); /* channels: whole lines */
  if (a->part) a->totals = malloc((size_t)lines * 2 * sizeof *a->totals);
  return (a->sums && a->totals) || fail(call, "no memory for the sums of %lld queries", (long long)queries);
}

bool run_cross(struct call *const call, struct wkv_cross_attention *const a) {
  const int64_t queries = a->rows * a->tokens, items = a->parts * a->heads * a->splits;
  const double numbers = 2.0 * queries * a->heads * a->frames * a->head_dim;
  return share_out_with_scratch(call, items, numbers / (double)items, attend_cross, a, wkv_cross_scratch(a)) &&
         share_out(call, queries * a->heads, (double)(a->splits * padded_channels(a->head_dim)), finish_cross, a);
}

void end_cross(struct wkv_cross_attention *const a) {
  free(a->part);
  free(a->sums);
  free(a->totals);
}

bool copy_mixed(struct call *const call, struct wkv_cross_attention *const a) {
  if (a->bits != WKV_MIXED) return true;
  const int64_t channels = padded_channels(a->head_dim);
  float *const copy = borrow(call, channels);
  if (!copy) return fail(call, "no memory for the bits of %lld channels", (long long)channels);
  memcpy(copy, a->value_scales, (size_t)channels * sizeof *copy);
  a->value_scales = copy;
  return !wkv_check_mixed(copy, channels, a->tile_bytes, call->error, sizeof call->error);
}

bool device_attend_cross(struct call *const call, struct wkv_cross_attention *const a) {
  if (!copy_mixed(call, a)) return false;
  int32_t *const owner = copy_checked(call, a->owner, a->rows, a->lengths, a->audios, a->frames);
  a->owner = owner;
  a->lengths = owner ? owner + a->rows : NULL;
  const bool is_empty = a->rows == 0;
  const bool done = owner && (is_empty || (plan_cross(call, a) && run_cross(call, a)));
  if (owner && !is_empty) end_cross(a);
  free(owner);
  return done;
}

/* ---- matrices ---- */

static void pack_matrix(const int64_t begin, const int64_t end, void *const packing) {
  cpu_kernels->pack_matrix(packing, begin, end);
}

/* A decode step waits for its weights, and they come faster from large pages. This is a wish, and before memory is
 * written to for the first time. */
static void wish_for_large_pages(void *const memory, const int64_t bytes) {
#ifdef MADV_HUGEPAGE
  enum { LARGE = 1 << 21 };
  const uintptr_t begin = ((uintptr_t)memory + LARGE - 1) / LARGE * LARGE;
  const uintptr_t end = ((uintptr_t)memory + (uintptr_t)bytes) / LARGE * LARGE;
  if (begin < end) (void)madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#endif
}

bool device_pack_matrix(struct call *const call, const struct wkv_matrix_packing *const p) {
  const int64_t panels = wkv_count_of(p->outputs, WKV_PANEL);
  wish_for_large_pages(p->panels, panels * wkv_panel_words(p->format, p->inputs) * (int64_t)sizeof *p->panels);
  return share_out(call, wkv_count_of(p->outputs, WKV_PANEL), 1.0 * WKV_PANEL * p->inputs, pack_matrix, (void *)p);
}

static void make_ready(const int64_t begin, const int64_t end, void *const rows) {
  cpu_kernels->make_ready(rows, begin, end);
}

bool make_rows_ready(struct call *const call, struct wkv_rows *const rows) {
  return share_out(call, rows->rows, 4.0 * rows->inputs, make_ready, rows);
}

struct products {
  const struct wkv_linear *linears;
  int count;
};

static void multiply(int64_t begin, int64_t end, void *const context) {
  const struct products *const products = context;
  for (int i = 0; i < products->count; i++) {
    const int64_t items = wkv_linear_items(&products->linears[i]);
    const int64_t first = begin > 0 ? begin : 0, last = end < items ? end : items;
    if (first < last) cpu_kernels->linear(&products->linears[i], first, last);
    begin -= items, end -= items;
  }
}

enum { WORK_PER_NUMBER = 2 }; /* products that take as long as reading a number of the cache */
enum { FEW_ROWS = 96 };       /* with more, a matrix in the model's own order is packed first */

bool multiply_all(struct call *const call, const struct wkv_linear *const linears, const int count) {
  struct products products = {linears, count};
  const int64_t rows = linears->rows < WKV_SWATH ? linears->rows : WKV_SWATH;
  int64_t items = 0;
  for (int i = 0; i < count; i++) items += wkv_linear_items(&linears[i]);
  return share_out(call, items, 1.0 * rows * WKV_PANEL * linears->inputs / WORK_PER_NUMBER, multiply, &products);
}

bool device_linear(struct call *const call, const struct wkv_rows *const rows, const struct wkv_linear *const linear) {
  struct wkv_rows r = *rows;
  struct wkv_linear l = *linear;
  const bool is_ready = r.format == WKV_AS_FLOAT32 && !r.norm_weight;
  const bool packs_first = !l.is_packed && l.rows > FEW_ROWS;
  if (l.rows == 0) return true;
  l.ready_stride = r.ready_stride = is_ready ? r.stride : wkv_ready_stride(r.format, r.inputs);
  if (is_ready) l.ready = (const uint32_t *)r.x;
  else l.ready = r.ready = borrow(call, r.rows * r.ready_stride);
  if (!l.ready) return fail(call, "no memory for %lld rows", (long long)r.rows);
  if (wkv_is_int8(r.format)) {
    l.steps = r.steps = borrow(call, r.rows * (int64_t)(sizeof *r.steps / sizeof(float)));
    if (!l.steps) return fail(call, "no memory for %lld rows", (long long)r.rows);
  }
  if (packs_first) {
    const struct wkv_matrix_packing packing = {
        .outputs = l.outputs,
        .inputs = l.inputs,
        .dtype = WKV_FLOAT32,
        .format = l.format,
        .weight = l.weight,
        .panels = borrow(call, wkv_count_of(l.outputs, WKV_PANEL) * wkv_panel_words(l.format, l.inputs))};
    if (!packing.panels) return fail(call, "no memory for a packed matrix");
    if (!device_pack_matrix(call, &packing)) return false;
    l.weight = packing.panels;
    l.is_packed = true;
  }
  return (is_ready || make_rows_ready(call, &r)) && multiply_all(call, &l, 1);
}

/* ---- the encoder ---- */

static void pack_heads(const int64_t begin, const int64_t end, void *const attention) {
  cpu_kernels->encoder_pack(attention, begin, end);
}

static void attend_frames(const void *const attention, void *const scratch, const int64_t begin, const int64_t end) {
  cpu_kernels->encoder_attention(attention, scratch, begin, end);
}

static bool attend_packed(struct call *const call, struct wkv_encoder_attention *const a) {
  const int64_t heads = a->audios * a->heads, blocks = wkv_count_of(a->frames, WKV_QUERIES);
  const int64_t together = heads < WKV_PACKED_HEADS ? heads : WKV_PACKED_HEADS, numbers = wkv_encoder_packed(a);
  const size_t scratch = (size_t)wkv_encoder_scratch(a) * sizeof(float);
  a->packed = aligned_alloc(64, (size_t)(together * numbers) * sizeof *a->packed);
  bool done = a->packed || fail(call, "no memory for the keys and values of %lld heads", (long long)together);
  for (a->first_head = 0; done && a->first_head < heads; a->first_head += together) {
    const int64_t now = heads - a->first_head < together ? heads - a->first_head : together;
    const double numbers_per_item = (double)WKV_QUERIES * (double)numbers;
    done = share_out(call, now, (double)numbers, pack_heads, a) &&
           share_out_with_scratch(call, now * blocks, numbers_per_item, attend_frames, a, scratch);
  }
  free(a->packed);
  return done;
}

bool device_attend_frames(struct call *const call, struct wkv_encoder_attention *const a) {
  if (!a->lengths) return attend_packed(call, a);
  int32_t *const lengths = copy_checked(call, NULL, 0, a->lengths, a->audios, a->frames);
  a->lengths = lengths;
  const bool done = lengths && attend_packed(call, a);
  free(lengths);
  return done;
}

/* ---- the choice of tokens ---- */

static void choose(const int64_t begin, const int64_t end, void *const choice) {
  cpu_kernels->choose(choice, begin, end);
}

bool device_choose(struct call *const call, struct wkv_choice *const c) {
  const int64_t rows = c->audios * c->beams, sides[] = {rows, c->count};
  c->chosen = numbers_in(sides, 2) > MOST_NUMBERS ? NULL : malloc((size_t)(rows * c->count) * sizeof *c->chosen);
  const bool done = c->chosen ? share_out(call, rows, (double)c->vocabulary, choose, c)
                              : fail(call, "no memory for the best of %lld beams", (long long)rows);
  if (done) cpu_kernels->choose_finish(c, 0, c->audios);
  free(c->chosen);
  return done;
}
