// The sweep: how a row is spread over the chip and which kernel sweeps it.
#include "policy_loss_onepass.cuh"
#include "policy_loss_twopass.cuh"

namespace ppg {
namespace {

template <class E, bool CAP, int SUMS, int CONSUMERS>
int launch_onepass(const SweepArgs& a, const hw::Device& d, const Plan& p, void* stream) {
  // Cached per thread: the number of slots depends on the device and the cluster only, and so does the answer.
  static thread_local int resident[hw::MAX_DEVICES][MAX_CLUSTER + 1];
  const int smem = ring_bytes(p.cluster, CONSUMERS, p.slots, ENTRY_BYTES<SUMS == SCORE_NORM>);
  int& clusters = resident[d.id][p.cluster];
  if (!clusters) {
    const int error = hw::resident_clusters(d, policy_loss_onepass<E, CAP, SUMS, CONSUMERS>, CONSUMERS + 32, p.cluster,
                                            smem, &clusters);
    if (error) return error;
  }
  const unsigned grid = (unsigned)std::min<int64_t>(a.tokens.N, clusters) * p.cluster;
  return hw::launch(policy_loss_onepass<E, CAP, SUMS, CONSUMERS>, grid, CONSUMERS + 32, p.cluster, smem, stream, a,
                    p.slots);
}

template <class E, bool CAP, int SUMS>
int launch_sweep(const SweepArgs& a, const hw::Device& d, const Plan& p, void* stream) {
  if constexpr (!CAP)  // with a softcap the kernel for 256 would spill registers, and such vocabularies take 512
    if (p.cluster && p.threads == 256) return launch_onepass<E, CAP, SUMS, 256>(a, d, p, stream);
  if (p.cluster) return launch_onepass<E, CAP, SUMS, 512>(a, d, p, stream);
  const int resident = d.sms * two_pass_ctas_per_sm(a.V, sizeof(typename E::raw), p.threads);
  return hw::launch(policy_loss_twopass<E, CAP, SUMS>, (unsigned)std::min<int64_t>(a.tokens.N, resident), p.threads, 0,
                    2 * sizeof(Row) + p.threads / 32 * ENTRY_BYTES<SUMS == SCORE_NORM>, stream, a);
}

template <class E, bool CAP> int launch_sweep(const SweepArgs& a, const hw::Device& d, const Plan& p, void* stream) {
  if (a.score_norm) return launch_sweep<E, CAP, SCORE_NORM>(a, d, p, stream);
  const bool entropy = a.entropy || a.term.entropy_coef != 0.f;
  return entropy ? launch_sweep<E, CAP, ENTROPY>(a, d, p, stream) : launch_sweep<E, CAP, PLAIN>(a, d, p, stream);
}

template <class E> int launch_sweep(const SweepArgs& a, void* stream) {
  hw::Device d;
  if (const int error = hw::current_device(&d)) return error;
  const int entry_bytes = a.score_norm ? ENTRY_BYTES<true> : ENTRY_BYTES<false>;
  Plan p = plan_row(a.V, sizeof(typename E::raw), d.major >= 9, a.logit_softcap != 0.f ? 1 : 2, d.smem_block, d.smem_sm,
                    entry_bytes);
#ifdef PPG_EMULATED
  if (emu::settings.forced) p = {emu::settings.cluster, emu::settings.threads, emu::settings.slots, 0};
#endif
  return a.logit_softcap != 0.f ? launch_sweep<E, true>(a, d, p, stream) : launch_sweep<E, false>(a, d, p, stream);
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
    case DType::F32: return launch_sweep<F32>(a, stream);
    case DType::BF16: return launch_sweep<BF16>(a, stream);
    case DType::F16: return launch_sweep<F16>(a, stream);
  }
  return hw::INVALID_VALUE;
}

int fused_policy_loss(const FusedPolicyLossArgs& args, void* stream) { return sweep(SweepArgs{args, nullptr}, stream); }

int policy_loss(const PolicyLossArgs& args, void* stream) {
  SweepArgs a = canonical(args);
  const int64_t length = args.logits.length;
  a.dlogits = args.dlogits;
  a.advantages = column(args.advantages, length);
  a.weights = column(args.weights, length);
  a.old_logprobs = column(args.old_logprobs, length);
  a.ref_logprobs = column(args.ref_logprobs, length);
  a.rollout_logprobs = column(args.rollout_logprobs, length);
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
