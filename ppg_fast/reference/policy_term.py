"""The scalar loss of each token, as written in the papers. Mirrors kernels/triton/policy_term.py and
csrc/policy_term.h."""

import torch
from torch import Tensor

from ppg_fast.spec import PolicyLossSpec

# exp of more overflows float32 once multiplied, and the branch a minimum did not take would then give 0 * inf to the
# backward pass
MAX_LOG_RATIO = 80.0


def with_nan_gradient(loss: Tensor, logprobs: Tensor) -> Tensor:
    """``loss`` (N,) with the derivative NaN in ``logprobs`` (N,) where it is NaN, also where a clip has no slope."""
    is_nan = loss.isnan()
    return loss + torch.where(is_nan, logprobs, 0.0) * torch.zeros_like(loss).masked_fill(is_nan, torch.nan)


def importance_weight(old_logprobs: Tensor, rollout_logprobs: Tensor | None, spec: PolicyLossSpec) -> Tensor | float:
    """min(exp(old - rollout), importance_cap): corrects for a sampler that is not the trainer's policy. 1 where it is
    off."""
    if rollout_logprobs is None or not spec.importance_cap:
        return 1.0
    return torch.exp(old_logprobs - rollout_logprobs).clamp(max=spec.importance_cap).detach()


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

    With r = exp(l - old):  reinforce -A l;  ppo, gspo -min(r A, clip(r, 1-clip_low, 1+clip_high) A), at most -dual_clip
    A where A < 0; cispo -sg[min(r, 1+clip_high)] A l;  times the importance weight, plus kl_coef KL(l, ref), minus
    entropy_coef H.
    """
    ratio = torch.exp((logprobs - old_logprobs).clamp(max=MAX_LOG_RATIO))
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
        kl = {"k1": -delta, "k2": delta**2 / 2, "k3": torch.expm1(delta) - delta}[spec.kl_estimator]
        loss = loss + spec.kl_coef * kl
    return loss - spec.entropy_coef * entropy if spec.entropy_coef else loss
