// One row kernel, or none, on N random rows, for a tool that counts instructions: `instructions KERNEL N V`. With a
// number of rounds behind it, what it takes: seconds of the rows, of one row as often, whose memory stays in the cache,
// and of copying and reading them, interleaved, and of a processor's cycle. Compiled for one dtype and one instruction
// set, -DPPG_DTYPE=BF16 -DPPG_LANES=8: all of them take a minute.
#include <algorithm>
#include <chrono>
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

// as csrc/cpu/foreach_isa.h has it: flags of the whole unit give other code
#pragma GCC push_options
#if PPG_LANES == 8
#pragma GCC target("avx2,fma,f16c")
#elif PPG_LANES == 16
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif
namespace ppg::cpu::counted {
namespace {  // so that what is not called is not compiled either
// clang-format off: in this order, as csrc/cpu/foreach_isa.h includes them
#include "../csrc/cpu/vec.h"
#include "../csrc/cpu/elementary.h"
#include "../csrc/cpu/row.h"
#undef PPG_BY_DTYPE
#define PPG_BY_DTYPE(dtype, f, ...) return f<PPG_DTYPE>(__VA_ARGS__)
#include "../csrc/cpu/policy_loss.cpp"
#include "../csrc/cpu/logprobs.cpp"
// clang-format on
// The words of `memory` added up, its four quarters side by side: the least that it takes to read it.
uint32_t add_up(const std::vector<char>& memory) {
  UintVec sums[8] = {}, word;
  const size_t quarter = memory.size() / 4;
  for (size_t i = 0; i + 2 * sizeof word <= quarter; i += 2 * sizeof word) {
    for (int k = 0; k < 8; ++k) {
      std::memcpy(&word, memory.data() + k / 2 * quarter + i + k % 2 * sizeof word, sizeof word);
      sums[k] += word;
    }
  }
  return reduce<uint32_t>(sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7],
                          [](uint32_t a, uint32_t b) { return a + b; });
}
}  // namespace
}  // namespace ppg::cpu::counted
#pragma GCC pop_options

using namespace ppg;

constexpr DType dtype = DType::PPG_DTYPE;
constexpr int64_t SIZE = dtype == DType::F32 ? 4 : 2;

// Runs a kernel over N rows that lie `stride` elements apart; false for a name that is none.
bool run(const std::string& kernel, void* logits, int64_t N, int64_t V, int64_t stride, std::vector<float>& out) {
  const std::vector<int64_t> labels(N, V / 2);
  const std::vector<float> advantages(N, 1.f);
  const Rows rows{logits, N, N * V, stride};
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
    a.dlogits = rows;
    cpu::counted::policy_loss(a, 0, N);
  } else {
    return kernel == "none";
  }
  return true;
}

template <class Call> double seconds(Call call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// A cycle, from products that wait for each other, which no neighbour on the core slows: three each on x86.
double cycle() {
  constexpr int PRODUCTS = 40'000, LATENCY = 3;
  double least = 1;
  for (int turn = 0; turn < 5; ++turn)  // what takes the core away for a while is not a slower clock
    least = std::min(least, seconds([] {
                       uint64_t x = 3;
                       for (int i = 0; i < PRODUCTS; ++i) {
                         x *= x;
                         asm volatile("" : "+r"(x));
                       }
                     }));
  return least / (PRODUCTS * LATENCY);
}

// A line a round: the rows, one row as often, a copy, a read, a cycle. The gradient is written over the logits, which
// are written anew before each.
void measure(const std::string& kernel, const std::vector<char>& logits, int64_t N, int64_t V, int rounds,
             std::vector<float>& out) {
  std::vector<char> changing(logits), target(logits);
  volatile uint32_t seen = 0;
  for (int round = 0; round <= rounds; ++round) {
    const auto again = [&](int64_t stride) {
      changing = logits;
      return seconds([&] { run(kernel, changing.data(), N, V, stride, out); });
    };
    const double rows = again(V), before = cycle(), row = again(0), after = cycle();
    const double copy = seconds([&] { std::memcpy(target.data(), logits.data(), logits.size()); });
    const double read = seconds([&] { seen = seen + cpu::counted::add_up(logits); });
    if (round)  // the first has fresh memory
      std::printf("%.9f %.9f %.9f %.9f %.6g\n", rows, row, copy, read, (before + after) / 2);
  }
}

int main(int argc, char** argv) {
  if (argc != 4 && argc != 5) return 2;
  const std::string kernel = argv[1];
  const int64_t N = std::atoll(argv[2]), V = std::atoll(argv[3]);
  std::mt19937 engine(0);
  std::uniform_real_distribution<float> draw(-6.f, 6.f);
  std::vector<char> logits(N * V * SIZE);
  std::vector<float> out(4 * N);
  for (int64_t i = 0; i < N * V; ++i) {
    const float x = draw(engine);
    std::memcpy(logits.data() + i * SIZE, reinterpret_cast<const char*>(&x) + 4 - SIZE, SIZE);  // the upper bytes
  }
  if (argc == 5) {
    measure(kernel, logits, N, V, std::atoi(argv[4]), out);
    return 0;
  }
  if (!run(kernel, logits.data(), N, V, V, out)) return 3;
  std::printf("%g\n", out[0]);
}
