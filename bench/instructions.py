"""What the CPU row kernels cost apart from memory: `python -m ppg_fast.bench.instructions`.

Their instructions for each element, counted by callgrind: a figure that does not depend on the machine's mood. A run
without a kernel is counted too and taken off: loading and the making of inputs. valgrind knows no AVX-512.

And the time that one thread takes for one row again and again, whose memory stays in the cache, beside copying (in
place) or reading (forward only) as many rows: however well memory is overlapped, the kernel takes no less. Of each the
fastest round of passes that are a minute apart counts: others on the same machine only slow one down.
"""

import argparse
import os
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
from .tables import NOT_MEASURED, Results, of, table

N, V = 4, 8192
KERNELS = ("policy_loss", "logprobs")
FLAGS = ("-O3", "-std=c++20", "-ffp-contract=fast", "-Wno-attributes", "-Wno-psabi")  # as in setup.py
OF_DTYPE = {"float32": ("-DPPG_DTYPE=F32",), "bfloat16": ("-DPPG_DTYPE=BF16",)}
OF_ISA = {"avx512": ("-DPPG_LANES=16",), "avx2": ("-DPPG_LANES=8",), "baseline": ("-DPPG_LANES=4",)}
COUNTED = ("avx2", "baseline")
TIMED, ROUNDS, PASSES = (2048, 32000), 15, 4  # the rows of the benchmark of policy_loss
FIELDS = ("rows", "one_row", "copy", "read")  # of a round; the fifth is a cycle
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
    """Instructions for one element of a row, by rows beyond the first: before that one memory is set up."""
    whole, without = (count(program, name, N + 1, V) - count(program, name, 1, V) for name in (kernel, "none"))
    return (whole - without) / (N * V)


def times(program: Path, kernel: str) -> dict[str, float]:
    """The least of a round's `FIELDS`, nanoseconds an element, and the ``cycles`` of one row, by one thread."""
    N, V = TIMED
    command = [str(program), kernel, str(N), str(V), str(ROUNDS)]
    memory = os.environ | machine.environment(1, "tuned")  # as the benchmark has it
    lines = subprocess.run(command, capture_output=True, text=True, check=True, env=memory).stdout.splitlines()
    rounds = [tuple(map(float, line.split())) for line in lines]
    found = {name: min(r[i] for r in rounds) / (N * V) * 1e9 for i, name in enumerate(FIELDS)}
    return found | {"cycles": min(r[1] / r[4] for r in rounds) / (N * V)}


def measure() -> list[dict[str, Any]]:
    """Every kernel in every dtype on every instruction set of this processor, counted where valgrind knows it."""
    from ppg_fast import native

    here = native.ISAS[native.ISAS.index(native.isa()) :]
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        kinds = list(product(OF_DTYPE, (isa for isa in OF_ISA if isa in here)))
        programs = {(dtype, isa): build(Path(folder), dtype, isa) for dtype, isa in kinds}
        for (dtype, isa), kernel in product(kinds, KERNELS):
            row = {"kernel": kernel, "dtype": dtype, "isa": isa}
            counted = {"per_element": per_element(programs[dtype, isa], kernel)} if isa in COUNTED else {}
            found[dtype, isa, kernel] = row | counted
        for (dtype, isa, kernel), row in [*found.items()] * PASSES:
            taken = times(programs[dtype, isa], kernel)
            row |= {name: min(value, row.get(name, value)) for name, value in taken.items()}
    return [*found.values()]


def instructions_section(results: Results) -> str:
    """Of each processor: instructions for each element of a row, and the least that a kernel takes of moving rows."""
    text = ""
    for where, file in of(results, "instructions"):
        rows = [
            (
                f"{c['kernel']}, {c['dtype']}, {c['isa']}",
                f"{c['per_element']:.2f}" if "per_element" in c else "",
                f"{c['cycles']:.2f}",
                f"{c['one_row']:.3f} ns",
                f"{c['rows']:.3f} ns",
                f"{c[what]:.3f} ns ({what})",
                f"{c['one_row'] / c[what]:.2f}",
            )
            for c in file["instructions"]
            for what in ["copy" if c["kernel"] == "policy_loss" else "read"]
        ]
        heads = (where, "instructions an element", "cycles", "one row again and again", "rows", "memory alone")
        heads = (*heads, "at least")
        text += table(heads, rows) + "\n"
    return text.rstrip("\n") + "\n" if text else NOT_MEASURED


def main(argv: Sequence[str] | None = None) -> int:
    """Write this processor's file; 1 where instructions cannot be counted."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Measure the CPU row kernels apart from memory.")
    parser.add_argument("--output", type=Path, default=result_file.FOLDER)
    arguments = parser.parse_args(argv)
    if reason := why_not():
        print(f"ppg_fast.bench.instructions: {reason}", file=sys.stderr)
        return 1
    compiler = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
    file = machine.header("python -m ppg_fast.bench.instructions", "cpu")
    file["ppg_fast"]["versions"]["g++"] = compiler
    name = result_file.name_of("instructions", "cpu", file["machine_info"])
    result_file.write(arguments.output, name, file | {"instructions": measure()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
