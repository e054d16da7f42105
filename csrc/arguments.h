// Checked tensors, and the lists of ppg_fast/contract.py, as the argument structs of args.h. Included by bindings.cpp
// alone.
#pragma once
#include "tensors.h"

namespace ppg {

inline Sweep sweep_of(const Tensor& logits, const Tensor& labels, const Optional& temperatures, double temperature,
                      double logit_softcap) {
  Sweep s;
  s.logits = rows_of(logits, "logits");
  s.N = logits.size(0) * logits.size(1);
  s.V = logits.size(2);
  s.labels = per_row<int64_t>(labels, s.N, ScalarType::Long, "labels");
  s.temperatures = floats(temperatures, s.N, "temperatures");
  s.dtype = dtype_of(logits);
  s.temperature = float(temperature);
  s.logit_softcap = float(logit_softcap);
  return s;
}

// The spec, which begins at these places of its lists.
inline TermArgs term_of(const double* numbers, const int64_t* choices) {
  using namespace wire;
  TermArgs a{};
  a.loss_type = LossType(choices[LOSS_TYPE]);
  a.kl_estimator = KLEstimator(choices[KL_ESTIMATOR]);
  a.nan_rollout = NanRollout(choices[NAN_ROLLOUT]);
  a.importance_mode = ImportanceMode(choices[IMPORTANCE_MODE]);
  a.clip_low = float(numbers[CLIP_LOW]);
  a.clip_high = float(numbers[CLIP_HIGH]);
  a.dual_clip = float(numbers[DUAL_CLIP]);
  a.ratio_cap = float(numbers[RATIO_CAP]);
  a.tau_positive = float(numbers[TAU_POSITIVE]);
  a.tau_negative = float(numbers[TAU_NEGATIVE]);
  a.log_ratio_coef = float(numbers[LOG_RATIO_COEF]);
  a.kl_coef = float(numbers[KL_COEF]);
  a.kl_cap = float(numbers[KL_CAP]);
  a.entropy_coef = float(numbers[ENTROPY_COEF]);
  a.z_coef = float(numbers[Z_COEF]);
  a.importance_floor = float(numbers[IMPORTANCE_FLOOR]);
  a.importance_cap = float(numbers[IMPORTANCE_CAP]);
  a.max_log_ratio = float(numbers[MAX_LOG_RATIO]);
  return a;
}

inline TokenArgs tokens_of(const Tensor& logits, const Tensors& tensors, int64_t sequences) {
  using namespace wire::fused;
  TokenArgs t{};
  t.labels = column(tensors.at(LABELS), logits, ScalarType::Long, "labels");
  t.loss_mask = column(tensors.at(LOSS_MASK), logits, {}, "loss_mask");
  t.turn_ids = column(tensors.at(TURN_IDS), logits, {}, "turn_ids");
  const bool integers = (t.turn_ids.bytes == 4 || t.turn_ids.bytes == 8) && !t.turn_ids.floating;
  STD_TORCH_CHECK(!t.turn_ids.data || integers, "turn_ids must be int32 or int64");
  t.N = logits.size(0) * logits.size(1);
  t.length = logits.size(1) ? logits.size(1) : 1;
  t.sequences = sequences;
  t.cu_seqlens = ints(tensors.at(CU_SEQLENS), sequences + 1, "cu_seqlens");
  STD_TORCH_CHECK(t.N == 0 || (sequences >= 1 && (t.cu_seqlens.data || t.N % sequences == 0)), "rows do not make ",
                  sequences, " sequences");
  return t;
}

inline CreditArgs credit_of(const TokenArgs& tokens, const Tensors& tensors, const Numbers& numbers,
                            const Choices& choices, const Optional& turns) {
  using namespace wire::fused;
  CreditArgs c{};
  c.tokens = tokens;
  const Optional& rewards = tensors.at(REWARDS);
  if (!rewards) return c;
  STD_TORCH_CHECK(tensors.at(TURN_IDS) && turns && rewards->dim() == 2 && rewards->size(0) == tokens.sequences,
                  "rewards (S, T) go with turn_ids and turns");
  c.T = rewards->size(1);
  c.baseline = Baseline(choices.at(BASELINE));
  const int64_t size = tokens.sequences * c.T;
  const Optional& mask = tensors.at(REWARD_MASK);
  c.rewards = floats(rewards, size, "rewards");
  c.segment_ids = longs(tensors.at(SEGMENT_IDS), size, "segment_ids");
  c.reward_mask = mask ? per_row<uint8_t>(*mask, c.T * c.T, ScalarType::Bool, "reward_mask") : nullptr;
  c.turn_counts = ints(tensors.at(TURN_COUNTS), tokens.sequences, "turn_counts");
  c.group_ids = ints(tensors.at(GROUP_IDS), tokens.sequences, "group_ids");
  STD_TORCH_CHECK(c.baseline == Baseline::NONE || c.group_ids.data, "a baseline needs group_ids");
  c.returns = floats(turns, size * (c.baseline == Baseline::NONE ? 1 : 2), "turns");
  c.advantages = c.baseline == Baseline::NONE ? c.returns : c.returns + size;
  c.lookahead = choices.at(LOOKAHEAD);
  c.segment_length = choices.at(SEGMENT_LENGTH);
  c.gamma = numbers.at(GAMMA);
  c.std_eps = numbers.at(STD_EPS);
  return c;
}

inline FusedPolicyLossArgs fused_of(const Tensor& logits, const TokenArgs& tokens, const Tensors& tensors,
                                    const Numbers& numbers, const Choices& choices) {
  using namespace wire::fused;
  const double* const spec = numbers.data() + SPEC_NUMBERS;
  const auto floats_at = [&](wire::fused::Tensor place, const char* name) {
    return column(tensors.at(place), logits, ScalarType::Float, name);
  };
  FusedPolicyLossArgs a{};
  a.tokens = tokens;
  a.logits = rows_of(logits, "logits");
  a.V = logits.size(2);
  a.dtype = dtype_of(logits);
  a.temperature = float(spec[wire::TEMPERATURE]);
  a.logit_softcap = float(spec[wire::LOGIT_SOFTCAP]);
  a.advantages = floats_at(ADVANTAGES, "advantages");
  a.old_logprobs = floats_at(OLD_LOGPROBS, "old_logprobs");
  a.ref_logprobs = floats_at(REF_LOGPROBS, "ref_logprobs");
  a.rollout_logprobs = floats_at(ROLLOUT_LOGPROBS, "rollout_logprobs");
  a.temperatures = floats_at(TEMPERATURES, "temperatures");
  a.nll_weights = floats_at(NLL_WEIGHTS, "nll_weights");
  a.term = term_of(spec, choices.data() + SPEC_CHOICES);
  a.reduction = Reduction(choices.at(REDUCTION));
  a.skip_zero_advantages = choices.at(SKIP_ZERO_ADVANTAGES);
  a.normalizer = float(numbers.at(NORMALIZER));
  a.normalizer_at = floats(tensors.at(NORMALIZER_AT), 1, "normalizer");
  return a;
}

}  // namespace ppg
