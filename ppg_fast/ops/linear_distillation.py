"""linear_distillation: a divergence from a teacher over chunks of the student's rows, and a policy loss beside it.

One chunk of the student's logits and one of the teacher's exist, the gradient is computed in the forward pass: with a
policy loss on top it is added before the gradient's GEMMs, which are those of the policy loss alone.
"""

from typing import Any

import torch
from torch import Tensor

from ppg_fast import backends
from ppg_fast.contract import Chunks, RowArguments, TeacherRows, Wanted
from ppg_fast.ops.divergences import Divergences, check_values, reference_divergences
from ppg_fast.ops.head import Head, gradients_like, loss_scale, row_outputs
from ppg_fast.ops.linear_policy_loss import row_kernel
from ppg_fast.ops.rows import counted, partition
from ppg_fast.ops.tracing import (
    as_operands,
    differentiable,
    first_order,
    from_operands,
    hand_out,
    needs_grad,
    no_gradients,
    times,
    traced,
)

Packed = tuple[list[Tensor | None], list[Tensor | None], list[float], list[int]]


def _pack(rows: RowArguments, teacher: TeacherRows) -> Packed:
    """Tensors of the teacher, tensors, numbers and choices of both."""
    taught, few, top_k = teacher.pack()
    tensors, numbers, choices = rows.pack()
    return taught, tensors, [*few, *numbers], [top_k, *choices]


def _unpack(taught: list[Tensor | None], tensors: list[Tensor | None], numbers: list[float], choices: list[int]) -> Any:
    tensors, numbers = from_operands(tensors, numbers)
    teacher = TeacherRows.unpack(taught, numbers[:2], choices[0])
    return RowArguments.unpack(tensors, numbers[2:], choices[1:]), teacher


def _losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taught: list[Tensor | None],
    tensors: list[Tensor | None],
    numbers: list[float],
    choices: list[int],
    wanted: list[bool],
    chunks: list[int],
    backend: str,
) -> tuple[Tensor, ...]:
    """-> weighted loss, log-prob, entropy, score norm, divergence (N,) float32, and d_hidden (N, D), d_weight (V, D),
    d_bias (V,) of the summed loss; (0,) where not wanted.

    ``wanted``: `Wanted`, whether there is a policy loss, and of which inputs the gradient is wanted.
    """
    rows, teacher = _unpack(taught, tensors, numbers, choices)
    flags, (policy, *gradients), kernels = Wanted(*wanted[:-4]), wanted[-4:], backends.load(backend)
    (labels, per_row, spec), (chunk_rows, bound, float32), trains = rows, Chunks.unpack(chunks), any(gradients)
    check_values(rows, teacher, weight.shape[0], flags.validate)
    entropy = policy and (flags.entropy or spec.entropy_coef != 0)
    loss, *outputs = row_outputs(hidden, labels.numel(), entropy, policy and flags.score_norms)
    divergence, active = torch.zeros_like(loss), labels >= 0
    has_teacher = active & (teacher.coefs != 0)
    full = has_teacher
    if policy and trains:
        full = full | (active & (per_row.live | spec.needs_every_row))
    counting = counted(labels, bound, flags.validate)
    parts = partition(full, active & ~full & policy, bound, counting)
    if parts.excess is not None:  # by the weights NaN reaches the loss and all gradients
        excess = parts.excess.expand(labels.numel())
        teacher = teacher._replace(coefs=teacher.coefs + excess)
        per_row = per_row._replace(weights=excess + (1.0 if per_row.weights is None else per_row.weights))
    head = Head(hidden, weight, bias, chunk_rows, tuple(gradients), kernels, float32)  # type: ignore[arg-type]
    if hidden.dtype == torch.float16 and trains:
        temperatures = spec.temperature if per_row.temperatures is None else per_row.temperatures
        head.scale = loss_scale(has_teacher, teacher.coefs, None, temperatures)
        teacher = teacher._replace(coefs=teacher.coefs * head.scale)
    divergences = Divergences(teacher, rows._replace(per_row=per_row), kernels, float32)
    kernel = row_kernel(kernels, RowArguments(labels, per_row, spec), loss, *outputs)

    order, taught_rows = _taught_first(parts.full, has_teacher) if counting else (parts.full, parts.full.numel())
    for chunk in head.chunks(order, parts.skip, order is parts.full):
        n = chunk.rows.numel()
        m, logits = min(n, max(taught_rows, 0)), chunk.logits[None, :n]
        taught_rows -= n
        gradient = None
        if m:
            mode = "" if not trains else "apart" if policy else "over"
            divergence[chunk.rows[:m]], gradient = divergences(chunk.rows[:m], logits[:, :m], mode)
        if policy:
            kernel(chunk.rows, logits, logits if trains else None)
            if gradient is not None:
                logits[:, :m] += gradient
        if trains:
            head.accumulate(chunk)
    head.sweep(parts.forward, lambda rows, logits: kernel(rows, logits, None), False)
    return loss + teacher.coefs * divergence, *outputs, divergence, *head.gradients()


def _taught_first(rows: Tensor, has_teacher: Tensor) -> tuple[Tensor, int]:
    """The numbers of ``rows``, those with a teacher first, and how many they are: the others need no logits of it."""
    first = has_teacher[rows]
    count = int(first.sum())
    return (rows if count in (0, rows.numel()) else torch.cat([rows[first], rows[~first]])), count


