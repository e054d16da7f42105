// Compiles the including file once per instruction set, in namespaces of their own, and picks one at run time.
//
// A kernel file X.cpp reads
//     #ifndef PPG_LANES
//     #define PPG_KERNELS "X.cpp"
//     #include "foreach_isa.h"
//     namespace ppg::cpu { void f(const Args& a, ...) { PPG_DISPATCH(f(a, ...)); } }
//     #else
//     ... kernels, with PPG_LANES floats a vector ...
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
#endif

#define PPG_LANES 4
namespace ppg::cpu::baseline {
#include "vec.h"
#include "row.h"
#include PPG_KERNELS
}  // namespace ppg::cpu::baseline
#undef PPG_LANES

#ifdef PPG_HAS_X86_TARGETS
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define PPG_LANES 8
namespace ppg::cpu::avx2 {
#include "vec.h"
#include "row.h"
#include PPG_KERNELS
}  // namespace ppg::cpu::avx2
#undef PPG_LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define PPG_LANES 16
namespace ppg::cpu::avx512 {
#include "vec.h"
#include "row.h"
#include PPG_KERNELS
}  // namespace ppg::cpu::avx512
#undef PPG_LANES
#pragma GCC pop_options

#define PPG_DISPATCH(call)                 \
  switch (best_isa()) {                    \
    case Isa::AVX512: return avx512::call; \
    case Isa::AVX2: return avx2::call;     \
    default: return baseline::call;        \
  }
#else
#define PPG_DISPATCH(call) return baseline::call
#endif
