/* The kernels' names: each file is compiled once per instruction set with -DWKV_ISA=portable, avx2, ... */
#ifndef WHISPERKV_ISA_H
#define WHISPERKV_ISA_H
#include "../whisperkv.h"

#define WKV_JOIN_(name, isa) name##_##isa
#define WKV_JOIN(name, isa) WKV_JOIN_(name, isa)

#define WKV_DECLARE_KERNELS(isa) \
  void WKV_JOIN(wkv_compact_attention, isa)(const struct wkv_attention *, int64_t begin, int64_t end); \
  void WKV_JOIN(wkv_score_evict, isa)(const struct wkv_eviction *, int64_t begin, int64_t end); \
  void WKV_JOIN(wkv_pack, isa)(const struct wkv_packing *, int64_t begin, int64_t end); \
  void WKV_JOIN(wkv_cross_attention, isa)(const struct wkv_cross_attention *, void *scratch, int64_t begin, \
                                          int64_t end); \
  void WKV_JOIN(wkv_cross_finish, isa)(const struct wkv_cross_attention *, int64_t begin, int64_t end);

#ifdef WKV_ISA
#define ON_ISA(name) WKV_JOIN(name, WKV_ISA)
WKV_DECLARE_KERNELS(WKV_ISA)
#endif

#endif
