"""Reads the machine code of a cubin: the instructions of each kernel, and the runs of them without a branch."""

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


def cuobjdump() -> str | None:
    """The disassembler of the CUDA toolkit, or the one that comes with Triton; None where there is neither."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(bundled) if bundled and bundled.exists() else None


@dataclass
class Kernel:
    name: str  # without namespaces and arguments: policy_loss_onepass<BF16, false, 1, 512>
    code: list[tuple[int, str]]  # address, instruction

    def count(self, prefix: str) -> int:
        """Instructions whose mnemonic begins with ``prefix``."""
        return sum(mnemonic(text).startswith(prefix) for _, text in self.code)

    def loop_around(self, prefix: str) -> "Kernel":
        """The outermost loop with the first instruction whose mnemonic begins with ``prefix``, as a kernel of its own:
        what can run after it and before it again, wherever ptxas has put that code, and what is called from there."""
        after: dict[int, set[int]] = {address: set() for address, _ in self.code}
        before: dict[int, set[int]] = {address: set() for address, _ in self.code}
        called: dict[int, int] = {}
        for (address, text), (following, _) in zip(self.code, [*self.code[1:], (-1, "")], strict=True):
            if m := re.search(r"\bCALL\S* .*?0x([0-9a-f]+)", text):
                called[address] = int(m[1], 16)  # and returns to the instruction behind it
            if m := re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", text):
                after[address].add(int(m[1], 16))
            if not re.match(r"BRA 0x|EXIT|RET", text):
                after[address].add(following)
            for target in after[address] & before.keys():
                before[target].add(address)
        here = next(address for address, text in self.code if mnemonic(text).startswith(prefix))
        loop = reached(after, after[here]) & reached(before, before[here])
        while functions := {called[address] for address in loop & called.keys()} - loop:
            loop |= reached(after, functions)
        return Kernel(self.name, [(address, text) for address, text in self.code if address in loop])

    def straight(self) -> Iterator[Counter[str]]:
        """The mnemonics of each run of instructions without a branch or a branch target."""
        jumps = [re.search(r"0x([0-9a-f]+)", text) for _, text in self.code if re.search(r"\b(BRA|BSSY)\b", text)]
        targets = {int(m[1], 16) for m in jumps if m}
        run: Counter[str] = Counter()
        for address, text in self.code:
            if address in targets and run:
                yield run
                run = Counter()
            run[mnemonic(text)] += 1
            if re.search(r"\b(BRA|EXIT|RET|BSYNC)\b", text):
                yield run
                run = Counter()
        yield run


def reached(steps: dict[int, set[int]], start: set[int]) -> set[int]:
    """``start`` and all that ``steps`` lead to from there."""
    found: set[int] = set()
    waiting = set(start)
    while waiting:
        found.add(address := waiting.pop())
        waiting |= steps.get(address, set()) - found
    return found


def mnemonic(text: str) -> str:
    return re.sub(r"^@!?U?P\S+\s+", "", text).split()[0]


def readable(mangled: str) -> str:
    """A kernel's name and template arguments out of its mangled name; c++filt is not everywhere."""
    name = re.findall(r"\d+([a-z_]+?)(?:I|E)", mangled)
    kernel = next(n for n in name if n.startswith(("policy_loss", "logprobs", "scale", "partial", "credit")))
    types = re.search(r"NS_\d+(BF16|F16|F32)E|N3ppg\d(BF16|F16|F32)E", mangled)
    flags = [("false", "true")[int(bit)] for bit in re.findall(r"Lb([01])E", mangled)]
    numbers = re.findall(r"Li(\d+)E", mangled)
    element = [t for t in types.groups() if t] if types else []
    return f"{kernel}<{', '.join([*element, *flags, *numbers])}>"


def kernels(cubin: Path, disassembler: str) -> list[Kernel]:
    """Every kernel of ``cubin``."""
    text = subprocess.run([disassembler, "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    found: list[Kernel] = []
    for line in text.splitlines():
        if m := re.match(r"\s+Function : (\S+)", line):
            found.append(Kernel(readable(m[1]), []))
        elif m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            found[-1].code.append((int(m[1], 16), m[2]))
    return found
