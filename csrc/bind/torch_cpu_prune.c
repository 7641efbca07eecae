/* The ops of pruned caches on the CPU. Where heads stand, and where queries, is copied before it is checked: another
 * thread may write to the tensors during the call. */
#include <stdlib.h>
#include <string.h>

#include "torch_cpu.h"

static int32_t *copy_of(struct call *const call, const int32_t *const numbers, const int64_t count) {
  int32_t *const copy = malloc((size_t)count * sizeof *copy);
  if (copy) memcpy(copy, numbers, (size_t)count * sizeof *copy);
  else fail(call, "no memory for a copy of %lld numbers", (long long)count);
  return copy;
}

/* starts, then lengths, or NULL. */
static int32_t *copy_kept(struct call *const call, const int32_t *const starts, const int32_t *const lengths,
                          const int64_t rows, const int64_t kv_heads, const int64_t most, const int64_t slots) {
  const int64_t heads = rows * kv_heads;
  int32_t *const copy = malloc((size_t)heads * 2 * sizeof *copy);
  if (!copy) return fail(call, "no memory for the starts of %lld heads", (long long)heads), NULL;
  memcpy(copy, starts, (size_t)heads * sizeof *copy);
  memcpy(copy + heads, lengths, (size_t)heads * sizeof *copy);
  if (!wkv_check_kept(copy, copy + heads, rows, kv_heads, most, slots, call->error, sizeof call->error)) return copy;
  free(copy);
  return NULL;
}

/* ---- gather_kept ---- */

static void gather(const int64_t begin, const int64_t end, void *const gathering) {
  cpu_kernels->gather_kept(gathering, begin, end);
}

static bool gather_sound(struct call *const call, const struct wkv_gathering *const g) {
  const int64_t heads = g->rows * g->kv_heads, items = heads * wkv_count_of(g->most, WKV_BLOCK);
  int64_t *const order = malloc((size_t)heads * sizeof *order);
  const bool done = order ? !wkv_check_gathering(g, order, call->error, sizeof call->error) &&
                                share_out(call, items, 2.0 * WKV_BLOCK * g->head_dim, gather, (void *)g)
                          : fail(call, "no memory for the order of %lld heads", (long long)heads);
  free(order);
  return done;
}

bool device_gather(struct call *const call, struct wkv_gathering *const g) {
  if (g->rows == 0) return true;
  const int64_t most = g->most < g->slots ? g->most : g->slots;
  int32_t *const starts = copy_kept(call, g->starts, g->lengths, g->rows, g->kv_heads, most, g->slots);
  g->starts = starts;
  g->lengths = starts ? starts + g->rows * g->kv_heads : NULL;
  const bool done = starts && gather_sound(call, g);
  free(starts);
  return done;
}

/* ---- ragged_attention ---- */

static void attend(const void *const attention, void *const scratch, const int64_t begin, const int64_t end) {
  cpu_kernels->ragged_attention(attention, scratch, begin, end);
}

static void finish(const int64_t begin, const int64_t end, void *const attention) {
  cpu_kernels->ragged_finish(attention, begin, end);
}

static bool plan_ragged(struct call *const call, struct wkv_ragged_attention *const a) {
  const int64_t heads = a->rows * a->kv_heads, queries = a->queries * (a->heads / a->kv_heads);
  a->owner = NULL;
  a->first = malloc((size_t)(heads + 1) * sizeof *a->first);
  if (a->first) wkv_ragged_plan(a);
  const int64_t lines = a->ranges * queries, channels = padded_channels(a->head_dim);
  a->owner = a->first ? malloc((size_t)(a->ranges + 1) * sizeof *a->owner) : NULL;
  a->sums = a->owner ? aligned_alloc(64, (size_t)((lines + 1) * channels) * sizeof *a->sums) : NULL;
  a->totals = a->sums ? malloc((size_t)(lines + 1) * 2 * sizeof *a->totals) : NULL;
  if (!a->totals) return fail(call, "no memory for the sums of %lld ranges", (long long)a->ranges);
  wkv_ragged_plan(a);
  return true;
}

