"""Held-out return of finished training runs as a result file: `python -m ppg_fast.bench.learning_curve runs/a
runs/b`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import machine, result_file

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
