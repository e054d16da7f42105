"""The wheel holds the whole package, and installs and runs where there is no compiler.

`make wheel` sets PPG_FAST_WHEEL to the wheel it has built. Else one is packed here around the extension that is built
already, which takes seconds.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = {"ppg_fast": "ppg_fast", "ppg_fast/bench": "bench", "ppg_fast/kernels": "kernels/triton"}
COMPILERS = ("c++", "g++", "gcc", "cc", "clang", "clang++", "nvcc", "ninja", "ld", "as")
OLDEST = (3, 10)  # requires-python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if given := os.environ.get("PPG_FAST_WHEEL"):
        return Path(given)
    built = sorted((ROOT / "ppg_fast").glob("_C*.so"))
    if not built:
        pytest.skip("the extension is not built")
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for folder in ("ppg_fast", "bench", "kernels", "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so", "results"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(out)]
    environment = os.environ | {"PPG_FAST_EXTENSION": str(built[-1]), "PYTHONPATH": ""}
    run([sys.executable, "-m", "pip", "wheel", *options, str(copy)], cwd=copy, env=environment)
    return next(out.glob("*.whl"))


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


# ---- what is in it ---------------------------------------------------------------------------------------------------
def in_the_tree():
    """Every file of the package in the repository, as it should be called in the wheel."""
    found = set()
    for name, folder in SOURCES.items():
        paths = [p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob("*") if "__pycache__" not in p.parts]
        found |= {
            f"{name}/{p}" for p in paths if p.suffix in (".py", ".yaml", ".jinja", ".html") or p.name == "py.typed"
        }
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    packaged = {name for name in names if ".dist-info/" not in name}
    extensions = {name for name in packaged if name.endswith(".so")}
    assert extensions == {"ppg_fast/_C.abi3.so"}
    assert packaged - extensions == in_the_tree()
    assert {"ppg_fast/py.typed", "ppg_fast/launch/ddp.yaml", "ppg_fast/launch/fsdp2.yaml"} <= packaged
    assert "ppg_fast/dialogues/templates/chatml.jinja" in packaged
    assert re.fullmatch(r"ppg_fast-[\d.]+-cp310-abi3-(linux|manylinux_2_\d+)_x86_64(\.manylinux\w+)*\.whl", wheel.name)


def test_the_wheel_says_who_and_where(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata, entry_points, tags = (
            next(archive.read(name).decode() for name in archive.namelist() if name.endswith(f".dist-info/{file}"))
            for file in ("METADATA", "entry_points.txt", "WHEEL")
        )
    assert "Author: The ppg_fast authors" in metadata
    assert {"Homepage", "Repository", "Documentation", "Changelog"} == set(
        re.findall(r"^Project-URL: (\w+), https://\S+$", metadata, re.MULTILINE)
    )
    assert "ppg-fast = ppg_fast.cli:main" in entry_points
    assert "ppg_fast = ppg_fast.integrations.verl" in entry_points
    assert re.search(r"^Tag: cp310-abi3-", tags, re.MULTILINE)


def test_the_extension_keeps_to_the_stable_abi(wheel):
    pytest.importorskip("abi3audit")
    run([sys.executable, "-m", "abi3audit", "--strict", str(wheel)])


# ---- where it is installed -------------------------------------------------------------------------------------------
def pythons():
    """Every Python at hand that may install the wheel, by version: on PATH, or built by pyenv."""
    names = [f"python3.{minor}" for minor in range(OLDEST[1], 20)]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [sys.executable, *filter(None, map(shutil.which, names)), *sorted(pyenv.glob("3.*/bin/python3"))]
    found = {}
    for candidate in candidates:
        ask = [str(candidate), "-c", "import sys, venv; print(*sys.version_info[:2])"]
        answer = subprocess.run(ask, capture_output=True, text=True)  # a shim of pyenv may lead nowhere
        if answer.returncode == 0 and (version := tuple(map(int, answer.stdout.split()))) >= OLDEST:
            found.setdefault(version, str(candidate))
    return found


def installed(wheel, python, folder):
    """A fresh environment with the wheel alone, and the variables of a process that finds no compiler."""
    run([python, "-m", "venv", "--without-pip", str(folder)])
    own = folder / "bin/python"
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile"]
    run([sys.executable, "-m", "pip", "--python", str(own), "install", *options, str(wheel)])
    environment = {"PATH": str(folder / "bin"), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    assert not [name for name in COMPILERS if shutil.which(name, path=environment["PATH"])]
    return own, environment


def packages_of(python, environment):
    return Path(
        run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], env=environment).strip()
    )


PROGRAM = """
import math, torch, ppg_fast as ppg
from ppg_fast import backends
assert backends.why_not("cpu") is None, backends.why_not("cpu")
logits, labels = torch.tensor([[[2.0, -1.0, 0.5], [0.25, 0.0, -3.0]]]).requires_grad_(), torch.tensor([[0, 2]])
out = ppg.policy_loss(logits, labels, torch.tensor([[1.5, -0.5]]), backend="cpu")
out.loss.backward()
for row, (label, advantage) in enumerate(((0, 1.5), (2, -0.5))):
    z = logits[0, row].tolist()
    total = sum(map(math.exp, z))
    for v, value in enumerate(z):
        expected = -advantage / 2 * ((v == label) - math.exp(value) / total)
        assert abs(logits.grad[0, row, v].item() - expected) < 1e-6, (row, v)
    assert abs(out.logprobs[0, row].item() - (z[label] - math.log(total))) < 1e-6
print(ppg.__file__)
"""


def test_a_loss_runs_where_there_is_no_compiler(wheel, tmp_path):
    """In a fresh environment that borrows the packages of this one, torch among them, and outside of the repository."""
    python, environment = installed(wheel, sys.executable, tmp_path / "env")
    packages = packages_of(python, environment)
    (packages / "borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    assert run([str(python), "-c", PROGRAM], env=environment, cwd=tmp_path).strip() == str(
        packages / "ppg_fast/__init__.py"
    )
    assert "cpu" in run([str(tmp_path / "env/bin/ppg-fast"), "info"], env=environment, cwd=tmp_path)


LOAD = """
import compileall, ctypes, sys
package, *libraries = sys.argv[1:]
for library in libraries:
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
ctypes.CDLL(package + "/_C.abi3.so")  # every symbol is looked for at once
sys.exit(not compileall.compile_dir(package, quiet=1))
"""


@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_other_pythons_can_load_it(wheel, tmp_path, which):
    """pip takes the wheel, the extension finds its symbols in that Python and in libtorch, all modules can be parsed.

    A loss is not computed: that needs a torch built for that Python.
    """
    found = pythons()
    version = min(found) if which == "oldest" else max(found)
    python, environment = installed(wheel, found[version], tmp_path / "env")
    package = packages_of(python, environment) / "ppg_fast"
    libraries = [str(Path(torch.__file__).parent / "lib" / name) for name in ("libc10.so", "libtorch_cpu.so")]
    run([str(python), "-c", LOAD, str(package), *libraries], env=environment, cwd=tmp_path)
