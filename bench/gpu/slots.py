"""Issue slots of the one-pass kernel, from the machine code of the extension."""

import re
from pathlib import Path

from . import sass
from .model import CHUNK, Counts

WIDE_STORE, WIDE_LOAD, EXPONENTIAL = "STG.E.EF.128", "LDS.128", "MUFU.EX2"
WAIT, RELEASE = "SYNCS.PHASECHK", "SYNCS.ARRIVE"


def read(extension: Path, arch: str, disassembler: str) -> dict[str, Counts]:
    """Name of each one-pass kernel without a softcap -> what it issues; empty where there is no code for ``arch``."""

    def wanted(name: str) -> bool:
        return re.match(r"policy_loss_onepass<(F32|BF16), false, \d, \d+>", name) is not None

    return {kernel.name: of(kernel) for kernel in sass.kernels(extension, disassembler, arch, wanted)}


def of(kernel: sass.Kernel) -> Counts:
    """Each sweep is the shortest way round through its block for whole, aligned chunks, with a wait for each of them or a
    release; the rest of a row is the shortest way from one to the other and back. ValueError where there is none."""
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
