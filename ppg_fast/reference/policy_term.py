"""The scalar loss of each token, as written in the papers. Mirrors kernels/triton/policy_term.py and
csrc/policy_term.h."""

import torch
from torch import Tensor

from ppg_fast.losses import CLIPPED_BEFORE, GATED, WITH_ROLLOUT
from ppg_fast.spec import PolicyLossSpec

LEAST = 1e-8  # added to 1 - p in dppo_kl, as verl does


def ratio_of(log_ratios: Tensor, most: float) -> Tensor:
    """exp(min(log ratio, most)), whose derivative is 0 beyond; NaN stays NaN."""
    return torch.exp(log_ratios.clamp(max=most))


def k3(delta: Tensor, most: float) -> Tensor:
    """exp(d) - d - 1 with d = min(delta, most), whose derivative is 0 beyond; NaN stays NaN."""
    delta = delta.clamp(max=most)
    return torch.expm1(delta) - delta


def with_nan_gradient(loss: Tensor, logprobs: Tensor) -> Tensor:
    """``loss`` (N,) with the derivative NaN in ``logprobs`` (N,) where it is NaN, also where a clip has no slope."""
    is_nan = loss.isnan()
    return loss + torch.where(is_nan, logprobs, 0.0) * torch.zeros_like(loss).masked_fill(is_nan, torch.nan)


def importance_weight(old_logprobs: Tensor, rollout_logprobs: Tensor | None, spec: PolicyLossSpec) -> Tensor | float:
    """exp(old - rollout), kept within [importance_floor, importance_cap], or 0 outside of them in mode "mask": corrects
    for a sampler that is not the trainer's policy. 1 where it is off, and where the rollout log-prob is NaN under
    nan_rollout "one"."""
    if rollout_logprobs is None or not spec.weighs_importance:
        return 1.0
    weight = ratio_of(old_logprobs - rollout_logprobs, spec.max_log_ratio).detach()
    most = spec.importance_cap or torch.inf
    if spec.importance_mode == "mask":
        weight = weight.masked_fill((weight < spec.importance_floor) | (weight > most), 0.0)
    else:
        weight = weight.clamp(spec.importance_floor, most)
    return weight.masked_fill(rollout_logprobs.isnan(), 1.0) if spec.nan_rollout == "one" else weight


def outside(
    logprobs: Tensor, old_logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, spec: PolicyLossSpec
) -> tuple[Tensor, Tensor]:
    """Tokens below and above the bounds of a loss with a gate, (N,) bool each; no gradient. NaN is inside: it is for
    `gate` to keep it."""
    l, old, p, low, high = logprobs.detach(), old_logprobs, logprobs.detach().exp(), spec.clip_low, spec.clip_high
    if spec.loss_type == "ipo":
        moved = p - rollout_logprobs.exp()
        return moved < -low, moved > high
    if spec.loss_type == "icepop":
        ratio = ratio_of(l - rollout_logprobs, spec.max_log_ratio)
        return ratio < 1 - low, ratio > 1 + high
    moved = p - old.exp()
    if spec.loss_type == "dppo_tv":
        return (advantages <= 0) & (moved < -low), (advantages > 0) & (moved > high)
    # 1 - p by expm1, which keeps its digits where p is near 1
    q_old, q = -torch.expm1(old), -torch.expm1(l)
    kl = old.exp() * (old - l) + q_old * torch.log((q_old + LEAST) / (q + LEAST))
    return (advantages <= 0) & (moved < 0) & (kl > low), (advantages > 0) & (moved > 0) & (kl > high)


def clipped_before(log_ratios: Tensor, advantages: Tensor, spec: PolicyLossSpec) -> tuple[Tensor, Tensor]:
    """Tokens whose log ratio gmpo raises to -clip_low and lowers to clip_high before the mean, (N,) bool each."""
    return (advantages < 0) & (log_ratios < -spec.clip_low), (advantages > 0) & (log_ratios > spec.clip_high)


def clipped(
    logprobs: Tensor,
    divisor: Tensor | None,
    rollout_logprobs: Tensor | None,
    advantages: Tensor,
    spec: PolicyLossSpec,
) -> tuple[Tensor, Tensor] | None:
    """Tokens whose weight a bound has changed, below and above, (N,) bool each; None where the loss has no bounds or no
    log-probs to compare with. ``divisor``: under the ratio, as in `policy_term`, of gmpo the old log-probs."""
    kind = spec.loss_type
    against = rollout_logprobs if kind in WITH_ROLLOUT and rollout_logprobs is not None else divisor
    if against is None or kind in ("reinforce", "sapo", "vespo"):
        return None
    old = against if divisor is None else divisor
    if kind in GATED:
        return outside(logprobs, old, against, advantages, spec)
    if kind in CLIPPED_BEFORE:
        return clipped_before(logprobs - old, advantages, spec)
    ratio = ratio_of(logprobs - old, spec.max_log_ratio)
    low, high = ratio < 1 - spec.clip_low, ratio > 1 + spec.clip_high
    if kind == "cispo":
        return low, high
    if kind == "topr":
        return low & (advantages <= 0), high & (advantages <= 0)
    return low & (advantages < 0), high & (advantages > 0)


