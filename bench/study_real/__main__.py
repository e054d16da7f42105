"""`python -m ppg_fast.bench.study_real STEP...`: predict, then train, into ``study_real.cpu.json``."""

import argparse
import fcntl
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ppg_fast.config import Parser
from ppg_fast.spec import require

from .. import machine, result_file
from ..real import command
from ..real.models import SMOLLM2, folder
from . import prediction
from .cells import SETTINGS, Cell, grid
from .dialogue import PARTNERS
from .judge import fitted

NAME, STEPS = "study_real.cpu", ("predict", "train")


class Study:
    """Its results so far, in one file that is whole after every step; what stands there is not done again."""

    def __init__(self, output: Path, work: Path, data: Sequence[str]) -> None:
        self.output, self.work, path = output, work, output / f"{NAME}.json"
        judge, about = fitted(data)
        self.judge = work / "judge.json"
        about["digest"] = judge.write(self.judge)
        known = result_file.read(path) if path.exists() else {}
        self.file: dict[str, Any] = known or {
            **machine.header("make study-real", "cpu"),
            "settings": SETTINGS,
            "judge": about,
            "predictions": {},
            "cells": [],
        }
        # what the rollouts of a prediction do not depend on may change while no cell is trained
        names = SETTINGS if self.file["cells"] else prediction.SHARED
        settings = {name: SETTINGS[name] for name in names}
        for what, now in (("settings", settings), ("judge", about)):
            other = {name: value for name, value in now.items() if self.file[what].get(name) != value}
            require(not other, f"{what} must be those of {path} (delete it to begin a new study)", other)
        self.file["settings"] = SETTINGS

    def predict(self) -> None:
        """Both delays, and the lines to register."""
        for delay in PARTNERS:
            if str(delay) not in self.file["predictions"]:
                found = prediction.predict(delay, folder(SMOLLM2), self.judge, self.work)
                self.file["predictions"][str(delay)] = found
                self._write()
            print(prediction.line(delay, self.file["predictions"][str(delay)], self.file["judge"]["digest"]))

    def missing(self, only: str) -> list[Cell]:
        """The cells whose name holds ``only`` that are not trained yet. ValueError where one is not registered."""
        done = {(c["delay"], c["arm"], c["seed"]) for c in self.file["cells"]}
        left = [c for c in grid() if only in str(c) and (c.delay, c.arm, c.seed) not in done]
        for delay in dict.fromkeys(cell.delay for cell in left):
            found = self.file["predictions"].get(str(delay))
            require(found is not None, "train wants the step predict first, of delay", delay)
            line = prediction.line(delay, found, self.file["judge"]["digest"])
            prediction.require_registered(result_file.ROOT, line)
            require(found["weights"] is not None, "a delay without a clear lag has no lag weights to train", line)
        return left

    def train(self, only: str = "", jobs: int = 1) -> None:
        """What is missing, ``jobs`` processes at a time; each cell is kept when it is done."""
        left = self.missing(only)
        print(f"{len(self.file['cells'])} of {len(grid())} cells are done, {len(left)} to train", flush=True)
        with ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(lambda cell: self._keep(cell, self._cell(cell)), left):
                pass  # an error of one, after which no other begins, is ours

    def _cell(self, cell: Cell) -> dict[str, Any]:
        name = str(cell).replace(", ", "-").replace(" ", "-")
        path, log = self.work / f"{name}.json", self.work / f"{name}.log"
        own = {"model": str(folder(SMOLLM2)), **SETTINGS, **cell.settings(self.file["predictions"][str(cell.delay)])}
        task, load = json.dumps({"cell": asdict(cell), "settings": own}), os.getloadavg()[0]
        begun = datetime.now(timezone.utc).isoformat(timespec="seconds")
        log.unlink(missing_ok=True)
        arguments = [f"{__package__}.cells", task, str(path)]
        ran = command.run(arguments, prediction.environment(self.judge), log)
        times = {"cpu_seconds": round(ran.cpu_seconds, 1), "load_before": round(load, 2), "begun": begun}
        return {**json.loads(path.read_text()), **times}

    def _keep(self, cell: Cell, found: dict[str, Any]) -> None:
        """Beside the cells that another process, of other cells, may have kept meanwhile."""
        path = self.output / f"{NAME}.json"
        with open(self.work / "cells.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.file["cells"] = [*result_file.read(path)["cells"], found]
            self._write()
        edges, said = (f"{found[when]['return']:.2f}" for when in ("before", "after")), f"{found['cpu_seconds']:.0f} s"
        print(f"{cell}: return {' -> '.join(edges)}, {said} of a core", flush=True)

    def _write(self) -> None:
        result_file.write(self.output, NAME, self.file)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m ppg_fast.bench.study_real", description="A real language model decides.")
    parser.add_argument("steps", nargs="*", help=f"what to do, in this order: {', '.join(STEPS)} [both]")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="Consistent-LLMs files, for the judge")
    parser.add_argument("--only", default="", metavar="TEXT", help="train cells whose name holds it: 'delay 2, GAE'")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, a thread each [1]")
    parser.add_argument("--work", type=Path, default=Path("runs/study-real"), help="folder of logs [runs/study-real]")
    parser.add_argument("--output", type=Path, default=result_file.FOLDER, help="of the results [bench/results]")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The steps; 1 with one line where one fails, what was finished before it is kept."""
    parser = _parser()
    given = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    if unknown := [name for name in given.steps if name not in STEPS]:
        parser.error(f"a step must be one of {', '.join(STEPS)}, got {unknown[0]!r}")
    if absent := [name for name in given.data if not Path(name).is_file()]:
        parser.error(f"--data must be files, got {absent[0]!r}")
    if given.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {given.jobs}")
    if given.only and not any(given.only in str(cell) for cell in grid()):
        parser.error(f"--only must be part of a cell's name, such as '{grid()[0]}', got {given.only!r}")
    try:
        study = Study(given.output, given.work, given.data)
        if not given.steps or "predict" in given.steps:
            study.predict()
        if not given.steps or "train" in given.steps:
            study.train(given.only, given.jobs)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"study-real: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
