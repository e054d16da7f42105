"""What a run of everything consists of, in the order of what it is worth, and how long each part may take."""

import json
from pathlib import Path
from typing import NamedTuple

from .. import result_file
from . import build

WHOLE = 420.0  # seconds


class Slot(NamedTuple):
    """Seconds: ``limit`` at most, ``most`` where others have left time; about ``estimate``, and ``reason`` why."""

    limit: float
    most: float
    estimate: float
    reason: str


# Limits sum to a little less than WHOLE: the end needs some seconds too. Estimates are guesses, for 16 cores and an
# H200, until a results file of the same kind of GPU knows better.
SLOTS = {
    "build": Slot(40, 180, 30, "nothing where what is carried fits the sources; else ten units of a few seconds"),
    "smoke": Slot(20, 60, 18, "10 s until torch is imported and the device answers, 30 calls and 18 tests"),
    "plans": Slot(60, 120, 10, "3 GB are filled, then 8 cases of 15 rounds of at most 14 launches of 2 ms, and copies"),
    "bench": Slot(90, 240, 80, "12 s to begin; 8 bars of 3 s, the head's of 10 s, the others while there is time"),
    "counts": Slot(10, 30, 10, "10 s to begin, 5 paths under the profiler"),
    "tests": Slot(70, 240, 65, "1,100 tests of 0.3 s in 8 processes, 15 s to begin, Triton compiles its kernels"),
    "steps": Slot(40, 540, 40, "12 s to begin, models of 0.6B and 8B parameters are drawn, steps of 1 to 5 s"),
    "peers": Slot(30, 240, 30, "compilers take 10 s a case: what there is time for"),
    "dram": Slot(20, 60, 18, "15 s to begin under ncu, 8 launches of one pass each"),
    "memcheck": Slot(15, 120, 15, "as many of the sweep's 40 cases as there is time for"),
    "racecheck": Slot(20, 240, 20, "as many of the sweep's 40 cases as there is time for, at a tenth of the speed"),
}


def gpu_name() -> str | None:
    """Of the first GPU."""
    return next(iter(build.told("name")), None)


def measured(results: Path, name: str | None) -> dict[str, tuple[float, str]]:
    """Seconds that each part took where it passed last on a GPU of this name, and when."""
    found: dict[str, tuple[str, float]] = {}
    for path in sorted(results.glob("gpu*.cuda.json*")) if name else []:
        try:
            file = result_file.read(path)
        except (OSError, json.JSONDecodeError):
            continue
        if file["machine_info"].get("gpu", {}).get("name") != name:
            continue
        for part, record in file["parts"].items():
            if record["status"] == "passed" and "seconds" in record:
                found[part] = max(found.get(part, ("", 0.0)), (file["datetime"], record["seconds"]))
    return {part: (seconds, when) for part, (when, seconds) in found.items()}


def slots(results: Path) -> dict[str, Slot]:
    """`SLOTS`, with what is known of this kind of GPU."""
    known = measured(results, gpu_name())
    return {
        part: slot._replace(estimate=known[part][0], reason=f"as on {known[part][1][:10]}") if part in known else slot
        for part, slot in SLOTS.items()
    }
