"""Noise like that of real verdicts: how the rewards of logged dialogues vary, turn by turn and from turn to turn."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ppg_fast.dialogues.dialogue import read_dialogues
from ppg_fast.rollouts.problems import Problem
from ppg_fast.spec import require

LAGS = 12  # turns of the longest problem


def covariances(files: Sequence[str]) -> tuple[float, ...]:
    """Of two rewards d turns apart, d = 0, 1, ..., each minus the mean of its turn over the dialogues of its file: the
    mean over all pairs of all files.

    What answers cause is in it, so noise alone has at most as much. ValueError for a file in which no turn was scored
    in two dialogues.
    """
    sums, counts = np.zeros(LAGS), np.zeros(LAGS)
    for name in files:
        rows = [d.turn_rewards for d in read_dialogues(name)]
        table = np.full((len(rows), max(map(len, rows))), np.nan)
        for row, rewards in zip(table, rows, strict=True):
            row[: len(rewards)] = [np.nan if reward is None else reward for reward in rewards]
        before = counts[0]
        for d in range(min(LAGS, table.shape[1])):
            for one, other in zip(table.T, table.T[d:], strict=False):
                both = ~(np.isnan(one) | np.isnan(other))
                if both.sum() > 1:
                    products = (one[both] - one[both].mean()) * (other[both] - other[both].mean())
                    sums[d] += products.sum() * both.sum() / (both.sum() - 1)
                    counts[d] += both.sum()
        require(counts[0] > before, "noise_of must be files with a turn that two dialogues have scores of", name)
    return tuple(round(float(c), 5) for c in sums / np.maximum(counts, 1))


def with_noise_like(of: Problem, by_lag: Sequence[float]) -> Problem:
    """``of`` with Gaussian noise of the covariances ``by_lag``, or of the nearest that there are: eigenvalues below 0
    become 0."""
    lags = np.abs(np.subtract.outer(np.arange(of.turns), np.arange(of.turns)))
    values, vectors = np.linalg.eigh(np.asarray([*by_lag, *[0.0] * of.turns])[lags])
    factor = vectors * np.sqrt(values.clip(min=0))
    return replace(of, noise=tuple(map(tuple, factor.tolist())))
