"""What the losses from logits and from hidden states share: arguments to canonical rows, rows to the reduced loss and its metrics."""

from dataclasses import dataclass, replace
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from ppg_fast import reference
from ppg_fast.functional.returns import partial_returns, turn_advantages
from ppg_fast.functional.tokens import Tokens, ordered_sum, per_token, ratio_groups, reduction_weights, token_advantages
from ppg_fast.ops import PerRow
from ppg_fast.spec import PolicyClass, PolicyLossSpec, require


class PolicyLossOutput(NamedTuple):
    """What a policy loss returns.

    ``loss``: 0-d float32, or the labels' shape with reduction "none"; the only differentiable field.
    ``logprobs``, ``entropy``: float32 of the labels' shape, in nats, zero where masked.
    ``metrics``: 0-d float32 tensors by name.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


class LossOptions(TypedDict, total=False):
    """The keyword arguments that every policy loss takes, see `policy_loss`."""

    loss_mask: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    cu_seqlens: Tensor | None
    spec: PolicyLossSpec
    reduction: str
    normalizer: float | Tensor | None
    skip_zero_advantages: bool
    validate: bool


@dataclass(frozen=True)
class LossRows:
    """A policy-loss call as canonical rows."""

    tokens: Tokens  # its labels are -100 also in rows that skip_zero_advantages leaves out
    active: Tensor  # (N,) bool, before that
    per_row: PerRow
    spec: PolicyLossSpec  # with a number as temperature
    groups: tuple[Tensor, int] | None  # who shares a ratio
    reduction: str

    @staticmethod
    def of(
        labels: Tensor,
        advantages: Tensor,
        device: torch.device,
        *,
        loss_mask: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        turn_ids: Tensor | None = None,
        spec: PolicyLossSpec | None = None,
        reduction: str = "token_mean",
        normalizer: float | Tensor | None = None,
        skip_zero_advantages: bool = False,
        validate: bool = False,
    ) -> "LossRows":
        spec = PolicyLossSpec() if spec is None else spec
        require(isinstance(spec, PolicyLossSpec), "spec must be a PolicyLossSpec", type(spec).__name__)
        require(spec.kl_coef == 0 or ref_logprobs is not None, "a KL term (kl_coef > 0) needs ref_logprobs", None)
        tokens = Tokens.of(labels, loss_mask, cu_seqlens, device, validate)
        active, weights = tokens.active, reduction_weights(tokens, reduction, normalizer)
        spec, temperatures = spec_and_temperatures(spec, labels)
        flat_advantages = token_advantages(advantages, labels)
        old, ref = per_token("old_logprobs", old_logprobs, labels), per_token("ref_logprobs", ref_logprobs, labels)
        per_row = PerRow(flat_advantages, weights, old, ref, per_token("rollout_logprobs", rollout_logprobs, labels), temperatures)
        groups = ratio_groups(tokens, turn_ids, spec) if old_logprobs is not None else None
        if skip_zero_advantages and not spec.needs_every_row:
            tokens = tokens.masked_where(_unread(flat_advantages, active, groups))
        return LossRows(tokens, active, per_row, spec, groups, reduction)

    def loss_from_logprobs(self, logprobs: Tensor, entropy: Tensor | None) -> Tensor:
        """Weighted loss of each row by plain PyTorch over differentiable log-probs: the second phase of a sequence-level loss."""
        return reference.loss_from_logprobs(logprobs, entropy, self.tokens.labels >= 0, *self.per_row[:5], self.spec, self.groups)

    def output(self, loss: Tensor, logprobs: Tensor, entropy: Tensor, skip_zero_advantages: bool) -> PolicyLossOutput:
        """Rows back in the caller's shape."""
        logprobs, entropy = logprobs.detach(), entropy.detach()
        read = self.tokens.labels >= 0
        if skip_zero_advantages and self.groups is not None and not self.spec.needs_every_row:
            read = read & (self.per_row.advantages != 0)  # read for the sake of their group's ratio, but skipped by contract
            logprobs, entropy = torch.where(read, logprobs, 0.0), torch.where(read, entropy, 0.0)
        metrics = self.metrics(logprobs, entropy, read)
        loss = loss.view(self.tokens.shape) if self.reduction == "none" else ordered_sum(loss)
        return PolicyLossOutput(loss, logprobs.view(self.tokens.shape), entropy.view(self.tokens.shape), metrics)

    def metrics(self, logprobs: Tensor, entropy: Tensor, read: Tensor) -> dict[str, Tensor]:
        """Means over the tokens that were read: entropy, approx_kl(old, new) and clip_fraction, kl to the reference, importance_weight."""
        advantages, _, old, ref, rollout, _ = self.per_row
        count = read.sum().clamp(min=1)

        def mean(values: Tensor) -> Tensor:
            return ordered_sum(torch.where(read, values.float(), 0.0)) / count

        metrics = {"active_tokens": self.active.sum().float(), "entropy": mean(entropy)}
        if old is not None:
            log_ratio = logprobs - old
            metrics["approx_kl"] = mean(torch.expm1(log_ratio) - log_ratio)
            if self.groups is not None:
                log_ratio = logprobs - reference.grouped_old_logprobs(logprobs, old, read, *self.groups)
            ratio, spec = log_ratio.exp(), self.spec
            above = (ratio > 1 + spec.clip_high) & ((advantages > 0) | torch.tensor(spec.loss_type == "cispo", device=ratio.device))
            below = (ratio < 1 - spec.clip_low) & (advantages < 0)
            if spec.loss_type != "reinforce":
                metrics["clip_fraction"] = mean(above if spec.loss_type == "cispo" else above | below)
        if ref is not None:
            delta = ref - logprobs
            metrics["kl"] = mean(torch.expm1(delta) - delta)
        if rollout is not None and self.spec.importance_cap:
            weight = reference.importance_weight(logprobs if old is None else old, rollout, self.spec)
            metrics["importance_weight"] = mean(torch.as_tensor(weight))
        return metrics


