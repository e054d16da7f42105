"""A run without a GPU, `make gpu ARGS=--dry`: every part in its order and with its limits, tiny sizes on a CPU for
those that can, and for those that cannot tools that say what the real ones say. Nothing in its file is a measurement.

`python dry.py TOOL ARGUMENTS` is such a tool.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOOLS = ("nvcc", "ncu", "compute-sanitizer")
FILES = ("tests/test_partial_returns.py",)
PLAN = {"plan": {"cluster": -1, "threads": 0, "slots": 0}, "N": 8192, "V": 128256, "full": 100, "launched": False}
COLUMNS = (
    '"ID","Process ID","Process Name","Kernel Name","Context","dram__bytes_read.sum","dram__bytes_write.sum",'
    '"gpu__time_duration.sum"\n"","","","","","Gbyte","Mbyte","us"'
)
LAUNCH = '"77","python3","policy_loss_onepass","1","2.10","2,050.5","1,012.3"'
SUMMARIES = {
    "memcheck": "ERROR SUMMARY: 0 errors",
    "racecheck": "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
}


def setting(root: Path, options: Sequence[str]) -> dict[str, Any]:
    """The fields of `parts.Setting` for a run with these tools, which come first on PATH from now on; the tests are a
    few that run on a CPU."""
    work = root / "build/gpu-dry"
    tools = work / "tools"
    tools.mkdir(parents=True, exist_ok=True)
    for name in TOOLS:
        _program(tools / name, name)
    os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"
    return {
        "work": work, "device": "cpu", "tiny": True, "tests": ("-k", "cpu", *options), "processes": 2,
        "files": tuple(str(root / name) for name in FILES),
        "compiler": (sys.executable, "-S", str(Path(__file__).resolve()), "setup"),
    }  # fmt: skip


def _program(path: Path, tool: str) -> None:
    words = shlex.join([sys.executable, "-S", str(Path(__file__).resolve()), tool])
    path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    path.chmod(0o755)


def _under_the_tool(words: list[str]) -> int:
    """Run what the tool was given to run."""
    return subprocess.run(words[words.index(sys.executable) :]).returncode


def main(argv: list[str]) -> int:
    """The tool's exit status."""
    tool, *words = argv
    if tool == "setup":
        return 0
    if tool == "nvcc":
        _program(Path(words[words.index("-o") + 1]), "plans")
        return 0
    if tool == "plans":
        with open(words[0], "a") as lines:
            lines.write(json.dumps(PLAN) + "\n")
        return 0
    status = _under_the_tool(words)
    if tool == "compute-sanitizer":
        print(f"========= COMPUTE-SANITIZER\n========= {SUMMARIES[words[words.index('--tool') + 1]]}")
    if tool == "ncu":
        with open(next(word for word in words if word.endswith(".jsonl"))) as lines:
            calls = sum('"op"' in line for line in lines)
        print(COLUMNS, *(f'"{n}",{LAUNCH}' for n in range(calls)), sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
