"""What soft Q-learning remembers of earlier steps: their dialogues, and what was earned from each turn index on."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ppg_fast.dialogues.packing import Sample
from ppg_fast.functional import partial_returns
from ppg_fast.policy_classes import FullPlanning
from ppg_fast.reference.turns import turn_mask

KEPT = 0.9  # of the running means, a step


class Experience:
    """The dialogues of the last ``steps`` steps, and ``means``: c_t, the running mean of the return from turn t on.

    Only steps that were taken are remembered: a reward that no loss could hold would stay in both. All ranks hold the
    same.
    """

    def __init__(self, steps: int, gamma: float = 1.0) -> None:
        self.steps, self.gamma = steps, gamma
        self.kept: list[list[Sample]] = []  # oldest first
        self.means: list[float] = []

    def draw(self, step: int, count: int) -> list[Sample]:
        """Up to ``count`` remembered dialogues without replacement: a function of the step and of what is remembered,
        so that a resumed run draws what the whole one does."""
        pool = [sample for samples in self.kept for sample in samples]
        return random.Random(f"replay {step}").sample(pool, min(count, len(pool)))

    def means_with(self, rewards: Tensor, turn_counts: Tensor) -> list[float]:
        """`means` after dialogues with ``rewards`` (S, T) of ``turn_counts`` (S,) turns, which are not remembered yet;
        a turn index that no dialogue had reached begins with their mean."""
        if not len(rewards):
            return list(self.means)
        returns = partial_returns(rewards, FullPlanning(), gamma=self.gamma, turn_counts=turn_counts)
        reached = turn_mask(turn_counts, rewards.shape[1]).sum(0).tolist()
        found = [total / n for total, n in zip(returns.double().sum(0).tolist(), reached, strict=True) if n]
        known = [KEPT * old + (1 - KEPT) * new for old, new in zip(self.means, found, strict=False)]
        return known + self.means[len(known) :] + found[len(known) :]

    def take_in(self, samples: Sequence[Sample], means: list[float]) -> None:
        """Remember a step that was taken, and the means that it was taken with."""
        self.kept = [*self.kept, list(samples)][-self.steps :] if self.steps else []
        if all(map(math.isfinite, means)):
            self.means = means

    def state_dict(self) -> dict[str, Any]:
        """Both, in plain types."""
        return {"kept": [[asdict(sample) for sample in samples] for samples in self.kept], "means": list(self.means)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.kept = [[Sample(**sample) for sample in samples] for samples in saved["kept"]]
        self.means = list(saved["means"])
