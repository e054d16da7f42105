"""policy_loss: from what the caller holds to the reduced loss and dlogits in one sweep, a custom op with autograd."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppg_fast import backends, reference
from ppg_fast.contract import FUSED_CHOICES, Columns, FusedArguments, PerRow, Reduction, Turns, Wanted
from ppg_fast.ops.allocation import fresh
from ppg_fast.ops.checks import (
    check_cu_seqlens,
    check_labels,
    check_mask,
    check_rewards,
    check_temperatures,
    check_turn_ids,
)
from ppg_fast.ops.sequences import sequence_ids
from ppg_fast.ops.tracing import (
    as_operands,
    first_order,
    from_operands,
    hand_out,
    needs_grad,
    no_gradients,
    times,
    traced,
)
from ppg_fast.spec import IGNORE, REDUCTIONS, PolicyLossSpec

Outputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def compute(logits: Tensor, dlogits: Tensor | None, arguments: FusedArguments, wanted: Wanted, backend: str) -> Outputs:
    """-> loss () (that of a token for "none"), log-prob, entropy and score norm in the shape of the labels, float32;
    writes ``dlogits``, which may be the logits. The entropy is (0,) and the score norm None unless wanted."""
    mask = arguments.columns.loss_mask
    if mask is not None and (wanted.validate or mask.is_cpu):
        check_mask(mask)
    empty = arguments.columns.labels.numel() == 0
    if wanted.validate or (logits.is_cpu and (empty or backend != "cpu")):
        check_values(logits, arguments)
    norm = None
    if wanted.score_norms:
        norm = torch.empty(arguments.columns.labels.shape, dtype=torch.float32, device=logits.device)
    if empty:
        none = logits.new_empty(arguments.columns.labels.shape, dtype=torch.float32)
        return (none if arguments.reduction.kind == "none" else none.sum()), none.clone(), none.clone(), norm
    out = backends.load(backend).fused_policy_loss(logits, *arguments, wanted.entropy, dlogits, norm)
    if out is None:  # a value breaks a rule, and nothing was computed
        check_values(logits, arguments)
        raise RuntimeError("the kernels refused values in which the checks find no fault: please report it")
    return *out, norm


def check_values(logits: Tensor, arguments: FusedArguments) -> None:
    """ValueError (IndexError for a label) that names the first value to break a rule."""
    columns, turns, reduction = arguments[:3]
    labels, rows = columns.labels.reshape(-1), logits.shape[0] * logits.shape[1]
    if columns.loss_mask is not None:
        labels = torch.where(columns.loss_mask.reshape(-1) != 0, labels, IGNORE)
    if reduction.cu_seqlens is not None:
        check_cu_seqlens(reduction.cu_seqlens, rows)
    if turns is not None:
        assert columns.turn_ids is not None
        check_rewards(turns.rewards, turns.turn_counts, turns.segment_ids)
        sequences = sequence_ids(reduction.cu_seqlens, reduction.sequences, labels)
        turn_ids, T = columns.turn_ids.reshape(-1), turns.rewards.shape[1]
        check_turn_ids(turn_ids, T, sequences, turns.turn_counts, labels != IGNORE)
        labels = torch.where(turn_ids < 0, IGNORE, labels)
    check_labels(labels, logits.shape[-1], True)
    if columns.temperatures is not None:
        check_temperatures(columns.temperatures.reshape(-1), labels != IGNORE)


# ---- for tracers -----------------------------------------------------------------------------------------------------
@torch.library.custom_op(
    "ppg_fast::policy_loss",
    mutates_args=(),
    schema="(Tensor logits, Tensor?[] tensors, float[] numbers, int[] choices, bool[] wanted, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def policy_loss_op(
    logits: Tensor,
    tensors: list[Tensor | None],
    numbers: list[float],
    choices: list[int],
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, log-prob, entropy, score norm as in `compute`, and dlogits (B, L, V); the last three (0,) unless
    wanted."""
    flags = Wanted(*wanted)
    dlogits = fresh(logits, logits.shape) if flags.gradient else None
    arguments = FusedArguments.unpack(*from_operands(tensors, numbers), choices)
    *out, norm = compute(logits, dlogits, arguments, flags, backend)
    norm = logits.new_empty(0, dtype=torch.float32) if norm is None else norm
    return *out, norm, logits.new_empty(0) if dlogits is None else dlogits  # type: ignore[return-value]


