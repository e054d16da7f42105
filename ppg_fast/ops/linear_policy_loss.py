"""linear_policy_loss: the row kernel in a loop over chunks of compacted rows, GEMMs around it.

The [N, V] logits never exist: one chunk of them does, and its gradient takes its place. Only FULL rows go through all
three GEMMs (logits, d_hidden, d_weight; two where the head is frozen), FORWARD-ONLY rows through the first, SKIP rows
through none.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ppg_fast import backends, reference
from ppg_fast.contract import Chunks, PerRow, RowArguments, Wanted
from ppg_fast.ops.checks import check_labels
from ppg_fast.ops.head import Head, gradients_like, row_outputs
from ppg_fast.ops.policy_loss import reference_policy_loss
from ppg_fast.ops.rows import check_bound, counted, partition, pick
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


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tensors: list[Tensor | None],
    numbers: list[float],
    choices: list[int],
    wanted: list[bool],
    gradients: list[bool],
    chunks: list[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> weighted loss, log-prob, entropy, score norm (N,) float32, and d_hidden (N, D), d_weight (V, D), d_bias (V,)
    of the summed loss.

    Gradients in the dtype of hidden; (0,) where not wanted. ``tensors``, ``numbers`` and
    ``choices`` are `RowArguments`, ``wanted`` is `Wanted`, ``chunks`` `Chunks`; ``gradients``: of the three inputs.
    """
    rows, flags = RowArguments.unpack(*from_operands(tensors, numbers), choices), Wanted(*wanted)
    check_labels(rows.labels, weight.shape[0], flags.validate)
    unpacked = Chunks.unpack(chunks)
    return loss_and_gradients(hidden, weight, bias, rows, flags, gradients, unpacked, backends.load(backend))


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: RowArguments,
    wanted: Wanted,
    gradients: list[bool],
    chunks: Chunks,
    kernels: ModuleType,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same of arguments that are checked and unpacked; of ``kernels`` `policy_loss` and `scale_rows` are called."""
    labels, per_row, spec = rows
    loss, logprob, entropy, norms = row_outputs(
        hidden, labels.numel(), wanted.entropy or spec.entropy_coef != 0, wanted.score_norms
    )
    head = Head(hidden, weight, bias, chunks.rows, tuple(gradients), kernels, chunks.float32)  # type: ignore[arg-type]
    full = (labels >= 0) & (per_row.live | spec.needs_every_row) & any(gradients)
    counting = counted(labels, chunks.max_active, wanted.validate)
    parts = partition(full, (labels >= 0) & ~full, chunks.max_active, counting)
    if parts.excess is not None:  # by the weight NaN reaches the loss and all gradients
        weights = 1.0 if per_row.weights is None else per_row.weights
        per_row = per_row._replace(weights=parts.excess.expand(labels.numel()) + weights)

    kernel = row_kernel(kernels, RowArguments(labels, per_row, spec), loss, logprob, entropy, norms)
    trains = any(gradients)
    head.sweep(parts.full, lambda rows, logits: kernel(rows, logits, logits if trains else None), trains, parts.skip)
    head.sweep(parts.forward, lambda rows, logits: kernel(rows, logits, None), False)
    return loss, logprob, entropy, norms, *head.gradients()


def row_kernel(
    kernels: ModuleType, arguments: RowArguments, loss: Tensor, logprob: Tensor, entropy: Tensor, norms: Tensor
) -> Callable[[Tensor, Tensor, Tensor | None], None]:
    """The policy loss of a chunk: (row numbers, logits (1, n, V), dlogits) to the rows of the outputs."""
    labels, per_row, spec = arguments

    def kernel(rows: Tensor, logits: Tensor, dlogits: Tensor | None) -> None:
        norm = torch.empty_like(loss[: rows.numel()]) if norms.numel() else None
        picked = labels[rows], *pick(per_row, rows)
        out = kernels.policy_loss(logits, *picked, spec, entropy.numel() > 0, dlogits, norm)
        loss[rows], logprob[rows] = out[0], out[1]
        if entropy.numel():
            entropy[rows] = out[2]
        if norm is not None:
            norms[rows] = norm

    return kernel


linear_policy_loss_op = torch.library.custom_op("ppg_fast::linear_policy_loss", _loss_and_gradients, mutates_args=())


@linear_policy_loss_op.register_fake
def _(hidden, weight, bias, tensors, numbers, choices, wanted, gradients, chunks, backend):
    flags = Wanted(*wanted)
    small = row_outputs(hidden, hidden.shape[0], flags.entropy, flags.score_norms)
    return *small, *gradients_like(hidden, weight, gradients)


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, tensors, _, _, _, ctx.gradients, _, ctx.backend = inputs
    _, _, _, _, *saved = output
    ctx.set_materialize_grads(False)  # else the outputs that are gradients get zeros of their size
    ctx.save_for_backward(*saved)
    ctx.no_gradients = no_gradients(tensors)


def backward_loss(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Hand out the gradients that the forward pass found, times the upstream gradient."""
    if d_loss is None:
        return (None,) * 10
    hand_out(ctx)
    gradients = _wanted(ctx)
    if d_loss.numel():
        for rows in (d.view(1, -1, d.shape[-1]) for d in gradients if d is not None):
            # the public function hands out the sum alone, so every element is the same
            backends.load(ctx.backend).scale_rows(rows, d_loss[:1], rows)
    return *gradients, None, None, None, None, None, None, None


