// One row kernel, or none, on N random rows, for a tool that counts instructions: `instructions KERNEL DTYPE ISA N V`.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../csrc/args.h"

using namespace ppg;

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  const std::string kernel = argv[1], dtype = argv[2];
  const int64_t N = std::atoll(argv[4]), V = std::atoll(argv[5]);
  if (!cpu::use_isa(argv[3])) return 3;
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
  void* data = dtype == "float32" ? static_cast<void*>(logits.data()) : halves.data();
  const Rows rows{data, N, N * V, V};
  const Sweep sweep{rows, labels.data(), nullptr, N, V, dtype == "float32" ? DType::F32 : DType::BF16, 1.f, 0.f};
  if (kernel == "logprobs") {
    cpu::logprobs_fwd({sweep, out.data(), nullptr, out.data() + N}, 0, N);
  } else if (kernel == "policy_loss") {
    PolicyLossArgs a{sweep};
    a.advantages = advantages.data();
    a.term = {LossType::PPO, KLEstimator::K3, 0.2f, 0.2f, 0.f, 0.f, 0.f, 0.f};
    a.loss = out.data();
    a.logprob = out.data() + N;
    a.entropy = out.data() + 2 * N;
    a.dlogits = rows;
    cpu::policy_loss(a, 0, N);
  }
  std::printf("%g\n", out[0]);
}