@policy_loss_op.register_fake
def _(logits, tensors, numbers, choices, wanted, backend):
    flags, rows, none = Wanted(*wanted), tensors[0].shape, (0,)
    loss = rows if REDUCTIONS[choices[FUSED_CHOICES.index("reduction")]] == "none" else ()
    shapes = loss, rows, rows if flags.entropy or flags.score_norms else none, rows if flags.score_norms else none
    small = [logits.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return *small, logits.new_empty(logits.shape if flags.gradient else none)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, tensors, _, _, _, _ = inputs
    _, _, _, _, dlogits = output
    ctx.set_materialize_grads(False)  # else dlogits gets zeros of its size
    ctx.save_for_backward(dlogits)
    ctx.no_gradients = no_gradients(tensors)


def _backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    (dlogits,) = ctx.saved_tensors
    gradient = None
    if d_loss is not None:
        scale = d_loss if d_loss.dim() == 0 else d_loss.view(dlogits.shape[0], dlogits.shape[1], 1)
        gradient = times(dlogits, scale)
    return gradient, ctx.no_gradients, None, None, None, None


policy_loss_op.register_autograd(first_order(_backward), setup_context=_setup)


# ---- in eager mode ---------------------------------------------------------------------------------------------------
class EagerPolicyLoss(torch.autograd.Function):
    """Outside of a tracer the one gradient buffer is scaled by the upstream gradient in place, so that it is never held
    twice."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, arguments: FusedArguments, wanted: Wanted, inplace: bool, backend: str
    ) -> Outputs:
        dlogits = logits.detach() if inplace else fresh(logits, logits.shape)
        out = compute(logits, dlogits, arguments, wanted, backend)
        if inplace:  # whoever else saved the logits for a backward pass is told that they are gone
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(dlogits)
        ctx.backend = backend
        _, logprob, entropy, norm = out
        ctx.mark_non_differentiable(*((logprob, entropy) if norm is None else (logprob, entropy, norm)))
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (dlogits,) = ctx.saved_tensors
        hand_out(ctx)
        backends.load(ctx.backend).scale_rows(dlogits, d_loss.reshape(-1).contiguous(), dlogits)
        return dlogits, None, None, None, None


def policy_loss(
    logits: Tensor,
    columns: Columns,
    turns: Turns | None,
    reduction: Reduction,
    spec: PolicyLossSpec,
    skip_zero_advantages: bool,
    wanted: Wanted,
    inplace: bool,
    backend: str,
) -> Outputs:
    """Reduced loss, differentiable in the logits, log-prob, entropy and, where wanted, score norm, float32 in the shape
    of the labels; contract: `backends`. ``wanted.gradient`` is found here."""
    wanted = wanted._replace(gradient=True) if needs_grad(logits) else wanted
    arguments = FusedArguments(columns, turns, reduction, spec, skip_zero_advantages)
    if traced(logits):
        tensors, numbers, choices = arguments.pack()
        tensors, numbers = as_operands(tensors, numbers)
        flags = list(wanted._replace(entropy=wanted.entropy or spec.entropy_coef != 0))
        loss, logprob, entropy, norm, _ = policy_loss_op(logits, tensors, numbers, choices, flags, backend)
        return loss, logprob.detach(), entropy.detach(), norm.detach()
    if wanted.gradient:
        return EagerPolicyLoss.apply(logits, arguments, wanted, inplace, backend)  # type: ignore[return-value]
    return compute(logits, None, arguments, wanted, backend)


def reference_policy_loss(
    logits: Tensor, labels: Tensor, per_row: PerRow, spec: PolicyLossSpec, score_norms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted loss, log-prob, entropy and score norm ((0,) unless wanted) of float32 logits (N, V) by plain
    PyTorch."""
    temperature = spec.temperature if per_row.temperatures is None else per_row.temperatures
    scaled = replace(spec, temperature=temperature)
    out = reference.policy_loss(logits, labels, *per_row[:5], scaled, nll_weights=per_row.nll_weights)
    norms = (
        reference.score_norms(logits, labels, temperature, spec.logit_softcap) if score_norms else logits.new_empty(0)
    )
    return *out, norms
