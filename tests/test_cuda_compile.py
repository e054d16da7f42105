"""The CUDA sources as compiled code for three architectures: no spills, bulk copies, 128-bit accesses, one exponential
an element."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
import sources
from emulator.build import cached, digest
from ppg_fast.bench.gpu.sass import Kernel, cuobjdump, kernels

from ppg_fast import native

ROOT = Path(__file__).parents[1]
UNITS = sources.cuda_units()
ARCHITECTURES = ("80", "90a", "100")
SCORE_NORM = 2  # enum Sums in csrc/args.h
WIDE_STORE = "STG.E.EF.128"  # EF: evict first, as the gradient is not read again here
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


@pytest.fixture(scope="session")
def compiled() -> dict[str, list[Path]]:
    """The cubins by architecture: those of the extension where it was built from the sources as they are, else compiled
    here. Cached, so that parallel test processes compile once."""
    make = _compile if sources.misfit(_extension()) else _extract
    version = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True).stdout
    folder = cached(digest(version, sources.checksum(), make.__name__), ".cubins", make)
    return {arch: sorted(folder.glob(f"*.sm_{arch}.cubin")) for arch in ARCHITECTURES}


def _extract(out: Path) -> None:
    """The cubins out of the extension, one a unit and architecture; compiled where it was built for other GPUs."""
    out.mkdir()
    subprocess.run([_tool(), "--extract-elf", "all", _extension()], cwd=out, capture_output=True, check=True)
    if len(list(out.iterdir())) != len(UNITS) * len(ARCHITECTURES):
        shutil.rmtree(out)
        _compile(out)


def _extension() -> Path:
    return next(Path(native.__file__).parent.glob("_C*.so"))


def _compile(out: Path) -> None:
    out.mkdir()

    def one(job: tuple[str, sources.Unit]) -> None:
        arch, unit = job
        flags = ["-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin", "-Werror=all-warnings"]
        cubin = out / f"{unit.name}.sm_{arch}.cubin"
        command = [str(NVCC), *flags, *unit.flags, "-o", str(cubin), str(unit.source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, [(arch, unit) for unit in UNITS for arch in ARCHITECTURES]))


def _tool() -> str:
    if (tool := cuobjdump()) is None:
        pytest.skip("neither the CUDA toolkit nor Triton brings cuobjdump")
    return tool


def disassembled(compiled, arch):
    return [kernel for cubin in compiled[arch] for kernel in _kernels(cubin)]


@lru_cache
def _kernels(cubin: Path) -> list[Kernel]:
    return kernels(cubin, _tool())


def test_a_loop_is_found_by_its_flow():
    """The compiler moves slow paths out of line: a jump back from there need not close a loop, and belongs to it."""
    lines = (
        "BAR.SYNC 0x0",  # 0
        "LDS R1, [R2]",  # 10: the head of the loop
        "@P1 BRA 0x60",  # 20
        "CALL.REL.NOINC 0xd0",  # 30
        "FADD R1, R1, R3",  # 40
        "BRA.DIV UR4, 0xa0",  # 50
        "STAS.128 [R2.64], R4",  # 60
        "@!P0 BRA 0x10",  # 70
        "BAR.SYNC 0x0",  # 80
        "EXIT",  # 90
        "SHFL.BFLY R1, R1",  # a0: of 50; by address its way back is the shortest loop around the STAS, with a barrier
        "BRA 0x60",  # b0
        "LDG.E R1, [R2]",  # c0: nobody jumps here
        "MUFU.RCP R1, R1",  # d0
        "RET.REL.NODEC R2 0x0",  # e0
    )
    loop = Kernel("", [(16 * i, text) for i, text in enumerate(lines)]).loop_around("STAS")
    assert [address // 16 for address, _ in loop.code] == [1, 2, 3, 4, 5, 6, 7, 10, 11, 13, 14]


def test_setup_builds_what_is_checked_here():
    text = (ROOT / "setup.py").read_text()
    assert [arch for arch in ARCHITECTURES if f"code=sm_{arch}" not in text] == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_spills(compiled, arch):
    """What spills has a stack; warnings of nvcc are errors in CI, .ci/run."""
    assert len(compiled[arch]) == len(UNITS)
    for cubin in compiled[arch]:
        command = [_tool(), "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        frames = re.findall(r"STACK:(\d+) .*LOCAL:(\d+)", usage)
        assert len(frames) == usage.count("Function "), usage
        assert (set(frames) or {("0", "0")}) == {("0", "0")}, usage
        assert frames or cubin.name.startswith("policy_loss."), f"{cubin.name}: only this unit launches those of others"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_wide_accesses(compiled, arch):
    """Every kernel over the vocabulary reads and writes 16 bytes an instruction."""
    checked = 0
    for kernel in disassembled(compiled, arch):
        # empty there
        if kernel.name.startswith(("partial_returns", "credit")) or (arch == "80" and "onepass" in kernel.name):
            continue
        loads = kernel.count("LDS.128") if "onepass" in kernel.name else kernel.count("LDG.E.128")
        assert loads > 0, kernel.name
        assert kernel.count(WIDE_STORE) > 0, kernel.name
        assert kernel.count("LDL") + kernel.count("STL") == 0, f"{kernel.name}: local memory"
        checked += 1
    assert checked


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_sweep_may_begin_while_the_launch_before_it_runs(compiled, arch):
    for kernel in disassembled(compiled, arch):
        swept, credit = "policy_loss" in kernel.name, kernel.name.startswith("credit")
        assert kernel.count("ACQBULK") == (swept and arch != "80"), f"{kernel.name}: waits for the launch before it"
        assert kernel.count("PREEXIT") == (credit and arch != "80"), f"{kernel.name}: lets the next one start"
        if credit and arch != "80":
            first = next(i for i, (_, text) in enumerate(kernel.code) if "PREEXIT" in text)
            assert not any("LDG" in text for _, text in kernel.code[:first]), "before anything else"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_are_scaled_by_wide_accesses(compiled, arch):
    """In place one load and one store of 16 bytes an iteration; from float32 two such loads for eight values. What
    else loads is for the ends of rows, and for the scale."""
    found = [kernel for kernel in disassembled(compiled, arch) if kernel.name.startswith("scale_rows")]
    assert len(found) == 5, "three dtypes in place, and float32 into two others"
    for kernel in found:
        assert kernel.count(WIDE_STORE) >= 1, kernel.name
        assert kernel.count("LDG.E.128") >= kernel.count(WIDE_STORE), kernel.name
        assert kernel.count("LDL") + kernel.count("STL") == 0, kernel.name


def test_the_one_pass_kernel_on_hopper(compiled):
    """Bulk copies, mbarriers, remote stores; in the row loop no CTA barrier, no load from memory, no more exponentials
    than elements."""
    found = [kernel for kernel in disassembled(compiled, "90a") if "onepass" in kernel.name]
    assert {re.search(r"<(.*)>", kernel.name)[1] for kernel in found} == {
        f"{dtype}, {softcap}, {sums}, {consumers}"
        for dtype in ("F32", "BF16", "F16")
        for softcap, consumers in (("false", 256), ("false", 512), ("true", 512))
        for sums in range(SCORE_NORM + 1)
    }
    for kernel in found:
        dtype, softcap, sums, _ = re.search(r"<(\w+), (\w+), (\w+), (\d+)>", kernel.name).groups()
        assert kernel.count("UBLKCP") == 2, f"{kernel.name}: bulk copies, of the first row and of the others"
        assert kernel.count("STAS.128") == 1, f"{kernel.name}: one remote store"
        assert kernel.count("STAS") == 1 + (int(sums) == SCORE_NORM), (
            f"{kernel.name}: and one of 4 bytes with a score norm"
        )
        assert kernel.count("SYNCS.PHASECHK") > 0, f"{kernel.name}: waits for mbarriers"
        assert kernel.count("UCGABAR_WAIT") == 2, f"{kernel.name}: two cluster barriers"
        rows, finisher = (kernel.loop_around(name) for name in ("STAS", "SYNCS.ARRIVE.TRANS64.RED"))
        for name in ("BAR.SYNC", "LDG", "ATOM", "MEMBAR", "UCGABAR", "CALL"):
            assert rows.count(name) == 0, f"{kernel.name}: {name} in the loop over rows; the helpers look up and divide"
        for name in ("BAR.SYNC", "LDG", "ATOM", "MEMBAR", "UCGABAR"):
            assert finisher.count(name) == 0, f"{kernel.name}: {name} in the finisher's loop over rows"
        assert kernel.count("BAR.SYNC") <= 6, (
            f"{kernel.name}: ptxas puts one behind each cluster barrier; one in the count, three in the sum of losses"
        )
        assert kernel.count("ATOM") == 1, f"{kernel.name}: one ticket"
        vectors = 4 if softcap == "false" else 2  # of a thread in a step, one or two chunks of 16 KB
        elements = vectors * (4 if dtype == "F32" else 8)
        wanted = elements * (2 if softcap == "true" else 1) + 1  # the tanh takes one; one for the moving reference
        blocks = [(run["MUFU.EX2"], run["LDS.128"]) for run in rows.straight()]
        assert (wanted, vectors) in blocks, (
            f"{kernel.name}: sweep 1, aligned: {wanted} EX2 for {elements} elements in {vectors} loads"
        )
        assert (wanted, 2 * vectors) in blocks, f"{kernel.name}: sweep 1, unaligned: twice the loads"
        assert max(ex2 for ex2, _ in blocks) == wanted, f"{kernel.name}: more exponentials than elements"


def test_instructions_an_element_of_the_one_pass_kernel(compiled):
    """Of bfloat16 rows that are aligned, in a round of the loop over chunks, the waits for them apart. A warp's
    exponential takes a scheduler 8 cycles, so that more than 8 instructions an element would cost time."""
    found = {kernel.name: kernel for kernel in disassembled(compiled, "90a")}
    for consumers in (256, 512):
        kernel = found[f"policy_loss_onepass<BF16, false, 0, {consumers}>"]
        for exponentials, stores, limit in ((33, 0, 8.1), (32, 4, 7.5)):  # the two sweeps
            rounds = [
                Kernel(kernel.name, [*block.code, *((0, text) for text in way)])
                for block in kernel.loop_around("STAS").blocks()
                if block.count("LDS.128") == 4
                for way in [kernel.way(block.code[-1][0], block.code[0][0])]
            ]
            (one,) = (r for r in rounds if (r.count("MUFU.EX2"), r.count(WIDE_STORE)) == (exponentials, stores))
            assert len(one.code) <= 32 * limit, f"{kernel.name}: {len(one.code) / 32} instructions an element"
