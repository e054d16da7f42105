"""The specification, executed: plain differentiable PyTorch in any floating dtype. In float64 it is the truth of every
test."""

from ppg_fast.reference.distillation import distillation, top_k_divergence
from ppg_fast.reference.groups import consecutive_ids, group_sum
from ppg_fast.reference.logprobs import log_softmax, log_sum_exps, score_norms, token_logprobs
from ppg_fast.reference.partial_returns import masked_returns, partial_returns
from ppg_fast.reference.policy_loss import grouped_old_logprobs, loss_from_logprobs, policy_loss
from ppg_fast.reference.policy_term import clipped, importance_weight, k3, policy_term, ratio_of
from ppg_fast.reference.turns import of_tokens, turn_mask

__all__ = [
    "clipped",
    "consecutive_ids",
    "distillation",
    "group_sum",
    "grouped_old_logprobs",
    "importance_weight",
    "k3",
    "log_softmax",
    "log_sum_exps",
    "loss_from_logprobs",
    "masked_returns",
    "of_tokens",
    "partial_returns",
    "policy_loss",
    "policy_term",
    "ratio_of",
    "score_norms",
    "token_logprobs",
    "top_k_divergence",
    "turn_mask",
]
