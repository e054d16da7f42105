"""What the losses from logits and from hidden states share: arguments to canonical rows, rows to the reduced loss and
its metrics."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from ppg_fast import ops, reference
from ppg_fast.contract import PerRow
from ppg_fast.functional.metrics import when_read
from ppg_fast.functional.returns import partial_returns, require_values, turn_advantages
from ppg_fast.functional.tokens import (
    Tokens,
    advantages_per_token,
    check_tensor,
    likelihood_weights,
    ordered_sum,
    per_token,
    ratio_groups,
    readable,
    reduction_weights,
)
from ppg_fast.policy_classes import PolicyClass
from ppg_fast.rules import require_float32
from ppg_fast.spec import PolicyLossSpec, fail, require

DEFAULT_SPEC = PolicyLossSpec()
SCORE_NORMS, DIVERGENCES = "score_norms", "divergences"  # among the metrics


class PolicyLossOutput(NamedTuple):
    """What a policy loss returns.

    ``loss``: 0-d float32, or the labels' shape with reduction "none"; the only differentiable field.
    ``logprobs``, ``entropy``: float32 of the labels' shape, in nats, zero where masked.
    ``metrics``: 0-d float32 tensors by name; on a GPU computed when they are read, from the arguments of the call.
        Where they were asked for, "score_norms", and with a teacher "divergences", float32 of the labels' shape, which
        are there already.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    metrics: Mapping[str, Tensor]


class LossOptions(TypedDict, total=False):
    """The keyword arguments that every policy loss takes, see `policy_loss`."""

    loss_mask: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    cu_seqlens: Tensor | None
    spec: PolicyLossSpec | None
    reduction: str
    normalizer: float | Tensor | None
    nll_weights: Tensor | None
    nll_normalizer: float | Tensor | None
    skip_zero_advantages: bool
    score_norms: bool
    validate: bool


