// One row kernel, or none, on N random rows, for a tool that counts instructions: `instructions KERNEL N V`. Compiled
// for one dtype and one instruction set, -DPPG_DTYPE=BF16 -DPPG_LANES=8: all of them take a minute.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../csrc/args.h"
#include "../csrc/policy_term.h"

#if PPG_LANES == 8  // as csrc/cpu/foreach_isa.h has it: flags of the whole unit give other code
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace ppg::cpu::counted {
namespace {  // so that what is not called is not compiled either
// clang-format off: in this order, as csrc/cpu/foreach_isa.h includes them
#include "../csrc/cpu/vec.h"
#include "../csrc/cpu/row.h"
#undef PPG_BY_DTYPE
#define PPG_BY_DTYPE(dtype, f, ...) return f<PPG_DTYPE>(__VA_ARGS__)
#include "../csrc/cpu/policy_loss.cpp"
#include "../csrc/cpu/logprobs.cpp"
// clang-format on
}  // namespace
}  // namespace ppg::cpu::counted
#if PPG_LANES == 8
#pragma GCC pop_options
#endif

using namespace ppg;

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const std::string kernel = argv[1];
  const int64_t N = std::atoll(argv[2]), V = std::atoll(argv[3]);
  constexpr DType dtype = DType::PPG_DTYPE;
  std::mt19937 engine(0);
  std::uniform_real_distribution<float> draw(-6.f, 6.f);
  std::vector<float> logits(N * V), advantages(N, 1.f), out(4 * N);
  std::vector<int64_t> labels(N, V / 2);
  for (float& x : logits) x = draw(engine);
  std::vector<uint16_t> halves(N * V);
  for (int64_t i = 0; i < N * V; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &logits[i], 4);
    halves[i] = uint16_t(bits >> 16);
  }
  void* data = dtype == DType::F32 ? static_cast<void*>(logits.data()) : halves.data();
  const Rows rows{data, N, N * V, V};
  const Sweep sweep{rows, labels.data(), nullptr, N, V, dtype, 1.f, 0.f};
  if (kernel == "logprobs") {
    cpu::counted::logprobs_fwd({sweep, out.data(), nullptr, out.data() + N}, 0, N);
  } else if (kernel == "policy_loss") {
    PolicyLossArgs a{sweep};
    a.advantages = advantages.data();
    a.term.loss_type = LossType::PPO;
    a.term.kl_estimator = KLEstimator::K3;
    a.term.clip_low = a.term.clip_high = 0.2f;
    a.term.max_log_ratio = 20.f;
    a.loss = out.data();
    a.logprob = out.data() + N;
    a.entropy = out.data() + 2 * N;
    a.dlogits = rows;
    cpu::counted::policy_loss(a, 0, N);
  } else if (kernel != "none") {
    return 3;
  }
  std::printf("%g\n", out[0]);
}
