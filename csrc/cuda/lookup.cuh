// The scalars of a row and of the whole call: read from the caller's tensors, and computed from the row's statistics.
#pragma once
#include "../policy_term.h"
#include "row.cuh"

namespace ppg {

// One sweep serves policy_loss, fused_policy_loss and logprobs_fwd, so that a log-prob has the same bits in all of them
// and the ratio of a first on-policy step is exactly 1.
struct SweepArgs : FusedPolicyLossArgs {
  float* lse;       // (N, 2) out or null; logprobs_fwd: no loss, no advantages, no gradient
  hw::Order order;  // FOLLOWS: turn_advantages, counts and ticket are written by the launch before
};
namespace cuda {
int sweep(const SweepArgs& a, void* stream);  // policy_loss.cu
}
// policy_loss_sweep.cu, a unit for each dtype and set of sums.
template <class E, int SUMS> int launch_sweep(const SweepArgs& a, const hw::Device& d, const Plan& p, void* stream);

struct alignas(16) Row {
  int label;  // negative: SKIP; V: out of range
  float advantage, weight, nll_weight, old_logprob, ref_logprob, rollout_logprob;
  float k;  // scale of its exponents, see View
};
enum Kind { SKIP, FORWARD, FULL };

// The sequence of row n; in range even if cu_seqlens is not valid.
__device__ __forceinline__ int64_t sequence_of(const TokenArgs& t, int64_t n) {
  if (!t.cu_seqlens.data) return t.sequences > 1 ? n / (t.N / t.sequences) : 0;
  int64_t low = 0, high = t.sequences - 1;  // the last s with cu_seqlens[s] <= n
  while (low < high) {
    const int64_t mid = (low + high + 1) / 2;
    if (t.cu_seqlens[mid] <= n) low = mid;
    else high = mid - 1;
  }
  return low;
}

// The number of active tokens of one counted sequence.
__device__ __forceinline__ int64_t active_tokens(const FusedPolicyLossArgs& a, int64_t sequence) {
  int64_t sum = 0;
  for (int64_t k = 0; k < a.slices; ++k) sum += a.counts[sequence * a.slices + k];
  return sum;
}

// The denominator of the whole call, in two steps around a CTA barrier: a partial count per warp into `scratch`, then
// their sum. Integers, so the order does not matter.
__device__ __forceinline__ bool counts_outer(const FusedPolicyLossArgs& a) {
  return a.reduction <= Reduction::SEQUENCE_SUM && a.normalizer == 0.f && !a.normalizer_at;
}
__device__ __forceinline__ void count_outer(const FusedPolicyLossArgs& a, int* scratch, int threads) {
  if (!counts_outer(a)) return;
  int count = 0;
  for (int64_t s = threadIdx.x; s < a.counted * (a.reduction == Reduction::TOKEN_MEAN ? a.slices : 1); s += threads)
    count += a.reduction == Reduction::TOKEN_MEAN ? a.counts[s] : active_tokens(a, s) > 0;
  count = warp_sum(count);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / 32] = count;
}
__device__ __forceinline__ float outer(const FusedPolicyLossArgs& a, const int* scratch, int threads) {
  if (a.normalizer != 0.f) return a.normalizer;
  if (a.normalizer_at) return *a.normalizer_at;
  if (!counts_outer(a)) return 1.f;
  int count = 0;
  for (int w = 0; w < threads / 32; ++w) count += scratch[w];
  return (float)max(count, 1);
}

// Whether a row has a gradient, if one is wanted and it is not masked.
__device__ __forceinline__ bool live(const FusedPolicyLossArgs& a, const Row& r) {
  return r.advantage != 0.f || r.nll_weight != 0.f || a.term.needs_every_row();
}
// The scalars of row n; SKIP for a row beyond the last.
__device__ __forceinline__ Row look_up(const FusedPolicyLossArgs& a, int64_t n, float denominator) {
  Row r{-1, 0.f, 1.f, 0.f, 0.f, 0.f, 0.f, 1.f};
  if (n >= a.tokens.N) return r;
  const int64_t b = (unsigned)n / (unsigned)a.tokens.length, l = n - b * a.tokens.length;  // N < 2^31
  const int64_t label = a.tokens.labels.integer(b, l);
  if (a.tokens.active(a.tokens.bits(b, l))) r.label = (int)min(label, a.V);
  if (a.advantages.data) r.advantage = a.advantages.number(b, l);
  if (a.old_logprobs.data) r.old_logprob = a.old_logprobs.number(b, l);
  if (a.ref_logprobs.data) r.ref_logprob = a.ref_logprobs.number(b, l);
  if (a.rollout_logprobs.data) r.rollout_logprob = a.rollout_logprobs.number(b, l);
  if (a.nll_weights.data) r.nll_weight = a.nll_weights.number(b, l);
  r.k = exponent_scale(a.logit_softcap, a.temperatures.data ? a.temperatures.number(b, l) : a.temperature);
  const bool by_sequence = a.reduction == Reduction::SEQUENCE_MEAN;
  const int64_t s = by_sequence || a.turn_advantages ? sequence_of(a.tokens, n) : 0;
  if (a.turn_advantages) {
    const int64_t turn = a.tokens.turn_ids.integer(b, l);
    if (turn >= 0 && turn < a.T) r.advantage = a.turn_advantages[s * a.T + turn];
  }
  if (a.weights.data) r.weight = a.weights.number(b, l);
  else r.weight = 1.f / (by_sequence ? denominator * (float)max(active_tokens(a, s), int64_t(1)) : denominator);
  if (a.skip_zero_advantages && !live(a, r)) r.label = -1;
  return r;
}
__device__ __forceinline__ Kind row_kind(const FusedPolicyLossArgs& a, const Row& r) {
  if (r.label < 0) return SKIP;
  return a.dlogits.data && live(a, r) ? FULL : FORWARD;
}

