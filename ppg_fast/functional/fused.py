"""The policy loss on a backend that fuses: what the caller holds goes to the kernels as it is, and metrics wait until
they are read."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppg_fast import backends, ops
from ppg_fast.contract import Columns, Reduction, Turns, Wanted
from ppg_fast.functional.loss import (
    SCORE_NORMS,
    LossOptions,
    LossRows,
    PolicyLossOutput,
    check_dialogues,
    check_turn_ids,
    checked_spec,
    credit_turns,
    needs_logprobs_first,
    temperature_per_token,
)
from ppg_fast.functional.metrics import when_read
from ppg_fast.functional.returns import checked_turns
from ppg_fast.functional.tokens import (
    advantages_per_token,
    check_tensor,
    check_tokens,
    checked_normalizer,
    likelihood_weights,
)
from ppg_fast.spec import IGNORE, PolicyLossSpec, fail, require

TURN_NAMES = ("rewards", "turn_ids", "policy_class", "gamma", "baseline", "group_ids", "turn_counts", "backend")
TurnArguments = tuple[Any, ...]  # of credit_turns, by these names


def fuses(backend: str, spec: PolicyLossSpec | None, dtype: torch.dtype) -> bool:
    """Whether this loss goes to the kernels at once."""
    return not needs_logprobs_first(spec, dtype) and backends.fuses(backend)


def fused_policy_loss(
    logits: Tensor,
    labels: Tensor,
    advantages: Tensor | None,
    turns: TurnArguments | None,
    inplace: bool,
    backend: str,
    options: LossOptions,
) -> PolicyLossOutput:
    """`policy_loss` of ``logits`` (B, L, V), or `partial_policy_loss` where ``turns`` are given in place of
    advantages."""
    validate, kind, device = options.get("validate", False), options.get("reduction", "token_mean"), logits.device
    spec = checked_spec(options.get("spec"), options.get("ref_logprobs"))
    cu_seqlens = options.get("cu_seqlens")
    sequences = check_tokens(labels, options.get("loss_mask"), cu_seqlens, device)
    if sequences == 0 and labels.numel():
        fail("cu_seqlens must rise from 0 to the number of tokens", labels.numel())
    normalizer = checked_normalizer(kind, options.get("normalizer"), device, validate)
    given, turn_ids = (None, None) if turns is None else _checked_turns(turns, labels, sequences)
    if (rollout := options.get("rollout_logprobs")) is not None:
        check_tensor("rollout_logprobs", rollout, labels.shape, labels.device)
        mask = ops.mask_of_rollouts(spec, rollout, labels, options.get("loss_mask"), turn_ids)
        options = {**options, "loss_mask": mask}
    columns = _columns(logits.shape[:2], labels, turn_ids, advantages, spec, options, validate)
    if (factor := ops.mask_factor(columns.loss_mask, validate)) is not None:
        if given is None:
            columns = columns._replace(advantages=columns.advantages * factor)  # type: ignore[operator]
        else:
            given = given._replace(rewards=given.rewards * factor)
    wants_norms = options.get("score_norms", False)
    reduction = Reduction(kind, normalizer, sequences, None if cu_seqlens is None else cu_seqlens.contiguous())
    loss, logprobs, entropy, norms = ops.policy_loss(
        logits,
        columns,
        given,
        reduction,
        spec if columns.temperatures is None else replace(spec, temperature=1.0),
        options.get("skip_zero_advantages", False),
        Wanted(entropy=True, score_norms=wants_norms, gradient=False, validate=validate),
        inplace,
        backend,
    )
    shape = labels.shape
    logprobs, entropy = _in_shape(logprobs, shape), _in_shape(entropy, shape)
    known = {SCORE_NORMS: _in_shape(norms, shape)} if wants_norms and norms is not None else {}

    def metrics() -> Mapping[str, Tensor]:
        with torch.no_grad():
            with_mask, per_token = (options, advantages) if turns is None else credit_turns(options, labels, *turns)
            assert per_token is not None
            rows = LossRows.of(
                labels, per_token, device, **{**with_mask, "reduction": "sum", "normalizer": None, "validate": False}
            )
            return rows.metrics(logprobs.reshape(-1), entropy.reshape(-1), rows.tokens.labels >= 0)

    own = {"labels": labels, "logprobs": logprobs, "entropy": entropy, "advantages": advantages}
    others = {"temperature": spec.temperature, **dict(zip(TURN_NAMES, turns or (), strict=False))}
    lazy = when_read(metrics, {**own, **others, **options}, known)
    return PolicyLossOutput(_in_shape(loss, shape) if kind == "none" else loss, logprobs, entropy, lazy)


def _in_shape(values: Tensor, shape: torch.Size) -> Tensor:
    return values if values.shape == shape else values.reshape(shape)


def _checked_turns(turns: TurnArguments, labels: Tensor, sequences: int) -> tuple[Turns, Tensor]:
    """What the kernels take of the turns, and turn ids that they can read."""
    rewards, turn_ids, policy_class, gamma, baseline, group_ids, turn_counts, _ = turns
    require(isinstance(labels, Tensor), "labels must be a tensor", type(labels).__name__)
    check_turn_ids(turn_ids, labels)
    given = checked_turns(rewards, policy_class, gamma, turn_counts, baseline, group_ids)
    check_dialogues(given.rewards, sequences)
    return given, turn_ids if turn_ids.dtype in (torch.int32, torch.int64) else turn_ids.long()


def _columns(
    shape: torch.Size,
    labels: Tensor,
    turn_ids: Tensor | None,
    advantages: Tensor | None,
    spec: PolicyLossSpec,
    options: LossOptions,
    validate: bool,
) -> Columns:
    """Every argument per token as (B, L) or, flat, (L,), without a copy where its strides and dtype allow it."""
    if labels.dim() == 1:
        shape = labels.shape

    def column(name: str, values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        check_tensor(name, values, labels.shape, labels.device)
        if values.requires_grad:
            values = values.detach()
        if values.dtype != torch.float32:
            values = values.float()
        return _in_shape(values, shape)

    mask = options.get("loss_mask")
    if turn_ids is None:
        advantages = advantages_per_token(advantages, labels)  # type: ignore[arg-type]
    return Columns(
        _in_shape(labels, shape),
        None if mask is None else _in_shape(mask, shape),
        None if turn_ids is None else _in_shape(turn_ids, shape),
        column("advantages", advantages),
        column("old_logprobs", options.get("old_logprobs")),
        column("ref_logprobs", options.get("ref_logprobs")),
        column("rollout_logprobs", options.get("rollout_logprobs")),
        column("temperature", temperature_per_token(spec.temperature, labels))
        if isinstance(spec.temperature, Tensor)
        else None,
        column("nll_weights", _likelihood_weights(labels, turn_ids, options, validate)),
    )


def _likelihood_weights(labels: Tensor, turn_ids: Tensor | None, options: LossOptions, validate: bool) -> Tensor | None:
    weights, normalizer = options.get("nll_weights"), options.get("nll_normalizer")
    if weights is None and normalizer is None:  # no work on the way of a call without them
        return None
    active, mask = labels != IGNORE, options.get("loss_mask")
    active = active if mask is None else active & (mask != 0)
    active = active if turn_ids is None else active & (turn_ids >= 0)
    return likelihood_weights(weights, normalizer, labels, active, validate)
