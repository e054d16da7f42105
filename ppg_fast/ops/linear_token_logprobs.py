"""linear_token_logprobs: log-probs from hidden states, chunk by chunk, the logits computed again for their gradient."""

from typing import Any

import torch
from torch import Tensor

from ppg_fast import backends
from ppg_fast.contract import Chunks, PerRow, RowArguments, Wanted
from ppg_fast.ops.checks import check_labels
from ppg_fast.ops.head import Head, counted, gradients_like, loss_scale, partition, pick, row_outputs
from ppg_fast.ops.linear_policy_loss import reference_linear
from ppg_fast.ops.tracing import as_data, constant, differentiable, first_order, needs_grad, traced
from ppg_fast.spec import PolicyLossSpec


def _logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperatures: Tensor | None,
    scale: list[float],
    wanted: list[bool],
    chunks: list[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> log-prob, maximum and sum (N, 2), entropy and score norm of each row, (N,) float32; zeros where masked, (0,)
    unless wanted. ``scale``: temperature and softcap."""
    flags, (chunk_rows, bound, float32), kernels = Wanted(*wanted), Chunks.unpack(chunks), backends.load(backend)
    check_labels(labels, weight.shape[0], flags.validate)
    logprob, lse, entropy, norms = _outputs(hidden, labels.numel(), flags)
    active = labels >= 0
    parts = partition(active, torch.zeros_like(active), bound, counted(labels, bound, flags.validate))

    def kernel(rows: Tensor, logits: Tensor) -> None:
        temps = None if temperatures is None else temperatures[rows]
        norm = torch.empty_like(logprob[: rows.numel()]) if flags.score_norms else None
        out = kernels.logprobs_fwd(logits, labels[rows], temps, *scale, entropy.numel() > 0, norm)
        logprob[rows], lse[rows] = out[0] if parts.excess is None else out[0] + parts.excess, out[2]
        if entropy.numel():
            entropy[rows] = out[1]
        if norm is not None:
            norms[rows] = norm

    head = Head(hidden, weight, bias, chunk_rows, (False, False, False), kernels, float32)
    head.sweep(parts.full, kernel, False, parts.skip)
    return logprob, lse, entropy, norms


def _outputs(hidden: Tensor, rows: int, flags: Wanted) -> tuple[Tensor, ...]:
    logprob, _, *wanted = row_outputs(hidden, rows, flags.entropy, flags.score_norms)
    return logprob, logprob.new_zeros(rows, 2), *wanted


def _logprobs_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: list[Tensor | None],
    scale: list[float],
    chunks: list[int],
    gradients: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> d_hidden, d_weight and d_bias of `linear_token_logprobs`; the logits of rows with a gradient are computed
    again. ``rows``: labels, maximum and sum, entropy, d_logprob, d_entropy, temperatures."""
    labels, lse, entropy, d_logprob, d_entropy, temperatures = rows
    assert labels is not None
    assert d_logprob is not None
    kernels, (chunk_rows, bound, float32) = backends.load(backend), Chunks.unpack(chunks)
    head = Head(hidden, weight, bias, chunk_rows, tuple(gradients), kernels, float32)  # type: ignore[arg-type]
    live = (labels >= 0) & ((d_logprob != 0) if d_entropy is None else (d_logprob != 0) | (d_entropy != 0))
    parts = partition(live, torch.zeros_like(live), bound, counted(labels, bound, False))
    if parts.excess is not None:
        d_logprob = d_logprob + parts.excess
    if head.gradient_dtype == torch.float16:
        head.scale = loss_scale(live, d_logprob, d_entropy, scale[0] if temperatures is None else temperatures)
        d_logprob, d_entropy = d_logprob * head.scale, None if d_entropy is None else d_entropy * head.scale

    def kernel(at: Tensor, logits: Tensor) -> None:
        read = entropy if d_entropy is not None else None
        row_lse, ent, d_l, d_h, temps = pick((lse, read, d_logprob, d_entropy, temperatures), at)
        ent = entropy if ent is None else ent
        kernels.logprobs_bwd(logits, labels[at], row_lse, ent, d_l, d_h, temps, *scale, logits)

    head.sweep(parts.full, kernel, True, parts.skip)
    return head.gradients()


linear_token_logprobs_op = torch.library.custom_op("ppg_fast::linear_token_logprobs", _logprobs, mutates_args=())
linear_token_logprobs_bwd_op = torch.library.custom_op(
    "ppg_fast::linear_token_logprobs_bwd", _logprobs_gradients, mutates_args=()
)


@linear_token_logprobs_op.register_fake
def _(hidden, weight, bias, labels, temperatures, scale, wanted, chunks, backend):
    flags = Wanted(*wanted)
    return _outputs(hidden, hidden.shape[0], flags)


@linear_token_logprobs_bwd_op.register_fake
def _(hidden, weight, bias, rows, scale, chunks, gradients, backend):
    return gradients_like(hidden, weight, gradients)


def _setup_logprobs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, temperatures, ctx.scale, wanted, ctx.chunks, ctx.backend = inputs
    _, lse, entropy, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, lse, entropy, temperatures)
    ctx.entropy = Wanted(*wanted).entropy


def _backward_logprobs(
    ctx: Any, d_logprob: Tensor | None, _: Any, d_entropy: Tensor | None, __: Any
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, lse, entropy, temperatures = ctx.saved_tensors
    d_logprob = torch.zeros_like(lse[:, 0]) if d_logprob is None else d_logprob.contiguous()
    d_entropy = d_entropy.contiguous() if ctx.entropy and d_entropy is not None else None
    wanted = [ctx.needs_input_grad[i] for i in range(3)]
    rows = [labels, lse, entropy, d_logprob, d_entropy, temperatures]
    call = linear_token_logprobs_bwd_op if traced(hidden, d_logprob) else _logprobs_gradients
    grads = call(hidden, weight, bias, rows, ctx.scale, ctx.chunks, wanted, ctx.backend)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), None, None, None, None, None, None


linear_token_logprobs_op.register_autograd(first_order(_backward_logprobs), setup_context=_setup_logprobs)
EagerLinearTokenLogprobs = differentiable(_logprobs, _setup_logprobs, _backward_logprobs)


def linear_token_logprobs(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy, both differentiable in hidden, weight and bias, and score norm of each row, (N,) float32;
    (0,) unless wanted."""
    if backend == "reference":
        spec = PolicyLossSpec(temperature=temperature, logit_softcap=logit_softcap)
        per_row = PerRow(torch.zeros(labels.shape, device=hidden.device), None, None, None, None, temperatures)
        return reference_linear(hidden, weight, bias, RowArguments(labels, per_row, spec), wanted, chunks)[1:]
    if temperatures is None and not constant(temperature):
        temperatures, temperature = as_data(labels.shape, temperature, torch.float32, labels.device), 1.0
    call = linear_token_logprobs_op if traced(hidden, weight) else _logprobs
    if needs_grad(hidden, weight, bias) and call is _logprobs:
        call = EagerLinearTokenLogprobs.apply
    scale, flags = [temperature, logit_softcap], list(wanted)
    given = hidden, weight, bias, labels, temperatures, scale, flags, chunks.pack(), backend
    logprob, _, entropy, norms = call(*given)
    return logprob, entropy, norms
