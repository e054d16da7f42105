// The instruction sets that the CPU kernels are compiled for.
#pragma once
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PPG_HAS_X86_TARGETS
#endif

namespace ppg::cpu {
enum class Isa { BASELINE, AVX2, AVX512 };
Isa best_isa();
}  // namespace ppg::cpu
