"""linear_token_logprobs: log-probs from hidden states, chunk by chunk.

For their gradient the logits are computed again: four GEMMs. Where the head is frozen it takes two: the forward pass
keeps u = (onehot - p) W / temperature of each row that is read, and d_hidden = d_logprob u. What p W / temperature, a
log-sum-exp's gradient, differs from -u by is the label's row of W: d_hidden = (d_logprob - d_lse) u + d_lse W[label] /
temperature, which is most exact where the two gradients are equal. An entropy's is no multiple of u and computes the
logits again."""

from typing import Any

import torch
from torch import Tensor

from ppg_fast import backends
from ppg_fast.contract import Chunks, PerRow, RowArguments, Wanted
from ppg_fast.ops.checks import check_labels
from ppg_fast.ops.head import Head, gradients_like, loss_scale, row_outputs
from ppg_fast.ops.linear_policy_loss import reference_linear
from ppg_fast.ops.rows import counted, partition, pick
from ppg_fast.ops.token_logprobs import log_sum_exps
from ppg_fast.ops.tracing import as_data, constant, differentiable, first_order, needs_grad, times, traced
from ppg_fast.spec import PolicyLossSpec

PIECE = 1024  # rows of d_hidden that are float32 at once
NO_ROW = PerRow(*[None] * len(PerRow._fields))  # type: ignore[arg-type]


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> log-prob, maximum and sum (N, 2), entropy, score norm and log-sum-exp of each row, (N,) float32; zeros where
    masked, (0,) unless wanted. ``scale``: temperature and softcap.

    ``wanted.gradient``: of a frozen head, d logprob / d hidden comes last, in the dtype of hidden, of the rows that are
    read: (n, D) and their numbers (n,), which are empty where all are, in their order. Maximum and sum are then (0, 2).
    """
    flags, (chunk_rows, bound, float32), kernels = Wanted(*wanted), Chunks.unpack(chunks), backends.load(backend)
    check_labels(labels, weight.shape[0], flags.validate)
    logprob, pair, entropy, norms, lse = _outputs(hidden, labels.numel(), flags)
    active = labels >= 0
    parts = partition(active, torch.zeros_like(active), bound, counted(labels, bound, flags.validate))
    keeps = flags.gradient, False, False
    head = Head(hidden, weight, bias, chunk_rows, keeps, kernels, float32, packed=parts.full.numel())
    spec, upstream = PolicyLossSpec("reinforce", temperature=scale[0], logit_softcap=scale[1]), logprob.new_ones(())
    if flags.gradient and head.gradient_dtype == torch.float16:
        each = upstream.expand(labels.shape)
        upstream = head.scale = loss_scale(active, each, None, scale[0] if temperatures is None else temperatures)
    if parts.excess is not None:
        upstream = upstream + parts.excess

    def kernel(rows: Tensor, logits: Tensor) -> None:
        temps = None if temperatures is None else temperatures[rows]
        norm = torch.empty_like(logprob[: rows.numel()]) if flags.score_norms else None
        if flags.gradient and not flags.lse:  # the loss -A logprob with A = -1 has that of the log-prob
            row = NO_ROW._replace(advantages=(-upstream).repeat(rows.numel()), temperatures=temps)
            _, found, ent = kernels.policy_loss(logits, labels[rows], *row, spec, entropy.numel() > 0, logits, norm)
        else:
            given = logits, labels[rows], temps, *scale
            found, ent, read = kernels.logprobs_fwd(*given, entropy.numel() > 0, norm)
            if flags.lse:
                sums = log_sum_exps(read, labels[rows], temps, scale, kernels)
                lse[rows] = sums if parts.excess is None else sums + parts.excess
            if flags.gradient:
                once = upstream.repeat(rows.numel())
                kernels.logprobs_bwd(logits, labels[rows], read, ent, once, None, None, temps, *scale, logits)
            else:
                pair[rows] = read
        logprob[rows] = found if parts.excess is None else found + parts.excess
        if entropy.numel():
            entropy[rows] = ent
        if norm is not None:
            norms[rows] = norm

    head.sweep(parts.full, kernel, flags.gradient, parts.skip)
    kept, *_ = head.gradients()
    whole = not flags.gradient or (parts.skip is None and len(kept) == len(hidden))
    return logprob, pair, entropy, norms, lse, kept, parts.full[:0] if whole else parts.full


def _logprobs_of_all_rows(*given: Any) -> tuple[Tensor, ...]:
    """`_logprobs` for tracers, whose shapes must follow from those of the arguments: d logprob / d hidden is (N, D)."""
    *out, kept, numbers = _logprobs(*given)
    return *out, _spread(kept, numbers, len(given[0])) if kept.dim() == 2 else kept, numbers[:0].clone()


def _spread(packed: Tensor, numbers: Tensor, rows: int) -> Tensor:
    """Rows (n, D) at their ``numbers`` of (rows, D), zeros elsewhere; as they are where there are no numbers and n is
    ``rows``."""
    if not numbers.numel() and len(packed) == rows:
        return packed
    return packed.new_zeros(rows, packed.shape[1]).index_copy_(0, numbers, packed)


def _outputs(hidden: Tensor, rows: int, flags: Wanted) -> tuple[Tensor, ...]:
    logprob, _, *wanted = row_outputs(hidden, rows, flags.entropy, flags.score_norms)
    lse = logprob.new_zeros(rows if flags.lse else 0)
    return logprob, logprob.new_zeros(0 if flags.gradient else rows, 2), *wanted, lse


def _times_kept(kept: Tensor, numbers: Tensor, labels: Tensor, d_logprob: Tensor, backend: str) -> Tensor:
    """d_hidden (N, D) of log-probs whose d logprob / d hidden was kept; exact zeros where a row has no gradient."""
    factor = torch.where(labels >= 0, d_logprob, 0.0)
    factor = factor[numbers] if numbers.numel() or len(kept) != len(labels) else factor
    if traced(kept, factor):
        scaled = times(kept, factor[:, None])
    else:
        scaled = torch.empty_like(kept)
        backends.load(backend).scale_rows(kept[None], factor, scaled[None])
    return _spread(scaled.masked_fill_((factor == 0)[:, None], 0.0), numbers, len(labels))


def _slope_of_label(logit: Tensor, temperatures: Tensor | None, scale: list[float]) -> Tensor:
    """d z / d (logit before softcap and temperature) of each row's label, (N,), from its ``logit`` z."""
    temperature, softcap = scale
    by = torch.full_like(logit, temperature) if temperatures is None else temperatures
    if not softcap:
        return 1 / by
    return (1 - (logit * by / softcap).square()).clamp(min=0) / by


