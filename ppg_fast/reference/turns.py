"""Where turns are: which (dialogue, turn) pairs exist, what a turn's value is to each of its tokens, the sum of theirs
and the first of them."""

import torch
from torch import Tensor

from ppg_fast.reference.groups import group_sum


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


def sum_of_turns(
    values: Tensor, active: Tensor, turn_ids: Tensor, dialogue_ids: Tensor, shape: tuple[int, int]
) -> Tensor:
    """(S, T) float64 = ``shape``: the sum of ``values`` (N,) over the active tokens of each turn; what others hold is
    not used. Differentiable in the values.

    ``active`` (N,) bool; ``turn_ids`` and ``dialogue_ids`` (N,) int64, turn ids of active tokens in [0, T).
    """
    S, T = shape
    nowhere = S * T  # a place beyond all turns, for tokens that are not active
    at = torch.where(active, dialogue_ids * T + turn_ids, nowhere)
    return group_sum(torch.where(active, values, 0.0).double(), at, nowhere + 1)[:nowhere].view(S, T)


def first_of_turns(active: Tensor, turn_ids: Tensor, dialogue_ids: Tensor, shape: tuple[int, int]) -> Tensor:
    """(S, T) int64 = ``shape``: the number of each turn's first active token, N where it has none; tokens as
    `sum_of_turns` takes them."""
    (S, T), N = shape, active.numel()
    at = torch.where(active, dialogue_ids * T + turn_ids, S * T)
    numbers = torch.arange(N, device=at.device)
    none = torch.full((S * T + 1,), N, device=at.device)
    return none.scatter_reduce(0, at, numbers, "amin")[: S * T].view(S, T)
