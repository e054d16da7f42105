"""`python3 -m bench.gpu` from the root of the repository, which `make gpu` calls: needs torch, nvcc and pytest,
installs nothing."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import build, dry, pack
from .driver import run, stop_on_signals
from .parts import Setting, cores, link, parts, probe
from .schedule import SLOTS, WHOLE, slots
from .store import Store, header

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench/results"


def setting(is_dry: bool, options: Sequence[str]) -> Setting:
    """Of the GPU, or of a CPU that stands in for it."""
    if is_dry:
        return Setting(ROOT, **dry.setting(ROOT, options))
    files = sorted(build.gpu_tests(ROOT), key=lambda path: not path.endswith("test_gpu.py"))  # the first one tells most
    tests = ("-m", "gpu", *options)
    return Setting(ROOT, ROOT / "build/gpu", "cuda", False, tests, tuple(files), max(1, min(8, cores() // 2)))


def main(argv: Sequence[str] | None = None) -> int:
    """0 where every part passed, 1 where not, 2 bad usage. The results file is there in any case."""
    parser = argparse.ArgumentParser(
        prog="make gpu", description="Prove and measure everything on a GPU, into one results file."
    )
    parser.add_argument("--only", default="", help=f"comma-separated, in this order: {','.join(SLOTS)} [all]")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", help="folder of the results file [runs/gpu]")
    parser.add_argument("--minutes", type=float, default=WHOLE / 60, help=f"for all of it [{WHOLE / 60:.0f}]")
    parser.add_argument("--commit", default=None, help="what is measured, where the tree is no git repository")
    parser.add_argument("--resume", action="store_true", help="go on where a run of the same commit was ended")
    parser.add_argument("--dry", action="store_true", help="every step with tiny sizes on a CPU and tools that pretend")
    parser.add_argument("--pytest", default="", help="more options of pytest")
    given = parser.parse_args(argv)
    names = [name for name in given.only.split(",") if name] or list(SLOTS)
    if unknown := [name for name in names if name not in SLOTS]:
        parser.error(f"--only must name {', '.join(SLOTS)}, got {unknown[0]!r}")
    stop_on_signals()
    here = setting(given.dry, given.pytest.split())
    for line in [] if given.dry else pack.take(ROOT):
        print(f"pack: {line}", flush=True)
    link(here)
    stem = "gpu" if names == list(SLOTS) else f"gpu-{'-'.join(names)}"
    said = " ".join(["make gpu", *([f"ONLY={given.only}"] if given.only else [])])
    name = f"{stem}.{'dry' if given.dry else 'cuda'}"
    store = Store(given.out.resolve(), name, header(said, given.commit), given.resume)
    passed = run(parts(names, here, slots(RESULTS)), store, 60 * given.minutes, probe(here.device))
    print(f"wrote {store.path}", flush=True)
    show(store.path, here)
    return 0 if passed else 1


def show(results: Path, here: Setting) -> None:
    """The results file as text."""
    command = [sys.executable, "-m", "ppg_fast.bench.gpu.sections", str(results)]
    environment = {**os.environ, **build.environment(here.site)}
    try:
        subprocess.run(command, env=environment, cwd=here.site, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        print("its sections were not ready within 30 s; the file is there", flush=True)


if __name__ == "__main__":
    sys.exit(main())
