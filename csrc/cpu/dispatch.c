/* Which kernels run on this machine. All CPU detection is here. */
#define _GNU_SOURCE /* syscall */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "isa.h"

/* The kernels of every instruction set are declared, those that were not compiled too: they are never named again. */
#define DECLARE(name, arguments) \
  void wkv_##name##_portable arguments; \
  void wkv_##name##_avx2 arguments; \
  void wkv_##name##_avx512 arguments; \
  void wkv_##name##_avx512_vnni arguments; \
  void wkv_##name##_avx512_bf16 arguments; \
  void wkv_##name##_amx arguments;
WKV_CPU_KERNELS(DECLARE)

/* Which of these are named depends on what was compiled. */
#define ASKS __attribute__((unused)) static bool

ASKS runs_portable(void) { return true; }

#ifdef __x86_64__
/* __builtin_cpu_supports also asks whether the system saves the wide registers. F16C came before AVX2. */
ASKS runs_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

ASKS runs_avx512(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

ASKS runs_avx512_vnni(void) { return runs_avx512() && __builtin_cpu_supports("avx512vnni"); }

ASKS runs_avx512_bf16(void) { return runs_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

#ifdef WKV_EMULATE_AMX
ASKS runs_amx(void) { return runs_avx512_bf16(); }
#else
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The tiles' registers are so large that Linux gives them only to processes that ask. */
ASKS runs_amx(void) {
  enum { LEAF = 7, TILE = 1 << 24, INT8 = 1 << 25, ASK = 0x1023, TILE_DATA = 18 };
  unsigned a, b, c, d;
  return runs_avx512_bf16() && __get_cpuid_count(LEAF, 0, &a, &b, &c, &d) && (d & TILE) && (d & INT8) &&
         syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}
#endif
#endif

struct variant {
  struct wkv_cpu_kernels kernels;
  bool (*runs)(void);
};

#define portable_KERNEL(name, arguments) .name = wkv_##name##_portable,
#define avx2_KERNEL(name, arguments) .name = wkv_##name##_avx2,
#define avx512_KERNEL(name, arguments) .name = wkv_##name##_avx512,
#define avx512_vnni_KERNEL(name, arguments) .name = wkv_##name##_avx512_vnni,
#define avx512_bf16_KERNEL(name, arguments) .name = wkv_##name##_avx512_bf16,
#define amx_KERNEL(name, arguments) .name = wkv_##name##_amx,
#define VARIANT(set) {{.isa = #set, WKV_CPU_KERNELS(set##_KERNEL)}, runs_##set}

/* Best first. */
static const struct variant variants[] = {
#ifdef WKV_HAVE_AMX
    VARIANT(amx),
#endif
#ifdef WKV_HAVE_AVX512_BF16
    VARIANT(avx512_bf16),
#endif
#ifdef WKV_HAVE_AVX512_VNNI
    VARIANT(avx512_vnni),
#endif
#ifdef WKV_HAVE_AVX512
    VARIANT(avx512),
#endif
#ifdef WKV_HAVE_AVX2
    VARIANT(avx2),
#endif
    VARIANT(portable),
};

enum { VARIANTS = sizeof variants / sizeof variants[0] };

const struct wkv_cpu_kernels *wkv_cpu_select(const char *const isa, char *const error, const size_t error_size) {
  const bool any = !isa || !*isa;
  char usable[64] = "";
  for (int i = 0; i < VARIANTS; i++) {
    const struct wkv_cpu_kernels *const kernels = &variants[i].kernels;
    if (!variants[i].runs()) continue;
    if (any || !strcmp(isa, kernels->isa)) return kernels;
    const size_t end = strlen(usable);
    snprintf(usable + end, sizeof usable - end, "%s%s", end ? ", " : "", kernels->isa);
  }
  snprintf(error, error_size, "\"%.40s\" is not an instruction set that runs here; these do: %s", isa, usable);
  return NULL;
}
