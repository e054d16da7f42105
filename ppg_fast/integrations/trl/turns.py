"""Turns of TRL's rollouts: which completion token belongs to which turn, and which turn has which reward."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppg_fast.functional import partial_returns, turn_advantages
from ppg_fast.integrations.turns import spread
from ppg_fast.policy_classes import PolicyClass, RewardMask
from ppg_fast.spec import require

Rewards = Sequence[float | None]  # of the turns of one rollout; None = not scored


def turns_of_ids(given: Sequence[Sequence[int]], mask: Tensor) -> Tensor:
    """Explicit turn ids, one list a rollout, as (B, C); ValueError where a token that is trained has none."""
    turns = torch.full(mask.shape, -1, dtype=torch.int64)
    for row, ids in enumerate(given):
        require(
            len(ids) <= mask.shape[1],
            f"turn_ids must hold one id per completion token, at most {mask.shape[1]}",
            len(ids),
        )
        turns[row, : len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
    turns = turns.to(mask.device)
    bare = ((mask != 0) & (turns < 0)).nonzero()
    rule = "turn_ids must name a turn >= 0 for every token the mask trains"
    require(not len(bare), f"{rule}; rollout and token without one", tuple(bare[0].tolist()) if len(bare) else None)
    return torch.where(mask != 0, turns, -1)


def rewards_of_turns(given: Rewards | None, scalar: float, turns: int, *, every_turn: bool) -> Rewards:
    """The rewards of one rollout's turns: those given, or the scalar reward on the last turn where none is scored.

    ``turns`` found in the mask, 0 where the whole rollout is masked: its rewards still count for the group.
    ``every_turn``: the list must cover all turns; an environment's may leave the last ones out, as a final message that
        calls no tool. ValueError where it does not fit.
    """
    if given is None or all(r is None for r in given):
        last = None if math.isnan(scalar) else scalar
        return [None] * (max(turns, 1, len(given or ())) - 1) + [last]
    fits = turns == 0 or len(given) == turns or (not every_turn and len(given) < turns)
    rule = f"turn rewards must be one per turn, {turns} found in the mask (turn_ids tell turns apart that touch)"
    require(fits, rule, f"{len(given)} rewards")
    return [*given, *[None] * (turns - len(given))]


def advantages_of_turns(
    rewards: Sequence[Rewards], group_size: int, policy_class: PolicyClass, gamma: float, baseline: str, std_eps: float
) -> tuple[Tensor, Tensor]:
    """Advantages (B, T) float32 and turn counts (B,) of all rollouts, groups of ``group_size`` in a row.

    A turn that is not scored has reward 0; a rollout with none that is takes no part: advantage 0, and no part in any
    baseline.
    """
    counts = torch.tensor([len(r) if any(x is not None for x in r) else 0 for r in rewards])
    longest = policy_class.mask.shape[0] if isinstance(policy_class, RewardMask) else max(len(r) for r in rewards)
    require(
        int(counts.max()) <= longest,
        f"rollouts must have at most the turns of the RewardMask, {longest}",
        int(counts.max()),
    )
    table = torch.zeros(len(rewards), longest)
    for row, given in enumerate(rewards):
        for turn, reward in enumerate(given):
            table[row, turn] = 0.0 if reward is None else float(reward)
    returns = partial_returns(table, policy_class, gamma, counts)
    groups = torch.arange(len(rewards)) // group_size
    return turn_advantages(returns, groups, baseline, counts, std_eps=std_eps), counts


def advantages_of_tokens(advantages: Tensor, turns: Tensor) -> Tensor:
    """Each token gets its turn's advantage: (B, T) and the turns (B, C) of its tokens -> (B, C), 0 where a token is no
    action."""
    return spread(advantages, torch.where(turns < advantages.shape[1], turns, -1))


def total_turn_reward(
    prompts: list[Any],
    completions: list[Any],
    *,
    environments: list[Any] | None = None,
    key: str = "turn_rewards",
    **columns: Any,
) -> list[float | None]:
    """A reward function of TRL: the sum of the turn rewards of each rollout, for the log; None where no turn is scored.

    Args:
        prompts, completions: of the rollouts, as TRL passes them.
        environments: of the rollouts, with an attribute ``key``; else ``columns[key]`` is the list that
            ``rollout_func`` gave.
    """
    column = columns.get(key) or [
        getattr(environment, key, None) for environment in environments or [None] * len(completions)
    ]
    scored = [[float(r) for r in given or () if r is not None] for given in column]
    return [math.fsum(rewards) if rewards else None for rewards in scored]


class TurnAdvantages(list[float]):
    """The advantages of one rollout's turns in the completions table, where TRL formats one number with two
    decimals."""

    def __format__(self, spec: str) -> str:
        return " ".join(format(value, spec) for value in self)