@dataclass(frozen=True)
class LossRows:
    """A policy-loss call as canonical rows."""

    tokens: Tokens  # its labels are -100 also in rows that skip_zero_advantages leaves out
    active: Tensor  # (N,) bool, before that
    per_row: PerRow
    spec: PolicyLossSpec  # with a number as temperature
    groups: tuple[Tensor, int] | None  # who shares a ratio
    sequences: tuple[Tensor, int] | None  # where spec.opsm_delta looks at them
    reduction: str
    score_norms: bool  # wanted

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
        nll_weights: Tensor | None = None,
        nll_normalizer: float | Tensor | None = None,
        skip_zero_advantages: bool = False,
        score_norms: bool = False,
        validate: bool = False,
    ) -> "LossRows":
        spec = checked_spec(spec, ref_logprobs)
        if rollout_logprobs is not None:
            check_tensor("rollout_logprobs", rollout_logprobs, labels.shape, labels.device)
            loss_mask = ops.mask_of_rollouts(spec, rollout_logprobs, labels, loss_mask)
        tokens = Tokens.of(labels, loss_mask, cu_seqlens, device, validate)
        active, weights = tokens.active, reduction_weights(tokens, reduction, normalizer, validate)
        spec, temperatures = spec_and_temperatures(spec, labels, active, validate)
        flat_advantages = per_token("advantages", advantages_per_token(advantages, labels), labels)
        assert flat_advantages is not None
        factor = ops.mask_factor(loss_mask, validate)
        flat_advantages = flat_advantages if factor is None else flat_advantages * factor
        old, ref = per_token("old_logprobs", old_logprobs, labels), per_token("ref_logprobs", ref_logprobs, labels)
        rollout = per_token("rollout_logprobs", rollout_logprobs, labels)
        nll = likelihood_weights(nll_weights, nll_normalizer, labels, active, validate)
        nll = None if nll is None else nll.reshape(-1)
        per_row = PerRow(flat_advantages, weights, old, ref, rollout, temperatures, nll)
        compared = old is not None or (rollout is not None and spec.loss_type == "vespo")
        groups = ratio_groups(tokens, turn_ids, spec) if compared else None
        compared = spec.opsm_delta and (old is not None or rollout is not None)
        sequences = (tokens.sequences(), tokens.sequence_count) if compared else None
        if skip_zero_advantages and not spec.needs_every_row:
            tokens = tokens.masked_where(_unread(per_row.live, active, sequences or groups))
        return LossRows(tokens, active, per_row, spec, groups, sequences, reduction, score_norms)

    def loss_from_logprobs(self, logprobs: Tensor, entropy: Tensor | None, lse: Tensor | None) -> Tensor:
        """Weighted loss of each row by plain PyTorch over differentiable log-probs: the second phase of a
        sequence-level loss. ``entropy``, ``lse``: of the rows, used where the spec has a term in them."""
        given = logprobs, entropy, self.tokens.labels >= 0, *self.per_row[:5], self.spec, self.groups
        lse = lse if self.spec.z_coef else None
        return reference.loss_from_logprobs(*given, self.per_row.nll_weights, lse, self.sequences)

    def output(
        self,
        loss: Tensor,
        logprobs: Tensor,
        entropy: Tensor,
        skip_zero_advantages: bool,
        norms: Tensor | None = None,
        divergences: Tensor | None = None,
    ) -> PolicyLossOutput:
        """Rows back in the caller's shape; score norms, if they are wanted, and divergences among the metrics."""
        logprobs, entropy = logprobs.detach(), entropy.detach()
        metrics = partial(self.metrics, logprobs, entropy, self.tokens.labels >= 0)
        rows = {"logprobs": logprobs, "entropy": entropy, "labels": self.tokens.labels, **self.per_row._asdict()}
        shares = self.groups is not None or self.sequences is not None
        if skip_zero_advantages and shares and not self.spec.needs_every_row:
            skipped = ~self.per_row.live  # read for the sake of their group's ratio, but skipped by contract
            logprobs, entropy = torch.where(skipped, 0.0, logprobs), torch.where(skipped, 0.0, entropy)
            norms = torch.where(skipped, 0.0, norms) if self.score_norms and norms is not None else None
        known = {SCORE_NORMS: norms.detach().view(self.tokens.shape)} if self.score_norms and norms is not None else {}
        if divergences is not None:
            known[DIVERGENCES] = divergences.detach().view(self.tokens.shape)
        loss = loss.view(self.tokens.shape) if self.reduction == "none" else ordered_sum(loss)
        lazy = when_read(metrics, rows, known)
        return PolicyLossOutput(loss, logprobs.view(self.tokens.shape), entropy.view(self.tokens.shape), lazy)

    def metrics(self, logprobs: Tensor, entropy: Tensor, read: Tensor) -> dict[str, Tensor]:
        """Means over the tokens that were read: entropy, approx_kl(old, new), clip_fraction (_low + _high), kl(ref),
        importance_weight, off_policy_dropped."""
        advantages, _, old, ref, rollout, _, _ = self.per_row
        columns, spec = {"entropy": entropy}, self.spec
        divisor = old
        if old is not None:
            columns["approx_kl"] = reference.k3(logprobs - old, spec.max_log_ratio)
            if self.groups is not None and spec.loss_type in ("gspo", "gspo_turn"):
                divisor = reference.shared_divisor(logprobs, old, read, advantages, self.groups, spec)
        clipped = reference.clipped(logprobs, divisor, rollout, advantages, spec)
        if clipped is not None:
            columns |= dict(zip(("clip_fraction_low", "clip_fraction_high"), clipped, strict=True))
        if self.sequences is not None:
            acted = old if rollout is None else rollout
            assert acted is not None
            kept = reference.kept_sequences(logprobs, acted, read, advantages, self.sequences, spec)
            columns["off_policy_dropped"] = 1 - kept
        if ref is not None:
            columns["kl"] = reference.k3(ref - logprobs, spec.max_log_ratio)
        if rollout is not None and spec.weighs_importance:
            weight = reference.importance_weight(logprobs if old is None else old, rollout, spec)
            columns["importance_weight"] = torch.as_tensor(weight).expand_as(entropy)
        stacked = torch.stack([values.float() for values in columns.values()])
        means = ordered_sum(torch.where(read, stacked, 0.0)) / read.sum().clamp(min=1)
        metrics = {"active_tokens": self.active.sum().float(), **dict(zip(columns, means.unbind(), strict=True))}
        if "clip_fraction_low" in metrics:
            metrics["clip_fraction"] = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
        return metrics


def needs_logprobs_first(spec: PolicyLossSpec | None, dtype: torch.dtype) -> bool:
    """Whether the gradient of the logits has to wait for the backward pass: a ratio or a mask over a sequence needs the
    log-probs of other rows, and a float16 gradient the loss scale, since what is rounded before it is lost."""
    return bool(getattr(spec, "shared", "")) or dtype == torch.float16


