// What Python sees of each launcher. Included by bindings.cpp alone.
#pragma once

namespace ppg {

constexpr const char* kSchemas[] = {
    "logprobs_fwd(Tensor logits, Tensor labels, Tensor? temperatures, float temperature, float logit_softcap, "
    "Tensor(a!) logprob, "
    "Tensor(b!)? entropy, Tensor(c!) lse, Tensor(d!)? score_norm=None) -> ()",
    "logprobs_bwd(Tensor logits, Tensor labels, Tensor lse, Tensor? entropy, Tensor d_logprob, Tensor? d_entropy, "
    "Tensor? temperatures, "
    "float temperature, float logit_softcap, Tensor(a!) dlogits) -> ()",
    "policy_loss(Tensor logits, Tensor labels, Tensor advantages, Tensor? weights, Tensor? old_logprobs, Tensor? "
    "ref_logprobs, "
    "Tensor? rollout_logprobs, Tensor? temperatures, int loss_type, int kl_estimator, float clip_low, float clip_high, "
    "float dual_clip, "
    "float kl_coef, float entropy_coef, float importance_cap, float temperature, float logit_softcap, Tensor(a!) loss, "
    "Tensor(b!) logprob, Tensor(c!)? entropy, Tensor(d!)? dlogits, Tensor(e!)? score_norm=None) -> ()",
    "fused_policy_loss(Tensor logits, Tensor labels, Tensor? loss_mask, Tensor? turn_ids, Tensor? advantages, Tensor? "
    "old_logprobs, "
    "Tensor? ref_logprobs, Tensor? rollout_logprobs, Tensor? temperatures, Tensor? rewards, Tensor? turn_counts, "
    "Tensor? segment_ids, "
    "Tensor? reward_mask, Tensor? group_ids, int lookahead, int segment_length, float gamma, int baseline, float "
    "std_eps, int reduction, "
    "float normalizer, Tensor? normalizer_at, int sequences, Tensor? cu_seqlens, int counted, int slices, bool "
    "skip_zero_advantages, "
    "int loss_type, int kl_estimator, float clip_low, float clip_high, float dual_clip, float kl_coef, float "
    "entropy_coef, "
    "float importance_cap, float temperature, float logit_softcap, Tensor(a!)? turns, Tensor(b!) work, Tensor(c!) "
    "loss, "
    "Tensor(d!)? total, Tensor(e!) logprob, Tensor(f!)? entropy, Tensor(g!)? dlogits, Tensor(h!)? score_norm=None) -> "
    "()",
    "rescale_rows(Tensor(a!) dlogits, Tensor scale) -> ()",
    "partial_returns(Tensor rewards, Tensor? segment_ids, Tensor? turn_counts, int lookahead, int segment_length, "
    "float gamma, "
    "Tensor(a!) returns) -> ()",
    "want_huge_pages(Tensor(a!) memory) -> ()",
    "build() -> str",
    "use_isa(str name) -> bool",
};

}  // namespace ppg
