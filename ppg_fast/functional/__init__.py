"""The public functions: any leading shape, defaults, reductions, errors. They choose the backend and call the ops."""

from ppg_fast.functional.distillation import DistillationOutput, linear_distillation_loss
from ppg_fast.functional.from_logprobs import policy_loss_from_logprobs
from ppg_fast.functional.kept import Kept
from ppg_fast.functional.linear import linear_partial_policy_loss, linear_policy_loss, linear_token_logprobs
from ppg_fast.functional.logits import PolicyLossOutput, partial_policy_loss, policy_loss, token_logprobs
from ppg_fast.functional.returns import partial_returns, turn_advantages
from ppg_fast.functional.soft_q import SoftQOutput, linear_soft_q_loss, soft_q_loss, soft_q_loss_from_logprobs
from ppg_fast.functional.teacher import Teacher, TopKTeacher
from ppg_fast.functional.turn_regression import (
    linear_turn_regression_loss,
    turn_regression_loss,
    turn_regression_loss_from_logprobs,
)
from ppg_fast.functional.vocab_shard import VocabShard

__all__ = [
    "DistillationOutput",
    "Kept",
    "PolicyLossOutput",
    "SoftQOutput",
    "Teacher",
    "TopKTeacher",
    "VocabShard",
    "linear_distillation_loss",
    "linear_partial_policy_loss",
    "linear_policy_loss",
    "linear_soft_q_loss",
    "linear_token_logprobs",
    "linear_turn_regression_loss",
    "partial_policy_loss",
    "partial_returns",
    "policy_loss",
    "policy_loss_from_logprobs",
    "soft_q_loss",
    "soft_q_loss_from_logprobs",
    "token_logprobs",
    "turn_advantages",
    "turn_regression_loss",
    "turn_regression_loss_from_logprobs",
]