def checked_spec(spec: PolicyLossSpec | None, ref_logprobs: Tensor | None) -> PolicyLossSpec:
    """The spec, or the default one; ValueError where it does not go with the other arguments."""
    if spec is None:
        return DEFAULT_SPEC
    if not isinstance(spec, PolicyLossSpec):
        fail("spec must be a PolicyLossSpec", type(spec).__name__)
    if spec.kl_coef and ref_logprobs is None:
        fail("a KL term (kl_coef > 0) needs ref_logprobs", None)
    return with_plain_temperature(spec)


def with_plain_temperature(spec: PolicyLossSpec) -> PolicyLossSpec:
    """The spec with a 0-d temperature as a number where that costs no sync."""
    temperature = spec.temperature
    if isinstance(temperature, Tensor) and temperature.dim() == 0 and readable(temperature, False):
        return replace(spec, temperature=require_float32("temperature", temperature.detach(), 0.0, open_low=True))
    return spec


def spec_and_temperatures(
    spec: PolicyLossSpec, labels: Tensor, active: Tensor, validate: bool
) -> tuple[PolicyLossSpec, Tensor | None]:
    """The spec with a number as temperature, and (N,) float32 temperatures where it holds one per token; those of
    masked rows are free."""
    spec = with_plain_temperature(spec)
    if not isinstance(spec.temperature, Tensor):
        return spec, None
    temperatures = per_token("temperature", temperature_per_token(spec.temperature, labels), labels)
    if temperatures is not None and readable(labels, validate):
        ops.check_temperatures(temperatures, active)
    return replace(spec, temperature=1.0), temperatures


def temperature_per_token(temperature: Tensor, labels: Tensor) -> Tensor:
    """Temperatures of the labels' shape, from that or from one for all, 0-d, which is not copied."""
    return temperature.to(labels.device).expand(labels.shape) if temperature.dim() == 0 else temperature


def _unread(live: Tensor, active: Tensor, groups: tuple[Tensor, int] | None) -> Tensor:
    """Rows that skip_zero_advantages leaves out: of zero advantage, and for a shared ratio none of the group has
    another."""
    zero = ~(live & active)
    if groups is None:
        return zero
    return reference.group_sum((~zero).long(), *groups)[groups[0]] == 0


def check_turn_ids(turn_ids: Tensor, labels: Tensor) -> None:
    """ValueError unless there is an integer for every label."""
    check_tensor("turn_ids", turn_ids, labels.shape, labels.device)
    require(not turn_ids.is_floating_point(), "turn_ids must be integers", turn_ids.dtype)


def check_dialogues(rewards: Tensor, sequences: int) -> None:
    """ValueError unless there is a row of rewards for every sequence."""
    require(
        rewards.shape[0] == sequences,
        "rewards need one row per sequence of the labels",
        f"{rewards.shape[0]} rows for {sequences} sequences",
    )


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
    values: Tensor | None = None,
    gae_lambda: float | None = None,
) -> tuple[LossOptions, Tensor]:
    """Rewards (B, T) -> the options with context tokens masked, and the advantage of each token in the shape of
    ``labels``.

    Row b of the rewards belongs to sequence b: row b of a (B, L) batch, run b of ``cu_seqlens``.
    """
    require(isinstance(labels, Tensor), "labels must be a tensor", type(labels).__name__)
    check_turn_ids(turn_ids, labels)
    validate = options.get("validate", False)
    require_values(baseline, values, gae_lambda)
    ahead = {} if gae_lambda is None else {"values": values, "gae_lambda": gae_lambda}
    returns = partial_returns(rewards, policy_class, gamma, turn_counts, validate=validate, backend=backend, **ahead)
    advantages = turn_advantages(returns, group_ids, baseline, turn_counts, values=values)
    tokens = Tokens.of(labels, options.get("loss_mask"), options.get("cu_seqlens"), labels.device, validate)
    check_dialogues(advantages, tokens.sequence_count)
    counts = None if turn_counts is None else turn_counts.long()
    credit = ops.turn_credit_op(
        advantages, turn_ids.reshape(-1).long(), tokens.sequences(), counts, tokens.active, validate
    )
    factor = ops.mask_factor(options.get("loss_mask"), validate)
    credit = credit if factor is None else credit * factor
    mask = tokens.active.view(labels.shape) & (turn_ids >= 0)
    return {**options, "loss_mask": mask}, credit.view(labels.shape)
