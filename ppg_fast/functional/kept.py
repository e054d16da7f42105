"""Which tokens a sampler chose among: what top-k and top-p left of the vocabulary at each place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppg_fast import ops
from ppg_fast.contract import Chunks
from ppg_fast.functional.tokens import check_tensor
from ppg_fast.functional.vocab_shard import VocabShard
from ppg_fast.ops.rows import check_bound
from ppg_fast.spec import require


@dataclass(frozen=True, eq=False)
class Kept:
    """The kept set K of each token, from a sampler with top-k or top-p; then l = z_label - log sum over K of exp(z).

    ``ids`` (M,) integers and ``offsets`` (N + 1,) integers, for labels of N elements in their order: the set of label n
    is ids[offsets[n] : offsets[n + 1]], in any order, each token once, the label among them. Sets of masked labels are
    not read and may be empty. ValueError for other shapes and dtypes; of values by the function that takes it.
    """

    ids: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        for name, tensor in {"ids": self.ids, "offsets": self.offsets}.items():
            given = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            flat = isinstance(tensor, Tensor) and tensor.dim() == 1 and (name == "ids" or len(tensor) > 0)
            require(flat, f"{name} of kept must be a tensor of one dimension", given)
            integers = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
            require(integers, f"{name} of kept must be integers", tensor.dtype)

    @staticmethod
    def of_table(ids: Tensor) -> "Kept":
        """From (..., k) ids of the labels' shape and k, negative where there is none, as some hosts hand them over."""
        require(isinstance(ids, Tensor) and ids.dim() >= 1, "a table of kept ids must be (..., k)", ids)
        rows = ids.reshape(-1, ids.shape[-1])
        there = rows >= 0
        return Kept(rows[there], torch.nn.functional.pad(there.sum(1).cumsum(0), (1, 0)))

    @staticmethod
    def of_answers(masks: Sequence[Any], drawn: Tensor) -> "Kept":
        """From what vLLM says of each answer, in order: its SamplingMask, or the sampling_mask of an HTTP answer, which
        is a list of ids for each token. ``drawn`` (...): bool of the labels' shape, true at those tokens.

        ValueError where they are not as many, and for a mask that is no list of lists.
        """
        sets = [ids for mask in masks for ids in getattr(mask, "token_ids", mask)]
        flat = next((ids for ids in sets if not isinstance(ids, Sequence)), None)
        require(flat is None, "a sampling mask must be a list of ids for each token", flat)
        rule = "the sampling masks of answers must be of as many tokens as were drawn"
        require(len(sets) == int(drawn.sum()), f"{rule}, {int(drawn.sum())}", len(sets))
        sizes = torch.tensor([len(ids) for ids in sets], dtype=torch.int64, device=drawn.device)
        ids = torch.tensor([i for ids in sets for i in ids], dtype=torch.int64, device=drawn.device)
        counts = sizes.new_zeros(drawn.numel()).masked_scatter_(drawn.reshape(-1).bool(), sizes)
        return Kept(ids, torch.nn.functional.pad(counts.cumsum(0), (1, 0)))


def kept_logits(
    kept: Kept,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    chunks: Chunks,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Logits (N, k) of the kept sets, softcap taken, and the column of each of ``labels`` (N,) among them."""
    require(isinstance(kept, Kept), "kept must be a Kept", type(kept).__name__)
    for name, tensor in {"ids of kept": kept.ids, "offsets of kept": kept.offsets}.items():
        check_tensor(name, tensor, None, x.device)
    N = labels.numel()
    require(len(kept.offsets) == N + 1, f"offsets of kept must be (N + 1,) = ({N + 1},)", tuple(kept.offsets.shape))
    if chunks.max_active is not None:
        check_bound(int((labels >= 0).sum()), chunks.max_active)
    rows = ops.kept_rows(kept.ids, kept.offsets, labels, len(weight))
    logits = ops.kept_logits(x, weight, bias, rows, softcap, chunks.float32, backend)  # type: ignore[call-arg]
    return logits, rows.labels


def kept_columns(kept: Kept, logits: Tensor, labels: Tensor, vocab: VocabShard | None = None) -> tuple[Tensor, Tensor]:
    """Out of logits (N, V) that a host has made, or of this process's columns of them, (N, k) of the kept sets and the
    column of each of ``labels`` (N,) among them; as `kept_logits`."""
    sets = kept.ids, kept.offsets, labels
    if vocab is not None:
        return ops.shard_kept_columns(logits, *sets, vocab.part)
    rows = ops.kept_rows(*sets, logits.shape[-1])
    return ops.kept_columns(logits, rows), rows.labels
