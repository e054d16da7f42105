"""Interleaved rounds: every contestant once a round, the order turned round each time, the caches emptied before each
call."""

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .core_clock import CoreClock, Cores, undisturbed
from .gpu_clock import Gpu, GpuClock
from .result_file import cpu_cache_bytes

GRAPH_ROUNDS = 10


@dataclass
class Contestant:
    """Something to be timed. ``before`` restores what ``call`` destroyed; it is outside of the clock, and so is
    dropping the result."""

    name: str
    kind: str  # "ours" | "peer" | "ceiling"
    call: Callable[[], Any]
    before: Callable[[], None] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pace:
    """How long to measure: ``rounds`` at most; a contestant that has used ``budget`` seconds leaves, after ``least``
    rounds, or after ``own`` if it is ours or a ceiling, whose ratio is what an aim is about. With ``alone`` that
    many of these must have been on undisturbed CPU cores, whatever the budget.

    One whose call takes longer than ``slow`` seconds is measured once, and not again where other rows are masked:
    `harness.measure`.
    """

    rounds: int
    budget: float
    least: int = 2
    slow: float = math.inf
    own: int = 0
    alone: int = 0


def cache_bytes(device: str) -> int:
    """Size of the largest cache: what has to be emptied between calls."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    return cpu_cache_bytes()


class Eviction:
    """Walks over memory twice the size of the largest cache, so that no call finds its inputs there."""

    def __init__(self, device: str) -> None:
        self.memory = torch.rand(2 * cache_bytes(device) // 4, device=device)

    def __call__(self) -> None:
        self.memory.neg_()


def interleave(
    contestants: Sequence[Contestant],
    pace: Pace,
    device: str,
    clock: Callable[[Callable[[], Any]], float] | None = None,
    gpu: Gpu | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call, by contestant, by the device's clock or another. All have been called before: nothing is
    compiled or first touched here.

    The facts take what the device's clock found beside them, `GpuClock.facts` and `CoreClock.facts`, and on a GPU, for
    ours and the ceilings, what a CUDA graph of the call takes.
    """
    seconds: dict[str, list[float]] = {c.name: [] for c in contestants}
    if device == "cuda" and clock is None and gpu is None:
        gpu = Gpu(Eviction(device))
    evict = gpu.evict if gpu else Eviction(device)
    new: Callable[[], Any] = partial(GpuClock, gpu) if gpu else partial(_prepared, clock)
    if not gpu and clock is None:
        new = partial(CoreClock, Cores())
    clocks = {c.name: new() for c in contestants}
    prepare = {c.name: _preparing(c, evict) for c in contestants}
    gc.collect()
    gc.disable()
    try:
        for number in range(pace.rounds):
            alone = _alone(clocks) if pace.alone else {}
            running = [c for c in contestants if _goes_on(c, seconds[c.name], pace, alone.get(c.name))]
            for contestant in running if number % 2 == 0 else reversed(running):
                name = contestant.name
                seconds[name].append(clocks[name](contestant.call, prepare[name]))
        for contestant in contestants if clock is None else ():
            found, rounds = clocks[contestant.name], min(GRAPH_ROUNDS, len(seconds[contestant.name]))
            contestant.facts |= found.facts()
            if gpu and contestant.kind != "peer":  # one graph at a time: each keeps the memory of its call
                contestant.facts |= found.replays(contestant.call, prepare[contestant.name], rounds)
    finally:
        gc.enable()
    return seconds


def _preparing(contestant: Contestant, evict: Callable[[], None]) -> Callable[[], None]:
    def prepare() -> None:
        if contestant.before:
            contestant.before()
        evict()

    return prepare


def _prepared(clock: Callable[[Callable[[], Any]], float]) -> Any:
    """A clock that does what is outside of it first, as `GpuClock` does."""

    def timed(call: Callable[[], Any], prepare: Callable[[], None]) -> float:
        prepare()
        return clock(call)

    return timed


def _alone(clocks: dict[str, CoreClock]) -> dict[str, int]:
    """How many calls of each contestant had the cores to themselves so far."""
    case = [speed for clock in clocks.values() for speed in clock.gflops]
    return {name: sum(undisturbed(clock.gflops, case)) for name, clock in clocks.items()}


def _goes_on(contestant: Contestant, seconds: list[float], pace: Pace, alone: int | None = None) -> bool:
    least = pace.least if contestant.kind == "peer" else max(pace.least, pace.own)
    waits = alone is not None and contestant.kind != "peer"
    wants = alone < pace.alone if waits else sum(seconds) < pace.budget
    return not seconds or (seconds[0] <= pace.slow and (len(seconds) < least or wants))


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the nearest ranks."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def stats(seconds: Sequence[float]) -> dict[str, Any]:
    """The fields that pytest-benchmark stores, with the 20th and 80th percentile added."""
    q1, q3 = percentile(seconds, 0.25), percentile(seconds, 0.75)
    mean, spread = statistics.fmean(seconds), statistics.stdev(seconds) if len(seconds) > 1 else 0.0
    inside = [s for s in seconds if q1 - 1.5 * (q3 - q1) <= s <= q3 + 1.5 * (q3 - q1)] or list(seconds)
    outliers = {
        "iqr_outliers": len(seconds) - len(inside),
        "stddev_outliers": sum(abs(s - mean) > spread for s in seconds),
    }
    return {
        "min": min(seconds), "max": max(seconds), "mean": mean, "stddev": spread, "median": statistics.median(seconds),
        "rounds": len(seconds), "iterations": 1, "total": sum(seconds), "ops": 1 / mean,
        "q1": q1, "q3": q3, "iqr": q3 - q1, "ld15iqr": min(inside), "hd15iqr": max(inside),
        **outliers, "outliers": f"{outliers['stddev_outliers']};{outliers['iqr_outliers']}",
        "p20": percentile(seconds, 0.2), "p80": percentile(seconds, 0.8), "data": list(seconds),
    }  # fmt: skip
