"""Regression on turns: squared errors between the log ratios of rollouts and their returns, pair by pair of a group.

A pair costs nothing of its own: over m members, the sum over pairs of (x_i - x_j)^2 is m times the sum of (x_i -
mean)^2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ppg_fast.reference.groups import consecutive_ids, group_sum


class Residuals(NamedTuple):
    """What a regression on turns has left to explain; x = log_ratio / eta - return of a turn."""

    centred: Tensor  # (S, T) float64, x minus the mean of its members, 0 where a turn is compared with none
    members: Tensor  # (S, T) float64, dialogues that it is compared among, itself included; 0 where there are no others
    errors: Tensor  # 0-d float64, squared errors in the sum: pairs of all turns, or turns where each is alone

    def loss(self, normalizer: float | Tensor | None = None) -> Tensor:
        """Sum of the squared errors over their number, or over ``normalizer``; 0-d float64, differentiable."""
        return (self.members * self.centred.square()).sum() / self._denominator(normalizer)

    def advantages(self, eta: float, normalizer: float | Tensor | None = None) -> Tensor:
        """-d loss / d (sum of l over the turn), (S, T) float64: REINFORCE on the turns with these advantages, summed
        over tokens, has the gradient of the loss."""
        return -2 / eta * self.members * self.centred.detach() / self._denominator(normalizer)

    def _denominator(self, normalizer: float | Tensor | None) -> float | Tensor:
        return self.errors.clamp(min=1) if normalizer is None else normalizer


def turn_residuals(
    log_ratios: Tensor,  # (S, T) sums of l - old over the turn's tokens
    returns: Tensor,  # (S, T)
    takes_part: Tensor,  # (S, T) bool
    group_ids: Tensor | None,  # (S,) integers; None: every turn by itself
    eta: float,
) -> Residuals:
    """The residuals of each turn among the dialogues of its group that have it, differentiable in ``log_ratios``."""
    left = torch.where(takes_part, log_ratios.double() / eta - returns.double(), 0.0)
    there = takes_part.double()
    if group_ids is None:
        return Residuals(left, there, there.sum())
    groups, S = consecutive_ids(group_ids), group_ids.numel()
    members = group_sum(there, groups, S)[groups]
    compared = takes_part & (members > 1)
    mean = (group_sum(left, groups, S)[groups]) / members.clamp(min=1)
    members = torch.where(compared, members, 0.0)
    pairs = (members - compared.double()).sum() / 2
    return Residuals(torch.where(compared, left - mean, 0.0), members, pairs)
