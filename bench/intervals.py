"""What the rounds of a run leave open: ratios of medians with a 95 % interval from rounds drawn again (bootstrap)."""

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
LEAST = 6  # rounds: all of fewer lie on one side of the true median once in sixteen times, or more often


class Between(NamedTuple):
    """A quotient of peaks of memory, and the least and the largest of single processes."""

    value: float
    low: float
    high: float


Drawn = NDArray[np.float64]  # (1 + DRAWS,): a number from all rounds, then from each draw of them; NaN: not known


def medians(entry: dict[str, Any], kept: Sequence[bool] | None = None) -> Drawn:
    """The median seconds of an entry of a result file, or of those of its rounds that are kept; the draws are NaN below
    `LEAST` rounds.

    Entries of one case with as many rounds have the rounds of a draw in common: what slowed a round slowed all in it.
    """
    data, median = entry["stats"].get("data", ()), entry["stats"]["median"]
    if kept is not None:
        data = [seconds for seconds, keep in zip(data, kept, strict=True) if keep]
        median = float(np.median(data)) if data else median
    return _medians(entry["group"], tuple(data), median)


@lru_cache(4096)
def _medians(group: str, seconds: Sequence[float], median: float) -> Drawn:
    n, found = len(seconds), np.full(1 + DRAWS, np.nan)
    if n >= LEAST:
        stream = np.random.RandomState(zlib.crc32(f"{group} {n}".encode()))  # the same in every numpy
        found[1:] = np.median(np.array(seconds)[stream.randint(0, n, (DRAWS, n))], axis=1)
    found[0] = median
    found.flags.writeable = False  # it is cached
    return found


def over(above: Drawn | None, below: Drawn | None) -> Drawn | None:
    """Their quotient, not known where the divisor is not above 0; None where either was not measured."""
    if above is None or below is None or not below[0] > 0:
        return None
    return np.divide(above, below, out=np.full(1 + DRAWS, np.nan), where=below > 0)


def interval(values: Drawn | Between) -> tuple[float, float] | None:
    """The middle 95 % of the draws; None where one of them is not known."""
    if isinstance(values, Between):
        return values.low, values.high
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return None if np.isnan(low) else (float(low), float(high))


def verdict(values: Drawn | Between, bar: float) -> bool | None:
    """Whether the number is at most ``bar``; None: the rounds do not say."""
    between = interval(values)
    if between is None or between[0] <= bar < between[1]:
        return None
    return between[1] <= bar
