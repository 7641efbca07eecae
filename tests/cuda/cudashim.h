/* CUDA's kernels on a CPU: a block's threads are fibers, which meet in __syncthreads and in the operations of a warp.
 * One block runs at a time, so that shared memory is static. It reports threads that wait at different barriers, lanes
 * that are missing from a mask, and deadlocks. It does not see races in memory, nor PTX: where a source has some, it
 * has a plain form beside it. With SHIM_REVERSE=1 in the environment, blocks, warps and lanes run in the other order,
 * and copies that are not waited for are made at once, where otherwise they are put off until they must be there: run
 * both. */
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>
#define CUDASHIM 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;

  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

typedef void *cudaStream_t;
typedef int cudaError_t;

enum { cudaSuccess = 0 };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline const char *cudaGetErrorString(cudaError_t) { return "no error"; }
#if !defined(__x86_64__)
#define SHIM_UC 1
#include <ucontext.h>
#endif
namespace cudashim {
constexpr int WARP = 32;
#ifdef SHIM_UC
typedef ucontext_t Ctx;

inline void sw(Ctx *from, Ctx *to) { swapcontext(from, to); }
#else
struct Ctx {
  void *sp;
};

extern "C" void cudashim_switch(void **from, void *to);
__asm__(
    ".text\n.weak cudashim_switch\n.type cudashim_switch,@function\ncudashim_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n.size cudashim_switch,.-cudashim_switch\n");

inline void sw(Ctx *from, Ctx *to) { cudashim_switch(&from->sp, to->sp); }
#endif
struct Warp {
  uint64_t slot[WARP];
  unsigned in, go, out, live, mask[WARP];
  int idle;
};

struct Copy {
  void *to;
  const void *from;
  size_t bytes;
};

struct Fiber {
  Ctx ctx;
  uint3 tid;
  int lin, lane;
  Warp *w;
  bool done;
  std::vector<char> stack;
  std::vector<std::vector<Copy>> groups; // of copies that are on their way; the last one is still open
};

struct Block {
  uint3 bid;
  dim3 bdim, gdim;
  char *dyn;
  std::function<void()> const *body;
  std::vector<Fiber> f;
  std::vector<Warp> w;
  Ctx main;
  int live, arrived, site;
  unsigned gen;
  long idle;
};

inline thread_local Block B;
inline thread_local Fiber *cur;

[[noreturn]] inline void die(const char *m) {
  fprintf(stderr, "cudashim: %s (block %u,%u thread %d)\n", m, B.bid.x, B.bid.y, cur->lin);
  abort();
}

inline int dir() {
  static int d = getenv("SHIM_REVERSE") ? -1 : 1;
  return d;
}

inline void go(int i) {
  Fiber *me = cur;
  if (&B.f[i] == me) return;
  cur = &B.f[i];
  sw(&me->ctx, &cur->ctx);
}

inline void next() { // stay in the warp while it can move, then go to the next warp (SHIM_REVERSE: other order)
  Fiber *me = cur;
  int n = (int)B.f.size(), nw = (int)B.w.size(), wi = me->lin / WARP, d = dir();
  if (me->w->live && ++me->w->idle <= WARP + 1) {
    int l = me->lane;
    do l = (l + d + WARP) % WARP;
    while (!(me->w->live >> l & 1));
    return go(wi * WARP + l);
  }
  me->w->idle = 0;
  int v = wi;
  do v = (v + d + nw) % nw;
  while (!B.w[v].live && v != wi);
  unsigned m = B.w[v].live;
  if (!m) return;
  B.w[v].idle = 0;
  go(v * WARP + (d > 0 ? __builtin_ctz(m) : 31 - __builtin_clz(m)));
  (void)n;
}

inline void moved() {
  B.idle = 0;
  cur->w->idle = 0;
}

inline void wait() {
  if (++B.idle > 8L * (long)B.f.size() + 256) die("deadlock: threads wait at different barriers");
  next();
}

inline void sync(int site) {
  if (!B.arrived) B.site = site;
  else if (B.site != site) die("divergent __syncthreads: two call sites");
  unsigned g = B.gen;
  if (++B.arrived == B.live) {
    B.arrived = 0;
    B.gen++;
    B.idle = 0;
    next();
  } else {
    while (B.gen == g) wait();
  }
}

inline void copy(void *to, const void *from, size_t bytes) {
  if (dir() < 0) memcpy(to, from, bytes);
  else cur->groups.back().push_back({to, from, bytes});
}

inline void end_of_copies() { cur->groups.emplace_back(); }

inline void copies_but(size_t n) { // all but the last n groups arrive, and the open one
  auto &groups = cur->groups;
  while (groups.size() > n + 1) {
    for (auto &c : groups.front()) memcpy(c.to, c.from, c.bytes);
    groups.erase(groups.begin());
  }
}

inline void entry() {
  (*B.body)();
  Fiber *me = cur;
  for (auto &group : me->groups)
    if (!group.empty()) die("copies that nobody waited for");
  me->done = true;
  me->w->live &= ~(1u << me->lane);
  B.live--;
  B.idle = 0;
  if (B.live && B.arrived) die("thread returned while others wait in __syncthreads");
  if (!B.live) sw(&me->ctx, &B.main);
  else next();
  abort();
}

template <class F> inline void meet(unsigned mask, uint64_t v, F &&read) { // all lanes of mask meet, read, leave
  Warp *w = cur->w;
  int l = cur->lane;
  unsigned bit = 1u << l;
  if (!(mask & bit)) die("lane not in its own mask");
  if (mask & ~w->live) die("mask names an exited or missing lane");
  w->slot[l] = v;
  w->mask[l] = mask;
  w->in |= bit;
  moved();
  bool all = (w->in & mask) == mask;
  for (unsigned r = all ? mask : 0; r && all; r &= r - 1) all = w->mask[__builtin_ctz(r)] == mask;
  if (all) {
    w->go |= mask;
    w->in &= ~mask;
  } else {
    while (!(w->go & bit)) wait(); // mask mismatch ends in wait()'s deadlock message
  }
  read(w->slot);
  w->out |= bit;
  moved();
  if ((w->out & mask) == mask) {
    w->go &= ~mask;
    w->out &= ~mask;
  } else {
    while (w->go & bit) wait();
  }
}

template <class T> inline T get(const uint64_t *a, int l) {
  T r;
  memcpy(&r, a + l, sizeof r);
  return r;
}

template <class T> inline T shfl(unsigned m, T v, int src) {
  static_assert(sizeof(T) <= 8);
  uint64_t u = 0;
  memcpy(&u, &v, sizeof v);
  T r = v;
  meet(m, u, [&](const uint64_t *a) {
    if (src >= 0) r = get<T>(a, src);
  });
  return r;
}

template <class... P, class... A> void launch(dim3 g, dim3 b, size_t smem, void (*k)(P...), A... a) {
  std::function<void()> body = [=] { k(P(a)...); };
  const size_t SS = 64 << 10;
  long nb = (long)g.x * g.y * g.z;
  for (long turn = 0; turn < nb; turn++) {
    const long bi = dir() < 0 ? nb - 1 - turn : turn;
    int n = (int)(b.x * b.y * b.z);
    std::vector<char> dyn(smem, (char)0xCC); // poisoned, exact size for ASan
    B.bid = {unsigned(bi % g.x), unsigned(bi / g.x % g.y), unsigned(bi / g.x / g.y)};
    B.bdim = b;
    B.gdim = g;
    B.body = &body;
    B.live = n;
    B.arrived = 0;
    B.gen = 0;
    B.idle = 0;
    B.dyn = dyn.data();
    B.f.resize(n);
    B.w.assign((n + WARP - 1) / WARP, Warp{});
    for (int i = 0; i < n; i++) {
      Fiber &f = B.f[i];
      f.lin = i;
      f.lane = i % WARP;
      f.w = &B.w[i / WARP];
      f.w->live |= 1u << f.lane;
      f.tid = {unsigned(i % b.x), unsigned(i / b.x % b.y), unsigned(i / b.x / b.y)};
      f.done = false;
      f.groups.assign(1, {});
      if (f.stack.size() != SS) f.stack.resize(SS);
#ifdef SHIM_UC
      getcontext(&f.ctx);
      f.ctx.uc_stack.ss_sp = f.stack.data();
      f.ctx.uc_stack.ss_size = SS;
      f.ctx.uc_link = nullptr;
      makecontext(&f.ctx, entry, 0);
#else
      void **sp = (void **)(((uintptr_t)f.stack.data() + SS) & ~(uintptr_t)15);
      *--sp = nullptr;
      *--sp = (void *)entry;
      sp -= 6;
      memset(sp, 0, 48);
      f.ctx.sp = sp;
#endif
    }
    cur = &B.f[dir() > 0 ? 0 : n - 1];
    sw(&B.main, &cur->ctx);
  }
}
} // namespace cudashim

