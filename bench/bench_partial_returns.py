"""partial_returns: windowed returns of 1,000 dialogues; linear in the turns, whatever the window."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ppg_fast import reference
from ppg_fast.functional import partial_returns
from ppg_fast.policy_classes import FullPlanning, PolicyClass, Segment, policy_class

from . import ceilings as limits
from .problem import Case, relative_error
from .providers import Provider, Providers, Unavailable, gather, our_backends
from .timing import Contestant

WINDOWS = ("greedy", "lookahead:3", "lookahead:100", "segment:10", "full")
GAMMA = 0.99


@dataclass
class Dialogues:
    """Rewards (B, T) of dialogues of turn_counts (B,) turns; ``mask`` (T, T): which rewards the window credits a turn
    for."""

    rewards: Tensor
    turn_counts: Tensor
    window: PolicyClass
    mask: Tensor
    discounts: Tensor  # (T, T) float32, gamma^(k - t) where the mask is set


def cases(grid: str, device: str) -> list[Case]:
    """N dialogues of at most V turns: every window at one size, then one window at other lengths."""
    if grid == "quick":
        return [Case("partial_returns", 20, 30, variant=window, device=device) for window in WINDOWS]
    found = [Case("partial_returns", 1000, 500, variant=window, device=device) for window in WINDOWS]
    return found + [
        Case("partial_returns", 1000, turns, variant="lookahead:100", device=device) for turns in (250, 1000)
    ]


def make(case: Case, seed: int = 0) -> Dialogues:
    """Random rewards, dialogues of half to all of the turns."""
    generator = torch.Generator(case.device).manual_seed(seed)
    rewards = torch.randn(case.N, case.V, generator=generator, device=case.device)
    counts = torch.randint(case.V // 2, case.V + 1, (case.N,), generator=generator, device=case.device)
    window = policy_class(case.variant)
    turns = torch.arange(case.V, device=case.device)
    ahead = turns - turns[:, None]
    mask = (ahead >= 0) & (ahead < window.lookahead)
    if window.segment_length:
        mask &= turns // window.segment_length == (turns // window.segment_length)[:, None]
    discounts = torch.where(mask, GAMMA ** ahead.clamp(min=0).double(), 0.0).float()
    return Dialogues(rewards, counts, window, mask, discounts)


def _ours(case: Case) -> list[Provider]:
    """ppg_fast."""

    def using(backend: str) -> Callable[[Dialogues], Tensor]:
        return lambda d: partial_returns(d.rewards, d.window, GAMMA, d.turn_counts, backend=backend)

    return [Provider(f"ppg_fast {name}", using(name), "ours", forward_only=True) for name in our_backends(case)]


def _rewards_that_count(d: Dialogues) -> tuple[Tensor, Tensor]:
    exists = torch.arange(d.rewards.shape[1], device=d.rewards.device) < d.turn_counts[:, None]
    return torch.where(exists, d.rewards, 0.0), exists


def _matrix(case: Case) -> Provider:
    """PyTorch, one product with a (T, T) matrix."""

    def compute(d: Dialogues) -> Tensor:
        rewards, exists = _rewards_that_count(d)
        return torch.where(exists, rewards @ d.discounts.t(), 0.0)

    return Provider("PyTorch, product with a (T, T) matrix", compute, forward_only=True)


def _windows(case: Case) -> Provider:
    """PyTorch, unfolded windows."""
    window = policy_class(case.variant)
    if window.lookahead >= case.V or window.segment_length:
        raise Unavailable("for a window of K rewards only")

    def compute(d: Dialogues) -> Tensor:
        rewards, exists = _rewards_that_count(d)
        K = d.window.lookahead
        powers = GAMMA ** torch.arange(K, dtype=torch.float32, device=rewards.device)
        return torch.where(exists, F.pad(rewards, (0, K - 1)).unfold(1, K, 1) @ powers, 0.0)

    return Provider("PyTorch, unfolded windows", compute, forward_only=True)


def _loop(case: Case) -> Provider:
    """PyTorch, loop over the turns."""
    window = policy_class(case.variant)
    if not isinstance(window, (FullPlanning, Segment)):
        raise Unavailable("the recursion R = r + gamma R has no window")
    length = window.segment_length or case.V

    def compute(d: Dialogues) -> Tensor:
        rewards, exists = _rewards_that_count(d)
        out, carry = torch.empty_like(rewards), torch.zeros_like(rewards[:, 0])
        for turn in reversed(range(rewards.shape[1])):
            carry = rewards[:, turn] + (GAMMA * carry if (turn + 1) % length else 0.0)
            out[:, turn] = carry
        return torch.where(exists, out, 0.0)

    return Provider("PyTorch, loop over the turns", compute, forward_only=True)


def participants(case: Case) -> Providers:
    """Ours and what one would write in PyTorch."""
    return gather([_ours, _matrix, _windows, _loop], case)


def ceilings(problem: Dialogues, case: Case) -> list[Contestant]:
    """1R + 1W of the rewards."""
    return limits.copy_of(problem.rewards)


def ceiling_of(provider: Provider) -> tuple[str, ...]:
    """Names of the ceilings."""
    return ("copy",)


def checker(problem: Dialogues, case: Case) -> Callable[[Any], dict[str, float]]:
    """Errors against float64."""
    truth = reference.masked_returns(problem.rewards.double(), problem.mask, problem.turn_counts, GAMMA)
    return lambda result: {"returns": relative_error(result, truth)}


def work(case: Case) -> dict[str, float]:
    """Bytes that have to move."""
    return {"bytes": 8 * case.N * case.V}
