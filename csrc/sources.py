"""What the extension is compiled from, for those that compile it or look at it: plain Python, without torch."""

import hashlib
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DTYPES, SUMS = ("F32", "BF16", "F16"), ("PLAIN", "ENTROPY", "SCORE_NORM")  # in csrc/cuda/row.cuh and csrc/args.h


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


def cuda_units(csrc: Path = ROOT / "csrc") -> list[Unit]:
    """Of every .cu file, the slowest first. The sweep's kernels are many, so they are compiled side by side."""
    sweep, *others = sorted((csrc / "cuda").glob("*.cu"), key=lambda path: path.stem != "policy_loss_sweep")
    sweeps = [Unit(sweep, (f"PPG_DTYPE={dtype}", f"PPG_SUMS={sums}")) for dtype, sums in product(DTYPES, SUMS)]
    return sweeps + [Unit(source) for source in others]


def checksum() -> str:
    """Of all that decides the compiled code; the extension tells it, so that a finished one is known to fit."""
    kinds = (".h", ".cuh", ".cpp", ".cu", ".py")
    files = [ROOT / "setup.py", *sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in kinds)]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()
