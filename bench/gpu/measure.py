"""One measuring process, `python -m ppg_fast.bench.gpu.measure PART LINES`: a line of JSON for everything it finds, as
it finds it."""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import machine
from . import counts, grid, kernels, steps

PARTS: dict[str, Callable[["Report"], None]] = {
    "counts": counts.run, "kernels": kernels.sweep_all, "dram": kernels.sweep_large, "bench": grid.run,
    "steps": steps.run,
}  # fmt: skip


class Report:
    """Where a part writes what it finds. ``tiny``: sizes for a CPU, which show that the code runs and nothing else."""

    def __init__(self, path: Path | None, device: str, seconds: float, tiny: bool) -> None:
        self.path, self.device, self.tiny = path, device, tiny
        self.end = time.monotonic() + seconds
        self.failed: list[str] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def add(self, **line: Any) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def case(self, name: str, work: Callable[[], Any], needed: float = 0.0) -> Any:
        """Do one piece of work; where it fails, or ``needed`` seconds are not left, that is a line and the next one
        goes on."""
        if self.left < needed:
            self.add(missing={name: f"not measured: {needed:.0f} s needed, {max(self.left, 0.0):.0f} s left"})
            return None
        print(f"{self.left:5.0f} s left  {name}", file=sys.stderr, flush=True)
        try:
            return work()
        except Exception as error:  # whatever it is, the other cases are measured and the part is marked as failed
            traceback.print_exc()
            self.failed.append(name)
            self.add(
                missing={name: f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"}
            )
            return None
        finally:
            if self.device == "cuda":
                torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 where a case failed or there is no GPU."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Measure one part.")
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("lines", type=Path, nargs="?")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args(argv)
    report = Report(arguments.lines, arguments.device, arguments.seconds, arguments.tiny)
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
