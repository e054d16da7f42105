// The sweep: how a row is spread over the chip and which unit has its kernel.
#include <atomic>

#include "lookup.cuh"

namespace ppg {
namespace {

template <class E> int launch_sums(const SweepArgs& a, const hw::Device& d, const Plan& p, void* stream) {
  if (a.score_norm) return launch_sweep<E, SCORE_NORM>(a, d, p, stream);
  const bool entropy = a.entropy || a.term.entropy_coef != 0.f;
  return entropy ? launch_sweep<E, ENTROPY>(a, d, p, stream) : launch_sweep<E, PLAIN>(a, d, p, stream);
}

// Whether clusters of this shape fit on this device: the first launch of a process finds out, for all dtypes and sums,
// as log-probs with and without a loss or a norm must come from the same plan.
enum Fit : int { UNKNOWN, FITS, DOES_NOT };
std::atomic<int>& fit_of(const hw::Device& d, const Plan& p) {
  static std::atomic<int> known[hw::MAX_DEVICES][MAX_CLUSTER + 1][2];
  return known[d.id][p.cluster][p.threads == LARGE_THREADS];
}

template <class E> int plan_and_launch(const SweepArgs& a, void* stream) {
  hw::Device d;
  if (const int error = hw::current_device(&d)) return error;
  const int entry_bytes = a.score_norm ? ENTRY_BYTES<true> : ENTRY_BYTES<false>;
  Plan p = plan_row(a.V, sizeof(typename E::raw), d.major >= 9, a.logit_softcap != 0.f ? 1 : 2, d.smem_block, d.smem_sm,
                    entry_bytes);
#ifdef PPG_EMULATED
  if (emu::settings.forced) p = {emu::settings.cluster, emu::settings.threads, emu::settings.slots, 0};
#endif
  if (!p.cluster) return launch_sums<E>(a, d, p, stream);
  std::atomic<int>& fit = fit_of(d, p);
  int unknown = UNKNOWN;
  if (fit != DOES_NOT) {
    const int error = launch_sums<E>(a, d, p, stream);
    if (!error) fit.compare_exchange_strong(unknown, FITS);
    if (!error || fit == FITS || !hw::does_not_fit(error)) return error;
  }
  const int error = launch_sums<E>(a, d, {0, LARGE_THREADS, 0, 0}, stream);
  if (!error) fit.compare_exchange_strong(unknown, DOES_NOT);
  return error;
}

Column column(const void* data, int64_t length, int bytes = 4) { return {data, length, 1, bytes, true}; }

// The arguments of a sweep whose per-row tensors are contiguous.
SweepArgs canonical(const Sweep& s) {
  SweepArgs a{};
  a.tokens.labels = column(s.labels, s.logits.length, 8);
  a.tokens.N = s.N;
  a.tokens.length = s.logits.length;
  a.tokens.sequences = 1;
  a.logits = s.logits;
  a.V = s.V;
  a.dtype = s.dtype;
  a.temperature = s.temperature;
  a.logit_softcap = s.logit_softcap;
  a.temperatures = column(s.temperatures, s.logits.length);
  a.reduction = Reduction::NONE;
  return a;
}

}  // namespace

namespace cuda {

int sweep(const SweepArgs& a, void* stream) {
  if (a.tokens.N == 0) return 0;
  if (a.tokens.N < 0 || a.tokens.N > INT32_MAX || a.V < 1 || a.V > MAX_V) return hw::INVALID_VALUE;
  switch (a.dtype) {
    case DType::F32: return plan_and_launch<F32>(a, stream);
    case DType::BF16: return plan_and_launch<BF16>(a, stream);
    case DType::F16: return plan_and_launch<F16>(a, stream);
  }
  return hw::INVALID_VALUE;
}

int policy_loss(const PolicyLossArgs& args, void* stream) {
  SweepArgs a = canonical(args);
  const int64_t length = args.logits.length;
  a.dlogits = args.dlogits;
  a.advantages = column(args.advantages, length);
  a.weights = column(args.weights, length);
  a.old_logprobs = column(args.old_logprobs, length);
  a.ref_logprobs = column(args.ref_logprobs, length);
  a.rollout_logprobs = column(args.rollout_logprobs, length);
  a.nll_weights = column(args.nll_weights, length);
  a.term = args.term;
  a.loss = args.loss;
  a.logprob = args.logprob;
  a.entropy = args.entropy;
  a.score_norm = args.score_norm;
  return sweep(a, stream);
}

int logprobs_fwd(const LogprobsFwdArgs& args, void* stream) {
  SweepArgs a = canonical(args);
  a.logprob = args.logprob;
  a.entropy = args.entropy;
  a.lse = args.lse;
  a.score_norm = args.score_norm;
  return sweep(a, stream);
}

const char* error_string(int error) { return hw::error_string(error); }

}  // namespace cuda
}  // namespace ppg
