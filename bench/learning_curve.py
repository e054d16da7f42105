"""Held-out return of finished training runs as a result file: `python -m ppg_fast.bench.learning_curve runs/a
runs/b`."""

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from . import machine, result_file
from .tables import NOT_MEASURED, Results, duration, of, table

KEPT = ("policy_class", "loss_type", "seed", "parameters", "device", "backend", "threads", "seconds", "peak_memory_mb")


def curve(run: Path) -> dict[str, Any]:
    """What a run folder says of itself, and its evaluations: step, mean return per dialogue, share of the highest
    return there is."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n") if line]
    points = [
        {"step": r["step"], "reward": r["eval/reward"], "share": r["eval/reward_share"]}
        for r in rows
        if r["phase"] == "eval"
    ]
    summary = json.loads((run / "summary.json").read_text())
    return {**{name: summary[name] for name in KEPT}, "points": points}


def section(results: Results) -> str:
    """Held-out return of each class while it trains, as a share of the highest there is: means over seeds, and how far
    the mean over training is from that of full planning, within seeds."""
    text = ""
    for device, file in of(results, "learning_curve"):
        classes: dict[str, dict[int, dict[str, Any]]] = {}
        for c in file["curves"]:
            classes.setdefault(c["policy_class"], {})[c["seed"]] = c
        steps = [point["step"] for point in file["curves"][0]["points"]]
        rows = []
        for name, seeds in classes.items():
            shares = [[point["share"] for point in c["points"]] for c in seeds.values()]
            after = [c["points"][-1]["reward"] for c in seeds.values()]
            full = classes.get("full", {})
            beyond = [_area(seeds[s]) - _area(full[s]) for s in seeds if s in full and name != "full"]
            row = [
                f"{name}, {len(seeds)} seed{'s' * (len(seeds) > 1)}",
                *(f"{mean(x):.0%}" for x in zip(*shares, strict=True)),
            ]
            row += [f"{mean(after):.2f}" + (f" ± {stdev(after):.2f}" if len(after) > 1 else "")]
            row += [_points(beyond), duration(mean(c["seconds"] for c in seeds.values()))]
            rows.append(tuple(row))
        heads = (
            device,
            *(f"step {step}" for step in steps),
            "return after",
            "beyond full, in points",
            "one seed takes",
        )
        text += table(heads, rows)
    return text or NOT_MEASURED


def _area(curve: dict[str, Any]) -> float:
    """The mean share over training, by trapezoids."""
    points = curve["points"]
    covered = sum((b["step"] - a["step"]) * (a["share"] + b["share"]) / 2 for a, b in pairwise(points))
    return covered / (points[-1]["step"] - points[0]["step"])


def _points(differences: Sequence[float]) -> str:
    """A mean with its standard error, in points of a hundred."""
    if len(differences) < 2:
        return f"{100 * differences[0]:+.1f} (one seed)" if differences else ""
    return f"{100 * mean(differences):+.1f} ± {100 * stdev(differences) / len(differences) ** 0.5:.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Write ``learning_curve.DEVICE.json``."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Store the learning curves of finished runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that `ppg-fast train` wrote")
    parser.add_argument("--output", type=Path, default=result_file.FOLDER)
    arguments = parser.parse_args(argv)
    curves = sorted((curve(run) for run in arguments.runs), key=lambda c: (c["policy_class"], c["seed"]))
    device = "cuda" if curves[0]["device"].startswith("cuda") else "cpu"
    command = " ; ".join(f"ppg-fast train --policy-class {c['policy_class']} --seed {c['seed']}" for c in curves)
    file = machine.header(command, device) | {"curves": curves}
    result_file.write(arguments.output, f"learning_curve.{device}", file)


if __name__ == "__main__":
    main()
