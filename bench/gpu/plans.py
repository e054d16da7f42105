"""The program of bench/gpu/plans.cu: how it is compiled, and whether one that is there is of today's sources."""

import hashlib
from pathlib import Path

PROGRAM = Path("build/gpu/plans")


def checksum(root: Path) -> str:
    """Of all that decides the program, which holds it as text."""
    headers = (path for path in (root / "csrc").rglob("*") if path.suffix in (".h", ".cuh"))
    files = [root / "bench/gpu/plans.cu", *sorted(headers)]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def command(root: Path, program: Path) -> list[str]:
    """For Hopper, whose plans are to be chosen."""
    flags = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", f'-DPPG_SOURCES="{checksum(root)}"']
    return ["nvcc", *flags, "-o", str(program), str(root / "bench/gpu/plans.cu")]


def is_current(root: Path, program: Path) -> bool:
    return program.exists() and checksum(root).encode() in program.read_bytes()
