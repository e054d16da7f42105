"""What soft Q-learning remembers of earlier steps: their dialogues, and what was earned from each turn index on."""

import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ppg_fast.dialogues.packing import Sample
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
        there = turn_mask(turn_counts, rewards.shape[1])
        found: list[float] = []
        later = torch.zeros(len(rewards), dtype=torch.float64)  # float32 could not hold the sum of what it holds
        for own, reached in zip(rewards.double().T.flip(0), there.T.flip(0), strict=True):
            later = torch.where(reached, own + self.gamma * later, 0.0)
            if reached.any():
                found.insert(0, float(later.sum() / reached.sum()))
        known = [KEPT * old + (1 - KEPT) * new for old, new in zip(self.means, found, strict=False)]
        return known + self.means[len(known) :] + found[len(known) :]

    def take_in(self, samples: Sequence[Sample], means: Sequence[float]) -> None:
        """Remember a step that was taken, and the means that it was taken with."""
        self.kept = [*self.kept, list(samples)][-self.steps :] if self.steps else []
        self.means = list(means)

    def state_dict(self) -> dict[str, Any]:
        """Both, in plain types."""
        return {"kept": [[asdict(sample) for sample in samples] for samples in self.kept], "means": list(self.means)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.kept = [[Sample(**sample) for sample in samples] for samples in saved["kept"]]
        self.means = list(saved["means"])
