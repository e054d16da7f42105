"""`ppg-fast bench`: plan, measure in processes of their own, store, show."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ppg_fast.config import Parser

from . import machine, render, result_file
from .harness import OPS, PACES, settings_of

# what a peak of memory depends on
LIKE = ("op", "N", "V", "D", "dtype", "active", "zero", "variant", "device", "shape")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ppg-fast bench", description="Measure ppg_fast against its peers and this machine's limits.")
    parser.add_argument("--ops", default=",".join(OPS), help=f"comma-separated: {', '.join(OPS)} [all]")
    parser.add_argument(
        "--grid", default="default", choices=tuple(PACES), help="how much to measure [default: minutes]"
    )
    parser.add_argument(
        "--quick", action="store_const", dest="grid", const="quick", help="tiny sizes, only to see that everything runs"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", default="", help="comma-separated thread counts [1 and every core]")
    parser.add_argument(
        "--dialogues", default="", metavar="FILE", help="logged dialogues for training_step [a synthetic one]"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/bench"), help="folder of the result files [runs/bench]"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks of memory")
    parser.add_argument(
        "--render",
        action="store_true",
        help="measure nothing: write bench/results into docs/benchmarks.md and README.md",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 1 where it cannot be done here, 2 bad usage."""
    parser = _parser()
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)
    if arguments.render:
        for path in render.write(Path.cwd()):
            print(f"wrote {path}")
        return 0
    ops = [op for op in arguments.ops.split(",") if op]
    if unknown := [op for op in ops if op not in OPS]:
        parser.error(f"--ops must be among {', '.join(OPS)}, got {unknown[0]!r}")
    if not all(n.isascii() and n.isdigit() and int(n) for n in arguments.threads.split(",") if n):
        parser.error(f"--threads must be numbers >= 1 with commas, got {arguments.threads!r}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("ppg-fast bench: torch sees no CUDA device", file=sys.stderr)
        return 1
    plans = _plans(arguments, ops)
    environment = machine.environment(0, "default")
    del environment["OMP_NUM_THREADS"]
    header = machine.header(
        " ".join(["python -m ppg_fast.bench", *given]),
        arguments.device,
        grid=arguments.grid,
        allocators=machine.ALLOCATORS,
        environment=environment,
    )
    results = [_measure(plan) for plan in plans]
    for op in ops:
        name = result_file.name_of(op, arguments.device, header["machine_info"])
        print(f"wrote {result_file.write(arguments.output, name, _merged(op, header, results))}")
    print(render.report(arguments.output))
    return 0


def _plans(arguments: argparse.Namespace, ops: list[str]) -> list[dict[str, Any]]:
    """One process for each setting of threads and allocator, one for the memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = [int(n) for n in arguments.threads.split(",") if n] or (
        [1] if arguments.grid == "quick" else sorted({1, cores})
    )
    wanted: dict[tuple[int, str], list[str]] = {}
    for op in ops:
        for setting in settings_of(op, arguments.device, threads)[: 1 if arguments.grid == "quick" else None]:
            wanted.setdefault((setting[0], "tuned") if arguments.grid == "quick" else setting, []).append(op)
    shared = {"grid": arguments.grid, "device": arguments.device, "dialogues": arguments.dialogues}
    plans = [
        {**shared, "ops": chosen, "threads": n, "allocator": name, "memory": False}
        for (n, name), chosen in wanted.items()
    ]
    if not arguments.no_memory:
        plans.append({**shared, "ops": ops, "threads": max(threads), "allocator": "default", "memory": True})
    return plans


def _measure(plan: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        path.write_text(json.dumps({**plan, "out": str(Path(folder, "out.json"))}))
        environment = {**os.environ, **machine.environment(plan["threads"], plan["allocator"])}
        subprocess.run([sys.executable, "-m", "ppg_fast.bench.worker", str(path)], env=environment, check=True)
        return json.loads(Path(folder, "out.json").read_text())


def _merged(op: str, header: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """One op's file: entries of every setting, each with the peak that belongs to it."""
    peaks = {
        _likeness(p["case"], name): value for r in results for p in r["peaks"] for name, value in p["bytes"].items()
    }
    entries = [e for r in results for e in r["entries"] if e["params"]["op"] == op]
    for entry in entries:
        sizes = peaks.get(_likeness(entry["params"], entry["param"]))
        if sizes is not None:
            entry["extra_info"] |= {"peak_extra_bytes": statistics.median_low(sizes), "peaks_extra_bytes": sizes}
    missing = {name: reason for r in results for name, reason in r["missing"].get(op, {}).items()}
    return {**header, "ppg_fast": {**header["ppg_fast"], "missing": missing}, "benchmarks": entries}


def _likeness(params: dict[str, Any], provider: str) -> tuple[Any, ...]:
    return (*(params[name] for name in LIKE), provider)