linear_distillation_op = torch.library.custom_op(
    "ppg_fast::linear_distillation",
    _losses_and_gradients,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor?[] taught, Tensor?[] tensors, float[] numbers, "
    "int[] choices, bool[] wanted, int[] chunks, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@linear_distillation_op.register_fake
def _(hidden, weight, bias, taught, tensors, numbers, choices, wanted, chunks, backend):
    flags, (policy, *gradients) = Wanted(*wanted[:-4]), wanted[-4:]
    small = row_outputs(hidden, hidden.shape[0], policy and flags.entropy, policy and flags.score_norms)
    return *small, torch.empty_like(small[0]), *gradients_like(hidden, weight, gradients)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, taught, tensors, _, _, wanted, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # else the outputs that are gradients get zeros of their size
    ctx.save_for_backward(*output[5:])
    ctx.gradients, ctx.no_gradients = wanted[-3:], (no_gradients(taught), no_gradients(tensors))


def _wanted(ctx: Any) -> list[Tensor | None]:
    return [d if wanted else None for d, wanted in zip(ctx.saved_tensors, ctx.gradients, strict=True)]


def _backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * 10
    hand_out(ctx)
    gradients = _wanted(ctx)
    if d_loss.numel():
        for rows in (d.view(1, -1, d.shape[-1]) for d in gradients if d is not None):
            # the public function hands out the sum alone, so every element is the same
            backends.load(ctx.backend).scale_rows(rows, d_loss[:1], rows)
    return *gradients, *(None,) * 7


def _backward_traced(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    gradients = [None if d is None or d_loss is None else times(d, d_loss[:1].sum()) for d in _wanted(ctx)]
    return *gradients, *ctx.no_gradients, None, None, None, None, None


linear_distillation_op.register_autograd(first_order(_backward_traced), setup_context=_setup)
EagerLinearDistillation = differentiable(_losses_and_gradients, _setup, _backward)


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: RowArguments,
    teacher: TeacherRows,
    policy: bool,
    wanted: Wanted,
    chunks: Chunks,
    backend: str,
) -> tuple[Tensor, ...]:
    """Weighted loss of each row, coefs times divergence and, with ``policy``, the policy loss of ``rows``, whose SUM is
    differentiable in hidden, weight and bias; log-prob, entropy, score norm, divergence. (N,) float32."""
    inputs = hidden, weight, bias
    gradients = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs]
    call = linear_distillation_op if traced(hidden, weight) else _losses_and_gradients
    if needs_grad(*inputs) and call is _losses_and_gradients:
        call = EagerLinearDistillation.apply
    wanted = wanted._replace(gradient=any(gradients), entropy=wanted.entropy or rows.spec.entropy_coef != 0)
    taught, tensors, numbers, choices = _pack(rows, teacher)
    if call is linear_distillation_op:
        tensors, numbers = as_operands(tensors, numbers)
    return call(*inputs, taught, tensors, numbers, choices, [*wanted, policy, *gradients], chunks.pack(), backend)[:5]


# ---- the divergence of each row, for any loss on top -----------------------------------------------------------------
def _divergences(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taught: list[Tensor | None],
    tensors: list[Tensor | None],
    numbers: list[float],
    choices: list[int],
    wanted: list[bool],
    chunks: list[int],
    backend: str,
) -> Tensor:
    """-> divergence (N,) float32. ``wanted``: `Wanted`."""
    flags = [*wanted, False, False, False, False]
    given = hidden, weight, bias, taught, tensors, numbers, choices, flags, chunks, backend
    return _losses_and_gradients(*given)[4]


linear_divergences_op = torch.library.custom_op("ppg_fast::linear_divergences", _divergences, mutates_args=())


@linear_divergences_op.register_fake
def _(hidden, weight, bias, taught, tensors, numbers, choices, wanted, chunks, backend):
    return torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)


def _setup_divergences(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, bias, taught, tensors, *ctx.others = inputs
    ctx.save_for_backward(hidden, weight, bias, *taught, *tensors)
    ctx.taught, ctx.no_gradients = len(taught), (no_gradients(taught), no_gradients(tensors))


def _backward_divergences(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    hidden, weight, bias, *lists = ctx.saved_tensors
    *taught, coefs = lists[: ctx.taught]
    numbers, choices, wanted, chunks, backend = ctx.others
    gradients = list(ctx.needs_input_grad[:3])
    taught = [*taught, torch.where(coefs != 0, upstream, 0.0)]
    call = linear_distillation_op if traced(hidden, upstream) else _losses_and_gradients
    flags = [*wanted, False, *gradients]
    found = call(hidden, weight, bias, taught, lists[ctx.taught :], numbers, choices, flags, chunks, backend)[5:]
    given = [d if want else None for d, want in zip(found, gradients, strict=True)]
    return *given, *ctx.no_gradients, None, None, None, None, None


linear_divergences_op.register_autograd(first_order(_backward_divergences), setup_context=_setup_divergences)
EagerLinearDivergences = differentiable(_divergences, _setup_divergences, _backward_divergences)


def linear_divergences(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: RowArguments,
    teacher: TeacherRows,
    wanted: Wanted,
    chunks: Chunks,
    backend: str,
) -> Tensor:
    """The divergence of each row, (N,) float32, differentiable in hidden, weight and bias; 0 where the coefficient is.

    The backward pass computes the logits of the rows that have a gradient, student's and teacher's, once more.
    """
    if backend == "reference":
        return reference_divergences(hidden, weight, bias, rows, teacher, wanted, chunks)
    taught, tensors, numbers, choices = _pack(rows, teacher)
    call = linear_divergences_op if traced(hidden, weight) else _divergences
    if needs_grad(hidden, weight, bias) and call is _divergences:
        call = EagerLinearDivergences.apply
    if call is linear_divergences_op:
        tensors, numbers = as_operands(tensors, numbers)
    return call(hidden, weight, bias, taught, tensors, numbers, choices, list(wanted), chunks.pack(), backend)
