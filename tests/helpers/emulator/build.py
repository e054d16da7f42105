"""Compile the CUDA launchers and kernels by g++ under the emulator, beside the bindings, into one library for CPU
tensors.

torch.ops.load_library(build())      # registers torch.ops.ppg_fast_emulated.*, schemas in csrc/bindings.cpp
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parents[3]
EMULATOR = Path(__file__).parent
CACHE = ROOT / "build" / "emulator"
SOURCES = [path for path in sorted((ROOT / "csrc/cuda").glob("*.cu")) if "policy_loss" not in path.stem]  # not patched
COMPILE = (
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-DPPG_EMULATED",
    "-DPPG_WATCHDOG",
    "-Wno-unknown-pragmas",
    "-U_FORTIFY_SOURCE",
)
STABLE = ("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030a0000")
KERNEL = ("-x", "c++", "-include", str(EMULATOR / "cuda_emu.h"))
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

Patch = tuple[str, str, str]  # file name in csrc/cuda, text that occurs there once, its replacement


def why_not() -> str | None:
    """None if the emulated build can run here, else what is missing."""
    return None if shutil.which("g++") else "the CUDA emulator needs g++"


def build(patches: Sequence[Patch] = ()) -> Path:
    """The path of the library, built unless one of the same sources, flags and torch is in the cache. Processes may ask
    at once.

    ``patches`` change the sweep's kernels and launchers, see `planted`. Raises RuntimeError with the compiler's
    message, ValueError for a patch whose text does not occur exactly once.
    """
    import torch
    from torch.utils.cpp_extension import include_paths

    includes = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    lib = str(Path(torch.__file__).parent / "lib")
    link = (f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch", "-ltorch_cpu", "-lc10")
    patched = ("-O0",) if patches else ()  # compiled once, run for seconds
    with _sources(patches) as csrc:
        jobs = {
            **dict.fromkeys(_swept(csrc), (*KERNEL, *patched)),
            ROOT / "csrc/bindings.cpp": (*STABLE, *includes, f"-DPPG_TORCH={torch.__version__}"),
            **dict.fromkeys(SOURCES, KERNEL),
            EMULATOR / "control.cpp": (),
        }
        objects = _compile_all(jobs)
    return _link(objects, ".so", "-shared", *link)


def planted(faults: Sequence[Patch]) -> list[Patch]:
    """Patches by which one library has all of ``faults``, of which `Control.plant` chooses one by its number, from 1
    on; what is planted in are whole statements or expressions."""

    def choice(number: int, old: str, new: str) -> str:
        if old.endswith(";"):
            return f"if (emu::planted == {number}) {{ {new} }} else {{ {old} }}"
        return f"(emu::planted == {number} ? {new} : {old})"

    return [(name, old, choice(number, old, new)) for number, (name, old, new) in enumerate(faults, 1)]


def install(library: Path | str) -> ModuleType:
    """Make the library backend "cuda", for CPU tensors, of this process."""
    import torch

    from ppg_fast import backends

    torch.ops.load_library(library)
    spec = importlib.util.spec_from_file_location("ppg_fast_emulated", backends.load("cpu").__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._lib, module.require_cuda, module.on_gpu = torch.ops.ppg_fast_emulated, lambda: None, lambda _: True
    sys.modules["ppg_fast_emulated"] = module
    backends.MODULES["cuda"] = "ppg_fast_emulated"
    backends.forget()
    return module


def build_sanitized() -> Path:
    """The path of a program that runs every launcher under AddressSanitizer and UBSan, see sanitized.cpp."""
    sources = (*_swept(ROOT / "csrc"), *SOURCES)
    jobs = dict.fromkeys(sources, (*KERNEL, "-O0", *SANITIZE)) | {EMULATOR / "sanitized.cpp": ("-O0", *SANITIZE)}
    return _link(_compile_all(jobs), ".exe", *SANITIZE)


class Stats(NamedTuple):
    """What the emulated launches did since the last time they were asked, see emu::Stats in cuda_emu.h."""

    copies: int
    copied_bytes: int
    sends: int
    most_in_flight: int
    vector_loads: int
    vector_stores: int
    launches: int
    cluster: int
    block: int
    queries: int
    copies_ahead: int


class Control:
    """The emulator's switches, for a library that is already loaded."""

    def __init__(self, library: Path | str) -> None:
        self._lib = ctypes.CDLL(str(library))

    def set(
        self,
        *,
        major: int = 9,
        resident: int = 2,
        cluster: int = 0,
        threads: int = 0,
        slots: int = 0,
        seed: int = 1,
        mode: int = 1,
        query_error: int = 0,
        lose: int = 0,
    ) -> None:
        """Play a device of compute capability ``major``; force a plan where ``threads`` is given; ``mode`` 0 eager, 1
        random, 2 late; ``query_error``: what a query for the number of resident clusters answers; lose the arrival
        number ``lose`` at a barrier."""
        settings = (major, resident, cluster, threads, slots, seed, mode, query_error, lose)
        self._lib.emulator_set(*map(ctypes.c_int, settings))

    def plant(self, fault: int) -> None:
        """Of a library that was built with faults, see `planted`; 0: none."""
        self._lib.emulator_plant(fault)

    def take_stats(self) -> Stats:
        """The counts since the last call."""
        counts = (ctypes.c_int64 * len(Stats._fields))()
        self._lib.emulator_take_stats(counts)
        return Stats(*counts)


