"""`ppg-fast compare`: the policy classes side by side over seeds, on the built-in problems or on logged dialogues."""

import argparse
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ppg_fast.compare import across, cells
from ppg_fast.compare.cells import Cell
from ppg_fast.compare.summary import of_problem
from ppg_fast.rewards.decomposition import DECOMPOSITIONS
from ppg_fast.rollouts.problems import DRAWN, PROBLEMS, drawn, problem_names
from ppg_fast.spec import CANDIDATES, Lookahead, policy_class, require, require_one_of

CLASSES = ",".join(str(c) for c in CANDIDATES if c != Lookahead(6)) + ",auto"  # six turns are half of a problem or more
LOG_CLASSES = "greedy,lookahead:3,segment:4,full,imitation"
VERSIONS = ("tabular", "language")
SETTINGS, REPORT, NUMBERS = "settings.json", "report.html", "compare.json"


@dataclass(frozen=True)
class Study:
    """What decides a cell's result beside its own name; calling it computes one. Picklable."""

    folder: str
    classes: tuple[str, ...]
    max_steps: int | None = None
    batches: int = 24
    data: str | None = None
    decompose: str | None = None
    strict: bool = False
    max_dialogue_tokens: int = 1024

    def __call__(self, cell: Cell) -> dict[str, Any]:
        if cell.version == "tabular":
            from ppg_fast.compare import tabular_runs as tabular

            if cell.policy_class == "gradient":
                return {"gradient": tabular.measure(cell.problem, self.fixed)}
            candidates = tuple(policy_class(c) for c in self.fixed)
            return tabular.train(
                cell.problem, cell.policy_class, cell.seed, candidates, self.max_steps or tabular.STEPS
            )
        from transformers.utils import logging

        logging.disable_progress_bar()
        if cell.version == "language":
            from ppg_fast.compare import language

            config = self.config(language.DEFAULTS, cell)
            if cell.policy_class == "gradient":
                return {"gradient": language.measure(cell.problem, config, Path(self.folder), self.fixed, self.batches)}
            return language.train(cell.problem, config, Path(self.folder))
        from ppg_fast.compare import logged

        given = {"data": self.data, "strict": self.strict, "max_dialogue_tokens": self.max_dialogue_tokens}
        log, said = logged.open_log(self.config({**logged.DEFAULTS, **given}, cell), self.decompose)
        if cell.policy_class == "gradient":
            return {"credits": log.credits(self.fixed), "warnings": said}
        return log.train(cell.policy_class)

    @property
    def fixed(self) -> tuple[str, ...]:
        """The classes whose gradient can be looked at."""
        return tuple(dict.fromkeys([*(c for c in self.classes if c not in ("auto", "imitation")), "full"]))

    def config(self, defaults: dict[str, Any], cell: Cell) -> Any:
        """Settings of the real trainer for a cell."""
        from ppg_fast.config import make_config

        own = {} if cell.policy_class in ("gradient", "imitation") else {"policy_class": cell.policy_class}
        if cell.policy_class == "auto":
            own["candidates"] = ",".join(self.fixed)
        steps = {} if self.max_steps is None else {"max_steps": self.max_steps}
        return make_config(defaults, steps, own, {"seed": cell.seed, "device": "cpu"})

    def settings(self) -> dict[str, Any]:
        """What must be equal for results to stand side by side. Candidates of auto count, other classes may join
        later."""
        own = dataclasses.asdict(self)
        own.pop("folder")
        own["classes"] = sorted(self.fixed) if "auto" in self.classes else []
        own["problems"] = hashlib.sha256(repr([*sorted(PROBLEMS.items()), *map(drawn, range(9))]).encode()).hexdigest()[
            :16
        ]
        if self.data:  # by what it holds, wherever it lies
            own |= {
                "data": Path(self.data).name,
                "data_digest": hashlib.sha256(Path(self.data).read_bytes()).hexdigest()[:16],
            }
        return own


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = argparse.ArgumentParser(
        prog="ppg-fast compare", description="Policy classes side by side: curves, gradients, a report."
    )
    p.add_argument(
        "--problem", default="all", help=f"{', '.join(PROBLEMS)}, drawn:A..B, several with commas, or all [all]"
    )
    p.add_argument(
        "--version",
        default="both",
        help="tabular (exact, seconds), language (the real trainer, a small model), or both [both]",
    )
    p.add_argument(
        "--data", help="logged dialogues instead: what each class credits, and training with each on a part of them"
    )
    p.add_argument(
        "--decompose",
        help=f"with data: turn_rewards are a running score; {' or '.join(DECOMPOSITIONS)} makes rewards of it",
    )
    p.add_argument("--strict", action="store_true", help="with data: a bad line is an error instead of a warning")
    p.add_argument(
        "--max-dialogue-tokens",
        type=int,
        default=1024,
        help="with data: train on the turns that end within these, 0: all; credits are whole [1024]",
    )
    p.add_argument("--policy-classes", help=f"with commas [{CLASSES}; with data {LOG_CLASSES}]")
    p.add_argument("--seeds", type=int, default=3, help="how many [3]")
    p.add_argument(
        "--first-seed", type=int, default=0, help="the first of them: others than those that a choice was made on [0]"
    )
    p.add_argument("--max-steps", type=int, help="training steps [60 tabular, 40 language, 60 with data]")
    p.add_argument(
        "--batches", type=int, default=24, help="independent batches for the gradients of the language version [24]"
    )
    p.add_argument("--jobs", type=int, default=1, help="processes, of one thread each [1]")
    p.add_argument(
        "--output-dir",
        default="runs/compare",
        help="results, one file a cell; the same command goes on where it was [runs/compare]",
    )
    p.add_argument("--overwrite", action="store_true", help="throw away what the folder holds")
    return p


