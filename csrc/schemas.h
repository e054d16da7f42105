// What Python sees of each launcher. Included by bindings.cpp alone. Lists are in the order of args.h. `outputs` of
// fused_policy_loss is written although no schema can mark it: only ppg_fast/native.py calls it, below any tracer.
#pragma once

namespace ppg {

constexpr const char* kSchemas[] = {
    "logprobs_fwd(Tensor logits, Tensor labels, Tensor? temperatures, float temperature, float logit_softcap, "
    "Tensor(a!) logprob, Tensor(b!)? entropy, Tensor(c!) lse, Tensor(d!)? score_norm=None) -> ()",
    "logprobs_bwd(Tensor logits, Tensor labels, Tensor lse, Tensor? entropy, Tensor?[] upstream, "
    "Tensor? temperatures, float temperature, float logit_softcap, Tensor(a!) dlogits) -> ()",
    "policy_loss(Tensor logits, Tensor labels, Tensor?[] rows, float[] numbers, int[] choices, Tensor(a!) loss, "
    "Tensor(b!) logprob, Tensor(c!)? entropy, Tensor(d!)? dlogits, Tensor(e!)? score_norm) -> ()",
    "fused_policy_loss(Tensor logits, Tensor?[] tensors, float[] numbers, int[] choices, Tensor? counts, int counted, "
    "Tensor?[] outputs) -> bool",
    "distillation(Tensor logits, Tensor teacher_logits, Tensor labels, Tensor? weights, Tensor? temperatures, "
    "float[] numbers, Tensor(a!) divergence, Tensor(b!)? dlogits) -> ()",
    "scale_rows(Tensor x, Tensor scale, Tensor(a!) out) -> ()",
    "partial_returns(Tensor rewards, Tensor? segment_ids, Tensor? turn_counts, int lookahead, int segment_length, "
    "float gamma, Tensor(a!) returns) -> bool",
    "want_huge_pages(Tensor(a!) memory) -> ()",
    "build() -> str",
    "use_isa(str name) -> bool",
};

}  // namespace ppg
