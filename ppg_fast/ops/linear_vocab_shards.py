"""From hidden states that all processes hold and the rows of the head that each of them holds: log-probs, four GEMMs
and one all-gather in all; the policy loss, three GEMMs and one all-gather a chunk. Each then sums d_hidden.

The gradient of a policy loss follows from a chunk's log-probs, entropies and log-sum-exps: as soon as they are known of
the whole vocabulary, it takes the place of the logits, which are not computed again.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, distributed

from ppg_fast import backends, reference
from ppg_fast.contract import Chunks, PerRow, RowArguments, Wanted
from ppg_fast.ops.head import Head, loss_scale
from ppg_fast.ops.linear_policy_loss import backward_loss, loss_and_gradients
from ppg_fast.ops.rows import counted, partition, pick
from ppg_fast.ops.tracing import differentiable, needs_grad
from ppg_fast.ops.vocab_shards import Part, Places, ShardRows, combined, meet, of_shard, write_gradient
from ppg_fast.spec import PolicyLossSpec


# ---- log-probs -----------------------------------------------------------------------------------------------------
def _logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperatures: Tensor | None,
    scale: list[float],
    wanted: Wanted,
    chunks: Chunks,
    places: Places,
    backend: str,
) -> tuple[Tensor, ...]:
    kernels, local, active = backends.load(backend), places.local(labels), labels >= 0
    mine = hidden.new_zeros(3 + wanted.score_norms, len(labels), dtype=torch.float32)
    own = hidden.new_zeros(len(labels), 2, dtype=torch.float32)

    def kernel(at: Tensor, logits: Tensor) -> None:
        (temps,), of_rows = pick((temperatures,), at), (local[0][at], local[1][at])
        mine[:, at], own[at] = of_shard(kernels, logits, of_rows, temps, scale, wanted.score_norms)

    head = Head(hidden, weight, bias, chunks.rows, (False, False, False), kernels, chunks.float32)
    counting = counted(labels, chunks.max_active, wanted.validate)
    parts = partition(active, torch.zeros_like(active), chunks.max_active, counting)
    head.sweep(parts.full, kernel, False, parts.skip)
    return combined(mine if parts.excess is None else mine + parts.excess, own, labels, places)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, temperatures, ctx.scale, ctx.wanted, ctx.chunks, ctx.places, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(hidden, weight, bias, labels, temperatures, *output[1:4])


def _backward(ctx: Any, d_l: Tensor, d_H: Tensor, d_lse: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, temperatures, entropy, lse, own = ctx.saved_tensors
    kernels, needs, scale, chunks = backends.load(ctx.backend), ctx.needs_input_grad[:3], ctx.scale, ctx.chunks
    head = Head(hidden, weight, bias, chunks.rows, tuple(needs), kernels, chunks.float32)  # type: ignore[arg-type]
    local, foreign = ctx.places.local(labels)
    rows = ShardRows(local, foreign, own, lse, entropy, temperatures)
    d_lse = d_lse if ctx.wanted.lse else None
    d = d_l, d_H, d_lse
    live = (labels >= 0) & torch.stack([g != 0 for g in d if g is not None]).any(0)
    parts = partition(live, torch.zeros_like(live), chunks.max_active, counted(labels, chunks.max_active, False))
    if head.gradient_dtype == torch.float16:
        size = d_l if d_lse is None else d_l.abs() + d_lse.abs()
        head.scale = loss_scale(live, size, d_H, scale[0] if temperatures is None else temperatures)
        d = tuple(None if g is None else g * head.scale for g in d)

    def kernel(at: Tensor, logits: Tensor) -> None:
        of_rows = ShardRows(*pick(rows, at))  # type: ignore[arg-type,call-arg]
        write_gradient(kernels, logits, of_rows, pick(d, at), scale, logits)  # type: ignore[arg-type]

    head.sweep(parts.full, kernel, True, parts.skip)
    gradients = head.gradients()
    if needs[0]:
        distributed.all_reduce(gradients[0], group=ctx.places.group)
    return *(g if want else None for g, want in zip(gradients, needs, strict=True)), *(None,) * 7


LinearShardLogprobs = differentiable(_logprobs, _setup, _backward)


def linear_shard_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    logit_softcap: float,
    wanted: Wanted,
    chunks: Chunks,
    backend: str,
    part: Part,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob, entropy, score norm ((0,) unless wanted) and log-sum-exp of each row, (N,) float32, all but the norm
    differentiable in the hidden states (N, D) that all processes hold and in the weight (V, D) and bias of this shard;
    the same on all processes. d_hidden is the sum over them. ``labels`` (N,): of the whole vocabulary."""
    places = meet(part, len(weight), labels, wanted.validate)
    scale = [temperature, logit_softcap]
    given = hidden, weight, bias, labels, temperatures, scale, wanted, chunks, places, backend
    logprob, entropy, lse, _, norms = LinearShardLogprobs.apply(*given)
    return logprob, entropy, norms, lse


