"""A wait for an mbarrier that would last for ever ends the launch and tells its place, under the emulator and in the
machine code."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulator import build as emulator
from emulator.cases import Case, run, shortest_ring
from ppg_fast.bench.gpu.sass import Kernel, cuobjdump, kernels

ROOT = Path(__file__).parents[1]
WAITS = {  # file and line
    (path.name, n)
    for path in (ROOT / "csrc/cuda").glob("policy_loss_*.cuh")
    for n, line in enumerate(path.read_text().splitlines(), 1)
    if "hw::bar_wait" in line
}


@pytest.fixture
def control():
    if why_not := emulator.why_not():
        pytest.skip(why_not)
    library = emulator.build()
    torch.ops.load_library(library)
    control = emulator.Control(library)
    yield control
    control.set()


def place(control, case, cluster, lose) -> tuple[str, int] | None:
    """File and line of the wait that lasted too long when the arrival number ``lose`` was lost; None where none did."""
    control.set(cluster=cluster, threads=256, slots=shortest_ring(case, cluster), resident=1, seed=lose, lose=lose)
    try:
        run(torch.ops.ppg_fast_emulated, case)
    except RuntimeError as error:
        found = re.search(r"never completed: \S*/(\w+.cuh):(\d+) \(block \d+, thread \d+\)", str(error))
        return (found[1], int(found[2])) if found else pytest.fail(str(error))
    return None


def test_a_lost_arrival_ends_the_launch(control):
    """An arrival the less is a phase too late for all who wait: whoever waited longest tells where."""
    case = Case(4099, torch.float32, shift=1, rows=(0, 3, 4, 5) * 5)  # two chunks a row, three batches of rows
    told = {place(control, case, 1, lose) for lose in (*range(1, 20), *range(20, 260, 12))}
    assert told <= {None, *WAITS}
    assert len(told - {None}) >= 5, "nearly all of the kernel's waits"
    assert place(control, case, 1, 0) is None


def test_the_watchdog_is_there_where_it_is_asked_for(tmp_path):
    """Without PPG_WATCHDOG no wait looks at the clock, and none can trap."""
    nvcc, disassembler = shutil.which("nvcc"), cuobjdump()
    if nvcc is None or disassembler is None:
        pytest.skip("needs nvcc and cuobjdump")
    source = tmp_path / "wait.cu"
    source.write_text(
        '#include "hw.cuh"\n'
        "template <int N> __global__ void policy_loss(uint64_t* out) {\n"
        "  auto* bar = reinterpret_cast<uint64_t*>(hw::smem());\n"
        "  hw::bar_wait(bar, 0);\n"
        "  *out = *bar;\n"
        "}\n"
        "template __global__ void policy_loss<1>(uint64_t*);\n"
    )
    code: dict[str, Kernel] = {}
    for flag in ("-DNOTHING", "-DPPG_WATCHDOG"):
        cubin = tmp_path / f"{flag}.cubin"
        flags = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Werror=all-warnings", flag]
        subprocess.run([nvcc, *flags, f"-I{ROOT / 'csrc/cuda'}", "-o", cubin, source], check=True)
        (code[flag],) = kernels(cubin, disassembler)
    without, watched = code["-DNOTHING"], code["-DPPG_WATCHDOG"]
    assert watched.count("SYNCS.PHASECHK") > 0 < without.count("SYNCS.PHASECHK")
    assert watched.count("CALL") == 1, "of the assert that fails"
    assert watched.count("CS2R") > 0, "the clock"
    assert without.count("CALL") + without.count("BPT") == 0
    assert all("SR_CLOCK" not in text for _, text in without.code)
