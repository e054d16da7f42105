// Runs every launcher over every plan on buffers of exact size, for AddressSanitizer and UBSan: an element too far, a
// misaligned access, an overflow. Numbers are checked elsewhere; here a launch must succeed and a live row must be
// finite.
#include <cstdio>

#include "../../../csrc/args.h"
#include "cuda_emu.h"

using namespace ppg;

namespace {
int failures = 0, launches = 0;
void expect(int error, const char* what) {
  ++launches;
  if (error && ++failures) std::printf("%s: %s\n", what, cuda::error_string(error));
}

struct Buffer {  // `count` elements that begin `shift` elements behind a 256-byte boundary and end where the allocation
                 // ends
  unsigned char *base = nullptr, *data = nullptr;
  Buffer(int64_t count, int shift, int size) {
    void* p = nullptr;
    if (posix_memalign(&p, 256, (size_t)((count + shift) * size))) std::abort();
    base = static_cast<unsigned char*>(p);
    data = base + shift * size;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = 0x3f000000u + (uint32_t)(i * 7919 % 251) * 0x10000u;  // small numbers in any of the dtypes
      std::memcpy(data + i * size, size == 4 ? (const char*)&bits : (const char*)&bits + 2, (size_t)size);
    }
  }
  ~Buffer() { std::free(base); }
};

TermArgs term(LossType loss_type, bool entropy) {
  TermArgs a{};
  a.loss_type = loss_type, a.kl_estimator = KLEstimator::K3;
  a.clip_low = 0.2f, a.clip_high = 0.3f, a.max_log_ratio = 20.f;
  a.entropy_coef = entropy ? 0.1f : 0.f, a.z_coef = 1e-3f;
  return a;
}

// From rewards and logits to loss and gradient; every column is of exact size, 16-bit masks and 32-bit ids among them.
void run_fused(const Rows& logits, const Rows& dlogits, int64_t V, DType dtype, bool cap, bool entropy) {
  constexpr int64_t S = 2, L = 3, T = 5, N = S * L;
  static int round = 0;
  const bool packed = ++round % 2, means = round % 3;
  const std::vector<int64_t> labels{0, -100, V - 1, V / 2, 1 % V, V / 3}, groups{7, 7};
  const std::vector<uint16_t> mask{1, 1, 1, 0, 1, 1};
  const std::vector<int32_t> turns{0, 1, 4, 2, -1, 9}, counts{T, 3}, bounds{0, 2, 6};
  const std::vector<uint8_t> reward_mask(T * T, 1);
  const std::vector<float> rewards(S * T, 1.5f), old(N, -1.f);
  std::vector<float> credit(2 * S * T), loss(N), logprob(N), ent(N), norm(N), total(1);
  std::vector<int32_t> tokens(S * 2);
  std::vector<uint32_t> ticket(1, 9);
  const auto column = [](const auto& v, bool floating) { return Column{v.data(), L, 1, (int)sizeof v[0], floating}; };
  FusedLaunchArgs both{};
  auto& [c, a] = both;
  c.tokens = {column(labels, false),
              column(mask, round % 2),
              column(turns, false),
              N,
              L,
              {packed ? bounds.data() : nullptr, false},
              S};
  c.rewards = rewards.data(), c.reward_mask = round % 4 ? nullptr : reward_mask.data();
  c.turn_counts = {counts.data(), false}, c.group_ids = {groups.data(), true};
  c.T = T, c.lookahead = 2, c.gamma = 0.9, c.std_eps = 1e-6, c.baseline = Baseline(1 + round % 3);
  c.returns = credit.data(), c.advantages = credit.data() + S * T;
  c.counts = tokens.data(), c.counted = means ? S : 1, c.slices = means ? 2 : 4, c.ticket = ticket.data();
  a.tokens = c.tokens, a.logits = logits, a.dlogits = dlogits, a.V = V, a.dtype = dtype;
  a.temperature = 1.1f, a.logit_softcap = cap ? 9.f : 0.f, a.old_logprobs = column(old, true);
  a.turn_advantages = c.advantages, a.T = T;
  a.term = term(LossType::CISPO, entropy);
  if (round % 2) a.nll_weights = column(old, true);
  a.reduction = means ? Reduction(1 + round % 2) : Reduction::TOKEN_MEAN, a.skip_zero_advantages = round % 5 == 0;
  a.counts = c.counts, a.counted = c.counted, a.slices = c.slices;
  a.loss = loss.data(), a.logprob = logprob.data(), a.entropy = entropy ? ent.data() : nullptr;
  a.score_norm = entropy && round % 3 ? norm.data() : nullptr;
  a.total = total.data(), a.ticket = ticket.data();
  expect(cuda::fused_policy_loss(both, nullptr), "fused_policy_loss");
  if (!std::isfinite(total[0])) ++failures, std::printf("fused loss %g\n", total[0]);
}