def spec_and_temperatures(spec: PolicyLossSpec, labels: Tensor) -> tuple[PolicyLossSpec, Tensor | None]:
    """The spec with a number as temperature, and (N,) float32 temperatures where it holds one per token."""
    if not isinstance(spec.temperature, Tensor):
        return spec, None
    return replace(spec, temperature=1.0), per_token("temperature", spec.temperature, labels)


def _unread(advantages: Tensor, active: Tensor, groups: tuple[Tensor, int] | None) -> Tensor:
    """Rows that skip_zero_advantages leaves out: of zero advantage, and for a shared ratio none of the group has another."""
    zero = (advantages == 0) | ~active
    if groups is None:
        return zero
    return reference.group_sum((~zero).long(), *groups)[groups[0]] == 0


def credit_turns(
    options: LossOptions,
    labels: Tensor,
    rewards: Tensor,
    turn_ids: Tensor,
    policy_class: PolicyClass | str,
    gamma: float,
    baseline: str,
    group_ids: Tensor | None,
    turn_counts: Tensor | None,
    backend: str | None,
) -> tuple[LossOptions, Tensor]:
    """Rewards (B, T) -> the options with context tokens masked, and the advantage of each token in the shape of ``labels``.

    Row b of the rewards belongs to sequence b: row b of a (B, L) batch, run b of ``cu_seqlens``.
    """
    require(
        isinstance(turn_ids, Tensor) and not turn_ids.is_floating_point(),
        "turn_ids must be an integer tensor",
        getattr(turn_ids, "dtype", None),
    )
    require(turn_ids.shape == labels.shape, f"turn_ids must have the shape of labels, {tuple(labels.shape)}", tuple(turn_ids.shape))
    validate = options.get("validate", False)
    returns = partial_returns(rewards, policy_class, gamma, turn_counts, validate=validate, backend=backend)
    advantages = turn_advantages(returns, group_ids, baseline, turn_counts)
    tokens = Tokens.of(labels, None, options.get("cu_seqlens"), labels.device, validate)
    B, T = advantages.shape
    require(
        tokens.sequence_count == B, "rewards need one row per sequence of the labels", f"{B} rows for {tokens.sequence_count} sequences"
    )
    turns, sequences = turn_ids.reshape(-1).long(), tokens.sequences()
    if (labels.is_cpu or validate) and not torch.compiler.is_compiling():
        _check_turn_ids(turns, sequences, turn_counts, T)
    padded = torch.nn.functional.pad(advantages, (0, 1))  # column T: no turn, no advantage
    rows = padded[sequences, torch.where(turns < 0, T, turns.clamp(max=T))]
    in_turn, mask = turn_ids >= 0, options.get("loss_mask")
    mask = in_turn if mask is None else in_turn & (mask != 0)
    return {**options, "loss_mask": mask}, rows.view(labels.shape)


def _check_turn_ids(turns: Tensor, sequences: Tensor, turn_counts: Tensor | None, T: int) -> None:
    limit = torch.full_like(turns, T) if turn_counts is None else turn_counts.long()[sequences]
    bad = (turns < -1) | (turns >= limit)
    if bad.any():
        row = int(bad.nonzero()[0])
        rule = "turn_ids must be -1 (context) or in [0, turns of the dialogue)"
        raise ValueError(f"{rule}, got {int(turns[row])} at row {row} of a dialogue with {int(limit[row])} turns")
