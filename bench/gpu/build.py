"""The package where nothing is installed: a folder of links that Python finds, and the extension built in place."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

WITHOUT_INSTALLING = {"kernels": "kernels/triton", "bench": "bench"}  # package-dir of pyproject.toml


def link(root: Path, site: Path, extension: Path | None = None) -> None:
    """Make ``site``/ppg_fast the package as it would be installed. Links, so that it is the working tree that runs;
    around another ``extension`` where one is given."""
    package = site / "ppg_fast"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (root / "ppg_fast").iterdir():
        if entry.name in ("__pycache__", *WITHOUT_INSTALLING):
            continue
        if not (extension and entry.match("_C*.so")):
            (package / entry.name).symlink_to(entry.resolve())
    if extension:
        (package / extension.name).symlink_to(extension.resolve())
    for name, folder in WITHOUT_INSTALLING.items():
        (package / name).symlink_to((root / folder).resolve())
    (site / "bench").unlink(missing_ok=True)
    (site / "bench").symlink_to((root / "bench").resolve())  # for what must not import the package: `shard`


def environment(site: Path) -> dict[str, str]:
    """Of every process that imports the package, from ``site``, which must also be its folder; and what was on the path
    before."""
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(site), *([before] if before else []), str(site.parent / "wheels")])  # see pack.py
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def command(root: Path) -> list[str]:
    """Builds the extension beside its sources, for the GPU that is there unless TORCH_CUDA_ARCH_LIST says otherwise."""
    return [
        sys.executable,
        str(root / "setup.py"),
        "--quiet",
        "build_ext",
        "--inplace",
        f"--build-temp={root / 'build/gpu/temp'}",
    ]


def sources(root: Path) -> Any:
    """csrc/sources.py of the tree, which setup.py compiles by."""
    return SimpleNamespace(**runpy.run_path(str(root / "csrc/sources.py")))


@cache
def told(field: str) -> list[str]:
    """What nvidia-smi says of each GPU here, without importing anything; nothing where nobody can say."""
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in said.splitlines() if line.strip()]


def gpus() -> list[str]:
    """Compute capabilities of the GPUs here."""
    return sorted({capability for capability in told("compute_cap") if re.fullmatch(r"\d+\.\d", capability)})


def misfit(root: Path, extension: Path | None, watchdog: bool = False) -> str | None:
    """Why an extension is not what would be built here and now; None where it is."""
    if extension is None or not extension.exists():
        return "not there"
    return sources(root).misfit(extension, gpus(), watchdog)


def is_current(root: Path) -> bool:
    """Whether an extension is there that was built from these sources, for the GPUs that are here."""
    return misfit(root, next(iter(sorted((root / "ppg_fast").glob("_C*.so"))), None)) is None


def gpu_tests(root: Path) -> list[str]:
    """Test files that hold tests for a GPU: marked so, or run on every backend."""
    wanted = re.compile(r"mark\.gpu|def test_\w+\([^)]*\bbackend\b")
    return [str(path) for path in sorted((root / "tests").glob("test_*.py")) if wanted.search(path.read_text())]
