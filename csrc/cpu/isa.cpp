// The best instruction set of the processor, detected once; tests and benchmarks may choose a lesser one.
#include "isa.h"

#include <atomic>
#include <cstring>

#include "../args.h"

namespace ppg::cpu {
namespace {
constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Isa detect() {
#ifdef PPG_HAS_X86_TARGETS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx2 && avx512 ? Isa::AVX512 : avx2 ? Isa::AVX2 : Isa::BASELINE;
#else
  return Isa::BASELINE;
#endif
}
std::atomic<int>& chosen() {
  static std::atomic<int> isa{int(detect())};
  return isa;
}
}  // namespace

Isa best_isa() { return Isa(chosen().load(std::memory_order_relaxed)); }
const char* isa() { return kNames[int(best_isa())]; }

bool use_isa(const char* name) {
  for (int i = 0; i <= int(detect()); ++i)
    if (std::strcmp(name, kNames[i]) == 0) return chosen().store(i), true;
  return false;
}
}  // namespace ppg::cpu