def main(argv: Sequence[str]) -> int:
    """Run what is missing, then write the report and the numbers. ValueError for bad input, before anything is
    computed."""
    given = parser().parse_args(list(argv))
    study, wanted = _plan(given)
    folder = Path(given.output_dir)
    _open(folder, study, given.overwrite)
    missing = sum(cells.read(folder, cell) is None for cell in wanted)
    print(f"{len(wanted)} cells, {len(wanted) - missing} of them are there; {folder}", flush=True)
    for number, (cell, result) in enumerate(cells.run(folder, wanted, study, given.jobs), 1):
        what = f"{cell.version} {cell.problem} {cell.policy_class} seed {cell.seed}"
        last = f"  return {result['returns'][-1]:.2f}" if "returns" in result else ""
        print(f"{number}/{missing}  {what}{last}  {result['seconds']:.1f} s", flush=True)
    command = " ".join(
        Path(word).name if word in (given.data, given.output_dir) else word for word in argv
    )  # a report is shown to others: no folders
    summary = summarise(study, wanted, folder, f"ppg-fast compare {command}")
    cells.write_whole(folder / NUMBERS, json.dumps(summary, indent=1) + "\n")
    from ppg_fast.compare.report import render

    cells.write_whole(folder / REPORT, render(summary))
    for p in (p for p in summary["problems"] if p["verdict"]):
        print(f"\n{p['problem']}, {p['version']} (made for {p['policy_class']})")
        print("\n".join(f"  {v}" for v in p["verdict"]))
    for entry in summary["across"]:
        lines = [across.HEADS, *across.rows(entry)]
        print(f"\n{across.title(entry)}\n" + "\n".join("  ".join(f"{cell:>15}" for cell in line) for line in lines))
    print(f"\nreport: {folder / REPORT}   numbers: {folder / NUMBERS}")
    return 0


