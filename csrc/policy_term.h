// The scalar loss of one token and its two derivatives, once for g++ and nvcc.
// Mirrors ppg_fast/reference/policy_term.py and kernels/triton/policy_term.py. Called once per row, outside of the
// loops over the vocabulary.
#pragma once
#include <cmath>
#include "args.h"

namespace ppg {

struct Term {
  float loss, d_logprob, d_entropy;
};

// The smaller and the larger of two numbers; NaN where either is one, which fminf and fmaxf would drop.
PPG_HD float minimum(float a, float b) { return a < b || a != a ? a : b; }
PPG_HD float maximum(float a, float b) { return a > b || a != a ? a : b; }

constexpr float MAX_LOG_RATIO = 20.f;  // as in ppg_fast/spec.py: an outlier gives a large number and not inf

// old_logprob is the log-prob itself where the caller has none (on-policy), ref_logprob likewise, importance 1.
PPG_HD Term policy_term(const TermArgs& a, float logprob, float entropy, float old_logprob, float ref_logprob,
                        float importance, float advantage) {
  const float log_ratio = logprob - old_logprob, ratio = expf(minimum(log_ratio, MAX_LOG_RATIO));
  float loss, d;
  if (a.loss_type == LossType::REINFORCE) {
    d = -advantage;
    loss = d * logprob;
  } else if (a.loss_type == LossType::CISPO) {
    d = -minimum(ratio, 1.f + a.clip_high) * advantage;
    loss = d * logprob;
  } else {  // PPO, and GSPO, whose shared ratio the caller expresses by old log-probs
    const float clipped = minimum(maximum(ratio, 1.f - a.clip_low), 1.f + a.clip_high);
    loss = -minimum(ratio * advantage, clipped * advantage);
    d = ratio * advantage <= clipped * advantage && log_ratio <= MAX_LOG_RATIO ? -ratio * advantage : 0.f;
    if (a.dual_clip != 0.f && advantage < 0.f && loss > -a.dual_clip * advantage) {
      loss = -a.dual_clip * advantage;
      d = 0.f;
    }
  }
  loss *= importance;
  d *= importance;
  if (a.kl_coef != 0.f) {
    const float delta = ref_logprob - logprob;
    float kl, dk;
    if (a.kl_estimator == KLEstimator::K1) {
      kl = -delta;
      dk = 1.f;
    } else if (a.kl_estimator == KLEstimator::K2) {
      kl = 0.5f * delta * delta;
      dk = -delta;
    } else {
      const float bounded = minimum(delta, MAX_LOG_RATIO);
      kl = expm1f(bounded) - bounded;
      dk = delta > MAX_LOG_RATIO ? 0.f : -expm1f(bounded);
    }
    loss += a.kl_coef * kl;
    d += a.kl_coef * dk;
  }
  if (a.entropy_coef != 0.f) loss -= a.entropy_coef * entropy;
  if (loss != loss) d = loss;  // a clip would give 0
  return {loss, d, -a.entropy_coef};
}

// The importance weight min(exp(old - rollout), cap), which corrects for a sampler that is not the trainer's policy; 1
// where it is off, and where the rollout log-prob is NaN and the spec says so.
PPG_HD float importance_weight(const TermArgs& a, float old_logprob, const float* rollout_logprobs, int64_t n) {
  if (!rollout_logprobs || a.importance_cap == 0.f) return 1.f;
  const float rollout = rollout_logprobs[n];
  if (a.nan_rollout == NanRollout::ONE && rollout != rollout) return 1.f;
  return minimum(expf(minimum(old_logprob - rollout, MAX_LOG_RATIO)), a.importance_cap);
}

}  // namespace ppg
