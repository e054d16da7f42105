"""The CPU kernels without torch, each instruction set by a program of its own, ARM's in an emulator: the error of the
exponential over all fractions and, of ARM, rows against float64 (the others': tests/test_isa.py)."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ppg_fast import backends

SOURCE = Path(__file__).parent / "helpers/row_kernels.cpp"
FLAGS = ("-O2", "-std=c++20", "-ffp-contract=fast", "-Wno-attributes", "-Wno-psabi", "-w")
LANES = {"baseline": 4, "avx2": 8, "avx512": 16}
ARM, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"


def run(folder: Path, compiler: str, *flags: str, emulator: tuple[str, ...] = (), stride: int = 1) -> str:
    program = folder / "row-kernels"
    subprocess.run([compiler, *FLAGS, *flags, str(SOURCE), "-o", str(program)], check=True)
    done = subprocess.run([*emulator, str(program), str(stride)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("isa", LANES)
def test_the_exponential_of_an_instruction_set(tmp_path, isa):
    if reason := backends.why_not("cpu"):
        pytest.skip(reason)
    from ppg_fast import native

    if native.ISAS.index(isa) < native.ISAS.index(native.isa()):
        pytest.skip(f"{isa}: this processor has {native.isa()}")
    assert f"{LANES[isa]} lanes agree with float64" in run(tmp_path, "g++", f"-DPPG_LANES={LANES[isa]}")


@pytest.mark.skipif(
    not (shutil.which(ARM) and shutil.which(QEMU)),
    reason=f"needs {ARM} and {QEMU}: apt install g++-aarch64-linux-gnu qemu-user",
)
def test_arm_in_an_emulator_against_float64(tmp_path):
    flags = ("-DPPG_LANES=4", "-DPPG_ROWS", "-static")
    assert "4 lanes agree with float64" in run(tmp_path, ARM, *flags, emulator=(QEMU,), stride=16)
