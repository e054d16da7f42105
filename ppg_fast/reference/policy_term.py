"""The scalar loss of each token, as written in the papers. Mirrors kernels/triton/policy_term.py and
csrc/policy_term.h."""

import torch
from torch import Tensor

from ppg_fast.spec import MAX_LOG_RATIO, PolicyLossSpec


def ratio_of(log_ratios: Tensor) -> Tensor:
    """exp(min(log ratio, MAX_LOG_RATIO)), whose derivative is 0 beyond; NaN stays NaN."""
    return torch.exp(log_ratios.clamp(max=MAX_LOG_RATIO))


def k3(delta: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = min(delta, MAX_LOG_RATIO), whose derivative is 0 beyond; NaN stays NaN."""
    delta = delta.clamp(max=MAX_LOG_RATIO)
    return torch.expm1(delta) - delta


def with_nan_gradient(loss: Tensor, logprobs: Tensor) -> Tensor:
    """``loss`` (N,) with the derivative NaN in ``logprobs`` (N,) where it is NaN, also where a clip has no slope."""
    is_nan = loss.isnan()
    return loss + torch.where(is_nan, logprobs, 0.0) * torch.zeros_like(loss).masked_fill(is_nan, torch.nan)


def importance_weight(old_logprobs: Tensor, rollout_logprobs: Tensor | None, spec: PolicyLossSpec) -> Tensor | float:
    """min(exp(old - rollout), importance_cap): corrects for a sampler that is not the trainer's policy. 1 where it is
    off, and where the rollout log-prob is NaN under nan_rollout "one"."""
    if rollout_logprobs is None or not spec.importance_cap:
        return 1.0
    weight = ratio_of(old_logprobs - rollout_logprobs).clamp(max=spec.importance_cap).detach()
    return weight.masked_fill(rollout_logprobs.isnan(), 1.0) if spec.nan_rollout == "one" else weight


def policy_term(
    logprobs: Tensor,  # (N,) l
    entropy: Tensor,  # (N,) H
    old_logprobs: Tensor,  # (N,) or, for one ratio a group, l_detached - log(group ratio)
    ref_logprobs: Tensor,  # (N,)
    importance: Tensor | float,  # (N,) or 1
    advantages: Tensor,  # (N,) A
    spec: PolicyLossSpec,
) -> Tensor:
    """Loss of each token, (N,), differentiable in ``logprobs`` and ``entropy``.

    With r = exp(min(l - old, 20)):  reinforce -A l;  ppo, gspo -min(r A, clip(r, 1-clip_low, 1+clip_high) A), at most
    -dual_clip A where A < 0; cispo -sg[min(r, 1+clip_high)] A l;  times the importance weight, plus kl_coef KL(l, ref),
    minus entropy_coef H.
    """
    ratio = ratio_of(logprobs - old_logprobs)
    if spec.loss_type == "reinforce":
        loss = -advantages * logprobs
    elif spec.loss_type == "cispo":
        loss = -ratio.clamp(max=1 + spec.clip_high).detach() * advantages * logprobs
    else:
        clipped = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
        loss = -torch.minimum(ratio * advantages, clipped * advantages)
        if spec.dual_clip:
            loss = torch.where(advantages < 0, torch.minimum(loss, -spec.dual_clip * advantages), loss)
    loss = importance * loss
    if spec.kl_coef:
        delta = ref_logprobs - logprobs
        kl = -delta if spec.kl_estimator == "k1" else delta**2 / 2 if spec.kl_estimator == "k2" else k3(delta)
        loss = loss + spec.kl_coef * kl
    return loss - spec.entropy_coef * entropy if spec.entropy_coef else loss
