/* The kernels' names: each file is compiled once per instruction set with -DWKV_ISA=portable, avx2, ... */
#ifndef WHISPERKV_ISA_H
#define WHISPERKV_ISA_H
#include "../whisperkv.h"

#define WKV_JOIN_(name, isa) name##_##isa
#define WKV_JOIN(name, isa) WKV_JOIN_(name, isa)

#ifdef WKV_ISA
#define ON_ISA(name) WKV_JOIN(name, WKV_ISA)
#define WKV_DECLARE_KERNEL(name, arguments) void ON_ISA(wkv_##name) arguments;
WKV_CPU_KERNELS(WKV_DECLARE_KERNEL)
#endif

#endif
