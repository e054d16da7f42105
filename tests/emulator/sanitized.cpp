// Runs every launcher over every plan on buffers of exact size, for AddressSanitizer and UBSan: an element too far, a misaligned access, an
// overflow. Numbers are checked elsewhere; here a launch must succeed and a live row must be finite.
#include <cstdio>

#include "../../csrc/args.h"
#include "cuda_emu.h"

using namespace ppg;

namespace {
int failures = 0, launches = 0;
void expect(int error, const char* what) {
  ++launches;
  if (error && ++failures) std::printf("%s: %s\n", what, cuda::error_string(error));
}

struct Buffer {  // `count` elements that begin `shift` elements behind a 256-byte boundary and end where the allocation ends
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

void run(int64_t V, DType dtype, int shift, int gap, int out_shift, bool cap, bool entropy) {
  constexpr int64_t N = 6, L = 3;
  const int size = dtype == DType::F32 ? 4 : 2;
  const int64_t stride = V + gap, batch = L * stride + gap, count = batch + (L - 1) * stride + V;
  Buffer logits(count, shift, size), other(count, std::max(out_shift, 0), size);
  const Rows in{logits.data, L, batch, stride}, out{out_shift < 0 ? logits.data : other.data, L, batch, stride};
  const std::vector<int64_t> labels{0, -100, V - 1, V / 2, -1, V / 3};
  const std::vector<float> advantages{1.f, 1.f, -0.5f, 0.f, 1.f, 2.f}, ones(N, 1.25f), zeros(N, 0.f);
  std::vector<float> loss(N), logprob(N), ent(N), lse(N);
  const Sweep sweep{in, labels.data(), nullptr, N, V, dtype, 1.3f, cap ? 9.f : 0.f};

  LogprobsFwdArgs f{sweep};
  f.logprob = logprob.data(), f.entropy = ent.data(), f.lse = lse.data();
  expect(cuda::logprobs_fwd(f, nullptr), "logprobs_fwd");

  PolicyLossArgs a{sweep};
  a.advantages = advantages.data(), a.weights = ones.data(), a.old_logprobs = logprob.data();
  a.term = {LossType::PPO, KLEstimator::K3, 0.2f, 0.3f, 0.f, 0.f, entropy ? 0.1f : 0.f, 0.f};
  a.loss = loss.data(), a.logprob = lse.data() /* overwritten: a second set of log-probs */, a.entropy = entropy ? ent.data() : nullptr;
  a.dlogits = out;
  expect(cuda::policy_loss(a, nullptr), "policy_loss");
  for (int n = 0; n < N; ++n)
    if (!std::isfinite(loss[n]) || logprob[n] != lse[n])
      ++failures, std::printf("row %d: loss %g, log-probs %g %g\n", n, loss[n], logprob[n], lse[n]);

  LogprobsBwdArgs b{sweep};
  b.lse = lse.data(), b.entropy = ent.data(), b.d_logprob = advantages.data(), b.d_entropy = entropy ? ones.data() : nullptr,
  b.dlogits = out;
  expect(cuda::logprobs_bwd(b, nullptr), "logprobs_bwd");
  const RescaleRowsArgs r{out, ones.data(), N, V, dtype};
  expect(cuda::rescale_rows(r, nullptr), "rescale_rows");
}
}  // namespace

int main() {
  struct Plan {
    int major, cluster, threads, slots;
  };
  for (const auto& [major, cluster, threads, slots] :
       {Plan{9, 0, 0, 0}, {8, 0, 512, 0}, {9, 1, 256, 5}, {9, 2, 256, 3}, {9, 4, 256, 2}, {9, 8, 256, 2}, {9, 1, 512, 4}})
    for (const int64_t V : {1, 1003, 9001}) {   // dtype, alignment, placement and terms take turns
      if (cluster == 8 && V != 1003) continue;  // thousands of fibers
      const int k = launches / 4;
      emu::settings = {major, 1 + k % 2, threads != 0, cluster, threads, slots, (unsigned)k, k % 3};
      run(V, DType((k + k / 3) % 3), k * 5 % 9, k % 4, k % 3 == 0 ? -1 : k % 3 == 1 ? k * 5 % 9 : k % 5, k / 3 % 3 == 0, k % 2 == 0);
    }
  emu::settings = {};
  for (const int64_t T : {1, 5, 300}) {
    const std::vector<float> rewards(2 * T, 1.f);
    const std::vector<int64_t> ids(2 * T, 3), counts{T, T / 2};
    std::vector<float> returns(2 * T);
    for (const int64_t lookahead : {int64_t{1}, int64_t{3}, int64_t{INT32_MAX}}) {
      const PartialReturnsArgs a{rewards.data(), ids.data(), counts.data(), returns.data(), 2, T, lookahead, lookahead == 3 ? 2 : 0, 0.9f};
      expect(cuda::partial_returns(a, nullptr), "partial_returns");
    }
  }
  std::printf("%d launches, %d failures\n", launches, failures);
  return failures != 0;
}
