// The exponential and, with -DPPG_ROWS, the row kernel of one instruction set, -DPPG_LANES=4, 8 or 16, against float64
// and without torch: `row_kernels STRIDE` takes each STRIDE-th of 2^23 exponents. A line and exit status 1 for what is
// off.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../../csrc/args.h"
#include "../../csrc/policy_term.h"

#if PPG_LANES == 8  // as csrc/cpu/foreach_isa.h has it
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#elif PPG_LANES == 16
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif
namespace ppg::cpu::tried {
namespace {  // so that what is not called is not compiled either
// clang-format off: in this order, as csrc/cpu/foreach_isa.h includes them
#include "../../csrc/cpu/vec.h"
#include "../../csrc/cpu/elementary.h"
#include "../../csrc/cpu/row.h"
#include "../../csrc/cpu/policy_loss.cpp"
// clang-format on

int failures = 0;
void expect(bool holds, const char* what, double got, double most) {
  if (holds) return;
  std::printf("%s: %.4g, at most %.4g\n", what, got, most);
  ++failures;
}

// Of 2^t with t in (-1, 0], where every fraction occurs.
template <class F> void try_exponential(const char* name, double most, int stride, F power) {
  constexpr int COUNT = 1 << 23;
  double worst = 0;
  for (int k = 0; k < COUNT; k += stride * LANES) {
    Vec t{};
    for (int i = 0; i < LANES; ++i) t[i] = -float((k + i * stride) % COUNT) / COUNT;
    const Vec e = power(t);
    for (int i = 0; i < LANES; ++i) worst = std::max(worst, std::abs(double(e[i]) / std::exp2(double(t[i])) - 1));
  }
  expect(worst <= most, name, worst, most);
  const double none = power(Vec{})[0] - 1.0;
  expect(std::abs(none) <= (LANES == 16 ? 1e-7 : 0), "2^0 - 1", none, 0);
}

#ifdef PPG_ROWS
struct Row {
  int64_t V;
  float offset, spread, mask;  // mask: what stands in every third place, 0: nothing
  float softcap = 0, temperature = 1;
};

// -log p of the label and its gradient, beside the entropy and the score norm where SUMS has them.
template <class E, bool CAP, Sums SUMS> void try_row(const Row& row) {
  using raw = typename E::raw;
  const int64_t V = row.V, label = V / 2 / 3 * 3 + (V > 1);
  std::mt19937 engine(int(V) + SUMS);
  std::normal_distribution<float> draw;
  std::vector<raw> logits(V), apart(V + 1);
  std::vector<double> z(V), p(V);
  for (int64_t v = 0; v < V; ++v) {
    const float x = row.offset + row.spread * draw(engine);
    store_one<E>(&logits[v], row.mask != 0 && v % 3 == 0 ? row.mask : x);
    const double x_kept = load_one<E>(&logits[v]);
    z[v] = (CAP ? row.softcap * std::tanh(x_kept / row.softcap) : x_kept) / row.temperature;
  }
  const double max = *std::max_element(z.begin(), z.end());
  double sum = 0, entropy = 0, norm = 1;
  for (double x : z) sum += std::exp(x - max);
  for (int64_t v = 0; v < V; ++v) {
    p[v] = std::exp(z[v] - max) / sum;
    if (p[v] > 0) entropy -= p[v] * (z[v] - max - std::log(sum));
    norm += p[v] * p[v];
  }
  norm -= 2 * p[label];
  const double logprob = z[label] - max - std::log(sum);

  float outputs[4] = {}, advantage = 1;
  const Rows rows{logits.data(), 1, V, V};
  PolicyLossArgs a{Sweep{rows, &label, nullptr, 1, V, DType::F32, row.temperature, row.softcap}};
  a.advantages = &advantage;
  a.term.loss_type = LossType::REINFORCE;
  a.loss = outputs;
  a.logprob = outputs + 1;
  if (SUMS >= ENTROPY) a.entropy = outputs + 2;
  if (SUMS == SCORE_NORM) a.score_norm = outputs + 3;
  a.dlogits = Rows{apart.data(), 1, V, V};
  policy_loss_rows<E, CAP, SUMS>(a, 0, 1);
  const double few = 1e-6 + 4e-7 * std::abs(logprob);  // the rounding of a log-prob, and of the sum
  const auto near = [&](const char* what, double got, double want, double most) {
    expect(std::abs(got - want) <= most, what, std::abs(got - want), most);
  };
  near("loss", outputs[0], -logprob, few);
  near("log-prob", outputs[1], logprob, few);
  if (SUMS >= ENTROPY) near("entropy", outputs[2], entropy, few + 4e-6 * entropy);
  if (SUMS == SCORE_NORM) near("score norm", outputs[3], norm, 2e-6);
  const double rounding = sizeof(raw) == 4 ? 4e-6 : std::is_same_v<E, BF16> ? 1.0 / 256 : 1.0 / 1024;
  for (int64_t v = 0; v < V; ++v) {
    const double slope = CAP ? 1 - std::pow(z[v] * row.temperature / row.softcap, 2) : 1;
    const double want = (p[v] - (v == label)) / row.temperature * slope;
    near("gradient", load_one<E>(&apart[v]), want, rounding * std::abs(want) + 4e-7);
    if (row.mask != 0 && v % 3 == 0) near("gradient of a masked logit", load_one<E>(&apart[v]), 0, 0);
  }
  a.dlogits = rows;
  policy_loss_rows<E, CAP, SUMS>(a, 0, 1);
  expect(std::memcmp(logits.data(), apart.data(), V * sizeof(raw)) == 0, "bits in place and apart", 1, 0);
}

template <class E> void try_rows() {
  const float least = sizeof(typename E::raw) == 4 ? -3.4e38f : std::is_same_v<E, BF16> ? -3.38e38f : -65504.f;
  for (int64_t V : {1, 5, 64, 2048, 5003}) {
    for (float offset : {0.f, -90.f, 9000.f}) try_row<E, false, PLAIN>({V, offset, 3.f, 0.f});
    if (V > 5)
      for (float mask : {least, -INFINITY}) try_row<E, false, SCORE_NORM>({V, 1.f, 2.f, mask});
    try_row<E, false, SCORE_NORM>({V, 0.f, 30.f, 0.f});     // further apart than the exponents of floats
    try_row<E, false, SCORE_NORM>({V, -400.f, 40.f, 0.f});  // and all of them negative
    try_row<E, true, ENTROPY>({V, 2.f, 4.f, 0.f, 6.f, 0.7f});
  }
}
#endif

int try_all(int stride) {
  const double fused = NEAR_BLOCKS ? 1.6e-7 : 1.8e-7, near = LANES == 16 ? 2.3e-7 : 1.6e-7;
  try_exponential("2^t - 1", fused, stride, [](Vec t) __attribute__((always_inline)) { return exp2_(t, splat(1.f)); });
  if (NEAR_BLOCKS)
    try_exponential("2^t - 1, near", near, stride, [](Vec t) __attribute__((always_inline)) {
      return exp2_near(t, splat(1.f), splat(NEAR_ROUNDER)).value();
    });
#ifdef PPG_ROWS
  try_rows<F32>();
  try_rows<BF16>();
  try_rows<F16>();
#endif
  if (!failures) std::printf("%d lanes agree with float64\n", LANES);
  return failures != 0;
}
}  // namespace
}  // namespace ppg::cpu::tried
#if PPG_LANES > 4
#pragma GCC pop_options
#endif

int main(int argc, char** argv) { return argc == 2 ? ppg::cpu::tried::try_all(std::atoi(argv[1])) : 2; }
