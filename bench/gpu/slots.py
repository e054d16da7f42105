"""Issue slots of the one-pass kernel, from the machine code of the extension."""

import re
from pathlib import Path

from . import sass
from .model import Counts

WIDE_STORE, WIDE_LOAD, EXPONENTIAL, WAIT = "STG.E.EF.128", "LDS.128", "MUFU.EX2", "SYNCS.PHASECHK"


def read(extension: Path, arch: str, disassembler: str) -> dict[str, Counts]:
    """Name of each one-pass kernel without a softcap -> what it issues; empty where there is no code for ``arch``."""

    def wanted(name: str) -> bool:
        return re.match(r"policy_loss_onepass<(F32|BF16), false, \d, \d+>", name) is not None

    return {kernel.name: of(kernel) for kernel in sass.kernels(extension, disassembler, arch, wanted)}


def of(kernel: sass.Kernel) -> Counts:
    """Each sweep is the shortest way round through its block for whole, aligned chunks, the rest of a row the shortest
    way from one to the other and back; ValueError where the code is not built that way."""
    vector = 4 if "<F32" in kernel.name else 8
    blocks = [block for block in kernel.blocks() if block.count(WIDE_LOAD)]
    # one exponential more than elements: of the moving reference
    summing = [b for b in blocks if b.count(EXPONENTIAL) == vector * b.count(WIDE_LOAD) + 1]
    if not summing:
        raise ValueError(f"{kernel.name}: no block sums whole chunks")
    first = max(summing, key=lambda b: b.count(WIDE_LOAD))
    rounds = [(block, _round(kernel, block)) for block in blocks if block is not first]
    storing = [
        (block, way)
        for block, way in rounds
        if (n := way.count(WIDE_STORE)) and n == block.count(WIDE_LOAD) and way.count(EXPONENTIAL) == vector * n
    ]
    if not storing:
        raise ValueError(f"{kernel.name}: no block stores whole chunks")
    second, around = max(storing, key=lambda pair: pair[0].count(WIDE_LOAD))
    elements = vector * first.count(WIDE_LOAD), vector * second.count(WIDE_LOAD)
    once = _round(kernel, first)
    between = len(first.code) + len(_way(kernel, first, second)) + len(second.code) + len(_way(kernel, second, first))
    sent = next(a for a, text in kernel.code if sass.mnemonic(text).startswith("STAS"))
    back = sass.Kernel(kernel.name, [(-1, text) for text in kernel.way(sent, first.code[0][0])])
    return Counts(
        first=len(once.code) / elements[0],
        second=len(around.code) / elements[1],
        row=between - len(once.code) - len(around.code),
        forward=len(first.code) + len(kernel.way(first.code[-1][0], sent)) + 1 + len(back.code) - len(once.code),
        waits=back.count(WAIT) > once.count(WAIT),  # for more than the next chunk
        exp_first=once.count(EXPONENTIAL) / elements[0],
        exp_second=around.count(EXPONENTIAL) / elements[1],
    )


def _way(kernel: sass.Kernel, start: sass.Kernel, end: sass.Kernel) -> list[str]:
    return kernel.way(start.code[-1][0], end.code[0][0])


def _round(kernel: sass.Kernel, block: sass.Kernel) -> sass.Kernel:
    """What is run at least from the beginning of ``block`` to its next beginning; nothing where there is none."""
    try:
        way = _way(kernel, block, block)
    except ValueError:
        return sass.Kernel(kernel.name, [])
    return sass.Kernel(kernel.name, block.code + [(-1, text) for text in way])