def gate(
    logprobs: Tensor, old_logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, spec: PolicyLossSpec
) -> Tensor:
    """1 inside of the bounds, 0 outside, NaN where what is compared is NaN, (N,); no gradient."""
    below, above = outside(logprobs, old_logprobs, rollout_logprobs, advantages, spec)
    compared = logprobs.detach() - (rollout_logprobs if spec.loss_type in WITH_ROLLOUT else old_logprobs)
    inside = (~(below | above)).to(compared.dtype)
    return torch.where(compared.isnan(), compared, inside)


def surrogate(
    logprobs: Tensor, old_logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, spec: PolicyLossSpec
) -> Tensor:
    """The value of each token by ``spec.loss_type``, (N,): the table `ppg_fast.losses.LOSSES`."""
    kind, A = spec.loss_type, advantages
    if kind in ("reinforce", "vespo"):  # vespo's weight comes with the importance weight
        return -A * logprobs
    log_ratio = logprobs - old_logprobs
    ratio = ratio_of(log_ratio, spec.max_log_ratio)
    if kind in CLIPPED_BEFORE:
        return -ratio * A
    clipped = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    if kind == "cispo":
        return -clipped.detach() * A * logprobs
    if kind == "topr":
        return -torch.where(A > 0, 1.0 + 0.0 * clipped, clipped).detach() * A * logprobs
    if kind == "sapo":
        tau = torch.full_like(A, spec.tau_negative).masked_fill(A > 0, spec.tau_positive)
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * A
    if kind in WITH_ROLLOUT:
        return -gate(logprobs, old_logprobs, rollout_logprobs, A, spec) * ratio * A
    if kind in GATED:
        weight = ratio.clamp(max=spec.ratio_cap or torch.inf).detach()
        return -gate(logprobs, old_logprobs, rollout_logprobs, A, spec) * weight * A * logprobs
    loss = -torch.minimum(ratio * A, clipped * A)
    return torch.where(A < 0, torch.minimum(loss, -spec.dual_clip * A), loss) if spec.dual_clip else loss


def kl_term(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, spec: PolicyLossSpec) -> Tensor:
    """KL(policy, reference) of each token by ``spec.kl_estimator``, (N,): the enum `KLEstimator`; within kl_cap."""
    delta = ref_logprobs - logprobs
    kind, most = spec.kl_estimator, spec.max_log_ratio
    if kind == "k1":
        kl = -delta
    elif kind == "abs":
        kl = delta.abs()
    elif kind == "k2":
        kl = delta**2 / 2
    else:
        kl = k3(delta, most)
    if kind == "k3_unbiased":
        kl = ratio_of(logprobs - old_logprobs, most) * kl
    if spec.kl_cap:
        kl = kl.clamp(-spec.kl_cap, spec.kl_cap)
    return kl.detach() + (delta**2 / 2 - (delta**2 / 2).detach()) if kind == "k3_plus" else kl


def policy_term(
    logprobs: Tensor,  # (N,) l
    entropy: Tensor,  # (N,) H
    lse: Tensor,  # (N,) log-sum-exp of the logits
    old_logprobs: Tensor,  # (N,)
    divisor: Tensor,  # (N,) log-probs under the ratio: the old ones, or l_detached - log(ratio of the group)
    ref_logprobs: Tensor,  # (N,)
    rollout_logprobs: Tensor,  # (N,) b: of the sampler, else the old ones
    importance: Tensor | float,  # (N,) or 1
    advantages: Tensor,  # (N,) A
    spec: PolicyLossSpec,
) -> Tensor:
    """Loss of each token, (N,), differentiable in ``logprobs``, ``entropy`` and ``lse``.

    importance * surrogate + log_ratio_coef (l - old)^2 + kl_coef KL(l, ref) - entropy_coef H + z_coef lse^2
    """
    loss = importance * surrogate(logprobs, divisor, rollout_logprobs, advantages, spec)
    if spec.log_ratio_coef:
        loss = loss + spec.log_ratio_coef * (logprobs - old_logprobs) ** 2
    if spec.kl_coef:
        loss = loss + spec.kl_coef * kl_term(logprobs, divisor, ref_logprobs, spec)
    if spec.entropy_coef:
        loss = loss - spec.entropy_coef * entropy
    return loss + spec.z_coef * lse**2 if spec.z_coef else loss
