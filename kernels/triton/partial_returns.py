"""Discounted returns inside a window, one launch for a whole batch.

Mirrors ppg_fast/reference/partial_returns.py and csrc/*/partial_returns.*
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row import on_device

BLOCK = 128  # turns of one program


@triton.jit(do_not_specialize=["rewards", "segment_ids", "turn_counts", "returns", "T", "lookahead", "segment_length"])
def partial_returns_kernel(
    rewards, segment_ids, turn_counts,  # (B, T), (B, T) or None, (B,) or None
    returns,  # (B, T) out
    T, lookahead, segment_length, gamma,  # lookahead and segment_length in [1, T]; segment_length None: off
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_T turns of one dialogue: Horner's rule down the window of each, last reward first."""
    blocks = tl.cdiv(T, BLOCK_T)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    count = T
    if turn_counts is not None:
        count = tl.load(turn_counts + b).to(tl.int32)
    end = tl.minimum(t + lookahead, count)
    if segment_length is not None:
        end = tl.minimum(end, (t // segment_length + 1) * segment_length)
    here = t < count
    if segment_ids is not None:
        segment = tl.load(segment_ids + b * T + t, mask=here, other=0)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for back in range(lookahead):
        k = t + (lookahead - 1 - back)
        inside = k < end
        if segment_ids is not None:
            inside = inside & (tl.load(segment_ids + b * T + k, mask=inside, other=0) == segment)
        reward = tl.load(rewards + b * T + k, mask=inside, other=0.0)
        total = tl.where(inside, reward + gamma * total, total)
    tl.store(returns + b * T + t, total, mask=t < T)


def partial_returns(
    rewards: Tensor,  # (B, T) float32
    segment_ids: Tensor | None,  # (B, T) int64
    turn_counts: Tensor | None,  # (B,) int64
    lookahead: int,
    segment_length: int,
    gamma: float,
) -> Tensor:
    """R[b, t] = sum over k = t .. end - 1 of gamma^(k-t) r[b, k], (B, T) float32; zero beyond the dialogue.

    end is the smallest of t + ``lookahead``, the end of t's segment and the end of the dialogue, as in reference/partial_returns.py.
    """
    B, T = rewards.shape
    returns = torch.empty(B, T, dtype=torch.float32, device=rewards.device)
    if returns.numel():
        segment_length = min(segment_length, T)
        with on_device(rewards):
            partial_returns_kernel[(B * triton.cdiv(T, BLOCK),)](
                rewards.contiguous(), None if segment_ids is None else segment_ids.contiguous(), turn_counts, returns,
                T, min(lookahead, segment_length or T, T), segment_length or None, float(gamma), BLOCK_T=BLOCK, num_warps=4,
            )  # fmt: skip
    return returns