void run(int64_t V, DType dtype, int shift, int gap, int out_shift, bool cap, bool entropy) {
  constexpr int64_t N = 6, L = 3;
  const int size = dtype == DType::F32 ? 4 : 2;
  const int64_t stride = V + gap, batch = L * stride + gap, count = batch + (L - 1) * stride + V;
  Buffer logits(count, shift, size), other(count, std::max(out_shift, 0), size);
  const Rows in{logits.data, L, batch, stride}, out{out_shift < 0 ? logits.data : other.data, L, batch, stride};
  const std::vector<int64_t> labels{0, -100, V - 1, V / 2, -1, V / 3};
  const std::vector<float> advantages{1.f, 1.f, -0.5f, 0.f, 1.f, 2.f}, ones(N, 1.25f), zeros(N, 0.f);
  std::vector<float> loss(N), logprob(N), again(N), ent(N), lse(2 * N), norm(N);
  const Sweep sweep{in, labels.data(), nullptr, N, V, dtype, 1.3f, cap ? 9.f : 0.f};

  LogprobsFwdArgs f{sweep};
  f.logprob = logprob.data(), f.entropy = ent.data(), f.lse = lse.data(),
  f.score_norm = entropy ? norm.data() : nullptr;
  expect(cuda::logprobs_fwd(f, nullptr), "logprobs_fwd");

  PolicyLossArgs a{sweep};
  a.advantages = advantages.data(), a.weights = ones.data(), a.old_logprobs = logprob.data();
  a.term = term(LossType::PPO, entropy);
  a.loss = loss.data(), a.logprob = again.data(), a.entropy = entropy ? ent.data() : nullptr;
  a.dlogits = out;
  expect(cuda::policy_loss(a, nullptr), "policy_loss");
  for (int n = 0; n < N; ++n)
    if (!std::isfinite(loss[n]) || logprob[n] != again[n])
      ++failures, std::printf("row %d: loss %g, log-probs %g %g\n", n, loss[n], logprob[n], again[n]);

  Buffer teacher(count, (shift + 3) % 8, size);
  DistillationArgs d{sweep};
  d.teacher_logits = {teacher.data, L, batch, stride}, d.weights = entropy ? advantages.data() : nullptr;
  d.beta = float(launches % 3) / 2, d.teacher_softcap = entropy ? 5.f : 0.f;
  d.divergence = loss.data(), d.dlogits = launches % 4 ? out : d.teacher_logits;
  expect(cuda::distillation(d, nullptr), "distillation");
  for (int n = 0; n < N; ++n)
    if (!std::isfinite(loss[n])) ++failures, std::printf("row %d: divergence %g\n", n, loss[n]);

  run_fused(in, out, V, dtype, cap, entropy);
  LogprobsBwdArgs b{sweep};
  b.lse = lse.data(), b.entropy = ent.data(), b.d_logprob = advantages.data(),
  b.d_entropy = b.d_lse = entropy ? ones.data() : nullptr, b.dlogits = out;
  expect(cuda::logprobs_bwd(b, nullptr), "logprobs_bwd");
  const ScaleRowsArgs r{out, out, ones.data(), N, V, N * V, dtype, dtype};
  expect(cuda::scale_rows(r, nullptr), "scale_rows");
  if (dtype == DType::F32 && out_shift >= 0) {  // into half of the memory that was for float32
    const ScaleRowsArgs c{in, out, ones.data(), N, V, N * V, dtype, entropy ? DType::BF16 : DType::F16};
    expect(cuda::scale_rows(c, nullptr), "scale_rows into 16 bits");
  }
}
}  // namespace

int main() {
  struct Plan {
    int major, cluster, threads, slots;
  };
  for (const auto& [major, cluster, threads, slots] : {Plan{9, 0, 0, 0},
                                                       {8, 0, 512, 0},
                                                       {9, 1, 256, 5},
                                                       {9, 2, 256, 3},
                                                       {9, 4, 256, 2},
                                                       {9, 8, 256, 2},
                                                       {9, 1, 512, 4}})
    for (const int64_t V : {1, 1003, 9001}) {   // dtype, alignment, placement and terms take turns
      if (cluster == 8 && V != 1003) continue;  // thousands of fibers
      const int k = launches / 4;
      emu::settings = {major, 1 + k % 2, threads != 0, cluster, threads, slots, (unsigned)k, k % 3};
      run(V, DType((k + k / 3) % 3), k * 5 % 9, k % 4,
          k % 3 == 0   ? -1
          : k % 3 == 1 ? k * 5 % 9
                       : k % 5,
          k / 3 % 3 == 0, k % 2 == 0);
    }
  emu::settings = {};
  for (const int64_t T : {1, 5, 300}) {
    const std::vector<float> rewards(2 * T, 1.f);
    const std::vector<int64_t> ids(2 * T, 3), counts{T, T / 2};
    std::vector<float> returns(2 * T);
    for (const int64_t lookahead : {int64_t{1}, int64_t{3}, int64_t{INT32_MAX}}) {
      const PartialReturnsArgs a{rewards.data(),         ids.data(), counts.data(), returns.data(), 2, T, lookahead,
                                 lookahead == 3 ? 2 : 0, 0.9f};
      expect(cuda::partial_returns(a, nullptr), "partial_returns");
    }
  }
  std::printf("%d launches, %d failures\n", launches, failures);
  return failures != 0;
}
