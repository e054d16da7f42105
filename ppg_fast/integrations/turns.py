"""Turns as other trainers hold them: masks to turn ids, per-token rewards to rewards of turns, group names to numbers.

Bookkeeping only: returns and baselines come from `ppg_fast.functional`.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppg_fast.functional import partial_returns, turn_advantages
from ppg_fast.integrations.options import require_baseline
from ppg_fast.policy_classes import PolicyClass, policy_class
from ppg_fast.reference.turns import of_tokens
from ppg_fast.spec import require, require_number


@dataclass(frozen=True)
class Credit:
    """How turns are credited: the options of `partial_returns` and `turn_advantages`.

    ``policy_class``: a policy class or its name; ``gamma``: discount per turn in [0, 1]; ``baseline``: as in
    `turn_advantages`.
    """

    policy_class: PolicyClass | str = "full"
    gamma: float = 1.0
    baseline: str = "leave_one_out"

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy_class", policy_class(self.policy_class))
        require_number("gamma", self.gamma, 0.0, 1.0)
        require_baseline(self.baseline)

    def of_turns(self, rewards: Tensor, group_ids: Tensor | None, turn_counts: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards (B, T) of ``turn_counts`` (B,) turns -> advantages and returns, (B, T) float32 each, zero beyond the
        dialogue."""
        returns = partial_returns(rewards, self.policy_class, self.gamma, turn_counts)
        return turn_advantages(returns, group_ids, self.baseline, turn_counts), returns

    def of_tokens(self, token_rewards: Tensor, turn_ids: Tensor, group_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rewards of tokens (B, L) -> advantages and returns of the turn each token belongs to, (B, L) float32, zero
        outside of turns."""
        rewards, counts = rewards_of_turns(token_rewards, turn_ids), turn_counts(turn_ids)
        advantages, returns = self.of_turns(rewards, group_ids, counts)
        return spread(advantages, turn_ids), spread(returns, turn_ids)


def turn_ids_of_mask(mask: Tensor) -> Tensor:
    """The turn of each token, (B, L) int64, from an action mask (B, L): run n of its non-zeros is turn n, -1 elsewhere.

    Two turns without a token between them are one run: where the host knows its turns, pass ids instead.
    """
    require(
        isinstance(mask, Tensor) and mask.dim() == 2,
        "a mask of turns must be a (B, L) tensor",
        getattr(mask, "shape", mask),
    )
    active = mask != 0
    starts = active & ~torch.nn.functional.pad(active, (1, 0))[:, :-1]
    return torch.where(active, starts.cumsum(1) - 1, -1)


def inside(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` where the mask of their shape is not 0, else 0.

    By selection, because NaN times 0 is NaN; factors are selected before they multiply, because so is their gradient.
    """
    return torch.where(mask != 0, values, 0.0)


def turn_counts(turn_ids: Tensor) -> Tensor:
    """(B,) int64, the turns of each row of ``turn_ids`` (B, L)."""
    return turn_ids.amax(1) + 1 if turn_ids.shape[1] else turn_ids.new_zeros(turn_ids.shape[0])


def last_tokens(turn_ids: Tensor) -> Tensor:
    """(B, L) bool, whether a token is the last of its turn."""
    following = torch.nn.functional.pad(turn_ids, (0, 1), value=-1)[:, 1:]
    return (turn_ids >= 0) & (following != turn_ids)


def rewards_of_turns(token_rewards: Tensor, turn_ids: Tensor) -> Tensor:
    """The sum of the rewards of each turn, (B, T) float32 with T the most turns of a row and at least 1.

    A reward belongs to the turn of its token, and between turns (a tool's answer, say) to the turn before. Rewards of a
    row without turns are ignored; ValueError for one before the first turn of a row.
    """
    shape_is_valid = isinstance(token_rewards, Tensor) and token_rewards.shape == turn_ids.shape
    require(
        shape_is_valid,
        f"token rewards must have the shape of the mask, {tuple(turn_ids.shape)}",
        getattr(token_rewards, "shape", None),
    )
    if turn_ids.shape[1] == 0:
        return token_rewards.new_zeros(turn_ids.shape[0], 1).float()
    owner, counts = turn_ids.cummax(1).values, turn_counts(turn_ids)
    early = (owner < 0) & (counts > 0)[:, None] & (token_rewards != 0)
    require(
        not bool(early.any()),
        "a reward lies before the first turn of its row, at (row, token)",
        early.nonzero()[:1].tolist(),
    )
    owned = torch.where(owner >= 0, token_rewards.float(), 0.0)
    rewards = owned.new_zeros(turn_ids.shape[0], max(int(counts.max()), 1) if len(counts) else 1)
    return rewards.scatter_add(1, owner.clamp(min=0), owned)


def place_turn_rewards(turn_rewards: Sequence[Sequence[float | None]], turn_ids: Tensor) -> Tensor:
    """Rewards of turns on the last token of each turn, (B, L) float32: the inverse of `rewards_of_turns`.

    Args:
        turn_rewards: for each row one finite number per turn of ``turn_ids``; None counts as 0 (a turn that was not
            scored).
        turn_ids: (B, L), as from `turn_ids_of_mask`.

    Raises: ValueError where a row has another number of rewards than turns.
    """
    require(
        len(turn_rewards) == turn_ids.shape[0], f"turn rewards must have {turn_ids.shape[0]} rows", len(turn_rewards)
    )
    rewards = torch.zeros(turn_ids.shape, dtype=torch.float32, device=turn_ids.device)
    last, counts = last_tokens(turn_ids), turn_counts(turn_ids).tolist()
    for b, (row, count) in enumerate(zip(turn_rewards, counts, strict=True)):
        require(
            len(row) == count,
            f"row {b} has {count} turns and needs as many rewards (a truncated dialogue: drop the rest)",
            list(row),
        )
        values = [0.0 if r is None else float(r) for r in row]
        rewards[b, last[b]] = torch.tensor(values, dtype=torch.float32, device=turn_ids.device)
    return rewards


def spread(values: Tensor, turn_ids: Tensor) -> Tensor:
    """Values of turns (B, T) as values of tokens, (B, L): that of each token's turn, 0 where its id is -1."""
    rows = torch.arange(len(turn_ids), device=turn_ids.device)[:, None]
    return of_tokens(values, turn_ids, rows.expand_as(turn_ids))


def stacked(rows: Sequence[Sequence[float | None]]) -> tuple[Tensor, Tensor]:
    """Ragged rewards of turns as (B, T) float32, padded with zeros and None as 0, and their counts (B,) int64."""
    counts = [len(row) for row in rows]
    rewards = torch.zeros(len(rows), max([*counts, 1]))
    for b, row in enumerate(rows):
        rewards[b, : len(row)] = torch.tensor([0.0 if r is None else float(r) for r in row])
    return rewards, torch.tensor(counts, dtype=torch.int64)


def group_numbers(names: Iterable[Hashable] | None, device: torch.device) -> Tensor | None:
    """Names of groups (B,), any hashable such as verl's uid, as (B,) int64; None stays None."""
    if names is None:
        return None
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names], dtype=torch.int64, device=device)
