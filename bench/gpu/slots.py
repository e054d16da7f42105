"""Issue slots of the one-pass kernel, from its machine code."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import build, sass
from .model import CHUNK, Counts

WIDE_STORE, WIDE_LOAD, EXPONENTIAL = "STG.E.EF.128", "LDS.128", "MUFU.EX2"
WAIT, RELEASE = "SYNCS.PHASECHK", "SYNCS.ARRIVE"


def built(root: Path, architectures: Sequence[str]) -> dict[str, dict[str, Counts]]:
    """The one-pass kernels of each architecture, "sm_90a": those of the extension below ``root`` where it is of today's
    sources and has them all, else compiled; ValueError where a tool is missing."""
    if (tool := sass.cuobjdump()) is None:
        raise ValueError("needs cuobjdump, which comes with the CUDA toolkit and with Triton")
    today = build.sources(root)
    for extension in sorted((root / "ppg_fast").glob("_C*.so")):
        if not today.misfit(extension) and set(architectures) <= set(today.built(extension).gpus):
            return {arch: read([extension], arch, tool) for arch in architectures}
    if shutil.which("nvcc") is None:
        raise ValueError("needs an extension of today's sources with CUDA code, or nvcc")
    with tempfile.TemporaryDirectory() as folder:
        return {arch: read(list(_compiled(root, Path(folder), arch)), arch, tool) for arch in architectures}


def _compiled(root: Path, folder: Path, arch: str) -> Iterator[Path]:
    """The units that hold the kernels that are `read`."""
    wanted = {f"policy_loss_sweep-{dtype}-{sums}" for dtype in ("F32", "BF16") for sums in ("PLAIN", "ENTROPY")}
    for unit in build.sources(root).cuda_units():
        if unit.name in wanted:
            cubin = folder / f"{unit.name}.{arch}.cubin"
            flags = ["-std=c++17", "-O3", f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}", "-cubin"]
            subprocess.run(["nvcc", *flags, *unit.flags, "-o", cubin, unit.source], check=True)
            yield cubin


def read(files: Sequence[Path], arch: str, tool: str) -> dict[str, Counts]:
    """Name of each one-pass kernel without softcap and score norm -> what it issues."""

    def wanted(name: str) -> bool:
        return re.match(r"policy_loss_onepass<(F32|BF16), false, [01], \d+>", name) is not None

    return {kernel.name: of(kernel) for file in files for kernel in sass.kernels(file, tool, arch, wanted)}


def of(kernel: sass.Kernel) -> Counts:
    """Each sweep is the shortest way round through its block for whole, aligned chunks, with a wait or a release for
    each of them; the rest of a row is the shortest way from one to the other and back. ValueError without such ways."""
    found = re.search(r"<(\w+), .*, (\d+)>", kernel.name)
    assert found is not None
    vector, threads = 4 if found[1] == "F32" else 8, int(found[2])
    kernel = _without_retries(kernel)
    blocks = [block for block in kernel.blocks() if block.count(WIDE_LOAD)]
    chunks = {id(block): block.count(WIDE_LOAD) * 16 * threads // CHUNK for block in blocks}
    # one exponential more than elements: of the moving reference
    summing = [b for b in blocks if b.count(EXPONENTIAL) == vector * b.count(WIDE_LOAD) + 1]
    if not summing:
        raise ValueError(f"{kernel.name}: no block sums whole chunks")
    first = max(summing, key=lambda block: block.count(WIDE_LOAD))
    rounds = [(block, _round(kernel, block, RELEASE, chunks[id(block)])) for block in blocks if block is not first]
    storing = [
        (block, around)
        for block, around in rounds
        if around.count(WIDE_STORE) == block.count(WIDE_LOAD)
        and around.count(EXPONENTIAL) == vector * block.count(WIDE_LOAD)
    ]
    if not storing:
        raise ValueError(f"{kernel.name}: no block stores whole chunks")
    second, around = max(storing, key=lambda pair: pair[0].count(WIDE_LOAD))
    waits, releases = (WAIT, chunks[id(first)]), (RELEASE, chunks[id(second)])
    once = _round(kernel, first, *waits)
    sent = next(address for address, text in kernel.code if sass.mnemonic(text).startswith("STAS"))
    sending = len(first.code) + len(kernel.way(_end(first), sent)) + 1
    there = kernel.way(sent, _start(second))
    # both are passed on the way to the next row, and the shorter detour of the two is left out
    next_row = max((kernel.way(_end(second), _start(first), *passing) for passing in (waits, releases)), key=len)
    back = kernel.way(sent, _start(first), *waits)
    elements = vector * first.count(WIDE_LOAD), vector * second.count(WIDE_LOAD)
    return Counts(
        first=len(once.code) / elements[0],
        second=len(around.code) / elements[1],
        row=sending + len(there) + len(second.code) + len(next_row) - len(once.code) - len(around.code),
        forward=sending + len(back) - len(once.code),
        exp_first=once.count(EXPONENTIAL) / elements[0],
        exp_second=around.count(EXPONENTIAL) / elements[1],
        waits=any(text.startswith("SHFL") for text in back),  # combines what the others have sent
    )


def _start(block: sass.Kernel) -> int:
    return block.code[0][0]


def _end(block: sass.Kernel) -> int:
    return block.code[-1][0]


def _without_retries(kernel: sass.Kernel) -> sass.Kernel:
    """Without the tests that are made again and again until a wait is over, out of line."""
    code = [
        (address, text)
        for (address, text), (_, following) in zip(kernel.code, [*kernel.code[1:], (-1, "")], strict=True)
        if not (sass.mnemonic(text).startswith(WAIT) and (m := re.search(r"BRA 0x([0-9a-f]+)", following)))
        or int(m[1], 16) > address
    ]
    return sass.Kernel(kernel.name, code)


def _round(kernel: sass.Kernel, block: sass.Kernel, passing: str, times: int) -> sass.Kernel:
    """What is run at least from the beginning of ``block`` to its next beginning; nothing where there is none."""
    try:
        way = kernel.way(_end(block), _start(block), passing, times)
    except ValueError:
        return sass.Kernel(kernel.name, [])
    return sass.Kernel(kernel.name, block.code + [(-1, text) for text in way])