def _plan(given: argparse.Namespace) -> tuple[Study, list[Cell]]:
    """What to compute, seed by seed, so that a run cut short has every class of the seeds it got to."""
    for name, least in (("seeds", 1), ("jobs", 1), ("batches", 3), ("first_seed", 0), ("max_dialogue_tokens", 0)):
        require(getattr(given, name) >= least, f"{name} must be at least {least}", getattr(given, name))
    require(given.max_steps is None or given.max_steps >= 1, "max_steps must be at least 1", given.max_steps)
    text = given.policy_classes or (LOG_CLASSES if given.data else CLASSES)
    classes = tuple(dict.fromkeys(c.strip() for c in text.split(",")))
    extra = "imitation" if given.data else "auto"
    for c in classes:
        if c != extra:
            policy_class(c)
    if given.decompose is not None:
        require(bool(given.data), "decompose needs data", given.decompose)
        require_one_of("decompose", given.decompose, tuple(DECOMPOSITIONS))
    settings = {name: getattr(given, name) for name in ("data", "decompose", "strict", "max_dialogue_tokens")}
    study = Study(given.output_dir, classes, given.max_steps, given.batches, **settings)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    if given.data:
        return study, [
            Cell("logged", "", "gradient", seeds[0]),
            *(Cell("logged", "", c, s) for s in seeds for c in classes),
        ]
    names = problem_names(given.problem)
    require_one_of("version", given.version, (*VERSIONS, "both"))
    exact = given.version == "tabular" or not any(n.startswith(DRAWN) for n in names)
    require(exact, "drawn problems are not in words, so version must be tabular", given.version)
    versions = VERSIONS if given.version == "both" else (given.version,)
    looked = [Cell(v, n, "gradient", seeds[0]) for v in versions for n in names]
    return study, looked + [Cell(v, n, c, s) for v in versions for s in seeds for n in names for c in classes]


def _open(folder: Path, study: Study, overwrite: bool) -> None:
    """Make the folder, or go on in one whose results stand beside ours."""
    path, settings = folder / SETTINGS, json.loads(json.dumps(study.settings()))
    if path.exists() and overwrite:
        for name in (cells.CELLS, SETTINGS, REPORT, NUMBERS):
            old = folder / name
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        for old in folder.glob("warm-*.pt"):
            old.unlink()
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        other = {k: (before.get(k), v) for k, v in settings.items() if before.get(k) != v}
        rule = f"{folder} holds a comparison with other settings (give another --output-dir, or --overwrite)"
        require(not other, rule, ", ".join(f"{k} {a} -> {b}" for k, (a, b) in other.items()))
    folder.mkdir(parents=True, exist_ok=True)
    cells.write_whole(path, json.dumps(settings, indent=1) + "\n")


def summarise(study: Study, wanted: list[Cell], folder: Path, command: str) -> dict[str, Any]:
    """All numbers of the report."""
    results = {cell: result for cell in wanted if (result := cells.read(folder, cell)) is not None}
    seconds = sum(r["seconds"] for r in results.values())
    out: dict[str, Any] = {
        "command": command,
        "cpu_seconds": round(seconds, 1),
        "settings": study.settings(),
        "problems": [],
        "log": None,
    }
    for version, name in dict.fromkeys((c.version, c.problem) for c in wanted):
        mine = {c: r for c, r in results.items() if (c.version, c.problem) == (version, name)}
        looked = next((r for c, r in mine.items() if c.policy_class == "gradient"), {})
        runs = {c: [r for cell, r in mine.items() if cell.policy_class == c] for c in study.classes}
        if version == "logged":
            out["log"] = _of_log(study, looked, runs)
        else:
            out["problems"].append(of_problem(name, version, runs, looked.get("gradient")))
    return {**out, "across": across.across(out["problems"])}


def _of_log(study: Study, looked: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    classes = {}
    for name, results in runs.items():
        keys = results[0]["scores"]
        curves = {k: np.mean([r["scores"][k] for r in results], 0).tolist() for k in keys}
        last = {k: [r["scores"][k][-1] for r in results] for k in keys}
        final = {
            k: {"mean": float(np.mean(v)), "std": float(np.std(v, ddof=1)) if len(v) > 1 else 0.0, "each": v}
            for k, v in last.items()
        }
        classes[name] = {
            "steps": results[0]["steps"],
            "curves": curves,
            "final": final,
            "seeds": [r["seed"] for r in results],
        }
    credits = looked["credits"]
    turns = len(next(iter(credits["classes"].values()))["by_turn"])
    credits["shown"] = sorted({1, *(t for t in (2, 5, 10, 20, 40) if t < turns), turns})
    name = Path(str(study.data)).name
    return {
        "data": name,
        "decompose": study.decompose,
        "warnings": looked["warnings"],
        "credits": credits,
        "classes": classes,
    }
