"""Where a token belongs: its sequence in a packed batch, and the advantage of its turn. Small ops that check what they index with."""

import torch
from torch import Tensor


@torch.library.custom_op("ppg_fast::sequence_ids", mutates_args=())
def sequence_ids_op(cu_seqlens: Tensor, tokens: int, validate: bool) -> Tensor:
    """The sequence of each of ``tokens`` packed tokens, (N,) int64; ValueError unless cu_seqlens rises from 0 to their number."""
    if cu_seqlens.is_cpu or validate:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != tokens or sorted(bounds) != bounds:
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}, got {bounds}")
    rows = torch.arange(tokens, device=cu_seqlens.device)
    return torch.bucketize(rows, cu_seqlens[1:].long(), right=True).clamp(max=max(cu_seqlens.numel() - 2, 0))


@sequence_ids_op.register_fake
def _(cu_seqlens, tokens, validate):
    return torch.empty(tokens, dtype=torch.int64, device=cu_seqlens.device)


@torch.library.custom_op("ppg_fast::turn_credit", mutates_args=())
def turn_credit_op(
    advantages: Tensor, turn_ids: Tensor, sequences: Tensor, turn_counts: Tensor | None, active: Tensor, validate: bool
) -> Tensor:
    """advantages[sequence, turn] of each token, (N,) float32, 0 where its turn id is -1.

    ``advantages`` (B, T); ``turn_ids``, ``sequences`` (N,) int64; ``active`` (N,) bool. ValueError where an active token has a turn id
    that is not -1 or one of its dialogue's turns; what inactive tokens hold does not matter.
    """
    T = advantages.shape[1]
    if active.is_cpu or validate:
        limit = torch.full_like(turn_ids, T) if turn_counts is None else turn_counts[sequences]
        bad = active & ((turn_ids < -1) | (turn_ids >= limit))
        if bad.any():
            row = int(bad.nonzero()[0])
            rule = "turn_ids must be -1 (context) or in [0, turns of the dialogue)"
            raise ValueError(f"{rule}, got {int(turn_ids[row])} at row {row} of a dialogue with {int(limit[row])} turns")
    padded = torch.nn.functional.pad(advantages, (0, 1))  # column T: no turn, no advantage
    return padded[sequences, torch.where(turn_ids < 0, T, turn_ids.clamp(max=T))]


@turn_credit_op.register_fake
def _(advantages, turn_ids, sequences, turn_counts, active, validate):
    return torch.empty(turn_ids.shape, dtype=torch.float32, device=turn_ids.device)
