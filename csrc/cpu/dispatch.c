/* Which kernels run on this machine, and whether a cursor may be trusted. All CPU detection is here. */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "../whisperkv.h"

extern const struct wkv_cpu_kernels wkv_cpu_portable, wkv_cpu_avx2, wkv_cpu_avx512;

static bool runs_portable(void) { return true; }

/* __builtin_cpu_supports also asks whether the system saves the wide registers. F16C came before AVX2. */
#ifdef WKV_HAVE_AVX2
static bool runs_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

#ifdef WKV_HAVE_AVX512
static bool runs_avx512(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

/* Best first. */
static const struct {
  const struct wkv_cpu_kernels *kernels;
  bool (*runs)(void);
} variants[] = {
#ifdef WKV_HAVE_AVX512
    {&wkv_cpu_avx512, runs_avx512},
#endif
#ifdef WKV_HAVE_AVX2
    {&wkv_cpu_avx2, runs_avx2},
#endif
    {&wkv_cpu_portable, runs_portable},
};

enum { VARIANTS = sizeof variants / sizeof variants[0] };

const struct wkv_cpu_kernels *wkv_cpu_select(const char *const isa, char *const error, const size_t error_size) {
  const bool any = !isa || !*isa;
  char usable[64] = "";
  for (int i = 0; i < VARIANTS; i++) {
    const struct wkv_cpu_kernels *const kernels = variants[i].kernels;
    if (!variants[i].runs()) continue;
    if (any || !strcmp(isa, kernels->isa)) return kernels;
    strcat(strcat(usable, *usable ? ", " : ""), kernels->isa);
  }
  snprintf(error, error_size, "\"%.40s\" is not an instruction set that runs here; these do: %s", isa, usable);
  return NULL;
}

const char *wkv_check_cursor(const int32_t *const cursor, const int64_t rows, const int64_t tokens,
                             const int64_t slots, char *const error, const size_t error_size) {
  for (int64_t row = 0; row < rows; row++) {
    const long long live = cursor[WKV_LIVE * rows + row], slot = cursor[WKV_SLOT * rows + row];
    const long long seen = cursor[WKV_SEEN * rows + row];
    const long long padding = seen < 0 ? -seen : 0;
    const long long written = tokens > padding ? tokens - padding : 0;
    const char *const wrong = live < 0 || live > slots           ? "live must be in 0..slots"
                              : slot < 0 || slot > live          ? "slot must be in 0..live"
                              : tokens > 1 && slot != live       ? "slot must be live for more than one token"
                              : written && slot + written > slots ? "the new tokens do not fit"
                                                                 : NULL;
    if (!wrong) continue;
    snprintf(error, error_size, "cursor of row %lld: %s (live %lld, slot %lld, seen %lld, tokens %lld, slots %lld)",
             (long long)row, wrong, live, slot, seen, (long long)tokens, (long long)slots);
    return error;
  }
  return NULL;
}
