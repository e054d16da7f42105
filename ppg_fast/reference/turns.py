"""Where turns are: which (dialogue, turn) pairs exist, and what a turn's value is to each of its tokens."""

import torch
from torch import Tensor


def turn_mask(turn_counts: Tensor, turns: int) -> Tensor:
    """(B, turns) bool: whether turn t of dialogue b exists, t < turn_counts[b]."""
    return torch.arange(turns, device=turn_counts.device) < turn_counts[:, None]


def of_tokens(values: Tensor, turn_ids: Tensor, dialogue_ids: Tensor) -> Tensor:
    """values[dialogue, turn] of each token, 0 where its turn id is -1 (context).

    ``values`` (B, T); ``turn_ids`` and ``dialogue_ids`` of one shape, int64, turn ids below T. In the dtype of
    ``values``.
    """
    padded = torch.nn.functional.pad(values, (0, 1))  # column T: no turn, no value
    return padded[dialogue_ids, torch.where(turn_ids < 0, values.shape[1], turn_ids)]
