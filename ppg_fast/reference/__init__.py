"""The specification, executed: plain differentiable PyTorch in any floating dtype. In float64 it is the truth of every
test."""

from ppg_fast.reference.distillation import distillation, top_k_divergence
from ppg_fast.reference.groups import consecutive_ids, group_sum
from ppg_fast.reference.logprobs import log_softmax, log_sum_exps, score_norms, token_logprobs
from ppg_fast.reference.partial_returns import lagged_returns, masked_returns, partial_returns, weighted_returns
from ppg_fast.reference.policy_loss import kept_sequences, loss_from_logprobs, policy_loss, shared_divisor
from ppg_fast.reference.policy_term import clipped, importance_weight, k3, policy_term, ratio_of
from ppg_fast.reference.turn_regression import Residuals, turn_residuals
from ppg_fast.reference.turns import first_of_turns, of_tokens, sum_of_turns, turn_mask

__all__ = [
    "Residuals",
    "clipped",
    "consecutive_ids",
    "distillation",
    "first_of_turns",
    "group_sum",
    "importance_weight",
    "k3",
    "kept_sequences",
    "lagged_returns",
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
    "shared_divisor",
    "sum_of_turns",
    "token_logprobs",
    "top_k_divergence",
    "turn_mask",
    "turn_residuals",
    "weighted_returns",
]
