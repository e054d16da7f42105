"""The policy loss over logits, as written in the papers. Mirrors kernels/triton/policy_loss.py and
csrc/*/policy_loss.*"""

import torch
from torch import Tensor

from ppg_fast.reference.groups import group_sum
from ppg_fast.reference.logprobs import log_sum_exps, token_logprobs
from ppg_fast.reference.policy_term import importance_weight, policy_term, with_nan_gradient
from ppg_fast.spec import PolicyLossSpec


def grouped_old_logprobs(
    logprobs: Tensor, old_logprobs: Tensor, active: Tensor, groups: Tensor, group_count: int
) -> Tensor:
    """The "old" log-probs that give every token of a group the ratio exp(mean over its active tokens of (l - old)).

    Returned as sg[l] - mean, so that exp(l - returned) has that value and differentiates through each token's own l
    (GSPO). ``groups`` (N,) in [0, group_count). All (N,).
    """
    logprobs = logprobs.detach()
    log_ratio = torch.where(active, logprobs - old_logprobs, 0.0)
    count = group_sum(active.to(log_ratio.dtype), groups, group_count).clamp(min=1)
    return logprobs - (group_sum(log_ratio, groups, group_count) / count)[groups]


def loss_from_logprobs(
    logprobs: Tensor,  # (N,)
    entropy: Tensor | None,  # (N,), may be None without an entropy term
    active: Tensor,  # (N,) bool
    advantages: Tensor,  # (N,)
    weights: Tensor | None,  # (N,) of the reduction, or None for 1
    old_logprobs: Tensor | None,  # (N,), None: on-policy
    ref_logprobs: Tensor | None,  # (N,)
    rollout_logprobs: Tensor | None,  # (N,)
    spec: PolicyLossSpec,
    # (N,) int64 and their number: who shares a ratio in a sequence-level loss
    groups: tuple[Tensor, int] | None = None,
    nll_weights: Tensor | None = None,  # (N,) of -l, beside the reduction
    lse: Tensor | None = None,  # (N,) log-sum-exp of the logits, for spec.z_coef
) -> Tensor:
    """Weighted loss of each token, (N,), differentiable in ``logprobs`` and ``entropy``; zero where not active."""
    dtype, detached = logprobs.dtype, logprobs.detach()

    def known(values: Tensor | None, otherwise: Tensor) -> Tensor:
        # masked rows may hold anything, NaN included: replaced before use, so that none of it enters a gradient
        return otherwise if values is None else torch.where(active, values.to(dtype), 0.0)

    old, ref = known(old_logprobs, detached), known(ref_logprobs, detached)
    rollout = None if rollout_logprobs is None else known(rollout_logprobs, detached)
    importance = importance_weight(old, rollout, spec)
    if rollout is None or spec.nan_rollout == "one":
        rollout = old if rollout is None else torch.where(rollout.isnan(), old, rollout)
    divisor = old if groups is None else grouped_old_logprobs(logprobs, old, active, *groups)
    H, Z = logprobs if entropy is None else entropy, logprobs if lse is None else lse
    loss = policy_term(logprobs, H, Z, old, divisor, ref, rollout, importance, known(advantages, detached), spec)
    loss = loss if weights is None else loss * weights.to(dtype)
    loss = loss if nll_weights is None else loss - known(nll_weights, detached) * logprobs
    return with_nan_gradient(torch.where(active, loss, 0.0), logprobs)


def policy_loss(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,) int64, negative: masked
    advantages: Tensor,
    weights: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    spec: PolicyLossSpec,
    groups: tuple[Tensor, int] | None = None,
    nll_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss, log-probability and entropy of each token, (N,) each, differentiable in ``logits``; masked tokens
    give zeros."""
    temperature = spec.temperature.flatten() if isinstance(spec.temperature, Tensor) else spec.temperature
    logprobs, entropy = token_logprobs(logits, labels, temperature, spec.logit_softcap)
    lse = log_sum_exps(logits, labels, temperature, spec.logit_softcap) if spec.z_coef else None
    rows = advantages, weights, old_logprobs, ref_logprobs, rollout_logprobs
    loss = loss_from_logprobs(logprobs, entropy, labels >= 0, *rows, spec, groups, nll_weights, lse)
    return loss, logprobs, entropy
