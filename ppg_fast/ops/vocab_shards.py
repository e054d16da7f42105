"""Log-probs and entropies where each process holds some columns of the vocabulary: one all-gather of 12 bytes a row.

Of a shard r, its label's logit z_r (-inf where the label is another's), its log-sum-exp and its entropy say all:
lse = logsumexp_r lse_r, l = max_r z_r - lse, H = sum_r s_r (H_r - log s_r) with s_r = e^(lse_r - lse). The backward
pass needs no message but, from hidden states, the sum of d_hidden.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from ppg_fast import backends
from ppg_fast.contract import Chunks
from ppg_fast.ops.allocation import fresh
from ppg_fast.ops.checks import check_labels
from ppg_fast.ops.head import Head, loss_scale
from ppg_fast.ops.rows import partition, pick
from ppg_fast.ops.token_logprobs import log_sum_exps
from ppg_fast.ops.tracing import differentiable
from ppg_fast.spec import require

MOST = 75.0  # of the log of a factor, so that sums stay finite: what is rarer than e^-75 counts as that


class Part(NamedTuple):
    """The columns of this process: from ``start`` on, among those of the process group ``group``."""

    start: int
    group: Any


class _Rows(NamedTuple):
    """What the backward pass of a shard needs of each row, (N,); ``own`` (N, 2): as `logprobs_fwd` gives it, but that
    the sum is that of the whole vocabulary."""

    labels: Tensor  # int64, the column of the shard, 0 where the label is another's, negative where masked
    foreign: Tensor  # bool: the label is another's
    own: Tensor
    lse: Tensor
    entropy: Tensor
    temperatures: Tensor | None


def _capped(z: Tensor, temperatures: Tensor | float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """A column of logits after softcap and temperature, and its derivative."""
    if not softcap:
        return z / temperatures, 1.0 / temperatures
    part = torch.tanh(z / softcap)
    return softcap * part / temperatures, (1 - part.square()) / temperatures


def _of_shard(
    kernels: ModuleType, logits: Tensor, labels: Tensor, temperatures: Tensor | None, scale: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """-> (3, N) label's logit, log-sum-exp and entropy over these logits (B, L, V); what the backward pass starts
    from. Zeros where masked."""
    l, H, own = kernels.logprobs_fwd(logits, labels, temperatures, *scale, True)
    lse = log_sum_exps(own, labels, temperatures, scale, kernels)
    return torch.where(labels >= 0, torch.stack([l + lse, lse, H]), 0.0), own


def _combined(mine: Tensor, own: Tensor, labels: Tensor, size: int, part: Part, validate: bool) -> tuple[Tensor, ...]:
    """-> log-prob, entropy, own and lse of the whole vocabulary, from (3, N) of this shard of ``size`` columns; labels
    are those of the whole. ValueError where the shards do not tile it, IndexError for a label beyond."""
    here = (labels >= part.start) & (labels < part.start + size)
    message = torch.cat([mine, mine.new_tensor([[part.start], [size], [0]])], 1)
    message[0, :-1].masked_fill_(~here, -torch.inf)
    parts = [torch.empty_like(message) for _ in range(distributed.get_world_size(part.group))]
    distributed.all_gather(parts, message, group=part.group)
    z, lses, H = torch.stack(parts).unbind(1)
    shards = sorted(zip(z[:, -1].long().tolist(), lses[:, -1].long().tolist(), strict=True))
    ends = [0, *(start + size for start, size in shards)]
    rule = "shards (start, size) of a vocabulary must begin at 0 and follow each other without overlap and gap"
    require([start for start, _ in shards] == ends[:-1], rule, shards)
    check_labels(labels, ends[-1], validate)
    z, lses, H = z[:, :-1], lses[:, :-1], H[:, :-1]
    lse = lses.logsumexp(0)
    log_share, read = lses.log_softmax(0), labels >= 0
    share = log_share.exp()  # a sum of terms >= 0: lse - sum of share (lse_r - H_r) would cancel where H is small
    entropy = torch.where(share > 0, share * (H - log_share), 0.0).sum(0)
    own = torch.stack([own[:, 0], own[:, 1] * (lse - mine[1]).clamp(max=MOST).exp()], 1)
    return torch.where(read, z.amax(0) - lse, 0.0), torch.where(read, entropy, 0.0), own, lse


def _local(labels: Tensor, size: int, part: Part) -> tuple[Tensor, Tensor]:
    """Labels as columns of the shard, and which are another's; see `_Rows`."""
    foreign = (labels >= 0) & ((labels < part.start) | (labels >= part.start + size))
    return torch.where(labels < 0, labels, torch.where(foreign, 0, labels - part.start)), foreign