# ---- the policy loss -----------------------------------------------------------------------------------------------
class _ShardKernels:
    """What `loss_and_gradients` asks of a backend, over the columns of this process: one all-gather a call."""

    def __init__(self, kernels: ModuleType, places: Places) -> None:
        self.kernels, self.places, self.scale_rows = kernels, places, kernels.scale_rows

    def policy_loss(self, logits: Tensor, labels: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As the contract in `backends` has it, with ``labels`` of the whole vocabulary."""
        *columns, spec, _, dlogits, norm = given
        row, scale, local = PerRow(*columns), (spec.temperature, spec.logit_softcap), self.places.local(labels)
        said, own = of_shard(self.kernels, logits, local, row.temperatures, scale, norm is not None)
        found = combined(said, own, labels, self.places)
        loss, d = _terms(found.logprob, found.entropy, found.lse, labels >= 0, row, spec)
        if dlogits is not None:
            rows = ShardRows(*local, found.own, found.lse, found.entropy, row.temperatures)
            write_gradient(self.kernels, logits, rows, d, scale, dlogits)
        if norm is not None:
            norm.copy_(found.norms)
        return loss, found.logprob, found.entropy


def _terms(
    logprob: Tensor, entropy: Tensor, lse: Tensor, read: Tensor, row: PerRow, spec: PolicyLossSpec
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """-> weighted loss of each row, (N,), and its gradient by log-prob, entropy and, with z_coef, log-sum-exp."""
    with torch.enable_grad():
        l, H, Z = leaves = [values.detach().requires_grad_() for values in (logprob, entropy, lse)]
        terms = (
            H if spec.entropy_coef else None,
            read,
            *row[:5],
            spec,
            None,
            row.nll_weights,
            Z if spec.z_coef else None,
        )
        loss = reference.loss_from_logprobs(l, *terms)
        d = torch.autograd.grad(loss.sum(), leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), (d[0], d[1], d[2] if spec.z_coef else None)


def _loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: RowArguments,
    wanted: Wanted,
    chunks: Chunks,
    places: Places,
    gradients: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    kernels: Any = _ShardKernels(backends.load(backend), places)
    found = loss_and_gradients(hidden, weight, bias, rows, wanted, gradients, chunks, kernels)
    if gradients[0]:
        distributed.all_reduce(found[4], group=places.group)
    return found


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, ctx.gradients, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:])


def _loss_backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return backward_loss(ctx, d_loss)[:9]


LinearShardPolicyLoss = differentiable(_loss, _loss_setup, _loss_backward)


def linear_shard_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: RowArguments,
    wanted: Wanted,
    chunks: Chunks,
    backend: str,
    part: Part,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted loss of each row, whose SUM is differentiable in hidden, weight and bias as above; log-prob, entropy,
    score norm. (N,) float32, the same on all processes. ``wanted.gradient`` is found here."""
    inputs = hidden, weight, bias
    trains = needs_grad(*inputs)
    gradients = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs]
    live = (rows.labels >= 0) & (rows.per_row.live | rows.spec.needs_every_row)
    alike = int(trains), int(gradients[0]), -1 if chunks.max_active is None else chunks.max_active
    places = meet(part, len(weight), rows.labels, wanted.validate, chunks.rows, live, *alike)
    chunks, call = chunks._replace(rows=places.chunk_rows), LinearShardPolicyLoss.apply if trains else _loss
    given = rows, wanted._replace(gradient=trains), chunks, places, gradients, backend
    return call(*inputs, *given)[:4]  # type: ignore[return-value]