def _wanted(ctx: Any) -> list[Tensor | None]:
    return [d if wanted else None for d, wanted in zip(ctx.saved_tensors, ctx.gradients, strict=True)]


def _backward_traced(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if d_loss is None:
        gradients: list[Tensor | None] = [None] * 3
    else:
        gradients = [None if d is None else times(d, d_loss[:1].sum()) for d in _wanted(ctx)]
    return *gradients, ctx.no_gradients, None, None, None, None, None, None


linear_policy_loss_op.register_autograd(first_order(_backward_traced), setup_context=_setup_loss)
EagerLinearPolicyLoss = differentiable(_loss_and_gradients, _setup_loss, backward_loss)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: RowArguments,
    wanted: Wanted,
    chunks: Chunks,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted loss of each row, whose SUM is differentiable in hidden, weight and bias; log-prob, entropy, score norm.
    (N,) float32. ``wanted.gradient`` is found here."""
    if backend == "reference":
        return reference_linear(hidden, weight, bias, rows, wanted, chunks)[:4]  # type: ignore[return-value]
    inputs = hidden, weight, bias
    trains = needs_grad(*inputs)
    gradients = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs]
    call = linear_policy_loss_op if traced(hidden, weight) else _loss_and_gradients
    if trains and call is _loss_and_gradients:
        call = EagerLinearPolicyLoss.apply
    flags = list(wanted._replace(gradient=trains, entropy=wanted.entropy or rows.spec.entropy_coef != 0))
    tensors, numbers, choices = rows.pack()
    if call is linear_policy_loss_op:
        tensors, numbers = as_operands(tensors, numbers)
    given = tensors, numbers, choices, flags, gradients, chunks.pack(), backend
    return call(*inputs, *given)[:4]  # type: ignore[return-value]


def reference_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: RowArguments, wanted: Wanted, chunks: Chunks
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same by plain PyTorch, and last the log-sum-exp: chunks of active rows under activation checkpointing, so
    that one chunk of logits is alive at a time."""
    labels, per_row, spec = rows
    check_labels(labels, weight.shape[0], wanted.validate)
    # a copy each chunk casts back, so that autograd adds the chunks' gradients up in float32
    dtype = torch.float32 if chunks.float32 else hidden.dtype
    weight, bias = weight.float(), None if bias is None else bias.float()

    def chunk_loss(
        x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *columns: Tensor | None
    ) -> tuple[Tensor, ...]:
        head = weight.to(dtype), None if bias is None else bias.to(dtype)
        logits = torch.nn.functional.linear(x.to(dtype), *head).float()
        row = PerRow(*columns)  # type: ignore[arg-type]
        found = reference_policy_loss(logits, labels, row, spec, wanted.score_norms)
        if not wanted.lse:
            return found[:count]
        by = spec.temperature if row.temperatures is None else row.temperatures
        return *found[:count], reference.log_sum_exps(logits, labels, by, spec.logit_softcap)

    count = 3 + wanted.score_norms
    outputs = [torch.zeros(labels.numel(), device=hidden.device) for _ in range(count + wanted.lse)]
    active = (labels >= 0).nonzero().squeeze(1)
    check_bound(active.numel(), chunks.max_active)
    for part in active.split(chunks.rows):
        x = hidden.index_select(0, part)
        found = checkpoint(chunk_loss, x, weight, bias, labels[part], *pick(per_row, part), use_reentrant=False)
        outputs = [out.index_put((part,), values) for out, values in zip(outputs, found, strict=True)]
    none = hidden.new_empty(0, dtype=torch.float32)
    norms, lse = outputs[3] if wanted.score_norms else none, outputs[-1] if wanted.lse else none
    return outputs[0], outputs[1], outputs[2], norms, lse