struct Finished {  // a row: what is written of it, and the slope of its gradient
  float loss, logprob, entropy, score_norm, ref, sum;
  Slope slope;
};
template <int SUMS> __device__ __forceinline__ Finished finish_row(const SweepArgs& a, const Row& row, const Stat& s) {
  const float per = 1.f / s.sum, log_sum = log2f(s.sum), mean = s.dot * per;
  const float label =
      row.label < a.V ? s.label : hw::bits_to_float(NAN_BITS);  // a label out of range makes its row NaN
  // in nats at once: in units of log 2 the distance of a logit of finfo.min would be infinite
  const float logprob = (label - s.ref) * (row.k * LN2) - log_sum * LN2, entropy = (log_sum - mean) * LN2;
  const float lse = s.ref * (row.k * LN2) + log_sum * LN2;
  const float old_logprob = a.old_logprobs.data ? row.old_logprob : logprob,
              ref_logprob = a.ref_logprobs.data ? row.ref_logprob : logprob;
  const float* const rollout = a.rollout_logprobs.data ? &row.rollout_logprob : nullptr;
  const Term term = policy_term(a.term, logprob, entropy, lse, old_logprob, ref_logprob, rollout, row.advantage);
  // of what `look_up` keeps, which fills the shared memory that the ring leaves
  const float per_temperature = row.k * (a.logit_softcap != 0.f ? LN2 / a.logit_softcap : LN2);
  const float scale = row.weight * per_temperature, h = scale * term.d_entropy * LN2;
  float loss = row.weight * term.loss, g = scale * term.d_logprob;
  if (a.nll_weights.data) add_likelihood(row.nll_weight, 1.f / per_temperature, logprob, loss, g);
  float norm = 0.f;
  if constexpr (SUMS == SCORE_NORM) {
    norm = fmaf(s.square * per, per, fmaf(hw::ex2((label - s.ref) * row.k), -2.f * per, 1.f));
    if (norm < 0.f) norm = 0.f;  // NaN stays NaN
  }
  const float c0 = (h * mean - g + scale * term.d_lse) * per;
  return {loss, logprob, entropy, norm, s.ref, s.sum, {s.ref, c0, -h * per, g}};
}
template <int SUMS> __device__ __forceinline__ void write_row(const SweepArgs& a, int64_t n, const Finished& f) {
  if (a.loss) a.loss[n] = f.loss;
  if (a.logprob) a.logprob[n] = f.logprob;
  if (a.entropy) a.entropy[n] = f.entropy;
  if (a.lse) {
    a.lse[2 * n] = f.ref;
    a.lse[2 * n + 1] = f.sum;
  }
  if constexpr (SUMS == SCORE_NORM) a.score_norm[n] = f.score_norm;
}

// Called by every thread of a CTA after its rows, whose losses one of them has stored; `teams` CTAs call it. The last
// CTA to finish sums the losses of all rows, strided over its threads and then by a tree: the same bits whichever CTA
// it is. `scratch`: (warps + 1) * 8 bytes that are free by now.
__device__ __forceinline__ void sum_losses(const SweepArgs& a, unsigned char* scratch, unsigned teams, int threads) {
  if (!a.total) return;
  double* const part = reinterpret_cast<double*>(scratch);
  int* const last = reinterpret_cast<int*>(part + threads / 32);
  __syncthreads();
  if (threadIdx.x == 0) *last = hw::draw_ticket(a.ticket) == teams - 1;
  __syncthreads();
  if (!*last) return;
  double sum = 0.0;
#pragma unroll 4
  for (int64_t n = threadIdx.x; n < a.tokens.N; n += threads) sum += hw::load_shared_by_all(a.loss + n);
  sum = warp_sum(sum);
  if ((threadIdx.x & 31) == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0.0;
  for (int w = 0; w < threads / 32; ++w) sum += part[w];
  *a.total = (float)sum;
}

}  // namespace ppg
