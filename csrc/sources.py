"""What the extension is compiled from, for those that compile it or look at it: plain Python, without torch."""

import hashlib
import re
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DTYPES, SUMS = ("F32", "BF16", "F16"), ("PLAIN", "ENTROPY", "SCORE_NORM")  # of csrc/cuda/row.cuh and csrc/args.h
ISAS = (2, 1, 0)  # numbers of enum Isa in csrc/cpu/isa.h


class Unit(NamedTuple):
    """A source and what is defined for it: one object."""

    source: Path
    defines: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join([self.source.stem, *(define.split("=")[1] for define in self.defines)])

    @property
    def flags(self) -> list[str]:
        return [f"-D{define}" for define in self.defines]


def cuda_units() -> list[Unit]:
    """Of csrc/cuda, the slowest first: the sweep's kernels are many, so they are compiled side by side."""
    sweep, *others = sorted((ROOT / "csrc/cuda").glob("*.cu"), key=lambda path: path.stem != "policy_loss_sweep")
    sweeps = [Unit(sweep, (f"PPG_DTYPE={dtype}", f"PPG_SUMS={sums}")) for dtype, sums in product(DTYPES, SUMS)]
    return sweeps + [Unit(source) for source in others]


def cpu_units() -> list[Unit]:
    """Of csrc/cpu, the slowest first: an object for each instruction set that a source has kernels for."""
    texts = {path: path.read_text() for path in sorted((ROOT / "csrc/cpu").glob("*.cpp"), reverse=True)}
    vectors = [path for path, text in texts.items() if '#include "foreach_isa.h"' in text]
    wide = [Unit(path, (f"PPG_ISA={isa}",)) for path, isa in product(vectors, ISAS)]
    return wide + [Unit(path) for path in texts if path not in vectors]


def checksum() -> str:
    """Of all that decides the compiled code; the extension tells it, so that a finished one is known to fit."""
    kinds = (".h", ".cuh", ".cpp", ".cu", ".py")
    files = [ROOT / "setup.py", *sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in kinds)]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


class Built(NamedTuple):
    """What an extension tells of itself: the checksum of its sources, the code that it has for GPUs (sm_90a,
    compute_100), and whether its kernels give up where they would wait for ever."""

    sources: str = ""
    gpus: tuple[str, ...] = ()
    watchdog: bool = False

    @property
    def text(self) -> str:
        return f"sources={self.sources} gpus={','.join(self.gpus)} watchdog={int(self.watchdog)}"


def built(extension: Path) -> Built:
    """Read from the file, which need not be loaded; empty where it tells nothing."""
    told = re.search(rb"sources=([0-9a-f]{64}) gpus=([\w,]*) watchdog=([01])", extension.read_bytes())
    if told is None:
        return Built()
    sources, gpus, watchdog = (part.decode() for part in told.groups())
    return Built(sources, tuple(gpus.split(",")) if gpus else (), watchdog == "1")


def misfit(extension: Path, capabilities: Iterable[str] = (), watchdog: bool = False) -> str | None:
    """Why the extension is not what would be built now for GPUs of these compute capabilities ("9.0"), else None."""
    told, wanted = built(extension), checksum()
    if told.sources != wanted:
        return f"built from other sources: {told.sources[:12] or 'it tells none'}, these are {wanted[:12]}"
    if told.watchdog != watchdog:
        return f"built {'with' if told.watchdog else 'without'} a watchdog"
    lacking = [capability for capability in capabilities if not any(_runs(code, capability) for code in told.gpus)]
    return f"built for {', '.join(told.gpus) or 'no GPU'}, here is {lacking[0]}" if lacking else None


def _runs(code: str, capability: str) -> bool:
    """Machine code runs on later parts of its generation, that with an "a" on its own part alone; PTX on all later
    ones. Kernels for clusters are in code for 9.0 and later only, where the launchers ask for them."""
    kind, number, own = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", code).groups()
    has, there = int(number), int(capability.replace(".", ""))
    if own or has == there:
        return has == there
    if kind == "sm":
        return has // 10 == there // 10 and has < there
    return has < there and (has >= 90) == (there >= 90)
