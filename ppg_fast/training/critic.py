"""What the return of a turn is expected to be, learned beside the policy without a second model or pass: a mean per
turn index, and a ridge regression on what the policy itself sees before it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ppg_fast.dialogues.packing import PackedBatch
from ppg_fast.distributed import Ranks
from ppg_fast.functional import partial_returns, turn_advantages
from ppg_fast.policy_classes import FullPlanning
from ppg_fast.training.experience import KEPT
from ppg_fast.training.metrics import turn_ranges
from ppg_fast.training.objective import Objective, of_values
from ppg_fast.training.passes import Pass, of_all

MOST_HIDDEN = 256  # numbers of a hidden state that are regressed on; a wider one is projected, at random, on as many
LAST_REWARDS = 3  # of the turns before, each a number of its own beside the sum of all before
PRIOR = 4.0  # ridge, in features per turn seen: right where they explain a fifth of the variance, (1 - 0.2) / 0.2


def rewards_before(batch: PackedBatch) -> Tensor:
    """(S, T, LAST_REWARDS + 1) float64: the sum of the rewards before each turn, then the last ones; each minus the
    mean of the others of its group that reach the turn, on which no answer of its own has any influence."""
    rewards = torch.where(batch.turn_mask, batch.rewards, 0.0).double()
    sums = [rewards.cumsum(1) - rewards]
    lags = [torch.nn.functional.pad(rewards, (lag, 0))[:, : rewards.shape[1]] for lag in range(1, LAST_REWARDS + 1)]
    centred = [turn_advantages(one, batch.group_ids, "leave_one_out", batch.turn_counts) for one in sums + lags]
    return torch.stack(centred, -1).double()


def first_tokens(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Positions (M,) that predict the first token of each turn that is read, and those turns, (M,) of S T: what the
    model has seen there is all that came before the turn's answer."""
    S, T = batch.rewards.shape
    read = batch.turn_ids >= 0
    at = torch.arange(len(batch.tokens), device=batch.tokens.device)
    turns = (batch.dialogue_ids * T + batch.turn_ids)[read]
    none = len(batch.tokens)
    first = torch.full((S * T,), none, device=at.device).scatter_reduce(0, turns, at[read], "amin")
    there = (first < none).nonzero()[:, 0]
    return first[there], there


@dataclass
class Reading:
    """The critic's part of one pass, asked on the way from its hidden states to the loss."""

    critic: "Critic"
    one: Pass
    rewards: Tensor  # (S, T, ...) of the pass's dialogues, as `rewards_before`
    objective: Objective
    features: Tensor | None = None  # (M, F) float64 of
    turns: Tensor | None = None  # (M,) turns that are read
    foretold: Tensor | None = None  # (S, T) float64: what the return will have beyond the mean

    def complete(self, hidden: Tensor) -> Tensor:
        """The advantages (S, T) of the pass, completed; ``hidden`` (N, D) is a constant."""
        one, shape = self.one, self.one.advantages.shape
        at, turns = first_tokens(one.batch)
        self.turns = turns.cpu()
        self.features = self.critic.features(hidden[at].cpu(), self.rewards.flatten(0, 1)[self.turns])
        found = torch.zeros(shape.numel(), dtype=torch.float64)
        found[self.turns] = self.critic.foretell(self.features)
        self.foretold = torch.where(found.isfinite(), found, 0.0).view(shape)  # else the loss is not finite either
        counts = one.batch.turn_counts.cpu()
        correction = of_values(torch.zeros(shape), self.foretold, counts, None, self.objective)
        one.advantages, one.complete = one.advantages + correction.to(one.advantages.device), None
        return one.advantages


@dataclass
class Lesson:
    """What one step teaches: sums over its turns, on all ranks the same."""

    moments: Tensor  # (F + 2, F + 2) float64, of z z^T with z = features, 1, centred return
    reached: Tensor  # (T,) float64: dialogues that reach each turn, and
    totals: Tensor  # (T,) float64: the sum of their returns there


