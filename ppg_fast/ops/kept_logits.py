"""Logits of the tokens that a truncated sampler chose among, and of no others.

z_j = h_n . W[id_j] + b[id_j] for the kept ids of each row. All three products are sums over bags of rows: d_hidden of
the kept rows of the weight, d_weight of the rows of hidden states in which a token was kept, found by sorting. So no
memory of tokens times kept ids times hidden size exists, and each sum has one order.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppg_fast.ops.checks import check_labels
from ppg_fast.ops.tracing import differentiable, outside_of_graphs
from ppg_fast.spec import IGNORE, fail

PIECE_BYTES = 2**24  # of rows of a 16-bit weight that are held in float32 at once


class KeptRows(NamedTuple):
    """The kept sets of N rows, ascending, and where they lie in (N, width) logits; those of masked rows are empty."""

    ids: Tensor  # (M,) int64
    rows: Tensor  # (M,) int64
    places: Tensor  # (M,) int64, the column
    offsets: Tensor  # (N + 1,) int64
    labels: Tensor  # (N,) int64, the column of the label, -100 where masked
    width: int


def kept_rows(ids: Tensor, offsets: Tensor, labels: Tensor, vocabulary: int) -> KeptRows:
    """The sets ``ids`` (M,) and ``offsets`` (N + 1,) of ``labels`` (N,), whatever the order of ids in a set.

    ValueError that names row and id: an id outside of the vocabulary, one that is there twice, a label that is not in
    its set; for offsets that are none. IndexError for a label outside of the vocabulary.
    """
    check_labels(labels, vocabulary, True)
    ids, offsets, N = ids.long(), offsets.long(), labels.numel()
    counts = offsets.diff()
    ends = torch.stack([offsets[0], offsets[-1] - len(ids), counts.clamp(max=0).sum()])
    if ends.any():
        fail(f"offsets of kept must rise from 0 to the number of ids, {len(ids)}", offsets[:9].tolist())
    rows = torch.arange(N, device=ids.device).repeat_interleave(counts, output_size=len(ids))
    read = labels[rows] >= 0
    ids, rows = ids[read], rows[read]
    outside = (ids < 0) | (ids >= vocabulary)
    _refuse(outside, ids, rows, f"ids of kept must be in [0, {vocabulary})")
    keys = (rows * vocabulary + ids).sort().values
    rows, ids = keys // vocabulary, keys % vocabulary
    _refuse(keys == torch.cat([keys.new_full((1,), -1), keys])[:-1], ids, rows, "ids of kept must be in a set once")
    active = (labels >= 0).nonzero()[:, 0]
    wanted = active * vocabulary + labels[active]
    at = torch.searchsorted(keys, wanted)
    found = torch.cat([keys, keys.new_full((1,), -1)])[at] == wanted
    _refuse(~found, labels[active], active, "a label must be in its kept set")
    starts = torch.searchsorted(rows, torch.arange(N + 1, device=ids.device))
    columns = torch.full_like(labels, IGNORE)
    columns[active] = at - starts[active]
    width = max(1, int(starts.diff().max())) if N else 1
    return KeptRows(ids, rows, torch.arange(len(ids), device=ids.device) - starts[rows], starts, columns, width)


def _refuse(bad: Tensor, ids: Tensor, rows: Tensor, rule: str) -> None:
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"{rule}, got id {int(ids[first])} at row {int(rows[first])}")


def _pieces(weight: Tensor, kept: KeptRows, exact: bool) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """(rows, ids, table, index): the rows of ``weight`` of some rows' ids are ``table[index]``. Of 16 bits they are
    handed out in float32, a few at a time, where ``exact``."""
    N, M = len(kept.offsets) - 1, len(kept.ids)
    if not exact or weight.dtype == torch.float32:
        yield slice(0, N), slice(0, M), weight, kept.ids
        return
    most, offsets = max(1, PIECE_BYTES // (4 * max(1, weight.shape[1]))), kept.offsets.tolist()
    start = 0
    for row in range(1, N + 1):
        if row == N or offsets[row + 1] - offsets[start] > most:
            of_ids = slice(offsets[start], offsets[row])
            ids = kept.ids[of_ids]
            yield slice(start, row), of_ids, weight[ids].float(), torch.arange(len(ids), device=ids.device)
            start = row


def _sums(table: Tensor, index: Tensor, offsets: Tensor, factors: Tensor) -> Tensor:
    """sum over j in bag n of factors_j table[index_j], in the dtype of the table, in the order of j."""
    factors, offsets = factors.to(table.dtype), offsets.contiguous()
    if not len(index):
        return table.new_zeros(len(offsets) - 1, table.shape[1])
    return torch.nn.functional.embedding_bag(
        index, table, offsets, mode="sum", per_sample_weights=factors, include_last_offset=True
    )


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, kept: KeptRows, softcap: float, exact: bool
) -> tuple[Tensor, Tensor]:
    """-> (N, width) float32, -inf where there is no id, and (M,) d z / d (h . w), (0,) without a softcap."""
    z = hidden.new_empty(len(kept.ids), dtype=torch.float32)
    for rows, ids, table, index in _pieces(weight, kept, exact):
        if len(index):
            # the products that the backward pass of an embedding bag gives its factors
            x, offsets = hidden[rows].to(table.dtype), kept.offsets[rows.start : rows.stop] - ids.start
            of_row = kept.rows[ids] - rows.start
            z[ids] = torch.ops.aten._embedding_bag_per_sample_weights_backward(x, table, index, offsets, of_row, 0)
    z = z if bias is None else z + bias[kept.ids].float()
    slope = z[:0]
    if softcap:
        part = torch.tanh(z / softcap)
        z, slope = softcap * part, 1 - part.square()
    logits = z.new_full((len(kept.labels), kept.width), -torch.inf)
    return logits.index_put_((kept.rows, kept.places), z), slope


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, ctx.kept, _, ctx.exact = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(hidden, weight, output[1])


def _backward(ctx: Any, d_logits: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    (hidden, weight, slope), kept = ctx.saved_tensors, ctx.kept
    wants, (d_hidden, d_weight, d_bias) = ctx.needs_input_grad, (None, None, None)
    if d_logits is None:
        return (None,) * 6
    d = d_logits[kept.rows, kept.places].float()
    d = d * slope if len(slope) else d
    if wants[0]:
        d_hidden = torch.empty_like(hidden)
        for rows, ids, table, index in _pieces(weight, kept, ctx.exact):
            offsets = kept.offsets[rows.start : rows.stop + 1] - ids.start
            d_hidden[rows] = _sums(table, index, offsets, d[ids]).to(hidden.dtype)
    if wants[1] or wants[2]:
        by_id = kept.ids.argsort(stable=True)
        bounds = torch.searchsorted(kept.ids[by_id], torch.arange(len(weight) + 1, device=d.device))
        if wants[1]:  # what a masked row holds is not read
            d_weight = _sums(hidden.float(), kept.rows[by_id], bounds, d[by_id]).to(weight.dtype)
        if wants[2]:
            d_bias = _sums(d.new_ones(1, 1), torch.zeros_like(by_id), bounds, d[by_id])[:, 0].to(weight.dtype)
    return d_hidden, d_weight, d_bias, None, None, None


KeptLogits = differentiable(_logits, _setup, _backward)


@outside_of_graphs
def kept_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, kept: KeptRows, softcap: float, float32: bool, backend: str
) -> Tensor:
    """(N, width) float32, differentiable in hidden, weight and bias; -inf where there is no id.

    Products of 16-bit operands are taken in float32, but on a GPU in bfloat16 unless ``float32``. A graph of
    torch.compile ends here: how many ids there are is in the data.
    """
    if backend == "reference":
        z = (hidden.float()[kept.rows] * weight.float()[kept.ids]).sum(-1)
        z = z if bias is None else z + bias[kept.ids].float()
        z = softcap * torch.tanh(z / softcap) if softcap else z
        logits = z.new_full((len(kept.labels), kept.width), -torch.inf)
        return logits.index_put((kept.rows, kept.places), z)
    exact = float32 or hidden.is_cpu or hidden.dtype == torch.float16
    return KeptLogits.apply(hidden, weight, bias, kept, softcap, exact)[0]


def kept_columns(logits: Tensor, kept: KeptRows) -> Tensor:
    """(N, width) float32 out of logits (N, V), differentiable in them; -inf where there is no id."""
    z = logits.new_full((len(kept.labels), kept.width), -torch.inf, dtype=torch.float32)
    return z.index_put((kept.rows, kept.places), logits[kept.rows, kept.ids].float())
