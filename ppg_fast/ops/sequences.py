"""Where a token belongs: its sequence in a packed batch, and the advantage of its turn. Small ops that check what they
index with."""

import torch
from torch import Tensor

from ppg_fast.ops.checks import check_cu_seqlens, check_mask, check_turn_ids
from ppg_fast.ops.tracing import traced
from ppg_fast.reference.turns import of_tokens
from ppg_fast.spec import IGNORE


def _active_labels(labels: Tensor, mask: Tensor, validate: bool) -> Tensor:
    if mask.is_cpu or validate:
        check_mask(mask)
    return torch.where(mask.reshape(-1) != 0, labels, IGNORE)


active_labels_op = torch.library.custom_op("ppg_fast::active_labels", _active_labels, mutates_args=())


@active_labels_op.register_fake
def _(labels, mask, validate):
    return torch.empty_like(labels)


def active_labels(labels: Tensor, mask: Tensor, validate: bool) -> Tensor:
    """The (N,) labels with -100 where the mask, of any shape of N elements, is 0; ValueError unless it is 0 or 1."""
    return (active_labels_op if traced(labels, mask) else _active_labels)(labels, mask, validate)


def sequence_ids(cu_seqlens: Tensor | None, sequences: int, labels: Tensor) -> Tensor:
    """The sequence of each of the (N,) labels, (N,) int64: a run of cu_seqlens, or one of so many of equal length."""
    N = labels.numel()
    rows = torch.arange(N, device=labels.device)
    if cu_seqlens is None:
        return rows // max(N // max(sequences, 1), 1)
    return torch.bucketize(rows, cu_seqlens[1:].long(), right=True).clamp(max=max(cu_seqlens.numel() - 2, 0))


@torch.library.custom_op("ppg_fast::sequence_ids", mutates_args=())
def sequence_ids_op(cu_seqlens: Tensor, labels: Tensor, validate: bool) -> Tensor:
    """The sequence of each of the packed labels, (N,) int64; ValueError unless cu_seqlens rises from 0 to their
    number."""
    if cu_seqlens.is_cpu or validate:
        check_cu_seqlens(cu_seqlens, labels.numel())
    return sequence_ids(cu_seqlens, cu_seqlens.numel() - 1, labels)


@sequence_ids_op.register_fake
def _(cu_seqlens, labels, validate):
    return torch.empty(labels.numel(), dtype=torch.int64, device=cu_seqlens.device)


@torch.library.custom_op("ppg_fast::turn_credit", mutates_args=())
def turn_credit_op(
    advantages: Tensor, turn_ids: Tensor, sequences: Tensor, turn_counts: Tensor | None, active: Tensor, validate: bool
) -> Tensor:
    """advantages[sequence, turn] of each token, (N,) float32, 0 where its turn id is -1.

    ``advantages`` (B, T); ``turn_ids``, ``sequences`` (N,) int64; ``active`` (N,) bool. ValueError where an active
    token has a turn id that is not -1 or one of its dialogue's turns; what inactive tokens hold does not matter.
    """
    T = advantages.shape[1]
    if active.is_cpu or validate:
        check_turn_ids(turn_ids, T, sequences, turn_counts, active)
    return of_tokens(advantages, torch.where(turn_ids < T, turn_ids, -1), sequences)


@turn_credit_op.register_fake
def _(advantages, turn_ids, sequences, turn_counts, active, validate):
    return torch.empty(turn_ids.shape, dtype=torch.float32, device=turn_ids.device)
