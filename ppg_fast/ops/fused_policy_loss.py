"""fused_policy_loss: from what the caller holds to the reduced loss and dlogits, as a custom op with autograd, on
backends that fuse."""

from typing import Any

import torch
from torch import Tensor

from ppg_fast import backends
from ppg_fast.ops.allocation import fresh
from ppg_fast.ops.checks import check_cu_seqlens, check_labels, check_rewards, check_temperatures, check_turn_ids
from ppg_fast.ops.policy_loss import (
    NUMBERS,
    OUTPUTS,
    SPEC_SCHEMA,
    EagerPolicyLoss,
    backward_traced,
    given_norm,
    setup_traced,
    wanted_norm,
)
from ppg_fast.ops.sequences import sequence_ids
from ppg_fast.spec import IGNORE, Columns, PolicyLossSpec, Reduction, Turns

SCHEMA = (
    "Tensor labels, Tensor? loss_mask, Tensor? turn_ids, Tensor? advantages, Tensor? old_logprobs, Tensor? "
    "ref_logprobs, "
    "Tensor? rollout_logprobs, Tensor? temperatures, Tensor? rewards, Tensor? turn_counts, Tensor? segment_ids, "
    "Tensor? reward_mask, "
    "Tensor? group_ids, int lookahead, int segment_length, float gamma, str baseline, float std_eps, str reduction, "
    "float? normalizer, "
    f"Tensor? normalizer_at, int sequences, Tensor? cu_seqlens, bool skip_zero_advantages, {SPEC_SCHEMA}"
)
NO_TURNS = Turns(None, None, None, None, None, 1, 0, 1.0, "none")


def _fused_policy_loss(
    logits: Tensor, dlogits: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns, turns = Columns(*arguments[:8]), Turns(*arguments[8:18])
    kind, number, normalizer, sequences, cu_seqlens, skip_zero_advantages = arguments[18:24]
    *numbers, entropy, score_norms, _, validate, backend = arguments[24:]
    reduction = Reduction(kind, number if normalizer is None else normalizer, sequences, cu_seqlens)
    given_turns = None if turns.rewards is None else turns
    if logits.is_cpu or validate:
        _check_values(logits, columns, given_turns, reduction)
    norm = wanted_norm(logits, score_norms, *logits.shape[:2])
    out = backends.load(backend).fused_policy_loss(
        logits, columns, given_turns, reduction, PolicyLossSpec(*numbers), skip_zero_advantages, entropy, dlogits, norm
    )  # fmt: skip
    return *out, given_norm(logits, norm)


def _check_values(logits: Tensor, columns: Columns, turns: Turns | None, reduction: Reduction) -> None:
    """The rules of the values, before anything is computed."""
    labels, rows = columns.labels.reshape(-1), logits.shape[0] * logits.shape[1]
    if columns.loss_mask is not None:
        labels = torch.where(columns.loss_mask.reshape(-1) != 0, labels, IGNORE)
    if reduction.cu_seqlens is not None:
        check_cu_seqlens(reduction.cu_seqlens, rows)
    if turns is not None:
        check_rewards(turns.rewards, turns.turn_counts, turns.segment_ids)
        sequences = sequence_ids(reduction.cu_seqlens, reduction.sequences, labels)
        turn_ids, T = columns.turn_ids.reshape(-1), turns.rewards.shape[1]
        check_turn_ids(turn_ids, T, sequences, turns.turn_counts, labels != IGNORE)
        labels = torch.where(turn_ids < 0, IGNORE, labels)
    check_labels(labels, logits.shape[-1], True)
    if columns.temperatures is not None:
        check_temperatures(columns.temperatures.reshape(-1), labels != IGNORE)


@torch.library.custom_op(
    "ppg_fast::fused_policy_loss", mutates_args=(), schema=f"(Tensor logits, {SCHEMA}) -> {OUTPUTS}"
)
def fused_policy_loss_op(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """-> loss () ((B, L) for "none"), log-prob, entropy and score norm (B, L) float32, dlogits (B, L, V); (0,) unless
    wanted."""
    dlogits = fresh(logits.shape, logits.dtype, logits.device) if arguments[-3] else None
    return *_fused_policy_loss(logits, dlogits, *arguments), logits.new_empty(0) if dlogits is None else dlogits


@torch.library.custom_op(
    "ppg_fast::fused_policy_loss_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def fused_policy_loss_inplace_op(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with dlogits written over the logits."""
    return _fused_policy_loss(logits, logits, *arguments)


def _results_like(logits: Tensor, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, none, norm = logits.shape[:2], (0,), arguments[-4]
    wants_entropy = arguments[-5] or norm or arguments[24 + NUMBERS.index("entropy_coef")] != 0
    shapes = rows if arguments[18] == "none" else (), rows, rows if wants_entropy else none, rows if norm else none
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in shapes)  # type: ignore[return-value]


@fused_policy_loss_op.register_fake
def _(logits, *arguments):
    return *_results_like(logits, arguments), logits.new_empty(logits.shape if arguments[-3] else (0,))


@fused_policy_loss_inplace_op.register_fake
def _(logits, *arguments):
    return _results_like(logits, arguments)


fused_policy_loss_op.register_autograd(backward_traced, setup_context=setup_traced)


def fused_policy_loss(
    logits: Tensor, columns: Columns, turns: Turns | None, reduction: Reduction, spec: PolicyLossSpec,
    skip_zero_advantages: bool,
    entropy: bool, inplace: bool, validate: bool, backend: str, score_norms: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Reduced loss (differentiable in the logits), log-prob, entropy and, where wanted, score norm (B, L) float32;
    contract: `backends`."""
    with_grad = torch.is_grad_enabled() and logits.requires_grad
    normalizer = reduction.normalizer
    given = (None, normalizer) if isinstance(normalizer, Tensor) else (normalizer, None)
    numbers = (getattr(spec, name) for name in NUMBERS)
    arguments = (
        *columns, *(turns or NO_TURNS), reduction.kind, *given, reduction.sequences, reduction.cu_seqlens,
        skip_zero_advantages, *numbers,
        entropy, score_norms, with_grad, validate, backend,
    )  # fmt: skip
    if with_grad and not torch.compiler.is_compiling():
        return EagerPolicyLoss.apply(logits, inplace, (fused_policy_loss_op, fused_policy_loss_inplace_op), *arguments)
    return fused_policy_loss_op(logits, *arguments)[:4]
