"""One score per conversation, followed along its turns, as rewards per turn. What is maximised then is not always the
score."""

import warnings

import torch
from torch import Tensor

from ppg_fast.reference.turns import turn_mask
from ppg_fast.spec import require


def _check(scores: Tensor, turn_counts: Tensor | None) -> Tensor:
    """Which entries are turns, (B, T) bool; ValueError for wrong shapes and scores that are not finite."""
    require(
        isinstance(scores, Tensor) and scores.dim() == 2,
        "scores must be a (B, T) tensor",
        getattr(scores, "shape", scores),
    )
    require(scores.is_floating_point(), "scores must be floating point", scores.dtype)
    B, T = scores.shape
    counts = torch.full((B,), T) if turn_counts is None else turn_counts
    require(counts.shape == (B,), f"turn_counts must be ({B},)", tuple(counts.shape))
    exists = turn_mask(counts.to(scores.device), T)
    bad = exists & ~scores.isfinite()
    require(not bool(bad.any()), "scores must be finite", scores[bad][:1].tolist())
    return exists


def telescoping_rewards(scores: Tensor, turn_counts: Tensor | None = None, start: float = 0.0) -> Tensor:
    """r_t = f_t - f_{t-1} with f_0 = ``start``: rewards that sum to the last score, whatever the scores before it were.

    ``scores`` (B, T) floating point, f_t = the conversation's score after turn t; ``turn_counts`` (B,), default T.
    Returns (B, T) of the same dtype, zero beyond the dialogue. A score that falls gives a negative reward, which voids
    the bound of offline training: a warning says how many. Credited with a short window, a turn is credited for
    its own step of the score and not for what it leads to.
    """
    exists = _check(scores, turn_counts)
    before = torch.cat([scores.new_full((len(scores), 1), start), scores[:, :-1]], 1)
    rewards = torch.where(exists, scores - before, 0.0)
    if negative := int((rewards < 0).sum()):
        seen = f"{negative} of {int(exists.sum())} telescoping rewards are negative"
        warnings.warn(f"{seen}: offline, reward-weighted likelihood is no lower bound any more", stacklevel=2)
    return rewards


def prefix_maximum_rewards(scores: Tensor, turn_counts: Tensor | None = None, start: float = 0.0) -> Tensor:
    """r_t = max(f_0 .. f_t) - max(f_0 .. f_{t-1}) with f_0 = ``start``: never negative, and they sum to the best score
    of all.

    Arguments and result as `telescoping_rewards`. What is maximised is max f - f_0 and not the last score: a
    conversation that reaches a good score and loses it again keeps its rewards. A warning says in how many dialogues
    the two differ.
    """
    exists = _check(scores, turn_counts)
    lowest = torch.finfo(scores.dtype).min
    running = (
        torch.cat([scores.new_full((len(scores), 1), start), torch.where(exists, scores, lowest)], 1).cummax(1).values
    )
    rewards = torch.where(exists, running.diff(dim=1), 0.0)
    counts = exists.sum(1)
    last = scores.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
    other = int(((rewards.sum(1) + start - last).abs() > 1e-6 * (1 + last.abs()))[counts > 0].sum())
    if other:
        seen = f"in {other} of {len(scores)} dialogues the best score is not the last one"
        warnings.warn(f"{seen}: prefix-maximum rewards sum to the best, which is another objective", stacklevel=2)
    return rewards


DECOMPOSITIONS = {"telescoping": telescoping_rewards, "prefix_maximum": prefix_maximum_rewards}
