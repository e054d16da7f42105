"""The parts of a run: what each one runs, and how its outcome is read."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import build, pack, plans, tools
from .driver import Collected, Part
from .schedule import Slot

Collect = Callable[[dict[str, Any], str], Collected]
SMOKE = "test_every_plan_agrees_with_float64 and cuda and bfloat16"  # of tests/test_gpu.py, the first of the files


@dataclass(frozen=True)
class Setting:
    """Where and how the parts run. ``work``: a folder for what is built. ``device``, ``tiny``: of the measuring
    processes. ``tests``, ``files``, ``processes``: options, files and number of processes of pytest. ``compiler``: the
    command that builds the extension, where another is to be run than the one of the library."""

    root: Path
    work: Path
    device: str
    tiny: bool
    tests: tuple[str, ...]
    files: tuple[str, ...]
    processes: int
    compiler: tuple[str, ...] = ()

    @property
    def site(self) -> Path:
        return self.work / "site"

    @property
    def watched(self) -> Path:
        """The package for what is to be proved: its kernels end where they would wait for ever, if such an extension is
        carried along."""
        return self.work / "watched"

    @property
    def carried(self) -> Path:
        """The extension with a watchdog, where `make gpu-pack` puts it."""
        return self.root / pack.PACK / "watchdog" / pack.EXTENSION


def worker(part: str, setting: Setting) -> list[str]:
    """The command of a measuring process."""
    options = ["--device", setting.device, "--until", "{until}", *(["--tiny"] if setting.tiny else [])]
    return [sys.executable, "-m", "ppg_fast.bench.gpu.measure", part, "{lines}", *options]


def probe(device: str) -> list[str]:
    """Ends well where the device answers."""
    return [sys.executable, "-c", f"import torch; assert torch.ones(2, device={device!r}).sum().item() == 2"]


def _ended(record: dict[str, Any], output: str) -> Collected:
    """Passed where every process and every piece of work was."""
    cases = record["cases"]
    wrong = [case for case in cases if case["outcome"] != "passed"]
    status = next((n for n in record["statuses"] if n), None)
    if wrong:
        first = f"{wrong[0]['name']} {wrong[0]['outcome']}: {wrong[0].get('message', '')[:200]}"
        return {}, f"{len(wrong)} of {len(cases)} pieces of work, first {first}"
    last = next((line for line in reversed(output.strip().splitlines()) if line.strip()), "")
    return {}, None if status is None else f"exit status {status}: {last[:300]}"


def _sanitized(tool: str) -> Collect:
    def collect(record: dict[str, Any], output: str) -> Collected:
        found = [summary for summary in tools.sanitized(output) if summary["tool"] == tool]
        wrong = [f"{summary['errors']} errors" for summary in found if summary["errors"]]
        absent = [] if found else ["no summary"]
        return {"summaries": found}, "; ".join(wrong + absent) or _ended(record, output)[1]

    return collect


def _moved(record: dict[str, Any], output: str) -> Collected:
    """Bytes of memory of each call: its kernels are those that ncu saw since the call before."""
    kernels, cases = tools.ncu_kernels(output), [line for line in record["results"] if "op" in line]
    if len(kernels) != len(cases):
        said = _ended(record, output)[1] or ""
        return {"kernels": kernels}, f"{len(kernels)} kernels for {len(cases)} calls; {said}"
    for case, kernel in zip(cases, kernels, strict=True):
        case |= {"kernel": kernel["kernel"][:120], "bytes": sum(kernel.get(name, 0.0) for name in tools.DRAM[:2])}
        case["seconds"], case["over_least"] = kernel.get(tools.DRAM[2]), case["bytes"] / (case["read"] + case["write"])
    return _ended(record, output)


def link(setting: Setting) -> None:
    """Both packages, around what extensions there are now."""
    build.link(setting.root, setting.site)
    build.link(setting.root, setting.watched, setting.carried if watchdog(setting) else None)


def watchdog(setting: Setting) -> bool:
    """Whether an extension with one is carried along that fits."""
    return not setting.tiny and build.misfit(setting.root, setting.carried, watchdog=True) is None


def to_compile(names: Sequence[str], setting: Setting) -> list[list[str]]:
    """Nothing where all that the parts need is carried and of today's sources."""
    root, program = setting.root, setting.work / "plans"
    if setting.compiler:
        return [list(setting.compiler), plans.command(root, program)]
    commands = [] if build.is_current(root) else [build.command(root)]
    if "plans" in names and not plans.is_current(root, program) and shutil.which("nvcc"):
        program.unlink(missing_ok=True)
        commands.append(plans.command(root, program))
    return commands


def _built(setting: Setting) -> Collect:
    def collect(record: dict[str, Any], output: str) -> Collected:
        found, reason = _ended(record, output)
        if reason is None and not setting.compiler and not build.is_current(setting.root):
            reason = "no extension was built: is there a C++ compiler?"
        extensions = [path.name for path in sorted((setting.root / "ppg_fast").glob("_C*.so"))]
        return {**found, "extension": extensions, "watchdog": watchdog(setting)}, reason

    return collect


def parts(names: Sequence[str], setting: Setting, slots: dict[str, Slot]) -> list[Part]:
    """What to run, in order; what a missing tool or a missing GPU leaves out says so."""
    environment, proving = build.environment(setting.site), build.environment(setting.watched)
    exact = {**proving, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a byte too far is outside of an allocation

    watched = {"folder": setting.watched, "environment": proving}

    def part(
        name: str, commands: list[list[str]], collect: Collect = _ended, needs: str | None = None, **more: Any
    ) -> Part:
        absent = f"{needs} is not on PATH" if needs and not shutil.which(needs) else None
        slot = slots[name]
        given = {"folder": setting.site, "environment": environment, "missing": absent, **more}
        limit = slot.most if name == "build" and commands else slot.limit  # everything else waits for it
        return Part(name, limit, commands, collect, slot.most, slot.estimate, slot.reason, **given)

    def measured(name: str) -> Part:
        return part(name, [worker(name, setting)])

    def sanitizer(tool: str) -> Part:
        words = tools.sanitizer_command(tool, worker("kernels", setting))
        return part(tool, [words], _sanitized(tool), "compute-sanitizer", **{**watched, "environment": exact})

    def tests(processes: int, files: Sequence[str], *options: str) -> list[list[str]]:
        return tools.pytest_commands(setting.root, files, processes, [*setting.tests, *options])

    compiled, program = to_compile(names, setting), setting.work / "plans"
    own = {"folder": setting.root, "environment": {}, "on_device": False}
    quick = [] if setting.tiny else tests(1, setting.files[:1], "-k", SMOKE)
    carried = plans.is_current(setting.root, program)
    known = [
        part("build", compiled, _built(setting), **own, after=lambda: link(setting)),
        part("smoke", [worker("smoke", setting), *quick], **watched),
        part("plans", [[str(program), "{lines}", "{until}"]], needs=None if carried else "nvcc"),
        part("tests", tests(setting.processes, setting.files), lambda record, _: tools.tested(record), **watched),
        part("dram", [tools.ncu_command(worker("dram", setting))], _moved, "ncu"),
        *(measured(name) for name in ("bench", "counts", "steps", "peers")),
        *(sanitizer(tool) for tool in ("memcheck", "racecheck")),
    ]
    by_name = {part.name: part for part in known}
    if "build" not in names and compiled:
        names = ["build", *names]
    return [by_name[name] for name in names]


def cores() -> int:
    return len(os.sched_getaffinity(0))