class Critic:
    """V_t = mean return of turn index t + w . features, both of past steps only, forgotten by KEPT a step.

    The features are the hidden state before the turn's first token and the `rewards_before`. The target is what the
    return has beyond the other rollouts of its group, so that the regression need not learn what the group tells
    already. Nothing but the ridge shrinks it: a factor below 1, right for a forecast, would take from the credit that a
    bootstrap carries.
    """

    def __init__(self) -> None:
        self.moments: Tensor | None = None
        self.reached, self.totals = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        self._weights: Tensor | None = None  # (F + 1,), of the moments

    @property
    def means(self) -> list[float]:
        """The mean return from each turn index on; of one that no dialogue has reached 0."""
        return (self.totals / self.reached.clamp(min=1e-300)).tolist()

    def features(self, hidden: Tensor, rewards: Tensor) -> Tensor:
        """(M, F) float64 of hidden states (M, D) and rewards so far (M, LAST_REWARDS + 1)."""
        hidden = hidden.double()
        D = hidden.shape[1]
        if D > MOST_HIDDEN:
            hidden = hidden @ projection(D)
        return torch.cat([hidden, rewards], 1)

    def foretell(self, features: Tensor) -> Tensor:
        """(M,) float64: what the return will have beyond the mean of the group."""
        if self._weights is None:
            return features.new_zeros(len(features))
        return features @ self._weights[:-1] + self._weights[-1]

    def targets(self, batch: PackedBatch, objective: Objective) -> tuple[Tensor, Tensor]:
        """(S, T) each: the returns to foretell, to the end where they are bootstrapped, and what is centred."""
        policy_class = objective.policy_class if objective.gae_lambda is None else FullPlanning()
        returns = partial_returns(batch.rewards, policy_class, objective.gamma, batch.turn_counts)
        groups = batch.group_ids
        return returns, turn_advantages(returns, groups, "leave_one_out", batch.turn_counts, alone="other_groups")

    def read_with(self, passes: Sequence[Pass], batch: PackedBatch, objective: Objective) -> list[Reading]:
        """Have the next backward pass over ``batch`` complete the advantages; what it reads is in the readings."""
        rewards = rewards_before(batch)
        readings = [Reading(self, one, rewards[list(one.dialogues)], objective) for one in passes if one.dialogues]
        for reading in readings:
            # a method: FSDP2 walks through dataclasses, and a pass that held this one would be a circle
            reading.one.complete = reading.complete
        return readings

    def lesson(
        self,
        readings: Sequence[Reading],
        passes: Sequence[Pass],
        batch: PackedBatch,
        objective: Objective,
        ranks: Ranks,
    ) -> dict[str, Any]:
        """What a step that was read teaches, ``lesson``, and the metrics of how well it had been foretold. All ranks
        call it."""
        returns, centred = (values.double() for values in self.targets(batch, objective))
        of_pass = {id(reading.one): reading.foretold for reading in readings}
        foretold = of_all(passes, [of_pass.get(id(one)) for one in passes], batch, ranks)
        there = batch.turn_mask
        own = []
        for reading in readings:
            assert reading.features is not None
            assert reading.turns is not None
            y = centred[list(reading.one.dialogues)].flatten()[reading.turns]
            own.append(torch.cat([reading.features, torch.ones_like(y)[:, None], y[:, None]], 1))
        z = torch.cat(own) if own else None
        found = [part for part in ranks.gather(None if z is None else z.T @ z) if part is not None]
        moments = torch.stack(found).sum(0) if found else torch.zeros(0, 0, dtype=torch.float64)
        lesson = Lesson(moments, there.sum(0).double(), torch.where(there, returns, 0.0).sum(0))
        return {"lesson": lesson, **explained(centred, foretold, there)}

    def take_in(self, lesson: Lesson) -> None:
        """Learn from a step that was taken; not from one whose sums float64 cannot hold."""
        if not all(sums.isfinite().all() for sums in vars(lesson).values()):
            return
        if lesson.moments.numel():
            self.moments = lesson.moments if self.moments is None else KEPT * self.moments + lesson.moments
        more = max(len(self.reached), len(lesson.reached))
        longer = lambda sums: torch.nn.functional.pad(sums, (0, more - len(sums)))  # noqa: E731
        self.reached = KEPT * longer(self.reached) + longer(lesson.reached)
        self.totals = KEPT * longer(self.totals) + longer(lesson.totals)
        self._weights = None if self.moments is None else ridge(self.moments)

    def state_dict(self) -> dict[str, Any]:
        """The sums: all that is learned follows from them."""
        return {name: getattr(self, name) for name in ("moments", "reached", "totals")}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for name, value in saved.items():
            setattr(self, name, value)
        self._weights = None if self.moments is None else ridge(self.moments)


@cache
def projection(width: int) -> Tensor:
    """(width, MOST_HIDDEN) float64 of random numbers that are always the same."""
    drawn = torch.randn(width, MOST_HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn / width**0.5


def ridge(moments: Tensor) -> Tensor:
    """(F + 1,) float64: weights and constant of the ridge regression whose sums of z z^T, z = features, 1, target, are
    ``moments`` (F + 2, F + 2). Features are standardised first; one that never varies has weight 0."""
    F = len(moments) - 2
    count = moments[F, F]
    means = moments[F] / count
    covariance = moments / count - torch.outer(means, means)
    variance = covariance.diagonal()[:F]
    scale = torch.where(variance > 1e-12 * (1e-12 + means[:F].square()), variance.clamp(min=1e-300).rsqrt(), 0.0)
    correlation = covariance[:F, :F] * torch.outer(scale, scale)
    penalty = (PRIOR * F / count) * torch.eye(F, dtype=torch.float64)
    weights = scale * torch.linalg.solve(correlation + penalty, covariance[:F, F + 1] * scale)
    return torch.cat([weights, (means[F + 1] - weights @ means[:F])[None]])


def explained(targets: Tensor, foretold: Tensor, turn_mask: Tensor) -> dict[str, float]:
    """value/explained_variance, 1 - Var(target - foretold) / Var(target) over the turns (S, T) that exist, and by turn
    index; none of turns whose target does not vary."""
    found: dict[str, float] = {}

    def note(name: str, first: int, end: int) -> None:
        there = turn_mask[:, first:end]
        y, left = (values[:, first:end][there] for values in (targets, targets - foretold))
        if len(y) > 1 and float(variance := y.var()) > 0:
            found[name] = float(1 - left.var() / variance)

    note("value/explained_variance", 0, turn_mask.shape[1])
    reached = turn_mask.any(0).sum()
    for label, first, end in turn_ranges(int(reached)):
        note(f"value/explained_variance/{label}", first, end)
    return found
