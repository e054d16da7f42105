"""`python3 -m bench.gpu` from the root of the repository, which `make gpu` calls: needs torch, nvcc and pytest,
installs nothing."""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import build, pack, tools
from .driver import Collected, Part, Store, header, run, stop_on_signals

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build/gpu"
ALL = ("build", "tests", "counts", "sanitizer", "dram", "bench", "steps")
EXTRA = ("plans",)  # for those who choose plans; not in a run of everything
LIMITS = {
    "build": 180,
    "tests": 170,
    "counts": 40,
    "sanitizer": 75,
    "dram": 50,
    "bench": 150,
    "steps": 540,
    "plans": 120,
}  # seconds


def worker(part: str, device: str, tiny: bool, lines: Path | None = None) -> list[str]:
    """The command of a measuring process."""
    options = ["--device", device, "--seconds", "{seconds}", *(["--tiny"] if tiny else [])]
    return [sys.executable, "-m", "ppg_fast.bench.gpu.measure", part, *([str(lines)] if lines else []), *options]


def _ended(statuses: list[int | None], output: str, _: list[dict[str, Any]]) -> Collected:
    bad = next((n for n in statuses if n), None)
    last = next((line for line in reversed(output.strip().splitlines()) if line.strip()), "")
    return {}, None if bad is None else f"exit status {bad}: {last[:300]}"


def _built(statuses: list[int | None], output: str, lines: list[dict[str, Any]]) -> Collected:
    found, reason = _ended(statuses, output, lines)
    if reason is None and not build.is_current(ROOT):
        reason = "no extension was built: is there a C++ compiler?"
    return {**found, "extension": [p.name for p in sorted((ROOT / "ppg_fast").glob("_C*.so"))]}, reason


def _tested(statuses: list[int | None], output: str, _: list[dict[str, Any]]) -> Collected:
    found, reason = tools.junit(WORK / "junit.xml")
    status = next((n for n in statuses if n), None)
    return found, reason or (f"pytest ended with exit status {status}" if status else None)


def _sanitized(statuses: list[int | None], output: str, lines: list[dict[str, Any]]) -> Collected:
    found = tools.sanitized(output)
    wrong = [f"{summary['tool']}: {summary['errors']} errors" for summary in found if summary["errors"]]
    absent = [f"{tool} gave no summary" for tool in ("memcheck", "racecheck") if tool not in {s["tool"] for s in found}]
    return {"summaries": found}, "; ".join(wrong + absent) or _ended(statuses, output, lines)[1]


def _moved(statuses: list[int | None], output: str, lines: list[dict[str, Any]]) -> Collected:
    """Bytes of memory of each call: its kernels are those that ncu saw since the call before."""
    kernels, cases = tools.ncu_kernels(output), [line for line in lines if "op" in line]
    if len(kernels) != len(cases):
        return {
            "kernels": kernels
        }, f"{len(kernels)} kernels for {len(cases)} calls; {_ended(statuses, output, lines)[1] or ''}"
    for case, kernel in zip(cases, kernels, strict=True):
        case |= {"kernel": kernel["kernel"][:120], "bytes": sum(kernel.get(name, 0.0) for name in tools.DRAM[:2])}
        case["seconds"], case["over_least"] = kernel.get(tools.DRAM[2]), case["bytes"] / (case["read"] + case["write"])
    return {}, None


def parts(names: Sequence[str], device: str, tiny: bool, args: Sequence[str]) -> list[Part]:
    """What to run, in order; what a missing tool or a missing GPU leaves out says so."""
    site, report = WORK / "site", WORK / "junit.xml"
    environment = build.environment(site)
    exact = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a byte too far is outside of an allocation
    nvcc = [
        "nvcc",
        "-std=c++17",
        "-O3",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-o",
        str(WORK / "plans"),
        str(ROOT / "bench/gpu/plans.cu"),
    ]

    def part(
        name: str, commands: list[list[str]], collect: Any = _ended, needs: str | None = None, **more: Any
    ) -> Part:
        absent = f"{needs} is not on PATH" if needs and not shutil.which(needs) else None
        return Part(
            name,
            LIMITS[name],
            commands,
            collect,
            **{"folder": site, "environment": environment, "missing": absent, **more},
        )

    def lines(name: str) -> Path:
        return WORK / f"{name}.jsonl"

    def measured(name: str) -> Part:
        return part(name, [worker(name, device, tiny, lines(name))], lines=lines(name))

    checked = [tools.sanitizer_command(name, worker("kernels", device, tiny)) for name in ("memcheck", "racecheck")]
    tests = tools.pytest_command(ROOT, build.gpu_tests(ROOT), report, 0 if tiny else 8, list(args))
    known = [
        part("build", [build.command(ROOT)], _built, folder=ROOT, environment={}, after=lambda: build.link(ROOT, site)),
        part("tests", [tests], _tested),
        part("sanitizer", checked, _sanitized, "compute-sanitizer", environment=exact),
        part(
            "dram", [tools.ncu_command(worker("dram", device, tiny, lines("dram")))], _moved, "ncu", lines=lines("dram")
        ),
        part(
            "plans", [nvcc, [str(WORK / "plans"), str(lines("plans")), "{seconds}"]], needs="nvcc", lines=lines("plans")
        ),
        *(measured(name) for name in ("counts", "bench", "steps")),
    ]
    report.unlink(missing_ok=True)
    if "build" not in names and not build.is_current(ROOT):
        names = ["build", *names]
    by_name = {part.name: part for part in known}
    return [by_name[name] for name in names]


def main(argv: Sequence[str] | None = None) -> int:
    """0 where every part passed, 1 where not, 2 bad usage. The results file is there in any case."""
    parser = argparse.ArgumentParser(
        prog="make gpu", description="Prove and measure everything on a GPU, into one results file."
    )
    parser.add_argument("--only", default="", help=f"comma-separated: {', '.join(ALL + EXTRA)} [{', '.join(ALL)}]")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", help="folder of the results file [runs/gpu]")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it [9]")
    parser.add_argument("--commit", default=None, help="what is measured, where the tree is no git repository")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="cpu: only to see that the parts run")
    parser.add_argument("--tiny", action="store_true", help="sizes that show that the parts run, and nothing else")
    parser.add_argument("--pytest", default="", help="more options of pytest")
    given = parser.parse_args(argv)
    names = [name for name in given.only.split(",") if name] or list(ALL)
    if unknown := [name for name in names if name not in ALL + EXTRA]:
        parser.error(f"--only must name {', '.join(ALL + EXTRA)}, got {unknown[0]!r}")
    stop_on_signals()
    for line in pack.take(ROOT):
        print(f"pack: {line}", flush=True)
    build.link(ROOT, WORK / "site")
    stem = "gpu" if tuple(names) == ALL else f"gpu-{'-'.join(names)}"
    said = " ".join(["make gpu", *([f"ONLY={given.only}"] if given.only else [])])
    store = Store(given.out.resolve(), f"{stem}.{given.device}", header(said, given.commit))
    passed = run(parts(names, given.device, given.tiny, given.pytest.split()), store, 60 * given.minutes, WORK / "logs")
    print(f"wrote {store.path}")
    command = [sys.executable, "-m", "ppg_fast.bench.gpu.sections", str(store.path)]
    subprocess.run(
        command, env={**os.environ, **build.environment(WORK / "site")}, cwd=WORK / "site", timeout=60, check=False
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
