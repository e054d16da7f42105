"""Discounted returns inside a window, as a plain loop: slow, obvious, right.

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
    B, T = rewards.shape
    returns = torch.zeros_like(rewards)
    for b in range(B):
        count = T if turn_counts is None else int(turn_counts[b])
        for t in range(count):
            for k in range(t, min(count, t + lookahead)):
                if segment_length and k // segment_length != t // segment_length:
                    break
                if segment_ids is not None and segment_ids[b, k] != segment_ids[b, t]:
                    break
                returns[b, t] += gamma ** (k - t) * rewards[b, k]
    return returns


def masked_returns(rewards: Tensor, mask: Tensor, turn_counts: Tensor | None, gamma: float) -> Tensor:
    """R[b, t] = sum over k with mask[t, k] of gamma^(k-t) r[b, k]: any subset of the rewards, as one matrix product."""
    B, T = rewards.shape
    turns = torch.arange(T, device=rewards.device)
    exists = turn_mask(torch.full((B,), T, device=rewards.device) if turn_counts is None else turn_counts, T)
    discount = torch.where(mask, float(gamma) ** (turns - turns[:, None]).double(), 0.0)
    returns = torch.where(exists, rewards, 0.0).double() @ discount.T
    return torch.where(exists, returns, 0.0).to(rewards.dtype)
