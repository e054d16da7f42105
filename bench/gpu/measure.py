"""One measuring process, `python -m ppg_fast.bench.gpu.measure PART LINES`: a line of JSON for everything it finds, as
it finds it."""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import machine
from . import counts, grid, kernels, smoke, steps
from .device import leave, lost
from .lines import append, ended

PARTS: dict[str, Callable[["Report"], None]] = {
    "smoke": smoke.run, "counts": counts.run, "kernels": kernels.sweep_all, "dram": kernels.sweep_large,
    "bench": grid.run, "peers": grid.run_peers, "steps": steps.run,
}  # fmt: skip
CASE = 30.0  # seconds that any piece of work may take; one that is known to need some, five times as many


class Report:
    """Where a part writes what it finds. ``until``: when it should be done, in seconds of the epoch. ``tiny``: sizes
    for a CPU, which show that the code runs and nothing else. What the file says has ended is not done again."""

    def __init__(self, path: Path | None, device: str, until: float, tiny: bool) -> None:
        self.path, self.device, self.until, self.tiny = path, device, until, tiny
        self.done, self.failed = ended(path), list[str]()

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.time()

    def add(self, **line: Any) -> None:
        if self.path is not None:
            append(self.path, **line)

    def case(self, name: str, work: Callable[[], Any], needed: float = 0.0) -> Any:
        """Do one piece of work; where it fails, or ``needed`` seconds are not left, that is a line and the next one
        goes on. Where the device takes no more calls of this process, another process goes on."""
        if name in self.done:
            return None
        if self.left < needed:
            self.add(missing={name: f"not measured: {needed:.0f} s needed, {max(self.left, 0.0):.0f} s left"})
            return None
        print(f"{self.left:5.0f} s left  {name}", file=sys.stderr, flush=True)
        start = time.monotonic()
        self.add(started=name, limit_s=max(4 * CASE if self.tiny else CASE, 5 * needed))
        try:
            found = work()
        except Exception as error:  # whatever it is, the other cases are measured and the part is marked as failed
            traceback.print_exc()
            self.failed.append(name)
            said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
            self.add(missing={name: f"failed: {said}"})
            self.add(ended=name, outcome="failed", seconds=round(time.monotonic() - start, 2), message=said)
            if self.device == "cuda" and lost():
                leave()
            return None
        self.add(ended=name, outcome="passed", seconds=round(time.monotonic() - start, 2))
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 where a case failed or there is no GPU."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Measure one part.")
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("lines", type=Path, nargs="?")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--until", type=float, default=time.time() + 60, help="seconds of the epoch [in a minute]")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args(argv)
    report = Report(arguments.lines, arguments.device, arguments.until, arguments.tiny)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device", file=sys.stderr)
        return 1
    report.add(machine_info=machine.machine_info(arguments.device), versions=machine.versions())
    PARTS[arguments.part](report)
    if report.failed:
        print(f"failed: {', '.join(report.failed)}", file=sys.stderr)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
