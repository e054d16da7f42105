"""The longest dialogue whose training step fits into a budget of memory: `python -m ppg_fast.bench.longest PLAN`, a
process of its own."""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .problem import Case

# bytes above model, optimizer and inputs, by the model's shape; a shape without one is not asked
BUDGETS = {"bytes": 512 * 2**20}
SECONDS = 60.0  # of search for each trainer
FIRST, MOST = 1024, 2**22  # tokens
TOLERANCE = 0.05  # of the answer


@dataclass(frozen=True)
class Longest:
    """``tokens`` fit. ``measured``: a dialogue at most `TOLERANCE` longer was seen not to; else it is foreseen from the
    peaks measured.

    ``probes``: (tokens, peak in bytes, seconds) of every dialogue that was tried, in their order; infinite where memory
        ran out.
    """

    tokens: int
    measured: bool
    probes: list[tuple[int, float, float]]


def longest_that_fits(
    peak: Callable[[int], float], budget: float, seconds: float = SECONDS, first: int = FIRST, most: int = MOST
) -> Longest:
    """Bisection on the number of tokens, guided by the line through the last two peaks, until ``seconds`` are used.

    ``peak(tokens)`` is the peak in bytes, infinite where it does not fit at all. A probe whose time, growing with the
    square of the
    tokens, would pass the limit is not begun: the answer is then the guess. ``most`` where nothing is too long.
    """
    probes: list[tuple[int, float, float]] = []
    start, tokens = time.monotonic(), first
    while True:
        begin = time.monotonic()
        found = peak(tokens)
        probes.append((tokens, found, time.monotonic() - begin))
        fits = max((t for t, bytes_, _ in probes if bytes_ <= budget), default=0)
        fails = min((t for t, bytes_, _ in probes if bytes_ > budget), default=None)
        if fits >= most or (fails is not None and fails - fits <= max(1, TOLERANCE * fits)):
            return Longest(min(fits, most), True, probes)
        guess = _guess(probes, budget)
        tokens = _next(fits, fails, guess, first, most)
        last, _, took = max(probes)
        if time.monotonic() - start + took * (tokens / last) ** 2 > seconds:
            foreseen = guess if guess is not None else fits
            return Longest(max(fits, min(foreseen, most, (fails or most + 1) - 1)), False, probes)


def _guess(probes: list[tuple[int, float, float]], budget: float) -> int | None:
    """Where the line through the shortest dialogue's peak and the one nearest to the budget meets it; None before there
    are two."""
    finite = sorted(p for p in probes if math.isfinite(p[1]))
    if len(finite) < 2:
        return None
    shortest, nearest = finite[0], min(finite[1:], key=lambda p: abs(p[1] - budget))
    slope = (nearest[1] - shortest[1]) / (nearest[0] - shortest[0])
    return int(shortest[0] + (budget - shortest[1]) / slope) if slope > 0 else None


def _next(fits: int, fails: int | None, guess: int | None, first: int, most: int) -> int:
    """Just below the guess, then just above it, where it is near; else doubled or halfway."""
    low = max(first, fits)
    if guess is not None and guess <= 8 * low:  # a line through two short dialogues is not trusted further than that
        for wanted in (int(guess * (1 - TOLERANCE / 2)), int(guess * (1 + TOLERANCE / 2))):
            if fits < wanted < (fails or most):
                return wanted
    return min(2 * low, most) if fails is None else (fits + fails) // 2


def peak_of(case: Case, provider: str) -> Callable[[int], float]:
    """Tokens -> peak of one step of ``provider``, above what was there before it; on a CPU each in a fork of its
    own."""
    import torch

    from . import byte_dialogue, memory, whole_step

    byte_dialogue.lines_of(case.variant)  # once, for all forks
    compute = next(p for p in whole_step.participants(case)[0] if p.name == provider)

    def measured(tokens: int) -> float:
        def build() -> tuple[Callable[[], Any], Callable[[], Any]]:
            torch.set_num_threads(case.threads)
            small, problem = (whole_step.make(replace(case, N=n)) for n in (min(FIRST, tokens), tokens))
            return (lambda: compute.run(small)), (lambda: compute.run(problem))

        try:
            if case.device == "cpu":
                found = memory.cpu_peak(build, compiles=False)
                return math.nan if found is None else found
            warm, call = build()
            warm()
            return memory.cuda_peak(call)
        except (RuntimeError, torch.OutOfMemoryError):
            if case.device == "cuda":
                torch.cuda.empty_cache()
            return math.inf

    return measured


def longest_facts(case: Case, provider: str, budget: int | None = None, seconds: float = SECONDS) -> dict[str, Any]:
    """What a result file keeps of the answer, found in a process of its own; nothing where no budget is set for the
    model's shape."""
    budget = BUDGETS.get(case.shape) if budget is None else budget
    if budget is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        plan, out = Path(folder, "plan.json"), Path(folder, "out.json")
        plan.write_text(
            json.dumps(
                {"case": asdict(case), "provider": provider, "budget": budget, "seconds": seconds, "out": str(out)}
            )
        )
        subprocess.run([sys.executable, "-m", "ppg_fast.bench.longest", str(plan)], check=True)
        found = json.loads(out.read_text())
    return {"longest": found, "memory_budget_bytes": budget} if found["probes"] else {}


def main(path: str) -> None:
    """Answer the plan's question."""
    plan = json.loads(Path(path).read_text())
    peak = peak_of(Case(**plan["case"]), plan["provider"])
    found = longest_that_fits(peak, plan["budget"], plan["seconds"])
    known = [(t, b if math.isfinite(b) else None, s) for t, b, s in found.probes if not math.isnan(b)]
    Path(plan["out"]).write_text(json.dumps({"tokens": found.tokens, "measured": found.measured, "probes": known}))


if __name__ == "__main__":
    main(sys.argv[1])
