"""The policy loss over logits, as written in the papers. Mirrors kernels/triton/policy_loss.py and
csrc/*/policy_loss.*"""

import math

import torch
from torch import Tensor

from ppg_fast.losses import CLIPPED_BEFORE
from ppg_fast.reference.groups import group_sum
from ppg_fast.reference.logprobs import log_sum_exps, token_logprobs
from ppg_fast.reference.policy_term import clipped_before, importance_weight, policy_term, with_nan_gradient
from ppg_fast.spec import PolicyLossSpec

LEAST_LOG_RATIO = math.log(1e-8)  # of vespo's sums, as in TRL


def _mean_of_groups(values: Tensor, active: Tensor, groups: Tensor, count: int, kind: str = "mean") -> Tensor:
    """Mean, or sum, of each row's group over its active rows, (N,)."""
    values = torch.where(active, values, 0.0)
    total = group_sum(values, groups, count)
    if kind == "mean":
        total = total / group_sum(active.to(values.dtype), groups, count).clamp(min=1)
    return total[groups]


def shared_divisor(
    logprobs: Tensor,  # (N,)
    old_logprobs: Tensor,  # (N,)
    active: Tensor,  # (N,) bool
    advantages: Tensor,  # (N,)
    groups: tuple[Tensor, int],  # (N,) in [0, count), and the count
    spec: PolicyLossSpec,
) -> Tensor:
    """The log-probs that, under the ratio, give every token of a group the same: exp(mean or sum of (l - old)), or of
    the clipped log ratios of gmpo. (N,)

    Returned as sg[l] - mean, so that exp(l - returned) has that value and differentiates through each token's own l
    (GSPO, section 4.3), in gmpo where its log ratio is not clipped.
    """
    fixed = logprobs.detach()
    log_ratios = fixed - old_logprobs
    if spec.loss_type not in CLIPPED_BEFORE:
        return fixed - _mean_of_groups(log_ratios, active, *groups, kind=spec.ratio_reduction)
    below, above = clipped_before(log_ratios, advantages, spec)
    kept = log_ratios.masked_fill(above, spec.clip_high).masked_fill(below, -spec.clip_low)
    moving = torch.where(below | above, logprobs - fixed, 0.0)  # whose slope the ratio does not have
    return fixed - _mean_of_groups(kept, active, *groups) + moving


def vespo_weight(
    logprobs: Tensor,  # (N,)
    old_logprobs: Tensor,  # (N,)
    importance: Tensor | float,  # (N,) or 1: of the sampler
    active: Tensor,  # (N,) bool
    advantages: Tensor,  # (N,)
    groups: tuple[Tensor, int],  # (N,) in [0, count), and the count
    spec: PolicyLossSpec,
) -> Tensor:
    """phi of each token's sequence by the sign of the token's advantage, (N,), no gradient; log w is kept within
    [LEAST_LOG_RATIO, max_log_ratio], as are its parts."""
    most = spec.max_log_ratio
    log_ratios = (logprobs.detach() - old_logprobs).clamp(-most, most)
    if isinstance(importance, Tensor):
        log_ratios = log_ratios + importance.log().clamp(LEAST_LOG_RATIO, most)
    log_w = _mean_of_groups(log_ratios, active, *groups, kind="sum").clamp(LEAST_LOG_RATIO, most)
    gains = advantages >= 0  # not where() of two numbers, which rounds them to float32
    k = torch.full_like(log_w, spec.k_negative).masked_fill(gains, spec.k_positive)
    scale = torch.full_like(log_w, spec.lambda_negative).masked_fill(gains, spec.lambda_positive)
    return torch.exp(scale + k * log_w - scale * log_w.exp())


def kept_sequences(
    logprobs: Tensor,  # (N,)
    acted: Tensor,  # (N,) of the policy that acted: the rollout log-probs, or else the old ones
    active: Tensor,  # (N,) bool
    advantages: Tensor,  # (N,)
    sequences: tuple[Tensor, int],  # (N,) in [0, count), and the count
    spec: PolicyLossSpec,
) -> Tensor:
    """0 for tokens with A < 0 in a sequence whose mean of (acted - l) exceeds opsm_delta, NaN where that mean is NaN,
    else 1; (N,), no gradient."""
    lost = acted - logprobs.detach()
    if spec.nan_rollout == "one":
        lost = lost.masked_fill(acted.isnan(), 0.0)
    mean = _mean_of_groups(lost, active, *sequences)
    kept = torch.where(mean.isnan(), mean, (mean <= spec.opsm_delta).to(mean.dtype))
    return torch.where(advantages < 0, kept, 1.0)


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
    sequences: tuple[Tensor, int] | None = None,  # (N,) int64 and their number, for spec.opsm_delta
) -> Tensor:
    """Weighted loss of each token, (N,), differentiable in ``logprobs`` and ``entropy``; zero where not active."""
    dtype, detached = logprobs.dtype, logprobs.detach()

    def known(values: Tensor | None, otherwise: Tensor) -> Tensor:
        # masked rows may hold anything, NaN included: replaced before use, so that none of it enters a gradient
        return otherwise if values is None else torch.where(active, values.to(dtype), 0.0)

    old, ref = known(old_logprobs, detached), known(ref_logprobs, detached)
    rollout = None if rollout_logprobs is None else known(rollout_logprobs, detached)
    A = known(advantages, detached)
    importance = importance_weight(old, rollout, spec)
    if groups is not None and spec.loss_type == "vespo":
        importance = vespo_weight(logprobs, old, importance, active, A, groups, spec)
    if sequences is not None:
        acted = old if rollout is None else rollout
        importance = importance * kept_sequences(logprobs, acted, active, A, sequences, spec)
    if rollout is None or spec.nan_rollout == "one":
        rollout = old if rollout is None else torch.where(rollout.isnan(), old, rollout)
    divisor = old
    if groups is not None and spec.loss_type != "vespo":
        divisor = shared_divisor(logprobs, old, active, A, groups, spec)
    H, Z = logprobs if entropy is None else entropy, logprobs if lse is None else lse
    loss = policy_term(logprobs, H, Z, old, divisor, ref, rollout, importance, A, spec)
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
