"""Reads the machine code of a cubin or of the extension: the instructions of each kernel, the runs of them without a
branch, the ways between those."""

import re
import shutil
import subprocess
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path


def cuobjdump() -> str | None:
    """The disassembler of the CUDA toolkit, or the one that comes with Triton; None where there is neither."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(bundled) if bundled and bundled.exists() else None


# how the names of the kernels begin
OURS = ("policy_loss", "logprobs", "distillation", "scale", "partial", "credit")


@dataclass
class Kernel:
    name: str  # without namespaces and arguments: policy_loss_onepass<BF16, false, 1, 512>
    code: list[tuple[int, str]]  # address, instruction

    def count(self, prefix: str) -> int:
        """Instructions whose mnemonic begins with ``prefix``."""
        return sum(times for name, times in self.mnemonics.items() if name.startswith(prefix))

    @cached_property
    def mnemonics(self) -> Counter[str]:
        return Counter(mnemonic(text) for _, text in self.code)

    @cached_property
    def after(self) -> dict[int, set[int]]:
        """Where each instruction may go on."""
        after: dict[int, set[int]] = {address: set() for address, _ in self.code}
        for (address, text), (following, _) in zip(self.code, [*self.code[1:], (-1, "")], strict=True):
            if m := re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", text):
                after[address].add(int(m[1], 16))
            if not re.match(r"BRA 0x|EXIT|RET", text):
                after[address].add(following)
        return after

    def loop_around(self, prefix: str) -> "Kernel":
        """The outermost loop with the first instruction whose mnemonic begins with ``prefix``, as a kernel of its own:
        what can run after it and before it again, wherever ptxas has put that code, and what is called from there."""
        before: dict[int, set[int]] = {address: set() for address, _ in self.code}
        for address, targets in self.after.items():
            for target in targets & before.keys():
                before[target].add(address)
        calls = ((address, re.search(r"\bCALL\S* .*?0x([0-9a-f]+)", text)) for address, text in self.code)
        called = {address: int(m[1], 16) for address, m in calls if m}  # and returns to the instruction behind it
        here = next(address for address, text in self.code if mnemonic(text).startswith(prefix))
        loop = reached(self.after, self.after[here]) & reached(before, before[here])
        while functions := {called[address] for address in loop & called.keys()} - loop:
            loop |= reached(self.after, functions)
        return Kernel(self.name, [(address, text) for address, text in self.code if address in loop])

    def way(self, start: int, end: int, passing: str = "", times: int = 0) -> list[str]:
        """The instructions that are run at least behind ``start`` and before ``end``, which may be the same one, where
        mnemonics that begin with ``passing`` are passed that many times; ValueError where no way leads there."""
        counted = {address for address, text in self.code if mnemonic(text).startswith(passing)} if times else set()
        came: dict[tuple[int, int], tuple[int, int]] = {}
        waiting = deque([begin := (start, 0)])
        while waiting:
            here = waiting.popleft()
            for following in sorted(self.after.get(here[0], ())):
                there = following, min(times, here[1] + (following in counted))
                if there not in came:
                    came[there] = here
                    waiting.append(there)
        if (at := (end, times)) not in came:
            raise ValueError(f"{self.name}: no way leads from {start:#x} to {end:#x}")
        text, back = dict(self.code), []
        while (at := came[at]) != begin:
            back.append(text[at[0]])
        return back[::-1]

    def blocks(self) -> Iterator["Kernel"]:
        """The runs of instructions without a branch or a branch target, as kernels of their own."""
        jumps = [re.search(r"0x([0-9a-f]+)", text) for _, text in self.code if re.search(r"\b(BRA|BSSY)\b", text)]
        targets = {int(m[1], 16) for m in jumps if m}
        run: list[tuple[int, str]] = []
        for address, text in self.code:
            if address in targets and run:
                yield Kernel(self.name, run)
                run = []
            run.append((address, text))
            if re.search(r"\b(BRA|EXIT|RET|BSYNC)\b", text):
                yield Kernel(self.name, run)
                run = []
        yield Kernel(self.name, run)

    def straight(self) -> Iterator[Counter[str]]:
        """The mnemonics of each of its `blocks`."""
        return (block.mnemonics for block in self.blocks())


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
    kernel = next(n for n in name if n.startswith(OURS))
    types = re.search(r"NS_\d+(BF16|F16|F32)E|N3ppg\d(BF16|F16|F32)E", mangled)
    flags = [("false", "true")[int(bit)] for bit in re.findall(r"Lb([01])E", mangled)]
    numbers = re.findall(r"Li(\d+)E", mangled)
    element = [t for t in types.groups() if t] if types else []
    return f"{kernel}<{', '.join([*element, *flags, *numbers])}>"


def kernels(
    file: Path, disassembler: str, arch: str | None = None, wanted: Callable[[str], bool] | None = None
) -> list[Kernel]:
    """Every kernel of ``file``, or those of one architecture and with a `readable` name that is ``wanted``."""
    options = ["--gpu-architecture", arch] if arch else []
    if wanted:
        listed = _said(disassembler, *options, "--dump-elf-symbols", file)
        names = [name for name in re.findall(r"STO_ENTRY\s+(\S+)", listed) if wanted(readable(name))]
        if not names:
            return []
        options += ["--function", ",".join(names)]
    found: list[Kernel] = []
    for line in _said(disassembler, *options, "--dump-sass", file).splitlines():
        if m := re.match(r"\s+Function : (\S+)", line):
            found.append(Kernel(readable(m[1]), []))
        elif m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            found[-1].code.append((int(m[1], 16), m[2]))
    return found


def _said(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
