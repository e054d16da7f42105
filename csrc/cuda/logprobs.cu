// The backward pass of token_logprobs: one read and one write of each row, from its maximum, its sum and the entropy of
// the forward pass, which is the sweep of the policy loss without a loss, in policy_loss.cu.
#include "row.cuh"

namespace ppg {
namespace {

constexpr int THREADS = 256;

template <class E, bool CAP, bool ENT>
__global__ void __launch_bounds__(THREADS) logprobs_bwd_kernel(const __grid_constant__ LogprobsBwdArgs a) {
  const int64_t n = blockIdx.x, label = a.labels[n];
  const int V = (int)a.V, tid = threadIdx.x;
  const float g = a.d_logprob[n], h = ENT ? a.d_entropy[n] : 0.f, d_lse = a.d_lse ? a.d_lse[n] : 0.f;
  typename E::raw* const out = row_at<E>(a.dlogits, n);
  if (label < 0 || (g == 0.f && h == 0.f && d_lse == 0.f)) {
    zero_row<E>(out, V, tid, THREADS);
    return;
  }
  const float temperature = a.temperatures ? a.temperatures[n] : a.temperature, entropy = ENT ? a.entropy[n] : 0.f;
  const View<CAP> view(a.logit_softcap, exponent_scale(a.logit_softcap, temperature));
  // -(g - d_lse) p - h p (log p + H) with p = 2^t / sum, log p = LN2 (t - log2 sum); a label out of range makes its row
  // NaN
  const float bad = label < a.V ? 0.f : hw::bits_to_float(NAN_BITS), per = 1.f / temperature, sum = a.lse[2 * n + 1];
  const Slope slope{a.lse[2 * n], -(g - d_lse + h * (entropy - log2f(sum) * LN2)) * per / sum + bad,
                    -h * LN2 * per / sum, g * per};
  gradient_row<E, CAP, ENT>(slope, view, row_at<E>(a.logits, n), out, V, label, tid, THREADS);
}

template <class E> int launch_bwd(const LogprobsBwdArgs& a, void* stream) {
  const auto launch = [&](auto kernel) { return hw::launch(kernel, (unsigned)a.N, THREADS, 0, 0, stream, a); };
  if (a.logit_softcap != 0.f)
    return a.d_entropy ? launch(logprobs_bwd_kernel<E, true, true>) : launch(logprobs_bwd_kernel<E, true, false>);
  return a.d_entropy ? launch(logprobs_bwd_kernel<E, false, true>) : launch(logprobs_bwd_kernel<E, false, false>);
}

}  // namespace

namespace cuda {

int logprobs_bwd(const LogprobsBwdArgs& a, void* stream) {
  if (a.N == 0) return 0;
  if (a.N < 0 || a.N > INT32_MAX || a.V < 1 || a.V > MAX_V) return hw::INVALID_VALUE;
  switch (a.dtype) {
    case DType::F32: return launch_bwd<F32>(a, stream);
    case DType::BF16: return launch_bwd<BF16>(a, stream);
    case DType::F16: return launch_bwd<F16>(a, stream);
  }
  return hw::INVALID_VALUE;
}

}  // namespace cuda
}  // namespace ppg
