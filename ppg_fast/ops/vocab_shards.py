"""Log-probs and entropies where each process holds some columns of the vocabulary: one all-gather of 12 bytes a row.

Of a shard r, its label's logit z_r (-inf where the label is another's), its log-sum-exp and its entropy say all:
lse = logsumexp_r lse_r, l = max_r z_r - lse, H = sum_r s_r (H_r - log s_r) with s_r = e^(lse_r - lse). A score norm
takes 4 bytes more, the sum of squares S_r of a shard's own probabilities: it is sum_r s_r^2 S_r - 2 e^l + 1. What a
backward pass writes into a shard's columns needs no message.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from ppg_fast import backends
from ppg_fast.ops.allocation import fresh
from ppg_fast.ops.checks import check_labels
from ppg_fast.ops.kept_logits import KeptRows, kept_rows
from ppg_fast.ops.token_logprobs import log_sum_exps
from ppg_fast.ops.tracing import differentiable
from ppg_fast.spec import require

MOST = 75.0  # of the log of a factor, so that sums stay finite: what is rarer than e^-75 counts as that


class Part(NamedTuple):
    """The columns of this process: from ``start`` on, among those of the process group ``group``."""

    start: int
    group: Any


class Places(NamedTuple):
    """The columns of this process, ``size`` from ``start`` on, among those of ``group``, and what all agree on."""

    start: int
    size: int
    group: Any
    vocabulary: int
    chunk_rows: int  # the fewest that any of them would take

    def local(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels as columns of this process, 0 where another's and negative where masked, and which are another's."""
        foreign = (labels >= 0) & ((labels < self.start) | (labels >= self.start + self.size))
        return torch.where(labels < 0, labels, torch.where(foreign, 0, labels - self.start)), foreign


class Statistics(NamedTuple):
    """What the whole vocabulary says of each row, (N,) float32, 0 where masked; ``own`` (N, 2): as `logprobs_fwd` gives
    it of the columns of this process, but that the sum is that of all."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    own: Tensor
    norms: Tensor  # (0,) unless wanted


class ShardRows(NamedTuple):
    """What the gradient of a shard's columns needs of each row, (N,); as in `Places.local` and `Statistics`."""

    labels: Tensor
    foreign: Tensor
    own: Tensor
    lse: Tensor
    entropy: Tensor
    temperatures: Tensor | None


def meet(
    part: Part, size: int, labels: Tensor, validate: bool, chunk_rows: int = 1, live: Tensor | None = None, *alike: int
) -> Places:
    """Where all processes hold their columns, ``size`` of them here; the first message, a few integers.

    ValueError where they do not tile a vocabulary, and where labels (N,), how many rows are ``live`` (N,) or what else
    must be ``alike`` are not: processes that send messages of other sizes, or another number of them, would wait for
    ever. IndexError for a label beyond the vocabulary.
    """
    counts = [labels.clamp(min=-1).sum(), labels.new_zeros(()) if live is None else live.sum()]
    known = torch.tensor([part.start, size, chunk_rows, labels.numel(), *alike], device=labels.device)
    mine = torch.cat([known, torch.stack(counts)])
    starts, sizes, chunks, *same = zip(*_gathered(mine, part.group).tolist(), strict=True)
    shards = sorted(zip(starts, sizes, strict=True))
    ends = [0, *(start + count for start, count in shards)]
    rule = "shards (start, size) of a vocabulary must begin at 0 and follow each other without overlap and gap"
    require([start for start, _ in shards] == ends[:-1], rule, shards)
    rule = "the processes of a vocabulary shard must give the same labels and arguments, but their counts differ"
    require(all(len(set(values)) == 1 for values in same), rule, list(zip(*same, strict=True)))
    check_labels(labels, ends[-1], validate)
    return Places(part.start, size, part.group, ends[-1], min(chunks))


def _gathered(mine: Tensor, group: Any) -> Tensor:
    """``mine`` of each process of the group, in their order."""
    parts = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, mine, group=group)
    return torch.stack(parts)


def of_shard(
    kernels: ModuleType,
    logits: Tensor,
    local: tuple[Tensor, Tensor],
    temperatures: Tensor | None,
    scale: Sequence[float],
    score_norms: bool = False,
) -> tuple[Tensor, Tensor]:
    """-> (3, N) label's logit, -inf where it is another's, log-sum-exp and entropy over these logits (B, L, V), (4, N)
    with the sum of squares of the probabilities; what the backward pass starts from. Zeros where masked."""
    labels, foreign = local
    norm = labels.new_empty(labels.shape, dtype=torch.float32) if score_norms else None
    l, H, own = kernels.logprobs_fwd(logits, labels, temperatures, *scale, True, norm)
    lse = log_sum_exps(own, labels, temperatures, scale, kernels)
    said = [(l + lse).masked_fill(foreign, -torch.inf), lse, H]
    if norm is not None:
        said.append(norm + 2 * l.exp() - 1)
    return torch.where(labels >= 0, torch.stack(said), 0.0), own


def combined(mine: Tensor, own: Tensor, labels: Tensor, places: Places) -> Statistics:
    """Of the whole vocabulary, from what `of_shard` says of the columns here; labels (N,) are those of the whole."""
    z, lses, H, *squares = _gathered(mine, places.group).unbind(1)
    lse = lses.logsumexp(0)
    log_share, read = lses.log_softmax(0), labels >= 0
    share = log_share.exp()  # a sum of terms >= 0: lse - sum of share (lse_r - H_r) would cancel where H is small
    entropy = torch.where(share > 0, share * (H - log_share), 0.0).sum(0)
    own = torch.stack([own[:, 0], own[:, 1] * (lse - mine[1]).clamp(max=MOST).exp()], 1)
    l = z.amax(0) - lse
    norms = [((share.square() * square).sum(0) - 2 * l.exp() + 1).clamp(min=0) for square in squares]
    l, entropy, lse, *norms = (torch.where(read, values, 0.0) for values in (l, entropy, lse, *norms))
    return Statistics(l, entropy, lse, own, norms[0] if norms else lse.new_empty(0))