#define threadIdx (cudashim::cur->tid)
#define blockIdx (cudashim::B.bid)
#define blockDim (cudashim::B.bdim)
#define gridDim (cudashim::B.gdim)
#define warpSize 32
#define __syncthreads() cudashim::sync(__LINE__)

inline void __syncwarp(unsigned m = ~0u) {
  cudashim::meet(m, 0, [](const uint64_t *) {});
}

template <class T> T __shfl_sync(unsigned m, T v, int s, int wd = 32) {
  int l = cudashim::cur->lane;
  return cudashim::shfl(m, v, (l & ~(wd - 1)) | (s & (wd - 1)));
}

template <class T> T __shfl_xor_sync(unsigned m, T v, int x, int wd = 32) {
  int l = cudashim::cur->lane, s = l ^ x;
  return cudashim::shfl(m, v, s < (l & ~(wd - 1)) + wd ? s : -1);
}

template <class T> T __shfl_down_sync(unsigned m, T v, unsigned d, int wd = 32) {
  int l = cudashim::cur->lane;
  return cudashim::shfl(m, v, (l & (wd - 1)) + (int)d < wd ? l + (int)d : -1);
}

template <class T> T __shfl_up_sync(unsigned m, T v, unsigned d, int wd = 32) {
  int l = cudashim::cur->lane;
  return cudashim::shfl(m, v, (l & (wd - 1)) >= (int)d ? l - (int)d : -1);
}

inline unsigned __ballot_sync(unsigned m, int p) {
  unsigned r = 0;
  cudashim::meet(m, p != 0, [&](const uint64_t *a) {
    for (int i = 0; i < 32; i++)
      if ((m >> i & 1) && a[i]) r |= 1u << i;
  });
  return r;
}

inline int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }

inline int __all_sync(unsigned m, int p) { return __ballot_sync(m, p) == m; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline void __threadfence() {} // a block is over before the next one begins

inline unsigned atomicInc(unsigned *place, unsigned most) {
  unsigned was = *place;
  *place = was >= most ? 0 : was + 1;
  return was;
}

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  uint64_t x = a | (uint64_t)b << 32;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) r |= (unsigned)(x >> 8 * (s >> 4 * i & 7) & 255) << 8 * i;
  return r;
}
