"""Instructions of the CPU row kernels for each element, counted by callgrind: `python -m ppg_fast.bench.instructions`.

A figure that does not depend on the machine's mood. A run without a kernel is counted too and taken off: loading and
the making of inputs. valgrind knows no AVX-512.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from . import machine, result_file

N, V = 4, 8192
KERNELS = ("policy_loss", "logprobs")
FLAGS = ("-O3", "-std=c++20", "-ffp-contract=fast", "-Wno-attributes", "-Wno-psabi")  # as in setup.py
OF_DTYPE = {"float32": ("-DPPG_DTYPE=F32",), "bfloat16": ("-DPPG_DTYPE=BF16",)}
OF_ISA = {"avx2": ("-DPPG_LANES=8",), "baseline": ("-DPPG_LANES=4",)}
SOURCES = Path(__file__).resolve().parents[1]


def why_not() -> str | None:
    """None if instructions can be counted here, else what is missing."""
    needed = [name for name in ("valgrind", "g++") if shutil.which(name) is None]
    return f"needs {' and '.join(needed)}" if needed else None


def build(folder: Path, dtype: str, isa: str) -> Path:
    """The kernels of one dtype and instruction set and a driver without Python, compiled as the extension is."""
    program = folder / f"instructions-{dtype}-{isa}"
    flags = (*FLAGS, *OF_DTYPE[dtype], *OF_ISA[isa], "-w")
    subprocess.run(["g++", *flags, str(SOURCES / "bench/instructions.cpp"), "-o", str(program)], check=True)
    return program


def count(program: Path, *arguments: Any) -> int:
    """Instructions of one run; ValueError with the program's words where it or callgrind fails."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", str(program), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", run.stderr)
    if run.returncode or not found:
        raise ValueError(f"callgrind must end well, got exit status {run.returncode}: {run.stderr.strip()[-300:]}")
    return int(found[1])


def per_element(program: Path, kernel: str) -> float:
    """Instructions for one element of a row."""
    whole, without = (count(program, name, N, V) for name in (kernel, "none"))
    return (whole - without) / (N * V)


def measure() -> list[dict[str, Any]]:
    """Every kernel in every dtype on every instruction set that valgrind knows."""
    with tempfile.TemporaryDirectory() as folder:
        programs = {case: build(Path(folder), *case) for case in product(OF_DTYPE, OF_ISA)}
        return [
            {"kernel": k, "dtype": d, "isa": i, "per_element": per_element(program, k)}
            for k, ((d, i), program) in product(KERNELS, programs.items())
        ]


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``instructions.cpu.json``; 1 where instructions cannot be counted."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Count the instructions of the CPU row kernels.")
    parser.add_argument("--output", type=Path, default=result_file.FOLDER)
    arguments = parser.parse_args(argv)
    if reason := why_not():
        print(f"ppg_fast.bench.instructions: {reason}", file=sys.stderr)
        return 1
    compiler = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
    file = machine.header("python -m ppg_fast.bench.instructions", "cpu")
    file["ppg_fast"]["versions"]["g++"] = compiler
    result_file.write(arguments.output, "instructions.cpu", file | {"instructions": measure()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