def _swept(csrc: Path) -> list[Path]:
    """The longest to compile first."""
    return [csrc / "cuda/policy_loss_sweep.cu", csrc / "cuda/policy_loss.cu"]


@contextmanager
def _sources(patches: Sequence[Patch]) -> Iterator[Path]:
    if not patches:
        yield ROOT / "csrc"
        return
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder, "csrc")
        shutil.copytree(ROOT / "csrc", csrc)
        for name, old, new in patches:
            text = (csrc / "cuda" / name).read_text()
            if text.count(old) != 1:
                raise ValueError(f"the text of a patch must occur once in {name}, got {text.count(old)} times: {old!r}")
            (csrc / "cuda" / name).write_text(text.replace(old, new))
        yield csrc


def _compile_all(jobs: dict[Path, tuple[str, ...]]) -> list[Path]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: _compile(job[0], (*COMPILE, *job[1])), jobs.items()))


def _compile(source: Path, flags: tuple[str, ...]) -> Path:
    texts = _texts([source, EMULATOR / "cuda_emu.h"])
    key = digest(source.name, *flags, *texts)
    return cached(key, ".o", lambda out: _run("g++", *flags, "-c", str(source), "-o", str(out)))


def _texts(files: Sequence[Path]) -> list[str]:
    """Of the files and all that they include by a name in quotes: what an object depends on."""
    found: dict[Path, str] = {}
    left = list(files)
    while left:
        path = left.pop().resolve()
        if path not in found and path.exists():
            found[path] = path.read_text()
            left += [path.parent / name for name in re.findall(r'^#include "(.+)"', found[path], re.MULTILINE)]
    return list(found.values())


def _link(objects: list[Path], suffix: str, *flags: str) -> Path:
    names = [str(path) for path in objects]
    return cached(digest(*names, *flags), suffix, lambda out: _run("g++", *names, *flags, "-o", str(out)))


def digest(*parts: str) -> str:
    """A file name for what ``parts`` determine."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def cached(key: str, suffix: str, make: Callable[[Path], None]) -> Path:
    """CACHE/key.suffix, made under a lock and put there by a rename, so that no process sees half a file."""
    CACHE.mkdir(parents=True, exist_ok=True)
    out = CACHE / (key + suffix)
    with open(CACHE / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            part = out.with_name(f"{key}.{os.getpid()}.part{suffix}")
            make(part)
            part.replace(out)
    return out


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
