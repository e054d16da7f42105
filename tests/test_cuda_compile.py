"""The CUDA sources as compiled code for three architectures: no spills, bulk copies, 128-bit accesses, one exponential
an element."""

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
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
    """The files with the machine code of all units, by architecture."""
    extension = next(Path(native.__file__).parent.glob("_C*.so"))
    return {arch: _files(arch, extension, _compile) for arch in ARCHITECTURES}


def _files(arch: str, extension: Path, compile_units: Callable[[str], list[Path]]) -> list[Path]:
    """The extension where it was built from the sources as they are, with every unit for ``arch``; else cubins that
    are compiled here. The units of one source have one name in it, so that they are counted and not taken out."""
    if sources.misfit(extension) is None:
        found = re.findall(rf": (\w+)\.sm_{arch}\.cubin", _said("--list-elf", extension))
        if Counter(found) == Counter(unit.source.stem for unit in UNITS):
            return [extension]
    return compile_units(arch)


def _compile(arch: str) -> list[Path]:
    """Cached, so that parallel test processes compile once."""
    version = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True).stdout

    def make(out: Path) -> None:
        out.mkdir()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(partial(_compile_unit, arch, out), UNITS))

    return sorted(cached(digest(version, sources.checksum(), arch), ".cubins", make).iterdir())


def _compile_unit(arch: str, out: Path, unit: sources.Unit) -> None:
    flags = ["-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin", "-Werror=all-warnings"]
    command = [str(NVCC), *flags, *unit.flags, "-o", str(out / f"{unit.name}.cubin"), str(unit.source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _tool() -> str:
    if (tool := cuobjdump()) is None:
        pytest.skip("neither the CUDA toolkit nor Triton brings cuobjdump")
    return tool


def _said(*arguments: str | Path) -> str:
    return subprocess.run([_tool(), *arguments], capture_output=True, text=True, check=True).stdout


def disassembled(compiled: dict[str, list[Path]], arch: str) -> list[Kernel]:
    return _kernels(tuple(compiled[arch]), arch)


@lru_cache
def _kernels(files: tuple[Path, ...], arch: str) -> list[Kernel]:
    """All; of sm_100 the sweep's of one dtype: from the sources of sm_90a's, and all would take half a minute more."""
    wanted = re.compile(r"(?!.*onepass<(F32|F16)|.*twopass<(F32|F16))").match if arch == "100" else None
    return [kernel for file in files for kernel in kernels(file, _tool(), f"sm_{arch}", wanted)]


@pytest.mark.parametrize("lacks", [None, 0, len(UNITS) - 1])
def test_the_extensions_own_code_serves_and_is_compiled_where_a_unit_lacks(monkeypatch, lacks):
    def listed(*_: object) -> str:
        stems = [unit.source.stem for i, unit in enumerate(UNITS) if i != lacks]
        names = [f"{stem}.sm_{arch}.cubin" for stem in stems for arch in ("80", "90a")]
        return "\n".join(f"ELF file {i:4}: {name}" for i, name in enumerate(names, 1))

    monkeypatch.setattr(sources, "misfit", lambda extension: None)
    monkeypatch.setitem(globals(), "_said", listed)
    own, compiled_here = Path("_C.so"), [Path("here.cubin")]
    assert _files("90a", own, lambda arch: compiled_here) == ([own] if lacks is None else compiled_here)
    assert _files("100", own, lambda arch: compiled_here) == compiled_here, "not built for it"
    monkeypatch.setattr(sources, "misfit", lambda extension: "built from other sources")
    assert _files("90a", own, lambda arch: compiled_here) == compiled_here


def test_the_extension_has_every_unit(compiled):
    """Nothing is compiled twice where CI has built it from these sources for all."""
    extension = next(Path(native.__file__).parent.glob("_C*.so"))
    told = sources.built(extension)
    if sources.misfit(extension) or not {f"sm_{arch}" for arch in ARCHITECTURES} <= {*told.gpus}:
        pytest.skip("built from other sources or for other GPUs")
    assert compiled == {arch: [extension] for arch in ARCHITECTURES}


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
    usage = "".join(_said("--gpu-architecture", f"sm_{arch}", "--dump-resource-usage", file) for file in compiled[arch])
    frames = re.findall(r"STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert len(frames) == usage.count("Function ") >= len(disassembled(compiled, arch))
    assert set(frames) == {("0", "0")}, usage


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
