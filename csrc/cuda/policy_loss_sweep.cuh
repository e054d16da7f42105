// The launches of the sweep: the kernel that a plan asks for, and how many CTAs of it.
#pragma once
#include "policy_loss_onepass.cuh"
#include "policy_loss_twopass.cuh"

namespace ppg {

template <class E, bool CAP, int SUMS, int CONSUMERS>
int launch_onepass(const SweepArgs& a, const hw::Device& d, const Plan& p, void* stream) {
  // Cached per thread: the number of slots depends on the device and the cluster only, and so does the answer.
  static thread_local int resident[hw::MAX_DEVICES][MAX_CLUSTER + 1];
  const int smem = ring_bytes(p.cluster, CONSUMERS, p.slots, ENTRY_BYTES<SUMS == SCORE_NORM>);
  int& clusters = resident[d.id][p.cluster];
  if (!clusters) {
    const int error = hw::resident_clusters(d, policy_loss_onepass<E, CAP, SUMS, CONSUMERS>, CONSUMERS + HELPERS,
                                            p.cluster, smem, &clusters);
    if (error) return error;
  }
  const unsigned grid = (unsigned)std::min<int64_t>(a.tokens.N, clusters) * p.cluster;
  return hw::launch(a.order, policy_loss_onepass<E, CAP, SUMS, CONSUMERS>, grid, CONSUMERS + HELPERS, p.cluster, smem,
                    stream, a, p.slots);
}

template <class E, bool CAP, int SUMS>
int launch_rows(const SweepArgs& a, const hw::Device& d, const Plan& p, void* stream) {
  if constexpr (!CAP)  // with a softcap the kernel for 256 would spill registers, and such vocabularies take 512
    if (p.cluster && p.threads == 256) return launch_onepass<E, CAP, SUMS, 256>(a, d, p, stream);
  if (p.cluster) return launch_onepass<E, CAP, SUMS, 512>(a, d, p, stream);
  const int resident = d.sms * two_pass_ctas_per_sm(a.V, sizeof(typename E::raw), p.threads);
  return hw::launch(a.order, policy_loss_twopass<E, CAP, SUMS>, (unsigned)std::min<int64_t>(a.tokens.N, resident),
                    p.threads, 0, 2 * sizeof(Row) + p.threads / 32 * ENTRY_BYTES<SUMS == SCORE_NORM>, stream, a);
}

// With a softcap or without.
template <class E, int SUMS> int launch_sweep(const SweepArgs& a, const hw::Device& d, const Plan& p, void* stream) {
  return a.logit_softcap != 0.f ? launch_rows<E, true, SUMS>(a, d, p, stream)
                                : launch_rows<E, false, SUMS>(a, d, p, stream);
}

}  // namespace ppg
