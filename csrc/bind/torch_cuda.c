/* The ops on CUDA: on the device of their tensors, and the stream that torch is using there. */
#include "torch_device.h"
#include "torch_step.h"

const int codes_alignment = 16; /* they are copied in pieces of that size */

#ifdef WKV_CUDA_ON_CPU /* the kernels of CUDA compiled for the CPU, see tests/cuda */
const enum torch_device device_type = TORCH_DEVICE_cpu;
const char *const device_key = "CPU";

const char *device_start(char *const error, const size_t error_size) {
  (void)error, (void)error_size;
  return "cuda_on_cpu";
}

static bool enter(struct call *const call, void **const stream) {
  (void)call, *stream = NULL;
  return true;
}

static void leave(struct call *const call) { (void)call; }
#else
const enum torch_device device_type = TORCH_DEVICE_cuda;
const char *const device_key = "CUDA";

/* Makes the device of the tensors the current one. */
static bool enter(struct call *const call, void **const stream) {
  return (!shim.aoti_torch_create_cuda_guard(call->device_index, &call->guard) &&
          !shim.aoti_torch_get_current_cuda_stream(call->device_index, stream)) ||
         fail(call, "torch has no stream on cuda:%d", call->device_index);
}

static void leave(struct call *const call) {
  if (call->guard) shim.aoti_torch_delete_cuda_guard(call->guard);
}
#endif

typedef const char *launch_function(const void *problem, void *stream);

static bool launch(struct call *const call, launch_function *const function, const void *const problem) {
  void *stream;
  const bool entered = enter(call, &stream);
  const char *const wrong = entered ? function(problem, stream) : NULL;
  leave(call);
  return entered && (!wrong || fail(call, "%s", wrong));
}

static const char *attend(const void *const a, void *const stream) { return wkv_cuda_compact_attention(a, stream); }
static const char *evict(const void *const e, void *const stream) { return wkv_cuda_score_evict(e, stream); }
static const char *pack(const void *const p, void *const stream) { return wkv_cuda_pack(p, stream); }
static const char *attend_cross(const void *const a, void *const stream) { return wkv_cuda_cross_attention(a, stream); }

bool device_attend(struct call *const call, const struct wkv_attention *const a) {
  return is_within(call, "rows times heads", a->rows * a->heads, 0, INT32_MAX) && launch(call, attend, a);
}
bool device_evict(struct call *const call, const struct wkv_eviction *const e) {
  return is_within(call, "rows", e->rows, 0, INT32_MAX) && launch(call, evict, e);
}
bool device_pack(struct call *const call, const struct wkv_packing *const p) { return launch(call, pack, p); }

bool device_attend_cross(struct call *const call, struct wkv_cross_attention *const a) {
  if (a->bits == WKV_MIXED && a->tile_bytes % (WKV_TILE * 4) != 0) /* else the bits of channels are taken on trust */
    return fail(call, "keys must have a multiple of %d bytes a tile, got %lld", WKV_TILE * 4, (long long)a->tile_bytes);
  if (a->rows == 0) return true;
  wkv_cuda_cross_plan(a);
  if (a->splits > 1 || a->weights) {
    const int64_t channels = padded_channels(a->head_dim);
    const int64_t lines = a->splits * a->rows * a->tokens * a->heads;
    a->sums = borrow(call, lines * channels);
    a->totals = borrow(call, lines * 2);
    if (!a->sums || !a->totals) return fail(call, "no memory for the sums of %lld ranges", (long long)a->splits);
  }
  return launch(call, attend_cross, a);
}

static const char *gather(const void *const g, void *const stream) { return wkv_cuda_gather_kept(g, stream); }
static const char *attend_ragged(const void *const a, void *const stream) {
  return wkv_cuda_ragged_attention(a, stream);
}
static const char *receive(const void *const r, void *const stream) { return wkv_cuda_attention_received(r, stream); }

/* So many blocks can be launched, and more. */
static bool are_blocks(struct call *const call, const int64_t one, const int64_t other) {
  const int64_t sides[] = {one, other};
  return numbers_in(sides, 2) <= INT32_MAX ||
         fail(call, "there are more heads, queries or tokens than CUDA has blocks: split the call");
}

bool device_gather(struct call *const call, struct wkv_gathering *const g) {
  return are_blocks(call, g->rows * g->kv_heads, g->most) && launch(call, gather, g);
}

bool device_attend_ragged(struct call *const call, struct wkv_ragged_attention *const a) {
  if (a->rows == 0) return true;
  if (!are_blocks(call, a->rows * a->heads, a->queries)) return false;
  wkv_cuda_ragged_plan(a);
  const int64_t lines = a->ranges * a->rows * a->queries * a->heads;
  a->sums = borrow(call, lines * a->head_dim);
  a->totals = borrow(call, lines * 2);
  if (!a->sums || !a->totals) return fail(call, "no memory for the sums of %lld ranges", (long long)a->ranges);
  return launch(call, attend_ragged, a);
}

bool device_receive(struct call *const call, struct wkv_received *const r) {
  if (r->rows == 0) return true;
  if (!are_blocks(call, r->rows * r->heads, r->queries) || !are_blocks(call, r->rows * r->kv_heads, r->tokens))
    return false;
  r->sums = borrow(call, r->rows * r->heads * r->queries * 2);
  if (!r->sums) return fail(call, "no memory for the sums of %lld queries", (long long)r->queries);
  return launch(call, receive, r);
}

bool device_pack_matrix(struct call *const call, const struct wkv_matrix_packing *const p) {
  (void)p;
  return fail(call, "there is no such kernel for CUDA, whose own libraries are as fast: use torch");
}

bool device_linear(struct call *const call, const struct wkv_rows *const r, const struct wkv_linear *const l) {
  (void)r, (void)l;
  return fail(call, "there is no such kernel for CUDA, whose own libraries are as fast: use torch");
}

bool device_attend_frames(struct call *const call, struct wkv_encoder_attention *const a) {
  (void)a;
  return fail(call, "runs on the CPU alone: leave the encoder to torch on %s", device_key);
}

bool device_step(struct call *const call, const struct step *const s) {
  (void)s;
  return fail(call, "there is no such kernel for CUDA: capture a graph of the layers");
}

bool device_choose(struct call *const call, struct wkv_choice *const c) {
  (void)c;
  return fail(call, "it is for tensors on the CPU (torch.topk does the same on a GPU)");
}