def _capped(z: Tensor, temperatures: Tensor | float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """A column of logits after softcap and temperature, and its derivative."""
    if not softcap:
        return z / temperatures, 1.0 / temperatures
    part = torch.tanh(z / softcap)
    return softcap * part / temperatures, (1 - part.square()) / temperatures


def write_gradient(
    kernels: ModuleType,
    logits: Tensor,
    rows: ShardRows,
    d: tuple[Tensor, Tensor, Tensor | None],
    scale: Sequence[float],
    out: Tensor,
) -> None:
    """Write the gradient of these logits (B, L, V) into ``out``, which may be the logits; ``d``: of log-prob, entropy
    and log-sum-exp. A row with another's label has no 1 in any column: the kernel puts it into the first, which is
    written again."""
    first = logits[..., 0].reshape(-1).to(torch.float32, copy=True)  # the kernel may write over it
    (labels, foreign, own, lse, entropy, temperatures), (d_l, d_H, d_lse) = rows, d
    kernels.logprobs_bwd(logits, labels, own, entropy, d_l, d_H, d_lse, temperatures, *scale, out)
    z, slope = _capped(first, scale[0] if temperatures is None else temperatures, scale[1])
    log_p = z - lse
    p, of_sum = log_p.exp(), d_l if d_lse is None else d_l - d_lse
    gradient = -(of_sum * p + d_H * torch.where(p > 0, p * (log_p + entropy), 0.0)) * slope
    dead = (d_l == 0) & (d_H == 0) & (of_sum == 0)  # not read, and may hold NaN
    column = out[..., 0]
    gradient = gradient.masked_fill(dead, 0.0).view(column.shape).to(out.dtype)
    column.copy_(torch.where(foreign.view(column.shape), gradient, column))


# ---- from logits ---------------------------------------------------------------------------------------------------
def _logprobs(
    logits: Tensor, labels: Tensor, temperatures: Tensor | None, scale: list[float], places: Places, backend: str
) -> tuple[Tensor, ...]:
    mine, own = of_shard(backends.load(backend), logits, places.local(labels), temperatures, scale)
    return combined(mine, own, labels, places)[:4]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, temperatures, ctx.scale, ctx.places, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(logits, labels, temperatures, *output[1:])


def _backward(ctx: Any, d_logprob: Tensor, d_entropy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logits, labels, temperatures, entropy, lse, own = ctx.saved_tensors
    local, foreign = ctx.places.local(labels)
    rows = ShardRows(local, foreign, own, lse, entropy, temperatures)
    dlogits, d = fresh(logits, logits.shape), (d_logprob.contiguous(), d_entropy.contiguous(), None)
    write_gradient(backends.load(ctx.backend), logits, rows, d, ctx.scale, dlogits)
    return dlogits, None, None, None, None, None


ShardLogprobs = differentiable(_logprobs, _setup, _backward)


def shard_logprobs(
    logits: Tensor, labels: Tensor, temperatures: Tensor | None, scale: list[float], part: Part, backend: str
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of each row, (N,) float32, differentiable in the logits of this shard (B, L, V); the same on
    all processes. ``labels`` (N,) of the whole vocabulary, ``scale``: temperature and softcap."""
    places = meet(part, logits.shape[-1], labels, False)
    return ShardLogprobs.apply(logits, labels, temperatures, scale, places, backend)[:2]


def _kept(logits: Tensor, kept: KeptRows, places: Places) -> Tensor:
    ids = kept.ids - places.start
    here = (ids >= 0) & (ids < places.size)
    z = logits[kept.rows, ids.clamp(0, places.size - 1)].float().masked_fill(~here, 0.0)
    distributed.all_reduce(z, group=places.group)
    out = z.new_full((len(kept.labels), kept.width), -torch.inf)
    return out.index_put_((kept.rows, kept.places), z)


def _kept_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, ctx.kept, ctx.places = inputs
    ctx.shape, ctx.dtype = logits.shape, logits.dtype


def _kept_backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
    kept, ids = ctx.kept, ctx.kept.ids - ctx.places.start
    here = (ids >= 0) & (ids < ctx.places.size)
    rows, ids, of_columns = kept.rows[here], ids[here], kept.places[here]
    return (
        d.new_zeros(ctx.shape, dtype=ctx.dtype).index_put_((rows, ids), d[rows, of_columns].to(ctx.dtype)),
        None,
        None,
    )


ShardKept = differentiable(_kept, _kept_setup, _kept_backward)


def shard_kept_columns(
    logits: Tensor, ids: Tensor, offsets: Tensor, labels: Tensor, part: Part
) -> tuple[Tensor, Tensor]:
    """Logits (N, k) of the kept sets, differentiable in the columns of this shard (N, V), and the column of each of
    ``labels`` (N,), of the whole vocabulary, among them. One sum over the processes, of 4 bytes an id."""
    places = meet(part, logits.shape[-1], labels, False, 1, None, len(ids))
    kept = kept_rows(ids, offsets, labels, places.vocabulary)
    return ShardKept.apply(logits, kept, places), kept.labels
