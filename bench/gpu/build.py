"""The package where nothing is installed: a folder of links that Python finds, and the extension built in place."""

import os
import re
import shutil
import sys
from pathlib import Path

WITHOUT_INSTALLING = {"kernels": "kernels/triton", "bench": "bench"}  # package-dir of pyproject.toml


def link(root: Path, site: Path) -> None:
    """Make ``site``/ppg_fast the package as it would be installed. Links, so that it is the working tree that runs."""
    package = site / "ppg_fast"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (root / "ppg_fast").iterdir():
        if entry.name not in ("__pycache__", *WITHOUT_INSTALLING):
            (package / entry.name).symlink_to(entry.resolve())
    for name, folder in WITHOUT_INSTALLING.items():
        (package / name).symlink_to((root / folder).resolve())


def environment(site: Path) -> dict[str, str]:
    """Of every process that imports the package, from ``site``, which must also be its folder; and what was on the path
    before."""
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(site), *([before] if before else [])])
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


def is_current(root: Path) -> bool:
    """Whether an extension is there that is newer than its sources."""
    built = sorted((root / "ppg_fast").glob("_C*.so"))
    sources = [root / "setup.py", *(p for p in (root / "csrc").rglob("*") if p.is_file())]
    return bool(built) and built[-1].stat().st_mtime > max(p.stat().st_mtime for p in sources)


def gpu_tests(root: Path) -> list[str]:
    """Test files that hold tests for a GPU: marked so, or run on every backend."""
    wanted = re.compile(r"mark\.gpu|def test_\w+\([^)]*\bbackend\b")
    return [str(path) for path in sorted((root / "tests").glob("test_*.py")) if wanted.search(path.read_text())]
