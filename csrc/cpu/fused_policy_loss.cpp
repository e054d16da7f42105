// Which tokens take part, their advantages and weights. Mirrors csrc/cuda/lookup.cuh; the rules are those of
// ppg_fast/ops/checks.py, which names the value that breaks one.
#include "fused_policy_loss.h"

#include <algorithm>
#include <cmath>

namespace ppg::cpu {
namespace {

constexpr int64_t IGNORE = -100;

bool bounds_are_valid(const TokenArgs& t) {
  if (!t.cu_seqlens.data) return true;
  for (int64_t s = 0; s < t.sequences; ++s)
    if (t.cu_seqlens[s] > t.cu_seqlens[s + 1]) return false;
  return t.cu_seqlens[0] == 0 && t.cu_seqlens[t.sequences] == t.N;
}

}  // namespace

// Contiguous (N,) values are read where they are.
const float* FusedRows::gather(const Column& column, const TokenArgs& tokens, std::vector<float>& memory) {
  if (!column.data) return nullptr;
  if (column.row_stride == 1 && (column.batch_stride == tokens.length || tokens.N <= tokens.length))
    return static_cast<const float*>(column.data);
  memory.resize(tokens.N);
  for (int64_t n = 0; n < tokens.N; ++n) memory[n] = column.number(n / tokens.length, n % tokens.length);
  return memory.data();
}

bool FusedRows::look_up(const FusedPolicyLossArgs& a, const Ints& turn_counts) {
  const TokenArgs& t = a.tokens;
  if (!bounds_are_valid(t)) return false;
  const float* const given = gather(a.advantages, t, advantages);
  const float* const temps = gather(a.temperatures, t, temperatures);
  const bool by_turn = t.turn_ids.data;  // and not by turn_advantages: of no turns they are null
  if (by_turn) advantages.resize(t.N);
  labels.resize(t.N);
  sequences.resize(t.N);
  std::vector<int64_t> active(std::max<int64_t>(t.sequences, 1));
  int64_t sequence = 0;
  for (int64_t n = 0; n < t.N; ++n) {
    if (t.cu_seqlens.data)
      while (n >= t.cu_seqlens[sequence + 1]) ++sequence;
    else sequence = n / (t.N / t.sequences);
    const int64_t b = n / t.length, l = n % t.length, label = t.labels.integer(b, l);
    sequences[n] = sequence;
    labels[n] = IGNORE;
    if (by_turn) advantages[n] = 0.f;
    if (label == IGNORE || (t.loss_mask.data && !t.loss_mask.nonzero(b, l))) continue;
    if (by_turn) {
      const int64_t turn = t.turn_ids.integer(b, l);
      if (turn < -1 || turn >= (turn_counts.data ? turn_counts[sequence] : a.T)) return false;
      if (turn < 0) continue;
      advantages[n] = a.turn_advantages[sequence * a.T + turn];
    }
    if (label < 0 || label >= a.V) return false;
    if (temps && !(temps[n] > 0.f && std::isfinite(temps[n]))) return false;
    labels[n] = label;
    ++active[sequence];
  }
  rows.advantages = by_turn ? advantages.data() : given;
  float outer = a.normalizer_at ? *a.normalizer_at : a.normalizer;
  if (!a.normalizer_at && a.normalizer == 0.f) {
    int64_t counted = 1;
    if (a.reduction == Reduction::TOKEN_MEAN) {
      counted = 0;
      for (const int64_t tokens : active) counted += tokens;
    } else if (a.reduction == Reduction::SEQUENCE_MEAN || a.reduction == Reduction::SEQUENCE_SUM) {
      counted = std::count_if(active.begin(), active.end(), [](int64_t tokens) { return tokens > 0; });
    }
    outer = float(std::max<int64_t>(counted, 1));
  }
  weights.assign(t.N, 1.f / outer);
  if (a.reduction == Reduction::SEQUENCE_MEAN)
    for (int64_t n = 0; n < t.N; ++n) weights[n] = 1.f / (outer * float(std::max<int64_t>(active[sequences[n]], 1)));
  rows.term = a.term;
  rows.nll_weights = gather(a.nll_weights, t, nll_weights);
  if (a.skip_zero_advantages)
    for (int64_t n = 0; n < t.N; ++n)
      if (!rows.live(n)) labels[n] = IGNORE;
  static_cast<Sweep&>(rows) = {a.logits, labels.data(), temps, t.N, a.V, a.dtype, a.temperature, a.logit_softcap};
  rows.weights = weights.data();
  rows.old_logprobs = gather(a.old_logprobs, t, old_logprobs);
  rows.ref_logprobs = gather(a.ref_logprobs, t, ref_logprobs);
  rows.rollout_logprobs = gather(a.rollout_logprobs, t, rollout_logprobs);
  if (!a.loss) losses.resize(t.N);
  rows.loss = a.loss ? a.loss : losses.data();
  rows.logprob = a.logprob;
  rows.entropy = a.entropy;
  rows.score_norm = a.score_norm;
  rows.dlogits = a.dlogits;
  return true;
}

float FusedRows::total() const {
  double sum = 0.0;
  for (int64_t n = 0; n < rows.N; ++n) sum += rows.loss[n];
  return float(sum);
}

}  // namespace ppg::cpu
