"""Discounted returns inside a window, as a plain loop over how far ahead a reward is.

Mirrors kernels/triton/partial_returns.py and csrc/*/partial_returns.*
"""

import torch
from torch import Tensor

from ppg_fast.reference.turns import turn_mask


def partial_returns(
    rewards: Tensor,  # (B, T)
    segment_ids: Tensor | None,  # (B, T) int64
    turn_counts: Tensor | None,  # (B,) int64
    lookahead: int,
    segment_length: int,
    gamma: float,
) -> Tensor:
    """R[b, t] = sum over k = t .. end - 1 of gamma^(k-t) r[b, k], (B, T) in the dtype of the rewards; zero beyond the
    dialogue.

    end is the smallest of t + ``lookahead``, the end of t's segment (``segment_ids``, or runs of ``segment_length``
    turns if that is not 0) and the end of the dialogue.
    """
    T, returns, exists = rewards.shape[1], torch.zeros_like(rewards), _turns_of(rewards, turn_counts)
    bounds = []  # where a segment ends, as numbers that are the same inside of it
    if segment_length:
        bounds.append(torch.arange(T, device=rewards.device).expand(rewards.shape) // segment_length)
    if segment_ids is not None:
        bounds.append(torch.nn.functional.pad((segment_ids[:, 1:] != segment_ids[:, :-1]).cumsum(1), (1, 0)))
    for ahead in range(min(lookahead, T)):
        credited = exists[:, ahead:]
        for segment in bounds:
            credited = credited & (segment[:, ahead:] == segment[:, : T - ahead])
        returns[:, : T - ahead] += torch.where(credited, gamma**ahead * rewards[:, ahead:], 0.0)
    return returns


def masked_returns(rewards: Tensor, mask: Tensor, turn_counts: Tensor | None, gamma: float) -> Tensor:
    """R[b, t] = sum over k with mask[t, k] of gamma^(k-t) r[b, k]: any subset of the rewards, as one matrix product."""
    return weighted_returns(rewards, mask.double(), turn_counts, gamma)


def lagged_returns(rewards: Tensor, weights: Tensor, turn_counts: Tensor | None, gamma: float) -> Tensor:
    """R[b, t] = sum over d of weights[d] gamma^d r[b, t + d], ``weights`` (L,): a matrix product, in float64, since no
    running sum serves weights that are anything."""
    T = rewards.shape[1]
    by_lag = torch.zeros(T, dtype=torch.float64, device=rewards.device)
    count = min(T, len(weights))
    by_lag[:count] = weights[:count].double() * float(gamma) ** torch.arange(count, device=rewards.device).double()
    lags = torch.arange(T, device=rewards.device) - torch.arange(T, device=rewards.device)[:, None]
    return _product(rewards, torch.where(lags >= 0, by_lag[lags.clamp(min=0)], 0.0), turn_counts)


def weighted_returns(rewards: Tensor, weights: Tensor, turn_counts: Tensor | None, gamma: float) -> Tensor:
    """R[b, t] = sum over k of weights[t, k] gamma^(k-t) r[b, k], ``weights`` (T, T) float64."""
    turns = torch.arange(rewards.shape[1], device=rewards.device)
    lags = (turns - turns[:, None]).double()
    return _product(rewards, torch.where(weights != 0, weights * float(gamma) ** lags, 0.0), turn_counts)


def _product(rewards: Tensor, weights: Tensor, turn_counts: Tensor | None) -> Tensor:
    """R[b, t] = sum over k of weights[t, k] r[b, k], ``weights`` (T, T) float64; zero beyond the dialogue."""
    exists = _turns_of(rewards, turn_counts)
    returns = torch.where(exists, rewards, 0.0).double() @ weights.T
    return torch.where(exists, returns, 0.0).to(rewards.dtype)


def _turns_of(rewards: Tensor, turn_counts: Tensor | None) -> Tensor:
    """(B, T) bool, which turns there are."""
    B, T = rewards.shape
    return turn_mask(torch.full((B,), T, device=rewards.device) if turn_counts is None else turn_counts, T)