static bool run_ragged(struct call *const call, const struct wkv_ragged_attention *const a) {
  const int64_t lots = wkv_ragged_lots(a), queries = a->queries * (a->heads / a->kv_heads);
  const double numbers = 2.0 * (double)a->range * (double)a->head_dim * (double)queries / (double)lots;
  const double to_add = (double)a->ranges / (double)(a->rows * a->kv_heads) * (double)a->head_dim;
  return share_out_with_scratch(call, a->ranges * lots, numbers, attend, a, wkv_ragged_scratch(a)) &&
         share_out(call, a->rows * a->queries * a->heads, 1 + to_add, finish, (void *)a);
}

bool device_attend_ragged(struct call *const call, struct wkv_ragged_attention *const a) {
  if (a->rows == 0) return true;
  int32_t *const starts = copy_kept(call, a->starts, a->lengths, a->rows, a->kv_heads, a->slots, a->slots);
  if (!starts) return false;
  a->starts = starts;
  a->lengths = starts + a->rows * a->kv_heads;
  const bool done = plan_ragged(call, a) && run_ragged(call, a);
  free(a->first);
  free(a->owner);
  free(a->sums);
  free(a->totals);
  free(starts);
  return done;
}

/* ---- attention_received ---- */

enum { PACKED_TOGETHER = 1 << 24 }; /* numbers of the heads whose keys are packed at a time */

static void pack(const int64_t begin, const int64_t end, void *const received) {
  cpu_kernels->received_pack(received, begin, end);
}

static void receive(const void *const received, void *const scratch, const int64_t begin, const int64_t end) {
  cpu_kernels->attention_received(received, scratch, begin, end);
}

static void add_lots(const int64_t begin, const int64_t end, void *const received) {
  cpu_kernels->received_finish(received, begin, end);
}

/* Some heads at a time: as many as fit, so that there is enough to share out. */
static bool receive_sound(struct call *const call, struct wkv_received *const r) {
  const int64_t heads = r->rows * r->kv_heads, lots = wkv_received_lots(r), tokens = wkv_received_tokens(r);
  const int64_t numbers = wkv_received_packed(r) + lots * tokens, fitting = 1 + PACKED_TOGETHER / numbers;
  const int64_t together = heads < fitting ? heads : fitting, blocks = wkv_count_of(tokens, WKV_BLOCK);
  r->packed = aligned_alloc(64, (size_t)(together * wkv_received_packed(r)) * sizeof *r->packed);
  r->sums = aligned_alloc(64, (size_t)(together * lots * tokens) * sizeof *r->sums);
  bool done = (r->packed && r->sums) || fail(call, "no memory for the keys of %lld heads", (long long)together);
  for (r->first_head = 0; done && r->first_head < heads; r->first_head += together) {
    const int64_t now = heads - r->first_head < together ? heads - r->first_head : together;
    done = share_out(call, now * blocks, 1.0 * WKV_BLOCK * (double)r->head_dim, pack, r) &&
           share_out_with_scratch(call, now * lots, 1.0 * WKV_LOT * (double)tokens, receive, r,
                                  wkv_received_scratch(r)) &&
           share_out(call, now * blocks, 1.0 * WKV_BLOCK * (double)lots, add_lots, r);
  }
  free(r->packed);
  free(r->sums);
  return done;
}

bool device_receive(struct call *const call, struct wkv_received *const r) {
  if (r->rows == 0) return true;
  int32_t *const positions = copy_of(call, r->positions, r->queries);
  r->positions = positions;
  const bool done = positions &&
                    !wkv_check_positions(positions, r->queries, r->tokens, call->error, sizeof call->error) &&
                    receive_sound(call, r);
  free(positions);
  return done;
}
