"""Discounted returns inside a window, one launch for a whole batch.

Mirrors ppg_fast/reference/partial_returns.py and csrc/*/partial_returns.*
"""

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plan import on_device

BLOCK = 128  # turns of one program
STEPS = tl.constexpr(4)  # rewards that are loaded at once


@triton.jit
def double(high, low):
    """The float64 number that `split` took apart: Triton passes numbers as float32, which does not hold 0.9."""
    return tl.zeros((), tl.float64) + high + low


@triton.jit
def window_end(t, lookahead, segment_length, count):
    """One past the last turn of the window of turn t; segments by ids are left to `window_return`."""
    end = tl.minimum(t + lookahead, count)
    if segment_length is not None:
        end = tl.minimum(end, (t // segment_length + 1) * segment_length)
    return end


@triton.jit
def window_return(rewards, segment_ids, row, t, has_turn, end, longest, gamma):
    """Returns of turns t of the dialogues at ``row``, by Horner's rule from the last reward, in float64; one of t and
    row is a vector.

    ``has_turn``: whether the dialogue has a turn t. ``longest``: upper bound on the length of the windows.
    """
    if segment_ids is not None:
        segment = tl.load(segment_ids + row + t, mask=has_turn, other=0)
    total = has_turn.to(tl.float64) * 0.0
    last = t + tl.cdiv(longest, STEPS) * STEPS - 1
    for back in range(0, longest, STEPS):
        for step in tl.static_range(STEPS):
            k = last - back - step
            inside = has_turn & (k < end)
            if segment_ids is not None:
                inside = inside & (tl.load(segment_ids + row + k, mask=inside, other=0) == segment)
            reward = tl.load(rewards + row + k, mask=inside, other=0.0).to(tl.float64)
            total = tl.where(inside, reward + gamma * total, total)
    return total


@triton.jit(do_not_specialize=["rewards", "segment_ids", "turn_counts", "returns", "T", "lookahead", "segment_length"])
def partial_returns_kernel(
    rewards, segment_ids, turn_counts,  # (B, T), (B, T) or None, (B,) or None
    returns,  # (B, T) out
    T, lookahead, segment_length, gamma, gamma_low,  # lookahead and segment_length in [1, T]; segment_length None: off
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_T turns of one dialogue."""
    blocks = tl.cdiv(T, BLOCK_T)
    row = (tl.program_id(0) // blocks).to(tl.int64) * T
    t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    count = T
    if turn_counts is not None:
        count = tl.load(turn_counts + tl.program_id(0) // blocks).to(tl.int32)
    end = window_end(t, lookahead, segment_length, count)
    total = window_return(rewards, segment_ids, row, t, t < count, end, lookahead, double(gamma, gamma_low))
    tl.store(returns + row + t, total.to(tl.float32), mask=t < T)


def split(number: float) -> tuple[float, float]:
    """A number as the sum of two float32: 48 bits."""
    high = ctypes.c_float(number).value
    return high, float(number) - high


def window(T: int, lookahead: int, segment_length: int) -> tuple[int, int | None]:
    """Lookahead and segment length as the kernels take them: in [1, T]; no segments: None."""
    segment_length = min(segment_length, T)
    return min(lookahead, segment_length or T, T), segment_length or None


def partial_returns(
    rewards: Tensor,  # (B, T) float32
    segment_ids: Tensor | None,  # (B, T) int64
    turn_counts: Tensor | None,  # (B,) int64
    lookahead: int,
    segment_length: int,
    gamma: float,
) -> Tensor:
    """R[b, t] = sum over k = t .. end - 1 of gamma^(k-t) r[b, k], (B, T) float32; zero beyond the dialogue.

    end is the smallest of t + ``lookahead``, the end of t's segment and the end of the dialogue, as in
    reference/partial_returns.py.
    """
    B, T = rewards.shape
    returns = torch.empty(B, T, dtype=torch.float32, device=rewards.device)
    if returns.numel():
        with on_device(rewards):
            partial_returns_kernel[(B * triton.cdiv(T, BLOCK),)](
                rewards.contiguous(), None if segment_ids is None else segment_ids.contiguous(), turn_counts, returns,
                T, *window(T, lookahead, segment_length), *split(gamma), BLOCK_T=BLOCK, num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip
    return returns
