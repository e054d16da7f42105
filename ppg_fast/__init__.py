"""ppg_fast: fused kernels for partial policy gradients (arXiv:2603.06138) on long multi-turn dialogues.

`import ppg_fast as ppg` gives the loss backend: policy classes, windowed returns, and the policy loss from logits or
from hidden states.
"""

from ppg_fast import openmp  # noqa: F401  # first: it sets how threads wait, which torch reads when it is imported
from ppg_fast.functional import (
    DistillationOutput,
    Kept,
    PolicyLossOutput,
    SoftQOutput,
    Teacher,
    TopKTeacher,
    VocabShard,
    linear_distillation_loss,
    linear_partial_policy_loss,
    linear_policy_loss,
    linear_soft_q_loss,
    linear_token_logprobs,
    linear_turn_regression_loss,
    partial_policy_loss,
    partial_returns,
    policy_loss,
    policy_loss_from_logprobs,
    soft_q_loss,
    soft_q_loss_from_logprobs,
    token_logprobs,
    turn_advantages,
    turn_regression_loss,
    turn_regression_loss_from_logprobs,
)
from ppg_fast.policy_classes import (
    FullPlanning,
    Greedy,
    LagWeights,
    Lookahead,
    PolicyClass,
    RewardMask,
    RewardWeights,
    Segment,
    policy_class,
)
from ppg_fast.spec import PolicyLossSpec, SoftQSpec

__version__ = "0.1.0"

__all__ = [
    "DistillationOutput",
    "FullPlanning",
    "Greedy",
    "Kept",
    "LagWeights",
    "Lookahead",
    "PolicyClass",
    "PolicyLossOutput",
    "PolicyLossSpec",
    "RewardMask",
    "RewardWeights",
    "Segment",
    "SoftQOutput",
    "SoftQSpec",
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
    "policy_class",
    "policy_loss",
    "policy_loss_from_logprobs",
    "soft_q_loss",
    "soft_q_loss_from_logprobs",
    "token_logprobs",
    "turn_advantages",
    "turn_regression_loss",
    "turn_regression_loss_from_logprobs",
]
