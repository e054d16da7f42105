// The scalar loss of one token and its derivatives, once for g++ and nvcc.
// Mirrors ppg_fast/reference/policy_term.py and kernels/triton/policy_term.py. Called once per row, outside of the
// loops over the vocabulary.
#pragma once
#include <cmath>
#include "args.h"

namespace ppg {

struct Term {
  float loss, d_logprob, d_entropy, d_lse;
};
struct Value {  // of a part of the loss, and its derivative in the log-prob
  float value, slope;
};

// The smaller and the larger of two numbers; NaN where either is one, which fminf and fmaxf would drop.
PPG_HD float minimum(float a, float b) { return a < b || a != a ? a : b; }
PPG_HD float maximum(float a, float b) { return a > b || a != a ? a : b; }

PPG_HD float ratio_of(const TermArgs& a, float log_ratio) { return expf(minimum(log_ratio, a.max_log_ratio)); }

// The importance weight, which corrects for a sampler that is not the trainer's policy; 1 where it is off.
PPG_HD float importance_weight(const TermArgs& a, float old_logprob, float rollout_logprob) {
  if (!a.weighs_importance()) return 1.f;
  const float weight = ratio_of(a, old_logprob - rollout_logprob);
  const bool above = a.importance_cap != 0.f && weight > a.importance_cap;
  if (!above && !(weight < a.importance_floor)) return weight;
  return a.importance_mode == ImportanceMode::MASK ? 0.f : above ? a.importance_cap : a.importance_floor;
}

// Whether the bounds of a loss with a gate leave this token out. Not where a NaN is compared.
PPG_APART bool outside(const TermArgs& a, float logprob, float old_logprob, float rollout_logprob, float advantage) {
  const float low = a.clip_low, high = a.clip_high, p = expf(logprob);
  if (a.loss_type == LossType::ICEPOP) {
    const float ratio = ratio_of(a, logprob - rollout_logprob);
    return ratio < 1.f - low || ratio > 1.f + high;
  }
  if (a.loss_type == LossType::IPO) {
    const float moved = p - expf(rollout_logprob);
    return moved < -low || moved > high;
  }
  const float p_old = expf(old_logprob), moved = p - p_old;
  if (a.loss_type == LossType::DPPO_TV) return advantage > 0.f ? moved > high : moved < -low;
  constexpr float LEAST = 1e-8f;  // added to 1 - p, as verl does
  const float q_old = -expm1f(old_logprob), q = -expm1f(logprob);
  const float kl = p_old * (old_logprob - logprob) + q_old * logf((q_old + LEAST) / (q + LEAST));
  return advantage > 0.f ? moved > 0.f && kl > high : moved < 0.f && kl > low;
}

// 1 inside of the bounds, 0 outside, NaN where what is compared is NaN.
PPG_HD float gate(const TermArgs& a, float logprob, float old_logprob, float rollout_logprob, float advantage) {
  const bool with_rollout = a.loss_type == LossType::IPO || a.loss_type == LossType::ICEPOP;
  const float compared = logprob - (with_rollout ? rollout_logprob : old_logprob);
  if (compared != compared) return compared;
  return outside(a, logprob, old_logprob, rollout_logprob, advantage) ? 0.f : 1.f;
}

PPG_HD Value detached(float weight, float logprob, float advantage) {
  const float slope = -weight * advantage;
  return {slope * logprob, slope};
}

PPG_HD Value surrogate(const TermArgs& a, float logprob, float old_logprob, float rollout_logprob, float advantage) {
  const float log_ratio = logprob - old_logprob, ratio = ratio_of(a, log_ratio);
  const float clipped = minimum(maximum(ratio, 1.f - a.clip_low), 1.f + a.clip_high);
  const bool moves = log_ratio <= a.max_log_ratio;  // else the ratio has no slope
  switch (a.loss_type) {
    case LossType::REINFORCE: return detached(1.f, logprob, advantage);
    case LossType::CISPO: return detached(clipped, logprob, advantage);
    case LossType::TOPR: return detached(advantage > 0.f && clipped == clipped ? 1.f : clipped, logprob, advantage);
    case LossType::DPPO_TV:
    case LossType::DPPO_KL: {
      const float weight = a.ratio_cap != 0.f ? minimum(ratio, a.ratio_cap) : ratio;
      return detached(gate(a, logprob, old_logprob, rollout_logprob, advantage) * weight, logprob, advantage);
    }
    case LossType::IPO:
    case LossType::ICEPOP: {
      const float value = -gate(a, logprob, old_logprob, rollout_logprob, advantage) * ratio * advantage;
      return {value, moves ? value : 0.f};
    }
    case LossType::SAPO: {
      const float tau = advantage > 0.f ? a.tau_positive : a.tau_negative, x = tau * (ratio - 1.f);
      const float s = 1.f / (1.f + expf(-x)), rest = 1.f / (1.f + expf(x));
      return {-4.f / tau * s * advantage, moves ? -4.f * s * rest * ratio * advantage : 0.f};
    }
    default: break;  // PPO
  }
  Value v{-minimum(ratio * advantage, clipped * advantage),
          ratio * advantage <= clipped * advantage && moves ? -ratio * advantage : 0.f};
  if (a.dual_clip != 0.f && advantage < 0.f && v.value > -a.dual_clip * advantage) v = {-a.dual_clip * advantage, 0.f};
  return v;
}

// KL(policy, reference) of the token, d = ref - l.
PPG_HD Value kl_term(const TermArgs& a, float log_ratio, float delta) {
  const float bounded = minimum(delta, a.max_log_ratio);
  const bool moves = !(delta > a.max_log_ratio);
  Value kl;
  switch (a.kl_estimator) {
    case KLEstimator::K1: kl = {-delta, 1.f}; break;
    case KLEstimator::ABS: kl = {fabsf(delta), delta > 0.f ? -1.f : delta < 0.f ? 1.f : 0.f}; break;
    case KLEstimator::K2: kl = {0.5f * delta * delta, -delta}; break;
    default: kl = {expm1f(bounded) - bounded, moves ? -expm1f(bounded) : 0.f};
  }
  if (a.kl_estimator == KLEstimator::K3_UNBIASED) {
    const float ratio = ratio_of(a, log_ratio);
    const float own = moves ? -delta : kl.value;  // k3 + its derivative, without cancellation
    kl = {ratio * kl.value, ratio * (log_ratio > a.max_log_ratio ? kl.slope : own)};
  }
  if (a.kl_cap != 0.f && fabsf(kl.value) > a.kl_cap) kl = {copysignf(a.kl_cap, kl.value), 0.f};
  if (a.kl_estimator == KLEstimator::K3_PLUS) kl.slope = -delta;
  return kl;
}

// old_logprob is the log-prob itself where the caller has none (on-policy), ref_logprob likewise; rollout_logprob null:
// the caller has none.
PPG_APART Term policy_term(const TermArgs& a, float logprob, float entropy, float lse, float old_logprob,
                           float ref_logprob, const float* rollout_logprob, float advantage) {
  const bool sampled = rollout_logprob && !(a.nan_rollout == NanRollout::ONE && *rollout_logprob != *rollout_logprob);
  const float rollout = sampled ? *rollout_logprob : old_logprob;
  const float importance = sampled ? importance_weight(a, old_logprob, rollout) : 1.f;
  const Value v = surrogate(a, logprob, old_logprob, rollout, advantage);
  float loss = v.value * importance, d = v.slope * importance, d_lse = 0.f;
  const float log_ratio = logprob - old_logprob;
  if (a.log_ratio_coef != 0.f) {
    loss += a.log_ratio_coef * log_ratio * log_ratio;
    d += 2.f * a.log_ratio_coef * log_ratio;
  }
  if (a.kl_coef != 0.f) {
    const Value kl = kl_term(a, log_ratio, ref_logprob - logprob);
    loss += a.kl_coef * kl.value;
    d += a.kl_coef * kl.slope;
  }
  if (a.entropy_coef != 0.f) loss -= a.entropy_coef * entropy;
  if (a.z_coef != 0.f) {
    loss += a.z_coef * lse * lse;
    d_lse = 2.f * a.z_coef * lse;
  }
  if (loss != loss) d = loss;  // a clip would give 0
  return {loss, d, -a.entropy_coef, d_lse};
}

// nll_weight times -log-prob on top of a row's weighted loss, and of g, the derivative in its logits' log-prob.
template <class Real>
PPG_HD void add_likelihood(float nll_weight, float temperature, float logprob, float& loss, Real& g) {
  loss -= nll_weight * logprob;
  g -= Real(nll_weight) / temperature;
  if (loss != loss) g = loss;
}

}  // namespace ppg