def _times_kept_and_label(
    kept: Tensor, numbers: Tensor, labels: Tensor, factor: Tensor, of_label: Tensor, weight: Tensor
) -> Tensor:
    """d_hidden (N, D): ``factor`` (N,) times what was kept plus ``of_label`` (N,) times the label's row of ``weight``,
    rounded once; exact zeros where both are 0 or the row is masked."""
    rows, some = len(labels), numbers.numel() or len(kept) != len(labels)
    labels, factor, of_label = (v[numbers] if some else v for v in (labels, factor, of_label))
    nothing = (labels < 0) | ((factor == 0) & (of_label == 0))
    if traced(kept, factor):
        pieces = [slice(None)]
    else:
        pieces = [slice(start, start + PIECE) for start in range(0, len(kept), PIECE)]
    out = torch.empty_like(kept)
    for part in pieces:
        sums = kept[part].float() * factor[part, None]
        sums += weight[labels[part].clamp(min=0)].float() * of_label[part, None]
        out[part] = sums.masked_fill_(nothing[part, None], 0.0)
    return _spread(out, numbers, rows)


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
    again. ``rows``: labels, maximum and sum ((0, 2): to be found), entropy, d_logprob, d_entropy, d_lse,
    temperatures."""
    labels, pair, entropy, d_logprob, d_entropy, d_lse, temperatures = rows
    assert labels is not None
    assert pair is not None
    assert d_logprob is not None
    kernels, (chunk_rows, bound, float32) = backends.load(backend), Chunks.unpack(chunks)
    head = Head(hidden, weight, bias, chunk_rows, tuple(gradients), kernels, float32)  # type: ignore[arg-type]
    live = d_logprob != 0
    for d in (d_entropy, d_lse):
        live = live if d is None else live | (d != 0)
    live = (labels >= 0) & live
    parts = partition(live, torch.zeros_like(live), bound, counted(labels, bound, False))
    if parts.excess is not None:
        d_logprob = d_logprob + parts.excess
    if head.gradient_dtype == torch.float16:
        size = d_logprob if d_lse is None else d_logprob.abs() + d_lse.abs()
        head.scale = loss_scale(live, size, d_entropy, scale[0] if temperatures is None else temperatures)
        d_logprob = d_logprob * head.scale
        d_entropy, d_lse = (None if d is None else d * head.scale for d in (d_entropy, d_lse))

    def kernel(at: Tensor, logits: Tensor) -> None:
        read = entropy if d_entropy is not None else None
        known = pair if len(pair) else None, read, d_logprob, d_entropy, d_lse, temperatures
        of_row, ent, d_l, d_h, d_z, temps = pick(known, at)
        ent = entropy if ent is None else ent
        if of_row is None:
            of_row = kernels.logprobs_fwd(logits, labels[at], temps, *scale, False)[2]
        kernels.logprobs_bwd(logits, labels[at], of_row, ent, d_l, d_h, d_z, temps, *scale, logits)

    head.sweep(parts.full, kernel, True, parts.skip)
    return head.gradients()


linear_token_logprobs_op = torch.library.custom_op(
    "ppg_fast::linear_token_logprobs",
    _logprobs_of_all_rows,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? temperatures, float[] scale, "
    "bool[] wanted, int[] chunks, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
linear_token_logprobs_bwd_op = torch.library.custom_op(
    "ppg_fast::linear_token_logprobs_bwd", _logprobs_gradients, mutates_args=()
)


@linear_token_logprobs_op.register_fake
def _(hidden, weight, bias, labels, temperatures, scale, wanted, chunks, backend):
    flags = Wanted(*wanted)
    kept = hidden.new_empty(hidden.shape if flags.gradient else (0,))
    return *_outputs(hidden, hidden.shape[0], flags), kept, labels.new_empty(0)


@linear_token_logprobs_bwd_op.register_fake
def _(hidden, weight, bias, rows, scale, chunks, gradients, backend):
    return gradients_like(hidden, weight, gradients)


def _setup_logprobs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, temperatures, ctx.scale, wanted, ctx.chunks, ctx.backend = inputs
    logprob, pair, entropy, _, lse, kept, numbers = output
    ctx.flags = Wanted(*wanted)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(numbers)
    if ctx.flags.gradient and not ctx.flags.entropy:  # what is never needed again
        hidden, weight, bias = None, weight if ctx.flags.lse else None, None
    of_label = (logprob, lse) if ctx.flags.gradient and ctx.flags.lse else (None, None)
    ctx.save_for_backward(hidden, weight, bias, labels, pair, entropy, temperatures, kept, numbers, *of_label)


def _backward_logprobs(
    ctx: Any, d_logprob: Tensor | None, _: Any, d_entropy: Tensor | None, __: Any, d_lse: Tensor | None, *___: Any
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, pair, entropy, temperatures, kept, numbers, *of_label = ctx.saved_tensors
    d_logprob = torch.zeros_like(labels, dtype=torch.float32) if d_logprob is None else d_logprob.contiguous()
    d_entropy = d_entropy.contiguous() if ctx.flags.entropy and d_entropy is not None else None
    d_lse = d_lse.contiguous() if ctx.flags.lse and d_lse is not None else None
    none = (None,) * 6
    if ctx.flags.gradient and d_entropy is None and d_lse is not None:
        logprob, lse = of_label
        factors = d_logprob - d_lse, _slope_of_label(logprob + lse, temperatures, ctx.scale) * d_lse
        return _times_kept_and_label(kept, numbers, labels, *factors, weight), None, None, *none
    if ctx.flags.gradient and d_entropy is None:
        return _times_kept(kept, numbers, labels, d_logprob, ctx.backend), None, None, *none
    wanted = [ctx.needs_input_grad[i] for i in range(3)]
    rows = [labels, pair, entropy, d_logprob, d_entropy, d_lse, temperatures]
    call = linear_token_logprobs_bwd_op if traced(hidden, d_logprob) else _logprobs_gradients
    grads = call(hidden, weight, bias, rows, ctx.scale, ctx.chunks, wanted, ctx.backend)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), *none


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob, entropy, both differentiable in hidden, weight and bias, score norm and log-sum-exp, differentiable
    too, of each row, (N,) float32; (0,) unless wanted. ``wanted.gradient``: a frozen head may keep what makes the
    gradient of a log-prob a scale."""
    if backend == "reference":
        spec = PolicyLossSpec(temperature=temperature, logit_softcap=logit_softcap)
        per_row = PerRow(torch.zeros(labels.shape, device=hidden.device), None, None, None, None, temperatures)
        return reference_linear(hidden, weight, bias, RowArguments(labels, per_row, spec), wanted, chunks)[1:]
    if temperatures is None and not constant(temperature):
        temperatures, temperature = as_data(labels.shape, temperature, torch.float32, labels.device), 1.0
    call = linear_token_logprobs_op if traced(hidden, weight) else _logprobs
    if needs_grad(hidden, weight, bias) and call is _logprobs:
        call = EagerLinearTokenLogprobs.apply
    keeps = wanted.gradient and needs_grad(hidden) and not needs_grad(weight, bias)
    scale, flags = [temperature, logit_softcap], list(wanted._replace(gradient=keeps))
    given = hidden, weight, bias, labels, temperatures, scale, flags, chunks.pack(), backend
    logprob, _, entropy, norms, lse, *_ = call(*given)
    return logprob, entropy, norms, lse
