// Compiles the including file once per instruction set, in namespaces of their own, and picks one at run time. PPG_ISA,
// a number of enum Isa, leaves the other sets to other units: csrc/sources.py.
//
// A kernel file X.cpp reads
//     #ifndef PPG_LANES
//     #define PPG_KERNELS "X.cpp"
//     #include "foreach_isa.h"
//     namespace ppg::cpu { PPG_DISPATCH(f, FArgs) }
//     #else
//     ... kernels, with PPG_LANES floats a vector ...
//     void f(const FArgs& a, int64_t first, int64_t last) { ... }
//     #endif
// Standard headers are included before the targets: the linker keeps one copy of an inline function, which must not be
// the one compiled for AVX-512.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../args.h"
#include "../policy_term.h"
#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !defined(PPG_ISA) || PPG_ISA == 0
#define PPG_LANES 4  // SSE2, and on ARM NEON
namespace ppg::cpu::baseline {
#include "vec.h"
#include "elementary.h"
#include "row.h"
#include PPG_KERNELS
}  // namespace ppg::cpu::baseline
#undef PPG_LANES
#endif

#if defined(PPG_HAS_X86_TARGETS) && (!defined(PPG_ISA) || PPG_ISA == 1)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define PPG_LANES 8
namespace ppg::cpu::avx2 {
#include "vec.h"
#include "elementary.h"
#include "row.h"
#include PPG_KERNELS
}  // namespace ppg::cpu::avx2
#undef PPG_LANES
#pragma GCC pop_options
#endif

#if defined(PPG_HAS_X86_TARGETS) && (!defined(PPG_ISA) || PPG_ISA == 2)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define PPG_LANES 16
namespace ppg::cpu::avx512 {
#include "vec.h"
#include "elementary.h"
#include "row.h"
#include PPG_KERNELS
}  // namespace ppg::cpu::avx512
#undef PPG_LANES
#pragma GCC pop_options
#endif

// f of the best instruction set, in the unit of the first.
#if defined(PPG_ISA) && PPG_ISA != 0
#define PPG_DISPATCH(f, Args)
#elif defined(PPG_HAS_X86_TARGETS)
#define PPG_DISPATCH(f, Args)                             \
  namespace avx2 {                                        \
  void f(const Args&, int64_t, int64_t);                  \
  }                                                       \
  namespace avx512 {                                      \
  void f(const Args&, int64_t, int64_t);                  \
  }                                                       \
  void f(const Args& a, int64_t first, int64_t last) {    \
    switch (best_isa()) {                                 \
      case Isa::AVX512: return avx512::f(a, first, last); \
      case Isa::AVX2: return avx2::f(a, first, last);     \
      default: return baseline::f(a, first, last);        \
    }                                                     \
  }
#else
#define PPG_DISPATCH(f, Args) \
  void f(const Args& a, int64_t first, int64_t last) { baseline::f(a, first, last); }
#endif