def _gradient(
    kernels: ModuleType, logits: Tensor, rows: _Rows, d: tuple[Tensor, Tensor], scale: Sequence[float], out: Tensor
) -> None:
    """Write the gradient of these logits (B, L, V) into ``out``, which may be the logits. A row with another's label
    has no 1 in any column: the kernel puts it into the first, which is written again."""
    first = logits[..., 0].reshape(-1).to(torch.float32, copy=True)  # the kernel may write over it
    labels, foreign, own, lse, entropy, temperatures = rows
    kernels.logprobs_bwd(logits, labels, own, entropy, *d, None, temperatures, *scale, out)
    z, slope = _capped(first, scale[0] if temperatures is None else temperatures, scale[1])
    log_p = z - lse
    p = log_p.exp()
    gradient = -(d[0] * p + d[1] * torch.where(p > 0, p * (log_p + entropy), 0.0)) * slope
    column = out[..., 0]
    column.copy_(torch.where(foreign.view(column.shape), gradient.view(column.shape).to(out.dtype), column))


# ---- from logits ---------------------------------------------------------------------------------------------------
def _logprobs(
    logits: Tensor, labels: Tensor, temperatures: Tensor | None, scale: list[float], part: Part, backend: str
) -> tuple[Tensor, ...]:
    kernels, size = backends.load(backend), logits.shape[-1]
    found = _of_shard(kernels, logits, _local(labels, size, part)[0], temperatures, scale)
    return _combined(*found, labels, size, part, False)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, temperatures, ctx.scale, ctx.part, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(logits, labels, temperatures, *output[1:])


def _backward(ctx: Any, d_logprob: Tensor, d_entropy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logits, labels, temperatures, entropy, own, lse = ctx.saved_tensors
    rows = _Rows(*_local(labels, logits.shape[-1], ctx.part), own, lse, entropy, temperatures)
    dlogits, d = fresh(logits, logits.shape), (d_logprob.contiguous(), d_entropy.contiguous())
    _gradient(backends.load(ctx.backend), logits, rows, d, ctx.scale, dlogits)
    return dlogits, None, None, None, None, None


ShardLogprobs = differentiable(_logprobs, _setup, _backward)


# ---- from hidden states --------------------------------------------------------------------------------------------
def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperatures: Tensor | None,
    scale: list[float],
    part: Part,
    chunks: Chunks,
    validate: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    kernels, size = backends.load(backend), len(weight)
    local, _ = _local(labels, size, part)
    mine, own = hidden.new_zeros(3, len(labels), dtype=torch.float32), hidden.new_zeros(len(labels), 2).float()

    def kernel(at: Tensor, logits: Tensor) -> None:
        (temps,) = pick((temperatures,), at)
        mine[:, at], own[at] = _of_shard(kernels, logits, local[at], temps, scale)

    head = Head(hidden, weight, bias, chunks.rows, (False, False, False), kernels, chunks.float32)
    active = labels >= 0
    head.sweep(partition(active, torch.zeros_like(active)).full, kernel, False)
    return _combined(mine, own, labels, size, part, validate)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, temperatures, ctx.scale, ctx.part, ctx.chunks, _, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(hidden, weight, bias, labels, temperatures, *output[1:])


def _linear_backward(ctx: Any, d_logprob: Tensor, d_entropy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, temperatures, entropy, own, lse = ctx.saved_tensors
    kernels, wanted, scale = backends.load(ctx.backend), tuple(ctx.needs_input_grad[:3]), ctx.scale
    head = Head(hidden, weight, bias, ctx.chunks.rows, wanted, kernels, ctx.chunks.float32)  # type: ignore[arg-type]
    rows = _Rows(*_local(labels, len(weight), ctx.part), own, lse, entropy, temperatures)
    live = (labels >= 0) & ((d_logprob != 0) | (d_entropy != 0))
    if head.gradient_dtype == torch.float16:
        head.scale = loss_scale(live, d_logprob, d_entropy, scale[0] if temperatures is None else temperatures)
        d_logprob, d_entropy = d_logprob * head.scale, d_entropy * head.scale

    def kernel(at: Tensor, logits: Tensor) -> None:
        of_rows = _Rows(*pick(rows, at))  # type: ignore[arg-type,call-arg]
        _gradient(kernels, logits, of_rows, (d_logprob[at], d_entropy[at]), scale, logits)

    head.sweep(partition(live, torch.zeros_like(live)).full, kernel, True)
    gradients = head.gradients()
    if wanted[0]:
        distributed.all_reduce(gradients[0], group=ctx.part.group)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *(None,) * 7


LinearShardLogprobs = differentiable(_linear_logprobs, _linear_setup, _linear_backward)


def shard_logprobs(*given: Any) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of each row, (N,) float32, differentiable in the logits of this shard (B, L, V); the same on
    all processes. ``given``: logits, labels (N,) of the whole vocabulary, temperatures or None, [temperature, softcap],
    `Part`, backend."""
    return ShardLogprobs.apply(*given)[:2]


def linear_shard_logprobs(*given: Any) -> tuple[Tensor, Tensor]:
    """The same from hidden states (N, D) that all processes hold, and the weight (V, D) and bias of this shard.
    d_hidden is the sum over the processes. ``given``: hidden, weight, bias, labels, temperatures or None, [temperature,
    softcap], `Part`, `Chunks`, validate, backend."""
    return LinearShardLogprobs.apply(*given)[:2]
